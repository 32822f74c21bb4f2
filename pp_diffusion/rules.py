"""How a network's outputs become a reverse step; each kernel has rules of its own, in its own file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpyro.distributions as dist


class Parameterization(NamedTuple):
    """How a network's outputs become a reverse step.

    :ivar outputs: a link for each output that the network returns, ``"real"``, ``"positive"`` or ``"unit"``; stock
        networks apply it, others are expected to return values of that kind. Each output has ``x_t``'s shape.
    :ivar reverse: ``(kernel, x_t, rates, *outputs) -> Distribution`` over :math:`x_{t-1}`.
    :ivar shortens: whether the outputs keep their meaning on a chain of fewer steps.
    :ivar allows_full_erasure: whether :math:`\\beta_T = 1` is possible.
    """

    outputs: tuple[str, ...]
    reverse: Callable[..., dist.Distribution]
    shortens: bool = False
    allows_full_erasure: bool = True
