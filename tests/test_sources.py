"""Training data in their three forms, and what is said about them before anything is compiled."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import pp_diffusion as ppd
from pp_diffusion.training.sources import Batches, Rows, Simulated, as_source

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(60, 2))
DIFFUSION = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.3]), ppd.networks.MLP((3,)))


def source(data, context=None, batch_size=8, diffusion=DIFFUSION):
    return as_source(diffusion.space, data, context, batch_size, KEY)


def fit(data, diffusion=DIFFUSION, **settings):
    return ppd.fit(KEY, diffusion, data, **{"num_steps": 1, "batch_size": 8, "progress_bar": False, **settings})


# --- forms -------------------------------------------------------------------------------------------------------


def test_an_array():
    rows = source(X, np.ones((60, 1)))
    assert isinstance(rows, Rows) and rows.batch_size == 8
    assert isinstance(source(X.tolist()), Rows) and source(X, batch_size=500).batch_size == 60
    feed, updates = rows.take(7)
    x, context, key = feed.batch(KEY, 3)
    assert updates == 7 and x.shape == (60, 2) and context.shape == (60, 1) and key is KEY
    assert rows.example[0].shape == (1, 2) and rows.example[1].shape == (1, 1)


def test_batches_are_stacked():
    batches = source([X[:8], X[8:16], X[16:20]])
    assert isinstance(batches, Batches) and batches.batch_size is None
    feed, updates = batches.take(5)
    assert updates == 2  # the third has another shape
    np.testing.assert_allclose(feed.batch(KEY, 1)[0], X[8:16], rtol=1e-6)
    feed, updates = batches.take(5)
    assert updates == 1 and feed.batch(KEY, 0)[0].shape == (4, 2)
    assert batches.take(1)[1] == 1  # from the start again
    once = source(iter([(X[:8], np.ones((8, 1)))]))
    assert once.take(4)[1] == 1 and once.take(4) == (None, 0)


def test_a_function_is_drawn_from_with_a_key_of_its_own():
    drawn = source(lambda key: (jax.random.normal(key, (5, 2)), jnp.ones((5, 1))))
    assert isinstance(drawn, Simulated)
    feed, updates = drawn.take(3)
    x, context, key = feed.batch(KEY, 0)
    again, _, _ = feed.batch(key, 0)
    assert updates == 3 and context.shape == (5, 1) and not np.array_equal(x, again)


# --- what cannot be data -----------------------------------------------------------------------------------------


def test_masked_values_are_missing_values():
    masked = np.ma.masked_array(X, np.arange(120).reshape(60, 2) < 3)
    match = "must be finite; 3 of 120 values are masked"
    for call in (
        lambda: fit(masked),
        lambda: fit([masked]),
        lambda: ppd.standardize(masked),
        lambda: ppd.lower_bound(KEY, DIFFUSION.prior(DIFFUSION.init_params(KEY)), masked),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    np.testing.assert_array_equal(ppd.standardize(np.ma.masked_array(X)).loc, ppd.standardize(X).loc)


@pytest.mark.parametrize("key, came", [(None, "None"), (0, "0"), (np.zeros(2), "ndarray")])
def test_what_is_no_key_is_named(key, came):
    prior = DIFFUSION.prior(DIFFUSION.init_params(KEY))
    for call in (
        lambda: ppd.fit(key, DIFFUSION, X, num_steps=1),
        lambda: ppd.lower_bound(key, prior, X),
        lambda: ppd.estimate_log_prob(key, prior, X, 30),
        lambda: ppd.reverse_entropy(key, prior, X),
        lambda: prior.sample(key),
    ):
        with pytest.raises(TypeError, match=f"key must be a JAX random key, .*; got {came}"):
            call()


# --- values that occur again and again ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, columns",
    [
        (X > 0, r"columns 0 \(100 % of the rows\), 1 \(100 % of the rows\)"),
        (np.where(np.arange(60)[:, None] % 10 < [9, 0], 0.0, X), r"column 0 \(90 % of the rows\)"),
        ([X.round(0)], r"columns 0 \(.*\), 1"),
        (lambda key: jnp.round(jax.random.normal(key, (60, 2))), "columns 0"),
    ],
)
def test_repeated_values_are_told(data, columns):
    with pytest.warns(UserWarning, match=f"values occur again and again in {columns}.*dequantisation"):
        fit(data)


def test_values_that_repeat_by_right_are_not():
    bits = ppd.Diffusion(ppd.BinomialKernel((2,)), ppd.FixedSchedule([0.1, 0.3]), ppd.networks.MLP((3,)))
    levels = ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.3]), ppd.networks.MLP((3,)), last_step=ppd.Discretized(2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for diffusion in (bits, levels):
            source(X > 0, diffusion=diffusion)
        source(X)


# --- going on, and optimisers ------------------------------------------------------------------------------------


def test_going_on_with_a_key_of_another_make():
    start = fit(X)
    for key in (jax.random.PRNGKey(5), jax.random.key(5)):
        again = ppd.fit(key, DIFFUSION, X, num_steps=2, batch_size=8, state=start.state, progress_bar=False)
        assert int(again.state.step) == 3
    np.testing.assert_array_equal(
        again.losses,
        ppd.fit(KEY, DIFFUSION, X, num_steps=2, batch_size=8, state=start.state, progress_bar=False).losses,
    )


def test_numpyros_optimisers_are_taken():
    import optax

    theirs, own = (
        fit(X, num_steps=3, optimizer=numpyro.optim.Adam(1e-2)),
        fit(X, num_steps=3, optimizer=optax.adam(1e-2)),
    )
    np.testing.assert_allclose(theirs.losses, own.losses, rtol=1e-4)
    with pytest.raises(TypeError, match="optimizer must be an optax optimizer, one of NumPyro's or None; got str"):
        fit(X, optimizer="adam")
