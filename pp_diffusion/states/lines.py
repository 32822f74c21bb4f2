r"""Observed numbers of any density, averaged over N(m, C) along the line that each depends on.

A number's log density :math:`\ell(x)` depends on x in one direction h, as a rule: its mean is a function of
:math:`h^\top x`. Where x is N(m, C), :math:`s = h^\top (x - m) / \sqrt{h^\top C h}` is N(0, 1), and x follows it along
:math:`d = C h / \sqrt{h^\top C h}`. So :math:`Z = E[e^{\ell(m + s d)}]` is one integral, whatever the density and
whatever transform lies between: on a grid where the integrand is wide, by Gauss and Hermite's nodes at its mode where
it is narrow. Mean and variance of s under it make a normal observation of s, which stands for the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.states.outlook import LEAST_VARIANCE, Outlook
from pp_diffusion.states.space import BATCH_NDIM, flattened

#: Up to so many numbers of one system are averaged along lines; more are taken for normal by their moments.
MOST_LINES = 16

_SPACING = 0.5
_GRID = np.arange(-6.0, 6.0 + _SPACING, _SPACING)
#: Above this standard deviation of the integrand, the grid is as good as exact.
_WIDE = 0.3
_NUM_REFINEMENTS = 6
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(10)
#: The log of a density of zero.
_IMPOSSIBLE = -1e30
_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
#: Variance of an observation that says next to nothing. In float32 there is no room for more, squared beside what it is
#: off by.
_MOST_NOISE = 30.0
#: And of one that says all, beside a variance of one.
_LEAST_NOISE = 1e-7


class Numbers(Protocol):
    """L numbers at states: see :class:`pp_diffusion.posterior.reader.Numbers`."""

    @property
    def density(self) -> Array: ...
    @property
    def mean(self) -> Array: ...


class Lines(NamedTuple):
    """Numbers as normal observations of s.

    :ivar h: gradients of s, shape ``(L, P, C, S, *state_shape)``.
    :ivar m: where s is zero.
    :ivar e: what is observed, less zero; shape ``(P, C, S, L)``.
    :ivar E: the variances of its noise.
    :ivar log_rest: by how much log Z differs from the log density of e, summed; shape ``(P, C, S)``.
    """

    h: Array
    m: Array
    e: Array
    E: Array
    log_rest: Array

    def s(self, x: Array) -> Array:
        """Of states, shape ``(P, C, S, L)``."""
        h = self.h.reshape(*self.h.shape[: 1 + BATCH_NDIM], -1)
        return jnp.moveaxis((h * flattened(x - self.m)).sum(-1), 0, -1)


class Tilted(NamedTuple):
    """s under N(0, 1) times a density: the log of its integral, mean and variance; shape ``(P, C, S, L)``."""

    log_z: Array
    mean: Array
    variance: Array


def along_lines(outlook: Outlook, read: Callable[[Array], Numbers], power: Array | float = 1.0) -> Lines:
    r"""Numbers as normal observations, by what their densities are along their lines.

    :param read: of states, the numbers' densities.
    :param power: of the densities.
    """
    h, d = _directions(outlook, read)

    def log_density(s: Array) -> Array:
        """Of each number along its own line; s and result have shape ``(P, C, S, L)``."""

        def of_one(number: Array, s: Array, d: Array) -> Array:
            moved = outlook.m + s.reshape(s.shape + (1,) * (d.ndim - s.ndim)) * d
            return jnp.take(read(moved).density, number, axis=-1)

        found = jax.vmap(of_one, in_axes=(0, -1, 0), out_axes=-1)(jnp.arange(len(h)), s, d)
        return jnp.where(power > 0, power * jnp.where(jnp.isnan(found), -jnp.inf, found), 0.0)

    tilted = tilt(log_density, (*outlook.m.shape[:BATCH_NDIM], len(h)), outlook.m.dtype)
    E = jnp.clip(tilted.variance / jnp.maximum(1 - tilted.variance, 1 / _MOST_NOISE), _LEAST_NOISE, _MOST_NOISE)
    e = tilted.mean * (1 + E)
    log_rest = tilted.log_z + 0.5 * (e**2 / (1 + E) + jnp.log(1 + E)) + _HALF_LOG_2_PI
    # where all of a line is impossible, its neighbours need not be: no twist is better than that one
    log_rest = jnp.where(tilted.log_z > _IMPOSSIBLE / 2, log_rest, -jnp.inf)
    return Lines(h, outlook.m, e, E, log_rest.sum(-1))


def tilt(log_density: Callable[[Array], Array], shape: tuple[int, ...], dtype: jnp.dtype) -> Tilted:
    """The integral of a density over N(0, 1), and the moments under both, for many densities at once.

    Two modes are looked for: a square, or an angle, has them.

    :param log_density: of each, at its own s of the given shape.
    """

    def at(points: Array) -> Array:
        """The log of both, not infinite, as differences are taken; shape ``(n, *shape)``."""
        found = jax.lax.map(
            lambda s: jnp.maximum(log_density(s), _IMPOSSIBLE).astype(dtype) - 0.5 * s**2, points.reshape(-1, *shape)
        )
        return found.reshape(points.shape)

    def per_density(values: np.ndarray) -> Array:
        return jnp.asarray(values, dtype).reshape(-1, *(1,) * len(shape))

    grid = jnp.broadcast_to(per_density(_GRID), (len(_GRID), *shape))
    on_grid = at(grid)
    start, has_second = _two_peaks(grid, on_grid)

    def refine(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """A parabola through three points leads to the mode, and says how wide it is."""
        mode, step, _width = carry
        low, here, high = at(jnp.stack([mode - step, mode, mode + step]))
        bend, slope = (2 * here - low - high) / step**2, (high - low) / (2 * step)
        is_hill = bend > 0
        bend = jnp.where(is_hill, bend, 1.0)
        move = jnp.where(is_hill, jnp.clip(slope / bend, -step, step), step * jnp.sign(slope))
        width = jnp.where(is_hill, 1 / jnp.sqrt(bend), step)
        return mode + move, jnp.clip(jnp.maximum(width, jnp.abs(move)), step / 8, step), width

    ones = jnp.ones_like(start)
    mode, _, width = jax.lax.fori_loop(0, _NUM_REFINEMENTS, refine, (start, ones, ones))
    nodes, weights = (per_density(values)[:, None] for values in (_NODES, _WEIGHTS))
    points = mode + width * nodes
    log_weights = at(points) + 0.5 * nodes**2 + jnp.log(weights * width)
    is_another = has_second & (jnp.abs(mode[0] - mode[1]) > 2 * (width[0] + width[1]))
    log_weights = log_weights.at[:, 1].set(jnp.where(is_another, log_weights[:, 1], -jnp.inf))
    by_nodes = _moments(points.reshape(-1, *shape), log_weights.reshape(-1, *shape))
    by_grid = _moments(grid, on_grid + math.log(_SPACING))
    on_it = (width[0] > _WIDE) & (jnp.abs(mode[0]) < grid[-1] - 1)
    return jax.tree.map(partial(jnp.where, on_it), by_grid, by_nodes)


def _two_peaks(grid: Array, values: Array) -> tuple[Array, Array]:
    """Where values are highest, and their next peak, shape ``(2, *shape)``; and whether there is one."""
    low = jnp.full_like(values[:1], -jnp.inf)
    is_peak = (values >= jnp.concatenate([low, values[:-1]])) & (values >= jnp.concatenate([values[1:], low]))
    first = jnp.take_along_axis(grid, values.argmax(0)[None], 0)[0]
    others = jnp.where(is_peak & (jnp.abs(grid - first) > 1.5 * _SPACING), values, -jnp.inf)
    second = jnp.take_along_axis(grid, others.argmax(0)[None], 0)[0]
    return jnp.stack([first, second]), others.max(0) > _IMPOSSIBLE / 2


def _moments(points: Array, log_weights: Array) -> Tilted:
    log_z = jax.nn.logsumexp(log_weights, axis=0)
    shares = jnp.exp(log_weights - log_z)
    mean = (shares * points).sum(0)
    return Tilted(log_z - _HALF_LOG_2_PI, mean, (shares * (points - mean) ** 2).sum(0))


def _directions(outlook: Outlook, read: Callable[[Array], Numbers]) -> tuple[Array, Array]:
    r"""Per number h, so scaled that :math:`h^\top x` has unit variance, and d; shape ``(L, P, C, S, *state_shape)``.

    h is the gradient of the number's mean; where there is none or it is flat, as of counts out of n near n, that of its
    density, and where m is the top of that, the same beside m.
    """
    beside = jnp.sqrt(outlook.variance) / 2

    def ways(x: Array) -> Array:
        numbers = read(x)
        return jnp.stack([numbers.mean, numbers.density, read(x + beside).density])

    found, pull = jax.vjp(ways, outlook.m)
    count, axes = found.shape[-1], tuple(range(1 + BATCH_NDIM, 1 + outlook.m.ndim))
    seeds = jnp.eye(3 * count, dtype=found.dtype).reshape(3, count, 3, 1, 1, 1, count)
    seeds = jnp.broadcast_to(seeds, (3, count, *found.shape))
    of_mean, of_density, of_density_beside = jax.vmap(jax.vmap(lambda seed: pull(seed)[0]))(seeds)

    def scaled(gradient: Array) -> Array:
        largest = jnp.abs(gradient).max(axes, keepdims=True)
        fine = jnp.isfinite(largest) & (largest > 0)
        return jnp.where(fine, gradient / jnp.where(fine, largest, 1.0), 0.0)

    h = scaled(of_mean)
    for other in (of_density, of_density_beside):
        h = jnp.where((h != 0).any(axes, keepdims=True), h, scaled(other))
    by_variance = outlook.variance * h
    Ch = jax.lax.map(outlook.C, h)
    along, least = ((h * product).sum(axes, keepdims=True) for product in (Ch, by_variance))
    is_trusted = along > LEAST_VARIANCE * least
    Ch, along = jnp.where(is_trusted, Ch, by_variance), jnp.where(is_trusted, along, least)
    scale = jnp.where(along > 0, 1 / jnp.sqrt(jnp.where(along > 0, along, 1.0)), 0.0)
    return h * scale, Ch * scale
