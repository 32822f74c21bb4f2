"""Tempered particles: posteriors and evidences against exact ones, over a flow's noise and for other latents."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import pp_diffusion as ppd
from pp_diffusion import solvers
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
    assert 0 < smc.log_evidence_error < 0.2


@pytest.mark.slow
def test_shares_of_modes_far_apart():
    """.3 and .7 of the prior, of which r makes .5625 and .4375: no chain of NUTS would tell."""
    flow = FAR.diffusion().flow({}, num_steps=16)

    def model():
        x = numpyro.sample("x", flow)
        numpyro.factor("r", jnp.where(x[0] < 0, jnp.log(3.0), 0.0) - 0.5 * (jnp.abs(x[0]) - 4.5) ** 2)

    smc = ppd.TemperedSMC(handlers.reparam(model, config={"x": ppd.FlowReparam()}), num_particles=1000)
    smc.run(jax.random.key(0))
    share = (smc.get_samples()["x"] < 0).mean()
    assert abs(share - 0.9 / 1.6) < 0.06
    exact = np.log(1.6) + dist.Normal(4.0, np.hypot(0.5, 1.0)).log_prob(4.5) + 0.5 * np.log(2 * np.pi)
    assert abs(smc.log_evidence - exact) < 0.1


def test_constrained_latents(capsys):
    def model(y):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
        numpyro.deterministic("twice", 2 * rate)
        with numpyro.plate("rows", 3):
            numpyro.sample("y", dist.Poisson(rate), obs=y)

    y = np.array([4, 1, 2])
    smc = ppd.TemperedSMC(model, num_particles=500, num_chains=3)
    smc.run(jax.random.key(0), jnp.asarray(y))
    draws = smc.get_samples()
    np.testing.assert_allclose(draws["twice"], 2 * draws["rate"], rtol=1e-6)
    exact = dist.Gamma(10.0, 5.0)
    assert abs(draws["rate"].mean() - exact.mean) < 0.15 * exact.variance**0.5
    from scipy.special import gammaln

    evidence = gammaln(10) - gammaln(3) + 3 * np.log(2) - 10 * np.log(5) - gammaln(y + 1).sum()
    assert abs(smc.log_evidence - evidence) < 0.15
    smc.print_summary()
    assert "log evidence" in capsys.readouterr().out


def test_refusals():
    def discrete():
        numpyro.sample("label", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="site 'label' is discrete"):
        ppd.TemperedSMC(discrete).run(jax.random.key(0))
    with pytest.raises(ValueError, match="no latent"):
        ppd.TemperedSMC(lambda: None).run(jax.random.key(0))
    with pytest.raises(ValueError, match="num_chains"):
        ppd.TemperedSMC(discrete, num_chains=1)
    with pytest.raises(ValueError, match="ess_threshold"):
        ppd.TemperedSMC(discrete, ess_threshold=1.0)
    with pytest.raises(ValueError, match="run it first"):
        ppd.TemperedSMC(discrete).get_samples()
