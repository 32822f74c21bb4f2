"""Integer data: probabilities of levels that sum to one, K and log p of a linear chain, without dequantisation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO
from scipy import stats

import pp_diffusion as ppd
from pp_diffusion.levels import Levels
from pp_diffusion.units import bits_per_dim

Z = 4.5
LEVELS = 5
BETAS = np.array([0.3, 0.4, 0.8])
TRANSFORMS = {"up": (1.7, 1.3), "down": (2.2, -0.8)}


def slope(t):  # nearly that of standard normal data
    return 0.95 * np.sqrt(1 - BETAS)[t - 1]


def shift(t):
    return 0.05 * t


def variance(t):
    return 1.2 * BETAS[t - 1]


def network(x_t, t):
    t = t[..., None]
    mean = 0.95 * jnp.sqrt(1 - jnp.asarray(BETAS, float))[t - 1] * x_t + shift(t)
    return mean, jnp.broadcast_to(1.2 * jnp.asarray(BETAS, float)[t - 1], x_t.shape)


def prior_of(name, **settings):
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((1,)),
        ppd.FixedSchedule(BETAS),
        network,
        parameterization="direct",
        last_step=ppd.Discretized(LEVELS),
        transform=dist.transforms.AffineTransform(*TRANSFORMS[name]),
    )
    return diffusion, diffusion.prior({}, **settings)


def states(name):
    loc, scale = TRANSFORMS[name]
    return (np.arange(LEVELS) - loc) / scale


def log_mass(name, mean, variance):
    """log P(level) under a normal in the model's space, for all levels; float64."""
    loc, scale = TRANSFORMS[name]
    edges = np.concatenate([[-np.inf], np.arange(LEVELS - 1) + 0.5, [np.inf]])
    mean, sd = loc + scale * np.asarray(mean)[..., None], abs(scale) * np.sqrt(variance)
    return np.log(np.maximum(np.diff(stats.norm.cdf((edges - mean) / sd)), 1e-200))


def exact_log_prob(name):
    """log p(level): the chain is linear, so that x_0 before its rounding is normal."""
    mean, var = 0.0, 1.0
    for t in (3, 2, 1):
        mean, var = slope(t) * mean + shift(t), slope(t) ** 2 * var + variance(t)
    return log_mass(name, mean, var)


def exact_bound(name):
    """K of each level, by quadrature over x_t given x_0; of the last step apart."""
    z = states(name)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    alpha_bar = np.cumprod(1 - BETAS)
    end = alpha_bar[-1]
    prior_kl = 0.5 * (end * (z**2 - 1) - np.log1p(-end))
    x_1 = np.sqrt(alpha_bar[0]) * z[:, None] + np.sqrt(1 - alpha_bar[0]) * nodes
    by_node = log_mass(name, slope(1) * x_1 + shift(1), variance(1))  # (level of z, node, level)
    last = np.einsum("zn,n->z", np.take_along_axis(by_node, np.arange(LEVELS)[:, None, None], 2)[..., 0], weights)
    total = last - prior_kl
    for t in (2, 3):
        before, now, beta = alpha_bar[t - 2], alpha_bar[t - 1], BETAS[t - 1]
        x_t = np.sqrt(now) * z[:, None] + np.sqrt(1 - now) * nodes
        mean = (np.sqrt(1 - beta) * (1 - before) * x_t + np.sqrt(before) * beta * z[:, None]) / (1 - now)
        var = beta * (1 - before) / (1 - now)
        miss = (mean - slope(t) * x_t - shift(t)) ** 2
        kl = 0.5 * ((var + miss) / variance(t) - 1 - np.log(var / variance(t)))
        total -= kl @ weights
    return total, last


# --- the probabilities -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("levels", [2, 5, 256, 4096])
@pytest.mark.parametrize("x64", [False, True])
def test_probabilities_sum_to_one(levels, x64):
    with jax.enable_x64(x64):
        loc, scale = np.meshgrid(np.linspace(-0.3, 1.2, 7) * levels, np.geomspace(1e-3, 3.0, 9) * levels)
        law = Levels(jnp.asarray(loc, float), jnp.asarray(scale, float), levels)
        log_p = law.log_prob(jnp.arange(levels)[:, None, None])
        tolerance = 1e-11 if x64 else 3e-5
        np.testing.assert_allclose(np.exp(np.asarray(log_p, float)).sum(0), 1, atol=tolerance)
        middle = np.arange(levels)[:, None, None]
        expected = np.diff(
            stats.norm.cdf(
                (np.concatenate([[-np.inf], np.arange(levels - 1) + 0.5, [np.inf]])[:, None, None] - loc) / scale
            ),
            axis=0,
        )
        likely = (expected > 1e-4) & (np.abs(middle - loc) < 4 * scale)
        np.testing.assert_allclose(
            np.exp(np.asarray(log_p, float))[likely], expected[likely], rtol=1e-7 if x64 else 2e-3
        )


@pytest.mark.slow
def test_far_tails_have_finite_probabilities_and_gradients():
    for scale in (1e-3, 1e-2, 1.0, 100.0, 1e4):  # in levels
        value = jax.value_and_grad(lambda loc, s: Levels(loc, s, 256).log_prob(jnp.array(7)), argnums=(0, 1))
        for loc in (-300.0, 6.4, 7.0, 200.0, 1e4):
            log_p, gradients = value(jnp.array(loc), jnp.array(scale))
            assert np.isfinite(log_p) and np.isfinite(gradients).all(), (loc, scale)


@pytest.mark.slow
def test_the_narrow_and_the_wide_form_agree_where_they_meet():
    with jax.enable_x64(True):
        for distance in (0.0, 0.3, 2.0, 7.0):
            scale = 0.5 / 0.015 * np.array([1 - 1e-9, 1 + 1e-9])
            log_p = Levels(jnp.asarray(100 + distance * scale), jnp.asarray(scale), 256).log_prob(jnp.array(100))
            np.testing.assert_allclose(log_p[0], log_p[1], atol=2e-5)


@pytest.mark.slow
def test_entropy():
    law = Levels(jnp.array([1.3, 9.0]), jnp.array([0.8, 0.1]), LEVELS)
    log_p = np.asarray(law.log_prob(jnp.arange(LEVELS)[:, None]))
    np.testing.assert_allclose(law.entropy(), -(np.exp(log_p) * log_p).sum(0), atol=1e-6)


# --- the chain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_log_prob_of_every_level(name):
    _, prior = prior_of(name)
    x = np.arange(LEVELS)[:, None]
    expected = exact_log_prob(name)
    assert abs(np.exp(expected).sum() - 1) < 1e-12
    estimate = ppd.estimate_log_prob(jax.random.key(0), prior, x, 20_000)
    assert (np.abs(estimate.value - expected) < Z * estimate.std_error + 1e-5).all()
    # bits per dimension are read off as they are: the code length of the model's own draws is its entropy
    own = np.exp(expected)
    assert abs(own @ bits_per_dim(estimate.value, 1) - stats.entropy(own, base=2)) < 0.01


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("estimator", ["analytic", "log_ratio"])
def test_every_term_of_the_bound(name, estimator):
    _, prior = prior_of(name)
    expected, last = exact_bound(name)
    x = np.repeat(np.arange(LEVELS), 400)[:, None]
    bound = ppd.lower_bound(jax.random.key(1), prior, x, estimator=estimator, num_samples=50)
    for found, truth in ((bound.value, expected), (-bound.kl_per_step[:, 0], last)):
        found = np.asarray(found, float).reshape(LEVELS, 400)
        error = found.std(1, ddof=1) / np.sqrt(400)
        assert (np.abs(found.mean(1) - truth) < Z * error + 1e-5).all()
    assert (expected < exact_log_prob(name)).all()
    np.testing.assert_array_equal(bound.log_abs_det, 0)
    null = np.asarray(bound.null).reshape(LEVELS, 400)[:, 0]
    np.testing.assert_allclose(null, log_mass(name, 0.0, 1.0), rtol=1e-4)
    assert abs(np.exp(null).sum() - 1) < 1e-5


@pytest.mark.parametrize("num_times", [1, 3])
@pytest.mark.slow
def test_the_program_in_factors_averages_to_k(num_times):
    diffusion, _ = prior_of("up")
    x = jnp.arange(LEVELS, dtype=float)[:, None]
    one = partial(Trace_ELBO().loss, param_map={}, model=diffusion.bound_model, guide=diffusion.bound_guide)
    loss = jax.jit(jax.vmap(lambda key: one(key, x=x, num_times=num_times)))
    values = -np.asarray(loss(jax.random.split(jax.random.key(2), 20_000)), float)
    expected = exact_bound("up")[0].sum()
    assert abs(values.mean() - expected) < Z * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.slow
def test_draws_have_these_probabilities(name):
    _, prior = prior_of(name)
    x = np.asarray(prior.sample(jax.random.key(3), (40_000,)))
    assert x.dtype.kind == "i" and np.asarray(prior.support(x)).all()
    counts = np.bincount(x.ravel(), minlength=LEVELS)
    assert stats.chisquare(counts, len(x) * np.exp(exact_log_prob(name))).pvalue > 1e-5
