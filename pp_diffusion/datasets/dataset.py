"""What a loader returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jax import Array


@dataclass(frozen=True)
class Dataset:
    """Training and test data, in data units.

    :ivar train: shape ``(N, *event_shape)``.
    :ivar test: shape ``(M, *event_shape)``.
    :ivar log_prob: the exact log density of a generated data set, in nats; ``None`` where it is unknown.
    :ivar train_labels, test_labels: integers of shape ``(N,)`` and ``(M,)``, where there are any.
    """

    train: Any
    test: Any
    log_prob: Callable[[Any], Array] | None = field(default=None, repr=False)
    train_labels: Any = None
    test_labels: Any = None
