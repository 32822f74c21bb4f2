"""Bits: entries of two values, held by their log odds."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.states.finite import Finite, FiniteKernel


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

    def log_probs(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Array:
        base: Any = distribution
        while not hasattr(base, "logits"):
            base = base.base_dist
        logits = jnp.broadcast_to(base.logits, shape)
        return jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], -1)

    def distribution(self, logits: Array) -> dist.Distribution:
        return self.kernel.bernoulli(logits[..., 1] - logits[..., 0])
