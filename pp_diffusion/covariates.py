"""Covariates as networks take them: numbers of unit scale, and labels as rows of ones and zeros."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.checks import check_complete, check_numbers
from pp_diffusion.frozen import Frozen

#: More labels than this are taken for numbers that should be floats.
MOST_LABELS = 1000


class Encoder(Frozen):
    """Of one array of the context.

    :ivar event_ndim: the axes of one datum's, before it is encoded.
    """

    event_ndim: int

    @property
    @abstractmethod
    def encoded_shape(self) -> tuple[int, ...]:
        """Of one datum's."""
        raise NotImplementedError

    @abstractmethod
    def check(self, value: Any) -> None:
        """Refuses what it cannot encode, where it is known.

        :raises TypeError, ValueError: naming ``context``.
        """
        raise NotImplementedError

    @abstractmethod
    def __call__(self, value: Any) -> Array:
        """``value``, of shape ``(*batch, *event)``, as floats of shape ``(*batch, *encoded_shape)``."""
        raise NotImplementedError


class Numbers(Encoder, saved_as="Numbers"):
    """Standardised; images and sets, of two axes and more, by one mean and one scale.

    :param loc, scale: of the training rows; the scale of a column that never changes is 1.
    :param shape: of one datum's; a single number becomes a vector of one.
    :param is_marked: whether vectors get a last column of ones, which tells them from the null value.
    """

    data_fields: ClassVar[tuple[str, ...]] = ("loc", "scale")

    loc: Array
    scale: Array
    shape: tuple[int, ...]
    is_marked: bool

    def __init__(self, loc: Array, scale: Array, shape: tuple[int, ...], is_marked: bool) -> None:
        self._set(loc=loc, scale=scale, shape=shape, is_marked=is_marked, event_ndim=len(shape))

    @classmethod
    def from_rows(cls, values: np.ndarray, is_marked: bool) -> Numbers:
        """Those of rows."""
        rows = np.asarray(values, np.float64)
        axis = 0 if rows.ndim <= 2 else None
        loc, scale = np.asarray(rows.mean(axis)), np.asarray(rows.std(axis))
        varies = scale > 1e-6 * np.abs(loc)  # more than by rounding
        unit = jnp.asarray(np.where(varies, scale, 1.0), float)
        return cls(jnp.asarray(loc, float), unit, values.shape[1:], is_marked and rows.ndim <= 2)

    @property
    def encoded_shape(self) -> tuple[int, ...]:
        shape = self.shape or (1,)
        return (shape[0] + self.is_marked,) if len(shape) == 1 else shape

    def check(self, value: Any) -> None:
        if np.shape(value)[max(np.ndim(value) - len(self.shape), 0) :] != self.shape:
            raise ValueError(
                f"context must have shape (*batch, {', '.join(map(str, self.shape))}), as in training; got "
                f"{np.shape(value)}"
            )
        if not isinstance(value, jax.core.Tracer):
            check_numbers(np.asarray(value), "context")
            check_complete(value, "context", "Impute them, or drop these rows")

    def __call__(self, value: Any) -> Array:
        encoded = (jnp.asarray(value, float) - self.loc) / self.scale
        encoded = encoded if self.shape else encoded[..., None]
        return jnp.concatenate([encoded, jnp.ones_like(encoded[..., :1])], -1) if self.is_marked else encoded


class Labels(Encoder, saved_as="Labels"):
    """One number for each label of training, 1 for its own and 0 for the others; NaN where a traced one was not there.

    :param values: the labels, in order.
    """

    values: tuple[Any, ...]

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._set(values=values, event_ndim=0)

    @classmethod
    def from_rows(cls, values: np.ndarray) -> Labels:
        """Those of rows.

        :raises ValueError: naming ``context``, where there are very many.
        """
        found = np.unique(values)
        if len(found) > MOST_LABELS:
            raise ValueError(
                f"context must be floating where it is numbers; got {len(found)} different labels of {values.dtype}, "
                f"more than {MOST_LABELS}"
            )
        return cls(tuple(found.tolist()))

    @property
    def encoded_shape(self) -> tuple[int, ...]:
        return (len(self.values),)

    def check(self, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            return
        unseen = [label for label in np.unique(np.asarray(value)).tolist() if label not in self.values]
        if unseen:
            known = ", ".join(map(repr, self.values[:8])) + (", …" if len(self.values) > 8 else "")
            raise ValueError(
                f"context holds the label {unseen[0]!r}, which was not seen in training; there are {known}"
            )

    def __call__(self, value: Any) -> Array:
        if not isinstance(value, jax.core.Tracer):
            index = np.searchsorted(self.values, np.asarray(value))
            return jax.nn.one_hot(jnp.asarray(index), len(self.values))
        ones = value[..., None] == jnp.asarray(self.values)
        return jnp.where(ones.any(-1, keepdims=True), ones.astype(float), jnp.nan)


class AsGiven(Encoder, saved_as="AsGiven"):
    """Left as they are.

    :param shape: of one datum's.
    """

    shape: tuple[int, ...]

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._set(shape=shape, event_ndim=len(shape))

    @property
    def encoded_shape(self) -> tuple[int, ...]:
        return self.shape

    def check(self, value: Any) -> None:
        if not isinstance(value, jax.core.Tracer):
            check_numbers(np.asarray(value), "context")
            check_complete(value, "context", "Impute them, or drop these rows")

    def __call__(self, value: Any) -> Array:
        return jnp.asarray(value)


class Covariates(Frozen):
    """From a context as users have it to the numbers that a network is given; made by :meth:`from_rows`.

    :func:`~pp_diffusion.fit` makes one from the context that it trains with, and all that it trains holds it. Floats
    are standardised, and a single one for each datum is a vector of one. A single integer, boolean or string for each
    datum is a label, and becomes a row of ones and zeros, one number for each label that training saw: the first layer
    of a network embeds it. Integers with an axis of their own are numbers. A pytree is encoded array by array.

    .. doctest::

        >>> import numpy as np, pp_diffusion as ppd
        >>> covariates = ppd.Covariates.from_rows({"size": np.array([[1.0], [3.0]]), "kind": np.array(["oak", "elm"])})
        >>> covariates({"size": [2.0], "kind": "oak"})
        {'kind': Array([0., 1.], dtype=float32), 'size': Array([0.], dtype=float32)}

    :param encoders: of its arrays, a pytree of the context's structure.
    :param drop: the share of the training rows that have the null value in its place: zeros.
    """

    data_fields: ClassVar[tuple[str, ...]] = ("encoders",)

    encoders: Any
    drop: float

    def __init__(self, encoders: Any, drop: float = 0.0) -> None:
        self._set(encoders=encoders, drop=float(drop))

    @classmethod
    def from_rows(cls, context: Any, *, drop: float = 0.0, encode: bool = True) -> Covariates:
        """Those of training rows.

        :param context: an array (or pytree) with the rows as its first axis.
        :param drop: see the class.
        :param encode: ``False`` leaves all arrays as they are.
        :raises TypeError, ValueError: naming ``context`` or ``drop``.
        """
        if not 0 <= drop < 1:
            raise ValueError(f"context_drop must be in [0, 1), a share of the rows; got {drop}")

        def encoder(leaf: Any) -> Encoder:
            values = np.asarray(leaf)
            if not values.ndim:
                raise ValueError("context must have one row per datum; got shape ()")
            if not encode:
                return AsGiven(values.shape[1:])
            if values.ndim == 1 and values.dtype.kind in "biuUS":
                return Labels.from_rows(values)
            check_numbers(values, "context")
            check_complete(leaf, "context", "Impute them, or drop these rows")
            return Numbers.from_rows(values, drop > 0)

        return cls(jax.tree.map(encoder, _with_arrays(context)), drop)

    def __call__(self, context: Any) -> Any:
        """``context`` as the network gets it, batch axes in front.

        :raises TypeError, ValueError: naming it, where it is not such as in training was.
        """
        return self._each(lambda encoder, value: (encoder.check(value), encoder(value))[1], context)

    def batch_ndim(self, context: Any) -> int:
        """How many batch axes ``context`` has.

        :raises ValueError: naming it, where its arrays have different ones.
        """
        counts = set(jax.tree.leaves(self._each(lambda encoder, value: np.ndim(value) - encoder.event_ndim, context)))
        if len(counts) != 1 or min(counts) < 0:
            shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(_with_arrays(context)))
            raise ValueError(f"context must have the same batch axes in all arrays; got shapes {shapes}")
        return int(counts.pop())

    def null(self) -> Any:
        """What stands for a missing context: zeros.

        :raises ValueError: naming ``context``, where training did not see it.
        """
        if not self.drop:
            raise ValueError("context is needed: training never dropped it; train with fit(..., context_drop=0.1)")
        return jax.tree.map(lambda encoder: jnp.zeros(encoder.encoded_shape), self.encoders, is_leaf=_is_encoder)

    def dropped(self, rng_key: Array, encoded: Any) -> Any:
        """Rows with a share of them null."""
        if not self.drop:
            return encoded
        num_rows = jnp.shape(jax.tree.leaves(encoded)[0])[0]
        kept = jax.random.bernoulli(rng_key, 1 - self.drop, (num_rows,))
        return jax.tree.map(lambda a: a * kept.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype), encoded)

    def _each(self, function: Any, context: Any) -> Any:
        context = _with_arrays(context)
        own: Any = jax.tree.structure(self.encoders, is_leaf=_is_encoder)
        if jax.tree.structure(context) != own:
            raise ValueError(f"context must have the structure that it had in training, {own}; got {context}")
        return jax.tree.map(function, self.encoders, context, is_leaf=_is_encoder)


def _is_encoder(node: Any) -> bool:
    return isinstance(node, Encoder)


def _with_arrays(context: Any) -> Any:
    """Lists and tuples of numbers or words are arrays."""

    def is_leaf(node: Any) -> bool:
        return isinstance(node, (list, tuple)) and not any(
            isinstance(part, (dict, jax.Array, np.ndarray)) for part in node
        )

    return jax.tree.map(
        lambda leaf: np.asarray(leaf) if isinstance(leaf, (list, tuple)) else leaf, context, is_leaf=is_leaf
    )
