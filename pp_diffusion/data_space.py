"""Where data live: the states of a kernel, and the transform that gives them their units."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from pp_diffusion.checks import check_complete, check_not_constant, check_numbers, check_precision
from pp_diffusion.frozen import Frozen
from pp_diffusion.kernels import Kernel
from pp_diffusion.transforms import data_support, in_data_units, log_abs_det, on_edge, shape_in_data_units

_MASKED = "A bound with masked values is no bound: impute or drop them, or train on complete rows"


class DataSpace(Frozen):
    """x in data units, z in the model's space.

    :param Kernel kernel: whose states z are.
    :param transform: from z to x; ``None`` where they are the same.
    """

    data_fields: ClassVar[tuple[str, ...]] = ("kernel", "transform")

    kernel: Kernel
    transform: Transform | None

    def __init__(self, kernel: Kernel, transform: Transform | None) -> None:
        self._set(kernel=kernel, transform=transform)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of a datum, of as many axes as a state."""
        return shape_in_data_units(self.transform, self.kernel.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        """The support of a datum, in data units."""
        return data_support(self.kernel.support, self.transform, self.kernel.event_ndim)

    @property
    def is_discrete(self) -> bool:
        """Whether data have probabilities rather than densities."""
        return bool(self.support.is_discrete)

    def to_model(self, x: Array) -> Array:
        """z of x."""
        return x if self.transform is None else self.transform._inverse(x)

    def to_data(self, z: Array) -> Array:
        """x of z."""
        return z if self.transform is None else self.transform(z)

    def law(self, distribution: dist.Distribution) -> dist.Distribution:
        """The law of x where z has this one."""
        return in_data_units(distribution, self.transform)

    def log_abs_det(self, z: Array, x: Array) -> Array:
        """What a log density of x is less than that of z, log |dx/dz|, per datum."""
        return log_abs_det(self.transform, z, x, self.kernel.event_ndim)

    def null_log_prob(self, z: Array) -> Array:
        r""":math:`\log \pi`, the paper's L_null per datum, in data units up to :meth:`log_abs_det`."""
        return self.kernel.null_log_prob(z)

    # --- checks ------------------------------------------------------------------------------------------------

    def check(self, x: Any, name: str = "x") -> Array:
        """``x`` as an array of data, refused where it cannot be one.

        Values are checked where they are known, that is outside transformations.

        :raises ValueError: naming the argument, what came and what was expected.
        """
        if x is None:
            raise ValueError(f"{name} must be data of shape (*batch, {self.event_in_words}); got None")
        self.check_shape(x, name)
        if not isinstance(x, jax.core.Tracer):
            check_numbers(np.asarray(x), name)
            check_complete(x, name, _MASKED)
            self.check_values(np.asarray(x), name)
        return self.kernel.as_state(x)

    def check_shape(self, x: Any, name: str = "x") -> None:
        """Refuses what has not the shape of a batch of data.

        :raises ValueError: naming the argument, what came and what was expected.
        """
        shape, event_shape = np.shape(x), self.event_shape
        if len(shape) < len(event_shape) or shape[len(shape) - len(event_shape) :] != event_shape:
            raise ValueError(f"{name} must have shape (*batch, {self.event_in_words}); got {shape}")
        if 0 in shape:
            raise ValueError(f"{name} must hold at least one datum; got shape {shape}")

    def check_rows(self, x: Any, name: str = "x", axis: str = "N") -> Array:
        """As :meth:`check`, and there is one batch axis.

        :param axis: what the message calls it.
        """
        x = self.check(x, name)
        if x.ndim != self.kernel.event_ndim + 1:
            raise ValueError(f"{name} must have shape ({axis}, {self.event_in_words}); got {x.shape}")
        return x

    def check_values(self, values: np.ndarray, name: str) -> None:
        """Refuses finite values that are outside the support, or that the model's space cannot hold."""
        if self.transform is None:
            self.kernel.check_data(values, name)
        elif not np.all(inside := self.support(values)):
            raise ValueError(
                f"{name} must lie in the transform's codomain; {np.count_nonzero(~np.asarray(inside))} data do not"
            )
        if self.is_discrete:
            return
        # known data may be checked while a program is traced
        with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
            states = self.kernel.as_state(values)
            check_precision(values, np.asarray(states), self.kernel.event_ndim, name)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self.transform)):
                return
            if self.transform is not None and on_edge(self.transform, states).any():
                raise ValueError(f"{name} must lie inside the transform's codomain, not on its edge")

    def check_training(self, data: np.ndarray) -> None:
        """Refuses training data without a bounded density."""
        if not self.is_discrete:
            check_not_constant(data)

    @property
    def event_in_words(self) -> str:
        return ", ".join(map(str, self.event_shape))
