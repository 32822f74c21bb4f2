"""Covariates: a pytree of arrays with leading batch axes, the same for all, and behind them the event's own axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.checks import check_complete, check_numbers
from pp_diffusion.covariates import Covariates


def check_context(context: Any) -> None:
    """Refuses covariates that are no numbers, or, where their values are known, not finite.

    :raises TypeError, ValueError: naming ``context``.
    """
    for leaf in jax.tree.leaves(context):
        if isinstance(leaf, jax.core.Tracer):
            continue
        check_numbers(np.asarray(leaf), "context")
        check_complete(leaf, "context", "Impute them, or drop these rows")


def check_rows(context: Any, num_rows: int) -> None:
    """Refuses covariates that do not have one row per datum.

    :raises ValueError: naming ``context``.
    """
    for leaf in jax.tree.leaves(context):
        if jnp.shape(leaf)[:1] != (num_rows,):
            raise ValueError(f"context must have one row per datum, first axis {num_rows}; got shape {jnp.shape(leaf)}")


def count_batch_axes(context: Any, event_dim: int | None = None) -> int:
    """How many leading axes of ``context`` are batch axes: all but ``event_dim`` of the array that has fewest.

    :param event_dim: ``None`` is 1, an array of covariates per datum.
    :raises ValueError: naming ``context_event_dim``, if an array has fewer axes.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(context)]
    fewest = min(map(len, shapes), default=0)
    if event_dim is None:
        if shapes and not fewest:
            raise ValueError(
                "context must have an axis of covariates; got shape (). A single number per datum, such as a label, "
                "has none: give context_event_dim=0"
            )
        event_dim = min(1, fewest)
    if isinstance(event_dim, bool) or not isinstance(event_dim, (int, np.integer)) or not 0 <= event_dim <= fewest:
        raise ValueError(
            f"context_event_dim must be in 0…{fewest}, the context's axes ({', '.join(map(str, shapes))}); "
            f"got {event_dim!r}"
        )
    return fewest - int(event_dim)


def encoded(covariates: Covariates | None, context: Any, event_dim: int | None = None) -> tuple[Any, int]:
    """``context`` as the network gets it, and how many batch axes it has.

    :param covariates: what encodes it, and knows the axes of one datum's; for ``None`` it is left as it is.
    :param event_dim: as for :func:`count_batch_axes`; for what nothing else knows.
    :raises TypeError, ValueError: naming ``context``.
    """
    if covariates is None:
        return context, count_batch_axes(context, event_dim)
    if context is None:
        return covariates.null(), 0
    return covariates(context), covariates.batch_ndim(context)


def batch_shape_of(context: Any, batch_ndim: int) -> tuple[int, ...]:
    """The shape that the batch axes of all arrays broadcast to."""
    return jnp.broadcast_shapes((), *(jnp.shape(leaf)[:batch_ndim] for leaf in jax.tree.leaves(context)))


def over_batch(context: Any, batch_ndim: int, batch_shape: tuple[int, ...]) -> Any:
    """``context`` broadcast to this batch shape."""
    return jax.tree.map(lambda c: jnp.broadcast_to(c, batch_shape + jnp.shape(c)[batch_ndim:]), context)


def as_rows(context: Any, num_axes: int) -> Any:
    """``context`` with its first ``num_axes`` axes made one."""
    return jax.tree.map(lambda c: c.reshape(-1, *c.shape[num_axes:]), context)


def take(context: Any, rows: Array | np.ndarray | None) -> Any:
    """These rows of it; all for ``None``."""
    return context if rows is None else jax.tree.map(lambda c: jnp.asarray(c)[rows], context)
