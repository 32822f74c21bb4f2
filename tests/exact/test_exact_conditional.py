"""A conditional Gaussian of known mean and variance: K, coverage, the null value and guidance beside exact answers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import pp_diffusion as ppd

KEY = jax.random.key(0)
SLOPE = np.array([[40.0, 1.0], [-20.0, 2.0]])  # of unlike scales, in data units


def law(context):
    """Mean linear in two covariates; the spread grows with the first one."""
    sd = jnp.array([10.0, 0.5]) * jnp.exp(0.5 * context[..., :1])
    return dist.Normal(context @ SLOPE, sd).to_event(1)


def pairs(rng_key, num):
    first, second = jax.random.split(rng_key)
    context = jax.random.normal(first, (num, 2))
    return context, law(context).sample(second)


pytestmark = [pytest.mark.slow, pytest.mark.optimized]


@pytest.fixture(scope="module")
def fit():
    context, x = pairs(KEY, 50_000)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.LearnedSchedule(100, 1e-4),
        ppd.networks.MLP((128, 128)),
        last_step="network",
        transform=ppd.standardize(x),
    )
    return ppd.fit(
        jax.random.key(1), diffusion, x, context=context, context_drop=0.1, num_steps=20_000, progress_bar=False
    )


def test_k_is_within_a_hundredth_of_the_truth(fit):
    """By paired differences over new rows, whose error is a tenth of that."""
    context, x = pairs(jax.random.key(2), 4000)
    gap = law(context).log_prob(x) - ppd.lower_bound(jax.random.key(3), fit.prior(context), x).value
    error = float(gap.std() / np.sqrt(len(gap)))
    print(f"truth less K: {gap.mean():.4f} ± {error:.4f} nats")
    assert error < 0.005 and -3 * error < gap.mean() < 0.01


def test_intervals_hold_nine_in_ten(fit):
    """By ranks among 99 draws, of which 5…94 are nine in ten: 8000 intervals, an error of .34 %."""
    context, x = pairs(jax.random.key(4), 4000)
    draws = fit.prior(context).sample(jax.random.key(5), (99,))
    rank = (draws < x).sum(0)
    covered = ((rank >= 5) & (rank < 95)).mean()
    print(f"coverage {100 * covered:.2f} %")
    assert abs(covered - 0.9) < 0.01


def test_the_null_value_gives_the_unconditional_law(fit):
    """Moments of the mixture over all covariates."""
    draws, (_, x) = fit.prior(None).sample(jax.random.key(6), (20_000,)), pairs(jax.random.key(7), 200_000)
    np.testing.assert_allclose(draws.mean(0) / x.std(0), x.mean(0) / x.std(0), atol=0.03)
    np.testing.assert_allclose(draws.std(0) / x.std(0), 1, atol=0.03)


def test_guidance_goes_where_its_docstring_says(fit):
    """Beyond the conditional mean, and narrower: at w = 2 in every coordinate."""
    context = jnp.array([1.0, 1.0])
    given, guided = (p.sample(jax.random.key(8), (4000,)) for p in (fit.prior(context), fit.prior(context).guided(2.0)))
    assert (jnp.abs(guided.mean(0)) > jnp.abs(given.mean(0)))[1]
    assert (guided.std(0) < given.std(0)).all()
