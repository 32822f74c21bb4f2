"""Independent entries of finitely many values, as arrays: by the log odds of two values, or by all log probabilities.

Entries lie in the last axis, D of them. The second form does for two values, too, at two to four times the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.matrices import einsum


class Entries(Protocol):
    """Their joint law."""

    def draw(self, rng_key: Array) -> Array:
        """Values, shape ``(…, D)``."""

    def quantile(self, uniform: Array) -> Array:
        """Values by uniform numbers."""

    def log_prob(self, x: Array) -> Array:
        """Of each entry."""

    def log_prob_of_states(self, states: Array) -> Array:
        """Of all entries at once, shape ``(K, …)`` for K states ``(K, D)``."""

    def moments(self) -> tuple[Array, Array]:
        """Each entry's mean and variance."""

    def log_mean(self, log_r: Sequence[Array]) -> Array:
        """The log of the mean of r, which is given at each value: n arrays of shape ``(…, D)``."""

    def tilted(self, log_r: Sequence[Array], most: float = math.inf) -> Self:
        """Times r, whose log ratios are at most so large; as it is where r is zero at all values."""

    def seen(self, weights: Array, x: Array, trust: float) -> Self:
        """This law and, with a share of ``trust``, that of weighted states.

        :param weights: shape ``(K, …)``, of sum 1.
        :param x: the states, shape ``(K, D)`` or ``(K, …, D)``.
        """

    def where(self, condition: Array, other: Any) -> Self:
        """This law where a condition of shape ``(…)`` holds, else another."""

    @property
    def is_finite(self) -> Array:
        """Of shape ``(…)``."""


class Binary(NamedTuple):
    """Entries 0 and 1.

    :ivar logits: log odds of 1.
    """

    logits: Array

    def draw(self, rng_key: Array) -> Array:
        return jax.random.bernoulli(rng_key, jax.nn.sigmoid(self.logits)).astype(self.logits.dtype)

    def quantile(self, uniform: Array) -> Array:
        return (uniform < jax.nn.sigmoid(self.logits)).astype(self.logits.dtype)

    def log_prob(self, x: Array) -> Array:
        return jax.nn.log_sigmoid(jnp.where(x == 1, self.logits, -self.logits))

    def log_prob_of_states(self, states: Array) -> Array:
        ones, zeros = (states == k for k in (1, 0))
        of_ones = einsum("kd,...d->k...", ones.astype(self.logits.dtype), jax.nn.log_sigmoid(self.logits))
        return of_ones + einsum("kd,...d->k...", zeros.astype(self.logits.dtype), jax.nn.log_sigmoid(-self.logits))

    def moments(self) -> tuple[Array, Array]:
        probs = jax.nn.sigmoid(self.logits)
        return probs, probs * (1 - probs)

    def log_mean(self, log_r: Sequence[Array]) -> Array:
        zero, one = log_r
        return jnp.logaddexp(jax.nn.log_sigmoid(self.logits) + one, jax.nn.log_sigmoid(-self.logits) + zero)

    def tilted(self, log_r: Sequence[Array], most: float = math.inf) -> Binary:
        zero, one = log_r
        odds = jnp.where(jnp.isnan(one - zero), 0.0, one - zero)
        least = least_log_odds(self.logits)
        return Binary(jnp.clip(self.logits + jnp.clip(odds, -most, most), least, -least))

    def seen(self, weights: Array, x: Array, trust: float) -> Binary:
        found = einsum("k...,kd->...d" if x.ndim == 2 else "k...,k...d->...d", weights, x.astype(weights.dtype))
        probs = trust * found + (1 - trust) * jax.nn.sigmoid(self.logits)
        probs = jnp.clip(probs, jnp.finfo(probs.dtype).tiny, 1 - jnp.finfo(probs.dtype).eps)
        return Binary(jnp.log(probs) - jnp.log1p(-probs))

    def where(self, condition: Array, other: Binary) -> Binary:
        return Binary(jnp.where(condition[..., None], self.logits, other.logits))

    @property
    def is_finite(self) -> Array:
        return jnp.isfinite(self.logits).all(-1)


class Categorical(NamedTuple):
    """Entries 0…n-1.

    :ivar log_probs: of each value, shape ``(…, D, n)``.
    """

    log_probs: Array

    def _is_value(self, x: Array) -> Array:
        return (x[..., None] == jnp.arange(self.log_probs.shape[-1])).astype(self.log_probs.dtype)

    def draw(self, rng_key: Array) -> Array:
        return jax.random.categorical(rng_key, self.log_probs)

    def quantile(self, uniform: Array) -> Array:
        above = jnp.cumsum(jnp.exp(self.log_probs)[..., :0:-1], -1)  # the probability of n-1, of n-2 and more, …
        return (uniform[..., None] < above).sum(-1)

    def log_prob(self, x: Array) -> Array:
        return jnp.where(self._is_value(x) > 0, self.log_probs, 0.0).sum(-1)

    def log_prob_of_states(self, states: Array) -> Array:
        log_probs = jnp.maximum(self.log_probs, least_log_odds(self.log_probs))  # zero times infinity
        return einsum("kdn,...dn->k...", self._is_value(states), log_probs)

    def moments(self) -> tuple[Array, Array]:
        probs, values = jnp.exp(self.log_probs), jnp.arange(self.log_probs.shape[-1])
        mean = (probs * values).sum(-1)
        return mean, (probs * (values - mean[..., None]) ** 2).sum(-1)

    def log_mean(self, log_r: Sequence[Array]) -> Array:
        return jax.nn.logsumexp(self.log_probs + jnp.stack(log_r, -1), axis=-1)

    def tilted(self, log_r: Sequence[Array], most: float = math.inf) -> Categorical:
        r = jnp.stack(log_r, -1)
        largest = r.max(-1, keepdims=True)
        tilt = jnp.maximum(jnp.where(jnp.isfinite(largest), r - largest, 0.0), -most)
        return normalised(self.log_probs + tilt)

    def seen(self, weights: Array, x: Array, trust: float) -> Categorical:
        found = einsum("k...,kdn->...dn" if x.ndim == 2 else "k...,k...dn->...dn", weights, self._is_value(x))
        return normalised(jnp.log(trust * found + (1 - trust) * jnp.exp(self.log_probs)))

    def where(self, condition: Array, other: Categorical) -> Categorical:
        return Categorical(jnp.where(condition[..., None, None], self.log_probs, other.log_probs))

    @property
    def is_finite(self) -> Array:
        return jnp.isfinite(self.log_probs.max(-1)).all(-1)  # a value may be impossible


def normalised(logits: Array) -> Categorical:
    """With these log probabilities up to a constant, none of them less than what floating point tells from zero."""
    logits = jnp.maximum(logits - logits.max(-1, keepdims=True), least_log_odds(logits))
    return Categorical(jax.nn.log_softmax(logits))


def least_log_odds(like: Array) -> float:
    """Of the least positive number in floating point."""
    return math.log(np.finfo(like.dtype).tiny)
