"""Weights of particles, and resampling. Arrays have shape ``(P, …)``: P particles; the other axes are systems."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def ess(log_weights: Array) -> Array:
    """The effective sample size (Σw)² / Σw², between 1 and P; zero where no particle has any weight."""
    size = jnp.exp(2 * jax.nn.logsumexp(log_weights, axis=0) - jax.nn.logsumexp(2 * log_weights, axis=0))
    return jnp.where(is_dead(log_weights), 0.0, size)


def is_dead(log_weights: Array) -> Array:
    """Whether no particle has any weight."""
    return jnp.isneginf(log_weights).all(0)


def log_mean(log_weights: Array) -> Array:
    """The log of the mean weight."""
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def systematic(rng_key: Array, log_weights: Array) -> Array:
    """Indices by systematic resampling, of the weights' shape; where no particle has any weight, all are kept.

    In whole numbers: sums of float32 are neither exact nor monotone, and give particles of weight zero a share of 1e-7.
    A weight is rounded to a 2⁻³⁰ of their sum, or less.
    """
    count = len(log_weights)
    log_weights = jnp.where(is_dead(log_weights), 0.0, log_weights)  # their evidence says so from here on
    slot = 2 ** int(math.log2((2**31 - 1) // count))  # bits are uniform below a power of two
    shares = jnp.round(jax.nn.softmax(log_weights, axis=0) * float(count * slot)).astype(jnp.uint32)
    missing = jnp.uint32(count * slot) - shares.sum(0, dtype=jnp.uint32)  # by rounding; modulo 2³²
    numbers = jnp.arange(count).reshape(-1, *(1,) * (log_weights.ndim - 1))
    ends = jnp.cumsum(shares + jnp.where(numbers == shares.argmax(0), missing, 0), axis=0, dtype=jnp.uint32)
    start = jax.random.bits(rng_key, log_weights.shape[1:], jnp.uint32) % jnp.uint32(slot)
    points = numbers.astype(jnp.uint32) * jnp.uint32(slot) + start
    ends, points = (a.reshape(count, -1) for a in (ends, points))
    index = jax.vmap(lambda e, p: jnp.searchsorted(e, p, side="right"), in_axes=1, out_axes=1)(ends, points)
    return index.reshape(log_weights.shape)


def gather(index: Array, parts: Any) -> Any:
    """The particles of these indices, in each system by itself."""
    columns = index.reshape(len(index), -1)

    def take(a: Array) -> Array:
        flat = a.reshape(len(index), columns.shape[1], *a.shape[index.ndim :])
        if columns.shape[1] == 1:
            return a[columns[:, 0]]
        return jax.vmap(lambda column, i: column[i], in_axes=1, out_axes=1)(flat, columns).reshape(a.shape)

    return jax.tree.map(take, parts)


def over_systems(per_system: Array, like: Array) -> Array:
    """An array of systems with unit axes behind, to go with an array of particles."""
    return per_system.reshape(per_system.shape + (1,) * (like.ndim - per_system.ndim))
