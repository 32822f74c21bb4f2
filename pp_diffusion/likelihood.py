"""The log likelihood by importance sampling over trajectories (the paper, eq. 9)."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion._frozen import Frozen
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.schedules import positive_int
from pp_diffusion.trajectories import log_weight
from pp_diffusion.transforms import log_abs_det


class Importance(Frozen):
    r"""``diffusion.prior(params, log_prob=Importance(rng_key, num_trajectories))``: log_prob by eq. 9.

    The log of the mean of p/q over forward trajectories with fixed noise, each row's own: a deterministic and (for
    continuous kernels) differentiable function of the array x. Its exponential is unbiased for p(x); the log itself is
    biased low.

    :param rng_key: a JAX random key, which fixes the noise.
    :param num_trajectories: trajectories per datum; each costs T network calls.
    """

    data_fields = ("rng_key",)

    rng_key: Array
    num_trajectories: int

    def __init__(self, rng_key: Array, num_trajectories: int) -> None:
        self._set(rng_key=rng_key, num_trajectories=positive_int("num_trajectories", num_trajectories))

    def log_prob(self, prior: DiffusionPrior, x: Array) -> Array:
        """The estimate of log p(x) under ``prior``, nats."""
        prior.diffusion.check_shape(x, "value")
        return _log_mean_weight(prior, prior.diffusion.kernel.as_state(x), self.rng_key, self.num_trajectories)


@partial(jax.jit, static_argnames="num_trajectories")
def _log_mean_weight(prior: DiffusionPrior, x: Array, rng_key: Array, num_trajectories: int) -> Array:
    diffusion, process = prior.diffusion, prior.process
    kernel = diffusion.kernel
    batch_shape = jnp.broadcast_shapes(x.shape[: x.ndim - kernel.event_ndim], prior.batch_shape)
    x = jnp.broadcast_to(x, batch_shape + kernel.event_shape)
    z = diffusion.to_model_space(x)

    def add(log_total: Array, key: Array) -> tuple[Array, None]:
        return jnp.logaddexp(log_total, log_weight(key, process, z)), None

    keys = jax.random.split(rng_key, num_trajectories)
    log_total, _ = jax.lax.scan(add, log_weight(keys[0], process, z), keys[1:])
    return log_total - math.log(num_trajectories) - log_abs_det(diffusion.transform, z, x, kernel.event_ndim)
