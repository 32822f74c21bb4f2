"""Loaders: shapes, determinism, and the exact densities that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.datasets.digits import dequantize
from pp_diffusion.datasets.swiss_roll import sample_swiss_roll


def test_swiss_roll():
    data = ppd.datasets.swiss_roll(jax.random.key(0), 2000, 300)
    assert data.train.shape == (2000, 2) and data.test.shape == (300, 2)
    assert data.train_labels is None
    again = ppd.datasets.swiss_roll(jax.random.key(0), 2000, 300)
    np.testing.assert_array_equal(data.train, again.train)
    assert not np.allclose(data.train[:300], data.test)
    radius = np.linalg.norm(data.train, axis=1)
    assert radius.min() > 2.5 and radius.max() < 4.5 * np.pi + 2.5  # φ in [1.5π, 4.5π] and noise 0.5


def test_swiss_roll_is_scikit_learns():
    from sklearn.datasets import make_swiss_roll

    ours = np.asarray(sample_swiss_roll(jax.random.key(1), 20_000))
    theirs = make_swiss_roll(20_000, noise=0.5, random_state=0)[0][:, [0, 2]]
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.25)
    np.testing.assert_allclose(np.cov(ours.T), np.cov(theirs.T), atol=1.5)


@pytest.mark.slow
def test_swiss_roll_log_prob_is_a_density():
    data = ppd.datasets.swiss_roll(jax.random.key(0), 10, 10)
    axis = jnp.linspace(-18.0, 18.0, 181)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1)
    log_prob = data.log_prob(grid)
    assert log_prob.shape == (181, 181)
    np.testing.assert_allclose(jnp.exp(log_prob).sum() * (axis[1] - axis[0]) ** 2, 1, rtol=1e-3)
    standardised = ppd.datasets.swiss_roll(jax.random.key(0), 20_000, 4000)
    scale = standardised.train.std(0)
    bits = (standardised.log_prob(standardised.test).mean() + jnp.log(scale).sum()) / jnp.log(2)
    np.testing.assert_allclose(bits, -1.955, atol=0.1)  # the design's exact-answer table


@pytest.mark.slow
def test_heartbeat():
    data = ppd.datasets.heartbeat(jax.random.key(0), 500, 50)
    assert data.train.shape == (500, 20) and data.test.shape == (50, 20)
    assert jnp.issubdtype(data.train.dtype, jnp.integer) and np.isin(data.train, [0, 1]).all()
    sequences, counts = np.unique(data.train, axis=0, return_counts=True)
    assert len(sequences) == 5 and (counts > 60).all()
    np.testing.assert_array_equal(sequences.sum(1), 4)
    np.testing.assert_allclose(data.log_prob(data.test), -np.log(5), rtol=1e-6)
    assert np.isneginf(data.log_prob(jnp.zeros(20)))
    assert np.isneginf(data.log_prob(data.test.at[:, 0].set(1 - data.test[:, 0]))).all()
    assert ppd.datasets.heartbeat(jax.random.key(0), 3, 2, length=9, period=3).train.shape == (3, 9)


def test_digits():
    data = ppd.datasets.digits(jax.random.key(0))
    assert data.train.shape == (1437, 8, 8) and data.test.shape == (360, 8, 8)
    assert data.train_labels.shape == (1437,) and data.test_labels.shape == (360,)
    assert data.log_prob is None
    levels = np.unique(data.train)
    np.testing.assert_array_equal(levels, np.arange(17))
    assert set(np.unique(data.train_labels)) == set(range(10))
    # images and labels are shuffled together: same digits look alike
    zeros = np.asarray(data.train)[np.asarray(data.train_labels) == 0].mean(0)
    assert zeros[3:5, 3:5].mean() < 2 < zeros[3:5, 1:3].mean()
    noisy = dequantize(jax.random.key(1), data.test)
    assert ((noisy >= data.test) & (noisy <= data.test + 1)).all() and np.ptp(noisy - data.test) > 0.9


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda key: ppd.datasets.swiss_roll(key, 0), "num_train"),
        (lambda key: ppd.datasets.swiss_roll(key, 10, 0), "num_test"),
        (lambda key: ppd.datasets.swiss_roll(key, 10, noise=0.0), "noise"),
        (lambda key: ppd.datasets.swiss_roll(key, 10, noise=float("nan")), "noise"),
        (lambda key: ppd.datasets.heartbeat(key, 0), "num_train"),
        (lambda key: ppd.datasets.heartbeat(key, length=7), "length"),
        (lambda key: ppd.datasets.heartbeat(key, length=3), "length"),
        (lambda key: ppd.datasets.heartbeat(key, period=0), "period"),
        (lambda key: ppd.datasets.digits(key, num_test=0), "num_test"),
        (lambda key: ppd.datasets.digits(key, num_test=1797), "num_test"),
    ],
)
def test_bad_settings_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make(jax.random.key(0))
