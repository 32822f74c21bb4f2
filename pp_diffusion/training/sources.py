"""Training data in their three forms: an array of rows, an iterable of batches, a function that draws batches."""

from __future__ import annotations

import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from pp_diffusion import contexts
from pp_diffusion.checks import find_ties, name_columns
from pp_diffusion.data_space import DataSpace
from pp_diffusion.frozen import Frozen


class Feed(Frozen):
    """What one dispatch of updates is fed; a pytree that goes into the compiled loop."""

    @abstractmethod
    def batch(self, rng_key: Array, i: Array) -> tuple[Array, Any, Array]:
        """The batch of update i of the dispatch: x, its context, and the random key that is left."""
        raise NotImplementedError


class Source:
    """Training data, checked."""

    #: A row of data and of its context, to start from.
    example: tuple[Array, Any]
    #: Rows per update, where the program draws them.
    batch_size: int | None = None

    @abstractmethod
    def take(self, most: int) -> tuple[Feed | None, int]:
        """What the next dispatch of at most ``most`` updates gets, and how many updates it is for."""
        raise NotImplementedError


def as_source(space: DataSpace, data: Any, context: Any, batch_size: int, rng_key: Array, skip: int = 0) -> Source:
    """The source that goes with the form of ``data``.

    :param skip: updates that were done before.
    :raises TypeError, ValueError: naming ``data`` or ``context``.
    """
    if callable(data):
        _refuse_context(context, "a function: let it return")
        return Simulated(space, data, rng_key)
    if hasattr(data, "shape") or _is_number_list(data):
        return Rows(space, data, context, batch_size)
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an array, an iterable of batches or a function; got {type(data).__name__}")
    _refuse_context(context, "an iterable: let it yield")
    return Batches(space, data, skip)


# --- an array ----------------------------------------------------------------------------------------------------


class Rows(Source):
    """An array of shape ``(N, *event_shape)``, of which the program draws rows."""

    def __init__(self, space: DataSpace, data: Any, context: Any, batch_size: int) -> None:
        x, context = _check_pair(space, data, context, "data", "N")
        space.check_training(np.asarray(data))
        warn_of_scales(space, np.asarray(data))
        warn_of_ties(space, np.asarray(data))
        self.batch_size = min(batch_size, len(x))
        self.feed = RowFeed(x, context)
        self.example = _first_rows((x, context))

    def take(self, most: int) -> tuple[Feed | None, int]:
        return self.feed, most


class ArrayFeed(Feed):
    """Of arrays that a program is given."""

    data_fields = ("x", "context")

    x: Array
    context: Any

    def __init__(self, x: Array, context: Any) -> None:
        self._set(x=x, context=context)


class RowFeed(ArrayFeed):
    """All rows, at every update."""

    def batch(self, rng_key: Array, i: Array) -> tuple[Array, Any, Array]:
        return self.x, self.context, rng_key


# --- an iterable -------------------------------------------------------------------------------------------------


class Batches(Source):
    """Batches, or pairs ``(x, context)``, over and over where they can be read again; stacked for each dispatch.

    :param int skip: batches that were read before; of an iterator, which goes on where it is, none is skipped.
    """

    def __init__(self, space: DataSpace, data: Iterable[Any], skip: int = 0) -> None:
        batches = _checked_batches(space, data, 0 if iter(data) is data else skip)
        first = next(batches, None)
        if first is None:
            raise ValueError("data must yield at least one batch; it yielded none")
        warn_of_scales(space, np.asarray(first[0]))
        warn_of_ties(space, np.asarray(first[0]))
        self.batches: Iterator[tuple[Array, Any]] = itertools.chain([first], batches)
        self.example = _first_rows(first)

    def take(self, most: int) -> tuple[Feed | None, int]:
        stack: list[Any] = []
        for batch in self.batches:
            if stack and jax.tree.map(jnp.shape, batch) != jax.tree.map(jnp.shape, stack[0]):
                self.batches = itertools.chain([batch], self.batches)
                break
            stack.append(batch)
            if len(stack) == min(most, _length_of_stacks(batch)):
                break
        if not stack:
            return None, 0
        # a short stack is padded, and the rest not used: one program for all, so that pieces of a run equal the whole
        padded = stack + [stack[-1]] * (_length_of_stacks(stack[0]) - len(stack))
        return StackFeed(*jax.tree.map(lambda *a: jnp.stack(a), *padded)), len(stack)


class StackFeed(ArrayFeed):
    """A batch for each update, over a first axis."""

    def batch(self, rng_key: Array, i: Array) -> tuple[Array, Any, Array]:
        x, context = jax.tree.map(lambda a: a[i], (self.x, self.context))
        return x, context, rng_key


def _length_of_stacks(batch: Any) -> int:
    """Batches to a dispatch: at most 64, of at most 64 MiB."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    return int(np.clip(2**26 // max(size, 1), 1, 64))


def _checked_batches(space: DataSpace, data: Iterable[Any], skip: int) -> Iterator[tuple[Array, Any]]:
    while True:
        count = 0
        for count, batch in enumerate(data, 1):
            if skip:
                skip -= 1
                continue
            yield _check_pair(space, *_pair(batch), f"data: batch {count}", "batch")
        if iter(data) is data:
            return
        if not count:
            raise ValueError("data must yield at least one batch; it yielded none")


# --- a function --------------------------------------------------------------------------------------------------


class Simulated(Source):
    """A function ``rng_key -> batch``, traced into the update."""

    def __init__(self, space: DataSpace, data: Callable[[Array], Any], rng_key: Array) -> None:
        self.example = _check_pair(space, *_pair(data(rng_key)), "data(rng_key)", "batch")
        warn_of_scales(space, np.asarray(self.example[0]))
        warn_of_ties(space, np.asarray(self.example[0]))
        self.feed = DrawFeed(data)

    def take(self, most: int) -> tuple[Feed | None, int]:
        return self.feed, most


class DrawFeed(Feed):
    """A new batch for each update; the arrays of a :class:`jax.tree_util.Partial` are leaves."""

    data_fields = ("draw",)

    draw: Partial

    def __init__(self, draw: Callable[[Array], Any]) -> None:
        self._set(draw=draw if isinstance(draw, Partial) else Partial(draw))

    def batch(self, rng_key: Array, i: Array) -> tuple[Array, Any, Array]:
        rng_key, batch_key = jax.random.split(rng_key)
        return *_pair(self.draw(batch_key)), rng_key


# --- checks ------------------------------------------------------------------------------------------------------


def warn_of_scales(space: DataSpace, data: np.ndarray) -> None:
    """Warns of columns that are far from unit scale, where nothing scales them."""
    if space.kernel.is_discrete or space.transform is not None or len(data) < 2:
        return
    mean, sd = data.mean(0, dtype=np.float64), data.std(0, dtype=np.float64)
    far = (sd < 1 / 4) | (sd > 4) | (np.abs(mean) > 4)
    if far.any():
        warnings.warn(
            f"data are far from unit scale in {name_columns(far)}, and no transform is given; "
            "use Diffusion(..., transform=ppd.standardize(data))",
            stacklevel=5,
        )


def warn_of_ties(space: DataSpace, data: np.ndarray) -> None:
    """Warns of columns whose values occur again and again, where they are taken for continuous."""
    if space.is_discrete:
        return
    ties, shares = find_ties(np.asarray(data, np.float64))
    if ties.any():
        warnings.warn(
            f"data are taken for continuous, but values occur again and again in {name_columns(ties, shares)}: a "
            "density grows without bound on such values, and K is not comparable. Add noise of the values' step "
            "(dequantisation), or use a BinomialKernel for bits and last_step='discretized' for integers",
            stacklevel=5,
        )


def _check_pair(space: DataSpace, x: Any, context: Any, name: str, axis: str) -> tuple[Array, Any]:
    x = space.check_rows(x, name, axis)
    contexts.check_rows(context, len(x))
    contexts.check_context(context)
    return x, jax.tree.map(jnp.asarray, context)


def _refuse_context(context: Any, instead: str) -> None:
    if context is not None:
        raise ValueError(f"context must be None where data is {instead} pairs (x, context)")


def _first_rows(pair: tuple[Array, Any]) -> tuple[Array, Any]:
    x, context = jax.tree.map(lambda a: a[:1], pair)
    return x, context


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, tuple) or (isinstance(batch, list) and len(batch) == 2 and hasattr(batch[0], "shape")):
        if len(batch) != 2:
            raise ValueError(f"a batch must be an array or a pair (x, context); got a tuple of {len(batch)}")
        return batch[0], batch[1]
    return batch, None


def _is_number_list(data: Any) -> bool:
    if not isinstance(data, (list, tuple)):
        return False
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return isinstance(data, (int, float, np.number)) or (isinstance(data, (list, tuple)) and not data)
