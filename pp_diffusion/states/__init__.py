"""STAND-IN of the reader's worktree, dropped for the proposer's: what the reader asks of a state space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.frozen import Frozen


class Words(NamedTuple):
    normal: str
    moments: str
    exact: str
    averaged: str
    constant: str


class StateSpace(Frozen):
    sets_known: ClassVar[bool] = False

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        self._set(event_shape=event_shape)

    def owners(self, changes: Callable[[Array, Array], Array], size: int) -> Array | None:
        return None

    def changes(self, elements: Any, rng_key: Array, spread: Any, batch_shape: tuple[int, ...]) -> Array:
        raise NotImplementedError


class Continuous(StateSpace):
    sets_known = True

    def pair(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Any) -> Array:
        return (0.5 + 3 * spread) * jax.random.normal(rng_key, (2, *batch_shape, *self.event_shape))


class Bits(StateSpace):
    def pair(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Any) -> Array:
        word = jax.random.bernoulli(rng_key, spread, (*batch_shape, *self.event_shape)).astype(float)
        return jnp.stack([word, 1 - word])

    def changes(self, elements: Any, rng_key: Array, spread: Any, batch_shape: tuple[int, ...]) -> Array:
        shape = (*batch_shape, *self.event_shape)
        size = int(np.prod(shape[1:]))

        def of(z: Array) -> Array:
            return elements(z.reshape(shape))

        bits = jax.random.bernoulli(rng_key, spread, (shape[0], size)).astype(float)
        digits = np.arange(size) >> np.arange(max(1, (size - 1).bit_length()))[:, None] & 1
        flips = jnp.asarray(np.stack([1 - digits, digits]), bits.dtype)
        before = of(bits)
        changed = jax.lax.map(lambda flip: of(jnp.abs(bits - flip)) != before, flips.reshape(-1, size))
        return changed.reshape(*flips.shape[:2], *changed.shape[1:])

    def owners(self, changes: Any, size: int) -> Array | None:
        words = zip(jax.random.split(jax.random.key(0), 32), np.linspace(0, 1, 32), strict=True)
        by_zeros, by_ones = np.any([changes(*word) for word in words], axis=0)
        if (by_zeros & by_ones).any():
            return None
        owner = (by_ones * 2 ** np.arange(len(by_ones))[:, None, None]).sum(0)
        return jnp.asarray(np.where((by_zeros | by_ones).any(0), owner, size))
