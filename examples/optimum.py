r"""The best reverse process of diagonal Gaussians on the swiss roll, and the best schedule for it.

Given :math:`x_t`, the place on the spiral has a posterior that quadrature gives exactly, and so have the mean and the
variances of :math:`x_0`. A network that returns them is the best that training can find: K of that process is the floor
of every gap. With it a step costs the bound

.. math:: \tfrac12 \sum_i E \log\left(1 + (s_{t-1} - s_t) \operatorname{Var}(x_{0,i} \mid x_t)\right),

:math:`s_t = \bar\alpha_t / (1 - \bar\alpha_t)` being the signal-to-noise ratio, so that the best schedule of T steps
follows by dynamic programming over a grid of log-SNRs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pp_diffusion as ppd

NODES = 512
KERNEL = ppd.GaussianKernel((2,))


@partial(jax.jit, static_argnames="noise")
def posterior_moments(x_t: Array, log_snr: Array, loc: Array, scale: Array, noise: float = 0.5) -> tuple[Array, Array]:
    """Mean and variance of each coordinate of standardised x_0 given x_t, both of x_t's shape ``(N, 2)``."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    angle = 1.5 * np.pi * (1 + (nodes + 1))
    centres = (jnp.asarray(np.stack([angle * np.cos(angle), angle * np.sin(angle)], -1)) - loc) / scale
    own = (noise / scale) ** 2  # the variance of a datum given its place on the spiral

    def one(at: tuple[Array, Array]) -> tuple[Array, Array]:
        x, log_snr = at
        signal, erased = jnp.sqrt(jax.nn.sigmoid(log_snr)), jax.nn.sigmoid(-log_snr)
        total = signal**2 * own + erased
        residual = x - signal * centres
        place = jax.nn.softmax(jnp.log(jnp.asarray(weights)) - 0.5 * jnp.sum(residual**2 / total, -1))
        means = centres + own * signal / total * residual
        mean = place @ means
        return mean, place @ (means - mean) ** 2 + own * erased / total

    return jax.lax.map(one, (x_t, log_snr), batch_size=256)


def exact_network(transform: Any) -> Callable[..., tuple[Array, Array]]:
    """The network, for ``parameterization="v"``, of the best reverse process."""

    def network(x_t: Array, t: Array, log_snr: Array) -> tuple[Array, Array]:
        flat = x_t.reshape(-1, 2), log_snr.reshape(-1)
        mean, variance = (a.reshape(x_t.shape) for a in posterior_moments(*flat, transform.loc, transform.scale))
        level = log_snr[..., None]
        v = (jnp.sqrt(jax.nn.sigmoid(level)) * x_t - mean) / jnp.sqrt(jax.nn.sigmoid(-level))
        return v, jnp.log(variance) - jax.nn.log_sigmoid(-level)

    return network


def best_process(schedule: ppd.FixedSchedule, transform: Any, last_step: Any = "kernel") -> Any:
    """The prior of the best reverse process with a given schedule."""
    network = exact_network(transform)
    return ppd.Diffusion(KERNEL, schedule, network, transform=transform, last_step=last_step).prior({})


def best_schedule(
    rng_key: Array, data: Array, transform: Any, num_timesteps: int, first_beta: float, *, grid: int = 240
) -> ppd.FixedSchedule:
    r"""The schedule of T steps from :math:`\beta_1` whose best reverse process has the largest K on ``data``; last step
    by the kernel."""
    z = transform.inv(data)
    start = float(np.log1p(-first_beta) - np.log(first_beta))
    levels = np.linspace(start, -4.0, grid)
    ratio = np.exp(levels)
    cost, end_cost = np.full((grid, grid), np.inf), np.full(grid, np.inf)  # cost[i, j]: from level i down to level j
    for j in range(1, grid):
        log_snr = jnp.full(len(z), levels[j])
        x_t = KERNEL.marginal(z, log_snr).sample(jax.random.fold_in(rng_key, j))
        variance = np.asarray(posterior_moments(x_t, log_snr, transform.loc, transform.scale)[1], np.float64)
        cost[:j, j] = 0.5 * np.log1p((ratio[:j] - ratio[j])[:, None, None] * variance).sum(-1).mean(-1)
        end_cost[j] = KERNEL.prior_kl(z, log_snr).mean()
    best, came_from = np.full(grid, np.inf), []
    best[0] = 0.0
    for _ in range(num_timesteps - 1):
        total = best[:, None] + cost
        came_from.append(total.argmin(0))
        best = total.min(0)
    path = [int(np.argmin(best + end_cost))]
    for step in reversed(came_from):
        path.append(int(step[path[-1]]))
    return ppd.FixedSchedule.from_log_snr(levels[path[::-1]])
