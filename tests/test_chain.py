"""The reverse walk, step by step by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.chain import walk, walk_to_x_1

KERNEL = ppd.GaussianKernel((2,))


def network(x_t, t):
    return 0.2 * x_t + 0.05 * t[..., None], 0.1 * x_t - 0.1


def process(num_timesteps, last_step):
    return ppd.Diffusion(
        KERNEL, ppd.FixedSchedule(np.linspace(0.1, 0.5, num_timesteps)), network, last_step=last_step
    ).reverse_process({})


@pytest.mark.parametrize("last_step", ["kernel", "network"])
@pytest.mark.parametrize("num_timesteps", [1, 4])
def test_entry_t_minus_1_draws_x_t_minus_1(num_timesteps, last_step):
    reverse = process(num_timesteps, last_step)
    x, noise = (
        jnp.array([[1.0, -2.0], [0.3, 0.1], [0.0, 2.0]]),
        jax.random.normal(jax.random.key(0), (num_timesteps, 3, 2)),
    )
    found = walk(reverse, KERNEL.from_noise, x, noise)
    _, path = walk_to_x_1(reverse, reverse.rates, KERNEL.from_noise, x, noise[1:], keep_path=True)
    for t in range(num_timesteps, 1, -1):
        x = KERNEL.from_noise(reverse(x, reverse.rates.at(t - 1)), noise[t - 1])
        np.testing.assert_allclose(path[t - 2], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, KERNEL.from_noise(reverse.last(x), noise[0]), rtol=1e-5, atol=1e-6)


def test_gradients_go_through():
    reverse, x = process(4, "network"), jnp.ones((3, 2))
    noise = jax.random.normal(jax.random.key(0), (4, 3, 2))
    gradient = jax.grad(lambda x: walk(reverse, KERNEL.from_noise, x, noise).sum())(x)
    assert np.isfinite(gradient).all() and (np.abs(gradient) > 0).all()
