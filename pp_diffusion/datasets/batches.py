"""Batches of images, drawn and changed inside a compiled update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def draw_rows(rng_key: Array, x: Array, size: int) -> Array:
    """Rows drawn at random, with replacement."""
    return x[jax.random.randint(rng_key, (size,), 0, len(x))]


def random_flips(rng_key: Array, images: Array) -> Array:
    """Half of the images, shape ``(N, height, width, …)``, with left and right changed."""
    flipped = jax.random.bernoulli(rng_key, shape=(len(images), *(1,) * (images.ndim - 1)))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_crops(rng_key: Array, images: Array, height: int, width: int) -> Array:
    """A window of each image, shape ``(N, height, width, …)``, at a place drawn evenly."""
    _check_window(images, height, width)
    room = jnp.array(images.shape[1:3]) - jnp.array([height, width]) + 1
    corners = jax.random.randint(rng_key, (len(images), 2), 0, room)

    def crop(image: Array, corner: Array) -> Array:
        start = (*corner, *(0,) * (image.ndim - 2))
        return jax.lax.dynamic_slice(image, start, (height, width, *image.shape[2:]))

    return jax.vmap(crop)(images, corners)


def random_patches(rng_key: Array, images: Array, size: int, height: int, width: int) -> Array:
    """Windows of that height and width, from images drawn with replacement, at places drawn evenly.

    :param images: shape ``(N, rows, columns, …)``.
    :param size: how many.
    :return: shape ``(size, height, width, …)``.
    """
    _check_window(images, height, width)
    room = jnp.array(images.shape[:3]) - jnp.array([1, height, width]) + 1
    corners = jax.random.randint(rng_key, (size, 3), 0, room)

    def patch(corner: Array) -> Array:
        start = (*corner, *(0,) * (images.ndim - 3))
        return jax.lax.dynamic_slice(images, start, (1, height, width, *images.shape[3:]))[0]

    return jax.vmap(patch)(corners)


def _check_window(images: Array, height: int, width: int) -> None:
    if not (1 <= height <= images.shape[1] and 1 <= width <= images.shape[2]):
        raise ValueError(
            f"height and width must be in 1…{images.shape[1]} and 1…{images.shape[2]}; got {height} and {width}"
        )
