"""The heartbeat's optimal reverse process in closed form: its K is the ceiling of the paper's second experiment.

The ceilings are those of DESIGN.md, which were computed by other code with more draws (error .0005 bits).
"""

import jax
import numpy as np
import pytest
from oracles import heartbeat_network, heartbeat_sequences

import pp_diffusion as ppd

BEATS = heartbeat_sequences()


def ceiling(num_timesteps, last_step, num_rows, num_samples=1):
    """K of the optimal process averaged over data, and its standard error, in bits."""
    prior = ppd.Diffusion(
        ppd.BinomialKernel(event_shape=(20,), probs=0.2),
        ppd.FixedSchedule.constant_erasure(num_timesteps),
        heartbeat_network(num_timesteps),
        last_step=last_step,
    ).prior({})
    rows = np.tile(BEATS, (num_rows // 5, 1))
    bound = ppd.lower_bound(jax.random.key(num_timesteps), prior, rows, num_samples=num_samples, chunk_size=num_rows)
    value = np.asarray(bound.value, dtype=np.float64)
    assert np.isfinite(value).all()
    return ppd.units.nats_to_bits(value.mean()), ppd.units.nats_to_bits(value.std(ddof=1) / np.sqrt(len(value)))


@pytest.mark.parametrize("last_step, expected", [("kernel", -2.9737), ("network", -2.3718)])
@pytest.mark.slow
@pytest.mark.optimized
def test_the_best_bound_of_100_steps(last_step, expected):
    """Within 4 standard errors + .002 bits."""
    value, error = ceiling(100, last_step, 8190)
    assert error < 0.03
    assert abs(value - expected) < 4 * error + 0.002


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_timesteps, last_step, expected",
    [
        (200, "kernel", -2.6797),
        (500, "kernel", -2.4820),
        (1000, "kernel", -2.4073),
        (1000, "network", -2.3258),
        (2000, "kernel", -2.3681),
        (2000, "network", -2.3241),
    ],
)
@pytest.mark.optimized
def test_the_best_bound_of_long_chains(num_timesteps, last_step, expected):
    """Within 4 standard errors + .002 bits."""
    value, error = ceiling(num_timesteps, last_step, 4000, num_samples=2)
    assert error < 0.012
    assert abs(value - expected) < 4 * error + 0.002
    assert value < -np.log2(5) + 4 * error


def test_the_oracle_knows_the_beat_from_few_flips():
    network = heartbeat_network(100)
    network = jax.jit(network)
    logits = np.asarray(network(np.asarray(BEATS, dtype=np.float32), np.full(5, 10)))
    np.testing.assert_array_equal(logits > 0, BEATS == 1)
    # at t = T nothing is known: each bit is 1 with probability 1/5
    logits = np.asarray(network(np.random.default_rng(0).integers(0, 2, (4, 20)).astype(np.float32), np.full(4, 100)))
    np.testing.assert_allclose(logits, np.log(0.2 / 0.8), atol=1e-5)


def test_samples_of_the_best_process_are_heartbeats():
    """Of 2000 draws at T = 100, last step by the network, at least 97 % are one of the five, each as often.

    log p of the five together is at most 0; K = -2.37 bits says that they hold at least exp(-.05 bits) = 96.6 %.
    """
    prior = ppd.Diffusion(
        ppd.BinomialKernel((20,), 0.2),
        ppd.FixedSchedule.constant_erasure(100),
        heartbeat_network(100),
        last_step="network",
    ).prior({})
    draws = np.asarray(prior.sample(jax.random.key(1), (2000,)))
    counts = (draws[:, None] == BEATS).all(-1).sum(0)
    assert counts.sum() >= 0.965 * 2000 - 4.5 * np.sqrt(2000 * 0.035)
    expected = counts.sum() / 5
    assert (np.abs(counts - expected) < 4.5 * np.sqrt(0.8 * expected)).all()


def test_the_null_is_the_entropy_at_the_base_rate_of_the_data():
    """20·H(0.2) = 14.4386 bits, the paper's K - L_null = 12.024 at K = -2.414; with base 0.5 it would be 20 bits."""
    x = ppd.datasets.heartbeat(jax.random.key(0), 10, 50).test
    for probs, bits in ((0.2, -14.4386), (0.5, -20.0)):
        null = jax.jit(ppd.BinomialKernel((20,), probs).null_log_prob)(np.asarray(x, dtype=np.float32))
        np.testing.assert_allclose(ppd.units.nats_to_bits(null), bits, atol=1e-4)
    np.testing.assert_allclose(-2.414 + 14.4386, 12.024, atol=1e-3)


def test_the_datasets_log_prob_is_that_of_five_sequences():
    data = ppd.datasets.heartbeat(jax.random.key(0), 500, 500)
    np.testing.assert_allclose(ppd.units.nats_to_bits(data.log_prob(data.test)), -np.log2(5), rtol=1e-6)
    counts = (np.asarray(data.train)[:, None] == BEATS).all(-1).sum(0)
    assert counts.sum() == 500 and np.abs(counts - 100).max() < 4.5 * np.sqrt(80)
    assert np.isneginf(data.log_prob(1 - np.asarray(data.test[:3]))).all()
