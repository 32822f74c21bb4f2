"""Plain draws before a run: the evidence by them, and how far predictions are trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import pp_diffusion as ppd
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.posterior.survey import Judge, survey
from pp_diffusion.states.errors import LARGEST_RATIO

KEY, Y, NUM_TIMESTEPS = jax.random.key(0), jnp.array([1.5, -0.5]), 12


def prior(ripple):
    """The exact reverse process of N(0, 1), but for ripples in the predicted x_0 at low signal-to-noise ratios.

    They change E[x_0 | x_t] by ``ripple`` at most, and its Jacobian by 200 times that.
    """

    def network(x_t, t, log_snr):
        x_0 = jnp.sqrt(jax.nn.sigmoid(log_snr))[..., None] * x_t
        x_0 += jnp.where(log_snr < 0, ripple, 0.0)[..., None] * jnp.sin(200 * x_t)
        return x_0, 0 * x_t

    schedule = ppd.FixedSchedule.log_linear(NUM_TIMESTEPS, first_beta=0.01, final_log_snr=-6.0)
    kernel = ppd.GaussianKernel((2,))
    return ppd.Diffusion(kernel, schedule, network, parameterization="x0", last_step="network").prior({})


def model(density, y, scale):
    x = numpyro.sample("x", density)
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def factors_of(ripple):
    return read_model(model, (prior(jnp.float32(ripple)), Y, jnp.array(1.0)), {})


@pytest.fixture(scope="module")
def judged():
    return {ripple: Judge()(factors_of(ripple)) for ripple in (0.0, 0.05)}


def test_the_evidence_by_plain_draws():
    """Five errors by the weights' own spread: an error rate of 6e-7."""
    plain = survey(KEY, factors_of(0.0), 2000).plain(2000)
    truth = norm(0, np.sqrt(2)).logpdf(Y).sum()
    assert abs(plain.log_evidence[0] - truth) < 5 * plain.error[0]
    assert 0.005 < plain.error[0] < 0.1 and 100 < plain.ess[0] < 2000


@pytest.mark.slow
def test_an_exact_process_is_trusted(judged):
    ratio = judged[0.0].ratio
    assert ratio.shape == (NUM_TIMESTEPS,)
    assert ((ratio > 0.6) & (ratio < LARGEST_RATIO)).all()


def test_a_noisy_jacobian_is_not(judged):
    """Errors' own covariance takes its place: that of x_0 given x_t, 1 - ᾱ_t in each coordinate."""
    rates = ppd.FixedSchedule.log_linear(NUM_TIMESTEPS, first_beta=0.01, final_log_snr=-6.0).rates()
    found, low = judged[0.05], np.asarray(rates.log_snr < 0)
    np.testing.assert_array_equal(found.ratio > LARGEST_RATIO, low)
    expected = np.asarray(rates.erased)[low]
    covariance = np.asarray(found.covariance)[low]
    np.testing.assert_allclose(np.diagonal(covariance, axis1=1, axis2=2), np.stack([expected] * 2, -1), rtol=0.5)
    assert (np.abs(covariance[:, 0, 1]) < 0.35 * expected).all()  # 256 draws: five standard errors


@pytest.mark.slow
def test_posteriors_with_a_noisy_jacobian_are_right():
    """log Z within .1 nats (five errors), and even weights: without the survey the least ESS is a few."""
    smc = ppd.SMC(model, num_particles=500, num_chains=8, progress_bar=False)
    smc.run(KEY, prior(jnp.float32(0.05)), Y, jnp.array(0.3))
    truth = norm(0, np.sqrt(1.09)).logpdf(Y).sum()
    assert smc.verdict == "believable"
    assert abs(smc.log_evidence - truth) < 0.1
    assert smc.ess.min() > 100


def test_the_judge_remembers_while_the_prior_is_the_same():
    """And finds the same anew: a run's result does not hang on the runs before it."""
    judge, density = Judge(), prior(jnp.float32(0.05))
    factors = [read_model(model, (density, Y, jnp.array(scale)), {}) for scale in (1.0, 2.0)]
    first = judge(factors[0])
    assert judge(factors[1]) is first
    jax.tree.map(np.testing.assert_array_equal, first, Judge()(factors[1]))
    other = judge(read_model(model, (prior(jnp.float32(0.0)), Y, jnp.array(1.0)), {}))
    assert (other.ratio != first.ratio).any()
