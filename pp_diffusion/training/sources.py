"""Training data in the forms that ``fit`` takes: what owns the batches of each, and what is checked of all."""

from __future__ import annotations

import base64
import hashlib
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from pp_diffusion import contexts
from pp_diffusion.checks import COARSE, find_ties, name_columns
from pp_diffusion.covariates import Covariates
from pp_diffusion.data_space import DataSpace
from pp_diffusion.frozen import Frozen
from pp_diffusion.sharding import Layout

#: From the rows of a context to what encodes it.
Encoding = Callable[[Any], Covariates]
#: Of a function's batches, so many rows tell the scale of their context.
ROWS_FOR_SCALES = 4096


class Feed(Frozen):
    """What one dispatch of updates is fed; a pytree that goes into the compiled loop."""

    @abstractmethod
    def batch(self, rng_key: Array, i: Array, progress: Array) -> tuple[Array, Any, Array]:
        """The batch of update i of the dispatch: x, its context, and the random key that is left.

        :param progress: how much of all updates is done with this one, in (0, 1].
        """
        raise NotImplementedError


class ArrayFeed(Feed):
    """Of arrays that a program is given."""

    data_fields: ClassVar[tuple[str, ...]] = ("x", "context")

    x: Array
    context: Any

    def __init__(self, x: Array, context: Any) -> None:
        self._set(x=x, context=context)


class Source:
    """Training data, checked."""

    #: A row of data and of its context, to start from.
    example: tuple[Array, Any]
    #: Rows per update.
    batch_size: int
    #: Rows in all that are trained on, of all processes; ``None`` where they cannot be counted.
    num_rows: int | None = None
    #: Rows that are not trained on, and their context.
    held_out: tuple[Any, Any] | None = None
    #: What encoded all context.
    covariates: Covariates | None = None

    @abstractmethod
    def take(self, most: int, step: int) -> tuple[Feed | None, int]:
        """What the next dispatch of at most ``most`` updates gets, and how many updates it is for.

        :param step: updates done before.
        """
        raise NotImplementedError

    def skip(self, updates: int, *, anew: bool) -> None:
        """Goes on behind so many updates.

        :param anew: whether also an iterator is at its start, as in a process that is new; else it is where it was.
        """

    def seek(self, position: Any) -> bool:
        """Goes on at what :meth:`position` was; whether it could."""
        return False

    def position(self) -> Any:
        """Where in the data training is, for JSON; ``None`` where the number of updates says it."""
        return None

    def fingerprint(self) -> str:
        """What tells these data from others, as far as can be seen."""
        return "unknown"


# --- an iterable -------------------------------------------------------------------------------------------------


class Batches(Source):
    """Batches, or pairs ``(x, context)``, over and over where they can be read again; stacked for each dispatch."""

    def __init__(self, space: DataSpace, data: Iterable[Any], layout: Layout, encoding: Encoding | None = None) -> None:
        self.space, self.data, self.layout, self.encoding = space, data, layout, encoding
        self.iterator: Any = iter(data)
        self.count = 0
        #: what was read and not used yet, each behind the position that it was read at
        self.pending: deque[tuple[Any, tuple[Any, Any]]] = deque()
        first = self._peek()
        if first is None:
            raise ValueError("data must yield at least one batch; it yielded none")
        warn_of_scales(space, np.asarray(first[0]))
        warn_of_ties(space, np.asarray(first[0]))
        self.batch_size = len(first[0]) * layout.hosts
        self.example = first_rows(first)

    def take(self, most: int, step: int) -> tuple[Feed | None, int]:
        stack: list[Any] = []
        while (batch := self._peek()) is not None:
            if stack and jax.tree.map(jnp.shape, batch) != jax.tree.map(jnp.shape, stack[0]):
                break
            self.pending.popleft()
            stack.append(batch)
            if len(stack) == min(most, length_of_stacks(batch)):
                break
        return (stacked(stack, self.layout), len(stack)) if stack else (None, 0)

    def skip(self, updates: int, *, anew: bool) -> None:
        if self.iterator is self.data and not anew:
            return
        for _ in range(updates):
            if self._peek() is None:
                return
            self.pending.popleft()

    def position(self) -> Any:
        return self.pending[0][0] if self.pending else self._state()

    def seek(self, position: Any) -> bool:
        if position is None or not hasattr(self.iterator, "set_state"):
            return False
        self.pending.clear()
        self.iterator = iter(self.data)
        self.iterator.set_state(base64.b64decode(position["bytes"]) if "bytes" in position else position["state"])
        return True

    def fingerprint(self) -> str:
        return f"batches of {tuple(map(str, jax.tree.leaves(jax.tree.map(jnp.shape, self.example))))}"

    def _state(self) -> Any:
        """That of an iterator which knows its own, such as grain's."""
        if not hasattr(self.iterator, "get_state"):
            return None
        state = self.iterator.get_state()
        return {"bytes": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"state": state}

    def _peek(self) -> tuple[Array, Any] | None:
        """The next batch, checked; it stays the next."""
        if self.pending:
            return self.pending[0][1]
        for _ in range(2):
            position = self._state()
            for batch in self.iterator:
                self.count += 1
                x, context = as_pair(batch)
                if self.covariates is None and self.encoding is not None and context is not None:
                    self.covariates = self.encoding(context)
                context = encoded_rows(self.covariates, context)
                pair = check_pair(self.space, x, context, f"data: batch {self.count}", "batch")
                self.pending.append((position, pair))
                return pair
            if self.iterator is self.data or not self.count:
                return None
            self.iterator, self.count = iter(self.data), 0
        raise ValueError("data must yield at least one batch; it yielded none")


class StackFeed(ArrayFeed):
    """A batch for each update, over a first axis."""

    def batch(self, rng_key: Array, i: Array, progress: Array) -> tuple[Array, Any, Array]:
        x, context = jax.tree.map(lambda a: a[i], (self.x, self.context))
        return x, context, rng_key


def stacked(batches: list[Any], layout: Layout) -> StackFeed:
    """Batches of one shape; a short stack is padded, and the rest not used: one program for all, so that pieces of a
    run equal the whole."""
    padded = batches + [batches[-1]] * (length_of_stacks(batches[0]) - len(batches))
    return StackFeed(*layout.rows(jax.tree.map(lambda *a: np.stack(a), *padded), axis=1))


def length_of_stacks(batch: Any) -> int:
    """Batches to a dispatch: at most 64, of at most 64 MiB."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    return int(np.clip(2**26 // max(size, 1), 1, 64))


# --- a function --------------------------------------------------------------------------------------------------


class Simulated(Source):
    """A function ``rng_key -> batch``, traced into the update."""

    def __init__(
        self, space: DataSpace, data: Callable[[Array], Any], rng_key: Array, encoding: Encoding | None = None
    ) -> None:
        x, context = as_pair(data(rng_key))
        if encoding is not None and context is not None:
            self.covariates = encoding(_more_of(data, rng_key, context))
        batch = check_pair(space, x, encoded_rows(self.covariates, context), "data(rng_key)", "batch")
        warn_of_scales(space, np.asarray(batch[0]))
        warn_of_ties(space, np.asarray(batch[0]))
        self.batch_size, self.example = len(batch[0]), first_rows(batch)
        self.feed = DrawFeed(data, self.covariates)

    def take(self, most: int, step: int) -> tuple[Feed | None, int]:
        return self.feed, most

    def fingerprint(self) -> str:
        return f"a function's batches of {self.batch_size}, {fingerprint_of(jax.tree.leaves(self.feed))}"


class DrawFeed(Feed):
    """A new batch for each update; the arrays of a :class:`jax.tree_util.Partial` are leaves."""

    data_fields = ("draw", "covariates")

    draw: Partial
    covariates: Covariates | None

    def __init__(self, draw: Callable[[Array], Any], covariates: Covariates | None = None) -> None:
        self._set(draw=draw if isinstance(draw, Partial) else Partial(draw), covariates=covariates)

    def batch(self, rng_key: Array, i: Array, progress: Array) -> tuple[Array, Any, Array]:
        rng_key, batch_key = jax.random.split(rng_key)
        x, context = as_pair(self.draw(batch_key))
        return x, encoded_rows(self.covariates, context), rng_key


def _more_of(data: Callable[[Array], Any], rng_key: Array, context: Any) -> Any:
    """The context of so many more batches that its scale is known."""
    num_rows = max(len(leaf) for leaf in jax.tree.leaves(context))
    draw = jax.jit(lambda key: as_pair(data(key))[1])
    keys = jax.random.split(jax.random.fold_in(rng_key, 1), min(-(-ROWS_FOR_SCALES // num_rows), 64))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *map(draw, keys))


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
    coarse = 0.0 if data.dtype.kind in "iub" else COARSE  # integers say what they are
    ties, shares = find_ties(np.asarray(data, np.float64), coarse)
    if ties.any():
        warnings.warn(
            f"data are taken for continuous, but values occur again and again in {name_columns(ties, shares)}: a "
            "density grows without bound on such values, and K is not comparable. Add noise of the values' step "
            "(dequantisation): step * ppd.datasets.dequantize(rng_key, x / step); or use a BinomialKernel for bits and "
            "last_step='discretized' for integers; a value that is a case of its own is for a mixture to say",
            stacklevel=5,
        )


def encoded_rows(covariates: Covariates | None, context: Any) -> Any:
    """Rows of a context as the network gets them."""
    return context if covariates is None or context is None else covariates(context)


def check_pair(space: DataSpace, x: Any, context: Any, name: str, axis: str) -> tuple[Array, Any]:
    x = space.check_rows(x, name, axis)
    contexts.check_rows(context, len(x))
    contexts.check_context(context)
    return x, jax.tree.map(jnp.asarray, context)


def refuse_context(context: Any, instead: str) -> None:
    if context is not None:
        raise ValueError(f"context must be None where data is {instead} pairs (x, context)")


def first_rows(pair: tuple[Array, Any]) -> tuple[Array, Any]:
    x, context = jax.tree.map(lambda a: a[:1], pair)
    return x, context


def as_pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, tuple) or (isinstance(batch, list) and len(batch) == 2 and hasattr(batch[0], "shape")):
        if len(batch) != 2:
            raise ValueError(f"a batch must be an array or a pair (x, context); got a tuple of {len(batch)}")
        return batch[0], batch[1]
    return batch, None


def is_number_list(data: Any) -> bool:
    if not isinstance(data, (list, tuple)):
        return False
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return isinstance(data, (int, float, np.number)) or (isinstance(data, (list, tuple)) and not data)


def fingerprint_of(arrays: Any) -> str:
    """A short name of the shapes and of the values: of all, or of 2000 rows of large arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        digest.update(f"{np.shape(leaf)}".encode())
        rows = np.linspace(0, len(leaf) - 1, min(len(leaf), 2000)).astype(int) if np.ndim(leaf) else ()
        digest.update(np.ascontiguousarray(np.asarray(leaf[rows], dtype=np.float64)).tobytes())
    return digest.hexdigest()[:16]
