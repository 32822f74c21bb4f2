r"""Observed sites, one class for each kind of them: which sites are of it, and what is read off one.

A kind of one's own is a subclass of :class:`Kind` in front of :data:`KINDS`.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.frozen import Frozen
from pp_diffusion.matrices import einsum, half_log_det, solve_lower
from pp_diffusion.posterior.messages import (
    Message,
    base_of,
    entry_weights_of,
    log_prob_of,
    value_of,
    weights_of,
)
from pp_diffusion.posterior.systems import Layout
from pp_diffusion.states import Words

LOG_2_PI = math.log(2 * math.pi)


class NormalPart(NamedTuple):
    """A site's observations as normal ones, y = h(x) + noise.

    :ivar residual: y − h(x), of the value's shape; zero where masked.
    :ivar noise: the noise's variances, of the same shape: normal observations are whitened.
    :ivar correction: the site's log density less the normal one of the residuals, by mask and scale; of the batch
        shape, and axes after it.
    :ivar discrepancy: the same per residual, where a density is taken for a normal one.
    """

    residual: Array
    noise: Array
    correction: Array
    discrepancy: Array


class ExactPart(NamedTuple):
    """What is observed without noise, in arrays of the value's shape.

    :ivar shown: of x.
    :ivar value: the observed value.
    :ivar weight: how often it counts; zero where masked.
    :ivar log_density: the Delta's own, which must be zero; of the batch shape.
    """

    shown: Array
    value: Array
    weight: Array
    log_density: Array


class SitePart(NamedTuple):
    """What is read off an observed site at some x and latents, in nats. All arrays have the batch shape in front.

    :ivar log_prob: the site's log density, as scaled and masked, of the batch shape.
    :ivar elements: per number observed, where it comes so; their sum is that of ``log_prob``.
    :ivar normal: of the kinds that are normal, or taken for it.
    :ivar exact: of exact observations.
    """

    log_prob: Array
    elements: Array | None = None
    normal: NormalPart | None = None
    exact: ExactPart | None = None


class Kind(Frozen):
    """Base class of kinds of observed sites: of any density, which a twist averages over draws.

    :cvar is_normal_form: whether its numbers are among the residuals of normal observations.
    :cvar is_exact: whether it shows numbers of x without noise.
    :cvar is_averaged: whether it has no form of its own.
    :cvar is_single: whether its density is that of single numbers, each of which depends on a line in x, as a rule.
    :cvar is_constant: whether it depends on nothing.
    """

    is_normal_form: ClassVar[bool] = False
    is_exact: ClassVar[bool] = False
    is_averaged: ClassVar[bool] = False
    is_single: ClassVar[bool] = False
    is_constant: ClassVar[bool] = False

    @classmethod
    def matches(cls, message: Message) -> bool:
        """Whether a site, as a run of the model has it, is of this kind."""
        raise NotImplementedError

    def read(self, message: Message) -> SitePart:
        """What such a site says."""
        return SitePart(log_prob_of(message))

    def elements(self, part: SitePart) -> Array | None:
        """The log densities of single numbers; ``None`` where they do not come so."""
        return part.elements

    @property
    def has_values(self) -> bool:
        """Whether something is observed there, which a report can show."""
        return True

    @property
    def has_log_likelihood(self) -> bool:
        """Whether a report can show its log density, too."""
        return self.has_values and not self.is_exact

    def rule(self, words: Words) -> str:
        """What the moment twist makes of it, in the state space's words."""
        return words.normal if self.is_normal_form else words.averaged


class Normal(Kind):
    """Independent normal noise."""

    is_normal_form = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        return isinstance(base_of(message), dist.Normal)

    def read(self, message: Message) -> SitePart:
        base, value = base_of(message), value_of(message)
        weights, used = _used(message, value.shape)
        # in the noise's own unit, whose square float32 may not hold
        residual = (jnp.where(used, value, 0.0) - base.loc) / base.scale
        normal = as_normal(message, residual, jnp.zeros(()), jnp.ones(()))
        correction = normal.correction - jnp.where(used, weights * jnp.log(base.scale), 0.0)
        return SitePart(log_prob_of(message), log_prob_elements(message), normal._replace(correction=correction))


class Curved(Normal):
    """Normal noise around what is not linear in x, or of a size that depends on x."""

    is_single = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        return False  # one run does not say

    def rule(self, words: Words) -> str:
        return words.curved


class MultivariateNormal(Kind):
    """Correlated normal noise, whitened."""

    is_normal_form = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        return isinstance(base_of(message), dist.MultivariateNormal)

    def read(self, message: Message) -> SitePart:
        base, value = base_of(message), value_of(message).astype(float)
        weights, used = _used(message, value.shape[:-1])
        n, root = value.shape[-1], jnp.broadcast_to(base.scale_tril, (*value.shape, value.shape[-1]))
        constant = 0.5 * n * LOG_2_PI
        correction = constant - 0.5 * n * jnp.log(weights) - weights * (constant + half_log_det(root))
        correction = jnp.where(used, correction, constant)
        # by the inverse, of which there is one for all particles as a rule
        inverse = solve_lower(root[..., None, :, :], jnp.eye(n, dtype=root.dtype))  # transposed
        residual = einsum("...ji,...j->...i", inverse, jnp.where(used[..., None], value - base.loc, 0.0))
        noise = jnp.broadcast_to(1 / weights[..., None], value.shape)
        # not by NumPyro's own density, whose LAPACK calls would be in a compiled loop
        log_prob = correction - 0.5 * (residual**2 / noise + jnp.log(2 * math.pi * noise)).sum(-1)
        return SitePart(log_prob, None, NormalPart(residual, noise, correction, jnp.zeros_like(residual)))


class Exact(Kind):
    """Numbers that are observed without noise: a Delta."""

    is_exact = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        return isinstance(base_of(message), dist.Delta)

    def read(self, message: Message) -> SitePart:
        base, value, weight = base_of(message), value_of(message), entry_weights_of(message)
        log_prob = jnp.where(base.v == value, 0.0, -jnp.inf)
        log_density = jnp.broadcast_to(base.log_density, value.shape[: value.ndim - base.event_dim])
        exact = ExactPart(jnp.broadcast_to(base.v, value.shape), value, weight, log_density)
        return SitePart(log_prob_of(message), jnp.where(weight > 0, weight * log_prob, 0.0), exact=exact)

    def rule(self, words: Words) -> str:
        return words.exact


class Factor(Kind):
    """A factor: ``numpyro.factor``."""

    is_averaged = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        return isinstance(base_of(message), dist.Unit)

    @property
    def has_values(self) -> bool:
        return False


class Moments(Kind):
    """Independent noise that has a mean and a variance, and may be taken for normal. Not that of angles, which go
    round."""

    is_normal_form = True
    is_single = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        base = base_of(message)
        if base.event_dim or base.support is dist.constraints.circular:
            return False
        try:
            mean, variance = np.asarray(base.mean), np.asarray(base.variance)
        except NotImplementedError:
            return False
        return bool(np.isfinite(mean).all() and np.isfinite(variance).all() and (variance > 0).all())

    def read(self, message: Message) -> SitePart:
        base, value = base_of(message), value_of(message)
        weights, used = _used(message, value.shape)
        normal = as_normal(message, value, base.mean, base.variance)
        # all that is not normal is a discrepancy of the single numbers
        density = -0.5 * (jnp.log(2 * math.pi * normal.noise) + normal.residual**2 / normal.noise)
        inside = jnp.where(used, value, base.support.feasible_like(jnp.zeros(value.shape)))
        discrepancy = jnp.where(used, weights * base.log_prob(inside) - density, 0.0)
        correction = jnp.where(used, 0.0, 0.5 * LOG_2_PI)
        normal = normal._replace(discrepancy=discrepancy, correction=correction)
        return SitePart(log_prob_of(message), log_prob_elements(message), normal)

    def rule(self, words: Words) -> str:
        return words.moments


class Single(Kind):
    """Independent real numbers of any other density."""

    is_averaged = True
    is_single = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        base = base_of(message)
        return not base.event_dim and not base.support.is_discrete

    def read(self, message: Message) -> SitePart:
        return SitePart(log_prob_of(message), log_prob_elements(message))

    def rule(self, words: Words) -> str:
        return words.numbers


class Other(Kind):
    """Any density."""

    is_averaged = True

    @classmethod
    def matches(cls, message: Message) -> bool:
        return True


class Constant(Kind):
    """A site that depends on nothing, whatever its distribution: part of the evidence still.

    :param kind: which it would be of.
    """

    is_constant = True
    kind: Kind

    def __init__(self, kind: Kind) -> None:
        self._set(kind=kind)

    @classmethod
    def matches(cls, message: Message) -> bool:
        return False  # one run does not say

    def read(self, message: Message) -> SitePart:
        return self.kind.read(message)

    def elements(self, part: SitePart) -> Array:
        return part.log_prob

    @property
    def has_values(self) -> bool:
        return self.kind.has_values

    def rule(self, words: Words) -> str:
        return words.constant


#: The kinds, of which the first that matches a site is its own.
KINDS: list[type[Kind]] = [Normal, MultivariateNormal, Exact, Factor, Moments, Single, Other]


def kind_of(message: Message) -> Kind:
    """The kind of an observed site."""
    return next(kind for kind in KINDS if kind.matches(message))()


class Site(NamedTuple):
    """An observed site: what is fixed of it.

    :ivar size: how many numbers of one system are observed there.
    """

    name: str
    kind: Kind
    layout: Layout
    size: int

    def split(self, part: SitePart, systems: int) -> SitePart:
        """The parts of each system by itself, in arrays of shape ``(S, n)``."""
        return jax.tree.map(lambda a: self.layout.split(a).reshape(systems, -1), part)


def as_normal(message: Message, value: Array, mean: Array, variance: Array) -> NormalPart:
    """Independent numbers as normal ones with this mean and variance, of the site's mask and scale."""
    weights, used = _used(message, value.shape)
    value, variance = value.astype(float), jnp.broadcast_to(variance, value.shape)
    residual = jnp.where(used, jnp.where(used, value, 0.0) - mean, 0.0)  # a masked NaN must not reach a gradient
    log_normalizer = jnp.log(2 * math.pi * variance)
    correction = 0.5 * (log_normalizer - jnp.log(weights)) - 0.5 * weights * log_normalizer
    correction = jnp.where(used, correction, 0.5 * LOG_2_PI)
    noise = jnp.where(used, variance / weights, 1.0)
    return NormalPart(residual, noise, correction, jnp.zeros(value.shape))


def log_prob_elements(message: Message) -> Array:
    """The log density of each number observed, as scaled and masked."""
    value = value_of(message)
    weights, used = _used(message, value.shape)
    inside = jnp.where(used, value, base_of(message).support.feasible_like(value))
    return jnp.where(used, weights * jnp.broadcast_to(base_of(message).log_prob(inside), value.shape), 0.0)


def _used(message: Message, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """How often each entry of the base's batch shape counts, 1 where it does not, and whether it does."""
    weights = jnp.broadcast_to(weights_of(message), shape)
    return jnp.where(weights > 0, weights, 1.0), weights > 0
