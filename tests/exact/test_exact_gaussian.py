"""Gaussian data, whose reverse process is known: every log weight is log p(x).

The schedules run down to log-SNR -20 (-60 in float64, where what is left of the signal would show), or beta_T = 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import oracles
import pytest
from oracles import Chain, GaussianData, Z, enable_x64
from scipy.stats import ks_2samp

import pp_diffusion as ppd

DATA = GaussianData(np.array([0.8, -1.5, 0.1]), np.array([0.4, 1.6, 0.9]))
NARROW = GaussianData(np.array([0.6, -0.9, 0.1]), np.array([0.4, 0.7, 0.9]))  # variances < 1, as "paper" needs
X = DATA.draw(3, 5)
USER_BETAS = np.concatenate([[3e-3, 0.02], np.geomspace(0.01, 0.6, 16), [0.3, 0.97]])

log_weight = jax.jit(ppd.log_weight)  # what a user would run
quick_log_weight = oracles.quick_jit(ppd.log_weight)


def schedules(num_timesteps, final_log_snr):
    return {
        "log_linear": (
            ppd.FixedSchedule.log_linear(num_timesteps, final_log_snr=final_log_snr),
            oracles.log_linear(num_timesteps, final_log_snr=final_log_snr),
        ),
        "constant_erasure": (
            ppd.FixedSchedule.constant_erasure(num_timesteps),
            oracles.constant_erasure(num_timesteps),
        ),
        "cosine": (ppd.FixedSchedule.cosine(num_timesteps), oracles.cosine(num_timesteps)),
    }


def user_betas(last_beta):
    betas = np.append(USER_BETAS, last_beta)
    return ppd.FixedSchedule(betas), oracles.from_betas(betas)


def exact_prior(schedule, log_snr, parameterization="direct", data=DATA, num_timesteps=None, log_prob=None, **kwargs):
    network, params = data.network(Chain(log_snr), parameterization)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((3,)), schedule, network, parameterization=parameterization, last_step="network", **kwargs
    )
    return diffusion.prior({diffusion.network_site: params}, num_timesteps=num_timesteps, log_prob=log_prob)


def linear_prior(schedule, model, last_step="network", **kwargs):
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((3,)),
        schedule,
        oracles.Affine(True),
        parameterization="direct",
        last_step=last_step,
        **kwargs,
    )
    return diffusion.prior({diffusion.network_site: model.params()})


def log_weights(prior, x, num, seed=0, quick=True):
    """Log weights of ``num`` trajectories for each x, shape (num, *batch)."""
    x = jnp.asarray(x, dtype=float)
    function = quick_log_weight if quick else log_weight
    return np.asarray(function(jax.random.key(seed), prior.process, jnp.broadcast_to(x, (num, *x.shape))))


def assert_constant(weights, log_prob, tolerance):
    assert weights.std(0).max() <= tolerance
    assert np.abs(weights.mean(0) - log_prob).max() <= tolerance


# --- every trajectory's weight is log p(x) -------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps, tolerance", [(200, 1e-3), (1000, 3e-3)])
@pytest.mark.parametrize("name", ["log_linear", "constant_erasure", "cosine"])
def test_every_trajectory_has_the_weight_p_of_x_in_float32(name, num_timesteps, tolerance):
    schedule, log_snr = schedules(num_timesteps, -20.0)[name]
    weights = log_weights(exact_prior(schedule, log_snr), X, 64, quick=False)
    assert weights.dtype == np.float32
    assert_constant(weights, DATA.log_prob(X), tolerance)


@pytest.mark.parametrize("num_timesteps", [200, 1000])
@pytest.mark.parametrize("name", ["log_linear", "constant_erasure", "cosine"])
def test_every_trajectory_has_the_weight_p_of_x_in_float64(name, num_timesteps):
    with enable_x64():
        schedule, log_snr = schedules(num_timesteps, -60.0)[name]
        weights = log_weights(exact_prior(schedule, log_snr), X, 8)
    assert weights.dtype == np.float64
    assert np.abs(weights - DATA.log_prob(X)).max() <= 1e-11 * num_timesteps


@pytest.mark.slow
def test_rates_of_the_users_own_choosing_also_rising_and_falling():
    schedule, log_snr = user_betas(1.0)
    assert_constant(log_weights(exact_prior(schedule, log_snr), X, 64), DATA.log_prob(X), 3e-4)
    with enable_x64():
        weights = log_weights(exact_prior(schedule, log_snr), X, 8)
    assert np.abs(weights - DATA.log_prob(X)).max() <= 1e-11 * schedule.num_timesteps


@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_the_shortest_chains(num_timesteps):
    with enable_x64():
        schedule, log_snr = schedules(num_timesteps, -60.0)["constant_erasure"]
        weights = log_weights(exact_prior(schedule, log_snr), X, 8)
    assert np.abs(weights - DATA.log_prob(X)).max() <= 1e-11


def test_a_reversed_or_shifted_time_index_would_show():
    """The tests above have teeth: an oracle that is off by one step, or backwards, is far outside their tolerance."""
    schedule, log_snr = schedules(200, -20.0)["log_linear"]
    exact = DATA.exact_reverse(Chain(log_snr))
    for index in (np.minimum(np.arange(1, 201), 199), np.arange(200)[::-1]):
        wrong = oracles.LinearReverse(*(a[index] for a in exact))
        assert log_weights(linear_prior(schedule, wrong), X, 64).std(0).max() > 0.05
    swapped = GaussianData(DATA.mean[[1, 0, 2]], DATA.scale[[1, 0, 2]])
    weights = log_weights(exact_prior(schedule, log_snr, data=swapped), X, 64)
    assert np.abs(weights.mean(0) - DATA.log_prob(X)).max() > 0.5


def test_a_plain_callable_is_a_network_too():
    schedule, log_snr = schedules(200, -20.0)["log_linear"]
    network = DATA.exact_reverse(Chain(log_snr)).network()
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((3,)), schedule, network, parameterization="direct", last_step="network"
    )
    assert_constant(log_weights(diffusion.prior({}), X, 64), DATA.log_prob(X), 1e-3)


# --- the other parameterizations express the same process ----------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["x0", "v", "noise", "paper"])
@pytest.mark.parametrize("name", ["log_linear", "constant_erasure", "cosine"])
def test_parameterizations_express_the_exact_process(parameterization, name):
    # coordinates of variance > 1 included, but for "paper", which cannot have them
    data = NARROW if parameterization == "paper" else DATA
    if name != "log_linear" and parameterization in ("noise", "paper"):
        return  # both are degenerate at beta_T = 1
    with enable_x64():
        schedule, log_snr = schedules(200, -60.0)[name]
        weights = log_weights(exact_prior(schedule, log_snr, parameterization, data), X, 8)
    assert np.abs(weights - data.log_prob(X)).max() <= 1e-10 * 200


@pytest.mark.parametrize("parameterization", ["x0", "v", "noise", "paper"])
def test_parameterizations_hold_it_in_float32(parameterization):
    data = NARROW if parameterization == "paper" else DATA
    schedule, log_snr = schedules(200, -20.0)["log_linear"]
    weights = log_weights(exact_prior(schedule, log_snr, parameterization, data), X, 64)
    assert_constant(weights, data.log_prob(X), 1e-3)


def test_noise_refuses_full_erasure_by_name():
    with pytest.raises(ValueError, match="beta_T < 1 for parameterization 'noise'"):
        exact_prior(*schedules(5, -20.0)["cosine"], parameterization="noise")


@pytest.mark.parametrize("parameterization", ["x0", "v"])
@pytest.mark.parametrize("num_timesteps", [1, 7, 40])
def test_a_shortened_chain_of_the_exact_process_is_exact(parameterization, num_timesteps):
    """E(x_0 | x_t) and Var(x_0 | x_t) / (1 - alpha_bar_t) do not know of the step before."""
    with enable_x64():
        schedule, log_snr = schedules(60, -60.0)["cosine"]
        weights = log_weights(exact_prior(schedule, log_snr, parameterization, num_timesteps=num_timesteps), X, 8)
    assert np.abs(weights - DATA.log_prob(X)).max() <= 1e-9


def test_direct_outputs_refuse_a_shortened_chain():
    with pytest.raises(ValueError, match="num_timesteps must be 60"):
        exact_prior(*schedules(60, -20.0)["cosine"], num_timesteps=7)


# --- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log_linear", "constant_erasure"])
def test_every_path_scores_log_p_of_x(name):
    """log p(path) + log p(x_0 | x_1) - log q(path) is log p(x) on any path whatever, and both orders of q agree."""

    @oracles.quick_jit
    def scores(process, x, key):
        forward = ppd.ForwardTrajectory(process.kernel, process.rates, x)
        posterior = ppd.PosteriorTrajectory(process.kernel, process.rates, x)
        reverse = ppd.ReverseTrajectory(process.kernel, process.rates, process)
        paths = [q.sample(key, (4,)) for q in (forward, posterior, reverse.expand((5,)))]
        path = jnp.concatenate(paths)
        last = process.last(path[:, :, 0]).log_prob(x)
        return path, forward.log_prob(path), posterior.log_prob(path), reverse.log_prob(path) + last

    with enable_x64():
        process = exact_prior(*schedules(60, -60.0)[name]).process
        path, forward, posterior, reverse = map(np.asarray, scores(process, jnp.asarray(X), jax.random.key(1)))
    assert path.shape == (12, 5, 60, 3) and forward.shape == posterior.shape == reverse.shape == (12, 5)
    np.testing.assert_allclose(posterior, forward, atol=6e-7)
    np.testing.assert_allclose(reverse - forward, np.tile(DATA.log_prob(X), (12, 1)), atol=6e-7)


def test_paths_have_the_moments_of_q_at_every_step():
    """Entry t-1 of a path is x_t: mean sqrt(alpha_bar_t) x_0, variance 1 - alpha_bar_t, and neighbours correlate.

    21 steps × 3 coordinates × 3 statistics × 2 orders at |z| < 5: error rate 2e-4 in all.
    """
    schedule, log_snr = user_betas(0.5)
    chain, x = Chain(log_snr), X[1]
    signal, noise = np.sqrt(chain.alpha_bar)[:, None], np.sqrt(chain.erased)[:, None]
    previous = np.sqrt(chain.previous_erased)[:, None]
    for trajectory in (ppd.ForwardTrajectory, ppd.PosteriorTrajectory):
        q = trajectory(ppd.GaussianKernel((3,)), schedule.rates(), jnp.asarray(x))
        path = np.asarray(oracles.quick_jit(q.sample, static_argnums=1)(jax.random.key(4), (4000,)), dtype=np.float64)
        residual = (path - signal * x) / noise
        assert np.abs(oracles.z_score(residual, 0.0)).max() < 5
        assert np.abs(oracles.z_score(residual**2, 1.0)).max() < 5
        correlation = (np.sqrt(1 - chain.beta)[:, None] * previous / noise)[1:]
        assert np.abs(oracles.z_score(residual[:, 1:] * residual[:, :-1], correlation)).max() < 5


def test_reverse_paths_have_the_moments_of_the_data_at_every_step():
    """Entry t-1 of a reverse path is x_t too: N(sqrt(alpha_bar_t) mean, V_t). Error rate 1e-4."""
    schedule, log_snr = schedules(20, -20.0)["log_linear"]
    chain, process = Chain(log_snr), exact_prior(schedule, log_snr).process
    reverse = ppd.ReverseTrajectory(process.kernel, process.rates, process)
    path = np.asarray(oracles.quick_jit(lambda k: reverse.sample(k, (4000,)))(jax.random.key(5)), dtype=np.float64)
    mean = np.sqrt(chain.alpha_bar)[:, None] * DATA.mean
    variance = DATA.marginal_variance(chain.alpha_bar, chain.erased)
    assert np.abs(oracles.z_score(path, mean)).max() < 5
    assert np.abs(oracles.z_score((path - mean) ** 2 / variance, 1.0)).max() < 5


@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_streaming_weights_have_the_law_of_path_weights(last_step):
    """For a model that is wrong: two-sample Kolmogorov-Smirnov, p > 1e-5, both last steps; and both means are K."""
    schedule, log_snr = schedules(12, -3.0)["log_linear"]
    chain = Chain(log_snr)
    model = oracles.wrong_reverse(chain, DATA)
    prior = linear_prior(schedule, model, last_step)
    process, x = prior.process, jnp.asarray(X[0])
    bound = (model.with_kernel_last_step(chain) if last_step == "kernel" else model).bound(chain, X[0])

    @partial(oracles.quick_jit, static_argnums=1)
    def by_path(key, trajectory):
        q = trajectory(process.kernel, process.rates, x)
        p = ppd.ReverseTrajectory(process.kernel, process.rates, process)
        path = q.sample(key, (8000,))
        return p.log_prob(path) + process.last(path[:, 0]).log_prob(x) - q.log_prob(path)

    streamed = log_weights(prior, X[0], 8000, seed=6)
    assert abs(oracles.z_score(streamed, bound)) < Z
    for seed, trajectory in enumerate((ppd.ForwardTrajectory, ppd.PosteriorTrajectory)):
        paths = np.asarray(by_path(jax.random.key(7 + seed), trajectory))
        assert abs(oracles.z_score(paths, bound)) < Z
        assert ks_2samp(streamed, paths).pvalue > 1e-5


@pytest.mark.slow
def test_the_mean_of_the_weights_is_p_of_x_for_a_wrong_model():
    """|z| < 4.5 per datum on E w / p(x) = 1, where the weights vary and K is below log p."""
    schedule, log_snr = schedules(12, -3.0)["log_linear"]
    model = oracles.wrong_reverse(Chain(log_snr), DATA)
    prior = linear_prior(schedule, model, "network")
    ratio = np.exp(log_weights(prior, X, 20_000, seed=8) - model.log_prob(X))
    assert ratio.std(0).min() > 0.05
    assert np.abs(oracles.z_score(ratio, 1.0)).max() < Z
    # and the same number by the prior's own log_prob: a log of a mean of 4096, within 0.05
    prior = prior.with_log_prob(ppd.Importance(jax.random.key(9), 4096))
    np.testing.assert_allclose(prior.log_prob(jnp.asarray(X)), model.log_prob(X), atol=0.05)


# --- the bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["log_ratio", "analytic"])
def test_the_bound_of_the_exact_process_is_log_p(estimator):
    """K = log p: every term is there, and every step counts once (T of them, not T-1). |z| < 4.5 per datum."""
    schedule, log_snr = schedules(50, -20.0)["log_linear"]
    prior = exact_prior(schedule, log_snr)
    bound = ppd.lower_bound(jax.random.key(10), prior, X, estimator=estimator, num_samples=128)
    z = (bound.value - DATA.log_prob(X)) / np.maximum(bound.std_error, 1e-4)
    assert np.abs(z).max() < Z
    if estimator == "log_ratio":
        np.testing.assert_allclose(bound.value, DATA.log_prob(X), atol=1e-3)
    np.testing.assert_allclose(bound.null, oracles.normal_log_prob(X, 0.0, 1.0).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("estimator", ["log_ratio", "analytic"])
@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_every_term_of_the_bound_of_a_wrong_model(estimator, last_step):
    """Steps and value against exact expectations; |z| < 4.5 per datum and step (error rate of a case 5e-4).

    The chain ends at log-SNR -1, where the prior's KL is large and the printed eq. 14 is wrong.
    """
    schedule = ppd.FixedSchedule.log_linear(9, first_beta=0.02, final_log_snr=-1.0)
    chain = Chain(oracles.log_linear(9, 0.02, -1.0))
    model = oracles.wrong_reverse(chain, DATA)
    prior = linear_prior(schedule, model, last_step)
    exact = model.with_kernel_last_step(chain) if last_step == "kernel" else model
    steps, prior_kl = exact.bound_terms(chain, X)
    rows = np.repeat(X[None], 2000, 0)
    bound = ppd.lower_bound(jax.random.key(11), prior, rows, estimator=estimator, num_samples=2, chunk_size=2500)
    assert bound.kl_per_step.shape == (2000, 5, 9)
    assert np.abs(oracles.z_score(bound.kl_per_step, steps)).max() < Z
    assert np.abs(oracles.z_score(bound.value, exact.bound(chain, X))).max() < Z
    np.testing.assert_allclose(bound.prior_kl[0], prior_kl, rtol=1e-5)
    np.testing.assert_allclose(bound.value, -bound.kl_per_step.sum(-1) - bound.prior_kl, atol=2e-5)
    # the stated error is the real one: mean of its square against the variance over rows, within 15 %
    stated, real = np.mean(np.square(bound.std_error), 0), np.var(bound.value, 0)
    np.testing.assert_allclose(stated, real, rtol=0.15)


@pytest.mark.slow
def test_the_transforms_jacobian_enters_value_null_and_log_prob():
    loc, scale = np.array([3.0, -2.0, 0.5]), np.array([2.0, 0.05, -7.0])  # a negative scale is one too
    schedule, log_snr = schedules(50, -20.0)["log_linear"]
    transform = dist.transforms.AffineTransform(jnp.asarray(loc), jnp.asarray(scale))
    prior = exact_prior(schedule, log_snr, transform=transform)
    y = loc + scale * X
    log_prob = DATA.log_prob(X) - np.log(np.abs(scale)).sum()
    bound = ppd.lower_bound(jax.random.key(12), prior, y)
    np.testing.assert_allclose(bound.value, log_prob, atol=1e-3)
    np.testing.assert_allclose(bound.null, oracles.normal_log_prob(y, loc, scale**2).sum(-1), atol=1e-4)
    np.testing.assert_allclose(bound.above_null, bound.value - bound.null)
    np.testing.assert_allclose(bound.log_abs_det, np.log(np.abs(scale)).sum(), rtol=1e-5)
    np.testing.assert_allclose(bound.value, -bound.kl_per_step.sum(-1) - bound.prior_kl - bound.log_abs_det, atol=2e-5)
    for rule in (ppd.Bound(jax.random.key(13)), ppd.Importance(jax.random.key(13), 2)):
        ruled = prior.with_log_prob(rule)
        np.testing.assert_allclose(ruled.log_prob(jnp.asarray(y)), log_prob, atol=1e-3)


def test_a_single_scale_counts_once_per_coordinate():
    schedule, log_snr = schedules(50, -20.0)["log_linear"]
    transform = dist.transforms.AffineTransform(1.0, 5.0)
    bound = ppd.lower_bound(jax.random.key(14), exact_prior(schedule, log_snr, transform=transform), 1 + 5 * X)
    np.testing.assert_allclose(bound.value, DATA.log_prob(X) - 3 * np.log(5.0), atol=1e-3)


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_samples_have_the_models_moments(last_step):
    """Mean and variance of 20 000 draws, |z| < 4.5 per coordinate; in data units, also for a wrong model."""
    schedule, log_snr = schedules(12, -3.0)["log_linear"]
    chain, scale = Chain(log_snr), np.array([2.0, 0.05, 7.0])
    transform = dist.transforms.AffineTransform(jnp.asarray([3.0, -2.0, 0.5]), jnp.asarray(scale))
    for model in (DATA.exact_reverse(chain), oracles.wrong_reverse(chain, DATA)):
        prior = linear_prior(schedule, model, last_step, transform=transform)
        mean, variance = (model.with_kernel_last_step(chain) if last_step == "kernel" else model).moments()
        mean, variance = [3.0, -2.0, 0.5] + scale * mean, scale**2 * variance
        draws = np.asarray(prior.sample(jax.random.key(15), (20_000,)), dtype=np.float64)
        assert np.abs(oracles.z_score(draws, mean)).max() < Z
        assert np.abs(oracles.z_score((draws - mean) ** 2 / variance, 1.0)).max() < Z
        correlation = np.prod(
            (draws - mean)[:, [[0, 1], [0, 2], [1, 2]]] / np.sqrt(variance)[[[0, 1], [0, 2], [1, 2]]], -1
        )
        assert np.abs(oracles.z_score(correlation, 0.0)).max() < Z
