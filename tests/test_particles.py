"""Weights and resampling: exact in whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pp_diffusion.posterior.particles import ess, gather, is_dead, log_mean, systematic

SYSTEMS = (2, 3)


def draw_log_weights(count, seed=0):
    """Of six systems; half of the particles without any weight, and the first system without a living one."""
    keys = jax.random.split(jax.random.key(seed))
    log_weights = 4 * jax.random.normal(keys[0], (count, *SYSTEMS))
    log_weights = jnp.where(jax.random.bernoulli(keys[1], 0.5, log_weights.shape), -jnp.inf, log_weights)
    return log_weights.at[:, 0, 0].set(-jnp.inf).at[0, 1, 2].set(0.0)


def counts_of(index, count):
    flat = np.asarray(index).reshape(count, -1)
    return np.stack([np.bincount(column, minlength=count) for column in flat.T], -1)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 20_001, pytest.param(1_000_003, marks=pytest.mark.slow)])
def test_systematic_resampling_keeps_its_counts(count):
    """Each particle is drawn as often as its share says, rounded down or up; never one of weight zero."""
    log_weights = draw_log_weights(count)
    index = jax.jit(systematic)(jax.random.key(1), log_weights)
    assert index.shape == log_weights.shape
    counts = counts_of(index, count)
    assert (counts.sum(0) == count).all()
    assert (counts[:, 0] == 1).all()  # all dead: all kept
    weights = np.exp(np.asarray(log_weights, np.float64).reshape(count, -1))
    alive = weights.sum(0) > 0
    shares = count * weights[:, alive] / weights[:, alive].sum(0)
    counts = counts[:, alive]
    assert not counts[shares == 0].any()
    assert (np.abs(counts - shares) < 1 + 1e-4 * shares).all()


def test_no_dead_particle_is_drawn_in_many_runs():
    """XLA's float32 cumsum is not monotone: it gave dead particles one slot in 10^4 at this number."""
    log_weights = draw_log_weights(20_000, seed=3)
    dead = np.isneginf(log_weights)
    run = jax.jit(systematic)
    for seed in range(20):
        index = np.asarray(run(jax.random.key(seed), log_weights))
        drawn_dead = np.take_along_axis(dead, index, 0)
        assert not drawn_dead.reshape(len(index), -1)[:, 1:].any()


def test_systematic_resampling_is_unbiased():
    """Means of counts over 40 000 runs; five standard errors of six means: an error rate of 4e-6."""
    weights = np.array([0.1, 0.2, 0.0, 0.3, 0.399, 0.001])
    log_weights = jnp.log(jnp.asarray(weights))
    run = jax.jit(jax.vmap(lambda key: jnp.bincount(systematic(key, log_weights), length=6)))
    counts = np.asarray(run(jax.random.split(jax.random.key(5), 40_000)))
    error = counts.std(0) / np.sqrt(len(counts))
    assert (np.abs(counts.mean(0) - 6 * weights) <= 5 * error).all()
    assert counts.std(0).max() <= 0.5  # systematic: a count is one of two neighbours


def test_gather_takes_each_system_by_itself():
    value, index = jnp.arange(7 * 6 * 4.0).reshape(7, *SYSTEMS, 4), jnp.arange(42).reshape(7, *SYSTEMS) * 5 % 7
    expected = np.take_along_axis(np.asarray(value), np.asarray(index)[..., None], 0)
    assert (gather(index, {"a": value})["a"] == expected).all()
    one = value[:, :1, :1]
    assert (gather(index[:, :1, :1], one) == expected[:, :1, :1]).all()


def test_weights_in_closed_form():
    log_weights = jnp.log(jnp.array([[1.0, 1.0, 0.0], [1.0, 3.0, 0.0]]))
    np.testing.assert_allclose(ess(log_weights), [2.0, 1.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(log_mean(log_weights), [0.0, np.log(2.0), -np.inf], atol=1e-6)
    assert is_dead(log_weights).tolist() == [False, False, True]
