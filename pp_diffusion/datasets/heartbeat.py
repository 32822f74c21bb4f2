"""Binary heartbeats, the paper's second experiment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.datasets.dataset import Dataset


def heartbeat(
    rng_key: Array, num_train: int = 5_000, num_test: int = 1_000, *, length: int = 20, period: int = 5
) -> Dataset:
    r"""Sequences with a 1 in every ``period``-th bin and a uniformly drawn phase.

    :param rng_key: a JAX random key.
    :param num_train: training sequences.
    :param num_test: test sequences.
    :param length: bins, a multiple of ``period``.
    :param period: bins between beats, and the number of different sequences.
    :return: bits of shape ``(num, length)``; ``.log_prob`` is −log(period) for a heartbeat, else −∞.
    """
    for name, value in (("num_train", num_train), ("num_test", num_test), ("period", period)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}")
    if length < period or length % period:
        raise ValueError(f"length must be a multiple of period = {period}; got {length}")
    sequences = (jnp.arange(length) % period == jnp.arange(period)[:, None]).astype(jnp.int32)

    def draw(key: Array, num: int) -> Array:
        return sequences[jax.random.randint(key, (num,), 0, period)]

    def log_prob(x: Array) -> Array:
        is_heartbeat = (jnp.asarray(x)[..., None, :] == sequences).all(-1).any(-1)
        return jnp.where(is_heartbeat, -jnp.log(period), -jnp.inf)

    train_key, test_key = jax.random.split(rng_key)
    return Dataset(draw(train_key, num_train), draw(test_key, num_test), log_prob)
