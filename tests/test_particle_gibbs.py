"""Particle Gibbs as a user meets it, the densities of proposals, and what SMC says of rows that share latents."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pp_diffusion as ppd
from pp_diffusion.posterior.costs import Cost
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.states.entries import Binary
from pp_diffusion.states.finite import FiniteProposal
from pp_diffusion.states.normal import DiagonalProposal, NormalProposal

KEY = jax.random.key(0)
PRIOR = ppd.Diffusion(
    ppd.GaussianKernel(()), ppd.FixedSchedule.constant_erasure(3), lambda x_t, t: (0 * x_t, 0 * x_t)
).prior({})


def shared(y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(x + b, 1.0), obs=y)


def apart(y):
    with numpyro.plate("rows", len(y)):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(x + b, 1.0), obs=y)


# --- the density of what was drawn ----------------------------------------------------------------------------------


def normal_proposal(shift):
    rng = np.random.default_rng(0)
    G, root_R = rng.normal(size=(4, 1, 2, 2, 3)), np.linalg.cholesky(np.eye(2) * 0.5 + 0.2)
    share, R = np.full((4, 1, 2, 1), 0.7), root_R @ root_R.T
    root_S = np.linalg.cholesky(0.49 * np.einsum("...kd,...ld->...kl", G, G) + R)
    parts = (rng.normal(size=(4, 1, 2, 3)), np.array([0.5, 2.0, 0.0]) * np.ones((4, 1, 2, 3)), G, share, root_S)
    parts += (np.broadcast_to(root_R, root_S.shape), rng.normal(size=(4, 1, 2, 2)))
    parts += (rng.normal(size=(4, 1, 2, 3)) * [1, 1, 0] if shift else None, rng.normal(size=(4, 1, 2)))
    G[..., 2] = 0  # of a coordinate that is set
    root_S[...] = np.linalg.cholesky(0.49 * np.einsum("...kd,...ld->...kl", G, G) + R)
    return NormalProposal(*(None if a is None else jnp.asarray(a, jnp.float32) for a in parts))


@pytest.mark.parametrize("shift", [False, True])
def test_log_ratio_of_normal_draws(shift):
    proposal = normal_proposal(shift)
    x, log_ratio = proposal.draw(KEY, (4, 1, 2, 3))
    log_ratio = np.asarray(log_ratio)
    if shift:  # the noise of a coordinate that is set is not in x, and has no shift
        assert np.abs(log_ratio).min() > 1e-3
    np.testing.assert_allclose(proposal.log_ratio(x), log_ratio, rtol=1e-3, atol=1e-4)


def test_noise_of_normal_draws():
    """It gives the same states and ratio again, and is standard normal, of which x says as much as it does."""

    @jax.jit
    def both_ways(proposal):
        x, _ = proposal.draw(KEY, shape := (20_000, 1, 2, 3))
        noise = proposal.noise_of(jax.random.key(1), x)
        return x, proposal.log_ratio(x), noise, *proposal.from_noise(noise, shape)

    proposal = jax.tree.map(lambda a: np.repeat(a[:1], 20_000, 0), normal_proposal(True))
    x, log_ratio, noise, again, log_ratio_again = both_ways(proposal)
    np.testing.assert_allclose(again, x, atol=1e-4)
    np.testing.assert_allclose(log_ratio_again, log_ratio, rtol=1e-3, atol=2e-3)
    drawn = np.asarray(noise, np.float64)[:, 0, 0, [0, 1, 3, 4]]  # nothing was drawn for a coordinate that is set
    np.testing.assert_allclose(np.cov(drawn.T), np.eye(4), atol=0.05)
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.035)


def test_log_ratio_of_other_draws():
    rng = np.random.default_rng(1)
    mean, scale, shift = (jnp.asarray(rng.uniform(0.5, 1.5, size=(4, 1, 2, 3)), jnp.float32) for _ in range(3))
    diagonal = DiagonalProposal(mean, scale, shift, 0.5 * scale, shift.sum(-1))
    finite = FiniteProposal(Binary(mean - 1), Binary(shift - 1))
    for proposal in (diagonal, finite):
        x, log_ratio = proposal.draw(KEY, (4, 1, 2, 3))
        np.testing.assert_allclose(proposal.log_ratio(x), log_ratio, rtol=1e-4, atol=1e-5)
    again, _ = diagonal.from_noise(diagonal.noise_of(KEY, x_0 := diagonal.draw(KEY, (4, 1, 2, 3))[0]), x_0.shape)
    np.testing.assert_allclose(again, x_0, rtol=1e-5)


# --- as a user meets it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gibbs():
    settings = {"num_particles": 3, "num_warmup": 30, "num_samples": 40, "num_chains": 2, "num_moves": 2}
    gibbs = ppd.ParticleGibbs(shared, **settings, progress_bar=False)
    gibbs.run(KEY, jnp.array([1.0, 2.0, 0.5]))
    return gibbs


@pytest.mark.slow
def test_results(gibbs, capsys):
    draws = gibbs.get_samples(group_by_chain=True)
    assert {name: a.shape for name, a in draws.items()} == {"b": (2, 40), "x": (2, 40, 3)}
    assert gibbs.get_samples()["x"].shape == (80, 3)
    np.testing.assert_array_equal(gibbs.get_samples()["b"][40:], draws["b"][1])
    assert 0.2 < gibbs.sweeps.renewed.mean() < 1 and np.ptp(draws["b"][0]) > 0.1
    assert 0.2 < gibbs.sweeps.moves_accepted.mean() < 1
    gibbs.print_summary()
    assert "r_hat" in (words := capsys.readouterr().out) and "renews x in" in words and "together with x: 0." in words
    idata = gibbs.to_arviz()
    assert idata["log_likelihood"]["y"].shape == (2, 40, 3)
    assert idata["sample_stats"]["diverging"].shape == (2, 40)


def test_what_it_does_not_serve():
    def discrete(y):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", PRIOR) + k, 1.0), obs=y)

    def alone(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", PRIOR), 1.0), obs=y)

    network = ppd.Diffusion(
        ppd.GaussianKernel(()),
        ppd.FixedSchedule.constant_erasure(3),
        lambda x_t, t, context: (0 * x_t + context[..., 0], 0 * x_t),
    )

    def entangled(y):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", network.prior({}, context=b[None])), 1.0), obs=y)

    def moving(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(numpyro.sample("b", dist.Uniform(x, x + 1)), 1.0), obs=y)

    def run(model):
        ppd.ParticleGibbs(model, num_particles=2, progress_bar=False).run(KEY, jnp.array(1.0))

    with pytest.raises(ValueError, match="site 'k' is discrete: ParticleGibbs"):
        run(discrete)
    with pytest.raises(ValueError, match="has no latent site"):
        run(alone)
    with pytest.raises(ValueError, match="its prior depends on the latent site 'b'"):
        run(entangled)
    with pytest.raises(ValueError, match="latent site 'b': its support depends on 'x'"):
        run(moving)
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        ppd.ParticleGibbs(shared, num_particles=1)
    with pytest.raises(RuntimeError, match="call run first"):
        ppd.ParticleGibbs(shared).get_samples()


# --- what SMC says of rows that share latents -----------------------------------------------------------------------


def test_what_a_model_tells_of_its_cost():
    y = jnp.linspace(-1.0, 1.0, 12)
    found = Cost.of(read_model(shared, (y,), {}), 1000, 4)
    assert found == Cost(12, 12, ("b",), 1, 1000, 1000 * 4 * 12 * 3 * (1 + 12))
    assert not found.complaint
    found = Cost.of(read_model(apart, (y,), {}), 10, 4)
    assert found == Cost(1, 1, ("b",), 1, 10, 10 * 4 * 12 * 3 * (1 + 1))
    assert not found.complaint


def test_only_rows_that_share_latents_are_warned_of():
    cost = Cost(12, 24, ("b",), 2, 100, 10**6)
    for bad, why in ((cost, "480 particles"), (cost._replace(num_particles=500, network_calls=10**9), "1e.09 network")):
        with pytest.warns(ppd.CostWarning, match=f"12 rows of x share the latents 'b'.*{why}.*ParticleGibbs.*FlowRep"):
            bad.warn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (cost._replace(shared=()), cost._replace(rows=4), cost._replace(num_particles=480)):
            fine.warn()
