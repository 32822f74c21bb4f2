"""A number that a program may hand on while it is traced, and that nothing computes."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_primitive = Primitive("uncomputed")


def uncomputed(why: str, shape: tuple[int, ...], operands: Any) -> Array:
    """A number of ``operands``, for programs that are only read: :func:`numpyro.render_model` asks what depends on what
    by the density of each site, and never for its value.

    :param why: there is none, in words.
    :param shape: of the number.
    :param operands: a pytree of all that it depends on.
    :raises NotImplementedError: with these words: at once where nothing is traced, else where it would be compiled,
        differentiated or mapped over.
    """
    arrays = jax.tree.leaves(operands)
    if not any(isinstance(a, jax.core.Tracer) for a in arrays):
        raise NotImplementedError(why)
    return _primitive.bind(*map(jnp.asarray, arrays), why=why, shape=tuple(shape))


def _refuse(*_: Any, why: str, **__: Any) -> NoReturn:
    raise NotImplementedError(why)


_primitive.def_impl(_refuse)
_primitive.def_abstract_eval(lambda *_, why, shape: jax.core.ShapedArray(shape, jnp.result_type(float)))
ad.primitive_jvps[_primitive] = _refuse
batching.primitive_batchers[_primitive] = _refuse
mlir.register_lowering(_primitive, _refuse)
