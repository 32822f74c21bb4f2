"""Which axes of a model's sites are independent systems: the elements of plates that hold all there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from pp_diffusion.posterior.messages import Message, base_of
from pp_diffusion.posterior.program import state_shape


class Layout(NamedTuple):
    """Where the independent systems lie in a site's value, and back.

    :ivar axes: the systems' axes, counted from the right of the batch shape (negative).
    :ivar batch_ndim: of the site.
    """

    axes: tuple[int, ...]
    batch_ndim: int

    def split(self, value: ArrayLike) -> Array:
        """``(*batch, *rest)`` to ``(S, *other batch axes, *rest)``."""
        value = jnp.moveaxis(jnp.asarray(value), [self.batch_ndim + axis for axis in self.axes], range(len(self.axes)))
        return value.reshape(-1, *value.shape[len(self.axes) :])

    def join(self, value: Array, sizes: tuple[int, ...]) -> Array:
        """The inverse of :meth:`split`, for systems in an array of shape ``sizes``."""
        value = value.reshape(*sizes, *value.shape[1:])
        return jnp.moveaxis(value, range(len(self.axes)), [self.batch_ndim + axis for axis in self.axes])


class Systems(NamedTuple):
    """The independent systems of a model, and where they lie in x.

    :ivar shape: of the plates whose elements they are; ``()`` is one system.
    :ivar layout: of x; the axes of ``to_event`` count as batch axes here, and are part of one system's state.
    :ivar state_shape: of one system's x, in the model's space.
    :ivar event_ndim: how many of its axes are the kernel's event.
    :ivar site_shape: of x at its site.
    :ivar plates: the names of these plates.
    :ivar dtype: of x.
    """

    shape: tuple[int, ...]
    layout: Layout
    state_shape: tuple[int, ...]
    event_ndim: int
    site_shape: tuple[int, ...]
    plates: tuple[str, ...]
    dtype: Any

    @property
    def number(self) -> int:
        """S."""
        return math.prod(self.shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Of the kernel's events: the systems, and the axes of one system's state in front of an event."""
        return (self.number, *self.state_shape[: len(self.state_shape) - self.event_ndim])

    @property
    def state_size(self) -> int:
        """How many numbers make up one system's x."""
        return math.prod(self.state_shape)

    def to_site(self, x: Array) -> Array:
        """Systems ``(S, *state_shape)`` as the value of the prior's site."""
        return self.layout.join(x, self.shape)

    def of_site(self, message: Message, frames: Sequence[Any]) -> Layout:
        """Where they lie in another site."""
        return Layout(tuple(f.dim for f in frames if f.name in self.plates), len(message["fn"].batch_shape))


def systems_of(message: Message, frames: Sequence[Any]) -> Systems:
    """The elements of these plates as systems, as the prior's site has them."""
    fn = message["fn"]
    event_ndim = base_of(message).event_dim
    inner = fn.event_dim - event_ndim  # to_event's axes are part of one system's x
    layout = Layout(tuple(frame.dim - inner for frame in frames), len(fn.shape()) - event_ndim)
    of_one = layout.split(np.zeros(state_shape(fn))).shape[1:]
    sizes, names = tuple(frame.size for frame in frames), tuple(frame.name for frame in frames)
    return Systems(sizes, layout, tuple(of_one), event_ndim, fn.shape(), names, message["value"].dtype)
