"""Situations from public bug reports that were tried and found right, and stay so; others are with their modules.

Latents of odd supports, masked NaN and NumPyro's scan, each in a model of its own: log Z and means beside a million
plain draws by NumPy, with x integrated out by hand, or a closed form.
"""

import multiprocessing
import pickle
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy.special import expit
from scipy.stats import multivariate_normal, norm

import pp_diffusion as ppd
from tests.exact.oracles import Z, z_score

KEY = jax.random.key(0)


def exact_network(num_timesteps):
    """Of the reverse process of N(0, 1)."""

    def network(x_t, t):
        beta = (1.0 / (num_timesteps + 1 - t)).reshape(jnp.shape(t) + (1,) * (jnp.ndim(x_t) - jnp.ndim(t)))
        return jnp.sqrt(jnp.maximum(1 - beta, 0.0)) * x_t, beta * jnp.ones_like(x_t)

    return network


def standard_normal(event_shape=(), num_timesteps=5, **settings):
    settings = {"parameterization": "direct", "last_step": "network"} | settings
    schedule = ppd.FixedSchedule.constant_erasure(num_timesteps)
    return ppd.Diffusion(ppd.GaussianKernel(event_shape), schedule, exact_network(num_timesteps), **settings).prior({})


SCALAR, PAIR = standard_normal(), standard_normal((2,))


def run(model, *args, num_particles=32, num_chains=8, **settings):
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=num_chains, progress_bar=False, **settings)
    smc.run(KEY, *args)
    return smc


# --- latents of every support, masks, scan ---------------------------------------------------------------------------


def correlation(x):
    """LKJ: a matrix of correlations, of which there is one."""
    matrix = numpyro.sample("correlations", dist.LKJ(2, 1.5))
    numpyro.sample("pair", dist.MultivariateNormal(x * jnp.ones(2), matrix), obs=jnp.array([1.2, -0.9]))


def draw_correlation(rng, n):
    rho = 2 * rng.beta(1.5, 1.5, n) - 1
    total, difference = (1.2 - 0.9) / np.sqrt(2), (1.2 + 0.9) / np.sqrt(2)
    log_prob = norm(0, np.sqrt(3 + rho)).logpdf(total) + norm(0, np.sqrt(1 - rho)).logpdf(difference)
    return {"correlations": np.stack([1 + 0 * rho, rho, rho, 1 + 0 * rho], -1).reshape(n, 2, 2)}, log_prob


def cutpoints(x):
    """Of an ordered scale: increasing."""
    steps = dist.Normal(jnp.array([-0.5, 0.3]), jnp.array([1.0, 0.5])).to_event(1)
    c = numpyro.sample("cutpoints", dist.TransformedDistribution(steps, dist.transforms.OrderedTransform()))
    numpyro.sample("answer", dist.OrderedLogistic(2 * x, c), obs=2)


def draw_cutpoints(rng, n):
    u, x = rng.normal([-0.5, 0.3], [1.0, 0.5], (n, 2)), rng.normal(size=n)
    c = np.stack([u[:, 0], u[:, 0] + np.exp(u[:, 1])], -1)
    return {"cutpoints": c}, np.log(expit(2 * x - c[:, 1]))


def sums_of_zero(x):
    effects = numpyro.sample("effects", dist.ZeroSumNormal(1.5, (3,)))
    numpyro.sample("rows", dist.Normal(x + effects, 0.7).to_event(1), obs=jnp.array([1.0, -0.5, 0.4]))


def draw_sums_of_zero(rng, n):
    effects = 1.5 * rng.normal(size=(n, 3))
    effects -= effects.mean(-1, keepdims=True)
    return {"effects": effects}, seen_with_x(np.array([1.0, -0.5, 0.4]) - effects, 0.7)


def shares(x):
    share = numpyro.sample("shares", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    numpyro.sample("blend", dist.Normal(x + share @ jnp.array([-4.0, 0.0, 4.0]), 0.6), obs=-1.5)


def draw_shares(rng, n):
    share = rng.dirichlet([1.0, 2.0, 3.0], n)
    return {"shares": share}, seen_with_x(-1.5 - share @ np.array([[-4.0], [0.0], [4.0]]), 0.6)


def shifted_supports(x):
    """Above 1.5; between 2 and 5."""
    above = numpyro.sample("above", dist.Pareto(1.5, 4.0))
    between = numpyro.sample("between", dist.Uniform(2.0, 5.0))
    numpyro.sample("difference", dist.Normal(x + above - between, 0.5), obs=-0.4)


def draw_shifted_supports(rng, n):
    above, between = 1.5 * (1 + rng.pareto(4.0, n)), rng.uniform(2.0, 5.0, n)
    found = {"above": above, "between": between}
    return found, seen_with_x((-0.4 - above + between)[:, None], 0.5)


def dynamic_support(x):
    """Of one latent, given by another."""
    top = numpyro.sample("top", dist.Gamma(3.0, 1.0))
    below = numpyro.sample("below", dist.Uniform(-top, top))
    numpyro.sample("low", dist.Normal(x + below, 0.5), obs=-2.0)


def draw_dynamic_support(rng, n):
    top = rng.gamma(3.0, 1.0, n)
    below = rng.uniform(-top, top)
    return {"top": top, "below": below}, seen_with_x((-2.0 - below)[:, None], 0.5)


def masked_nan(x):
    """Four ways to leave out the second number of two."""
    y, known = jnp.array([0.8, jnp.nan]), jnp.array([True, False])
    with handlers.mask(mask=known):
        numpyro.sample("by handler", dist.Normal(x * jnp.ones(2), 0.5), obs=y)
    numpyro.sample("by method", dist.Normal(x * jnp.ones(2), 0.5).mask(known).to_event(1), obs=y)
    with numpyro.plate("pair", 2):
        numpyro.sample("by obs_mask", dist.Normal(x, 0.5), obs=y, obs_mask=known)
    numpyro.factor("by hand", jnp.where(known, dist.Normal(x, 0.5).log_prob(jnp.where(known, y, 0.0)), 0.0).sum())


def draw_masked_nan(rng, n):
    return {}, np.full(n, seen_with_x(np.full((1, 4), 0.8), 0.5)[0])


def observed_in_scan(x):
    def step(level, y):
        level = 0.8 * level + x
        numpyro.sample("levels", dist.Normal(level, 0.5), obs=y)
        return level, None

    scan(step, jnp.zeros(()), jnp.array([1.0, 1.5, 2.5]))


def draw_observed_in_scan(rng, n):
    gain = np.cumsum([1.0, 0.8, 0.64])  # y_t = gain_t x + noise
    covariance = np.outer(gain, gain) + 0.25 * np.eye(3)
    return {}, np.full(n, multivariate_normal(np.zeros(3), covariance).logpdf([1.0, 1.5, 2.5]))


def seen_with_x(rest, scale):
    """log density of several numbers x + noise, x being N(0, 1)."""
    n, total, squares = rest.shape[-1], rest.sum(-1), (rest**2).sum(-1)
    variance = scale**2
    exponent = squares / variance - total**2 / (variance * (variance + n))
    return -0.5 * (exponent + n * np.log(2 * np.pi * variance) + np.log1p(n / variance))


MODELS = {
    "correlation": (correlation, draw_correlation),
    "cutpoints": (cutpoints, draw_cutpoints),
    "sums_of_zero": (sums_of_zero, draw_sums_of_zero),
    "shares": (shares, draw_shares),
    "shifted_supports": (shifted_supports, draw_shifted_supports),
    "dynamic_support": (dynamic_support, draw_dynamic_support),
    "masked_nan": (masked_nan, draw_masked_nan),
    "observed_in_scan": (observed_in_scan, draw_observed_in_scan),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_posteriors(name):
    """log Z and the latents' means over 16 chains, within 4.5 errors of both ways together."""
    density, draws = MODELS[name]

    def model():
        density(numpyro.sample("x", SCALAR))

    smc = run(model, num_particles=200, num_chains=16)
    latents, log_prob = draws(np.random.default_rng(0), 1_000_000)
    weights = np.exp(log_prob - log_prob.max())
    log_z, shares = np.log(weights.mean()) + log_prob.max(), weights / weights.sum()
    error = weights.std() / weights.mean() / 1000
    relative = np.exp(np.asarray(smc.log_evidences, np.float64) - log_z)
    assert abs(relative.mean() - 1) < Z * np.hypot(relative.std(ddof=1) / 4, error) + 1e-5
    assert smc.verdict == "believable" and relative.std(ddof=1) < 0.3
    samples = smc.get_samples(group_by_chain=True)
    assert set(samples) == {"x", *latents}
    for site, values in latents.items():
        mean = np.tensordot(shares, values, 1)
        error = np.sqrt(np.tensordot(shares**2, (values - mean) ** 2, 1))
        of_chains = np.asarray(samples[site], np.float64).mean(1)
        scale = np.hypot(of_chains.std(0, ddof=1) / 4, error)
        assert (np.abs(of_chains.mean(0) - mean) < Z * scale + 1e-5).all()


# --- scales of data --------------------------------------------------------------------------------------------------

ROWS = np.random.default_rng(0).normal([0.3, -1.0], [1.0, 2.0], (60, 2))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_far_scales(scale):
    """Data in other units: what is learned is the same, and K and log Z differ by the logarithm of the unit."""

    def found(scale):
        transform = ppd.standardize(ROWS * scale)
        diffusion = ppd.Diffusion(
            ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(4), ppd.networks.MLP((4,)), transform=transform
        )
        trained = ppd.fit(KEY, diffusion, ROWS * scale, num_steps=3, batch_size=20, progress_bar=False).prior
        return ppd.lower_bound(KEY, trained, ROWS[:4] * scale).value + 2 * np.log(scale)

    np.testing.assert_allclose(found(scale), found(1.0), rtol=1e-3)


def in_units(y, loc, unit):
    transform = dist.transforms.AffineTransform(loc, unit * jnp.ones(2))
    x = numpyro.sample("x", ppd.DiffusionPrior(PAIR.process, transform))
    numpyro.sample("y", dist.Normal(x, unit).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e30, 1e-30])
def test_far_scales_of_observations(unit):
    y = np.array([2.0, -1.0])
    smc = run(in_units, jnp.asarray(y * unit, float), jnp.zeros(2), jnp.asarray(unit, float))
    assert smc.log_evidence + 2 * np.log(unit) == pytest.approx(norm(0, np.sqrt(2)).logpdf(y).sum(), abs=1e-3)
    np.testing.assert_allclose(smc.get_samples()["x"].mean(0) / unit, y / 2, atol=0.2)  # sd .045


# --- lengths of chains -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_steps():
    """The same evidence, in memory that does not grow with them but for what a step reports."""

    def evidence(num_timesteps):
        prior = standard_normal((), num_timesteps)

        def model(y):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0), obs=y)

        return run(model, 2.0, num_particles=16, num_chains=1).log_evidence, most_memory()

    exact = norm(0, np.sqrt(2)).logpdf(2.0)
    short, before = evidence(100)
    long, after = evidence(100_000)
    assert short == pytest.approx(exact, abs=1e-3)
    assert long == pytest.approx(exact, abs=0.05)
    assert after - before < 300e6


def most_memory():
    """Bytes of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- priors as parts of other distributions --------------------------------------------------------------------------


@pytest.mark.slow
def test_mixtures_and_transforms_of_priors():
    """Densities by trajectories, which are exact here."""
    rule = ppd.Importance(KEY, 2)
    near = PAIR.with_log_prob(rule)
    unit = dist.transforms.AffineTransform(jnp.array([3.0, -2.0]), jnp.array([0.5, 2.0]))
    far = ppd.DiffusionPrior(PAIR.process, unit).with_log_prob(rule)
    law, x = norm([3.0, -2.0], [0.5, 2.0]), np.array([[0.5, -1.0], [2.8, 0.3], [4.0, -2.0]])
    wrapped = dist.TransformedDistribution(near, unit)
    for moved in (far, wrapped):
        np.testing.assert_allclose(moved.log_prob(jnp.asarray(x)), law.logpdf(x).sum(-1), atol=2e-3)
    mixture = dist.MixtureGeneral(dist.Categorical(jnp.array([0.25, 0.75])), [near, far])
    both = np.logaddexp(np.log(0.25) + norm.logpdf(x).sum(-1), np.log(0.75) + law.logpdf(x).sum(-1))
    np.testing.assert_allclose(mixture.log_prob(jnp.asarray(x)), both, atol=2e-3)
    for moved, mean in ((wrapped, [3.0, -2.0]), (mixture, [2.25, -1.5])):
        assert (np.abs(z_score(moved.sample(jax.random.key(1), (2000,)), np.array(mean))) < Z).all()


# --- other processes -------------------------------------------------------------------------------------------------


def trained():
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(4), ppd.networks.MLP((4,)))
    return diffusion.prior(diffusion.init_params(KEY))


def sees(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def draws_of(prior):
    """Of the prior, and of its posterior: as NumPy's."""
    smc = run(sees, prior, jnp.array([0.5, -1.0]), num_chains=2)
    again = pickle.loads(pickle.dumps(smc))  # a run is kept that way, too
    assert again.log_evidence == smc.log_evidence
    return np.asarray(prior.sample(KEY, (3,))), np.asarray(again.get_samples()["x"]), smc.log_evidence


@pytest.mark.slow
def test_a_process_that_is_spawned_draws_the_same():
    """A prior is sent there by pickle, and the draws of its posterior come back."""
    prior = trained()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(draws_of, (prior,))
    for a, b in zip(there, draws_of(prior), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert pickle.loads(pickle.dumps(prior)) == prior
