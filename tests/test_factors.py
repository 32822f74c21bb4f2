"""What is read off a user's model: its densities, whole and in parts, against NumPyro's own; what is refused, and how.

Each case is a function of the prior and of data. With an improper flat prior in the diffusion's place, NumPyro's
potential energy is −log r − log p(other latents), in unconstrained space.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module
from numpyro.distributions.transforms import AffineTransform, ExpTransform, OrderedTransform
from numpyro.infer.util import potential_energy
from scipy.stats import multivariate_normal, norm, poisson

import pp_diffusion as ppd
from pp_diffusion.posterior import latents as latent_sites
from pp_diffusion.posterior import sites
from pp_diffusion.posterior.factors import read_model

KEY = jax.random.key(0)
A = jnp.array([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]])
COVARIANCE = jnp.array([[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]])
Y = jnp.array([0.5, -1.0])
NAN_Y = jnp.array([0.5, jnp.nan])
THREE = jnp.array([0.5, -1.0, 0.1])
COUNTS = jnp.array([3, 0])
MASK = jnp.array([True, False])
ROWS = jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.1]])
BLOCKS = jnp.stack([ROWS, -ROWS])


def zeros(x_t, t):
    return 0 * x_t, 0 * x_t


def gaussian(event_shape=(2,), num_timesteps=5, network=zeros, context=None, **settings):
    """With the default network: the exact reverse process of N(0, 1)."""
    schedule = ppd.FixedSchedule.constant_erasure(num_timesteps)
    diffusion = ppd.Diffusion(ppd.GaussianKernel(event_shape), schedule, network, **settings)
    return diffusion.prior({}, context=context)


def bits(size=2):
    kernel = ppd.BinomialKernel((size,), probs=0.3)
    schedule = ppd.FixedSchedule.constant_erasure(5)
    return ppd.Diffusion(kernel, schedule, lambda x_t, t: 1.5 * x_t - 0.2).prior({})


GAUSSIAN, SCALAR, BITS = gaussian(), gaussian(()), bits()


def flat(shape, event_dim):
    return dist.ImproperUniform(dist.constraints.real, shape[: len(shape) - event_dim], shape[len(shape) - event_dim :])


@jax.jit
def reading(factors, z, latents):
    return factors.read(z, latents)


@partial(jax.jit, static_argnums=(1, 2))
def states(factors, num_particles=3, num_chains=1):
    count = (num_particles, num_chains)
    z = 0.7 * jax.random.normal(KEY, (*count, factors.num_systems, *factors.state_shape))
    return z, latent_sites.draw(factors, jax.random.key(1), count)


def normal_log_prob(found):
    """log N(residual; 0, noise), by NumPy."""
    out = np.zeros(found.log_r.shape)
    residual, noise = np.asarray(found.residual, np.float64), np.asarray(found.noise, np.float64)
    for index in np.ndindex(*out.shape):
        if residual.shape[-1]:
            out[index] = multivariate_normal(np.zeros(residual.shape[-1]), noise[index]).logpdf(residual[index])
    return out


# --- the cases -------------------------------------------------------------------------------------------------------


def normal(prior, y=Y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(jnp.sin(x), jnp.array([0.5, 2.0])).to_event(1), obs=y)


def one_number(prior, y=0.3):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x @ A[0], 0.5), obs=y)


def scalar_x(prior, y=0.3):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 0.5), obs=y)


def many_of_scalar(prior, y=ROWS[:, 0]):
    x = numpyro.sample("x", prior)
    with numpyro.plate("n", 3):
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def multivariate(prior, y=THREE):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.MultivariateNormal(A @ x, COVARIANCE), obs=y)


def multivariate_rows(prior, y=ROWS):
    x = numpyro.sample("x", prior)
    with numpyro.plate("n", 3):
        numpyro.sample("y", dist.MultivariateNormal(x, scale_tril=jnp.array([[1.0, 0.0], [0.5, 0.3]])), obs=y)


def scaled_multivariate(prior, y=ROWS):
    x = numpyro.sample("x", prior)
    with numpyro.plate("n", 3), handlers.mask(mask=jnp.array([True, False, True])), handlers.scale(scale=0.7):
        numpyro.sample("y", dist.MultivariateNormal(x, COVARIANCE[:2, :2]), obs=y)


def counts(prior, y=COUNTS):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Poisson(jnp.exp(x)).to_event(1), obs=y)


def factor(prior, y=Y):
    x = numpyro.sample("x", prior)
    numpyro.factor("r", -(jnp.abs(x - y).sum() ** 1.5))


def several(prior, y=Y):
    x = numpyro.sample("x", prior)
    numpyro.sample("a", dist.Normal(x[0], 0.3), obs=y[0])
    numpyro.sample("b", dist.MultivariateNormal(A @ x, COVARIANCE), obs=jnp.array([0.1, 0.2, 0.3]))
    numpyro.sample("c", dist.StudentT(3.0, x[1], 1.0), obs=y[1])
    numpyro.sample("d", dist.Laplace(x[1], 0.5), obs=y[1])
    numpyro.factor("e", 0.1 * x.sum())
    numpyro.sample("constant", dist.Normal(0.0, 1.0), obs=1.0)  # depends on nothing, and is part of the evidence
    numpyro.deterministic("g", x + 1)


def scaled(prior, y=Y):
    x = numpyro.sample("x", prior)
    with handlers.scale(scale=2.5):
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        numpyro.sample("z", dist.Poisson(jnp.exp(x)).to_event(1), obs=COUNTS)


def masked(prior, y=Y):
    x = numpyro.sample("x", prior)
    with handlers.mask(mask=MASK):
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
    with handlers.mask(mask=False):
        numpyro.sample("z", dist.Normal(x, 0.5), obs=y)
    with handlers.mask(mask=True), handlers.scale(scale=0.5):
        numpyro.sample("w", dist.Cauchy(x, 0.5).to_event(1), obs=y)


def masked_nan_normal_family(prior, y=NAN_Y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.LogNormal(x, 0.5).mask(~jnp.isnan(y)).to_event(1), obs=y)


def observed_by_mask(prior, y=Y):
    x = numpyro.sample("x", prior)
    with numpyro.plate("n", 2):
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y, obs_mask=MASK)


def half_normal(prior, y=Y):
    x = numpyro.sample("x", prior)
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)


def hierarchical(prior, y=Y):
    x = numpyro.sample("x", prior)
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("n", 2):
        a = numpyro.sample("a", dist.Normal(0.0, tau))
    b = numpyro.sample("b", dist.TransformedDistribution(dist.Normal(a, tau), AffineTransform(1.0, 2.0)).to_event(1))
    numpyro.sample("y", dist.Normal(x + a + b, 1.0).to_event(1), obs=y)


def transformed(prior, y=Y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Gamma(2.0, 1 / x).to_event(1), obs=jnp.exp(y))


def one_plate(prior, y=ROWS):
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def one_plate_multivariate(prior, y=ROWS):
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.MultivariateNormal(x, COVARIANCE[1:, 1:]), obs=y)
        numpyro.sample("z", dist.Normal(x.sum(-1), 1.0), obs=y[:, 0])


def plate_of_scalars(prior, y=ROWS[:, 0]):
    with numpyro.plate("n", 3):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 0.5), obs=y)


def plate_dim(prior, y=ROWS[:, None]):
    with numpyro.plate("n", 3, dim=-2):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def plate_masked_rows(prior, y=ROWS):
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", prior)
        with handlers.mask(mask=jnp.array([True, False, True])), handlers.scale(scale=3.0):
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def nested_plates(prior, y=BLOCKS):
    with numpyro.plate("m", 2, dim=-2), numpyro.plate("n", 3, dim=-1):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def sites_in_outer_plate(prior, y=BLOCKS[:, :1]):
    with numpyro.plate("m", 2, dim=-2):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 3, dim=-1):
            x = numpyro.sample("x", prior)
        mean = x.mean(1, keepdims=True) + offset[..., None]
        numpyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)


def one_value_for_all(prior, y=0.3):
    x = numpyro.sample("x", prior)
    with numpyro.plate("n", 2):
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        numpyro.sample("z", dist.Poisson(jnp.exp(x)), obs=1)
    numpyro.sample("w", dist.MultivariateNormal(jnp.stack([x, -x]), jnp.eye(2)).to_event(1), obs=jnp.ones((1, 2)))


def inner_axes(prior, y=ROWS):
    with numpyro.plate("n", 4):
        x = numpyro.sample("x", prior.expand([4, 3]).to_event(1) if prior.shape() == (2,) else prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(2), obs=jnp.stack([y, 2 * y, 3 * y, 4 * y]))


def expanded(prior, y=ROWS):
    x = numpyro.sample("x", prior.expand([3]).to_event(1) if prior.shape() == (2,) else prior)
    numpyro.sample("y", dist.Normal(x.cumsum(-2), 0.5).to_event(2), obs=y)


def latents_in_plate(prior, y=ROWS):
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", prior)
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
        b = numpyro.sample("b", dist.Normal(0.0, tau[:, None]).expand([3, 2]).to_event(1))
        numpyro.sample("y", dist.Normal(x * shares[:, :2] + b, tau[:, None]).to_event(1), obs=y)


def latents_of_every_support(prior, y=Y):
    """Correlations, cutpoints, sums of zero, above and between numbers, and between numbers that are latents too."""
    x = numpyro.sample("x", prior)
    correlations = numpyro.sample("correlations", dist.LKJ(2, 1.5))
    steps = dist.Normal(jnp.array([-0.5, 0.3]), 1.0).to_event(1)
    cutpoints = numpyro.sample("cutpoints", dist.TransformedDistribution(steps, OrderedTransform()))
    effects = numpyro.sample("effects", dist.ZeroSumNormal(1.5, (2,)))
    above = numpyro.sample("above", dist.Pareto(1.5, 4.0))
    below = numpyro.sample("below", dist.Uniform(-above, 2 * above))
    numpyro.sample("y", dist.MultivariateNormal(x + effects + below, correlations), obs=y)
    numpyro.sample("z", dist.OrderedLogistic(2 * x[0], cutpoints), obs=1)


def masked_nan_in_four_ways(prior, y=NAN_Y):
    x, known = numpyro.sample("x", prior), ~jnp.isnan(y)
    with handlers.mask(mask=known):
        numpyro.sample("by handler", dist.Normal(x, 0.5), obs=y)
    numpyro.sample("by method", dist.Normal(x, 0.6).mask(known).to_event(1), obs=y)
    numpyro.sample("by hand", dist.Normal(x, 0.7).mask(known).to_event(1), obs=jnp.where(known, y, 0.0))
    numpyro.factor("by factor", jnp.where(known, dist.Normal(x, 0.8).log_prob(jnp.where(known, y, 0.0)), 0.0).sum())


def shared_latent(prior, y=ROWS):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)


def coupled(prior, y=ROWS):
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
    numpyro.sample("total", dist.Normal(x.sum(), 0.5), obs=1.0)


def mixed(prior, y=ROWS):
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x - x.mean(0), 0.5).to_event(1), obs=y)


# name: (model, prior, shape of x, systems)
CASES = {
    "normal": (normal, GAUSSIAN, (2,), ()),
    "one number": (one_number, GAUSSIAN, (2,), ()),
    "scalar x": (scalar_x, SCALAR, (), ()),
    "many observations of a scalar": (many_of_scalar, SCALAR, (), ()),
    "multivariate": (multivariate, GAUSSIAN, (2,), ()),
    "multivariate rows": (multivariate_rows, GAUSSIAN, (2,), ()),
    "scaled multivariate": (scaled_multivariate, GAUSSIAN, (2,), ()),
    "counts": (counts, GAUSSIAN, (2,), ()),
    "factor": (factor, GAUSSIAN, (2,), ()),
    "one value for all": (one_value_for_all, GAUSSIAN, (2,), ()),
    "several": (several, GAUSSIAN, (2,), ()),
    "scaled": (scaled, GAUSSIAN, (2,), ()),
    "masked": (masked, GAUSSIAN, (2,), ()),
    "masked NaN, other": (masked_nan_normal_family, GAUSSIAN, (2,), ()),
    "half normal": (half_normal, GAUSSIAN, (2,), ()),
    "hierarchical": (hierarchical, GAUSSIAN, (2,), ()),
    "transformed": (transformed, gaussian(transform=ExpTransform()), (2,), ()),
    "2-d x": (expanded, gaussian((3, 2)), (3, 2), ()),
    "one plate": (one_plate, GAUSSIAN, (3, 2), (3,)),
    "one plate, multivariate": (one_plate_multivariate, GAUSSIAN, (3, 2), (3,)),
    "plate of scalars": (plate_of_scalars, SCALAR, (3,), (3,)),
    "plate at dim -2": (plate_dim, GAUSSIAN, (3, 1, 2), (3,)),
    "plate, masked rows": (plate_masked_rows, GAUSSIAN, (3, 2), (3,)),
    "nested plates": (nested_plates, GAUSSIAN, (2, 3, 2), (2, 3)),
    "sites in the outer plate": (sites_in_outer_plate, GAUSSIAN, (2, 3, 2), (2,)),
    "plate with inner axes": (inner_axes, GAUSSIAN, (4, 3, 2), (4,)),
    "expanded": (expanded, GAUSSIAN, (3, 2), ()),
    "latents in the plate": (latents_in_plate, GAUSSIAN, (3, 2), (3,)),
    "latents of every support": (latents_of_every_support, GAUSSIAN, (2,), ()),
    "masked NaN": (masked_nan_in_four_ways, GAUSSIAN, (2,), ()),
    "shared latent": (shared_latent, GAUSSIAN, (3, 2), ()),
    "coupled": (coupled, GAUSSIAN, (3, 2), ()),
    "mixed": (mixed, GAUSSIAN, (3, 2), ()),
}


class Case:
    def __init__(self, name):
        self.model, prior, shape, self.systems = CASES[name]
        self.is_inner = name in ("expanded", "plate with inner axes")
        self.event_dim = len(prior.event_shape) + self.is_inner
        self.positive = name == "transformed"
        self.flat = flat(shape, self.event_dim)
        self.factors = read_model(self.model, (prior,), {})
        self.z, self.latents = states(self.factors)
        self.found = jax.device_get(reading(self.factors, self.z, self.latents))

    def params(self, particle):
        """x in data units, and the other latents in unconstrained space, as NumPyro has them."""
        factors = self.factors
        unconstrained = factors.reader.join(jax.tree.map(lambda u: u[particle, 0], self.latents))
        return {"x": factors.to_site(factors.in_data_units(self.z[particle, 0])), **unconstrained}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


@pytest.mark.slow
def test_density_is_numpyros(case):
    """log r and the latents' log prior."""
    assert case.factors.systems == case.systems
    assert case.found.log_r.shape == (3, 1, case.factors.num_systems)
    assert case.found.log_r.std() > 0.01
    for particle in range(3):
        expected = -potential_energy(case.model, (case.flat,), {}, case.params(particle))
        found = case.found.log_r[particle].sum() + case.found.log_prior[particle].sum()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_normal_parts_make_up_the_density(case):
    found = case.found
    total = normal_log_prob(found) + found.correction + found.discrepancy.sum(-1) + found.log_other
    total += found.numbers.density.sum(-1)
    np.testing.assert_allclose(total, found.log_r, rtol=2e-5, atol=2e-5)
    if {type(site.kind) for site in case.factors.observed} <= {sites.Normal, sites.MultivariateNormal}:
        assert not found.discrepancy.any() and not found.log_other.any()


@pytest.mark.parametrize("name", ["masked", "masked NaN", "masked NaN, other", "scaled multivariate", "transformed"])
def test_derivatives_are_finite(name):
    """Those of residuals too: a NaN under a mask must not reach them."""
    case = Case(name)

    @jax.jit
    def derivatives(z):
        return jax.jacrev(lambda z: case.factors.read(z, case.latents))(z)

    for leaf in jax.tree.leaves(derivatives(case.z)):
        assert np.isfinite(leaf).all()


# --- by hand ---------------------------------------------------------------------------------------------------------


def read(model, *args, **kwargs):
    factors = read_model(model, args, kwargs)
    z, latents = states(factors)
    return factors, np.asarray(z, np.float64), jax.device_get(latents), jax.device_get(reading(factors, z, latents))


def test_log_r_by_hand():
    def model(y, k):
        x = numpyro.sample("x", GAUSSIAN)
        with handlers.scale(scale=3.0):
            numpyro.sample("y", dist.Normal(x, 0.5).mask(jnp.array([False, True])).to_event(1), obs=y)
        numpyro.sample("k", dist.Poisson(jnp.exp(x[0])), obs=k)

    _, z, _, found = read(model, Y, 2)
    expected = 3 * norm(z[..., 1], 0.5).logpdf(-1.0) + poisson(np.exp(z[..., 0])).logpmf(2)
    np.testing.assert_allclose(found.log_r, expected, rtol=1e-5)


def test_each_system_has_its_own_log_r():
    def model(y):
        with numpyro.plate("m", 2, dim=-1), numpyro.plate("n", 3, dim=-2):  # the outer plate's axis is the last
            x = numpyro.sample("x", GAUSSIAN)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    y = jnp.linspace(-1, 1, 12).reshape(3, 2, 2)
    factors, z, _, found = read(model, y)
    assert factors.systems == (3, 2)
    expected = norm(z.reshape(-1, 3, 2, 2), 0.5).logpdf(y).sum(-1).reshape(-1, 1, 6)
    np.testing.assert_allclose(found.log_r, expected, rtol=1e-5)


def test_chains_share_the_data():
    factors = read_model(one_plate, (GAUSSIAN,), {})
    z, latents = states(factors, 2, 4)
    log_r = reading(factors, z, latents).log_r
    expected = norm(np.asarray(z), 0.5).logpdf(ROWS).sum(-1)
    assert log_r.shape == (2, 4, 3)
    np.testing.assert_allclose(log_r, expected, rtol=1e-5)


def test_obs_mask_on_a_likelihood():
    """NumPyro makes two sites of it; the one that is not observed depends on x, feeds nothing and is dropped."""

    def model(y):
        x = numpyro.sample("x", GAUSSIAN)
        with numpyro.plate("n", 2):
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y, obs_mask=MASK)

    factors, z, _, found = read(model, NAN_Y)
    assert factors.dropped == ("y_unobserved",) and [site.name for site in factors.observed] == ["y_observed"]
    np.testing.assert_allclose(found.log_r, norm(z[..., 0], 0.5).logpdf(0.5), rtol=1e-5)


@pytest.mark.slow
def test_discrete_latents():
    def model(y):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", SCALAR)
            k = numpyro.sample("k", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
            numpyro.sample("y", dist.Normal(x + k, 0.5), obs=y)

    _, z, latents, found = read(model, ROWS[:, 0])
    k = latents["k"]
    assert set(np.unique(k)) > {0}
    np.testing.assert_allclose(found.log_r, norm(z + k, 0.5).logpdf(ROWS[:, 0]), rtol=1e-5)
    np.testing.assert_allclose(found.log_prior, np.log(np.array([0.2, 0.3, 0.5]))[k], rtol=1e-5)


@pytest.mark.slow
def test_contexts_of_a_batch_shape():
    """Each system steps with its own context, in every chain."""

    def network(x_t, t, context):
        return 0 * x_t + context, jnp.ones_like(x_t)

    context = jnp.arange(6.0).reshape(3, 2)
    prior = gaussian(network=network, context=context, parameterization="direct", last_step="network")

    def inner(y):
        with numpyro.plate("m", 4):
            x = numpyro.sample("x", prior.expand([4, 3]).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=y)

    for model, y, ndim in ((one_plate, ROWS, 1), (coupled, ROWS, 0), (inner, jnp.zeros((4, 3, 2)), 1)):
        factors = read_model(model, (y,) if model is inner else (prior, y), {})
        process = factors.process
        z = states(factors, 5, 2)[0]
        mean = process(z, process.rates.at(2)).mean
        assert factors.systems == (() if ndim == 0 else (len(y),))
        np.testing.assert_allclose(mean, jnp.broadcast_to(context, z.shape))


def test_a_latent_x_does_not_feed_is_kept_and_one_that_feeds_nothing_is_dropped():
    def model(y):
        x = numpyro.sample("x", GAUSSIAN)
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(x, sigma).to_event(1), obs=y)
        numpyro.sample("y_new", dist.Normal(x, sigma).to_event(1))

    factors = read_model(model, (Y,), {})
    assert factors.dropped == ("y_new",) and [site.name for site in factors.latents] == ["sigma"]
    assert factors.observed_values().keys() == {"y"}


def test_bits_know_their_owners():
    def model(y):
        x = numpyro.sample("x", BITS)
        numpyro.sample("y", dist.Normal(x[::-1], 0.5).to_event(1), obs=y)
        numpyro.sample("z", dist.Delta(x[1]), obs=1)

    def pair(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", BITS).sum(), 0.5), obs=y)

    def product(y):
        numpyro.sample("y", dist.Delta(numpyro.sample("x", BITS).prod()), obs=y)

    assert read_model(product, (0.0,), {}).owner is None
    np.testing.assert_array_equal(read_model(model, (Y - 0.1,), {}).owner, [[1, 0, 1]])
    assert read_model(pair, (0.5,), {}).owner is None


# --- programs: what is traced, and what is constant ------------------------------------------------------------------


def test_new_data_need_no_retracing():
    calls = []

    def model(y, scale=1.0):
        calls.append(isinstance(y, jax.core.Tracer))
        x = numpyro.sample("x", GAUSSIAN)
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    def run(*args, **kwargs):
        factors = read_model(model, args, kwargs)
        assert calls == [False, True]  # once as it is, and once traced
        calls.clear()
        log_r = np.asarray(reading(factors, *states(factors)).log_r)
        assert not calls
        return log_r, jax.tree.structure(factors)

    first, program = run(Y)
    for y in (Y + 1, np.asarray(Y) + 2):
        log_r, again = run(y)
        assert not np.array_equal(log_r, first) and again == program
    first, by_name = run(Y, scale=3.0)
    assert by_name != program
    log_r, again = run(Y, scale=jnp.array(4.0))
    assert not np.array_equal(log_r, first) and again == by_name


def by_index(y, known):
    x = numpyro.sample("x", GAUSSIAN)
    numpyro.sample("y", dist.Normal(x[known], 0.5).to_event(1), obs=y[known])


def by_number(y, n):
    x = numpyro.sample("x", GAUSSIAN)
    numpyro.sample("y", dist.Normal(x[:n], 0.5).to_event(1), obs=y[:n])


def by_condition(y, flag):
    x = numpyro.sample("x", GAUSSIAN)
    numpyro.sample("y", dist.Normal(x[:1], 0.5 if flag > 0 else 2.0).to_event(1), obs=y[:1])


def by_shape(y, n):
    x = numpyro.sample("x", GAUSSIAN)
    numpyro.sample("y", dist.Normal(x[0] + jnp.zeros(n), 0.5).to_event(1), obs=y[:1])


@pytest.mark.parametrize(
    "model, argument",
    [
        (by_index, jnp.array([True, False])),
        (by_index, np.array([True, False])),
        (by_index, jnp.array([0])),
        (by_number, jnp.array(1)),
        (by_condition, jnp.array(1.0)),
        (by_shape, jnp.array(1)),
    ],
)
def test_what_a_program_depends_on_is_constant(model, argument):
    _, z, _, found = read(model, Y, argument)
    np.testing.assert_allclose(found.log_r, norm(z[..., 0], 0.5).logpdf(0.5), rtol=1e-5)


def test_errors_of_the_model_come_through():
    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", GAUSSIAN), 1.0).to_event(1), obs=y["a"])

    with pytest.raises(KeyError, match="a"):
        read_model(model, ({"b": Y},), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: partial(model, GAUSSIAN, y=Y),
        lambda model: handlers.condition(lambda: model(GAUSSIAN, None), {"y": Y}),
        lambda model: handlers.substitute(lambda: model(GAUSSIAN, Y), {}),
        lambda model: handlers.block(lambda: model(GAUSSIAN, Y), hide=[]),
    ],
    ids=["partial", "condition", "substitute", "block"],
)
def test_wrapped_models(wrap):
    _, _, _, found = read(wrap(normal))
    np.testing.assert_allclose(found.log_r, read(normal, GAUSSIAN, Y)[-1].log_r)


def test_steps_of_numpyros_scan():
    def model(y):
        x = numpyro.sample("x", GAUSSIAN)

        def step(carry, y):
            numpyro.sample("y", dist.Normal(carry, 0.5), obs=y)
            return carry * x[1], None

        scan(step, x[0], y)

    _, z, _, found = read(model, ROWS[:, 0])
    mean = z[..., :1] * z[..., 1:] ** np.arange(3)
    np.testing.assert_allclose(found.log_r, norm(mean, 0.5).logpdf(ROWS[:, 0]).sum(-1), rtol=1e-4)


def flax_net(y):
    net = flax_module("net", nn.Dense(2), input_shape=(2,))
    numpyro.sample("y", dist.Normal(net(numpyro.sample("x", GAUSSIAN)), 0.5).to_event(1), obs=y)


def test_parameters_put_in():
    params = {"net$params": {"kernel": jnp.eye(2)[::-1], "bias": jnp.zeros(2)}}
    _, z, _, found = read(handlers.substitute(flax_net, params), Y)
    np.testing.assert_allclose(found.log_r, norm(z[..., ::-1], 0.5).logpdf(Y).sum(-1), rtol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


def likelihood(x, y=Y):
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def with_prior(fn):
    """The model whose prior site is as ``fn`` says, and whose likelihood is plain."""
    return lambda: likelihood(fn())


def exact(fn, y=Y):
    return lambda: numpyro.sample("y", dist.Delta(fn(numpyro.sample("x", GAUSSIAN)), event_dim=1), obs=y)


def masked_prior():
    with handlers.mask(mask=jnp.array(True)):
        return numpyro.sample("x", GAUSSIAN)


def scaled_prior():
    with handlers.scale(scale=2.0):
        return numpyro.sample("x", GAUSSIAN)


def prior_with_obs_mask():
    with numpyro.plate("n", 2):
        return numpyro.sample("x", GAUSSIAN, obs=jnp.zeros((2, 2)), obs_mask=MASK)


def subsampled():
    x = numpyro.sample("x", GAUSSIAN)
    with numpyro.plate("rows", 10, subsample_size=2):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def latent_context():
    label = numpyro.sample("label", dist.Normal(0.0, 1.0))
    prior = gaussian(network=lambda x_t, t, context: (0 * x_t + context, 0 * x_t), context=label[None])
    likelihood(numpyro.sample("x", prior))


def centred():
    x = numpyro.sample("x", GAUSSIAN)
    likelihood(numpyro.sample("mean", dist.Normal(x, 1.0).to_event(1)))


def masked_latent():
    x = numpyro.sample("x", GAUSSIAN)
    with handlers.mask(mask=jnp.array(False)):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    likelihood(x + b)


def scaled_latent():
    x = numpyro.sample("x", GAUSSIAN)
    with handlers.scale(scale=4.0):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    likelihood(x + b)


def exact_value_of_x():
    x = numpyro.sample("x", GAUSSIAN)
    numpyro.sample("y", dist.Delta(x[0]), obs=x[1] + 1.0)


def two_priors():
    numpyro.sample("w", GAUSSIAN)
    likelihood(numpyro.sample("x", GAUSSIAN))


def same_coordinate_in_two_sites():
    x = numpyro.sample("x", GAUSSIAN)
    numpyro.sample("a", dist.Delta(x[0]), obs=1.0)
    numpyro.sample("b", dist.Delta(x, event_dim=1), obs=Y)


def exact_of_a_latent():
    x = numpyro.sample("x", GAUSSIAN)
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Delta(x[k]), obs=1.0)


def latent_in_scan():
    x = numpyro.sample("x", GAUSSIAN)

    def step(carry, y):
        carry = numpyro.sample("h", dist.Normal(carry, 1.0))
        numpyro.sample("y", dist.Normal(carry + x[0], 1.0), obs=y)
        return carry, None

    scan(step, 0.0, ROWS[:, 0])


def random_likelihood():
    x = numpyro.sample("x", GAUSSIAN)
    likelihood(x + jax.random.normal(numpyro.prng_key(), (2,)))


def joint_transform():
    transform = dist.transforms.LowerCholeskyAffine(jnp.zeros(2), jnp.array([[1.0, 0.0], [0.5, 1.0]]))
    numpyro.sample("y", dist.Delta(numpyro.sample("x", gaussian(transform=transform))[0]), obs=1.0)


def outside_the_support():
    numpyro.sample("y", dist.Delta(numpyro.sample("x", gaussian(transform=ExpTransform()))[0]), obs=-1.0)


REFUSED = {
    "not callable": (Y, TypeError, "model"),
    "no prior": (with_prior(lambda: numpyro.sample("x", dist.Normal(Y, 1.0).to_event(1))), ValueError, "it has none"),
    "two priors": (two_priors, ValueError, "'w', 'x'"),
    "observed": (with_prior(lambda: numpyro.sample("x", GAUSSIAN, obs=Y)), ValueError, "'x'.*is observed"),
    "masked": (with_prior(masked_prior), ValueError, "'x'.*masked"),
    "masked itself": (with_prior(lambda: numpyro.sample("x", GAUSSIAN.mask(False))), ValueError, "'x'.*masked"),
    "scaled": (with_prior(scaled_prior), ValueError, "'x'.*scaled"),
    "obs_mask": (with_prior(prior_with_obs_mask), ValueError, "'x': obs_mask"),
    "subsampled": (subsampled, ValueError, "'rows' is subsampled"),
    "latent context": (latent_context, ValueError, "'x'.*'label'.*TrajectoryReparam"),
    "centred": (centred, ValueError, "'mean' depends on 'x'.*'y'.*non-centred"),
    "masked latent": (masked_latent, ValueError, "latent site 'b' is masked"),
    "scaled latent": (scaled_latent, ValueError, "latent site 'b' is scaled"),
    "an exact value of x": (exact_value_of_x, ValueError, "'y'.*must not depend on 'x'"),
    "no likelihood": (lambda: numpyro.sample("x", GAUSSIAN), ValueError, "observed site.*'x'"),
    "nothing observed": (lambda: likelihood(numpyro.sample("x", GAUSSIAN), None), ValueError, "observed site.*'x'"),
    "observed, but not x": (lambda: (numpyro.sample("x", GAUSSIAN), likelihood(Y)), ValueError, "observed site.*'x'"),
    "no selection": (exact(lambda x: 2 * x), ValueError, "'y'.*selection"),
    "half a selection": (exact(lambda x: jnp.stack([x[0], 0.0])), ValueError, "'y'.*selection"),
    "a power": (exact(lambda x: x**2), ValueError, "'y'.*selection"),
    "twice a number": (
        lambda: numpyro.sample("y", dist.Delta(2 * numpyro.sample("x", SCALAR)), obs=1.0),
        ValueError,
        "'y'.*selection",
    ),
    "outside the support": (outside_the_support, ValueError, "'y'.*support of 'x'; -1.0"),
    "not finite": (exact(lambda x: x, NAN_Y), ValueError, "'y'.*support of 'x'; nan"),
    "twice": (exact(lambda x: x[jnp.array([1, 1])]), ValueError, "'y'.*'x' twice"),
    "twice, in two sites": (same_coordinate_in_two_sites, ValueError, "'a', 'b'.*'x' twice"),
    "a latent with a log density": (
        lambda: (numpyro.sample("d", dist.Delta(1.0, log_density=2.0)), likelihood(numpyro.sample("x", GAUSSIAN))),
        ValueError,
        "'d'.*log_density",
    ),
    "exact, of a latent": (exact_of_a_latent, ValueError, "'y'.*'k'"),
    "with a log density": (
        lambda: numpyro.sample("y", dist.Delta((x := numpyro.sample("x", GAUSSIAN))[0], log_density=x[1]), obs=1.0),
        ValueError,
        "'y'.*log_density",
    ),
    "joint transform": (joint_transform, ValueError, "'y'.*each coordinate alone"),
    "latent in a scan": (latent_in_scan, ValueError, "'y' is random.*scan"),
    "random": (random_likelihood, ValueError, "'y' is random.*prng_key"),
    "seeded": (
        handlers.seed(partial(half_normal, GAUSSIAN), 0),
        ValueError,
        "'sigma' is drawn the same.*handlers.seed",
    ),
    "untrained": (lambda: flax_net(Y), ValueError, "'y' is random.*not trained"),
}


@pytest.mark.filterwarnings("ignore:Out-of-support")  # NumPyro's, of what is refused
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        read_model(model, (), {})
