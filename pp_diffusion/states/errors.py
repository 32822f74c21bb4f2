r"""How far Tweedie's covariance can be trusted, by the errors of predictions.

For a draw :math:`x_0` and :math:`x_t \sim q(x_t \mid x_0)`, the error :math:`x_0 - E[x_0 \mid x_t]` has the covariance
:math:`C(x_t)`, so that :math:`(s^\top \mathrm{error})^2 / s^\top C s` is one on average, for any direction s. A trained
network's Jacobian at low signal-to-noise ratio is noise, and fails that by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from pp_diffusion.matrices import einsum
from pp_diffusion.states.space import BATCH_NDIM, Prediction, flattened

#: Random directions along which errors are compared.
NUM_DIRECTIONS = 2
#: Where errors are larger than this, as variances by the Jacobian, their own covariance takes its place.
LARGEST_RATIO = 1.5
#: Up to so many numbers of a state, errors' whole covariance is kept; above, their variances.
MOST_NUMBERS = 128


class Errors(NamedTuple):
    """Of predictions at a step.

    :ivar ratio: of their squares to what the Jacobian says; one where it is right.
    :ivar covariance: theirs, over all draws, shape ``(D, D)``; or variances, ``(D,)``.
    """

    ratio: Array
    covariance: Array


def errors(prediction: Prediction, x_0: Array, rng_key: Array) -> Errors:
    """Of a prediction at :math:`x_t` of draws :math:`x_0`, shape ``(M, C, S, *state_shape)``."""
    error = flattened(x_0 - prediction.x_0)
    size, count = error.shape[-1], error.size // error.shape[-1]
    floor = 1e-3 * flattened(prediction.variance).sum(-1) + jnp.finfo(error.dtype).tiny

    def along(direction: Array) -> Array:
        of_jacobian = (direction * flattened(prediction.covariance(_like(direction, x_0)))).sum(-1)
        return jnp.mean(einsum("...d,d->...", error, direction) ** 2 / jnp.maximum(of_jacobian, floor))

    directions = jax.random.rademacher(rng_key, (NUM_DIRECTIONS, size), error.dtype)
    ratio = jax.lax.map(along, directions).mean()
    rows = error.reshape(-1, size)
    if size > MOST_NUMBERS:
        return Errors(ratio, (rows**2).mean(0))
    covariance = einsum("nd,ne->de", rows, rows) / count
    kept = count / (count + size)  # few draws do not know all correlations
    return Errors(ratio, kept * covariance + (1 - kept) * jnp.diag(jnp.diag(covariance)))


def calibrated(prediction: Prediction, found: Errors) -> Prediction:
    """With the errors' own covariance where the Jacobian's is not to be trusted."""
    return prediction._replace(covariance=Partial(_products, found, prediction.covariance))


def _products(found: Errors, by_jacobian: Callable[[Array], Array], v: Array) -> Array:
    if found.covariance.ndim == 1:
        own = found.covariance * flattened(v)
    else:
        own = einsum("de,...e->...d", found.covariance, flattened(v))
    return jnp.where(found.ratio <= LARGEST_RATIO, by_jacobian(v), own.reshape(v.shape))


def _like(direction: Array, x: Array) -> Array:
    return jnp.broadcast_to(direction.reshape(x.shape[BATCH_NDIM:]), x.shape)
