"""SMC where users have set JAX and Python otherwise, and with names of their own that NumPyro uses too."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import pp_diffusion as ppd

KEY, Y = jax.random.key(0), jnp.array([1.5, -0.5])


def zeros(x_t, t):
    return 0 * x_t, 0 * x_t


PRIOR = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.constant_erasure(5), zeros).prior({})
TRUTH = norm(0, np.sqrt(2)).logpdf(Y).sum()


def model(y):
    x = numpyro.sample("x", PRIOR)
    b = numpyro.sample("b", dist.Normal(0.0, 0.1))
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(x + 0 * (b + k), 1.0).to_event(1), obs=y)


def run(model, /, *args, key=KEY, **kwargs):
    smc = ppd.SMC(model, num_particles=64, num_chains=4, ess_threshold=1.0, progress_bar=False)
    smc.run(key, *args, **kwargs)
    return smc


@pytest.fixture
def rbg():
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    yield jax.random.key(0)
    jax.config.update("jax_default_prng_impl", before)


@pytest.mark.slow
def test_another_generator_of_random_numbers(rbg):
    smc = run(model, Y, key=rbg)
    assert abs(smc.log_evidence - TRUTH) < 1e-3
    assert smc.get_samples()["k"].shape == (256,)
    smc.print_summary()


@pytest.mark.slow
def test_keys_of_the_old_kind():
    assert abs(run(model, Y, key=jax.random.PRNGKey(3)).log_evidence - TRUTH) < 1e-3


@pytest.mark.slow
def test_nans_are_no_markers():
    """A whole run, its draws and its report while JAX raises at the first NaN."""
    with jax.debug_nans(True):
        smc = run(model, Y)
        smc.get_samples()
        smc.print_summary()
        smc.to_arviz()
    assert abs(smc.log_evidence - TRUTH) < 1e-3


@pytest.mark.slow
def test_keywords_that_numpyro_has_too():
    def own(y, parallel, model, batch_ndims=0):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(x, parallel + model + batch_ndims).to_event(1), obs=y)

    smc = run(own, Y, parallel=0.5, model=0.5)
    assert abs(smc.log_evidence - TRUTH) < 1e-3
    assert smc.to_arviz()["log_likelihood"]["y"].shape == (4, 64)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_tracing_is_refused_by_name(transform):
    with pytest.raises(TypeError, match=r"SMC.run.*numpyro.plate"):
        transform(lambda y: run(model, y).log_evidence)(jnp.stack([Y, Y]))


def test_a_jitted_model_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="jit"):
        run(jax.jit(model), Y)


TWICE = """
import jax, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
prior = ppd.Diffusion(
    ppd.GaussianKernel((2,)), ppd.FixedSchedule.constant_erasure(5), lambda x_t, t: (0 * x_t, 0 * x_t)
).prior({})
def model():
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=0.0)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=1.0)
try:
    ppd.SMC(model, num_particles=8, progress_bar=False).run(jax.random.key(0))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_two_sites_of_one_name(flags):
    """By SMC itself: with python -O there are no assertions."""
    done = subprocess.run([sys.executable, *flags, "-c", TWICE], capture_output=True, text=True, check=True)
    assert "'y'" in done.stdout and "two" in done.stdout


def half_line(y):
    numpyro.factor("c", jnp.where(numpyro.sample("x", PRIOR)[0] > y, 0.0, -jnp.inf))


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [20_000, 100_000])
def test_no_draw_of_zero_likelihood(num_particles):
    smc = ppd.SMC(half_line, num_particles=num_particles, num_chains=8, progress_bar=False)
    smc.run(KEY, jnp.array(0.0))
    assert (smc.get_samples()["x"][:, 0] > 0).all()
    assert (smc.get_samples(group_by_chain=True)["x"][..., 0] > 0).all()
    assert abs(smc.log_evidence - np.log(0.5)) < 0.02
