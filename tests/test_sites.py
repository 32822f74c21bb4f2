"""Kinds of observed sites: a new one is one class; what is observed has to have a shape, and to be there."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from scipy.stats import multivariate_normal

import pp_diffusion as ppd
from pp_diffusion.posterior import latents as latent_sites
from pp_diffusion.posterior import sites
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.posterior.messages import base_of, log_prob_of, value_of, weights_of

PRIOR = ppd.Diffusion(  # exactly N(0, 1)
    ppd.GaussianKernel((2,)), ppd.FixedSchedule.constant_erasure(6), lambda x_t, t: (0 * x_t, 0 * x_t)
).prior({})
Y = jnp.array([1.5, 0.2])


class LogNormal(sites.Kind):
    """Normal on the log scale."""

    is_normal_form = True

    @classmethod
    def matches(cls, message):
        return isinstance(base_of(message), dist.LogNormal)

    def read(self, message):
        base, value = base_of(message), value_of(message)
        normal = sites.as_normal(message, jnp.log(value), base.loc, base.scale**2)
        jacobian = jnp.where(weights_of(message) > 0, -weights_of(message) * jnp.log(value), 0.0)
        normal = normal._replace(correction=normal.correction + jacobian)
        return sites.SitePart(log_prob_of(message), normal=normal)

    def rule(self, words):
        return "normal on the log scale"


def log_normal(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.LogNormal(x, 0.5).to_event(1), obs=y)


@pytest.mark.slow
def test_a_new_kind_is_one_class(monkeypatch):
    """Where the twist is exact by it, no particle is lost, and the evidence has no error."""
    monkeypatch.setattr(sites, "KINDS", [LogNormal, *sites.KINDS])
    smc = ppd.SMC(log_normal, num_particles=200, num_chains=8, progress_bar=False)
    smc.run(jax.random.key(0), Y)
    log_y = np.log(np.asarray(Y, np.float64))
    truth = multivariate_normal(np.zeros(2), 1.25 * np.eye(2)).logpdf(log_y) - log_y.sum()
    assert smc.log_evidence == pytest.approx(truth, abs=1e-3)
    assert smc.ess.min() > 199
    assert smc.twist_rules == {"y": "normal on the log scale"}
    np.testing.assert_allclose(smc.get_samples()["x"].mean(0), log_y / 1.25, atol=0.06)


# --- what is observed ------------------------------------------------------------------------------------------------


def crossed(y):
    """One number for each of three, as a column: nine differences."""
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", PRIOR).sum(-1)
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def crossed_without_a_plate(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


@pytest.mark.parametrize(
    "model, shape, match",
    [
        (crossed, (3, 1), r"'y'.*shape \(3, 1\).*shape \(3,\).*9 numbers.*plate"),
        (crossed, (4, 3), r"'y'.*12 numbers"),
        (crossed_without_a_plate, (2, 1), r"'y'.*4 numbers"),
    ],
)
def test_shapes_that_make_more_numbers_than_there_are(model, shape, match):
    with pytest.raises(ValueError, match=match):
        read_model(model, (jnp.zeros(shape),), {})


@pytest.mark.parametrize("shape, count", [((2,), 2), ((1,), 2), ((), 2), ((5, 2), 10)])
def test_shapes_that_fit(shape, count):
    """Rows of independent data need no plate."""
    assert read_model(crossed_without_a_plate, (jnp.zeros(shape),), {}).num_rows == count


@pytest.mark.filterwarnings("ignore:Out-of-support")
@pytest.mark.parametrize("family", [dist.Normal, dist.LogNormal, dist.Cauchy])
def test_a_missing_value_is_named(family):
    def model(y, known):
        x = numpyro.sample("x", PRIOR)
        with handlers.mask(mask=known):
            numpyro.sample("y", family(x, 0.5), obs=y)

    y = jnp.array([1.0, jnp.nan])
    with pytest.raises(ValueError, match="'y': an observed value is NaN"):
        read_model(model, (y, jnp.array([True, True])), {})
    read_model(model, (y, jnp.array([True, False])), {})


def test_a_latent_that_cannot_be_drawn_is_named():
    def model(y):
        x = numpyro.sample("x", PRIOR)
        b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x + b, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'b' is ImproperUniform, which cannot be drawn from"):
        read_model(model, (Y,), {})


def test_a_latent_of_a_dropped_latent_is_dropped():
    """b depends on x, and c on b: no density of c can be had without b's."""

    def model(y):
        x = numpyro.sample("x", PRIOR)
        b = numpyro.sample("b", dist.Normal(x, 1.0).to_event(1))
        c = numpyro.sample("c", dist.Normal(b, 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(x + (0 if y is None else c), 0.5).to_event(1), obs=Y)

    with pytest.raises(ValueError, match=r"'c' depends on 'x'.*'y'.*non-centred"):
        read_model(model, (Y,), {})
    assert read_model(model, (None,), {}).dropped == ("b", "c")


# --- settings of JAX -------------------------------------------------------------------------------------------------


def with_latents(y):
    x, scale = numpyro.sample("x", PRIOR), numpyro.sample("scale", dist.HalfNormal(1.0))
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(x + k, scale).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [lambda: jax.default_prng_impl("rbg"), lambda: jax.debug_nans(True)])
def test_runs_under(setting):
    """Random bits of another make; and no NaN is computed."""
    with setting():
        factors = read_model(with_latents, (Y,), {})
        latents = latent_sites.draw(factors, jax.random.key(1), (3, 2))
        z = jnp.ones((3, 2, 1, 2))
        assert np.isfinite(factors.read(z, latents).log_r).all()
        moved, ratio = latent_sites.redraw_discrete(factors, jax.random.key(2), latents)
        np.testing.assert_array_equal(moved["scale"], latents["scale"])
        np.testing.assert_allclose(ratio, 0.0, atol=1e-6)
        assert set(latent_sites.constrain(factors, z, moved)) == {"x", "scale", "k"}
