"""From what ``fit`` is given to the source that owns its batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jax import Array

from pp_diffusion.data_space import DataSpace
from pp_diffusion.training.arrays import OnDisk, Rows
from pp_diffusion.training.sharding import Layout
from pp_diffusion.training.sources import (
    Batches,
    Simulated,
    Source,
    as_pair,
    check_pair,
    is_number_list,
    refuse_context,
)


def as_source(
    space: DataSpace,
    data: Any,
    context: Any,
    batch_size: int,
    rng_key: Array,
    layout: Layout = Layout(),  # noqa: B008 - immutable
    val_prop: float = 0.0,
    noise: float | None = None,
) -> Source:
    """The source that goes with the form of ``data``.

    :param val_prop, noise: as for :class:`Rows`.
    :raises TypeError, ValueError: naming ``data`` or ``context``.
    """
    if callable(data):
        refuse_context(context, "a function: let it return")
        return Simulated(space, data, rng_key)
    if isinstance(data, np.memmap):
        return OnDisk(space, data, context, batch_size, layout, val_prop)
    if hasattr(data, "shape") or is_number_list(data):
        return Rows(space, data, context, batch_size, layout, val_prop, noise)
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an array, an iterable of batches or a function; got {type(data).__name__}")
    refuse_context(context, "an iterable: let it yield")
    return Batches(space, data, layout)


def as_held_out(space: DataSpace, validation_data: Any) -> tuple[Any, Any]:
    """``validation_data``, an array or a pair ``(x, context)``, checked.

    :raises ValueError: naming it.
    """
    return check_pair(space, *as_pair(validation_data), "validation_data", "N")
