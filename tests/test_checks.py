"""What arguments have to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pp_diffusion.checks import check_complete, check_key, find_ties, name_columns

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(500, 2))


def test_keys():
    for key in (jax.random.key(0), jax.random.PRNGKey(0), np.array([0, 1], np.uint32)):
        check_key(key)
    for key, came in (
        (None, "None"),
        (0, "0"),
        ("a", "str"),
        (jnp.zeros(2), "ArrayImpl"),
        (jax.random.split(jax.random.key(0)), r"\(2,\) of them"),
    ):
        with pytest.raises(TypeError, match=f"rng_key must be a.* JAX random key.*; got {came}"):
            check_key(key)


def test_missing_values():
    check_complete(np.ma.masked_array(NORMAL, False), "data")
    with pytest.raises(ValueError, match=r"data must be finite; 3 of 1000 values are masked. Drop them"):
        check_complete(np.ma.masked_array(NORMAL, np.arange(1000).reshape(500, 2) < 3), "data", "Drop them")
    with pytest.raises(ValueError, match=r"data must be finite; 1 of 2 values are NaN or infinite$"):
        check_complete([0.0, np.inf], "data")


def test_ties():
    zeros = np.where(RNG.random(NORMAL.shape) < [0.9, 0.0], 0.0, NORMAL)
    few = np.where(RNG.random(NORMAL.shape) < [0.0, 0.2], 0.0, NORMAL)
    for data, columns in (
        (NORMAL, [False, False]),
        (np.float32(NORMAL), [False, False]),
        (NORMAL.round(3), [False, False]),  # rounded beyond what a step resolves
        (NORMAL.round(1), [True, True]),
        (np.exp(NORMAL).round(2), [False, False]),  # as ordinary tables are
        (5 * np.round(60 * np.exp(NORMAL)), [False, False]),
        (NORMAL > 0, [True, True]),
        (zeros, [True, False]),
        (few, [False, True]),
        (NORMAL[:4].round(0), [False, False]),  # four rows tell nothing
    ):
        found, shares = find_ties(np.asarray(data, float))
        assert found.tolist() == columns
        assert ((shares >= 0) & (shares <= 1)).all()
    assert abs(find_ties(zeros)[1][0] - 0.9) < 0.03
    assert find_ties(np.repeat(NORMAL[:, :1], 2, 0).reshape(-1, 1, 1))[0].shape == (1, 1)
    assert find_ties(np.zeros(50))[0].shape == ()


def test_names_of_columns():
    assert name_columns(np.array(True)) == "the only coordinate"
    assert name_columns(np.array([False, True, True])) == "columns 1, 2"
    assert name_columns(np.array([False, True]), np.array([0.0, 0.25])) == "column 1 (25 % of the rows)"
    assert name_columns(np.ones((2, 5), bool)).endswith("(1, 2) and 2 more")
