"""The mixture of :mod:`benchmarks.mixture` in the plane, seen through measurements that leave no closed form.

Counts with rates that depend on x, and magnitudes of projections; several modes remain in either posterior. The truth
comes from a fine grid, and is compared on a coarse one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.tree_util import Partial
from scipy.special import logsumexp

from benchmarks.mixture import CENTRES, draw_weights

REACH, CELLS, FINE = 24.0, 20, 30  # the square (-24, 24)², its cells per side, and points per side of a cell


@dataclass(frozen=True, eq=False)
class Seen:
    """A measurement of a point of the plane.

    :ivar weights: of the modes, shape (25,).
    :ivar observe: the distribution of y given x, batched over x.
    :ivar y: what was measured.
    """

    weights: np.ndarray
    observe: Callable[[Array], dist.Distribution]
    y: np.ndarray

    @cached_property
    def _log_joint(self) -> np.ndarray:
        """log p(x, y) at the middles of the fine cells."""
        side = ((np.arange(CELLS * FINE) + 0.5) / (CELLS * FINE) - 0.5) * 2 * REACH
        near = -0.5 * (side[:, None] - np.unique(CENTRES)) ** 2 - 0.5 * np.log(2 * np.pi)
        with np.errstate(divide="ignore"):
            log_prior = np.log(np.exp(near) @ self.weights.reshape(5, 5) @ np.exp(near).T)
        x = np.stack(np.meshgrid(side, side, indexing="ij"), -1)
        return log_prior + np.asarray(self.observe(jnp.asarray(x, float)).log_prob(self.y), dtype=np.float64)

    @property
    def log_evidence(self) -> float:
        """log p(y)."""
        return float(logsumexp(self._log_joint) + 2 * np.log(2 * REACH / (CELLS * FINE)))

    @property
    def cells(self) -> np.ndarray:
        """Posterior probabilities of the coarse cells, shape (20, 20)."""
        return np.exp(self._log_joint - logsumexp(self._log_joint)).reshape(CELLS, FINE, CELLS, FINE).sum((1, 3))

    def cells_of(self, x: np.ndarray) -> np.ndarray:
        """Shares of samples in the coarse cells; what is outside the square is in none."""
        edges = np.linspace(-REACH, REACH, CELLS + 1)
        return np.histogram2d(*np.asarray(x, dtype=np.float64).T, bins=(edges, edges))[0] / len(x)


def counts(seed: int) -> Seen:
    """Two Poisson counts, with log rates 2 + a·x and sensitivities a of length 1/20."""
    return _measured((1, seed), Partial(_counts, jnp.asarray(_directions((1, seed)), float) / 20))


def magnitudes(seed: int) -> Seen:
    """The magnitudes of two projections, with noise of standard deviation 2: the signs are lost."""
    return _measured((2, seed), Partial(_magnitudes, jnp.asarray(_directions((2, seed)), float)))


def _counts(matrix: Array, x: Array) -> dist.Distribution:
    return dist.Poisson(jnp.exp(2 + jnp.matmul(x, matrix.T, precision="highest"))).to_event(1)


def _magnitudes(matrix: Array, x: Array) -> dist.Distribution:
    return dist.Normal(jnp.abs(jnp.matmul(x, matrix.T, precision="highest")), 2.0).to_event(1)


def _directions(seed: tuple[int, int]) -> np.ndarray:
    angles = np.random.default_rng((*seed, 0)).uniform(0, np.pi) + np.array([0, 1.0])
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def _measured(seed: tuple[int, int], observe: Callable[[Array], dist.Distribution]) -> Seen:
    rng = np.random.default_rng(seed)
    weights = draw_weights(rng)
    x = CENTRES[rng.choice(len(CENTRES), p=weights)] + rng.standard_normal(2)
    y = observe(jnp.asarray(x, float)).sample(jax.random.key(int(rng.integers(2**31))))
    return Seen(weights, observe, np.asarray(y))
