r"""Where a step leads: the normal distribution N(m, C) of what is predicted, and how :math:`x_{t-1}` hangs on it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.matrices import cholesky, einsum
from pp_diffusion.states.normal import DiagonalProposal
from pp_diffusion.states.space import BATCH_NDIM, Likelihood, Prediction, flattened, in_one_axis

#: The share of the variance that positive matrices have to keep in any direction.
LEAST_VARIANCE = 1e-3


@dataclass(frozen=True)
class Outlook:
    r"""A normal distribution of what is predicted, and the step to :math:`x_{t-1}`.

    :ivar m: its mean, shape ``(P, C, S, *state_shape)``.
    :ivar variance: its variances.
    :ivar C: products with its covariance.
    :ivar mean: of :math:`p(x_{t-1} \mid x_t)`.
    :ivar scale: its standard deviations.
    :ivar log_known: log density of coordinates that have been set; shape ``(P, C, S)``.
    """

    m: Array
    variance: Array
    C: Callable[[Array], Array]
    mean: Array
    scale: Array
    log_known: Array

    def knowing(self, r: Likelihood) -> tuple[Outlook, Likelihood]:
        """With what is known exactly set, where the step arrives there, and r without it."""
        return self, r

    @abstractmethod
    def noise_along(self, gradient: Array) -> Array:
        """How the step's noise moves with what is predicted, when that moves along C times a gradient."""

    @abstractmethod
    def trusted(self, H: Array, CH: Array, HCH: Array, E: Array) -> tuple[Array, Array]:
        """CH and HCH as far as E + HCH is positive."""

    @abstractmethod
    def gain(self, H: Array, CH: Array) -> Array:
        """G, the covariance of the observations with the step's standard normal noise."""

    @abstractmethod
    def limit(self, G: Array, HCH: Array, E: Array) -> tuple[Array, Array]:
        """The share of G that the step can bear, shape ``(P, C, S, 1)``, and the Cholesky factor of what it leaves."""

    @abstractmethod
    def narrowed(self, kept: Array) -> Array:
        """The step's standard deviations, in its own, where this share of each variance of x_0 is kept."""

    def shift(self, gradient: Array) -> Array:
        """The step's shift along a gradient, in its standard deviations, at most about as long as its noise is."""
        shift = self.noise_along(gradient)
        axes = tuple(range(BATCH_NDIM, shift.ndim))
        length = jnp.sqrt((shift**2).sum(axes, keepdims=True))
        most = 2 * math.sqrt(math.prod(shift.shape[BATCH_NDIM:])) + 2
        shift = jnp.where(jnp.isfinite(length), shift * jnp.minimum(1, most / jnp.maximum(length, 1e-9)), 0.0)
        return flattened(shift)

    def shifted(self, gradient: Array, spread: Array | None = None) -> DiagonalProposal:
        """The step shifted along a gradient by what is predicted (eq. 61)."""
        mean, scale, shift = flattened(self.mean), flattened(self.scale), self.shift(gradient)
        return DiagonalProposal(
            mean, scale, shift, jnp.ones_like(mean) if spread is None else flattened(spread), self.log_known
        )


@dataclass(frozen=True)
class Onward(Outlook):
    r""":math:`x_0` is predicted by Tweedie's moments, and the mean of :math:`x_{t-1}` moves with it by a slope."""

    slope: Array

    @classmethod
    def of(cls, prediction: Prediction) -> Onward:
        step = prediction.reverse
        return cls(
            prediction.x_0,
            prediction.variance,
            prediction.covariance,
            step.mean,
            jnp.sqrt(step.variance),
            _nothing_known(prediction.x_0),
            prediction.slope,
        )

    def noise_along(self, gradient: Array) -> Array:
        return self.slope * self.C(gradient) / self.scale

    def trusted(self, H: Array, CH: Array, HCH: Array, E: Array) -> tuple[Array, Array]:
        """By the Jacobian as far as it is positive, and else by the variances, with which all is."""
        return in_one_axis(_trusted, H, CH, HCH, E, flattened(self.variance)[..., None, :])

    def gain(self, H: Array, CH: Array) -> Array:
        return self.slope * CH / flattened(self.scale)[..., None, :]

    def limit(self, G: Array, HCH: Array, E: Array) -> tuple[Array, Array]:
        return in_one_axis(_limited, G, HCH, E)

    def narrowed(self, kept: Array) -> Array:
        taken = self.slope**2 * self.variance * (1 - kept) / self.scale**2
        return jnp.sqrt(jnp.clip(1 - taken, LEAST_VARIANCE, 1.0))


@dataclass(frozen=True)
class Arrival(Outlook):
    r""":math:`x_{t-1}` itself is what is predicted: at the last step, at the start, and for twists of the state."""

    @classmethod
    def of(cls, step: dist.Distribution) -> Arrival:
        mean, variance = step.mean, step.variance
        return cls(mean, variance, lambda v: variance * v, mean, jnp.sqrt(variance), _nothing_known(mean))

    def knowing(self, r: Likelihood) -> tuple[Outlook, Likelihood]:
        mean, scale = flattened(self.mean), flattened(self.scale)
        at = jnp.broadcast_to(r.where, (*mean.shape[:BATCH_NDIM], r.num_known))
        step = dist.Normal(jnp.take_along_axis(mean, at, -1), jnp.take_along_axis(scale, at, -1), validate_args=False)
        log_known = jnp.where(r.counts, step.log_prob(r.value), 0.0).sum(-1)
        system = jnp.arange(len(r.where))[:, None]
        to_set = jnp.where(r.counts, r.where, mean.shape[-1])  # what does not count is written nowhere
        mean = mean.at[:, :, system, to_set].set(r.value, mode="drop").reshape(self.mean.shape)
        scale = scale.at[:, :, system, to_set].set(0.0, mode="drop").reshape(self.scale.shape)
        variance = scale**2
        known = replace(
            self, m=mean, variance=variance, C=lambda v: variance * v, mean=mean, scale=scale, log_known=log_known
        )
        return known, r.without_known()

    def noise_along(self, gradient: Array) -> Array:
        return self.scale * gradient

    def trusted(self, H: Array, CH: Array, HCH: Array, E: Array) -> tuple[Array, Array]:
        return CH, HCH

    def gain(self, H: Array, CH: Array) -> Array:
        return H * flattened(self.scale)[..., None, :]  # which may be zero

    def limit(self, G: Array, HCH: Array, E: Array) -> tuple[Array, Array]:
        return jnp.ones((*G.shape[:BATCH_NDIM], 1), G.dtype), in_one_axis(cholesky, E)

    def narrowed(self, kept: Array) -> Array:
        return jnp.sqrt(jnp.clip(kept, 1e-6, 1.0))


def _nothing_known(x: Array) -> Array:
    return jnp.zeros(x.shape[:BATCH_NDIM], x.dtype)


def _trusted(H: Array, CH: Array, HCH: Array, E: Array, variance: Array) -> tuple[Array, Array]:
    """CH and HCH, mixed with what the variances make of them as far as the Jacobian cannot be trusted. That costs as
    much as all the rest, and is seldom needed."""
    HCH = 0.5 * (HCH + jnp.swapaxes(HCH, -1, -2))
    diagonal = jnp.maximum(jnp.diagonal(HCH, axis1=-2, axis2=-1), 0.0)
    floor = LEAST_VARIANCE * (E + diagonal[..., None] * jnp.eye(HCH.shape[-1], dtype=HCH.dtype))
    whole = ~jnp.isnan(cholesky(E + HCH - floor)).any((-2, -1), keepdims=True)

    def mixed() -> tuple[Array, Array]:
        least = einsum("...kd,...ld->...kl", H, H * variance)
        part = _largest(lambda t: E + t * HCH + (1 - t) * least - LEAST_VARIANCE * (E + least))
        trust = jnp.where(whole, 1.0, jnp.minimum(part, 0.6))
        return trust * HCH + (1 - trust) * least, trust

    HCH, trust = jax.lax.cond(whole.all(), lambda: (HCH, whole.astype(HCH.dtype)), mixed)
    return trust * CH + (1 - trust) * H * variance, HCH


def _limited(G: Array, HCH: Array, E: Array) -> tuple[Array, Array]:
    """The share of G that leaves S - G G' positive, and the Cholesky factor of that."""
    GG = einsum("...kd,...ld->...kl", G, G)
    share = _largest(lambda t: E + (1 - LEAST_VARIANCE) * HCH - t**2 * GG)
    return share[..., 0], cholesky(E + HCH - share**2 * GG)


def _largest(matrix: Callable[[Array | float], Array]) -> Array:
    """The largest t of 1, .6 and 0 for which ``matrix(t)`` is positive, of shape ``(…, 1, 1)``."""
    whole, part = (jnp.isnan(cholesky(matrix(t))).any((-2, -1), keepdims=True) for t in (1.0, 0.6))
    return jnp.where(whole, jnp.where(part, 0.0, 0.6), 1.0)
