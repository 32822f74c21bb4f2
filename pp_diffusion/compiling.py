"""Compilation of programs that run once in a while: less of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import jax

#: XLA's, for a CPU: LLVM's first level, and the older emitters of loops. A program that runs once gains nothing from
#: the rest, and compiles in half the time.
LIGHT = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
#: LLVM's first level alone: a quarter less to compile. Where products of matrices are most of the work it runs as fast.
FIRST_LEVEL = {"xla_backend_optimization_level": 1}


def jit_once(function: Callable[..., Any], *, static_argnames: tuple[str, ...] = ()) -> Callable[..., Any]:
    """:func:`jax.jit`, for a program that takes longer to compile than to run. To be called outside of others."""
    return _jit(function, LIGHT, static_argnames)


def jit_run(function: Callable[..., Any], *, static_argnames: tuple[str, ...] = ()) -> Callable[..., Any]:
    """:func:`jax.jit`, for a program that takes as long to run as to compile. To be called outside of others."""
    return _jit(function, FIRST_LEVEL, static_argnames)


def _jit(function: Callable[..., Any], light_options: dict[str, Any], static_argnames: tuple[str, ...]) -> Any:
    @cache
    def jitted(light: bool) -> Any:
        options = light_options if light else None
        return jax.jit(function, static_argnames=static_argnames, compiler_options=options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # who compiles lightly already is not asked to do more
        light = jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations")
        return jitted(light and is_known())(*args, **kwargs)

    return call


@cache
def is_known() -> bool:
    """Whether this version of XLA has these options."""
    try:
        jax.jit(lambda: 0, compiler_options=LIGHT)()
    except Exception:  # of no stated kind
        return False
    return True
