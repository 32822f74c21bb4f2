"""MNIST, digits of 28 × 28 pixels in 256 levels: T = 1000 Gaussian steps and a U-Net.

The program is written out below; ``diffusion`` is the same model as one object, for training and for use as a prior.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd

SHAPE, T = (28, 28), 1000
kernel = ppd.GaussianKernel(event_shape=SHAPE)
# from a noise of 0.3 levels to nothing but noise
schedule = ppd.FixedSchedule.log_linear(T, first_beta=2e-5, final_log_snr=-8.0)
# f_mu and f_Sigma by v-prediction: the outputs are v and the log of a variance ratio; sines of 16 to 1 levels' period
sizes = partial(ppd.networks.UNet, frequencies=(3, 4, 5, 6, 7), num_timesteps=T, outputs=("real", "real"))
for_cpu = sizes(channels=(24, 48, 48), num_blocks=1)
for_gpu = sizes(channels=(64, 128, 128), num_blocks=1, dtype="bfloat16", precision=None)
network = for_cpu
# dequantised levels, 0…256
transform = dist.transforms.AffineTransform(128.0, 64.0)


def reverse_process():
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t))."""
    x, t = jnp.zeros((1, *SHAPE)), jnp.ones(1, int)
    weights = numpyro.param("diffusion.network$params", lambda key: network.init(key, x, t, jnp.zeros(1))["params"])

    def reverse(x_t, step):
        batch_shape = x_t.shape[:-2]
        t, log_snr = (jnp.broadcast_to(a, batch_shape).ravel() for a in (step.t, step.log_snr))
        outputs = network.apply({"params": weights}, x_t.reshape(-1, *SHAPE), t, log_snr=jnp.clip(log_snr, -20, 20))
        v, log_excess = (out.reshape(x_t.shape) for out in outputs)
        return kernel.parameterizations["v"].reverse(kernel, x_t, step, v, log_excess)

    return reverse


def model(x=None):
    """The reverse trajectory from N(0, 1); the network describes the last step too."""
    steps, reverse = schedule.rates(), reverse_process()
    with numpyro.plate("data", 16 if x is None else len(x)):
        path = numpyro.sample("path", ppd.ReverseTrajectory(kernel, steps, reverse))
        last = reverse(path[..., 0, :, :], steps.at(0))
        return numpyro.sample("x", dist.TransformedDistribution(last, transform), obs=x)


def guide(x):
    """The forward trajectory: noise is added until nothing of the image is left."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("path", ppd.ForwardTrajectory(kernel, schedule.rates(), transform.inv(x)))


def diffusion(network=network):
    """The same model as an object."""
    return ppd.Diffusion(kernel, schedule, network, last_step="network", transform=transform)


def batch(rng_key, levels, size=64):
    """Digits drawn at random, with fresh noise on their levels, for ``fit``."""
    row_key, noise_key = jax.random.split(rng_key)
    return ppd.datasets.dequantize(noise_key, ppd.datasets.draw_rows(row_key, levels, size))


if __name__ == "__main__":
    data = ppd.datasets.mnist(".")
    batches = jax.tree_util.Partial(batch, levels=jnp.asarray(data.train))
    fit = ppd.fit(jax.random.key(0), diffusion(), batches, num_steps=10_000)
    test = ppd.datasets.dequantize(jax.random.key(1), data.test[:100])
    loss = Trace_ELBO().loss(jax.random.key(2), fit.params, diffusion().bound_model, diffusion().bound_guide, test)
    print(f"K >= {-loss / len(test):.1f} nats; by the program above for one image:")
    print(f"{-Trace_ELBO().loss(jax.random.key(3), fit.params, model, guide, test[:1]):.1f} nats")
