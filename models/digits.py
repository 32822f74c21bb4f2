"""Handwritten digits of 8 × 8 pixels: T = 500 Gaussian steps over all pixels, a network that all pixels share.

The program is written out below; ``diffusion`` is the same model as one object, for training and for use as a prior.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd

SHAPE, T = (8, 8), 500
kernel = ppd.GaussianKernel(event_shape=SHAPE)
schedule = ppd.FixedSchedule.log_linear(T, first_beta=3e-2, final_log_snr=-6.0)
# f_mu and f_Sigma by v-prediction: the outputs are v and the log of a variance ratio
network = ppd.networks.Entrywise(num_timesteps=T, outputs=("real", "real"))
# pixels in 0…17: level 0, the levels between, and level 16, each a bump
transform = ppd.UniformBlocks(widths=(1, 15, 1), centres=(-1.25, 0, 1.25), scales=(0.25, 0.3, 0.25))


def reverse_process():
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t))."""
    x, t = jnp.zeros((1, *SHAPE)), jnp.ones(1, int)
    weights = numpyro.param("diffusion.network$params", lambda key: network.init(key, x, t, jnp.zeros(1))["params"])

    def reverse(x_t, step):
        t, log_snr = (jnp.broadcast_to(a, x_t.shape[:-2]) for a in (step.t, step.log_snr))
        v, log_excess = network.apply({"params": weights}, x_t, t, log_snr=jnp.clip(log_snr, -20, 20))
        return kernel.parameterizations["v"].reverse(kernel, x_t, step, v, log_excess)

    return reverse


def model(x=None):
    """The reverse trajectory from N(0, 1); the network describes the last step too."""
    steps, reverse = schedule.rates(), reverse_process()
    with numpyro.plate("data", 100 if x is None else len(x)):
        path = numpyro.sample("path", ppd.ReverseTrajectory(kernel, steps, reverse))
        last = reverse(path[..., 0, :, :], steps.at(0))
        return numpyro.sample("x", dist.TransformedDistribution(last, transform), obs=x)


def guide(x):
    """The forward trajectory: noise is added until nothing of the image is left."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("path", ppd.ForwardTrajectory(kernel, schedule.rates(), transform.inv(x)))


def diffusion():
    """The same model as an object."""
    return ppd.Diffusion(kernel, schedule, network, last_step="network", transform=transform)


def batch(rng_key, levels, size=256, shifted=0.3):
    """Rows drawn at random, a share of them shifted by up to a pixel, with fresh noise on their levels, for ``fit``."""
    row_key, which_key, shift_key, noise_key = jax.random.split(rng_key, 4)
    x = jnp.pad(levels, ((0, 0), (1, 1), (1, 1)))[jax.random.randint(row_key, (size,), 0, len(levels))]
    moved = jax.random.bernoulli(which_key, shifted, (size, 1))
    corner = jnp.where(moved, jax.random.randint(shift_key, (size, 2), 0, 3), 1)
    x = jax.vmap(partial(jax.lax.dynamic_slice, slice_sizes=SHAPE))(x, corner)
    return ppd.datasets.dequantize(noise_key, x)


if __name__ == "__main__":
    data = ppd.datasets.digits(jax.random.key(0))
    test = ppd.datasets.dequantize(jax.random.key(1), data.test)
    fit = ppd.fit(jax.random.key(3), diffusion(), partial(batch, levels=data.train), num_steps=1_000)
    bound = ppd.lower_bound(jax.random.key(4), fit.prior, test)
    few = test[:36]  # whole trajectories, all in memory
    loss = Trace_ELBO().loss(jax.random.key(5), fit.params, model, guide, few)
    bound.print_summary()
    print(f"code length <= {ppd.units.bits_per_dim(bound.value.mean(), num_dims=64):.3f} bits/dim")
    print(f"K by the program above: {-loss / len(few):.2f} nats for {len(few)} of the images")
