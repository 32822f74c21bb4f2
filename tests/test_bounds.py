"""lower_bound: its parts, its error, its chunks, its rule for the estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd

SCHEDULE = ppd.FixedSchedule([0.1, 0.4, 0.25, 0.7])
X = jnp.array([[0.5, -1.0], [2.0, 0.3], [0.1, 0.2], [-0.7, 1.5], [0.0, -0.4]])


def network(x_t, t):
    return 0.2 * x_t + 0.05 * t[..., None], 0.1 * x_t - 0.1


def bit_network(x_t, t):
    return 1.5 * x_t - 0.2 * t[..., None]


GAUSSIAN = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, network).prior({})
BINOMIAL = ppd.Diffusion(ppd.BinomialKernel((2,), probs=0.3), SCHEDULE, bit_network).prior({})
EXACT = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, lambda x_t, t: (0 * x_t, 0 * x_t), last_step="network").prior(
    {}
)


def bound_of(prior, x, seed=0, **settings):
    return ppd.lower_bound(jax.random.key(seed), prior, x, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["analytic", "log_ratio"])
@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_shapes_and_parts(estimator, last_step):
    prior = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, network, last_step=last_step).prior({})
    whole = bound_of(prior, X[:4].reshape(2, 2, 2), estimator=estimator)
    for field in ("value", "std_error", "null", "prior_kl", "log_abs_det", "above_null"):
        assert getattr(whole, field).shape == (2, 2), field
        assert np.isfinite(getattr(whole, field)).all(), field
    assert whole.kl_per_step.shape == (2, 2, 4)
    np.testing.assert_allclose(whole.value, -whole.kl_per_step.sum(-1) - whole.prior_kl, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.above_null, whole.value - whole.null, rtol=1e-5)
    np.testing.assert_allclose(whole.null, prior.kernel.stationary().log_prob(X[:4]).reshape(2, 2), rtol=1e-5)
    np.testing.assert_allclose(
        whole.prior_kl, prior.kernel.prior_kl(X[:4].reshape(2, 2, 2), SCHEDULE.log_snr()[-1]), rtol=1e-5
    )
    if estimator == "analytic":
        assert (whole.kl_per_step[..., 1:] > -1e-6).all()
    rows = bound_of(prior, X[:4], estimator=estimator)
    np.testing.assert_allclose(rows.value, whole.value.ravel(), rtol=1e-5)
    assert bound_of(prior, X[0], estimator=estimator).kl_per_step.shape == (4,)


@pytest.mark.slow
def test_shape_of_a_scalar_event():
    prior = ppd.Diffusion(ppd.GaussianKernel(()), SCHEDULE, lambda x_t, t: (0 * x_t, 0 * x_t)).prior({})
    assert bound_of(prior, 0.3).value.shape == ()
    assert bound_of(prior, [0.3, 1.0, 2.0]).kl_per_step.shape == (3, 4)


@pytest.mark.slow
def test_exact_process():
    """Standard normal data and its exact reverse process: every trajectory weighs log p(x)."""
    bound = bound_of(EXACT, X)
    np.testing.assert_allclose(bound.value, EXACT.kernel.stationary().log_prob(X), atol=0.5)
    weighted = EXACT.with_log_prob(ppd.Importance(jax.random.key(1), 5)).log_prob(X)
    np.testing.assert_allclose(weighted, EXACT.kernel.stationary().log_prob(X), atol=2e-5)


@pytest.mark.parametrize("chunk_size", [2, 3, 7])
def test_chunks_that_do_not_divide(chunk_size):
    whole = bound_of(GAUSSIAN, X, num_samples=400)
    parts = bound_of(GAUSSIAN, X, seed=1, num_samples=400, chunk_size=chunk_size)
    assert parts.value.shape == (5,) and parts.kl_per_step.shape == (5, 4)
    np.testing.assert_array_equal(parts.null, whole.null)
    np.testing.assert_array_equal(parts.prior_kl, whole.prior_kl)
    error = np.hypot(whole.std_error, parts.std_error)
    np.testing.assert_array_less(np.abs(whole.value - parts.value), 4.5 * error)


@pytest.mark.parametrize("prior", [GAUSSIAN, BINOMIAL], ids=["gaussian", "binomial"])
@pytest.mark.parametrize("estimator", ["analytic", "log_ratio"])
def test_std_error_is_calibrated(prior, estimator):
    if prior is BINOMIAL and estimator == "log_ratio":
        pytest.skip("refused")
    x = X[0] if prior is GAUSSIAN else jnp.array([1.0, 0.0])
    # many independent estimates, as rows of one call
    rows = bound_of(prior, jnp.broadcast_to(x, (2000, 2)), estimator=estimator, num_samples=8)
    spread = np.std(rows.value)
    reported = np.sqrt(np.mean(np.asarray(rows.std_error) ** 2))
    np.testing.assert_allclose(reported, spread, rtol=0.15)
    deviations = (rows.value - np.mean(rows.value)) / rows.std_error
    assert 0.85 < np.mean(np.abs(deviations) < 2.36) <= 1.0  # Student's t with 7 degrees of freedom: 0.95


def test_one_sample_has_no_error():
    assert np.isnan(bound_of(GAUSSIAN, X, num_samples=1).std_error).all()


@pytest.mark.slow
def test_estimators_agree():
    analytic = bound_of(GAUSSIAN, X, estimator="analytic", num_samples=3000)
    log_ratio = bound_of(GAUSSIAN, X, estimator="log_ratio", num_samples=3000)
    error = np.hypot(analytic.std_error, log_ratio.std_error)
    np.testing.assert_array_less(np.abs(analytic.value - log_ratio.value), 4.5 * error)
    np.testing.assert_allclose(analytic.kl_per_step.mean(0), log_ratio.kl_per_step.mean(0), atol=0.25)


@pytest.mark.slow
def test_the_estimator_is_a_rule():
    default = bound_of(GAUSSIAN, X)
    np.testing.assert_array_equal(default.value, bound_of(GAUSSIAN, X, estimator="log_ratio").value)
    bits = (X > 0).astype(int)
    np.testing.assert_array_equal(bound_of(BINOMIAL, bits).value, bound_of(BINOMIAL, bits, estimator="analytic").value)
    with pytest.raises(ValueError, match="estimator must be 'analytic' for a discrete kernel"):
        bound_of(BINOMIAL, bits, estimator="log_ratio")


def test_same_key_same_answer():
    np.testing.assert_array_equal(bound_of(GAUSSIAN, X).value, bound_of(GAUSSIAN, X).value)
    assert not np.array_equal(bound_of(GAUSSIAN, X).value, bound_of(GAUSSIAN, X, seed=1).value)


def test_bound_is_below_log_p_for_bits():
    """log p by enumeration of all words; K may not exceed it."""
    words = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])

    @jax.jit
    def log_p():
        process = BINOMIAL.process
        log = process.kernel.stationary().log_prob(words)
        for i in (3, 2, 1):
            log = jax.nn.logsumexp(log[:, None] + process(words[:, None], process.rates.at(i)).log_prob(words[None]), 0)
        return jax.nn.logsumexp(log[:, None] + process.last(words[:, None]).log_prob(words[None]), 0)

    bound = bound_of(BINOMIAL, words, num_samples=500)
    np.testing.assert_allclose(np.exp(log_p()).sum(), 1, rtol=1e-5)
    assert (bound.value < log_p() + 3 * bound.std_error).all()


def test_print_summary(capsys):
    bound = bound_of(GAUSSIAN, X)
    bound.print_summary()
    head, *rows = capsys.readouterr().out.rstrip("\n").split("\n")
    assert "nats" in head and "bits" in head
    assert [row[:12].strip() for row in rows] == ["K", "L_null", "K - L_null"]
    for row, values in zip(rows, (bound.value, bound.null, bound.above_null), strict=True):
        nats, bits, error = map(float, row[12:].split())
        np.testing.assert_allclose(nats, np.mean(values), atol=1e-4)
        np.testing.assert_allclose(bits, np.mean(values) / np.log(2), atol=1e-4)
        np.testing.assert_allclose(error, np.std(values, ddof=1) / np.sqrt(5) / np.log(2), atol=1e-4)
    bound_of(GAUSSIAN, X[0]).print_summary()  # one datum: no error, no warning
    assert "nan" in capsys.readouterr().out
