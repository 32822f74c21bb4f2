"""The traps of the paper and of those who copied it, one test each."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from numpyro.infer import Trace_ELBO
from oracles import Chain, GaussianData

import pp_diffusion as ppd


def test_with_zero_z_eq_65_shrinks_by_beta_and_not_by_its_root():
    """Eq. 65 has mean x(1 - beta) and variance beta at z = 0; the forward kernel has x sqrt(1 - beta)."""
    betas = np.array([0.1, 0.36, 0.75])
    kernel, rates, x = ppd.GaussianKernel((2,)), ppd.FixedSchedule(betas).rates(), np.array([[2.0, -1.0]] * 3)
    x = jnp.asarray(x, dtype=jnp.float32)
    step = kernel.parameterizations["paper"].reverse(kernel, x, rates, 0 * x, 0 * x)
    np.testing.assert_allclose(step.mean, x * (1 - betas)[:, None], rtol=1e-5)
    np.testing.assert_allclose(step.variance, np.tile(betas[:, None], 2), rtol=1e-5)
    forward = kernel.transition(x, rates.beta)
    np.testing.assert_allclose(forward.mean, x * np.sqrt(1 - betas)[:, None], rtol=1e-5)
    np.testing.assert_allclose(forward.variance, np.tile(betas[:, None], 2), rtol=1e-5)


def test_eqs_64_and_65_at_other_z():
    betas = np.array([0.1, 0.36, 0.75])
    kernel, rates = ppd.GaussianKernel((2,)), ppd.FixedSchedule(betas).rates()
    x, z_mu, z_sigma = np.random.default_rng(0).normal(size=(3, 3, 2)).astype(np.float32)
    step = kernel.parameterizations["paper"].reverse(kernel, jnp.asarray(x), rates, jnp.asarray(z_mu), z_sigma)
    sigma = 1 / (1 + np.exp(-(z_sigma + np.log(betas / (1 - betas))[:, None])))
    np.testing.assert_allclose(step.variance, sigma, rtol=1e-5)
    np.testing.assert_allclose(step.mean, (x - z_mu) * (1 - sigma) + z_mu, rtol=1e-5, atol=1e-6)


def test_the_bound_holds_off_unit_mean_square_where_eq_14_as_printed_does_not():
    """Data of mean square 9, a chain that ends early: eq. 14 puts entropies where log pi(x_T) and log T(x_0 | x_1)
    belong, and comes out above log p; ours does not. Exact expectations, and the package's estimate of them."""
    schedule = ppd.FixedSchedule.log_linear(20, first_beta=1e-2, final_log_snr=-1.0)
    chain = Chain(oracles.log_linear(20, 1e-2, -1.0))
    data = GaussianData(np.array([0.0, 0.6]), np.array([3.0, np.sqrt(9 - 0.36)]))
    model, x = data.exact_reverse(chain), data.draw(0, 400)
    prior = ppd.Diffusion(
        ppd.GaussianKernel((2,)), schedule, model.network(), parameterization="direct", last_step="kernel"
    ).prior({})
    model = model.with_kernel_last_step(chain)
    bound = ppd.lower_bound(jax.random.key(0), prior, x, estimator="analytic", num_samples=64)
    log_prob = model.log_prob(x)

    # ours: the exact K, datum by datum, below log p
    z = (bound.value - model.bound(chain, x)) / bound.std_error
    assert np.abs(z).max() < 5.5  # 400 data, 64 samples each: error rate 3e-4
    assert (model.bound(chain, x) <= log_prob).all()
    assert np.mean(bound.value) < log_prob.mean()

    # as printed: -sum of KLs + H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T), for two dimensions
    def entropy(variance):
        return np.log(2 * np.pi * np.e * variance)

    printed = -np.asarray(bound.kl_per_step)[:, 1:].sum(-1) + entropy(chain.erased[-1]) - entropy(chain.beta[0])
    printed = printed - entropy(1.0)
    assert printed.mean() > log_prob.mean() + 0.3
    # at unit mean square the two are the same
    np.testing.assert_allclose(
        np.mean(printed - np.asarray(bound.value)),
        0.5 * (chain.beta[0] + chain.alpha_bar[-1]) * (x**2 - 1).sum(-1).mean(),
        rtol=1e-3,
    )


@pytest.mark.parametrize("num_timesteps", [2, 5])
def test_all_of_the_steps_count_once(num_timesteps):
    """The reference code scales the mean over T-1 steps by T. With the exact process and one step drawn per datum
    the average bound is log p, whatever T; off by T/(T-1) it would be far away. |z| < 4.5 over 20 000
    draws of two data."""
    schedule, chain = ppd.FixedSchedule.constant_erasure(num_timesteps), Chain(oracles.constant_erasure(num_timesteps))
    data = GaussianData(np.array([0.4]), np.array([0.7]))
    model = data.exact_reverse(chain).with_kernel_last_step(chain)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((1,)), schedule, data.exact_reverse(chain).network(), parameterization="direct"
    )
    x = np.array([[1.3], [-0.6]])

    @oracles.quick_jit
    @jax.vmap
    def loss(key):
        return Trace_ELBO().loss(key, {}, diffusion.bound_model, diffusion.bound_guide, x)

    values = -np.asarray(loss(jax.random.split(jax.random.key(1), 20_000)))
    exact = model.bound(chain, x)
    assert abs(oracles.z_score(values, exact.sum())) < oracles.Z
    # the test has power: the steps' share is many errors large
    steps = model.bound_terms(chain, x)[0][:, 1:].sum()
    assert steps / num_timesteps > 6 * values.std() / np.sqrt(len(values))


def test_bits_per_dimension_counts_the_colours():
    """The paper's 5.4 bits per pixel of CIFAR-10 are 1.8 bits of density per dimension of unit-variance data; the
    8-bit level is 1/64.15 wide there, so that the code length is 4.20 bits per dimension."""
    per_image = ppd.units.bits_to_nats(5.4) * 1024
    assert round(ppd.units.bits_per_dim(per_image, num_dims=3072, bin_width=1 / 64.15), 2) == 4.20
    # in pixel units the same number, with levels of width 1
    in_levels = per_image - 3072 * np.log(64.15)
    assert round(ppd.units.bits_per_dim(in_levels, num_dims=3072), 2) == 4.20
    # L_null of unit-variance data: 2.047 bits per dimension, 6.14 per pixel of three colours
    null = ppd.GaussianKernel((2, 2, 3)).null_log_prob(jnp.ones((2, 2, 3)))
    np.testing.assert_allclose(ppd.units.nats_to_bits(float(null)) / 4, -6.141, atol=1e-3)
    np.testing.assert_allclose(ppd.units.bits_to_nats(ppd.units.nats_to_bits(0.7)), 0.7)


def test_the_base_rate_may_differ_per_bit_and_defaults_to_a_half():
    assert float(ppd.BinomialKernel((3,)).probs) == 0.5
    kernel = ppd.BinomialKernel((3,), np.array([0.2, 0.5, 0.7]))
    np.testing.assert_allclose(kernel.stationary().mean, [0.2, 0.5, 0.7], rtol=1e-6)
    # one step towards it: x (1 - beta) + pi beta
    step = kernel.transition(jnp.array([1.0, 0.0, 1.0]), 0.25)
    np.testing.assert_allclose(step.mean, [0.8, 0.125, 0.925], rtol=1e-6)


def test_beta_1_is_not_learned_and_the_others_are():
    """The table says beta_1…T, the text beta_2…T: the text is right."""
    schedule = ppd.LearnedSchedule(6, first_beta=0.03)
    init = schedule.init_params()
    moved = jax.tree.map(lambda p: p + 0.3 * jnp.arange(1, 1 + p.size).reshape(p.shape), init)
    first, then = np.asarray(schedule.betas(init)), np.asarray(schedule.betas(moved))
    np.testing.assert_allclose([first[0], then[0]], 0.03, rtol=1e-5)
    assert (np.abs(then[1:] / first[1:] - 1) > 1e-3).all()
    slope = jax.jit(jax.jacobian(schedule.betas))(init)
    assert all(np.abs(leaf[0]).max() < 1e-7 for leaf in jax.tree.leaves(slope))


def test_arrays_over_time_run_from_1_to_t():
    betas = np.array([0.05, 0.5, 0.2, 0.9])
    for schedule in (ppd.FixedSchedule(betas), ppd.FixedSchedule.from_log_snr(oracles.from_betas(betas))):
        rates = schedule.rates()
        np.testing.assert_array_equal(rates.t, [1, 2, 3, 4])
        np.testing.assert_allclose(schedule.betas(), betas, rtol=1e-5)
        np.testing.assert_allclose(schedule.alpha_bars(), np.cumprod(1 - betas), rtol=1e-5)
        np.testing.assert_allclose(rates.erased, 1 - np.cumprod(1 - betas), rtol=1e-5)
        np.testing.assert_allclose(rates.retained, 1 - betas, rtol=1e-5)
        np.testing.assert_allclose(rates.previous_alpha_bar, [1, *np.cumprod(1 - betas)[:-1]], rtol=1e-5)


def test_the_paper_s_schedule_erases_a_share_of_1_over_t_per_step():
    schedule = ppd.FixedSchedule.constant_erasure(8)
    np.testing.assert_allclose(schedule.betas(), 1 / np.arange(8, 0, -1), rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha_bars(), 1 - np.arange(1, 9) / 8, rtol=1e-6, atol=1e-9)


def test_beta_is_a_variance_and_the_network_s_second_direct_output_too():
    kernel = ppd.GaussianKernel((2,))
    x = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(kernel.transition(x, 0.04).variance, 0.04, rtol=1e-6)
    rates = ppd.FixedSchedule([0.04, 0.3]).rates().at(1)
    step = kernel.parameterizations["direct"].reverse(kernel, x, rates, x, jnp.array([0.04, 0.09]))
    np.testing.assert_allclose(step.variance, [0.04, 0.09], rtol=1e-6)
