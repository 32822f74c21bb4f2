"""Training data that are an array: in memory, drawn from within the program; or in a file, read as they are drawn."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion import contexts
from pp_diffusion.data_space import DataSpace
from pp_diffusion.sharding import Layout
from pp_diffusion.training.sources import (
    ArrayFeed,
    Feed,
    Source,
    check_pair,
    fingerprint_of,
    first_rows,
    length_of_stacks,
    stacked,
    warn_of_scales,
    warn_of_ties,
)

#: Fewer rows than this are all trained on, for too few of them would judge.
FEWEST_ROWS = 20
#: More rows than this are not held out.
MOST_HELD_OUT = 10_000
#: The noise on rows has gone when so much of training is done.
NOISE_UNTIL = 0.7


def hold_out(num_rows: int, share: float) -> np.ndarray:
    """The rows that are held out, in order; the same for every key, so that runs can be compared."""
    count = int(min(round(share * num_rows), MOST_HELD_OUT)) if num_rows >= FEWEST_ROWS else 0
    return np.sort(np.random.default_rng(0).choice(num_rows, count, replace=False))


class Rows(Source):
    """An array of shape ``(N, *event_shape)``, of which the program draws rows.

    :param float val_prop: the share of the rows that is held out, and is in :attr:`held_out`.
    :param float noise: standard deviation of the noise on rows when training starts, in the model's space; ``None``
        goes by the number of rows. Only where rows are held out.
    """

    def __init__(
        self,
        space: DataSpace,
        data: Any,
        context: Any,
        batch_size: int,
        layout: Layout,
        val_prop: float = 0.0,
        noise: float | None = 0.0,
    ) -> None:
        check_pair(space, data, context, "data", "N")
        values = np.asarray(data)
        space.check_training(values)
        warn_of_scales(space, values)
        warn_of_ties(space, values)
        all_rows = (np.asarray(space.kernel.as_state(values)), jax.tree.map(np.asarray, context))
        chosen = hold_out(len(values), val_prop)
        kept = _whole_shares(np.setdiff1d(np.arange(len(values)), chosen), layout)
        self.held_out = jax.tree.map(lambda a: a[chosen], all_rows) if len(chosen) else None
        self.rows = jax.tree.map(lambda a: a[kept], all_rows)
        self.num_rows = len(kept) * layout.hosts
        self.batch_size = min(batch_size, self.num_rows)
        if noise is None:
            noise = min(0.5, 5 / np.sqrt(self.num_rows))
        blurs = noise > 0 and not space.is_discrete
        x, context = layout.rows(self.rows)
        self.feed = RowFeed(x, context, space, jnp.asarray(noise, float) if blurs else None, self.batch_size, layout)
        self.example = first_rows(self.rows)

    def take(self, most: int, step: int) -> tuple[Feed | None, int]:
        return self.feed, most

    def fingerprint(self) -> str:
        noise = 0.0 if self.feed.noise is None else float(self.feed.noise)
        return f"{len(self.rows[0])} rows, {fingerprint_of(self.rows)}, noise {noise:.4g}"


class RowFeed(ArrayFeed):
    """Rows of all, one of each of as many strata as the batch has rows, so that each is drawn as often as another; with
    noise that shrinks as training goes on.

    A stratum lies within one device's share, so that no row travels.
    """

    data_fields: ClassVar[tuple[str, ...]] = ("x", "context", "space", "noise")

    space: DataSpace
    noise: Array | None
    batch_size: int
    layout: Layout

    def __init__(
        self, x: Array, context: Any, space: DataSpace, noise: Array | None, batch_size: int, layout: Layout
    ) -> None:
        self._set(x=x, context=context, space=space, noise=noise, batch_size=batch_size, layout=layout)

    def batch(self, rng_key: Array, i: Array, progress: Array) -> tuple[Array, Any, Array]:
        x, context = self.x, self.context
        if self.batch_size < len(x):
            rng_key, row_key = jax.random.split(rng_key)
            x, context = self._take(stratified_rows(row_key, len(x), self.batch_size))
        if self.noise is not None:
            rng_key, noise_key = jax.random.split(rng_key)
            scale = self.noise * jnp.maximum(0, 1 - progress / NOISE_UNTIL) ** 2
            z = self.space.to_model(x)
            x = self.space.to_data(z + scale.astype(z.dtype) * jax.random.normal(noise_key, z.shape, z.dtype))
        return x, context, rng_key

    def _take(self, rows: Array) -> tuple[Array, Any]:
        shards = self.layout.shards
        size = len(self.x) // shards
        own = rows.reshape(shards, -1) - size * jnp.arange(shards)[:, None]
        own = self.layout.keep_rows(jnp.clip(own, 0, size - 1))  # a stratum's end may be rounded up

        def take(a: Array) -> Array:
            parts = self.layout.keep_rows(a.reshape(shards, size, *a.shape[1:]))
            return jax.vmap(lambda part, at: part[at])(parts, own).reshape(-1, *a.shape[1:])

        x, context = jax.tree.map(take, (self.x, self.context))
        return x, context


def stratified_rows(rng_key: Array, num_rows: int, batch_size: int) -> Array:
    """One of each of ``batch_size`` equal parts of 0…num_rows-1, which may cut through a row: each row is drawn as
    often as any other."""
    starts = np.arange(batch_size, dtype=np.int64) * num_rows
    base, part = starts // batch_size, (starts % batch_size) / batch_size
    place = jnp.asarray(part, float) + (num_rows / batch_size) * jax.random.uniform(rng_key, (batch_size,))
    return jnp.minimum(jnp.asarray(base, int) + place.astype(int), num_rows - 1)


class OnDisk(Source):
    """A :class:`numpy.memmap` of shape ``(N, *event_shape)``: only the rows that are drawn are read.

    Which rows an update gets is said by its number, so that a run can go on anywhere.
    """

    def __init__(
        self, space: DataSpace, data: Any, context: Any, batch_size: int, layout: Layout, val_prop: float = 0.0
    ) -> None:
        self.space, self.data, self.layout = space, data, layout
        self.context = jax.tree.map(np.asarray, context)
        contexts.check_rows(self.context, len(data))
        few = np.linspace(0, len(data) - 1, min(len(data), 2000)).astype(int)
        seen = self._read(few)
        space.check_training(np.asarray(seen[0]))
        warn_of_scales(space, np.asarray(seen[0]))
        warn_of_ties(space, np.asarray(seen[0]))
        self.chosen = hold_out(len(data), val_prop)
        self.held_out = self._read(self.chosen) if len(self.chosen) else None
        self.own_rows = len(data) - len(self.chosen)
        self.num_rows = self.own_rows * layout.hosts
        self.batch_size = min(batch_size, self.num_rows)
        self.example = first_rows(seen)

    def take(self, most: int, step: int) -> tuple[Feed | None, int]:
        own = self.batch_size // self.layout.hosts
        batch = jax.tree.map(lambda a: np.zeros((own, *a.shape[1:]), a.dtype), self.example)
        updates = min(most, length_of_stacks(batch))
        return stacked([self._read(self._draw(step + i, own)) for i in range(updates)], self.layout), updates

    def fingerprint(self) -> str:
        return f"{len(self.data)} rows of a file, {fingerprint_of((self.data, self.context))}"

    def _draw(self, step: int, count: int) -> np.ndarray:
        rows = np.random.default_rng([step, jax.process_index()]).integers(0, self.own_rows, count)
        # of the rows that are not held out: behind as many of those as lie before
        return rows + np.searchsorted(self.chosen - np.arange(len(self.chosen)), rows, side="right")

    def _read(self, rows: np.ndarray) -> tuple[Array, Any]:
        return check_pair(self.space, self.data[rows], jax.tree.map(lambda c: c[rows], self.context), "data", "N")


def _whole_shares(rows: np.ndarray, layout: Layout) -> np.ndarray:
    """So many of the rows that every device gets as many as another."""
    fewest = int(layout.gather(np.array([len(rows)])).min())
    count = fewest - fewest % (layout.shards // layout.hosts)
    if count < len(rows):
        warnings.warn(
            f"{len(rows) - count} of {len(rows)} rows are left out: {layout.shards} devices share them evenly",
            stacklevel=6,
        )
    return rows[:count]
