"""estimate_log_prob: shapes, chunks, keys, what it says of itself, and what it costs. Exact answers are in exact/."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

import pp_diffusion as ppd
from pp_diffusion import likelihood
from pp_diffusion.likelihood import BELIEVABLE, BOUND_ONLY, DOUBTFUL
from pp_diffusion.weights import weights_of_rows
from tests.compilations import compilations

KEY, OTHER = jax.random.key(0), jax.random.key(1)
SCHEDULE = ppd.FixedSchedule([0.1, 0.4, 0.25, 0.7])
X = np.array([[0.5, -1.0], [2.0, 0.3], [0.1, 0.2], [-0.7, 1.5], [0.0, -0.4]])
Z = 4.5  # two-sided Gaussian tail 6.8e-6 per comparison, on fixed keys


def network(x_t, t):
    t = t.reshape(t.shape + (1,) * (x_t.ndim - t.ndim))
    return 0.2 * x_t + 0.05 * t, 0.1 * x_t - 0.1


def gaussian(event_shape=(2,), schedule=SCHEDULE, **settings):
    return ppd.Diffusion(ppd.GaussianKernel(event_shape), schedule, network, **settings).prior({})


GAUSSIAN = gaussian()
BINOMIAL = ppd.Diffusion(
    ppd.BinomialKernel((2,), probs=0.3), SCHEDULE, lambda x_t, t: 1.5 * x_t - 0.2 * t[..., None]
).prior({})


def made_of(*columns):
    """An estimate of given log weights, a column per datum."""
    log_weights = np.stack(columns, -1).astype(float)
    source = likelihood.Trajectories(GAUSSIAN, np.zeros((len(columns), 2)), 16)
    return likelihood.summarise(log_weights, None, source)


# log weights: quantiles of a normal and of two Pareto distributions, and what has no tail to be fitted
U = np.random.default_rng(0).permutation((np.arange(60) + 0.5) / 60)
TAME, BETWEEN, HEAVY = 0.2 * norm.ppf(U), -0.7 * np.log(U), -1.5 * np.log(U)
CONSTANT, NOTHING = np.full(60, -1.5), np.full(60, -np.inf)
THREE = np.where(np.arange(60) < 3, 9.0 + np.arange(60), 0.0)  # three huge weights


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("event_shape", [(), (2, 2)], ids=str)
def test_shapes(batch_shape, event_shape):
    x = np.random.default_rng(0).normal(size=batch_shape + event_shape)
    estimate = ppd.estimate_log_prob(KEY, gaussian(event_shape), x, 30, chunk_size=7)
    for name in ("value", "psis_value", "std_error", "ess", "pareto_k", "bound", "bound_std_error", "gap", "verdict"):
        assert getattr(estimate, name).shape == batch_shape, name
    assert estimate.lower_limit().shape == batch_shape
    assert estimate.log_weights.shape == (30, *batch_shape)
    assert estimate.value.dtype == estimate.log_weights.dtype == np.float64
    assert isinstance(estimate.total_verdict, str)


@pytest.mark.parametrize("prior, x", [(GAUSSIAN, X), (BINOMIAL, (X > 0) * 1)], ids=["gaussian", "binomial"])
def test_its_parts_are_those_of_the_weights(prior, x):
    estimate = ppd.estimate_log_prob(KEY, prior, x, 400)
    weights = np.exp(estimate.log_weights)
    np.testing.assert_allclose(estimate.value, logsumexp(estimate.log_weights, 0) - np.log(400), rtol=1e-12)
    farthest = np.abs(weights / weights.mean(0) - 1).max(0) / 400  # counted once more
    delta = weights.std(0, ddof=1) / np.sqrt(400) / weights.mean(0)
    np.testing.assert_allclose(estimate.std_error, np.hypot(delta, farthest), rtol=1e-9)
    np.testing.assert_allclose(estimate.ess, weights.sum(0) ** 2 / (weights**2).sum(0), rtol=1e-9)
    assert (estimate.ess > 1).all() and (estimate.ess < 400).all()
    np.testing.assert_array_equal(estimate.gap, estimate.value - estimate.bound)
    assert (estimate.gap > 0).all()
    assert (estimate.pareto_k < 0.5).all()
    # with a light tail there is little to smooth
    assert (np.abs(estimate.psis_value - estimate.value) < estimate.std_error).all()
    assert not np.array_equal(estimate.psis_value, estimate.value)
    mean, error = estimate.log_weights.mean(0), estimate.log_weights.std(0, ddof=1) / 20
    if prior is GAUSSIAN:
        np.testing.assert_allclose([estimate.bound, estimate.bound_std_error], [mean, error])
    else:  # K is estimated by divergences, at times of its own
        assert (np.abs(estimate.bound - mean) < Z * np.hypot(estimate.bound_std_error, error)).all()
        assert not np.allclose(estimate.bound, mean)


# --- keys and chunks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    return ppd.estimate_log_prob(OTHER, GAUSSIAN, X, 4000)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_that_do_not_divide(chunk_size, whole):
    """Exact shapes and the same law, at |z| < 4.5 for log p and K of each datum."""
    num = 100 if chunk_size == 1 else 250
    parts = ppd.estimate_log_prob(KEY, GAUSSIAN, X, num, chunk_size=chunk_size)
    assert parts.log_weights.shape == (num, 5) and parts.value.shape == (5,)
    assert len(np.unique(parts.log_weights)) == parts.log_weights.size  # every trajectory its own
    error = np.hypot(parts.std_error, whole.std_error)
    assert (np.abs(parts.value - whole.value) < Z * error).all()
    error = np.hypot(parts.bound_std_error, whole.bound_std_error)
    assert (np.abs(parts.bound - whole.bound) < Z * error).all()
    assert (np.abs(whole.value - whole.value[[1, 2, 3, 4, 0]]) > Z * error).any()  # which would tell rows apart


def test_the_key_is_all_there_is_to_chance():
    one, same, other = (ppd.estimate_log_prob(key, GAUSSIAN, X, 30) for key in (KEY, KEY, OTHER))
    np.testing.assert_array_equal(one.log_weights, same.log_weights)
    np.testing.assert_array_equal(one.bound, same.bound)
    assert not (one.log_weights == other.log_weights).any()
    legacy = ppd.estimate_log_prob(jax.random.PRNGKey(0), GAUSSIAN, X, 30)
    np.testing.assert_array_equal(legacy.log_weights, one.log_weights)


def test_extend_adds_trajectories():
    one, other = (ppd.estimate_log_prob(key, GAUSSIAN, X, num) for key, num in ((KEY, 30), (OTHER, 50)))
    both = one.extend(OTHER, 50)
    assert (one.num_trajectories, both.num_trajectories) == (30, 80)
    np.testing.assert_array_equal(both.log_weights, np.concatenate([one.log_weights, other.log_weights]))
    np.testing.assert_allclose(both.value, np.logaddexp(one.value + np.log(30), other.value + np.log(50)) - np.log(80))
    np.testing.assert_allclose(both.bound, (30 * one.bound + 50 * other.bound) / 80)
    assert both.extend(jax.random.key(2), 1).num_trajectories == 81


def test_extend_refuses_a_key_that_was_used():
    one = ppd.estimate_log_prob(KEY, GAUSSIAN, X, 30)
    for estimate, key in ((one, KEY), (one.extend(OTHER, 5), OTHER), (one, jax.random.PRNGKey(0))):
        with pytest.raises(ValueError, match="rng_key must be another one than before"):
            estimate.extend(key, 5)


def test_an_unseen_flip_is_in_the_error_of_discrete_data():
    """All weights equal: of continuous data that is the exact process, of discrete data it may be luck."""
    log_weights, zero = np.zeros((100, 1)), np.zeros(1)
    source = likelihood.Trajectories(BINOMIAL, np.zeros((1, 2)), 16)
    lucky = likelihood.summarise(log_weights, likelihood.BoundOfBits(zero, zero, 4), source)
    np.testing.assert_allclose([made_of(np.zeros(100)).std_error[0], lucky.std_error[0]], [0, 0.01], atol=1e-12)


@pytest.mark.slow
def test_extend_weights_a_separate_bound_by_its_samples():
    """100 and 200 trajectories bring 6 and 12 samples of K."""
    one, other = (ppd.estimate_log_prob(key, BINOMIAL, np.eye(2), num) for key, num in ((KEY, 100), (OTHER, 200)))
    both = one.extend(OTHER, 200)
    np.testing.assert_allclose(both.bound, (one.bound + 2 * other.bound) / 3)
    np.testing.assert_allclose(both.bound_std_error, np.hypot(one.bound_std_error, 2 * other.bound_std_error) / 3)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_trajectories must be an integer >= 1"):
            one.extend(OTHER, wrong)


@pytest.mark.slow
def test_a_context_of_a_datum_meets_all_data():
    """A prior with a batch of contexts and one datum: a value per context."""

    def shifted(x_t, t, context):
        return network(x_t - context, t)

    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, shifted)
    prior = diffusion.prior({}, context=jnp.asarray(X))
    one = ppd.estimate_log_prob(KEY, prior, X[0], 500)
    assert one.value.shape == (5,)
    each = [
        ppd.estimate_log_prob(OTHER, diffusion.prior({}, context=jnp.asarray(c), context_event_dim=1), X[0], 500)
        for c in X
    ]
    values, errors = (np.array([getattr(e, name) for e in each]) for name in ("value", "std_error"))
    assert (np.abs(one.value - values) < Z * np.hypot(one.std_error, errors)).all()
    assert np.ptp(values) > 20 * errors.max()


def test_it_agrees_with_the_importance_rule():
    """The same average by another route; |z| < 4.5 per datum."""
    rule = GAUSSIAN.with_log_prob(ppd.Importance(KEY, 2000))
    estimate = ppd.estimate_log_prob(OTHER, GAUSSIAN, X, 2000)
    difference = estimate.value - np.asarray(rule.log_prob(jnp.asarray(X)))
    assert (np.abs(difference) < Z * np.sqrt(2) * estimate.std_error).all()


def test_double_precision():
    with jax.enable_x64(True):
        estimate = ppd.estimate_log_prob(KEY, gaussian(), X, 2000)
    single = ppd.estimate_log_prob(OTHER, GAUSSIAN, X, 2000)
    assert (np.abs(estimate.value - single.value) < Z * np.hypot(estimate.std_error, single.std_error)).all()
    assert (estimate.log_weights != estimate.log_weights.astype(np.float32)).mean() > 0.99


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_verdicts():
    estimate = made_of(TAME, BETWEEN, HEAVY, CONSTANT, THREE, NOTHING)
    np.testing.assert_array_equal(estimate.verdict, [BELIEVABLE, DOUBTFUL, BOUND_ONLY, BELIEVABLE] + 2 * [BOUND_ONLY])
    k = estimate.pareto_k
    assert estimate.good_k == pytest.approx(1 - 1 / np.log10(60))
    assert k[0] < estimate.good_k < k[1] < 0.7 < k[2] < np.inf
    assert k[3] == -np.inf and k[4] == k[5] == np.inf
    np.testing.assert_array_equal(np.isnan(estimate.std_error), k >= 0.7)
    np.testing.assert_allclose([estimate.value[3], estimate.ess[3], estimate.std_error[3]], [-1.5, 60, 0], atol=1e-9)
    assert estimate.value[5] == -np.inf


def test_a_large_error_is_doubtful_whatever_the_tail():
    wide = made_of(np.where(np.arange(25) % 5, -5.0, 5.0), np.where(np.arange(25) % 5, 1.0, 1.5))
    assert (wide.pareto_k == -np.inf).all()
    assert wide.std_error[0] > 0.2 > wide.std_error[1]
    np.testing.assert_array_equal(wide.verdict, [DOUBTFUL, BELIEVABLE])


@pytest.mark.parametrize("num", [1, 2, 24])
def test_too_few_trajectories_to_tell(num):
    estimate = made_of(TAME[:num], CONSTANT[:num])
    assert (estimate.verdict == BOUND_ONLY).all() and estimate.total_verdict == BOUND_ONLY
    assert np.isposinf(estimate.pareto_k).all() and np.isnan(estimate.std_error).all()
    assert made_of(TAME[:25], CONSTANT[:25]).total_verdict == BELIEVABLE


@pytest.mark.parametrize(
    "believable, doubtful, bound_only, verdict",
    [
        (100, 0, 0, BELIEVABLE),
        (95, 4, 1, BELIEVABLE),
        (95, 3, 2, DOUBTFUL),
        (94, 6, 0, DOUBTFUL),
        (0, 95, 5, DOUBTFUL),
        (94, 0, 6, BOUND_ONLY),
    ],
)
def test_the_total_verdict_is_a_rule(believable, doubtful, bound_only, verdict):
    columns = [TAME] * believable + [BETWEEN] * doubtful + [HEAVY] * bound_only
    estimate = made_of(*columns)
    assert [int(np.sum(estimate.verdict == v)) for v in (BELIEVABLE, DOUBTFUL, BOUND_ONLY)] == [
        believable,
        doubtful,
        bound_only,
    ]
    assert estimate.total_verdict == verdict


def test_lower_limit():
    estimate = made_of(TAME, HEAVY)
    np.testing.assert_allclose(estimate.value - estimate.lower_limit(), np.log(20))
    np.testing.assert_allclose(estimate.value - estimate.lower_limit(0.5), np.log(2))
    for wrong in (0, 1, -0.5, 95, np.nan):
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
            estimate.lower_limit(wrong)


def test_one_trajectory():
    """Nothing but a value; no warning either."""
    estimate = ppd.estimate_log_prob(KEY, GAUSSIAN, X, 1)
    np.testing.assert_array_equal(estimate.value, estimate.log_weights[0])
    np.testing.assert_array_equal(estimate.ess, 1)
    for field in (estimate.std_error, estimate.bound_std_error):
        assert np.isnan(field).all()
    assert estimate.good_k == -np.inf and (estimate.verdict == BOUND_ONLY).all()
    estimate.print_summary()
    assert estimate.to_arviz().posterior.sizes["chain"] == 1


# --- print_summary ---------------------------------------------------------------------------------------------------


def printed(capsys, estimate, *args):
    estimate.print_summary(*args)
    out, err = capsys.readouterr()
    assert err == ""
    return out.rstrip("\n").split("\n")


def test_print_summary_of_few_data(capsys):
    estimate = ppd.estimate_log_prob(KEY, GAUSSIAN, X, 400)
    head, *rows, log_p, bound, gap, words = printed(capsys, estimate)
    assert head.split("  ")[-1] == "verdict" and "in bits" in head and "k-hat" in head
    table = np.array([[float(cell) for cell in row.split()[:8]] for row in rows])
    expected = [np.arange(5), estimate.value, estimate.std_error, estimate.value / np.log(2), estimate.ess]
    expected += [estimate.pareto_k, estimate.bound, estimate.gap]
    np.testing.assert_allclose(table, np.stack(expected, -1), rtol=1e-3)
    assert all(row.endswith("  believable") for row in rows)
    for line, values in ((log_p, estimate.value), (bound, estimate.bound), (gap, estimate.gap)):
        nats, error, bits, bits_error = (float(word) for word in line.split(":")[1].split() if word[-1].isdigit())
        np.testing.assert_allclose([nats, error], [values.mean(), values.std(ddof=1) / np.sqrt(5)], atol=1e-4)
        np.testing.assert_allclose([bits, bits_error], np.array([nats, error]) / np.log(2), atol=2e-4)
    assert words.startswith("400 trajectories per datum; 5 believable, 0 doubtful, 0 bound only. In total believable:")
    # one datum has no spread over data: its own error
    one = made_of(TAME)
    assert f"± {one.std_error[0]:.4f} nats" in printed(capsys, one)[2]


def test_print_summary_of_many_data_shows_the_worst(capsys):
    estimate = made_of(*[TAME] * 4, HEAVY, *[CONSTANT] * 10)
    _, first, second, note, *_ = printed(capsys, estimate, 2)
    assert first.split()[0] == "4" and first.endswith("bound only")
    assert second.split()[0] == "0" and second.endswith("believable")
    assert note.strip() == "(the 2 of 15 data with the largest k-hat)"
    assert len(printed(capsys, estimate)) == 1 + 10 + 1 + 3 + 1


@pytest.mark.parametrize(
    "column, words",
    [
        (TAME, "1 believable, 0 doubtful, 0 bound only. In total believable: log p and its errors can be quoted"),
        (BETWEEN, "In total doubtful: quote log p with this warning, or add trajectories (.extend)"),
        (HEAVY, "In total bound only: quote K; log p is at least as high"),
        (NOTHING, "In total bound only: quote K"),
    ],
)
def test_print_summary_says_it_in_words(capsys, column, words):
    assert words in printed(capsys, made_of(column))[-1]


def test_no_weight_at_all_is_reported_without_warnings(capsys):
    estimate = made_of(TAME, NOTHING)
    assert printed(capsys, estimate)[2].split()[:4] == ["1", "-inf", "unknown", "-inf"]
    assert np.isnan(estimate.gap[1]) and np.isfinite(estimate.gap[0])
    draws = estimate.to_arviz().posterior["log_prob"].values
    assert np.isnan(draws[..., 1]).all() and np.isfinite(draws[..., 0]).all()


def test_silence_by_default(capfd):
    ppd.estimate_log_prob(KEY, GAUSSIAN, X, 30, chunk_size=40).extend(OTHER, 30)
    assert capfd.readouterr() == ("", "")
    ppd.estimate_log_prob(KEY, GAUSSIAN, X, 30, chunk_size=40, progress_bar=True)
    out, err = capfd.readouterr()
    assert out == "" and "log p: 100%" in err


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_model_that_gives_no_numbers_is_named():
    for wrong in (jnp.nan, jnp.inf):
        prior = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, lambda x_t, t, w=wrong: (x_t * w, 0 * x_t)).prior({})
        with pytest.raises(FloatingPointError, match="prior has log weights that are not finite for 5 of 5 data"):
            ppd.estimate_log_prob(KEY, prior, X, 30)
    where = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        SCHEDULE,
        lambda x_t, t: (jnp.where(x_t.sum(-1, keepdims=True) > 9, jnp.nan, x_t), 0 * x_t),
    ).prior({})
    with pytest.raises(FloatingPointError, match="for 1 of 2 data"):
        ppd.estimate_log_prob(KEY, where, np.array([[0.0, 0.0], [40.0, 40.0]]), 30)


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_one_compilation_serves_all_calls_of_a_shape():
    ppd.estimate_log_prob(KEY, GAUSSIAN, X, 30, chunk_size=20)
    with compilations() as programs:
        estimate = ppd.estimate_log_prob(OTHER, gaussian(), X + 1, 30, chunk_size=20)  # an equal prior, built anew
        estimate.extend(KEY, 30)
    assert weights_of_rows.__name__ not in programs
    with compilations() as programs:
        ppd.estimate_log_prob(OTHER, GAUSSIAN, X[:4], 30, chunk_size=20)
    assert programs[weights_of_rows.__name__] == 1


def test_memory_does_not_grow_with_the_length():
    """The temporary memory of a block, T = 50 and 500: the schedule's arrays and the keys grow, 64 bytes a step; the
    16 384 bytes of a state, if one were kept per step, would not pass."""

    def temporary(num_timesteps):
        prior = gaussian(schedule=ppd.FixedSchedule.log_linear(num_timesteps))
        rows = jnp.zeros((32, 2))
        lowered = weights_of_rows.lower(prior, rows, KEY, 64)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(50), temporary(500)
    assert short > 64 * 32 * 2 * 4
    assert long - short < 450 * 64
