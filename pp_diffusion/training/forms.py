"""From what ``fit`` is given to the source that owns its batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jax import Array

from pp_diffusion.covariates import Covariates
from pp_diffusion.data_space import DataSpace
from pp_diffusion.sharding import Layout
from pp_diffusion.training.arrays import OnDisk, Rows
from pp_diffusion.training.sources import (
    Batches,
    Encoding,
    Simulated,
    Source,
    as_pair,
    check_pair,
    encoded_rows,
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
    encoding: Encoding | None = None,
) -> Source:
    """The source that goes with the form of ``data``.

    :param val_prop, noise: as for :class:`Rows`.
    :param encoding: what makes the covariates that encode the context; ``None`` leaves it as it is.
    :raises TypeError, ValueError: naming ``data`` or ``context``.
    """
    if callable(data):
        refuse_context(context, "a function: let it return")
        return Simulated(space, data, rng_key, encoding)
    if hasattr(data, "shape") or is_number_list(data):
        covariates = None if encoding is None or context is None else encoding(context)
        context = encoded_rows(covariates, context)
        source: Source
        if isinstance(data, np.memmap):
            source = OnDisk(space, data, context, batch_size, layout, val_prop)
        else:
            source = Rows(space, data, context, batch_size, layout, val_prop, noise)
        source.covariates = covariates
        return source
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an array, an iterable of batches or a function; got {type(data).__name__}")
    refuse_context(context, "an iterable: let it yield")
    return Batches(space, data, layout, encoding)


def as_held_out(space: DataSpace, validation_data: Any, covariates: Covariates | None) -> tuple[Any, Any]:
    """``validation_data``, an array or a pair ``(x, context)``, checked.

    :raises ValueError: naming it.
    """
    x, context = as_pair(validation_data)
    return check_pair(space, x, encoded_rows(covariates, context), "validation_data", "N")
