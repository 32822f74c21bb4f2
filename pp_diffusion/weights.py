r"""Weights of forward trajectories, :math:`w = p(x_{0…T}) / q(x_{1…T} \mid x_0)`, drawn in blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from pp_diffusion.bounds import lower_bound
from pp_diffusion.checks import positive_int
from pp_diffusion.frozen import Frozen
from pp_diffusion.objectives import log_weight
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.rows import as_rows, each_chunk, even


class BoundOfBits(NamedTuple):
    """K of discrete data, where the log weights do not tell it: its standard error, and of how many samples it is the
    mean."""

    value: np.ndarray
    std_error: np.ndarray
    num_samples: int

    def with_more(self, other: BoundOfBits) -> BoundOfBits:
        """The mean of both."""
        total = self.num_samples + other.num_samples
        mine, its = self.num_samples / total, other.num_samples / total
        error = np.hypot(mine * self.std_error, its * other.std_error)
        return BoundOfBits(mine * self.value + its * other.value, error, total)


@dataclass(frozen=True)
class Trajectories:
    """What weights are drawn from."""

    prior: DiffusionPrior
    x: Array
    chunk_size: int

    def draw(self, rng_key: Array, num_trajectories: int, progress_bar: bool) -> tuple[np.ndarray, BoundOfBits | None]:
        """Log weights of shape ``(num_trajectories, *batch)``; and K, where they do not tell it.

        :raises FloatingPointError: for weights that are not finite.
        """
        num_trajectories = positive_int("num_trajectories", num_trajectories)
        bound_key, rng_key = jax.random.split(rng_key)
        prior, rows, batch_shape = as_rows(self.prior, self.x)
        # blocks of one shape, as even as can be, so that one compilation serves all and little is drawn in vain
        num_chunks, rows_at_once = even(len(rows), self.chunk_size)
        num_blocks, draws_at_once = even(num_trajectories, max(1, self.chunk_size // rows_at_once))
        with tqdm(total=num_chunks * num_blocks, desc="log p", disable=not progress_bar) as bar:

            def of_rows(prior: DiffusionPrior, x: Array, key: Array) -> np.ndarray:
                blocks = []
                for j in range(num_blocks):
                    block = weights_of_rows(prior, x, jax.random.fold_in(key, j), draws_at_once)
                    blocks.append(np.asarray(block, np.float64))
                    bar.update()
                return np.concatenate(blocks)[:num_trajectories].T

            parts = list(each_chunk(prior, rows, rng_key, of_rows, self.chunk_size))
        out = np.ascontiguousarray(np.concatenate(parts).T)
        is_discrete = self.prior.kernel.is_discrete
        possible = np.isfinite(out) | (np.isneginf(out) & is_discrete)
        if bad := np.count_nonzero(~possible.all(0)):
            raise FloatingPointError(f"prior has log weights that are not finite for {bad} of {len(rows)} data")
        bound = self._bound(bound_key, num_trajectories) if is_discrete else None
        return out.reshape(num_trajectories, *batch_shape), bound

    def _bound(self, rng_key: Array, num_trajectories: int) -> BoundOfBits:
        num_samples = max(4, num_trajectories // 16)
        bound = lower_bound(rng_key, self.prior, self.x, num_samples=num_samples, chunk_size=self.chunk_size)
        return BoundOfBits(np.asarray(bound.value, np.float64), np.asarray(bound.std_error, np.float64), num_samples)


@partial(jax.jit, static_argnames="num_trajectories")
def weights_of_rows(prior: DiffusionPrior, x: Array, rng_key: Array, num_trajectories: int) -> Array:
    """Log weights of one block of trajectories, shape ``(num_trajectories, N)``."""
    z = prior.space.to_model(x)
    log_weights = log_weight(rng_key, prior.process, jnp.broadcast_to(z, (num_trajectories, *z.shape)))
    return log_weights - prior.space.log_abs_det(z, x)


class Importance(Frozen, saved_as="Importance"):
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
        prior.space.check_shape(x, "value")
        return _log_mean_weight(prior, prior.kernel.as_state(x), self.rng_key, self.num_trajectories)


@partial(jax.jit, static_argnames="num_trajectories")
def _log_mean_weight(prior: DiffusionPrior, x: Array, rng_key: Array, num_trajectories: int) -> Array:
    process, space = prior.process, prior.space
    batch_shape = jnp.broadcast_shapes(prior.kernel.batch_shape_of(x), prior.batch_shape)
    x = jnp.broadcast_to(x, batch_shape + prior.event_shape)
    z = space.to_model(x)

    def add(log_total: Array, key: Array) -> tuple[Array, None]:
        return jnp.logaddexp(log_total, log_weight(key, process, z)), None

    keys = jax.random.split(rng_key, num_trajectories)
    log_total, _ = jax.lax.scan(add, log_weight(keys[0], process, z), keys[1:])
    return log_total - math.log(num_trajectories) - space.log_abs_det(z, x)
