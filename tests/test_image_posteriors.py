"""Posteriors of images: against a closed form, on images of another size, and the tasks in a small form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import pp_diffusion as ppd
from examples import image_posteriors

RNG = np.random.default_rng(0)


def exact_prior(shape, num_timesteps=10):
    """The exact reverse process of independent standard normal pixels, in levels of mean 128 and sd 64."""

    def network(x_t, t):
        beta = (1 / (num_timesteps + 1 - t)).reshape(-1, *(1,) * len(shape))
        return jnp.sqrt(1 - beta) * x_t, jnp.broadcast_to(beta, x_t.shape)

    return ppd.Diffusion(
        ppd.GaussianKernel(shape),
        ppd.FixedSchedule.constant_erasure(num_timesteps),
        network,
        parameterization="direct",
        last_step="network",
        transform=dist.transforms.AffineTransform(128.0, 64.0),
    ).prior({})


@pytest.mark.slow
def test_noise_is_taken_from_independent_pixels_as_it_should_be():
    """Half of what is seen, with half of the variance; and what is not seen keeps the prior's."""
    shape, seen = (3, 2), np.array([[True, True], [True, False], [True, True]])
    x = 128 + 64 * RNG.normal(size=(4, *shape))
    y, draws, note = image_posteriors.infer(
        jax.random.key(0), exact_prior(shape), x, 64.0, seen, num_particles=500, num_chains=2, progress=False
    )
    assert np.isnan(y[:, ~seen]).all() and "4 believable" in note
    mean, sd = draws.mean(0), draws.std(0)
    np.testing.assert_allclose(mean[:, seen], (y[:, seen] + 128) / 2, atol=5 * 64 / np.sqrt(2 * 1000))
    np.testing.assert_allclose(sd[:, seen], 64 / np.sqrt(2), rtol=0.15)
    np.testing.assert_allclose(sd[:, ~seen], 64, rtol=0.15)


def untrained(shape):
    """A convolutional prior that is not trained."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel(shape),
        ppd.FixedSchedule.log_linear(10, first_beta=1e-2),
        ppd.networks.MultiScaleConv(features=(3,), num_scales=2, pixel_units=(3,)),
        last_step="network",
        transform=dist.transforms.AffineTransform(100.0, 50.0),
    )
    return diffusion.prior(jax.jit(diffusion.init_params)(jax.random.key(0)))


def test_a_prior_of_patches_serves_larger_images():
    larger = image_posteriors.resized(untrained((8, 8)), (12, 20))
    assert larger.event_shape == (12, 20)
    assert larger.sample(jax.random.key(0), (2,)).shape == (2, 12, 20)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["denoise", "hole"])  # that of digits differs in what is seen
def test_tasks_run(task):
    shape = {"denoise": (8, 8, 3), "hole": (8, 8)}[task]
    data = RNG.integers(0, 256, (2, *((40, 50) if task == "hole" else shape)), dtype=np.uint8)
    found = image_posteriors.TASKS[task].run(
        jax.random.key(0), untrained(shape), data, **image_posteriors.SMALL[task], progress=False
    )
    assert np.isfinite(found.draws).all() and "RMSE" in found.text and "verdicts" in found.note
    size = image_posteriors.SMALL[task].get("size")
    num = image_posteriors.SMALL[task]["num_images"]
    assert found.draws.shape[1:] == ((num, size, size) if size else (num, *shape))
