"""Products and Cholesky factors of many small matrices at once, in plain array code.

Within a compiled loop, batched calls of LAPACK were seen to wait for each other for ever on a machine of two cores
(jaxlib 0.10); and on a GPU they are slow for small matrices. Axes in front of the last two are batch axes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

#: Products at the full precision of their numbers, which a GPU's default is not.
einsum = partial(jnp.einsum, precision="highest")
UNROLLED = 6  # up to this size, a straight line of scalar operations


def cholesky(matrix: Array) -> Array:
    """The lower factor; NaN where the matrix is not positive."""
    size = matrix.shape[-1]
    if size > UNROLLED:
        return _cholesky_loop(matrix)
    columns: list[list[Array]] = []
    zero = jnp.zeros(matrix.shape[:-2], matrix.dtype)
    for j in range(size):
        left = [matrix[..., i, j] - sum(column[i] * column[j] for column in columns) for i in range(j, size)]
        root = jnp.sqrt(left[0])
        columns.append([zero] * j + [root] + [v / root for v in left[1:]])
    if not columns:
        return matrix
    return jnp.stack([jnp.stack(column, -1) for column in columns], -1)


def _cholesky_loop(matrix: Array) -> Array:
    size = matrix.shape[-1]

    def column(j: Array, lower: Array) -> Array:
        left = matrix[..., j] - einsum("...ik,...k->...i", lower, lower[..., j, :])
        scaled = left / jnp.sqrt(left[..., j, None])
        return lower.at[..., j].set(jnp.where(jnp.arange(size) >= j, scaled, 0.0))

    return jax.lax.fori_loop(0, size, column, jnp.zeros_like(matrix))


def solve_lower(root: Array, vector: Array) -> Array:
    """L⁻¹ vector."""
    return _substitute(root, vector, range(root.shape[-1]))


def solve(root: Array, vector: Array) -> Array:
    """(L Lᵀ)⁻¹ vector."""
    return _substitute(jnp.swapaxes(root, -1, -2), solve_lower(root, vector), range(root.shape[-1] - 1, -1, -1))


def half_log_det(root: Array) -> Array:
    """Half the log determinant of L Lᵀ."""
    return jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1)


def _substitute(triangle: Array, vector: Array, order: range) -> Array:
    size = triangle.shape[-1]
    if size <= UNROLLED:
        solved: dict[int, Array] = {}
        for i in order:
            rest = vector[..., i] - sum(triangle[..., i, k] * x for k, x in solved.items())
            solved[i] = rest / triangle[..., i, i]
        return jnp.stack([solved[i] for i in range(size)], -1) if solved else vector

    def entry(n: Array, x: Array) -> Array:
        i = order.start + n * order.step
        rest = vector[..., i] - einsum("...k,...k->...", triangle[..., i, :], x)
        return x.at[..., i].set(rest / triangle[..., i, i])

    return jax.lax.fori_loop(0, size, entry, jnp.zeros_like(vector))
