"""Entropies of the steps and their bounds: shapes, errors, chunks, what lies outside. Exact answers are in exact/."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import UniformCategorical

import pp_diffusion as ppd

KEY, OTHER = jax.random.key(0), jax.random.key(1)
BETAS = [0.1, 0.4, 0.25, 0.7]
SCHEDULE = ppd.FixedSchedule(BETAS)
X = np.array([[0.5, -1.0], [2.0, 0.3], [0.1, 0.2], [-0.7, 1.5], [0.0, -0.4]])
BITS = np.array([[0, 1], [0, 0], [0, 0], [1, 0], [0, 0]])


def gaussian(event_shape=(2,), network=None, **settings):
    def varying(x_t, t):
        t = t.reshape(t.shape + (1,) * (x_t.ndim - t.ndim))
        return 0.2 * x_t + 0.05 * t, 0.4 * x_t - 0.1  # so that the variance depends on the state

    return ppd.Diffusion(ppd.GaussianKernel(event_shape), SCHEDULE, network or varying, **settings).prior({})


GAUSSIAN = gaussian()
BINOMIAL = ppd.Diffusion(
    ppd.BinomialKernel((2,), probs=[0.3, 0.2]), SCHEDULE, lambda x_t, t: 2.5 * x_t - 0.3 * t[..., None]
).prior({})
both = pytest.mark.parametrize("prior, x", [(GAUSSIAN, X), (BINOMIAL, BITS)], ids=["gaussian", "binomial"])


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_shape", [(), (2, 2)], ids=str)
def test_shapes(event_shape):
    prior = gaussian(event_shape)
    for batch_shape in ((), (3,), (2, 3)):
        x = np.random.default_rng(0).normal(size=batch_shape + event_shape)
        found = ppd.reverse_entropy(KEY, prior, x)
        assert found.value.shape == found.std_error.shape == (4,)
        assert np.isfinite(found.value).all()
        # one datum has no spread
        np.testing.assert_array_equal(np.isnan(found.std_error), batch_shape == ())
    bounds = ppd.entropy_bounds(prior, x)
    assert bounds.lower.shape == bounds.upper.shape == (4,) and isinstance(bounds.slack, float)
    # entropies add over coordinates
    one = ppd.entropy_bounds(gaussian(()))
    np.testing.assert_allclose(bounds.upper, np.prod(event_shape) * one.upper, rtol=1e-6)
    np.testing.assert_allclose(bounds.lower[1:], np.prod(event_shape) * one.lower[1:], rtol=1e-5)


def test_it_is_an_array():
    found = ppd.reverse_entropy(KEY, GAUSSIAN, X)
    np.testing.assert_array_equal(np.asarray(found), found.value)
    assert np.asarray(found, dtype=np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.subtract(found, 1), found.value - 1)


def test_bounds_do_not_depend_on_the_order_or_the_number_of_data():
    once, often = (ppd.entropy_bounds(BINOMIAL, x) for x in (BITS, np.tile(BITS[::-1], (3, 1))))
    np.testing.assert_allclose(often.lower, once.lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(often.upper, once.upper, rtol=1e-5)
    np.testing.assert_allclose(often.slack, once.slack, rtol=1e-4)
    batches = ppd.entropy_bounds(BINOMIAL, np.tile(BITS, (3, 1)).reshape(3, 5, 2))
    np.testing.assert_allclose(batches.upper, once.upper, rtol=1e-5)
    other = ppd.entropy_bounds(BINOMIAL, 1 - BITS)
    assert np.abs(other.upper - once.upper).max() > 0.05


# --- the error -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both
def test_std_error_is_that_over_data_and_draws(prior, x):
    """100 repetitions, each of 40 data of their own: stated errors within 32 % of the spread, 4.5 of its deviations."""
    rng = np.random.default_rng(0)
    found = [ppd.reverse_entropy(jax.random.key(i), prior, x[rng.integers(5, size=40)]) for i in range(100)]
    values, errors = (np.stack([getattr(f, name) for f in found]) for name in ("value", "std_error"))
    np.testing.assert_allclose(np.sqrt((errors**2).mean(0)), values.std(0), rtol=0.32)
    many = ppd.reverse_entropy(OTHER, prior, np.tile(x, (8000, 1)))
    error = np.hypot(values.std(0) / 10, many.std_error)
    assert (np.abs(values.mean(0) - many.value) <= 4.5 * error + 1e-6).all()  # the kernel's own step has no error


@both
@pytest.mark.parametrize("num, chunk_size", [(30, 1), (30, 7), (2999, 700)])
def test_chunks_that_do_not_divide(prior, x, num, chunk_size):
    """The same law: |z| < 4.5 in each step; and the error of one chunk's data is that of several."""
    x = np.tile(x, (600, 1))[:num]
    parts = ppd.reverse_entropy(KEY, prior, x, chunk_size=chunk_size)
    whole = ppd.reverse_entropy(OTHER, prior, np.tile(x, (10, 1)))
    error = np.hypot(parts.std_error, whole.std_error)
    assert (np.abs(parts.value - whole.value) <= 4.5 * error + 1e-6).all()
    np.testing.assert_allclose(parts.std_error, whole.std_error * np.sqrt(10), rtol=0.15 if num > 100 else 0.6)


def test_the_key_is_all_there_is_to_chance():
    one, same, other = (ppd.reverse_entropy(key, GAUSSIAN, X) for key in (KEY, KEY, OTHER))
    np.testing.assert_array_equal(one.value, same.value)
    assert (one.value != other.value)[1:].all()
    legacy = ppd.reverse_entropy(jax.random.PRNGKey(0), GAUSSIAN, X)
    np.testing.assert_array_equal(legacy.value, one.value)


def test_silence_by_default(capfd):
    ppd.reverse_entropy(KEY, GAUSSIAN, X, chunk_size=2)
    assert capfd.readouterr() == ("", "")
    ppd.reverse_entropy(KEY, GAUSSIAN, X, chunk_size=2, progress_bar=True)
    assert "entropies: 100%" in capfd.readouterr().err


def test_each_datum_has_its_own_context():
    """The variance is the context's: the entropy of step t is its mean over the data, whatever the chunks."""
    log_excess = np.array([0.0, 1.0, -2.0, 0.5, 3.0])

    def by_context(x_t, t, context):
        return 0 * x_t, jnp.broadcast_to(jnp.exp(context), x_t.shape)

    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, by_context, parameterization="direct")
    prior = diffusion.prior({}, context=jnp.asarray(log_excess)[:, None])
    for chunk_size in (2, 100):
        found = ppd.reverse_entropy(KEY, prior, X, chunk_size=chunk_size)
        expected = np.log(2 * np.pi * np.e) + log_excess.mean()
        np.testing.assert_allclose(found.value[1:], expected, rtol=1e-5)
        np.testing.assert_allclose(found.std_error[1:], log_excess.std(ddof=1) / np.sqrt(5), rtol=1e-5)


# --- outside ---------------------------------------------------------------------------------------------------------


def sure_at(step, factor):
    """Standard normal data and their exact reverse process, but for one step's variance."""

    def network(x_t, t):
        beta = jnp.asarray(BETAS, x_t.dtype)[t - 1][..., None]
        variance = jnp.where(t[..., None] == step, factor, 1.0) * beta
        return jnp.sqrt(1 - beta) * x_t, jnp.broadcast_to(variance, x_t.shape)

    return gaussian(network=network, parameterization="direct", last_step="network")


Q = np.array([[1.0, 1.0], [-1.0, -1.0]])  # mean 0 and variance 1


@pytest.mark.parametrize("step, factor, wrong", [(3, 1.0, []), (3, 0.3, [3]), (2, 0.1, [2]), (4, 1.2, [4])])
def test_outside_names_the_step(step, factor, wrong):
    """The exact process is on the upper bound; one that is too sure at a step, or not sure enough, is outside there."""
    prior = sure_at(step, factor)
    bounds, found = ppd.entropy_bounds(prior, Q), ppd.reverse_entropy(KEY, prior, Q)
    assert bounds.upper_holds
    np.testing.assert_array_equal(bounds.outside(found), wrong)


def test_outside_allows_for_the_error():
    bounds = ppd.EntropyBounds(np.array([-np.inf, 0.0, 1.0]), np.array([1.0, 2.0, 3.0]), 0.0)
    entropy = ppd.ReverseEntropy(np.array([1.1, -0.1, 3.1]), np.array([0.01, 0.03, 0.02]))
    np.testing.assert_array_equal(bounds.outside(entropy), [1, 3])
    np.testing.assert_array_equal(bounds.outside(entropy, num_errors=2), [1, 2, 3])
    np.testing.assert_array_equal(bounds.outside(entropy, num_errors=20), [])
    with pytest.raises(ValueError, match=r"entropy must have shape \(3,\); got \(4,\)"):
        bounds.outside(ppd.ReverseEntropy(np.zeros(4), np.zeros(4)))


def test_the_upper_bounds_condition():
    """The condition is on the data in the model's space: here the transform's, not their own."""
    wide = 3 * X
    assert ppd.entropy_bounds(GAUSSIAN, Q).upper_holds  # exactly on the edge
    assert not ppd.entropy_bounds(GAUSSIAN, wide).upper_holds
    scaled = ppd.entropy_bounds(gaussian(transform=ppd.standardize(wide)), wide)
    assert scaled.upper_holds and abs(scaled.slack) < 1e-5
    assert ppd.entropy_bounds(GAUSSIAN).upper_holds is None
    quiet, loud = ppd.entropy_bounds(BINOMIAL, BITS), ppd.entropy_bounds(BINOMIAL, 1 - BITS)
    assert quiet.upper_holds and not loud.upper_holds


# --- print_summary ---------------------------------------------------------------------------------------------------


def test_print_summary(capsys):
    prior = sure_at(3, 0.3)
    bounds, found = ppd.entropy_bounds(prior, Q), ppd.reverse_entropy(KEY, prior, Q)
    bounds.print_summary(found)
    head, *rows, condition, outside = capsys.readouterr().out.rstrip("\n").split("\n")
    assert head.split() == ["t", "lower", "model", "upper", "(nats)"]
    table = np.array([[float(cell) for cell in row.split()[:4]] for row in rows])
    expected = np.stack([[1, 2, 3, 4], bounds.lower, found.value, bounds.upper], -1)
    np.testing.assert_allclose(table, expected, atol=6e-5)
    assert [row.endswith("outside") for row in rows] == [False, False, True, False]
    assert condition.startswith("The upper bound holds for these data (slack ")
    assert outside == "Outside the bounds: 1 of 4 steps."


@pytest.mark.parametrize(
    "data, words",
    [(None, "was not checked (slack nan"), (3 * X, "need not hold for these data"), (Q, "holds for these data")],
    ids=["none", "wide", "unit"],
)
def test_print_summary_says_whether_the_upper_bound_holds(capsys, data, words):
    prior = sure_at(3, 1.0)
    ppd.entropy_bounds(prior, data).print_summary(ppd.reverse_entropy(KEY, prior, Q))
    out = capsys.readouterr().out
    assert f"The upper bound {words}" in out and out.endswith("Outside the bounds: no step.\n")


# --- other kernels ---------------------------------------------------------------------------------------------------


def test_a_kernel_without_bounds_says_so():
    kernel = UniformCategorical((3,))
    prior = ppd.Diffusion(kernel, SCHEDULE, lambda x_t, t: (x_t * 0.1, 0 * x_t, 0 * x_t)).prior({})
    with pytest.raises(NotImplementedError, match="UniformCategorical does not define entropy_bounds"):
        ppd.entropy_bounds(prior, np.array([[0, 1, 2], [1, 1, 0]]))
    # its own entropy needs no more than NumPyro's: here nearly log 3 per entry, whatever the state
    found = ppd.reverse_entropy(KEY, prior, np.array([[0, 1, 2], [1, 1, 0]]))
    assert (found.value[-1] > 0.9 * 3 * np.log(3)) and (found.value <= 3 * np.log(3) + 1e-5).all()
