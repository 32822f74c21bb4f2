"""Two moons (Greenberg et al. 2019): a posterior of two crescents, learned from pairs that a NumPyro model simulates.

Endlessly: each update draws its own. ``exact_log_prob`` is the posterior's density, where both moons lie in the prior's
box.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import Predictive

import pp_diffusion as ppd

BOX = constraints.interval(-1.0, 1.0)
RADIUS, WIDTH = 0.1, 0.01


class Crescent(dist.Distribution):
    """The right half of a circle about ``loc``, as thick as a pencil's line."""

    arg_constraints: ClassVar = {"loc": constraints.real_vector}
    support = constraints.real_vector

    def __init__(self, loc, *, validate_args=None):
        self.loc = loc
        super().__init__(jnp.shape(loc)[:-1], jnp.shape(loc)[-1:], validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        angle_key, radius_key = jax.random.split(key)
        shape = sample_shape + self.batch_shape
        angle = jax.random.uniform(angle_key, shape, minval=-jnp.pi / 2, maxval=jnp.pi / 2)
        radius = RADIUS + WIDTH * jax.random.normal(radius_key, shape)
        return self.loc + radius[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    def log_prob(self, value):
        right, up = jnp.moveaxis(value - self.loc, -1, 0)
        radius = jnp.hypot(right, up)
        log_prob = dist.Normal(RADIUS, WIDTH).log_prob(radius) - jnp.log(radius * jnp.pi)
        return jnp.where(right > 0, log_prob, -jnp.inf)


def centre(x):
    """Of the crescent that x gives: two x have the same one."""
    return jnp.stack([0.25 - jnp.abs(x[..., 0] + x[..., 1]) / jnp.sqrt(2), (x[..., 1] - x[..., 0]) / jnp.sqrt(2)], -1)


def model(y=None):
    """A uniform prior over a box, and a crescent."""
    x = numpyro.sample("x", dist.Uniform(-jnp.ones(2), 1.0).to_event(1))
    numpyro.sample("y", Crescent(centre(x)), obs=y)


def batch(rng_key, size=512):
    """Pairs (x, y), for ``fit``."""
    pairs = Predictive(model, num_samples=size, parallel=True)(rng_key)
    return pairs["x"], pairs["y"]


def exact_log_prob(x, y):
    """log p(x | y)."""
    return Crescent(centre(x)).log_prob(y) - jnp.log(2.0)


def diffusion():
    """Over x, in its box."""
    transform = ppd.transform_to(BOX, batch(jax.random.key(0), 4096)[0])
    schedule = ppd.LearnedSchedule(num_timesteps=100, first_beta=1e-5)
    return ppd.Diffusion(ppd.GaussianKernel((2,)), schedule, ppd.networks.MLP(), transform=transform)


if __name__ == "__main__":
    fit = ppd.fit(jax.random.key(1), diffusion(), batch, num_steps=8_000)
    x = fit.prior(jnp.zeros(2)).sample(jax.random.key(2), (1000,))
    print(f"log p(x | y = 0) at the draws: {jnp.median(exact_log_prob(x, jnp.zeros(2))):.3f} nats, the median")
