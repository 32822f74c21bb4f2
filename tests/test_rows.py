"""Chunks of rows: of one shape, cut to the data, each row with its own context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.rows import as_rows, each_chunk, even, map_rows


def prior_of(context=None):
    def network(x_t, t, context=None):
        return (x_t if context is None else x_t + context, 0 * x_t)

    return ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.4]), network).prior({}, context=context)


@pytest.mark.parametrize("total, most, expected", [(10, 4, (3, 4)), (8, 4, (2, 4)), (3, 100, (1, 3)), (9, 1, (9, 1))])
def test_even(total, most, expected):
    assert even(total, most) == expected


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 100])
def test_all_rows_come_back_in_order_whatever_the_chunks(chunk_size):
    x = jax.random.normal(jax.random.key(0), (2, 5, 2))
    shapes = []

    def fn(prior, rows, key):
        shapes.append(rows.shape)
        assert prior.batch_shape == ()
        return {"sum": rows.sum(-1), "both": 2 * rows}

    out = map_rows(prior_of(), x, jax.random.key(1), fn, chunk_size)
    np.testing.assert_allclose(out["sum"], x.sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(out["both"], 2 * x)
    assert len(set(shapes)) == 1 and shapes[0][0] <= chunk_size  # one compilation serves all


def test_each_row_has_its_own_context():
    context = jnp.arange(6.0).reshape(3, 2)
    prior, x = prior_of(context), jnp.zeros((4, 3, 2))

    def fn(prior, rows, key):
        assert prior.process.context_batch_ndim == 1 and prior.batch_shape == (len(rows),)
        return prior.process(rows, prior.process.rates.at(0)).mean * 0 + prior.context

    out = map_rows(prior, x, jax.random.key(1), fn, 5)
    np.testing.assert_array_equal(out, np.broadcast_to(context, (4, 3, 2)))
    with pytest.raises(
        ValueError, match=r"x has batch shape \(4,\), which does not broadcast with the prior's, \(3,\)"
    ):
        as_rows(prior, jnp.zeros((4, 2)))


def test_each_chunk_has_its_own_key():
    prior, rows, _ = as_rows(prior_of(), jnp.zeros((6, 2)))
    draws = list(each_chunk(prior, rows, jax.random.key(0), lambda p, x, key: jax.random.normal(key, (len(x),)), 2))
    assert len(np.unique(np.concatenate(draws))) == 6
