"""Handwritten digits of 8 × 8 pixels: T = 200 Gaussian steps over all pixels, a dense network as the paper's for MNIST.

The program is written out below; ``diffusion`` is the same model as one object, for training and for use as a prior.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd

SHAPE, T = (8, 8), 200
kernel = ppd.GaussianKernel(event_shape=SHAPE)
schedule = ppd.FixedSchedule.log_linear(T, first_beta=1e-2, final_log_snr=-6.0)
# f_mu and f_Sigma by v-prediction: the outputs are v and the log of a variance ratio
network = ppd.networks.MLP((256, 256), num_timesteps=T, outputs=("real", "real"))


def reverse_process():
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t))."""
    x, t = jnp.zeros((1, *SHAPE)), jnp.ones(1, int)
    weights = numpyro.param("diffusion.network$params", lambda key: network.init(key, x, t, jnp.zeros(1))["params"])

    def reverse(x_t, step):
        t, log_snr = (jnp.broadcast_to(a, x_t.shape[:-2]) for a in (step.t, step.log_snr))
        v, log_excess = network.apply({"params": weights}, x_t, t, log_snr=jnp.clip(log_snr, -20, 20))
        return kernel.parameterizations["v"].reverse(kernel, x_t, step, v, log_excess)

    return reverse


def model(x=None, *, loc=0.0, scale=1.0):
    """The reverse trajectory from N(0, 1); the network describes the last step too."""
    steps, reverse = schedule.rates(), reverse_process()
    with numpyro.plate("data", 100 if x is None else len(x)):
        path = numpyro.sample("path", ppd.ReverseTrajectory(kernel, steps, reverse))
        last = reverse(path[..., 0, :, :], steps.at(0))
        in_data_units = dist.transforms.AffineTransform(jnp.broadcast_to(loc, SHAPE), jnp.broadcast_to(scale, SHAPE))
        return numpyro.sample("x", dist.TransformedDistribution(last, in_data_units), obs=x)


def guide(x, *, loc=0.0, scale=1.0):
    """The forward trajectory: noise is added until nothing of the image is left."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("path", ppd.ForwardTrajectory(kernel, schedule.rates(), (x - loc) / scale))


def diffusion(transform=None):
    """The same model as an object."""
    return ppd.Diffusion(kernel, schedule, network, last_step="network", transform=transform)


def batch(rng_key, levels, size=256):
    """Rows drawn at random, with fresh uniform noise on their integer levels: endless data for ``fit``."""
    row_key, noise_key = jax.random.split(rng_key)
    return ppd.datasets.dequantize(noise_key, levels[jax.random.randint(row_key, (size,), 0, len(levels))])


if __name__ == "__main__":
    data = ppd.datasets.digits(jax.random.key(0))
    test = ppd.datasets.dequantize(jax.random.key(1), data.test)
    units = ppd.standardize(ppd.datasets.dequantize(jax.random.key(2), data.train))
    fit = ppd.fit(jax.random.key(3), diffusion(units), partial(batch, levels=data.train), num_steps=2_000)
    bound = ppd.lower_bound(jax.random.key(4), fit.prior, test)
    loss = Trace_ELBO().loss(jax.random.key(5), fit.params, model, guide, test, loc=units.loc, scale=units.scale)
    bound.print_summary()
    print(f"code length <= {ppd.units.bits_per_dim(bound.value.mean(), num_dims=64):.3f} bits/dim")
    print(f"K by the program above: {-loss / len(test):.2f} nats")
