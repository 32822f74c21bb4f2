"""Inputs of the stock networks: covariates and time as feature vectors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def flatten_event(x_t: Array, t: Array) -> Array:
    """``(*batch, *event_shape)`` as ``(*batch, d)``."""
    return x_t.reshape(*t.shape, -1)


def sinusoids(x: Array, num_frequencies: int) -> Array:
    """sin and cos of x at frequencies 1, 2, 4, …, concatenated on the last axis."""
    angles = x[..., None] * 2.0 ** jnp.arange(num_frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*x.shape[:-1], -1)


def context_features(context: Any, t: Array) -> list[Array]:
    """The arrays of the context, each ``(*batch, k)`` floats.

    :raises ValueError: for integer labels, which have no scale, and unless there is just one axis of features: then the
        batch axes are known.
    """
    arrays = [jnp.asarray(c) for c in jax.tree.leaves(context)]
    for array in arrays:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"context must be floating for a stock network; got {array.dtype}. "
                "For labels use jax.nn.one_hot(labels, n)"
            )
        if array.ndim != t.ndim + 1:
            raise ValueError(
                f"context must have one axis of features behind its batch axes for a stock network; got "
                f"{array.ndim - t.ndim} (for one covariate per datum use context[..., None])"
            )
    return arrays
