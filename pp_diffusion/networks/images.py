"""What networks over images share: axes, sizes, and changes of resolution."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def as_images(x_t: Array, batch_ndim: int) -> Array:
    """States as ``(rows, height, width, channels)``.

    :raises ValueError: unless the event has the shape ``(height, width)`` or ``(height, width, channels)``.
    """
    event_shape = x_t.shape[batch_ndim:]
    if len(event_shape) not in (2, 3):
        raise ValueError(f"event_shape must be (height, width) or (height, width, channels); got {event_shape}")
    return x_t.reshape(-1, *event_shape[:2], event_shape[2] if len(event_shape) == 3 else 1)


def pad_to_multiple(x: Array, multiple: int) -> Array:
    """Zeros below and to the right, until height and width are multiples of a number."""
    below, right = (-size % multiple for size in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def space_to_depth(x: Array) -> Array:
    """Blocks of 2 × 2 pixels as pixels of four times the channels."""
    rows, height, width, channels = x.shape
    x = x.reshape(rows, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, height // 2, width // 2, 4 * channels)


def mean_pool(x: Array) -> Array:
    """Blocks of 2 × 2 pixels as their means."""
    rows, height, width, channels = x.shape
    return x.reshape(rows, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def repeat_pixels(x: Array) -> Array:
    """Every pixel as a block of 2 × 2."""
    rows, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (rows, height, 2, width, 2, channels))
    return x.reshape(rows, 2 * height, 2 * width, channels)
