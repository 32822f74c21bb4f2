"""The log likelihood and the entropies of the steps, against closed forms and enumeration."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import oracles
import pytest
from oracles import BinaryChain, Chain, GaussianData, Z, enable_x64, quick_jit, words, z_score
from scipy.special import entr
from scipy.stats import chi2, ks_2samp

import pp_diffusion as ppd

DATA = GaussianData(np.array([0.8, -1.5, 0.1]), np.array([0.4, 1.6, 0.9]))
X = DATA.draw(3, 5)
KEY = jax.random.key(0)


def linear_prior(num_timesteps, final_log_snr, *, wrong=False, last_step="network"):
    """The exact reverse process of ``DATA``, or one that is off in every step; and its closed form."""
    log_snr = oracles.log_linear(num_timesteps, final_log_snr=final_log_snr)
    chain = Chain(log_snr)
    model = oracles.wrong_reverse(chain, DATA) if wrong else DATA.exact_reverse(chain)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((3,)),
        ppd.FixedSchedule.log_linear(num_timesteps, final_log_snr=final_log_snr),
        oracles.Affine(True),
        parameterization="direct",
        last_step=last_step,
    )
    exact = model.with_kernel_last_step(chain) if last_step == "kernel" else model
    return diffusion.prior({diffusion.network_site: model.params()}), exact, chain


# --- Gaussian data, linear processes ---------------------------------------------------------------------------------


def test_the_exact_process_gives_log_p_in_float32():
    """log p, K and every log weight, T = 200: 1e-3 nats."""
    prior, *_ = linear_prior(200, -20.0)
    estimate = ppd.estimate_log_prob(KEY, prior, X, 64)
    assert estimate.log_weights.std(0).max() <= 1e-3
    np.testing.assert_allclose(estimate.value, DATA.log_prob(X), atol=1e-3)
    np.testing.assert_allclose(estimate.psis_value, DATA.log_prob(X), atol=1e-3)
    np.testing.assert_allclose(estimate.bound, estimate.value, atol=1e-3)
    np.testing.assert_allclose(estimate.ess, 64, rtol=1e-5)


def test_the_exact_process_gives_log_p_in_float64():
    with enable_x64():
        prior, *_ = linear_prior(200, -60.0)
        estimate = ppd.estimate_log_prob(KEY, prior, X, 8)
    for found in (estimate.value, estimate.bound, estimate.log_weights):
        np.testing.assert_allclose(found - DATA.log_prob(X), 0, atol=1e-8 * 200)


@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_a_wrong_model_gets_its_own_log_p_and_bound(last_step):
    """|z| < 4.5 for log p and K of five data, against closed forms that are themselves apart."""
    prior, model, chain = linear_prior(12, -3.0, wrong=True, last_step=last_step)
    estimate = ppd.estimate_log_prob(KEY, prior, X, 20_000)
    exact, bound = model.log_prob(X), model.bound(chain, X)
    assert (exact - bound).min() > 0.05
    assert np.abs((estimate.value - exact) / estimate.std_error).max() < Z
    assert np.abs((estimate.bound - bound) / estimate.bound_std_error).max() < Z
    assert (estimate.std_error < 0.022).all()  # so that the other of the two would be refused
    assert (estimate.verdict != "bound only").all()


@pytest.mark.slow
def test_the_errors_are_the_real_ones_and_the_mean_weight_is_unbiased():
    """1000 estimates of one datum: stated errors within 15 % of the spread; ±1.96 of them cover
    nearly 95 % (the weights are skewed, and those of a large k-hat are left out)."""
    prior, model, chain = linear_prior(12, -3.0, wrong=True)
    x = X[2]
    estimate = ppd.estimate_log_prob(KEY, prior, np.tile(x, (1000, 1)), 400)
    known = np.isfinite(estimate.std_error)
    assert known.mean() > 0.9
    np.testing.assert_allclose(np.sqrt(np.mean(estimate.std_error[known] ** 2)), estimate.value.std(), rtol=0.15)
    np.testing.assert_allclose(np.sqrt(np.mean(estimate.bound_std_error**2)), estimate.bound.std(), rtol=0.15)
    inside = np.abs(estimate.value - model.log_prob(x))[known] < 1.96 * estimate.std_error[known]
    assert 0.89 < inside.mean() < 0.97
    assert abs(z_score(np.exp(estimate.value - model.log_prob(x)), 1.0)) < Z
    assert abs(z_score(estimate.bound, model.bound(chain, x))) < Z
    # the ratio's spread in terms of the effective size
    np.testing.assert_allclose(np.mean(400 / estimate.ess - 1) / 400, estimate.value.var(), rtol=0.15)


def test_contexts_and_the_transforms_jacobian_enter():
    """Data N(context, 0.5²) in the model's space, a context per datum, and the exact process: equality, in chunks that
    do not divide."""
    schedule, scale = oracles.log_linear(60), np.array([2.0, 0.05, -7.0])
    unit = GaussianData(np.ones(3), np.full(3, 0.5))
    slope, offset, variance = unit.exact_reverse(Chain(schedule))

    def network(x_t, t, context):
        a, b, c = (jnp.asarray(part, x_t.dtype)[t - 1] for part in (slope, offset, variance))
        return x_t + (a * x_t + b * context), jnp.broadcast_to(c, x_t.shape)

    prior = ppd.Diffusion(
        ppd.GaussianKernel((3,)),
        ppd.FixedSchedule.log_linear(60, final_log_snr=-20.0),
        network,
        parameterization="direct",
        last_step="network",
        transform=dist.transforms.AffineTransform(jnp.array([3.0, -2.0, 0.5]), jnp.asarray(scale)),
    ).prior({}, context=jnp.asarray(X))
    z = X + 0.5 * np.random.default_rng(1).standard_normal(X.shape)
    log_prob = oracles.normal_log_prob(z, X, 0.25).sum(-1) - np.log(np.abs(scale)).sum()
    estimate = ppd.estimate_log_prob(KEY, prior, [3.0, -2.0, 0.5] + scale * z, 9, chunk_size=2)
    assert estimate.log_weights.shape == (9, 5)
    np.testing.assert_allclose(estimate.log_weights, np.tile(log_prob, (9, 1)), atol=1e-3)
    np.testing.assert_allclose(estimate.bound, log_prob, atol=1e-3)


# --- words by enumeration --------------------------------------------------------------------------------------------

NUM_BITS, BASE = 4, np.array([0.2, 0.5, 0.7, 0.4])
WORDS = words(NUM_BITS)


def make(last_step):
    schedule = ppd.FixedSchedule.constant_erasure(6)
    return ppd.Diffusion(ppd.BinomialKernel((NUM_BITS,), BASE), schedule, ppd.networks.MLP((16,)), last_step=last_step)


@cache
def enumerated(last_step, num_timesteps=6):
    """The trained prior, and its process as a table over all states, for the oracle."""
    prior = make(last_step).prior(trained(), num_timesteps=num_timesteps)

    @quick_jit
    def table(process):
        rates = process.rates.at(slice(process.first_network_step, None))
        states = jnp.broadcast_to(jnp.asarray(WORDS, dtype=float), (rates.num_timesteps, *WORDS.shape))
        return process(states, rates.along_leading_axis(1)).mean, process.rates.log_snr

    rows, log_snr = map(np.asarray, table(prior.process))
    unused = np.full((num_timesteps - len(rows), *rows.shape[1:]), 0.5)
    beta = Chain(log_snr.astype(np.float64)).beta
    return prior, BinaryChain(BASE, beta, np.concatenate([unused, rows]).astype(np.float64), last_step)


@cache
def trained():
    """Parameters for :func:`make`, briefly trained on words in which the first bit says something of all others."""
    rng = np.random.default_rng(2)
    first = rng.random(4000) < 0.3
    data = (rng.random((4000, NUM_BITS)) < np.where(first[:, None], [1, 0.8, 0.2, 0.9], [0, 0.3, 0.6, 0.3])) * 1
    fit = ppd.fit(jax.random.key(3), make("network"), data, num_steps=300, batch_size=128, progress_bar=False)
    return fit.params


@pytest.mark.slow
@pytest.mark.parametrize("last_step, num_timesteps", [("kernel", 6), ("network", 6), ("kernel", 4)])
def test_a_trained_model_of_words(last_step, num_timesteps):
    """The mean over repetitions of exp(value) is p(x), and K the enumerated one: |z| < 4.5 for every word, the squares
    together at 1e-5; the four most probable words with errors of 1 % and at |z| < 3 (a rate of 1 %, on fixed keys).

    T = 4 is the trained chain shortened: a model of its own.
    """
    prior, exact = enumerated(last_step, num_timesteps)
    np.testing.assert_allclose(exact.probs.sum(), 1, rtol=1e-5)
    repetitions, num = 50, 400
    estimate = ppd.estimate_log_prob(KEY, prior, np.broadcast_to(WORDS, (repetitions, *WORDS.shape)), num)
    assert estimate.value.shape == (repetitions, len(WORDS))
    found = np.exp(estimate.value).mean(0)
    error = np.sqrt((exact.second_moment - exact.probs**2) / (repetitions * num))
    z = (found - exact.probs) / error
    assert np.abs(z).max() < Z
    assert chi2.sf((z**2).sum(), len(z)) > 1e-5
    most = np.argsort(exact.probs)[-4:]
    assert (error / exact.probs)[most].max() < 0.01
    assert np.abs(z[most]).max() < 3
    assert np.abs(z_score(estimate.bound, exact.bound)).max() < Z
    assert (np.log(exact.probs) - exact.bound).min() > 0.02  # else either would do for the other
    # the error of K is that of one row: all of them against the spread over rows
    np.testing.assert_allclose(
        np.sqrt(np.mean(estimate.bound_std_error**2)), estimate.bound.std(0).mean(), rtol=0.15, atol=1e-6
    )


# --- the law of the weights ------------------------------------------------------------------------------------------


@partial(quick_jit, static_argnums=3)
def forward_weights(process, x, key, num):
    """Log weights of paths drawn in forward order and scored by the path distributions."""
    q = ppd.ForwardTrajectory(process.kernel, process.rates, x)
    p = ppd.ReverseTrajectory(process.kernel, process.rates, process)
    path = q.sample(key, (num,))
    return p.log_prob(path) + process.last(path[:, 0]).log_prob(x) - q.log_prob(path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gaussian", "words"])
def test_weights_have_the_law_of_forward_paths(case):
    """Two-sample Kolmogorov-Smirnov, 8000 against 8000, p > 1e-5 (for words there are ties: conservative)."""
    if case == "gaussian":
        (prior, *_), x = linear_prior(12, -3.0, wrong=True), X[0]
    else:
        (prior, _), x = enumerated("network"), WORDS[11]
    streamed = ppd.estimate_log_prob(KEY, prior, x, 8000).log_weights
    paths = np.asarray(forward_weights(prior.process, jnp.asarray(x, float), jax.random.key(1), 8000))
    assert paths.std() > 0.2
    # sums of the same terms in another order differ in the last digits of float32: round them to be ties again
    assert ks_2samp(streamed.round(3), paths.round(3)).pvalue > 1e-5
    assert ks_2samp(streamed.round(3), paths.round(3) + 0.1 * paths.std()).pvalue < 1e-5  # it would tell


# --- entropies -------------------------------------------------------------------------------------------------------

LOG_2_PI_E = np.log(2 * np.pi * np.e)
BETAS = np.array([0.02, 0.1, 0.05, 0.4, 0.3, 1.0])


def still(x_t, t):
    return 0 * x_t, 0 * x_t


@pytest.mark.parametrize("last_beta", [0.7, 1.0])
def test_gaussian_entropy_bounds(last_beta):
    """(d/2) log 2πe times the posterior's and the step's variance; they need no data, and do not change with them."""
    betas = np.append(BETAS[:-1], last_beta)
    chain = Chain(oracles.from_betas(betas))
    prior = ppd.Diffusion(ppd.GaussianKernel((3,)), ppd.FixedSchedule(betas), still).prior({})
    with enable_x64():
        bounds = ppd.entropy_bounds(prior)
        given = ppd.entropy_bounds(prior, X)
    with np.errstate(divide="ignore"):
        lower = 1.5 * (LOG_2_PI_E + np.log(betas * chain.previous_erased / chain.erased))
    np.testing.assert_allclose(bounds.upper, 1.5 * (LOG_2_PI_E + np.log(betas)), rtol=1e-12)
    assert bounds.lower[0] == -np.inf
    np.testing.assert_allclose(bounds.lower[1:], lower[1:], rtol=1e-9)
    np.testing.assert_array_equal(given.lower, bounds.lower)
    np.testing.assert_array_equal(given.upper, bounds.upper)
    np.testing.assert_allclose(given.slack, 0.5 * (1 - X.var(0)).sum(), rtol=1e-12)
    assert np.isnan(bounds.slack) and bounds.upper_holds is None
    in_float32 = ppd.entropy_bounds(prior)
    np.testing.assert_allclose(in_float32.lower[1:], lower[1:], atol=1e-5)
    np.testing.assert_allclose(in_float32.upper, bounds.upper, atol=1e-5)


@pytest.mark.parametrize("scale", [[0.4, 0.9, 1.3], [0.4, 0.9, 1.6]])
def test_the_entropy_of_gaussian_data_lies_between_its_bounds(scale):
    """Both cases have coordinates wider and narrower than 1. In the second, their variances are above 1 in the mean,
    and the upper bound fails where it may."""
    data = GaussianData(np.array([0.8, -1.5, 0.1]), np.array(scale))
    chain = Chain(oracles.log_linear(40, first_beta=1e-3, final_log_snr=-8.0))
    schedule = ppd.FixedSchedule.log_linear(40, first_beta=1e-3, final_log_snr=-8.0)
    prior = ppd.Diffusion(ppd.GaussianKernel((3,)), schedule, still).prior({})
    # mean and variance of these rows are exactly the data's
    rows = data.mean + data.scale * np.array([[-1.0], [1.0]])
    with enable_x64():
        bounds = ppd.entropy_bounds(prior, rows)
    true = 0.5 * (LOG_2_PI_E + np.log(data.exact_reverse(chain).variance)).sum(-1)
    assert (bounds.lower <= true).all()
    np.testing.assert_allclose(bounds.slack, 0.5 * (1 - data.scale**2).sum(), rtol=1e-9)
    if bounds.slack >= 0:
        assert bounds.upper_holds
        assert (true <= bounds.upper + 1e-12).all()
    else:
        assert not bounds.upper_holds
        assert true[-1] > bounds.upper[-1] + 1e-6 and true[1] < bounds.upper[1]


def same(x_t, t):
    return x_t


def entropy(law):
    return entr(law).sum(-1)


COUNTS = {  # of the 8 words of 3 bits: many zeros; mostly ones; two of them, far from the base rates both ways; all
    "silent": np.array([47, 17, 5, 1, 7, 2, 1, 0]),
    "active": np.array([1, 3, 2, 15, 4, 13, 9, 33]),
    "two words": np.array([0, 60, 0, 0, 20, 0, 0, 0]),
    "all words": np.array([9, 10, 11, 11, 13, 10, 8, 8]),
}


@pytest.mark.parametrize("last_beta", [0.7, 1.0])
@pytest.mark.parametrize("base", [(0.2, 0.2, 0.2), (0.2, 0.5, 0.7)], ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_binomial_entropy_bounds(name, base, last_beta):
    """Eq. 24's entropies and the true one between them, by enumeration of the words."""
    states, law = words(3), COUNTS[name] / COUNTS[name].sum()
    betas, base = np.append(BETAS[:-1], last_beta), np.array(base)
    chain = BinaryChain(base, betas, np.zeros((6, 8, 3)), "kernel")
    kernel = ppd.BinomialKernel((3,), base[0] if len(set(base)) == 1 else base)  # a number will do
    prior = ppd.Diffusion(kernel, ppd.FixedSchedule(betas), same).prior({})
    with enable_x64():
        bounds = ppd.entropy_bounds(prior, np.repeat(states, COUNTS[name], axis=0))
    lower, upper, true = [], [], []
    for t in range(1, 7):
        before, step = law @ chain.marginal(t - 1), chain.forward(t)
        joint = before[:, None] * step  # of x_{t-1} and x_t
        upper.append(before @ entropy(step))
        lower.append(upper[-1] + law @ entropy(chain.marginal(t - 1)) - law @ entropy(chain.marginal(t)))
        true.append(entropy(joint.ravel()) - entropy(joint.sum(0)))
    np.testing.assert_allclose(bounds.upper, upper, rtol=1e-9)
    np.testing.assert_allclose(bounds.lower, lower, rtol=1e-9, atol=1e-12)
    slack = law @ np.log(chain.stationary) + entropy(chain.stationary)
    np.testing.assert_allclose(bounds.slack, slack, rtol=1e-9)
    assert (np.array(lower) <= np.array(true) + 1e-12).all()
    if slack >= 0:
        assert bounds.upper_holds
        assert (np.array(true) <= np.array(upper) + 1e-12).all()
    else:
        assert not bounds.upper_holds
    if (name, base[1]) in (("active", 0.2), ("all words", 0.2)):  # there the condition is needed
        assert slack < 0 and (np.array(true) > np.array(upper) + 1e-3).any()


@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_reverse_entropy_of_linear_processes(last_step):
    """Variances that do not depend on the state: no error."""
    prior, model, _ = linear_prior(12, -3.0, wrong=True, last_step=last_step)
    found = ppd.reverse_entropy(KEY, prior, X)
    np.testing.assert_allclose(found.value, 0.5 * (LOG_2_PI_E + np.log(model.variance)).sum(-1), atol=2e-5)
    np.testing.assert_allclose(found.std_error, 0, atol=1e-6)


def test_the_exact_processs_own_entropy_against_the_bounds():
    prior, _, chain = linear_prior(40, -8.0)
    found, bounds = ppd.reverse_entropy(KEY, prior, X), ppd.entropy_bounds(prior)
    true = 0.5 * (LOG_2_PI_E + np.log(DATA.exact_reverse(chain).variance)).sum(-1)
    np.testing.assert_allclose(found.value, true, atol=2e-5)
    # these data are wider than 1 in the mean: what is above the upper bound is so by right
    outside = bounds.outside(found) - 1
    assert len(outside) and (true > bounds.upper)[outside].all()
    assert set(np.flatnonzero(true > bounds.upper + 1e-3)) <= set(outside)


@pytest.mark.slow
@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_reverse_entropy_of_words(last_step):
    """Against the expectation over q(x_t) by enumeration; |z| < 4.5 in six steps."""
    prior, exact = enumerated(last_step)
    counts = 100 * (1 + np.arange(16) % 3)
    found = ppd.reverse_entropy(KEY, prior, np.repeat(WORDS, counts, axis=0))
    law = counts / counts.sum()
    for t in range(1, 7):
        truth = law @ exact.marginal(t) @ entropy(exact.reverse(t))
        error = max(found.std_error[t - 1], 1e-6)  # at t = T, where the network does not see x_0, it may be small
        assert abs(found.value[t - 1] - truth) < Z * error
        assert error < 0.04
