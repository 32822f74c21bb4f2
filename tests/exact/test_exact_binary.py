"""Binary words: every distribution of a short chain over all 2^d states, by transfer matrices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from oracles import BinaryChain, Table, Z, enable_x64, from_betas, quick_jit, words, z_score
from scipy.stats import chisquare, ks_2samp

import pp_diffusion as ppd

BASE = np.array([0.2, 0.5, 0.7])
BETAS = np.array([0.1, 0.3, 0.2, 0.5, 0.7])
WORDS = words(3)
CASES = [("kernel", 0.7), ("network", 0.7), ("kernel", 1.0), ("network", 1.0)]
cases = pytest.mark.parametrize("last_step, last_beta", CASES)


@cache
def make(last_step="network", last_beta=0.7):
    """A diffusion with a table of reverse probabilities that are near those of some data, so that the weights are tame,
    and random enough for K to be below log p; and its exact answers."""
    rng = np.random.default_rng(5)
    betas = np.append(BETAS[:-1], last_beta)
    exact = BinaryChain(BASE, betas, np.zeros((5, 8, 3)), last_step)
    law, table = rng.dirichlet(np.full(8, 3.0)), []
    for t in range(1, 6):
        joint = (law @ exact.marginal(t - 1))[:, None] * exact.forward(t)
        table.append((joint / joint.sum(0)).T @ WORDS)
    log_odds = np.log(table) - np.log1p(-np.array(table)) + rng.normal(0, 0.3, (5, 8, 3))
    exact = BinaryChain(BASE, betas, 1 / (1 + np.exp(-log_odds)), last_step)
    diffusion = ppd.Diffusion(
        ppd.BinomialKernel((3,), BASE),
        ppd.FixedSchedule(exact.beta),
        Table(),
        parameterization="direct",
        last_step=last_step,
    )
    return diffusion, {diffusion.network_site: {"table": exact.table}}, exact


@partial(quick_jit, static_argnums=2)
def streamed_weights(process, key, num):
    return ppd.log_weight(key, process, jnp.broadcast_to(jnp.asarray(WORDS, dtype=float), (num, 8, 3)))


# --- the kernel against Bayes --------------------------------------------------------------------------------------


def test_kernel_distributions_are_those_of_the_transfer_matrices():
    """transition, marginal, posterior: all states, all steps, beta_T < 1 and = 1."""

    @quick_jit
    def log_probs(rates, kernel):
        states = jnp.asarray(WORDS)
        end = states[None, :]
        transition = kernel.transition(states[:, None], rates.beta).log_prob(end)
        marginal = kernel.marginal(states[:, None], rates.log_snr).log_prob(end)
        posterior = kernel.posterior(states[None, :, None], states[:, None, None], rates).log_prob(states)
        return transition, marginal, posterior

    for last_beta in (0.7, 1.0):
        _, _, exact = make("network", last_beta)
        with enable_x64():
            kernel = ppd.BinomialKernel((3,), BASE)
            rates = ppd.FixedSchedule(exact.beta).rates()
            for t in range(1, 6):
                transition, marginal, posterior = map(np.exp, log_probs(rates.at(t - 1), kernel))
                np.testing.assert_allclose(transition, exact.forward(t), rtol=1e-10)
                np.testing.assert_allclose(marginal, exact.marginal(t), rtol=1e-10)
                if t > 1:
                    np.testing.assert_allclose(posterior, exact.posterior(t), rtol=1e-9)
            stationary = np.exp(kernel.stationary().log_prob(jnp.asarray(WORDS)))
            np.testing.assert_allclose(stationary, exact.stationary, rtol=1e-12)
    # beta_T = 1 forgets everything
    np.testing.assert_allclose(exact.marginal(5), np.tile(exact.stationary, (8, 1)), rtol=1e-12)


@quick_jit
def closed_forms(process):
    kernel, rates, states = process.kernel, process.rates, jnp.asarray(WORDS, dtype=float)
    kls = []
    for t in range(2, 6):
        at = rates.at(t - 1)
        q = kernel.posterior(states[None, :], states[:, None], at)
        kls.append(kernel.kl(q, process(jnp.broadcast_to(states, (8, 8, 3)), at)))
    last = kernel.expected_last_step(jax.random.key(0), states, rates.at(0))
    return kernel.prior_kl(states, rates.at(-1).log_snr), last, kernel.null_log_prob(states), kls


@pytest.mark.parametrize("last_beta", [0.7, 1.0])
def test_closed_forms_of_the_kernel_are_the_enumerated_sums(last_beta):
    diffusion, params, exact = make("network", last_beta)
    with enable_x64():
        prior_kl, last, null, kls = closed_forms(diffusion.prior(params).process)
    np.testing.assert_allclose(prior_kl, exact.prior_kl, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(last, (exact.marginal(1) * np.log(exact.forward(1)).T).sum(1), rtol=1e-9)
    np.testing.assert_allclose(null, np.log(exact.stationary), rtol=1e-9)
    for t, kl in zip(range(2, 6), kls, strict=True):
        q, p = exact.posterior(t), exact.reverse(t)
        np.testing.assert_allclose(kl, (q * (np.log(q) - np.log(p))).sum(-1), rtol=1e-8)


@pytest.mark.parametrize("last_beta", [0.7, 1.0])
def test_both_orders_of_the_forward_trajectory_agree(last_beta):
    _, _, exact = make("network", last_beta)

    @quick_jit
    def scores(kernel, rates, x_0):
        forward, posterior = (q(kernel, rates, x_0) for q in (ppd.ForwardTrajectory, ppd.PosteriorTrajectory))
        path = forward.sample(jax.random.key(3), (50,))
        return path, forward.log_prob(path), posterior.log_prob(path)

    with enable_x64():
        arguments = ppd.BinomialKernel((3,), BASE), ppd.FixedSchedule(exact.beta).rates(), jnp.asarray(WORDS)
        path, forward, posterior = map(np.asarray, scores(*arguments))
    np.testing.assert_allclose(posterior, forward, rtol=1e-10)
    index = (path @ [4, 2, 1]).astype(int)  # (50, 8, T)
    before = np.concatenate([np.broadcast_to(np.arange(8)[:, None], (50, 8, 1)), index[..., :-1]], -1)
    by_hand = sum(np.log(exact.forward(t)[before[..., t - 1], index[..., t - 1]]) for t in range(1, 6))
    np.testing.assert_allclose(forward, by_hand, rtol=1e-10)


def test_paths_have_the_law_of_the_matrices_at_every_step():
    """Entry t-1 is x_t: chi-square over the 8 states, from each x_0, at each t; p > 1e-6 in 2·8·5 + 5 tests."""
    diffusion, params, exact = make("network", 0.7)
    kernel, process = diffusion.kernel, diffusion.prior(params).process
    laws = np.stack([exact.marginal(t) for t in range(1, 6)], 1)  # (x_0, t, x_t)
    for trajectory in (ppd.ForwardTrajectory, ppd.PosteriorTrajectory):
        q = trajectory(kernel, process.rates, jnp.asarray(WORDS))
        path = np.asarray(quick_jit(q.sample, static_argnums=1)(jax.random.key(4), (3000,)))
        check_frequencies(path, laws)
    reverse = ppd.ReverseTrajectory(kernel, process.rates, process)
    path = np.asarray(quick_jit(reverse.sample, static_argnums=1)(jax.random.key(5), (20_000,)))
    law, laws = exact.stationary, []
    for t in range(5, 0, -1):
        laws.insert(0, law)
        law = law @ exact.reverse(t)
    check_frequencies(path, np.stack(laws))


def check_frequencies(samples, laws):
    index = (np.asarray(samples) @ [4, 2, 1]).astype(int)
    for at in np.ndindex(index.shape[1:]):
        counts = np.bincount(index[(slice(None), *at)], minlength=8)
        assert chisquare(counts, len(index) * laws[at]).pvalue > 1e-6


# --- the model ---------------------------------------------------------------------------------------------------


@cases
def test_weights_average_to_p_of_x_and_their_logs_to_k(last_step, last_beta):
    """|z| < 4.5 for 8 words × 2 statistics; the spread of the weights is the enumerated one within 10 %."""
    diffusion, params, exact = make(last_step, last_beta)
    log_w = np.asarray(streamed_weights(diffusion.prior(params).process, jax.random.key(6), 40_000), dtype=np.float64)
    w = np.exp(log_w)
    exact_error = np.sqrt((exact.second_moment - exact.probs**2) / len(w))
    assert np.abs((w.mean(0) - exact.probs) / exact_error).max() < Z
    np.testing.assert_allclose((w**2).mean(0), exact.second_moment, rtol=0.1)
    assert np.abs(z_score(log_w, exact.bound)).max() < Z
    assert (exact.bound < np.log(exact.probs) - 0.05).all()


@pytest.mark.slow
def test_streaming_weights_have_the_law_of_path_weights():
    """Two-sample Kolmogorov-Smirnov per word, p > 1e-5 (conservative: there are ties)."""
    diffusion, params, exact = make("kernel", 0.7)

    @quick_jit
    def by_path(process, x):
        q = ppd.ForwardTrajectory(process.kernel, process.rates, x)
        p = ppd.ReverseTrajectory(process.kernel, process.rates, process)
        path = q.sample(jax.random.key(7), (8000,))
        return p.log_prob(path) + process.last(path[:, :, 0]).log_prob(x) - q.log_prob(path)

    process = diffusion.prior(params).process
    paths = np.asarray(by_path(process, jnp.asarray(WORDS, dtype=float)))
    assert np.abs(z_score(paths, exact.bound)).max() < Z
    streamed = np.asarray(streamed_weights(process, jax.random.key(8), 8000))
    # float32 sums of the same terms in another order differ in the last digits: round them to be ties again
    assert min(ks_2samp(streamed[:, i].round(3), paths[:, i].round(3)).pvalue for i in range(8)) > 1e-5


@cases
def test_every_term_of_the_bound(last_step, last_beta):
    """kl_per_step and value against enumeration; |z| < 4.5 per word and step (48 of them: error rate 3e-4)."""
    diffusion, params, exact = make(last_step, last_beta)
    rows = np.repeat(WORDS[None], 3000, 0)
    bound = ppd.lower_bound(jax.random.key(9), diffusion.prior(params), rows, num_samples=3, chunk_size=24_000)
    assert np.abs(z_score(bound.kl_per_step, exact.steps)).max() < Z
    assert np.abs(z_score(bound.value, exact.bound)).max() < Z
    np.testing.assert_allclose(bound.prior_kl[0], exact.prior_kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bound.null[0], np.log(exact.stationary), rtol=1e-5)
    np.testing.assert_allclose(bound.value, -bound.kl_per_step.sum(-1) - bound.prior_kl, atol=1e-5)
    np.testing.assert_allclose(np.mean(np.square(bound.std_error), 0), np.var(bound.value, 0), rtol=0.15)


@cases
def test_samples_have_the_enumerated_probabilities(last_step, last_beta):
    """Chi-square over the 8 words, 40 000 draws, p > 1e-5."""
    diffusion, params, exact = make(last_step, last_beta)
    draws = np.asarray(diffusion.prior(params).sample(jax.random.key(10), (40_000,)))
    counts = np.bincount((draws @ [4, 2, 1]).astype(int), minlength=8)
    assert chisquare(counts, 40_000 * exact.probs).pvalue > 1e-5
    # which would tell the words' mirror image apart
    mirrored = counts.reshape(2, 2, 2).transpose(2, 1, 0).ravel()
    assert chisquare(mirrored, 40_000 * exact.probs).pvalue < 1e-8


def test_importance_estimates_the_enumerated_log_likelihood():
    diffusion, params, exact = make("kernel", 0.7)
    prior = diffusion.prior(params, log_prob=ppd.Importance(jax.random.key(11), 3000))
    error = np.sqrt((exact.second_moment / exact.probs**2 - 1) / 3000)
    z = (np.asarray(prior.log_prob(jnp.asarray(WORDS, dtype=float))) - np.log(exact.probs)) / error
    assert np.abs(z).max() < Z


# --- the programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elbo, last_step, num_times, batch_size",
    [
        (Trace_ELBO, "kernel", 1, None),
        (Trace_ELBO, "network", 3, 5),
        (Trace_ELBO, "network", 5, None),
        (TraceMeanField_ELBO, "kernel", 4, 7),
    ],
)
def test_the_bound_programs_average_to_k(elbo, last_step, num_times, batch_size):
    """-loss is unbiased for the sum of K over the data; |z| < 4.5 over 4000 keys."""
    diffusion, params, exact = make(last_step, 0.7)
    settings = {"num_times": num_times, "batch_size": batch_size}
    rows = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 1])

    @quick_jit
    @jax.vmap
    def loss(key):
        return elbo().loss(key, params, diffusion.bound_model, diffusion.bound_guide, WORDS[rows], **settings)

    values = -np.asarray(loss(jax.random.split(jax.random.key(12), 4000)))
    assert abs(z_score(values, exact.bound[rows].sum())) < Z


@pytest.mark.parametrize("order", ["forward", "posterior"])
def test_the_trajectory_programs_average_to_k(order):
    """TraceGraph_ELBO, the one for discrete latents, on whole paths; |z| < 4.5 over 4000 keys."""
    diffusion, params, exact = make("network", 0.7)
    guide, elbo = partial(diffusion.guide, order=order), TraceGraph_ELBO()

    @quick_jit
    @jax.vmap
    def loss(key):
        return elbo.loss(key, params, diffusion.model, guide, WORDS)

    values = -np.asarray(loss(jax.random.split(jax.random.key(13), 4000)))
    assert abs(z_score(values, exact.bound.sum())) < Z


# --- parameterizations -------------------------------------------------------------------------------------------


def test_x0_prediction_is_the_mixture_of_posteriors():
    """f_b = sum over x_0 of P(x_0 | x_t) q(x_{t-1} | x_t, x_0), bit by bit, for any P; "paper" is its logit."""
    diffusion, _, exact = make("network", 0.7)
    guess = np.random.default_rng(6).normal(0, 2, (8, 3))
    p_one = 1 / (1 + np.exp(-guess))
    with enable_x64():
        kernel, rates = diffusion.kernel, diffusion.schedule.rates()
        rules = kernel.parameterizations
        for t in range(1, 6):
            at, states = rates.at(t - 1), jnp.asarray(WORDS)
            if t == 1:  # x_0 itself
                expected = p_one
            else:
                q = exact.posterior(t).reshape(8, 8, 2, 2, 2)  # (x_0, x_t, bits of x_{t-1})
                # the posterior of bit i depends on bit i of x_0 alone
                one = np.stack([q[7].sum((1, 2, 3)) - q[7].take(0, 1 + i).sum((1, 2)) for i in range(3)], -1)
                zero = np.stack([q[0].sum((1, 2, 3)) - q[0].take(0, 1 + i).sum((1, 2)) for i in range(3)], -1)
                expected = p_one * one + (1 - p_one) * zero
            by_x0 = rules["x0"].reverse(kernel, states, at, jnp.asarray(guess)).mean
            np.testing.assert_allclose(by_x0, expected, rtol=1e-9)
            logits = jnp.log(expected) - jnp.log1p(-expected)
            np.testing.assert_allclose(rules["paper"].reverse(kernel, states, at, logits).mean, expected, rtol=1e-12)
            by_probs = rules["direct"].reverse(kernel, states, at, jnp.asarray(expected)).mean
            np.testing.assert_allclose(by_probs, expected, rtol=1e-12)


@pytest.mark.slow
def test_the_optimal_process_of_independent_bits_is_exact():
    """Data of independent bits have a factorised reverse process: every weight is p(x), in float64 and float32."""
    truth, betas = np.array([0.9, 0.3, 0.6]), np.append(np.linspace(0.02, 0.4, 30), 1.0)
    log_odds = np.log(truth) - np.log1p(-truth)
    chain_erased = 1 / (1 + np.exp(from_betas(betas)))
    # P(x_t | x_0): stay = 1 - (1 - base) e and 1 - base e; become = base e and (1 - base) e
    e = chain_erased[:, None]
    ratio = np.stack([np.log1p(-BASE * e) * -1 + np.log((1 - BASE) * e), np.log1p(-(1 - BASE) * e) - np.log(BASE * e)])

    def network(x_t, t):
        zero, one = (jnp.asarray(r, x_t.dtype)[t - 1] for r in ratio)
        return jnp.asarray(log_odds, x_t.dtype) + jnp.where(x_t == 1, one, zero)

    exact = (WORDS * np.log(truth) + (1 - WORDS) * np.log1p(-truth)).sum(-1)
    for context, tolerance in ((enable_x64, 1e-9), (partial(jax.default_matmul_precision, "float32"), 1e-4)):
        with context():
            diffusion = ppd.Diffusion(
                ppd.BinomialKernel((3,), BASE), ppd.FixedSchedule(betas), network, last_step="network"
            )
            weights = np.asarray(streamed_weights(diffusion.prior({}).process, jax.random.key(14), 200))
        np.testing.assert_allclose(weights, np.tile(exact, (200, 1)), atol=tolerance)
