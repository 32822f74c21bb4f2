"""Bits: entries of two values, held by their log odds."""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.states.entries import Binary
from pp_diffusion.states.finite import Finite, FiniteKernel
from pp_diffusion.states.space import BATCH_NDIM


class BitsKernel(FiniteKernel, Protocol):
    """What the space needs of its kernel."""

    def bernoulli(self, logits: Array) -> dist.Distribution: ...


class Bits(Finite):
    """The two values 0 and 1, in distributions with logits.

    :param kernel: whose states they are.
    """

    kernel: BitsKernel
    entry_name = "bit"

    def __init__(self, kernel: BitsKernel) -> None:
        super().__init__(kernel, num_values=2)

    def parts(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Any:
        base: Any = distribution
        while not hasattr(base, "logits"):
            base = base.base_dist
        return jnp.broadcast_to(base.logits, shape)

    def joined(self, parts: Any) -> dist.Distribution:
        return self.kernel.bernoulli(parts)

    def entries(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Binary:
        return Binary(self.parts(distribution, shape).reshape(*shape[:BATCH_NDIM], -1))

    def distribution(self, entries: Any, shape: tuple[int, ...]) -> dist.Distribution:
        return self.joined(entries.logits.reshape(shape))
