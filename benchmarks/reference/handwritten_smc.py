"""Sequential Monte Carlo for one case in plain JAX: a Gaussian diffusion whose x_0 is measured linearly with noise.

Twisted by Tweedie's moments: p(y | x_t) is taken as N(y; A m, A C A' + R), with m = E[x_0 | x_t] and
C = (1 - abar) / sqrt(abar) dm/dx_t, and proposed by conditioning p(x_{t-1} | x_t) on y under the same moments. One
network call per particle and step, and one vector-Jacobian product per measurement. All products are at full
precision: with a GPU's default, the evidence is off by several nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Network = Callable[[Array, Array], tuple[Array, Array]]  # mean and variance of p(x_{t-1} | x_t), as ours


class Chain(NamedTuple):
    """Constants of each step t = 1…T, as arrays of shape (T,)."""

    t: Array
    log_snr: Array
    shrinkage: Array  # the posterior mean is x_t + shrinkage x_t + from_x_0 x_0
    from_x_0: Array
    variance: Array  # of the posterior
    tweedie: Array  # (1 - abar) / sqrt(abar)


class Measurement(NamedTuple):
    """y = matrix x_0 + N(0, 1), with x_0 in the model's space."""

    y: Array
    matrix: Array
    log_scale: Array  # log p(y) of what was whitened is this plus that of the above


class Twist(NamedTuple):
    """What one network call says of x_{t-1} and y, per particle."""

    mean: Array  # of x_{t-1}
    sd: Array
    residual: Array  # of y, whitened by its covariance given x_t, in directions that the proposal keeps apart
    gain: Array  # of y, whitened, and x_{t-1} / sd
    turn: Array  # turn' gain = B, of those directions: B B' is diagonal
    explained: Array  # that diagonal
    log_value: Array  # log psi_t(x_t)


class Result(NamedTuple):
    """Weighted particles in the model's space; the effective sample size is a share of N, entry t-1 that of x_t."""

    log_evidence: Array
    particles: Array
    log_weights: Array
    ess: Array


def measurement(
    y: np.ndarray, matrix: np.ndarray, covariance: np.ndarray, loc: Any = 0.0, scale: Any = 1.0
) -> Measurement:
    """y = matrix x + N(0, covariance) with x = loc + scale z, in terms of z."""
    factor = np.linalg.cholesky(covariance)
    y = y - matrix @ np.broadcast_to(loc, matrix.shape[1])
    fields = (np.linalg.solve(factor, y), np.linalg.solve(factor, matrix * scale), -np.log(np.diag(factor)).sum())
    return Measurement(*(jnp.asarray(field, dtype=float) for field in fields))


@jax.default_matmul_precision("highest")
@partial(jax.jit, static_argnames=("num_particles", "ess_threshold", "low_snr", "floor"))
def run(
    rng_key: Array,
    network: Network,
    chain: Chain,
    measured: Measurement,
    num_particles: int,
    *,
    ess_threshold: float = 0.5,
    low_snr: float = -12.0,
    floor: float = 1e-3,
) -> Result:
    """Particles of p(x_0 | y), and log p(y).

    :param network: a :class:`jax.tree_util.Partial` that holds its parameters.
    :param ess_threshold: resample below this share of the particles.
    :param low_snr: the log-SNR below which C is diagonal, from the network's variance.
    :param floor: the least variance of the proposal, as a share of the model's.
    """
    start_key, last_key, rng_key = jax.random.split(rng_key, 3)
    x = jax.random.normal(start_key, (num_particles, measured.matrix.shape[1]))
    twist = partial(_twist, network, measured, low_snr=low_snr, floor=floor)
    even = jnp.full(num_particles, -jnp.log(num_particles))

    def move(carry: Any, at: tuple[Array, Chain]) -> tuple[Any, Array]:
        (x, log_weights, log_evidence), (key, step) = carry, at
        resample_key, key = jax.random.split(key)
        now = twist(x, step)
        log_weights, log_evidence, ess = _weigh(log_weights + now.log_value, log_evidence)
        now, log_weights = jax.lax.cond(
            ess < ess_threshold,
            lambda: (jax.tree.map(lambda a: a[_systematic(resample_key, log_weights)], now), even),
            lambda: (now, log_weights),
        )
        x, log_ratio = _propose(key, now)
        return (x, log_weights + log_ratio - now.log_value, log_evidence), ess

    later, first = jax.tree.map(lambda a: a[1:], chain), jax.tree.map(lambda a: a[0], chain)
    keys = jax.random.split(rng_key, len(later.t))
    carry, ess = jax.lax.scan(move, (x, even, measured.log_scale), (keys, later), reverse=True)
    (x, log_weights, log_evidence), ess_1 = move(carry, (last_key, first))
    residual = measured.y - x @ measured.matrix.T
    log_likelihood = -0.5 * jnp.sum(residual**2 + jnp.log(2 * jnp.pi), -1)
    log_weights, log_evidence, _ = _weigh(log_weights + log_likelihood, log_evidence)
    return Result(log_evidence, x, log_weights, jnp.append(ess_1, ess))


def _twist(network: Network, measured: Measurement, x: Array, step: Chain, *, low_snr: float, floor: float) -> Twist:
    t = jnp.full(len(x), step.t)
    mean, pull, variance = jax.vjp(lambda x: network(x, t), x, has_aux=True)
    matrix, is_first = measured.matrix[:, None], step.t == 1  # (d_y, 1, d_x)
    x_0 = (mean - x - step.shrinkage * x) / step.from_x_0
    (pulled,) = jax.vmap(pull)(jnp.broadcast_to(matrix, (len(matrix), *x.shape)))
    by_jacobian = step.tweedie * (pulled - (1 + step.shrinkage) * matrix) / step.from_x_0
    by_variance = matrix * jnp.maximum(variance - step.variance, 0) / step.from_x_0**2
    covariance = jnp.where((step.log_snr < low_snr) | is_first, by_variance, by_jacobian)  # A C, (d_y, N, d_x)

    sd = jnp.sqrt(variance)
    explained = jnp.einsum("ind,jd->inj", covariance, measured.matrix).swapaxes(0, 1)
    explained, turn = jnp.linalg.eigh(0.5 * (explained + explained.mT))
    spread = 1 + jnp.maximum(explained, 0)  # of y given x_t, in those directions
    whiten = turn.mT / jnp.sqrt(spread)[..., None]
    residual = jnp.einsum("nij,nj->ni", whiten, measured.y - jnp.dot(x_0, measured.matrix.T))
    log_value = -0.5 * jnp.sum(residual**2 + jnp.log(2 * jnp.pi * spread), -1)

    gain = jnp.einsum("nij,jnd->nid", whiten, step.from_x_0 * covariance / sd)
    explained, turn = jnp.linalg.eigh(jnp.einsum("nid,njd->nij", gain, gain))
    kept = jnp.clip(explained, 0, 1 - jnp.where(is_first, 1e-6, floor))  # the last step is exact without
    pull = jnp.einsum("nij,ni->nj", turn, residual)
    turn = turn * jnp.sqrt(kept / jnp.maximum(explained, 1e-30))[:, None]
    return Twist(mean, sd, pull, gain, turn, kept, log_value)


def _propose(rng_key: Array, now: Twist) -> tuple[Array, Array]:
    """x_{t-1} given x_t and y, and log p(x_{t-1} | x_t) less the log density that it was drawn from."""
    noise = jax.random.normal(rng_key, now.mean.shape)
    left = 1 - now.explained
    explained = jnp.einsum("nij,ni->nj", now.turn, jnp.einsum("nid,nd->ni", now.gain, noise))
    pull = jnp.einsum("nij,nj->ni", now.turn, now.residual - explained / (1 + jnp.sqrt(left)))
    moved = noise + jnp.einsum("nid,ni->nd", now.gain, pull)
    log_ratio = 0.5 * (jnp.sum((noise - moved) * (noise + moved), -1) + jnp.sum(jnp.log(left), -1))
    return now.mean + now.sd * moved, log_ratio


def _weigh(log_weights: Array, log_evidence: Array) -> tuple[Array, Array, Array]:
    """Normalised log weights, the evidence with their sum, and the effective sample size as a share."""
    total = jax.nn.logsumexp(log_weights)
    log_weights = log_weights - total
    return log_weights, log_evidence + total, 1 / (len(log_weights) * jnp.sum(jnp.exp(2 * log_weights)))


def _systematic(rng_key: Array, log_weights: Array) -> Array:
    """Indices of equally weighted particles."""
    num = len(log_weights)
    places = (jnp.arange(num) + jax.random.uniform(rng_key)) / num
    cumulative = jnp.cumsum(jnp.exp(log_weights))
    return jnp.searchsorted(cumulative / cumulative[-1], places).clip(0, num - 1)


@jax.jit
def equally_weighted(rng_key: Array, result: Result) -> Array:
    """The particles, resampled."""
    return result.particles[_systematic(rng_key, result.log_weights)]
