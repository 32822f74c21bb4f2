r"""A Gaussian mixture seen through linear measurements: a posterior with many modes, known exactly in any dimension.

The benchmark of MCGdiff (Cardoso et al. 2023): 25 modes at (8i, 8j), i, j = −2…2, repeated over the pairs of
coordinates, unit covariance, random weights; y = A x + noise, the singular values of A uniform in (0, 1), the noise's
standard deviation uniform below the largest of them. Everything exact is in NumPy float64; nothing costs more than
d_y × d_x per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from numpyro.distributions.transforms import AffineTransform
from scipy.special import logsumexp, softmax

import pp_diffusion as ppd
from benchmarks.reference import handwritten_smc

CENTRES = 8.0 * np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3)])


@dataclass(frozen=True, eq=False)
class Problem:
    """The mixture and what was measured.

    :ivar weights: of the modes, shape (25,).
    :ivar matrix: A, shape (d_y, d_x).
    :ivar noise: the standard deviation of each measurement's noise.
    :ivar y: the measurements, shape (d_y,).
    """

    weights: np.ndarray
    matrix: np.ndarray
    noise: float
    y: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Of the modes, shape (25, d_x)."""
        return tiled(CENTRES, self.matrix.shape[1])

    def draw_prior(self, rng: np.random.Generator, num: int) -> np.ndarray:
        return _draw(rng, self.weights, self.means, num)

    @cached_property
    def _measured_covariance(self) -> np.ndarray:
        """Of y, within a mode."""
        return self.matrix @ self.matrix.T + self.noise**2 * np.eye(len(self.y))

    @cached_property
    def _log_joint(self) -> np.ndarray:
        """log p(mode, y)."""
        factor = np.linalg.cholesky(self._measured_covariance)
        whitened = np.linalg.solve(factor, (self.y - self.means @ self.matrix.T).T)
        constant = np.log(np.diag(factor)).sum() + 0.5 * len(self.y) * np.log(2 * np.pi)
        return np.log(self.weights) - 0.5 * (whitened**2).sum(0) - constant

    @property
    def log_evidence(self) -> float:
        """log p(y)."""
        return float(logsumexp(self._log_joint))

    @property
    def posterior_weights(self) -> np.ndarray:
        return softmax(self._log_joint)

    @property
    def posterior_means(self) -> np.ndarray:
        return self.means + (self.y - self.means @ self.matrix.T) @ self._gain.T

    @property
    def posterior_covariance(self) -> np.ndarray:
        """Of each mode, shape (d_x, d_x)."""
        return np.eye(self.matrix.shape[1]) - self._gain @ self.matrix

    @cached_property
    def _gain(self) -> np.ndarray:
        return np.linalg.solve(self._measured_covariance, self.matrix).T

    def draw_posterior(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Exact draws: a mode, then a draw of the mode's prior with its measurements corrected."""
        x = _draw(rng, self.posterior_weights, self.means, num)
        measured = x @ self.matrix.T + self.noise * rng.standard_normal((num, len(self.y)))
        return x + (self.y - measured) @ self._gain.T

    def log_likelihood(self, x: Array) -> Array:
        """log p(y | x)."""
        residual = (self.y - x @ self.matrix.T) / self.noise
        return -0.5 * (residual**2).sum(-1) - len(self.y) * (np.log(self.noise) + 0.5 * np.log(2 * np.pi))

    def mode_probabilities(self, x: np.ndarray) -> np.ndarray:
        """How much of the samples x belongs to each mode, shape (25,).

        By p(mode | x), which measurements do not change, so that exact samples give the exact weights on average.
        """
        pairs = np.asarray(x, dtype=np.float64).reshape(len(x), -1, 2)
        distance = pairs.shape[1] * ((pairs.mean(1)[:, None] - CENTRES) ** 2).sum(-1)  # up to what modes share
        return softmax(np.log(self.weights) - 0.5 * distance, axis=1).mean(0)


def tiled(pairs: np.ndarray, d_x: int) -> np.ndarray:
    """Values for even and odd coordinates, repeated along the last axis."""
    return np.tile(pairs, d_x // 2)


def _draw(rng: np.random.Generator, weights: np.ndarray, means: np.ndarray, num: int) -> np.ndarray:
    return means[rng.choice(len(weights), num, p=weights)] + rng.standard_normal((num, means.shape[1]))


def problem(d_x: int, d_y: int, seed: int) -> Problem:
    """Drawn with ``np.random.default_rng((d_x, d_y, seed))``."""
    rng = np.random.default_rng((d_x, d_y, seed))
    weights = draw_weights(rng)
    left, values, right = np.linalg.svd(rng.standard_normal((d_y, d_x)), full_matrices=False)
    values = rng.uniform(size=d_y)
    matrix, noise = left * values @ right, rng.uniform() * values.max()
    x = _draw(rng, weights, tiled(CENTRES, d_x), 1)[0]
    return Problem(weights, matrix, noise, matrix @ x + noise * rng.standard_normal(d_y))


def draw_weights(rng: np.random.Generator) -> np.ndarray:
    """Squares of normal draws, normalised."""
    weights = rng.standard_normal(len(CENTRES)) ** 2
    return weights / weights.sum()


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, num_projections: int = 10_000) -> float:
    """The mean over random directions of the Wasserstein-1 distance of the projections, as published; for equally many
    samples x and y."""
    total = 0.0
    for size in np.diff(np.append(np.arange(0, num_projections, 500), num_projections)):
        directions = rng.standard_normal((size, x.shape[1]))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        gaps = np.sort(directions @ x.T, 1) - np.sort(directions @ y.T, 1)
        total += np.abs(gaps).mean(1).sum()
    return total / num_projections


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(0.5 * np.abs(p - q).sum())


class MixtureNetwork(nn.Module):
    r"""The mixture's best :math:`f_\mu` and diagonal :math:`f_\Sigma`, where it has mean 0 and variance 1; no training.

    What such reverse steps lose is that all pairs of coordinates move together, which a diagonal variance cannot say.
    The weights of the modes are its parameter, so that programs for other weights need no new compilation.
    """

    schedule: ppd.Schedule

    @nn.compact
    def __call__(self, x_t: Array, t: Array) -> tuple[Array, Array]:
        d_x = x_t.shape[-1]
        weights = self.param("weights", nn.initializers.constant(1 / len(CENTRES)), (len(CENTRES),))
        centres = jnp.asarray(CENTRES, float)
        loc, scale = moments(weights, centres)
        centres, within = (centres - loc).T / scale[:, None], scale**-2
        repeat = jnp.asarray(tiled(np.eye(2), d_x), float)  # values for even and odd coordinates, to all of them

        step = self.schedule.rates().at(t - 1)
        signal, erased = jnp.sqrt(step.alpha_bar)[..., None], step.erased[..., None]
        variance = signal**2 * within + erased  # of x_t in a mode
        middle = jnp.matmul(x_t, repeat.T, precision="highest") / (d_x / 2)
        distance = (middle[..., None] - signal[..., None] * centres) ** 2 / variance[..., None]
        share = jax.nn.softmax(jnp.log(weights) - 0.25 * d_x * distance.sum(-2))[..., None, :]  # of the modes
        centre = jnp.sum(share * centres, -1)
        spread = jnp.sum(share * (centres - centre[..., None]) ** 2, -1)
        kept = erased / variance  # of the mode's centre in E[x_0 | x_t, mode]

        def to_all(pair: Array) -> Array:
            return jnp.matmul(pair, repeat, precision="highest")

        x_0 = to_all(kept * centre) + to_all(signal * within / variance) * x_t
        mean, least = ppd.GaussianKernel((d_x,)).posterior_moments(x_t, x_0, step)
        from_x_0 = (jnp.sqrt(step.previous_alpha_bar) * step.innovation)[..., None]
        return mean, least + to_all(from_x_0**2 * kept * (within + kept * spread))


def moments(weights: Any, centres: Any = CENTRES) -> tuple[Any, Any]:
    """Mean and standard deviation of the mixture's even and odd coordinates."""
    loc = weights @ centres
    return loc, (weights @ (centres - loc) ** 2 + 1) ** 0.5


def mixture_prior(
    weights: np.ndarray, d_x: int, num_timesteps: int = 100, schedule: ppd.Schedule | None = None
) -> ppd.DiffusionPrior:
    """The mixture as a diffusion.

    :param weights: of the 25 modes.
    :param schedule: :func:`split_schedule` if ``None``.
    """
    schedule = schedule or split_schedule(d_x, num_timesteps)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((d_x,)),
        schedule,
        MixtureNetwork(schedule),
        parameterization="direct",
        last_step="network",
        transform=AffineTransform(*(jnp.asarray(tiled(part, d_x), float) for part in moments(weights))),
    )
    return diffusion.prior({diffusion.network_site: {"weights": jnp.asarray(weights, float)}})


def split_schedule(d_x: int, num_timesteps: int) -> ppd.FixedSchedule:
    """Log-SNR falling linearly while the modes run together.

    All d_x / 2 pairs of coordinates say which mode it is, so that this happens at a log-SNR lower by log(d_x / 2).
    Before, a step of any length is exact; after, nothing is left to say.
    """
    return ppd.FixedSchedule.from_log_snr(np.linspace(6, -4, num_timesteps) - np.log(d_x / 2))


def by_hand(
    prior: ppd.DiffusionPrior, y: np.ndarray, matrix: np.ndarray, covariance: np.ndarray
) -> tuple[handwritten_smc.Network, handwritten_smc.Chain, handwritten_smc.Measurement]:
    """A prior of direct parameterization, without context, and y = matrix x + noise as the reference takes them."""
    transform = prior.transform
    loc, scale = (0.0, 1.0) if transform is None else (np.asarray(transform.loc), np.asarray(transform.scale))
    rates = prior.process.rates  # not from rounded log-SNRs: x_0 is what cancellation leaves of the network's mean
    chain = handwritten_smc.Chain(
        rates.t,
        rates.log_snr,
        rates.shrinkage,
        jnp.sqrt(rates.previous_alpha_bar) * rates.innovation,
        rates.previous_erased * rates.innovation,
        rates.erased / jnp.sqrt(rates.alpha_bar),
    )
    measured = handwritten_smc.measurement(y, matrix, covariance, loc, scale)
    return Partial(_outputs, prior.process), chain, measured


def _outputs(process: Any, x_t: Array, t: Array) -> tuple[Array, Array]:
    return process.network(process.params, x_t, t, jnp.zeros(t.shape), None)
