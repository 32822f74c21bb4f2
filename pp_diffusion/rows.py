"""Data in chunks of rows, of one shape, so that one compilation serves all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from pp_diffusion import contexts
from pp_diffusion.prior import DiffusionPrior

#: ``(prior, x, rng_key) -> results``, arrays with the rows as their first axis; ``prior`` has one context per row.
OfRows = Callable[[DiffusionPrior, Array, Array], Any]


def as_rows(prior: DiffusionPrior, x: Array) -> tuple[DiffusionPrior, Array, tuple[int, ...]]:
    """The prior and data with one leading axis of rows, and the batch shape that they came in.

    :raises ValueError: if the data's batch shape does not broadcast with the prior's.
    """
    process, data_shape = prior.process, prior.kernel.batch_shape_of(x)
    try:
        batch_shape = jnp.broadcast_shapes(data_shape, prior.batch_shape)
    except ValueError:
        raise ValueError(
            f"x has batch shape {data_shape}, which does not broadcast with the prior's, {prior.batch_shape}"
        ) from None
    context = contexts.over_batch(process.context, process.context_batch_ndim, batch_shape)
    rows = jnp.broadcast_to(x, batch_shape + prior.event_shape).reshape(-1, *prior.event_shape)
    return prior.of_rows(contexts.as_rows(context, len(batch_shape))), rows, batch_shape


def each_chunk(
    prior: DiffusionPrior, rows: Array, rng_key: Array, fn: OfRows, chunk_size: int, progress: str | None = None
) -> Iterator[Any]:
    """``fn`` of chunks of at most ``chunk_size`` rows, as even as can be; the last one is padded, and cut again.

    Where the rows are spread over devices, chunks that these can share evenly are too.

    :param prior, rows: as :func:`as_rows` returns them.
    :param progress: a label for a progress bar; ``None`` shows none.
    """
    num_chunks, size = even(len(rows), chunk_size)
    keys = jax.random.split(rng_key, num_chunks)
    for i in tqdm(range(num_chunks), desc=progress, disable=progress is None):
        index = np.minimum(np.arange(i * size, (i + 1) * size), len(rows) - 1)
        chunk = prior.of_rows(contexts.take(prior.context, index))
        results, rest = fn(chunk, _spread_as(rows, rows[index]), keys[i]), slice(len(rows) - i * size)
        yield jax.tree.map(lambda a, rest=rest: a[rest], results)


def _spread_as(rows: Array, chunk: Array) -> Array:
    """``chunk`` on the devices over which ``rows`` are spread, where these share it evenly."""
    if isinstance(rows, jax.core.Tracer) or rows.is_fully_replicated or len(chunk) % len(rows.sharding.device_set):
        return chunk
    return jax.device_put(chunk, rows.sharding)


def map_rows(
    prior: DiffusionPrior, x: Array, rng_key: Array, fn: OfRows, chunk_size: int, progress: str | None = None
) -> Any:
    """``fn`` of all data, chunk by chunk: arrays with the data's batch shape in front."""
    prior, rows, batch_shape = as_rows(prior, x)
    parts = list(each_chunk(prior, rows, rng_key, fn, chunk_size, progress))
    return jax.tree.map(lambda *a: jnp.concatenate(a).reshape(batch_shape + a[0].shape[1:]), *parts)


def even(total: int, most: int) -> tuple[int, int]:
    """How many blocks of at most ``most`` make up ``total``, and the size of each."""
    blocks = -(-total // most)
    return blocks, -(-total // blocks)
