"""Which programs are compiled, by JAX's own report."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[Counter[str]]:
    """How often each function is compiled inside, by its name."""
    programs: Counter[str] = Counter()

    def count(event: str, duration: float, fun_name: str = "", **_: object) -> None:
        if event == EVENT:
            programs[fun_name.removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
