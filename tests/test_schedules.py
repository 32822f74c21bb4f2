"""Diffusion rates against float64 formulas written out here, and the learned schedule's promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pp_diffusion as ppd

pytestmark = pytest.mark.as_users


def reference(betas):
    """Every derived rate, in float64, by the textbook formulas."""
    betas = np.asarray(betas, np.float64)
    with np.errstate(divide="ignore"):  # beta_T = 1
        erased = -np.expm1(np.cumsum(np.log1p(-betas)))
    previous_erased = np.concatenate([[0.0], erased[:-1]])
    return {
        "beta": betas,
        "retained": 1 - betas,
        "erased": erased,
        "alpha_bar": 1 - erased,
        "previous_erased": previous_erased,
        "previous_alpha_bar": 1 - previous_erased,
        "innovation": betas / erased,
    }


def check(rates, betas, rtol=1e-5, atol=1e-9):
    for name, expected in reference(betas).items():
        got = np.asarray(getattr(rates, name), np.float64)
        assert got.shape == np.shape(betas), name
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=name)


def check_is_consistent(rates, num):
    """What holds of every schedule's rates."""
    assert rates.num_timesteps == num
    np.testing.assert_array_equal(rates.t, np.arange(1, num + 1))
    assert all(field.shape == (num,) for field in rates)
    assert np.isposinf(rates.previous_log_snr[0]) and np.isposinf(rates.drop[0])
    np.testing.assert_array_equal(rates.previous_log_snr[1:], rates.log_snr[:-1])
    assert (np.diff(rates.log_snr) < 0).all()
    beta = np.asarray(rates.beta)
    assert ((beta > 0) & (beta <= 1)).all() and (beta[:-1] < 1).all()
    np.testing.assert_allclose(rates.beta + rates.retained, 1, rtol=1e-6)
    np.testing.assert_allclose(rates.erased + rates.alpha_bar, 1, rtol=1e-6)
    if num > 1:
        # the weight of x_t in the mean of q(x_{t-1} | x_t, x_0), less 1; its fixed point is the stationary mean
        by_definition = np.sqrt(rates.retained) * rates.previous_erased / rates.erased - 1
        np.testing.assert_allclose(rates.shrinkage[1:], by_definition[1:], atol=2e-6)


BETAS = st.lists(st.floats(1e-6, 0.99), min_size=5, max_size=5)


@settings(max_examples=40, deadline=None)
@given(betas=BETAS, full_erasure=st.booleans())
def test_users_betas(betas, full_erasure):
    betas = [*betas[:-1], 1.0] if full_erasure else betas
    schedule = ppd.FixedSchedule(betas)
    check(schedule.rates(), betas)
    check_is_consistent(schedule.rates(), 5)
    np.testing.assert_allclose(schedule.betas(), betas, rtol=1e-5)
    np.testing.assert_allclose(schedule.alpha_bars(), np.cumprod(1 - np.array(betas)), rtol=1e-5, atol=1e-9)
    assert schedule.init_params() is None


@settings(max_examples=20, deadline=None)
@given(drops=st.lists(st.floats(1e-3, 6.0), min_size=4, max_size=4), start=st.floats(-3.0, 9.0))
def test_from_log_snr_and_betas_are_the_same_schedule(drops, start):
    log_snr = start - np.concatenate([[0.0], np.cumsum(drops)])
    by_log_snr = ppd.FixedSchedule.from_log_snr(log_snr)
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    np.testing.assert_allclose(by_log_snr.betas(), betas, rtol=1e-5)
    np.testing.assert_allclose(by_log_snr.log_snr(), ppd.FixedSchedule(betas).log_snr(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 7, 1000])
def test_constant_erasure(num):
    rates = ppd.FixedSchedule.constant_erasure(num).rates()
    t = np.arange(1, num + 1)
    check(rates, 1 / (num - t + 1))
    np.testing.assert_allclose(rates.alpha_bar, 1 - t / num, rtol=1e-5, atol=1e-9)  # each step erases the same share
    assert rates.beta[-1] == 1 and rates.alpha_bar[-1] == 0
    check_is_consistent(rates, num)


@pytest.mark.parametrize("num", [1, 2, 7, 1000])
def test_log_linear(num):
    start = math.log1p(-1e-4) - math.log(1e-4)
    log_snr = np.linspace(start, -7.0, num)
    rates = ppd.FixedSchedule.log_linear(num).rates()
    np.testing.assert_allclose(rates.log_snr, log_snr, rtol=1e-6, atol=1e-6)
    erased = 1 / (1 + np.exp(log_snr))
    np.testing.assert_allclose(rates.erased, erased, rtol=1e-5)
    innovation = -np.expm1(-(np.concatenate([[np.inf], log_snr[:-1]]) - log_snr))
    np.testing.assert_allclose(rates.beta, innovation * erased, rtol=1e-5)
    np.testing.assert_allclose(rates.beta[0], 1e-4, rtol=1e-5)
    check_is_consistent(rates, num)


def test_log_linear_ends_where_it_is_told():
    schedule = ppd.FixedSchedule.log_linear(4, first_beta=0.02, final_log_snr=-3.0)
    np.testing.assert_allclose(schedule.betas()[0], 0.02, rtol=1e-6)
    np.testing.assert_allclose(schedule.log_snr()[-1], -3.0, rtol=1e-6)
    np.testing.assert_allclose(np.diff(schedule.log_snr(), n=2), 0, atol=1e-5)


@pytest.mark.parametrize("num", [1, 3, 1000])
def test_cosine(num):
    t = np.arange(num + 1) / num
    f = np.cos(np.pi / 2 * (t + 0.008) / 1.008) ** 2
    rates = ppd.FixedSchedule.cosine(num).rates()
    np.testing.assert_allclose(rates.alpha_bar, f[1:] / f[0], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(rates.beta[:-1], (1 - f[1:] / f[:-1])[:-1], rtol=1e-5)
    assert rates.beta[-1] == 1
    check_is_consistent(rates, num)


def test_small_steps_keep_their_digits():
    """1 - ᾱ_t/ᾱ_{t-1} in float32 is wrong by several percent here, which costs 0.09 bits on the swiss roll."""
    betas = np.geomspace(1e-7, 1e-3, 1000)
    rates = ppd.FixedSchedule(betas).rates()
    check(rates, betas)
    naive = 1 - rates.alpha_bar[1:] / rates.alpha_bar[:-1]
    assert np.max(np.abs(naive / betas[1:] - 1)) > 0.05


def test_one_step():
    for schedule in (ppd.FixedSchedule([0.3]), ppd.LearnedSchedule(1, first_beta=0.3)):
        rates = schedule.rates(schedule.init_params())
        np.testing.assert_allclose(rates.beta, [0.3], rtol=1e-6)
        np.testing.assert_allclose(rates.alpha_bar, [0.7], rtol=1e-6)
        check_is_consistent(rates, 1)
    np.testing.assert_allclose(ppd.FixedSchedule([1.0]).rates().alpha_bar, [0.0])


# --- learned -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    shares=st.lists(st.floats(-8, 8), min_size=4, max_size=4),
    fall=st.floats(0.5, 30.0),
    first_beta=st.floats(1e-5, 0.5),
    fixed_end=st.booleans(),
)
def test_learned_schedule_for_any_parameters(shares, fall, first_beta, fixed_end):
    schedule = ppd.LearnedSchedule(5, first_beta, final_log_snr=-9.0 if fixed_end else None)
    params = schedule.init_params()
    assert set(params) == ({"shares"} if fixed_end else {"shares", "fall"})
    params = {k: jnp.asarray(shares if k == "shares" else fall, v.dtype) for k, v in params.items()}
    rates = schedule.rates(params)
    np.testing.assert_allclose(rates.beta[0], first_beta, rtol=1e-5)
    assert (rates.drop[1:] > 0).all() and (np.diff(rates.log_snr) <= 0).all()
    assert ((rates.beta > 0) & (rates.beta <= 1)).all()
    np.testing.assert_allclose(rates.log_snr[0] - rates.log_snr[-1], rates.drop[1:].sum(), rtol=1e-4)
    if fixed_end:
        np.testing.assert_allclose(rates.log_snr[-1], -9.0, rtol=1e-5)


def test_learned_schedule_starts_log_linear():
    schedule = ppd.LearnedSchedule(6, first_beta=1e-3, final_log_snr=-4.0)
    expected = ppd.FixedSchedule.log_linear(6, first_beta=1e-3, final_log_snr=-4.0)
    rates = schedule.rates(schedule.init_params())
    np.testing.assert_allclose(rates.log_snr, expected.log_snr(), rtol=1e-5)
    np.testing.assert_allclose(rates.beta, expected.betas(), rtol=1e-5)
    check_is_consistent(rates, 6)


@pytest.mark.parametrize("final_log_snr", [None, -4.0])
def test_learned_schedule_has_a_finite_gradient_that_leaves_the_first_step(final_log_snr):
    schedule = ppd.LearnedSchedule(5, first_beta=1e-4, final_log_snr=final_log_snr)
    params = schedule.init_params()

    @jax.jit
    def jacobians(params):
        return jax.jacrev(schedule.betas)(params), jax.jacrev(lambda p: schedule.rates(p).retained)(params)

    for jacobian in jacobians(params):
        for leaf in jax.tree.leaves(jacobian):
            assert np.isfinite(leaf).all()
            np.testing.assert_array_equal(leaf[0], 0)
            assert np.abs(leaf[1:]).max() > 0
    extreme = {k: v + 40.0 * (jnp.arange(v.size).reshape(v.shape) == 0) for k, v in params.items()}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jacobians(extreme)))


def test_learned_schedule_needs_its_parameters():
    with pytest.raises(ValueError, match="params"):
        ppd.LearnedSchedule(5, first_beta=1e-4).log_snr()


# --- shorter chains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 3, 7])
@pytest.mark.parametrize("make", [ppd.FixedSchedule.log_linear, ppd.FixedSchedule.constant_erasure])
def test_shortened_chains_go_through_points_of_the_long_one(make, num):
    long = make(7).rates()
    short = long.shortened(num)
    assert short.num_timesteps == num
    assert short.t[-1] == 7 and (num == 1 or short.t[0] == 1)
    assert np.isin(short.t, long.t).all() and (np.diff(short.t) > 0).all()
    np.testing.assert_array_equal(short.log_snr, long.log_snr[short.t - 1])
    kept = np.asarray(long.alpha_bar, np.float64)[short.t - 1]
    betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
    np.testing.assert_allclose(short.beta, betas, rtol=2e-4)
    np.testing.assert_allclose(short.drop[1:], short.previous_log_snr[1:] - short.log_snr[1:], rtol=1e-5)
    assert np.isposinf(short.drop[0])
    if num == 7:
        for a, b in zip(short, long, strict=True):
            np.testing.assert_array_equal(a, b)


# --- the base class ------------------------------------------------------------------------------------------------


class Halving(ppd.Schedule):
    """A user's: the signal's share halves at every step, down to a trained floor."""

    data_fields = ("offset",)

    def __init__(self, num_timesteps, offset=0.0):
        self._set(num_timesteps=num_timesteps, offset=offset)

    def init_params(self):
        return {"slope": jnp.ones(())}

    def log_snr(self, params=None):
        return self.offset - params["slope"] * jnp.arange(self.num_timesteps)


def test_users_schedule_subclass():
    schedule = Halving(4, offset=2.0)
    rates = schedule.rates(schedule.init_params())
    check_is_consistent(rates, 4)
    np.testing.assert_allclose(rates.log_snr, [2.0, 1.0, 0.0, -1.0])
    check(rates, 1 - np.asarray(rates.alpha_bar, np.float64) / np.concatenate([[1.0], rates.alpha_bar[:-1]]), rtol=1e-5)

    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), schedule, lambda x_t, t: (0 * x_t, 0 * x_t))
    params = diffusion.init_params(jax.random.key(0))
    assert set(params) == {"diffusion.schedule$params"}
    bound = ppd.lower_bound(jax.random.key(1), diffusion.prior(params), jnp.ones((3, 2)))
    assert np.isfinite(bound.value).all() and bound.kl_per_step.shape == (3, 4)


# --- values --------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "betas": lambda: ppd.FixedSchedule([0.1, 0.2, 1.0]),
    "log_linear": lambda: ppd.FixedSchedule.log_linear(4),
    "learned": lambda: ppd.LearnedSchedule(4, first_beta=1e-3),
    "learned_to_an_end": lambda: ppd.LearnedSchedule(4, first_beta=1e-3, final_log_snr=-3),
    "own": lambda: Halving(3, offset=1.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_pytree_equality_and_hash_by_value(name):
    schedule, twin = SCHEDULES[name](), SCHEDULES[name]()
    assert schedule == twin and hash(schedule) == hash(twin)
    assert all(schedule != make() for other, make in SCHEDULES.items() if other != name)
    leaves, structure = jax.tree.flatten(schedule)
    assert jax.tree.unflatten(structure, leaves) == schedule
    with pytest.raises(AttributeError, match="immutable"):
        schedule.num_timesteps = 3

    betas = jax.jit(lambda s: s.betas(s.init_params()))(schedule)
    np.testing.assert_allclose(betas, schedule.betas(schedule.init_params()), rtol=1e-5)


def test_x64():
    with jax.enable_x64(True):
        betas = np.geomspace(1e-9, 1e-2, 5)
        check(ppd.FixedSchedule(betas).rates(), betas, rtol=1e-12, atol=0)
