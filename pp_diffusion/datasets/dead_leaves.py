"""Dead leaves: images of discs that occlude each other, with radii by a power law (Matheron; Lee et al. 2001)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.checks import check_key, positive_int
from pp_diffusion.datasets.dataset import Dataset

AT_ONCE = 128  # discs thrown at a time
IMAGES_AT_ONCE = 32


def dead_leaves(
    rng_key: Array,
    num_train: int = 10_000,
    num_test: int = 1_000,
    *,
    size: int = 32,
    min_radius: float = 2.0,
    max_radius: float = 16.0,
    exponent: float = 3.0,
    noise: float = 0.02,
) -> Dataset:
    r"""Images of opaque discs, as leaves that fell on each other, seen from above.

    Discs fall at places of a Poisson process, evenly over the image and beyond its edges, with radii of density
    :math:`\propto r^{-a}` between two ends and with grey values evenly in 0…1. A pixel shows the last that fell on it:
    discs are thrown from the top down until no pixel is free, which is an exact draw. Pixels of one leaf would be
    equal, and the images without a density: normal noise is added to all of them.

    The paper's images (of Theis et al. 2012) are not to be had; figures for these cannot be compared with theirs.

    :param rng_key: a JAX random key; the same images for the same key.
    :param num_train: training images.
    :param num_test: test images.
    :param size: pixels to a side.
    :param min_radius: of the discs, in pixels, > 0.
    :param max_radius: of the discs, in pixels, > ``min_radius``.
    :param exponent: a; 3 makes the images' statistics the same at all scales between the ends.
    :param noise: its standard deviation, > 0.
    :return: images of shape ``(num, size, size)``, floats about 0…1.
    :raises ValueError: naming the argument that does not fit.

    .. doctest::

        >>> import jax, pp_diffusion as ppd
        >>> data = ppd.datasets.dead_leaves(jax.random.key(0), 5, 2, size=8)
        >>> data.train.shape, data.test.shape
        ((5, 8, 8), (2, 8, 8))
    """
    check_key(rng_key)
    for name, count in (("num_train", num_train), ("num_test", num_test), ("size", size)):
        positive_int(name, count)
    if not 0 < min_radius < max_radius < float("inf"):
        raise ValueError(f"min_radius and max_radius must be 0 < min < max; got {min_radius} and {max_radius}")
    if not 1 < exponent < float("inf"):
        raise ValueError(f"exponent must be above 1; got {exponent}")
    if not 0 < noise < float("inf"):
        raise ValueError(f"noise must be positive; got {noise}")
    radii = tuple(float(a) for a in (min_radius, max_radius, exponent))
    train_key, test_key = jax.random.split(rng_key)
    return Dataset(
        *(_draw(key, num, size, radii, noise) for key, num in ((train_key, num_train), (test_key, num_test)))
    )


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(rng_key: Array, num: int, size: int, radii: tuple[float, float, float], noise: float) -> Array:
    leaf_key, noise_key = jax.random.split(rng_key)
    draw = partial(_image, size=size, radii=radii)
    images = jax.lax.map(draw, jax.random.split(leaf_key, num), batch_size=min(num, IMAGES_AT_ONCE))
    return images + noise * jax.random.normal(noise_key, images.shape)


def _image(rng_key: Array, size: int, radii: tuple[float, float, float]) -> Array:
    """One, without noise."""
    place = jnp.arange(size, dtype=float)

    def throw(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        image, free, key = carry
        key, disc_key, value_key = jax.random.split(key, 3)
        across, down, radius = _discs(disc_key, size, radii)
        squares = (place[:, None] - down[:, None, None]) ** 2 + (place - across[:, None, None]) ** 2
        covered = squares <= radius[:, None, None] ** 2
        value = jax.random.uniform(value_key, (AT_ONCE,))[jnp.argmax(covered, 0)]  # the first one's
        seen = free & covered.any(0)
        return jnp.where(seen, value, image), free & ~seen, key

    start = jnp.zeros((size, size)), jnp.ones((size, size), bool), rng_key
    return jax.lax.while_loop(lambda carry: carry[1].any(), throw, start)[0]


def _discs(rng_key: Array, size: int, radii: tuple[float, float, float]) -> tuple[Array, Array, Array]:
    """Centres and radii; a centre may be as far outside as the largest disc reaches."""
    low, high, exponent = radii
    place_key, radius_key = jax.random.split(rng_key)
    across, down = jax.random.uniform(place_key, (2, AT_ONCE), minval=-high, maxval=size - 1 + high)
    ends = [r ** (1 - exponent) for r in (low, high)]
    share = jax.random.uniform(radius_key, (AT_ONCE,))
    return across, down, (ends[0] + share * (ends[1] - ends[0])) ** (1 / (1 - exponent))
