"""Dead leaves (the paper, section 3.2.2): T = 1000 Gaussian steps and the paper's multi-scale convolutions.

The program is written out below; ``diffusion`` is the same model as one object, for training and for use as a prior.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd

SHAPE, T = (32, 32), 1000
kernel = ppd.GaussianKernel(event_shape=SHAPE)
schedule = ppd.FixedSchedule.log_linear(T, first_beta=1e-4, final_log_snr=-8.0)
# f_mu and f_Sigma by v-prediction: the outputs are v and the log of a variance ratio
sizes = partial(ppd.networks.MultiScaleConv, num_scales=4, num_timesteps=T, outputs=("real", "real"))
for_cpu = sizes(features=(32,) * 4, pixel_units=(64, 64))
for_gpu = sizes(features=(96,) * 5, pixel_units=(96, 96), dtype="bfloat16", precision=None)
network = for_cpu
# grey values in 0…1, to a variance of one
transform = dist.transforms.AffineTransform(0.5, 0.29)


def reverse_process():
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t)). The network is told t; time enters its readout alone."""
    x, t = jnp.zeros((1, *SHAPE)), jnp.ones(1, int)
    weights = numpyro.param("diffusion.network$params", lambda key: network.init(key, x, t)["params"])

    def reverse(x_t, step):
        t = jnp.broadcast_to(step.t, x_t.shape[:-2]).ravel()
        outputs = network.apply({"params": weights}, x_t.reshape(-1, *SHAPE), t)
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


def batch(rng_key, images, size=32):
    """Images drawn at random, half of them mirrored, for ``fit``."""
    row_key, flip_key = jax.random.split(rng_key)
    return ppd.datasets.random_flips(flip_key, ppd.datasets.draw_rows(row_key, images, size))


if __name__ == "__main__":
    data = ppd.datasets.dead_leaves(jax.random.key(0), 2_000, 100)
    fit = ppd.fit(jax.random.key(1), diffusion(), jax.tree_util.Partial(batch, images=data.train), num_steps=2_000)
    test = data.test
    loss = Trace_ELBO().loss(jax.random.key(2), fit.params, diffusion().bound_model, diffusion().bound_guide, test)
    print(f"K >= {-loss / len(test):.1f} nats; by the program above for one image:")
    print(f"{-Trace_ELBO().loss(jax.random.key(3), fit.params, model, guide, test[:1]):.1f} nats")
