"""Immutable objects that are pytrees, and equal and hashable by value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

#: The parts that a saved file can name, by the name that it gives them.
SAVED: dict[str, type[Frozen]] = {}


class Frozen:
    """Base class of the stock parts.

    Attributes named in :attr:`data_fields` hold arrays (or pytrees of arrays) and are the leaves of the pytree;
    all others are static and must be hashable. Two parts of equal values are equal and have the same hash, so
    that a part can be a static argument of :func:`jax.jit` as well as a traced one.

    A class defined with ``saved_as="Name"`` has an entry in saved files.
    """

    data_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, saved_as: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if saved_as is not None:
            SAVED[saved_as] = cls
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten, flatten_func=cls._flatten)

    def _set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable: {name!r} cannot be set")

    def _flatten(self) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        data = tuple(getattr(self, name) for name in self.data_fields)
        static = tuple(sorted((k, v) for k, v in self.__dict__.items() if k not in self.data_fields))
        return data, static

    def _flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        data, static = self._flatten()
        return tuple(zip(map(jax.tree_util.GetAttrKey, self.data_fields), data, strict=True)), static

    @classmethod
    def _unflatten(cls, static: tuple[tuple[str, Any], ...], data: Iterable[Any]) -> Self:
        return cls.of(**dict(static), **dict(zip(cls.data_fields, data, strict=True)))

    @classmethod
    def of(cls, **attributes: Any) -> Self:
        """The object with these attributes, as they are: nothing is checked."""
        self = object.__new__(cls)  # not __init__: under transformations the leaves are placeholders
        self._set(**attributes)
        return self

    def replace(self, **changes: Any) -> Self:
        """With some attributes changed.

        :raises AttributeError: for a name that is no attribute.
        """
        if unknown := set(changes) - set(self.__dict__):
            raise AttributeError(f"{type(self).__name__} has no {', '.join(map(repr, sorted(unknown)))}")
        return self.of(**{**self.__dict__, **changes})

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and value_of(self) == value_of(other))

    def __hash__(self) -> int:
        return hash(value_of(self))

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={_short(v)}" for k, v in self.__dict__.items() if not k.startswith("_"))
        return f"{type(self).__name__}({shown})"


def value_of(tree: Any) -> tuple[Any, ...]:
    """What makes two pytrees equal: their structure, and their arrays bit by bit. Hashable."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [_as_array(jax.random.key_data(x) if is_key(x) else x) for x in leaves]
    return structure, tuple((a.shape, a.dtype.str, a.tobytes()) for a in arrays)


def _as_array(leaf: Any) -> np.ndarray:
    """Of Python's numbers, of which NumPyro's bijections have some, what JAX makes of them; not of those that it cannot
    hold, as the places in memory that NumPyro puts in place of arrays."""
    is_number = isinstance(leaf, float) or (isinstance(leaf, int) and abs(leaf) < 2**31)
    return np.asarray(leaf, jnp.result_type(leaf) if is_number else None)


def is_key(leaf: Any) -> bool:
    """Whether ``leaf`` is a typed random key."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _short(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        return f"<{value.dtype}{list(value.shape)}>"
    return repr(value)
