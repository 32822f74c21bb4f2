r"""The last step, :math:`p(x_0 \mid x_1)`: by the kernel (the paper), by the network, or over integer levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IdentityTransform,
    IndependentTransform,
    Transform,
)

from pp_diffusion.checks import positive_int
from pp_diffusion.data_space import DataSpace
from pp_diffusion.frozen import Frozen
from pp_diffusion.kernels import Kernel
from pp_diffusion.kernels.base import base_of
from pp_diffusion.levels import Levels
from pp_diffusion.schedules import Rates

#: From :math:`x_t` and a step's rates to the network's distribution of :math:`x_{t-1}`.
Reverse = Callable[[Array, Rates], dist.Distribution]


class LastStep(Frozen):
    """Base class: what the last step answers."""

    #: Its name, as :class:`~pp_diffusion.Diffusion` takes it.
    name: ClassVar[str]
    #: Index of the first step that the network describes.
    first_network_step: ClassVar[int] = 0

    def bound(self, kernel: Kernel, transform: Transform | None) -> LastStep:
        """For these data.

        :raises ValueError: naming ``last_step``, if it does not go with them.
        """
        return self

    def space(self, kernel: Kernel, transform: Transform | None) -> DataSpace:
        """Where the data live."""
        return DataSpace(kernel, transform)

    def law(self, kernel: Kernel, rates: Rates, reverse: Reverse, x_1: Array) -> dist.Distribution:
        r""":math:`p(x_0 \mid x_1)`, in the model's space; ``rates`` are those of t = 1."""
        return reverse(x_1, rates)

    def fixed_term(self, rng_key: Array, kernel: Kernel, rates: Rates, x_0: Array) -> Array:
        r"""What is known of :math:`E \log p(x_0 \mid x_1)` without the network, in nats, of batch shape or a scalar."""
        return jnp.zeros(())

    def cost(self, kernel: Kernel, rates: Rates, reverse: dist.Distribution, x_1: Array, x_0: Array) -> Array:
        r""":math:`-\log p(x_0 \mid x_1)`, and with it whatever has the mean :meth:`fixed_term`.

        :param reverse: the network's distribution at ``x_1``.
        """
        return -reverse.log_prob(x_0)

    def entropy(self, kernel: Kernel, law: dist.Distribution) -> Array:
        """The entropy of :meth:`law`, in nats."""
        return kernel.entropy(law)

    def entropy_bounds(self, kernel: Kernel, lower: Array, upper: Array) -> tuple[Array, Array]:
        """The bounds of eq. 24 for all steps, of which the last step's are put right."""
        return lower, upper


class ByKernel(LastStep):
    r""":math:`T_\pi(x_0 \mid x_1; \beta_1)`, as in the paper: the network is not called at t = 1."""

    name = "kernel"
    first_network_step = 1

    def law(self, kernel: Kernel, rates: Rates, reverse: Reverse, x_1: Array) -> dist.Distribution:
        return kernel.transition(x_1, rates.beta)

    def fixed_term(self, rng_key: Array, kernel: Kernel, rates: Rates, x_0: Array) -> Array:
        return kernel.expected_last_step(rng_key, x_0, rates)


class ByNetwork(LastStep):
    """By the network, at t = 1 as at the others.

    For continuous data the kernel's step is a baseline: it keeps the noise of a t = 1 that is drawn now and then small.
    For discrete data there is none, because there the kernel pays for rare flips at t = 1 that the network undoes.
    """

    name = "network"

    def fixed_term(self, rng_key: Array, kernel: Kernel, rates: Rates, x_0: Array) -> Array:
        return jnp.zeros(()) if kernel.is_discrete else kernel.expected_last_step(rng_key, x_0, rates)

    def cost(self, kernel: Kernel, rates: Rates, reverse: dist.Distribution, x_1: Array, x_0: Array) -> Array:
        cost = -reverse.log_prob(x_0)
        return cost if kernel.is_discrete else cost + kernel.transition(x_1, rates.beta).log_prob(x_0)


class Discretized(LastStep, saved_as="Discretized"):
    r"""For integers 0…L − 1 in data units: the probability of each level under the network's normal at t = 1.

    A level's probability is the normal's over an interval of width 1 about it; the first and the last level take the
    tails too. Likelihoods are probabilities, not densities: K and log p need no dequantisation, and
    ``ppd.units.bits_per_dim`` reads them as they are. The transform has to be affine, entry by entry, such as
    :func:`~pp_diffusion.standardize`: it moves the levels into the model's space.

    ``last_step="discretized"`` is ``Discretized(256)``. The prior's draws are integers. Entries that never change are
    allowed. :class:`~pp_diffusion.SMC` and :class:`~pp_diffusion.TrajectoryReparam` need a continuous prior.

    :param levels: L, at least 2.

    .. doctest::

        >>> import jax, jax.numpy as jnp, pp_diffusion as ppd
        >>> diffusion = ppd.Diffusion(
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(5), lambda x_t, t: (0 * x_t, 0 * x_t),
        ...     last_step=ppd.Discretized(4), transform=ppd.standardize(jnp.array([[0, 3], [1, 2], [3, 0]])),
        ... )
        >>> diffusion.prior({}).sample(jax.random.key(0), (3,)).dtype.name
        'int32'
    """

    name = "discretized"
    data_fields = ("low", "width")

    levels: int
    low: Array | None
    width: Array | None

    def __init__(self, levels: int = 256) -> None:
        if positive_int("levels", levels) < 2:
            raise ValueError(f"levels must be at least 2; got {levels}")
        self._set(levels=int(levels), low=None, width=None)

    def bound(self, kernel: Kernel, transform: Transform | None) -> Discretized:
        if not isinstance(base_of(kernel.stationary()), dist.Normal):
            raise ValueError(
                f"last_step must be 'kernel' or 'network' for a {type(kernel).__name__}: 'discretized' needs "
                "steps that are normal"
            )
        if not _is_affine(transform):
            raise ValueError(
                "transform must be affine, entry by entry, for last_step='discretized', such as ppd.standardize(data); "
                f"got {type(transform).__name__}"
            )
        with jax.ensure_compile_time_eval():
            ends = kernel.as_state(jnp.stack([jnp.zeros(kernel.event_shape), jnp.ones(kernel.event_shape)]))
            low, second = ends if transform is None else transform._inverse(ends)
        return self.replace(low=low, width=second - low)

    def space(self, kernel: Kernel, transform: Transform | None) -> DataSpace:
        return LevelSpace(kernel, transform, self)

    def law(self, kernel: Kernel, rates: Rates, reverse: Reverse, x_1: Array) -> dist.Distribution:
        return self.over_levels(reverse(x_1, rates))

    def cost(self, kernel: Kernel, rates: Rates, reverse: dist.Distribution, x_1: Array, x_0: Array) -> Array:
        return -self.over_levels(reverse).log_prob(x_0)

    def entropy(self, kernel: Kernel, law: dist.Distribution) -> Array:
        return kernel.sum_events(base_of(law).entropy())

    def entropy_bounds(self, kernel: Kernel, lower: Array, upper: Array) -> tuple[Array, Array]:
        # H(X_0 | X_1) of integers is not negative, and at most that of even levels
        return lower.at[0].set(0.0), upper.at[0].set(math.prod(kernel.event_shape) * math.log(self.levels))

    def over_levels(self, normal: dist.Distribution) -> dist.Distribution:
        """The probabilities of the levels' states under a normal over states."""
        base = base_of(normal)
        return Levels(base.loc, base.scale, self.levels, self.low, self.width).to_event(normal.event_dim)


class LevelSpace(DataSpace):
    """Integers 0…L − 1, which have probabilities: no Jacobian."""

    data_fields = ("kernel", "transform", "last_step")

    last_step: Discretized

    def __init__(self, kernel: Kernel, transform: Transform | None, last_step: Discretized) -> None:
        self._set(kernel=kernel, transform=transform, last_step=last_step)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(
            constraints.integer_interval(0, self.last_step.levels - 1), self.kernel.event_ndim
        )

    def to_data(self, z: Array) -> Array:
        return jnp.round(super().to_data(z)).astype(int)

    def law(self, distribution: dist.Distribution) -> dist.Distribution:
        return base_of(distribution).as_levels().to_event(distribution.event_dim)

    def log_abs_det(self, z: Array, x: Array) -> Array:
        return jnp.zeros(z.shape[: z.ndim - self.kernel.event_ndim])

    def null_log_prob(self, z: Array) -> Array:
        return self.last_step.over_levels(self.kernel.stationary()).log_prob(z)

    def check_values(self, values: np.ndarray, name: str) -> None:
        last = self.last_step.levels - 1
        inside = (values >= 0) & (values <= last) & (values == np.round(values))
        if not inside.all():
            raise ValueError(
                f"{name} must be integers 0…{last} for last_step='discretized'; it holds {values[~inside].flat[0]}"
            )


#: By name, as :class:`~pp_diffusion.Diffusion` takes them.
LAST_STEPS: dict[str, Callable[[], LastStep]] = {cls.name: cls for cls in (ByKernel, ByNetwork, Discretized)}


def as_last_step(last_step: str | LastStep) -> LastStep:
    """The last step of this name, or as it is.

    :raises ValueError: naming the argument.
    """
    if isinstance(last_step, LastStep):
        return last_step
    if not isinstance(last_step, str) or last_step not in LAST_STEPS:
        raise ValueError(
            "last_step must be 'kernel' or 'network', or for integer data 'discretized' (of 256 levels) or "
            f"ppd.Discretized(levels); got {last_step!r}"
        )
    return LAST_STEPS[last_step]()


def _is_affine(transform: Transform | None) -> bool:
    """Whether it is affine, entry by entry."""
    if isinstance(transform, ComposeTransform):
        return all(map(_is_affine, transform.parts))
    if isinstance(transform, IndependentTransform):
        return _is_affine(transform.base_transform)
    return transform is None or isinstance(transform, (AffineTransform, IdentityTransform))
