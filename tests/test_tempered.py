"""Tempered particles: posteriors and evidences against exact ones, over a flow's noise and for other latents."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from scipy.special import gammaln
from scipy.stats import norm

import pp_diffusion as ppd
from pp_diffusion import solvers
from pp_diffusion.posterior.particles import ess
from pp_diffusion.posterior.tempering import rise_of
from pp_diffusion.posterior.verdicts import Findings, evidence_error
from tests.compilations import compilations
from tests.exact.flow_oracles import Mixture

NORMAL = Mixture([1.0], [[0.7, -0.4]], [[0.5, 1.3]])
FAR = Mixture([0.3, 0.7], [[-4.0], [4.0]], [[0.5], [0.5]])
Y, NOISE = np.array([0.2, 1.0]), 0.6


def posterior_of_a_flow(num_particles, num_chains=2):
    flow = NORMAL.diffusion().flow({}, num_steps=5, solver=solvers.RALSTON3)

    def model(y):
        x = numpyro.sample("x", flow)
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    smc = ppd.TemperedSMC(
        handlers.reparam(model, config={"x": ppd.FlowReparam()}), num_particles=num_particles, num_chains=num_chains
    )
    smc.run(jax.random.key(0), jnp.asarray(Y))
    return smc


@pytest.mark.slow
def test_posterior_and_evidence_of_a_flow():
    smc = posterior_of_a_flow(400)
    draws, sd = smc.get_samples(), NORMAL.scales[0]
    assert draws["x"].shape == draws["x_noise"].shape == (800, 2)
    assert smc.get_samples(group_by_chain=True)["x"].shape == (2, 400, 2)
    precision = 1 / sd**2 + 1 / NOISE**2
    mean = (NORMAL.means[0] / sd**2 + Y / NOISE**2) / precision
    assert np.abs((draws["x"].mean(0) - mean) * precision**0.5).max() < 0.2
    assert np.abs(draws["x"].std(0) * precision**0.5 - 1).max() < 0.2
    exact = dist.Normal(NORMAL.means[0], np.hypot(sd, NOISE)).log_prob(Y).sum()
    assert abs(smc.log_evidence - exact) < 0.15


@pytest.mark.slow
def test_shares_of_modes_far_apart():
    """.3 and .7 of the prior, of which r makes .5625 and .4375: no chain of NUTS would tell."""
    flow = FAR.diffusion().flow({}, num_steps=16)

    def model():
        x = numpyro.sample("x", flow)
        numpyro.factor("r", jnp.where(x[0] < 0, jnp.log(3.0), 0.0) - 0.5 * (jnp.abs(x[0]) - 4.5) ** 2)

    smc = ppd.TemperedSMC(handlers.reparam(model, config={"x": ppd.FlowReparam()}), num_particles=1000, num_chains=4)
    smc.run(jax.random.key(0))
    share = (smc.get_samples()["x"] < 0).mean()
    assert abs(share - 0.9 / 1.6) < 0.06
    exact = np.log(1.6) + dist.Normal(4.0, np.hypot(0.5, 1.0)).log_prob(4.5) + 0.5 * np.log(2 * np.pi)
    assert abs(smc.log_evidence - exact) < 0.1


def rates(y):
    rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    numpyro.deterministic("twice", 2 * rate)
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def log_evidence_of_rates(y):
    total = y.sum()
    return gammaln(3 + total) - gammaln(3) + 3 * np.log(2) - (3 + total) * np.log(2 + len(y)) - gammaln(y + 1).sum()


@pytest.fixture(scope="module")
def eight():
    y = np.array([4, 1, 2])
    smc = ppd.TemperedSMC(rates, num_particles=200, num_chains=8)
    smc.run(jax.random.key(0), jnp.asarray(y))
    return smc, y


@pytest.mark.slow
def test_constrained_latents(eight, capsys):
    smc, y = eight
    draws = smc.get_samples()
    np.testing.assert_allclose(draws["twice"], 2 * draws["rate"], rtol=1e-6)
    exact = dist.Gamma(10.0, 5.0)
    assert abs(draws["rate"].mean() - exact.mean) < 0.15 * exact.variance**0.5
    assert smc.verdict == "believable" and smc.reliable
    assert 0.005 < smc.log_evidence_error < 0.05
    assert abs(smc.log_evidence - log_evidence_of_rates(y)) < 4 * smc.log_evidence_error
    smc.print_summary()
    out = capsys.readouterr().out
    assert "log evidence: " in out and "bits), ± " in out and out.endswith("believable\n") and "twice" in out


@pytest.mark.slow
def test_arviz_and_comparison(eight):
    smc, y = eight
    groups = smc.to_arviz()
    assert groups["posterior"]["rate"].shape == (8, 200)
    assert groups["log_likelihood"]["y"].shape == (8, 200, 3)
    np.testing.assert_array_equal(groups["observed_data"]["y"], y)
    np.testing.assert_allclose(groups["sample_stats"]["log_evidence"], smc.log_evidences)
    compared = ppd.compare_evidence({"one": smc, "the same": smc})
    np.testing.assert_allclose(compared.probability, 0.5)


def test_rises_of_the_temperature():
    """Each leaves so many effective, and no fewer: of l ~ N(0, s²), exp(-b² s²) of them are. Weights that grow with the
    wrong sign of l, or a search on the wrong side, leave all or one of them."""
    log_likelihood = jnp.asarray(3 * norm.ppf((np.arange(4000) + 0.5) / 4000))
    for share in (0.3, 0.5, 0.9):
        rise = rise_of(log_likelihood, jnp.asarray(1.0), share * 4000)
        np.testing.assert_allclose(rise, np.sqrt(-np.log(share)) / 3, rtol=0.02)
        assert abs(ess(rise * log_likelihood) / 4000 - share) < 0.01
    assert rise_of(log_likelihood, jnp.asarray(0.1), 2000.0) == jnp.asarray(0.1)  # the rest of the way, at once


@pytest.mark.slow
def test_many_temperatures():
    """Twenty coordinates whose likelihood is a thousandth of the prior's width, against the closed form: no single step
    of the temperature comes there, and one that stalls, or jumps to 1, is off by hundreds of nats.

    Chains of 300 particles differ by .7 nats over thirty temperatures, and are called doubtful: hence 1500.
    """
    y, sd = 0.5 * jnp.arange(20.0) / 20 - 0.3, 0.01

    def model():
        x = numpyro.sample("x", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(x, sd).to_event(1), obs=y)

    smc = ppd.TemperedSMC(model, num_particles=1500, num_chains=8)
    smc.run(jax.random.key(0))
    exact = dist.Normal(0.0, np.sqrt(1 + sd**2)).log_prob(y).sum()
    assert smc.reliable and 20 < smc.state.num_temperatures.min() < 80
    assert abs(smc.log_evidence - exact) < 3 * smc.log_evidence_error < 1.5
    x = smc.get_samples()["x"]
    assert np.abs((x.mean(0) - y) / sd).max() < 0.2 and np.abs(x.std(0) / sd - 1).max() < 0.2


@pytest.mark.slow
def test_errors_cover():
    """Of 40 runs of 8 chains, ±2 errors hold the truth in all but as many as a binomial of 5 % has."""
    y = np.array([9, 4, 7])
    smc = ppd.TemperedSMC(rates, num_particles=50, num_chains=320)
    smc.run(jax.random.key(0), jnp.asarray(y))
    chains = smc.log_evidences.reshape(8, 40)
    nothing = np.ones_like(chains)
    error = evidence_error(Findings(chains, nothing, nothing, nothing[0], 50, None))
    off = np.logaddexp.reduce(chains, axis=0) - np.log(8) - log_evidence_of_rates(y)
    assert (np.abs(off) < 2 * error).sum() >= 34  # fewer in .14 % of cases
    assert np.abs(off.mean()) < 4 * off.std() / 40**0.5


def test_new_data_same_program(eight):
    smc = ppd.TemperedSMC(rates, num_particles=200, num_chains=8)
    with compilations() as compiled:
        smc.run(jax.random.key(1), jnp.array([0, 0, 1]))
    assert not compiled["run_chains"]
    assert abs(smc.log_evidence - log_evidence_of_rates(np.array([0, 0, 1]))) < 4 * smc.log_evidence_error


@pytest.mark.slow
def test_a_collapse_is_said(capsys):
    """Modes that are too far apart for so few particles: chains do not agree."""

    def model():
        x = numpyro.sample("x", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
        numpyro.factor("r", -1e4 * jnp.sum((jnp.abs(x) - 2.5) ** 2))

    smc = ppd.TemperedSMC(model, num_particles=10, num_chains=8)
    with pytest.warns(ppd.CollapseWarning, match=r"SMC collapsed \(.*\). Neither .*: take more particles"):
        smc.run(jax.random.key(0))
    assert smc.verdict == "collapsed" and not smc.reliable and np.isnan(smc.log_evidence_error)
    with pytest.raises(ValueError, match=r"runs\['a'\] collapsed"):
        ppd.compare_evidence({"a": smc, "b": smc})


@pytest.mark.slow
def test_refusals():
    def discrete():
        numpyro.sample("label", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="site 'label' is discrete"):
        ppd.TemperedSMC(discrete).run(jax.random.key(0))
    with pytest.raises(ValueError, match="no latent"):
        ppd.TemperedSMC(lambda: None).run(jax.random.key(0))
    with pytest.raises(ValueError, match="num_chains"):
        ppd.TemperedSMC(discrete, num_chains=0)
    with pytest.raises(TypeError, match="rng_key"):
        ppd.TemperedSMC(discrete).run(0)
    with pytest.raises(ValueError, match="ess_threshold"):
        ppd.TemperedSMC(discrete, ess_threshold=1.0)
    with pytest.raises(RuntimeError, match="call run first"):
        ppd.TemperedSMC(discrete).get_samples()

    def impossible():
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("y", dist.Normal(x, 1.0), obs=0.0)
        numpyro.factor("r", -jnp.inf)

    with pytest.raises(ValueError, match="likelihood is zero or NaN at every particle; it is that of 'y'"):
        ppd.TemperedSMC(impossible, num_particles=10, num_chains=2).run(jax.random.key(0))

    def subsampled():
        x = numpyro.sample("x", dist.Normal())
        with numpyro.plate("rows", 10, subsample_size=2):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=0.0)

    with pytest.raises(ValueError, match="plate 'rows' is subsampled"):
        ppd.TemperedSMC(subsampled).run(jax.random.key(0))
