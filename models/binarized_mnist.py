"""Static binarized MNIST, 28 × 28 bits: T = 1000 binomial steps and a U-Net.

The program is written out below; ``diffusion`` is the same model as one object, for training and for use as a prior.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd

SHAPE, T = (28, 28), 1000
# an eighth of the pixels are on, and so they are where nothing of the image is left
kernel = ppd.BinomialKernel(event_shape=SHAPE, probs=0.13)
schedule = ppd.FixedSchedule.constant_erasure(T)  # beta_t = 1 / (T - t + 1)
# f_b through x_0: the output is the logit of P(x_0 = 1 | x_t)
sizes = partial(ppd.networks.UNet, frequencies=(), num_timesteps=T, outputs=("real",))
for_cpu = sizes(channels=(32, 64, 64), num_blocks=1)
for_gpu = sizes(channels=(96, 192, 192), num_blocks=1, dtype="bfloat16", precision=None)
network = for_cpu


def reverse_process():
    """p(x_{t-1} | x_t) = B(f_b(x_t, t))."""
    x, t = jnp.zeros((1, *SHAPE)), jnp.ones(1, int)
    weights = numpyro.param("diffusion.network$params", lambda key: network.init(key, x, t, jnp.zeros(1))["params"])

    def reverse(x_t, step):
        batch_shape = x_t.shape[:-2]
        t, log_snr = (jnp.broadcast_to(a, batch_shape).ravel() for a in (step.t, step.log_snr))
        (logits,) = network.apply({"params": weights}, x_t.reshape(-1, *SHAPE), t, log_snr=jnp.clip(log_snr, -20, 20))
        return kernel.parameterizations["x0"].reverse(kernel, x_t, step, logits.reshape(x_t.shape))

    return reverse


def model(x=None):
    """The reverse trajectory from B(0.13); the network describes the last step too."""
    steps, reverse = schedule.rates(), reverse_process()
    with numpyro.plate("data", 16 if x is None else len(x)):
        path = numpyro.sample("path", ppd.ReverseTrajectory(kernel, steps, reverse))
        return numpyro.sample("x", reverse(path[..., 0, :, :], steps.at(0)), obs=x)


def guide(x):
    """The forward trajectory: bits are drawn anew until none of the image's is left."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("path", ppd.ForwardTrajectory(kernel, schedule.rates(), x))


def diffusion(network=network):
    """The same model as an object."""
    return ppd.Diffusion(kernel, schedule, network, last_step="network")


def batch(rng_key, images, size=64):
    """Images drawn at random, for ``fit``."""
    return ppd.datasets.draw_rows(rng_key, images, size)


if __name__ == "__main__":
    data = ppd.datasets.binarized_mnist(".")
    batches = jax.tree_util.Partial(batch, images=jnp.asarray(data.train))
    fit = ppd.fit(jax.random.key(0), diffusion(), batches, num_steps=20_000)
    test = data.test[:100]
    loss = Trace_ELBO().loss(jax.random.key(2), fit.params, diffusion().bound_model, diffusion().bound_guide, test)
    print(f"K >= {-loss / len(test):.1f} nats; by the program above for one image:")
    print(f"{-Trace_ELBO().loss(jax.random.key(3), fit.params, model, guide, test[:1]):.1f} nats")
