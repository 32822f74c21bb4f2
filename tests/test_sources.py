"""Training data in their three forms, and what is said about them before anything is compiled."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import pp_diffusion as ppd
from pp_diffusion.training.arrays import OnDisk, Rows, stratified_rows
from pp_diffusion.training.forms import as_source
from pp_diffusion.training.sources import Batches, Simulated

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(60, 2))
DIFFUSION = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.3]), ppd.networks.MLP((3,)))


def source(data, context=None, batch_size=8, diffusion=DIFFUSION):
    return as_source(diffusion.space, data, context, batch_size, KEY)


def fit(data, diffusion=DIFFUSION, **settings):
    return ppd.fit(
        KEY, diffusion, data, **{"num_steps": 1, "batch_size": 8, "val_prop": 0.0, "progress_bar": False, **settings}
    )


# --- forms -------------------------------------------------------------------------------------------------------


def test_an_array():
    rows = source(X, np.ones((60, 1)))
    assert isinstance(rows, Rows) and rows.batch_size == 8
    assert isinstance(source(X.tolist()), Rows) and source(X, batch_size=500).batch_size == 60
    feed, updates = rows.take(7, 0)
    x, context, _ = feed.batch(KEY, 3, 1.0)
    assert updates == 7 and x.shape == (8, 2) and context.shape == (8, 1)
    assert rows.example[0].shape == (1, 2) and rows.example[1].shape == (1, 1)
    whole, _, key = as_source(DIFFUSION.space, X, None, 60, KEY, noise=0.0).take(1, 0)[0].batch(KEY, 0, 1.0)
    np.testing.assert_allclose(whole, X, rtol=1e-6)  # all rows: nothing is drawn
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(KEY))


@pytest.mark.parametrize("num_rows, batch_size", [(10, 8), (96, 8), (1000, 512)])
def test_each_row_is_drawn_as_often_as_any_other(num_rows, batch_size):
    """One of each stratum, strata that cut through rows too: counts over many batches, |z| < 5."""
    repeats = 4000
    rows = jax.vmap(lambda key: stratified_rows(key, num_rows, batch_size))(jax.random.split(KEY, repeats))
    edges = np.arange(batch_size + 1) * num_rows / batch_size
    assert (rows >= np.floor(edges[:-1])).all() and (rows <= np.ceil(edges[1:]) - 1).all()
    counts, share = np.bincount(np.ravel(rows), minlength=num_rows), batch_size / num_rows
    assert len(counts) == num_rows
    assert (abs(counts - share * repeats) < 5 * np.sqrt(repeats * share)).all()


@pytest.mark.slow
def test_a_file_is_read_as_it_is_drawn_from(tmp_path):
    """The rows that are held out are never drawn, the others are, and what an update gets goes by its number."""
    data = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", shape=(200, 2))
    data[:] = np.stack([np.arange(200), np.random.default_rng(0).normal(size=200)], 1)
    unit = ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1]), ppd.networks.MLP((3,)), transform=ppd.standardize(data)
    )
    rows = as_source(unit.space, data, np.arange(200.0)[:, None], 8, KEY, val_prop=0.1)
    assert isinstance(rows, OnDisk) and len(rows.held_out[0]) == 20
    drawn = [rows.take(64, step)[0] for step in range(0, 640, 64)]
    seen = {int(i) for feed in drawn for i in np.ravel(feed.x[..., 0])}
    assert seen == set(range(200)) - {int(i) for i in rows.held_out[0][:, 0]}
    np.testing.assert_array_equal(drawn[0].x[..., 0], drawn[0].context[..., 0])
    np.testing.assert_array_equal(drawn[1].x[0], rows.take(1, 64)[0].x[0])


def test_batches_are_stacked():
    batches = source([X[:8], X[8:16], X[16:20]])
    assert isinstance(batches, Batches) and batches.batch_size == 8
    feed, updates = batches.take(5, 0)
    assert updates == 2  # the third has another shape
    np.testing.assert_allclose(feed.batch(KEY, 1, 1.0)[0], X[8:16], rtol=1e-6)
    feed, updates = batches.take(5, 2)
    assert updates == 1 and feed.batch(KEY, 0, 1.0)[0].shape == (4, 2)
    assert batches.take(1, 3)[1] == 1  # from the start again
    once = source(iter([(X[:8], np.ones((8, 1)))]))
    assert once.take(4, 0)[1] == 1 and once.take(4, 1) == (None, 0)


class Positions:
    """Batches whose iterator knows where it is, as grain's do."""

    def __init__(self):
        self.at = -1

    def __iter__(self):
        return type(self)()

    def __next__(self):
        self.at += 1
        return X[8 * (self.at % 7) :][:8]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("make", [Positions, lambda: [X[8 * i :][:8] for i in range(7)]])
def test_batches_go_on_where_they_were(make):
    """By the iterator's own state where it has one, else by reading as many again."""
    whole, again = source(make()), source(make())
    for step in range(0, 10, 2):
        whole.take(2, step)
    position = whole.position()
    assert (position is None) == isinstance(make(), list)
    if not again.seek(position):
        again.skip(10, anew=True)
    np.testing.assert_array_equal(again.take(1, 10)[0].x[0], whole.take(1, 10)[0].x[0])


def test_a_function_is_drawn_from_with_a_key_of_its_own():
    drawn = source(lambda key: (jax.random.normal(key, (5, 2)), jnp.ones((5, 1))))
    assert isinstance(drawn, Simulated)
    feed, updates = drawn.take(3, 0)
    x, context, key = feed.batch(KEY, 0, 1.0)
    again, _, _ = feed.batch(key, 0, 1.0)
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


def test_integers_are_told_at_any_step():
    """The same numbers as floats are of fine steps, as of rounding."""
    data = np.random.default_rng(0).integers(0, 100, (120, 2))
    unit = ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1]), ppd.networks.MLP((3,)), transform=ppd.standardize(data)
    )
    source(data.astype(float), diffusion=unit)
    with pytest.warns(UserWarning, match=r"values occur again and again in columns 0 \(\d+ % of the rows\), 1"):
        source(data, diffusion=unit)


# --- going on, and optimisers ------------------------------------------------------------------------------------


def test_going_on_with_a_key_of_another_make():
    start = fit(X)
    for key in (jax.random.PRNGKey(5), jax.random.key(5)):
        again = ppd.fit(
            key, DIFFUSION, X, num_steps=2, batch_size=8, state=start.state, val_prop=0.0, progress_bar=False
        )
        assert int(again.state.step) == 3
    np.testing.assert_array_equal(
        again.losses,
        ppd.fit(
            KEY, DIFFUSION, X, num_steps=2, batch_size=8, state=start.state, val_prop=0.0, progress_bar=False
        ).losses,
    )


@pytest.mark.slow
def test_numpyros_optimisers_are_taken():
    import optax

    theirs, own = (
        fit(X, num_steps=3, optimizer=numpyro.optim.Adam(1e-2)),
        fit(X, num_steps=3, optimizer=optax.adam(1e-2)),
    )
    np.testing.assert_allclose(theirs.losses, own.losses, rtol=1e-4)
    with pytest.raises(TypeError, match="optimizer must be an optax optimizer, one of NumPyro's or None; got str"):
        fit(X, optimizer="adam")
