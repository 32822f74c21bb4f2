r"""Probabilities of integer levels under a normal: :math:`P(k) = \Phi((k + \frac12 - \mu)/\sigma) - \Phi(\dots)`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import log_ndtr
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

_NARROW = 0.015  # half-widths in standard deviations below which a level is taken as a piece of the density


class Levels(dist.Distribution):
    """Levels 0…L − 1 with the probabilities that a normal gives to intervals of width 1 about them, edges open.

    Values are points on a line, ``low + level * width``; with 0 and 1 they are the levels themselves.

    :param loc: the normal's mean, and
    :param scale: its standard deviation, on that line.
    :param levels: L.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("loc_of_normal", "scale_of_normal", "low", "width")
    pytree_aux_fields = ("levels",)

    def __init__(
        self, loc: Array, scale: Array, levels: int, low: Any = 0, width: Any = 1, *, validate_args: bool | None = None
    ) -> None:
        # not loc and scale: what takes a distribution for a normal shall fail
        self.loc_of_normal, self.scale_of_normal = jnp.broadcast_arrays(loc, scale)
        self.levels, self.low, self.width = levels, low, width
        super().__init__(self.loc_of_normal.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The levels; of points on another line, all reals, for there the levels are not integers."""
        own = isinstance(self.width, int) and isinstance(self.low, int)
        return constraints.integer_interval(0, self.levels - 1) if own else constraints.real

    def as_levels(self) -> Levels:
        """The law of the level itself."""
        middle, spread = self._in_widths()
        return Levels(middle, spread, self.levels)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws, each on a level."""
        middle, spread = self._in_widths()
        noise = jax.random.normal(key, tuple(sample_shape) + self.batch_shape, jnp.result_type(middle))
        return self.low + self._nearest(middle + spread * noise) * self.width

    @validate_sample
    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """The log of the probability of the level at ``value``."""
        return self._log_mass(self._nearest((value - self.low) / self.width))

    def entropy(self) -> Array:
        """In nats, by a sum over the levels."""

        def add(level: Array, total: Array) -> Array:
            log_p = self._log_mass(level)
            return total - jnp.exp(log_p) * log_p

        return jax.lax.fori_loop(0, self.levels, add, jnp.zeros(self.batch_shape))

    def _in_widths(self) -> tuple[Array, Array]:
        """The normal's mean and scale, in levels."""
        return (self.loc_of_normal - self.low) / self.width, self.scale_of_normal / jnp.abs(self.width)

    def _nearest(self, level: Array) -> Array:
        return jnp.clip(jnp.round(level), 0, self.levels - 1).astype(int)

    def _log_mass(self, level: Array) -> Array:
        middle, spread = self._in_widths()
        distance, half = (level - middle) / spread, 0.5 / spread
        below, above = log_ndtr(distance + half), log_ndtr(half - distance)  # open to the left; to the right
        inside = _log_normal_mass(jnp.abs(distance), half)
        return jnp.where(level == 0, below, jnp.where(level == self.levels - 1, above, inside))


def _log_normal_mass(distance: Array, half: Array) -> Array:
    r""":math:`\log(\Phi(d + h) - \Phi(d - h))` for :math:`d \ge 0`, without cancellation."""
    is_narrow = half < _NARROW
    # a narrow interval: the density times ∫ exp(-d u) du, and the curvature's share
    h = jnp.where(is_narrow, half, _NARROW)
    density = -0.5 * distance**2 - 0.5 * math.log(2 * math.pi)
    narrow = density + jnp.log(2 * h) + _log_sinhc(distance * h) - h**2 / 6
    # a wide one, in the left tail: both ends are small numbers of which one is the smaller
    h = jnp.where(is_narrow, _NARROW, half)
    near, far = log_ndtr(h - distance), log_ndtr(-h - distance)
    ratio = jnp.minimum(far - near, -jnp.finfo(near.dtype).eps)  # of numbers so large that they round, it may be 0
    return jnp.where(is_narrow, narrow, near + jnp.log1p(-jnp.exp(ratio)))


def _log_sinhc(y: Array) -> Array:
    r""":math:`\log(\sinh y / y)` for :math:`y \ge 0`."""
    is_small = y < 0.1
    large = jnp.where(is_small, 1.0, y)
    small = jnp.where(is_small, y, 0.0)
    return jnp.where(
        is_small, small**2 / 6 - small**4 / 180, large + jnp.log1p(-jnp.exp(-2 * large)) - jnp.log(2 * large)
    )
