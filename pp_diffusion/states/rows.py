"""Many observations: told by as many numbers as x has, or by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.matrices import cholesky, einsum, solve_lower
from pp_diffusion.states.normal import DiagonalProposal
from pp_diffusion.states.outlook import Outlook
from pp_diffusion.states.space import BATCH_NDIM, flattened

#: By so many numbers at most, x times observations, many observations are told by fewer.
MOST_ENTRIES = 2**14
#: Random directions along which variances of more observations than that are found.
NUM_PROBES = 16
#: Steps of conjugate gradients for their means.
NUM_GRADIENTS = 6


class Rows(NamedTuple):
    """K numbers observed, each with noise of its own: y = h(x) + N(0, E), with gradients H at m by products only.

    :ivar e: y - h(m), shape ``(P, C, S, K)``.
    :ivar E: the noise's variances.
    :ivar h: of states, what is observed.
    :ivar pull: products with the transpose of H, of the states' shape.
    """

    e: Array
    E: Array
    h: Callable[[Array], Array]
    pull: Callable[[Array], Array]

    @property
    def number(self) -> int:
        return int(self.e.shape[-1])


def fit_coordinates(num_rows: int, num_known: int, size: int, most_rows: int) -> bool:
    """Whether more rows than that can be told by no more numbers than x has, as the many of a regression."""
    return size + num_known <= most_rows and (num_rows - num_known) * size <= MOST_ENTRIES


def in_coordinates(outlook: Outlook, rows: Rows, num_known: int) -> tuple[Rows, Array, Array]:
    r"""As many noisy observations as there are coordinates, which say all that K do: of :math:`L^\top x_0`, with unit
    noise, for :math:`L L^\top = H^\top E^{-1} H`. What is known exactly follows, as it is.

    Also what is left of the log density, which depends on the residuals alone, and the K variances.
    """
    shape = outlook.m.shape
    size, num_noisy = math.prod(shape[BATCH_NDIM:]), rows.number - num_known
    basis = jnp.eye(size, dtype=rows.E.dtype).reshape(size, *(1,) * BATCH_NDIM, *shape[BATCH_NDIM:])
    _, push = jax.linearize(rows.h, outlook.m)
    H = jax.vmap(push)(jnp.broadcast_to(basis, (size, *shape)))  # its columns
    S = rows.E + einsum("d...k,...d->...k", H**2, flattened(outlook.variance))
    e, E, H = rows.e[..., :num_noisy], rows.E[..., :num_noisy], H[..., :num_noisy]
    information = einsum("d...k,e...k->...de", H / E, H)
    least = 1e-6 * jnp.trace(information, axis1=-2, axis2=-1)[..., None, None] / size  # of what none of them shows
    root = cholesky(information + (least + jnp.finfo(E.dtype).tiny) * jnp.eye(size, dtype=E.dtype))
    told = solve_lower(root, einsum("d...k,...k->...d", H, e / E))
    log_rest = 0.5 * ((told**2).sum(-1) - (e**2 / E + jnp.log(2 * math.pi * E)).sum(-1))
    log_rest += 0.5 * size * math.log(2 * math.pi)

    def pull(v: Array) -> Array:
        of_known = jnp.concatenate([jnp.zeros((*shape[:BATCH_NDIM], num_noisy), v.dtype), v[..., size:]], -1)
        return einsum("...de,...e->...d", root, v[..., :size]).reshape(shape) + rows.pull(of_known)

    few = rows._replace(
        e=jnp.concatenate([told, rows.e[..., num_noisy:]], -1),
        E=jnp.concatenate([jnp.ones_like(told), rows.E[..., num_noisy:]], -1),
        pull=pull,
    )
    return few, log_rest, S


def by_gradients(outlook: Outlook, rows: Rows, gradient: Array | None) -> tuple[Array, Array, DiagonalProposal]:
    """The log density of the observations, their variances, and the step given them.

    The mean by a few steps of conjugate gradients, each with one product with C; variances row by row and coordinate by
    coordinate. That is exact where each coordinate is observed by itself and C is diagonal.

    :param gradient: of what else there is.
    """
    _, push = jax.linearize(rows.h, outlook.m)
    S, kept = _variances(outlook.variance, rows, push)

    def product(v: Array) -> Array:
        return rows.E * v + push(outlook.C(rows.pull(v)))

    weights = _conjugate_gradients(product, rows.e, S)
    log_density = -0.5 * ((rows.e * weights).sum(-1) + jnp.log(2 * math.pi * S).sum(-1))
    along = rows.pull(weights) if gradient is None else gradient + rows.pull(weights)
    return log_density, S, outlook.shifted(along, outlook.narrowed(kept))


def _variances(variance: Array, rows: Rows, push: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Each observation's, and the share of each coordinate's that they leave of it."""
    keys, ones = jax.random.split(jax.random.key(0)), (slice(None), *(None,) * BATCH_NDIM)
    signs = jax.random.rademacher(keys[0], (NUM_PROBES, *variance.shape[BATCH_NDIM:]), variance.dtype)[ones]
    S = rows.E + (jax.vmap(push)(signs * jnp.sqrt(variance)) ** 2).mean(0)
    # of each coordinate's variance, what its rows explain if each of them did so by itself
    signs = jax.random.rademacher(keys[1], (NUM_PROBES, rows.number), variance.dtype)[ones]
    explained = jax.vmap(rows.pull)(signs / jnp.sqrt(S)) ** 2 * variance
    low, share, high = explained.min(0), explained.mean(0), explained.max(0)
    # the signs do not matter to a single row; several may say the same, and too narrow a step is worse than a wide one
    return S, jnp.where(high - low <= 1e-3 * high, 1 - share, jnp.maximum(1 / (1 + share), 0.5))


def _conjugate_gradients(product: Callable[[Array], Array], target: Array, diagonal: Array) -> Array:
    """A few steps towards the solution v of ``product(v) = target``, for many at once; vectors in the last axis."""

    def step(_: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        v, left, direction, square = carry
        turned = product(direction)
        # a network's covariance need not be positive: a step is at most so much longer than the diagonal's
        least = (diagonal * direction**2).sum(-1) / 20
        length = square / jnp.maximum(jnp.maximum((direction * turned).sum(-1), least), jnp.finfo(v.dtype).tiny)
        v, left = v + length[..., None] * direction, left - length[..., None] * turned
        scaled = left / diagonal
        next_square = (left * scaled).sum(-1)
        ratio = jnp.where(square > 0, next_square / jnp.where(square > 0, square, 1.0), 0.0)
        return v, left, scaled + ratio[..., None] * direction, next_square

    start = target / diagonal
    carry = (jnp.zeros_like(target), target, start, (target * start).sum(-1))
    return jax.lax.fori_loop(0, NUM_GRADIENTS, step, carry)[0]
