"""Many small factorisations, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import enable_x64

from pp_diffusion.matrices import cholesky, half_log_det, solve, solve_lower


@pytest.mark.parametrize("size", [0, 1, 2, 6, 7, 20])
def test_against_numpy(size):
    """Straight lines and loops alike."""
    rng = np.random.default_rng(size)
    roots = rng.normal(size=(3, 2, size, size + 3))
    matrix, vector = roots @ np.swapaxes(roots, -1, -2), rng.normal(size=(3, 2, size))
    with enable_x64():
        root = jax.jit(cholesky)(jnp.asarray(matrix))
        found = [jax.jit(f)(root, jnp.asarray(vector)) for f in (solve_lower, solve)]
        half = half_log_det(root)
    lower = np.linalg.cholesky(matrix)
    np.testing.assert_allclose(root, lower, atol=1e-9)
    for solved, by in zip(found, (lower, matrix), strict=True):
        np.testing.assert_allclose(solved, np.linalg.solve(by, vector[..., None])[..., 0], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(half, 0.5 * np.linalg.slogdet(matrix)[1], atol=1e-9)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_a_matrix_that_is_not_positive_gives_nan(size):
    matrix = jnp.eye(size).at[-1, -1].set(-1.0)
    assert np.isnan(cholesky(matrix)).any()
