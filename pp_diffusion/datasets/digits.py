"""scikit-learn's handwritten digits: 1797 real ones of 8×8 pixels, levels 0…16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.datasets.dataset import Dataset


def digits(rng_key: Array, *, num_test: int = 360) -> Dataset:
    """The digits, shuffled and split.

    Levels are integers; to fit a density to them add uniform noise in [0, 1) afresh to every batch
    (:func:`dequantize`): a bound on that density then bounds the code length of the levels.

    :param rng_key: a JAX random key, for the split.
    :param num_test: images held out, 1…1796.
    :return: images of shape ``(num, 8, 8)`` as floats 0…16, and their labels 0…9.
    """
    from sklearn.datasets import load_digits

    if not 1 <= num_test < 1797:
        raise ValueError(f"num_test must be in 1…1796; got {num_test}")
    images, labels = load_digits(return_X_y=True)
    order = np.asarray(jax.random.permutation(rng_key, len(images)))
    images, labels = jnp.asarray(images[order].reshape(-1, 8, 8), dtype=float), jnp.asarray(labels[order])
    return Dataset(
        train=images[num_test:], test=images[:num_test], train_labels=labels[num_test:], test_labels=labels[:num_test]
    )


def dequantize(rng_key: Array, levels: Array) -> Array:
    """Integer levels plus uniform noise in [0, 1)."""
    return levels + jax.random.uniform(rng_key, jnp.shape(levels))
