"""Floating-point operations of the matrix products and convolutions of a function, counted from its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def count(function: Callable[..., Any], *args: Any) -> int:
    """Of one call, a product and its addition being two; loops count as often as they run, where that is known.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from benchmarks.flops import count
        >>> count(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
        60
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
    if equation.primitive.name == "dot_general":
        ((summed, _), _) = equation.params["dimension_numbers"]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in summed)
    if equation.primitive.name == "conv_general_dilated":
        kernel, features = shapes[1], equation.params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[features]
    inner = [jaxpr for value in equation.params.values() for jaxpr in _jaxprs(value)]
    return equation.params.get("length", 1) * sum(map(_of, inner))


def _jaxprs(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [jaxpr for part in value for jaxpr in _jaxprs(part)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []
