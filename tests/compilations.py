"""How often XLA compiled."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Count:
    number = 0


@contextmanager
def counted() -> Iterator[Count]:
    """What is compiled within the block is counted."""
    count = Count()

    def listen(event: str, _: float, **kwargs: object) -> None:
        count.number += event == EVENT

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
