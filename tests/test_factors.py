"""What is read off a user's model: its densities, whole and in parts, against NumPyro's own; what is refused, and how.

Each case is a function of the prior and of data. With an improper flat prior in the diffusion's place, NumPyro's
potential energy is −log r − log p(other latents), in unconstrained space.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions.transforms import AffineTransform, ExpTransform
from numpyro.infer.util import log_density, potential_energy
from scipy.stats import multivariate_normal, norm, poisson

import pp_diffusion as ppd
from pp_diffusion.factors import read_model

KEY = jax.random.key(0)
A = jnp.array([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]])
COVARIANCE = jnp.array([[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]])
Y = jnp.array([0.5, -1.0])
NAN_Y = jnp.array([0.5, jnp.nan])
MASK = jnp.array([True, False])
ROWS = jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.1]])


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
    shape = (num_particles, num_chains * factors.num_systems, *factors.state_shape)
    return 0.7 * jax.random.normal(KEY, shape), factors.draw_latents(jax.random.key(1), (num_particles, num_chains))


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


def multivariate(prior, y=jnp.array([0.5, -1.0, 0.1])):
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


def counts(prior, y=jnp.array([3, 0])):
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
    numpyro.sample("constant", dist.Normal(0.0, 1.0), obs=1.0)  # depends on nothing: a constant, and no part of r
    numpyro.deterministic("g", x + 1)


def scaled(prior, y=Y):
    x = numpyro.sample("x", prior)
    with handlers.scale(scale=2.5):
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        numpyro.sample("z", dist.Poisson(jnp.exp(x)).to_event(1), obs=jnp.array([3, 0]))


def masked(prior, y=Y):
    x = numpyro.sample("x", prior)
    with handlers.mask(mask=MASK):
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
    with handlers.mask(mask=False):
        numpyro.sample("z", dist.Normal(x, 0.5), obs=y)
    with handlers.mask(mask=True), handlers.scale(scale=0.5):
        numpyro.sample("w", dist.Cauchy(x, 0.5).to_event(1), obs=y)


def masked_nan(prior, y=NAN_Y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 0.5).mask(~jnp.isnan(y)).to_event(1), obs=y)


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


def nested_plates(prior, y=jnp.linspace(-1, 1, 12).reshape(2, 3, 2)):
    with numpyro.plate("m", 2, dim=-2), numpyro.plate("n", 3, dim=-1):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def sites_in_outer_plate(prior, y=jnp.linspace(-1, 1, 4).reshape(2, 2)):
    with numpyro.plate("m", 2, dim=-2):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 3, dim=-1):
            x = numpyro.sample("x", prior)
            numpyro.sample(
                "y", dist.Normal(x.mean(1, keepdims=True) + offset[..., None], 0.5).to_event(1), obs=y[:, None]
            )


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
    "masked NaN": (masked_nan, GAUSSIAN, (2,), ()),
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
        unconstrained = factors._join(jax.tree.map(lambda u: u[particle], self.latents))
        return {"x": factors.to_site(factors.in_data_units(self.z[particle])), **unconstrained}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def test_density_is_numpyros(case):
    """log r and the latents' log prior; a site that depends on nothing is no part of r, nor of the posterior."""
    assert case.factors.systems == case.systems
    assert case.found.log_r.shape == (3, case.factors.num_systems)
    assert case.found.log_r.std() > 0.01
    model = handlers.block(case.model, hide=["constant"])
    for particle in range(3):
        expected = -potential_energy(model, (case.flat,), {}, case.params(particle))
        found = case.found.log_r[particle].sum() + case.found.log_prior[particle].sum()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_normal_parts_make_up_the_density(case):
    found = case.found
    total = normal_log_prob(found) + found.correction + found.discrepancy.sum(-1) + found.log_other
    np.testing.assert_allclose(total, found.log_r, rtol=2e-5, atol=2e-5)
    kinds = {site.kind for site in case.factors.observed}
    if kinds <= {"normal", "multivariate normal"}:
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
