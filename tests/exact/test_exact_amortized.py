"""Amortised posteriors made exact: evidences and moments of a conjugate model, whatever the amortisation is worth."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import pp_diffusion as ppd
from pp_diffusion.posterior.amortized import propose

KEY = jax.random.key(0)
A, NOISE = np.array([[1.0, 0.5], [0.2, -1.0], [0.7, 0.7]]), 0.5
Y = np.array([1.5, -1.0, 0.3])
MEAN, SD = np.array([1.0, -2.0]), np.array([1.0, 2.0])  # of the prior: asymmetric, of unlike scales


def model(y=None):
    x = numpyro.sample("x", dist.Normal(MEAN, SD).to_event(1))
    numpyro.sample("y", dist.Normal(x @ A.T, NOISE).to_event(1), obs=y)


def exact(y=Y):
    """Mean, covariance and log evidence."""
    precision = np.diag(SD**-2.0) + A.T @ A / NOISE**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ (MEAN / SD**2 + A.T @ y / NOISE**2)
    evidence = stats.multivariate_normal(A @ MEAN, A @ np.diag(SD**2.0) @ A.T + NOISE**2 * np.eye(3)).logpdf(y)
    return mean, covariance, evidence


def small(latents):
    return ppd.Diffusion(
        ppd.GaussianKernel(latents.shape[1:]),
        ppd.LearnedSchedule(30, 1e-3),
        ppd.networks.MLP((64, 64)),
        transform=ppd.standardize(latents),
    )


def train(num_steps, model=model):
    settings = {"num_simulations": 4000, "num_steps": num_steps, "progress_bar": False, "diffusion": small}
    return ppd.amortize(KEY, model, observed="y", **settings)


@pytest.fixture(scope="module")
def good():
    return train(1500)


@pytest.fixture(scope="module")
def bad():
    """One update: it proposes from anything."""
    return train(1)


def ran(amortized, y=Y, **settings):
    smc = amortized.smc(**{"num_particles": 2000, "num_chains": 8, **settings})
    smc.run(jax.random.key(1), y=y)
    return smc


def assert_right(smc, y=Y):
    """log Z within 4 of its errors; moments within 5 by the effective number of draws."""
    mean, covariance, evidence = exact(y)
    assert abs(smc.log_evidence - evidence) < 4 * smc.log_evidence_error
    draws, sd = np.asarray(smc.get_samples()["x"], np.float64), np.sqrt(np.diag(covariance))
    size = float(ppd.posterior.particles.ess(smc.weighed.log_weights.reshape(-1)))
    assert (abs(draws.mean(0) - mean) < 5 * sd / np.sqrt(size)).all()
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=8 * sd.max() ** 2 / np.sqrt(size))
    return size / draws.shape[0]


@pytest.mark.slow
def test_a_good_amortisation(good):
    smc = ran(good)
    assert smc.verdict == "believable" and smc.log_evidence_error < 0.02
    assert assert_right(smc) > 0.5


@pytest.mark.slow
def test_a_bad_amortisation_costs_variance_only(good, bad):
    smc = ran(bad, num_particles=4000)
    share = assert_right(smc)
    assert share < 0.1 < assert_right(ran(good))
    assert smc.log_evidence_error > 3 * ran(good, num_particles=4000).log_evidence_error


@pytest.mark.slow
def test_an_amortisation_of_another_model():
    """Narrow, and beside the posterior: the prior's draws among the particles carry the answer."""

    def other(y=None):
        x = numpyro.sample("x", dist.Normal(MEAN + 3.0, 0.1).to_event(1))
        numpyro.sample("y", dist.Normal(x @ A.T, NOISE).to_event(1), obs=y)

    wrong = train(300, other)
    wrong.simulator.model = model  # what is asked of it later
    smc = ran(wrong, num_particles=8000)
    assert assert_right(smc) < 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppd.CollapseWarning)
        few = ran(wrong, num_particles=200)
    assert few.verdict != "believable"


@pytest.mark.slow
def test_plain_importance_by_paths_is_unbiased(bad):
    """Without draws of the prior: the mean weight of many chains is Z."""
    smc = ran(bad, num_particles=4000, num_chains=16, prior_share=0.0)
    ratio = np.exp(smc.log_evidences - exact()[2])
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 4


@pytest.mark.slow
def test_other_data_without_training(good):
    for y in (np.array([0.0, 0.0, 0.0]), np.array([-2.0, 3.0, 1.0])):
        assert_right(ran(good, y), y)


@pytest.mark.slow
def test_uncorrected_draws(good):
    mean, covariance, _ = exact()
    draws = good.sample(KEY, 4000, y=Y)["x"]
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.2)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.15)


@pytest.mark.parametrize("last_step", ["network", "kernel"])
def test_path_weights_of_the_exact_process(last_step):
    """Of N(0, 1), the ratio of every path is the density of its end, up to the last step's own floor."""
    schedule = ppd.FixedSchedule.constant_erasure(40)

    def network(x_t, t):
        beta = 1 / (41 - t)[..., None]
        return jnp.sqrt(1 - beta) * x_t, jnp.broadcast_to(beta, x_t.shape)

    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), schedule, network, parameterization="direct", last_step=last_step
    )
    x, log_ratio = propose(KEY, diffusion.prior({}).process, (100,))
    np.testing.assert_allclose(-log_ratio, dist.Normal(0, 1).log_prob(x).sum(-1), atol=1e-3)


@pytest.mark.slow
def test_constrained_latents_against_quadrature():
    """A scale and a share, unconstrained inside: moments and evidence by a grid."""

    def bounded(y=None):
        s = numpyro.sample("s", dist.Gamma(2.0, 1.0))
        p = numpyro.sample("p", dist.Uniform(-1.0, 3.0))
        numpyro.deterministic("sum", s + p)
        numpyro.sample("y", dist.Normal(jnp.stack([p, p**2]), s).to_event(1), obs=y)

    settings = {"num_simulations": 3000, "num_steps": 600, "progress_bar": False, "diffusion": small}
    y = np.array([1.0, 2.0])
    smc = ran(ppd.amortize(KEY, bounded, observed="y", **settings), y)
    s, p = (a.ravel() for a in np.meshgrid(np.linspace(1e-3, 20, 3000), np.linspace(-1, 3, 1001)[1:], indexing="ij"))
    log_joint = (
        stats.gamma(2.0).logpdf(s) - np.log(4) + stats.norm(p, s).logpdf(y[0]) + stats.norm(p**2, s).logpdf(y[1])
    )
    weights = np.exp(log_joint) * (20 / 3000) * (4 / 1000)
    assert abs(smc.log_evidence - np.log(weights.sum())) < 4 * smc.log_evidence_error + 2e-3
    draws = smc.get_samples()
    np.testing.assert_allclose(draws["s"].mean(), (weights * s).sum() / weights.sum(), atol=0.04)
    np.testing.assert_allclose(draws["p"].mean(), (weights * p).sum() / weights.sum(), atol=0.04)
    np.testing.assert_allclose(draws["sum"], draws["s"] + draws["p"], rtol=1e-5)
