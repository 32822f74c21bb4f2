r"""The reverse walk: from :math:`x_T` down, one step of :math:`p(x_{t-1} \mid x_t)` at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.kernels import Kernel
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.schedules import Rates

#: From the distribution of :math:`x_{t-1}`, and an entry of what the walk was given, to :math:`x_{t-1}`.
Draw = Callable[[dist.Distribution, Any], Array]


def walk(process: ReverseProcess, draw: Draw, x_T: Array, xs: Any) -> Array:
    r""":math:`x_0`, by ``draw(p(x_{t-1} | x_t), xs[t-1])`` for t = T…1.

    For gradients, a step's network is run again, not stored: memory grows by a state for each step.

    :param xs: a pytree of arrays over time, first axis T: keys, noise, powers.
    """
    x_1, _ = walk_to_x_1(process, process.rates, draw, x_T, jax.tree.map(lambda a: a[1:], xs))
    return draw(process.last(x_1), jax.tree.map(lambda a: a[0], xs))


def walk_to_x_1(
    reverse: Callable[[Array, Rates], dist.Distribution],
    rates: Rates,
    draw: Draw,
    x_T: Array,
    xs: Any,
    *,
    keep_path: bool = False,
) -> tuple[Array, Array | None]:
    r""":math:`x_1`; and the path :math:`x_1 … x_{T-1}` over a first axis, where it is to be kept.

    :param rates: all T steps.
    :param xs: a pytree of arrays over time, first axis T − 1, entry t-2 belonging to step t.
    """

    def step(x_t: Array, at: tuple[Any, Rates]) -> tuple[Array, Array | None]:
        entry, step_rates = at
        x = draw(reverse(x_t, step_rates), entry)
        return x, x if keep_path else None

    step = jax.checkpoint(step, prevent_cse=False)
    return jax.lax.scan(step, x_T, (xs, rates.at(slice(1, None))), reverse=True)


def start(rng_key: Array, kernel: Kernel, rates: Rates, batch_shape: tuple[int, ...]) -> tuple[Array, Array]:
    r""":math:`x_T \sim \pi`, and keys for the steps T…2."""
    end_key, rng_key = jax.random.split(rng_key)
    return (
        kernel.as_state(kernel.stationary().sample(end_key, batch_shape)),
        jax.random.split(rng_key, rates.num_timesteps - 1),
    )


def sample_chain(rng_key: Array, process: ReverseProcess, batch_shape: tuple[int, ...]) -> Array:
    r"""Draws of :math:`x_0`, of shape ``(*batch_shape, *event_shape)``, without storing the path."""
    last_key, rng_key = jax.random.split(rng_key)
    x_T, keys = start(rng_key, process.kernel, process.rates, batch_shape)
    x_1, _ = walk_to_x_1(process, process.rates, draw_state(process.kernel), x_T, keys)
    return process.last(x_1).sample(last_key)


def draw_state(kernel: Kernel) -> Draw:
    """By a random key."""
    return lambda law, rng_key: kernel.as_state(law.sample(rng_key))
