"""Laws that every diffusion kernel obeys, crossed with cases; the third kernel is a user's."""

import copy
import itertools
import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

import pp_diffusion as ppd
from pp_diffusion.states import Finite

pytestmark = pytest.mark.as_users


def _categorical_x0(kernel, x_t, rates, *logits):
    """p(x_{t-1} | x_t) = sum over x_0 of P(x_0 | x_t) q(x_{t-1} | x_t, x_0), entry by entry."""
    log_p0 = jax.nn.log_softmax(jnp.stack(logits, -1))
    states = range(kernel.num_states)
    terms = jnp.stack([kernel.log_posterior(x_t, jnp.full_like(x_t, k), rates) for k in states], -2)
    return kernel.categorical(logsumexp(log_p0[..., None] + terms, -2))


class UniformCategorical(ppd.Kernel):
    """A kernel of a user's: three states, held as integers, and with probability beta a fresh uniform one.

    It has only what a subclass must have, and what :class:`pp_diffusion.SMC` asks for besides."""

    num_states = 3
    event_support = constraints.integer_interval(0, 2)
    parameterizations = {"x0": ppd.Parameterization(("real",) * 3, _categorical_x0, shortens=True)}

    def __init__(self, event_shape):
        self._set(event_shape=tuple(event_shape))

    def as_state(self, x):
        return jnp.asarray(x, dtype=int)

    def _mix(self, x, erased):
        erased = self.over_events(jnp.asarray(erased, float))[..., None]
        probs = jax.nn.one_hot(x, self.num_states) * (1 - erased) + erased / self.num_states
        return jnp.log(jnp.maximum(probs, 1e-30))

    def log_posterior(self, x_t, x_0, rates):
        by_previous = self._mix(x_t, rates.beta)  # the transition is symmetric
        return jax.nn.log_softmax(self._mix(x_0, rates.previous_erased) + by_previous)

    def categorical(self, logits):
        return dist.CategoricalProbs(jax.nn.softmax(logits)).to_event(self.event_ndim)

    def stationary(self):
        return self.categorical(jnp.zeros((*self.event_shape, self.num_states)))

    def transition(self, x_prev, beta):
        return self.categorical(self._mix(x_prev, beta))

    def marginal(self, x_0, log_snr):
        return self.categorical(self._mix(x_0, jax.nn.sigmoid(-jnp.asarray(log_snr))))

    def posterior(self, x_t, x_0, rates):
        return self.categorical(self.log_posterior(x_t, x_0, rates))

    @property
    def state_space(self):
        return Finite(self, self.num_states)

    def reverse_given(self, x_t, x_0, rates):
        logits = x_0.base_dist.logits  # as a Finite space gives them
        return _categorical_x0(self, x_t, rates, *jnp.moveaxis(logits, -1, 0))

    def x_0_given(self, x_t, reverse, rates):
        """q(x_{t-1} | x_t, x_0) is (a [x_{t-1} = x_0] + (1 - a)/3) b(x_{t-1}) / c(x_0), which can be undone."""
        erased = self.over_events(rates.previous_erased)[..., None]
        b, mixing = jnp.exp(self._mix(x_t, rates.beta)), erased / self.num_states
        c = (1 - erased) * b + mixing * b.sum(-1, keepdims=True)
        seen = reverse.base_dist.probs / b
        probs = jnp.maximum(c * (seen - mixing * seen.sum(-1, keepdims=True)), 1e-30)
        return self.categorical(jnp.log(probs))


class Case(NamedTuple):
    name: str
    kernel: ppd.Kernel
    num_states: int | None  # of one entry; None for continuous ones


CASES = [
    Case("gaussian_scalar", ppd.GaussianKernel(()), None),
    Case("gaussian_vector", ppd.GaussianKernel((2,)), None),
    Case("gaussian_matrix", ppd.GaussianKernel((2, 3)), None),
    Case("binomial_half", ppd.BinomialKernel((2,)), 2),
    Case("binomial_skewed", ppd.BinomialKernel((), probs=0.2), 2),
    Case("binomial_per_bit", ppd.BinomialKernel((2, 2), probs=np.array([[0.1, 0.6], [0.5, 0.95]])), 2),
    Case("categorical", UniformCategorical((2,)), 3),
]
GAUSSIAN = [c for c in CASES if c.num_states is None]
DISCRETE = [c for c in CASES if c.num_states is not None]
MAIN = [CASES[2], CASES[4], CASES[5], CASES[6]]
over = partial(pytest.mark.parametrize, "case", ids=lambda c: c.name)

SCHEDULES = {
    "ordinary": ppd.FixedSchedule([0.02, 0.3, 0.07, 0.55]),
    "full_erasure": ppd.FixedSchedule.constant_erasure(4),
}
# ᾱ rounds to 1 in float32 at the start, and to 0 or exactly 0 at the end
EXTREMES = {
    "tiny_steps": ppd.FixedSchedule([1e-12, 1e-10, 1e-7]),
    "jump_to_noise": ppd.FixedSchedule([1e-9, 1e-6, 1 - 1e-12]),
    "full_erasure": ppd.FixedSchedule([1e-9, 0.9999999, 1.0]),
    "long_tail": ppd.FixedSchedule.from_log_snr([20.0, -80.0, -200.0]),
}


def draw_state(kernel, num_states, key, batch=()):
    shape = (*batch, *kernel.event_shape)
    if num_states is None:
        return 0.5 + 1.7 * jax.random.normal(key, shape)  # neither the stationary mean nor its scale
    return kernel.as_state(jax.random.randint(key, shape, 0, num_states))


def all_states(kernel, num_states):
    size = math.prod(kernel.event_shape)
    states = np.array(list(itertools.product(range(num_states), repeat=size)))
    return kernel.as_state(states.reshape(-1, *kernel.event_shape))


# --- the laws ------------------------------------------------------------------------------------------------------


@over(GAUSSIAN)
@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussian_marginal_is_the_composition_of_transitions(case, name):
    kernel = case.kernel
    x_0 = draw_state(kernel, None, jax.random.key(0))

    @jax.jit
    def moments(rates):
        mean, variance, rows = x_0, jnp.zeros_like(x_0), []
        for i in range(4):
            step = rates.at(i)
            mean = kernel.transition(mean, step.beta).mean
            variance = (1 - step.beta) * variance + kernel.transition(x_0, step.beta).variance
            marginal = kernel.marginal(x_0, step.log_snr)
            rows.append((marginal.mean, mean, marginal.variance, variance))
        return rows

    for mean, composed_mean, variance, composed_variance in moments(SCHEDULES[name].rates()):
        np.testing.assert_allclose(mean, composed_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, composed_variance, rtol=1e-5)


@over(DISCRETE)
def test_discrete_marginal_is_the_composition_of_transitions(case):
    kernel = case.kernel
    states = all_states(kernel, case.num_states)
    source, target = states[:, None, None], states[None, :, None]  # against one axis of steps

    @jax.jit
    def both(steps):
        to = kernel.transition(source, steps.beta).log_prob(target)
        before = kernel.marginal(source, steps.previous_log_snr).log_prob(target)
        return logsumexp(before[:, :, None] + to[None], 1), kernel.marginal(source, steps.log_snr).log_prob(target)

    for schedule in SCHEDULES.values():
        composed, direct = both(schedule.rates().at(slice(1, None)))
        np.testing.assert_allclose(direct, composed, atol=2e-5)
        np.testing.assert_allclose(np.exp(direct).sum(1), 1, rtol=1e-5)


@over(MAIN)
def test_first_marginal_is_the_first_transition(case):
    kernel, rates = case.kernel, SCHEDULES["ordinary"].rates()
    x_0, x_1 = (draw_state(kernel, case.num_states, k, (3,)) for k in jax.random.split(jax.random.key(1)))

    @jax.jit
    def both(x_0, x_1):
        by_step = kernel.transition(x_0, rates.beta[0]).log_prob(x_1)
        return by_step, kernel.marginal(x_0, rates.log_snr[0]).log_prob(x_1)

    np.testing.assert_allclose(*both(x_0, x_1), rtol=1e-5)


@over(MAIN)
def test_posterior_obeys_bayes(case):
    kernel = case.kernel
    x_0, x_prev, x_t = (draw_state(kernel, case.num_states, k, (5, 3)) for k in jax.random.split(jax.random.key(2), 3))

    @jax.jit
    def sides(x_0, x_prev, x_t, steps):
        left = kernel.posterior(x_t, x_0, steps).log_prob(x_prev) + kernel.marginal(x_0, steps.log_snr).log_prob(x_t)
        right = kernel.transition(x_prev, steps.beta).log_prob(x_t)
        return left, right + kernel.marginal(x_0, steps.previous_log_snr).log_prob(x_prev)

    for schedule in SCHEDULES.values():
        left, right = sides(x_0, x_prev, x_t, schedule.rates().at(slice(1, None)))
        assert left.shape == (5, 3)
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-5)


@over(GAUSSIAN)
def test_gaussian_stationary_is_invariant(case):
    kernel = case.kernel
    pi = kernel.stationary()
    for beta in (1e-4, 0.3, 1.0):
        unit = jnp.ones(kernel.event_shape)
        after = kernel.transition(pi.mean, beta)
        gain = kernel.transition(pi.mean + unit, beta).mean - after.mean
        np.testing.assert_allclose(after.mean, pi.mean, atol=1e-7)
        np.testing.assert_allclose(gain**2 * pi.variance + after.variance, pi.variance, rtol=1e-6)


@over(DISCRETE)
def test_discrete_stationary_is_invariant(case):
    kernel = case.kernel
    states = all_states(kernel, case.num_states)

    @jax.jit
    def before_and_after(beta):
        pi = kernel.stationary().log_prob(states)
        to = kernel.transition(states[:, None, None], beta).log_prob(states[None, :, None])
        return pi, logsumexp(pi[:, None, None] + to, 0)

    pi, after = before_and_after(jnp.array([1e-4, 0.3, 1.0]))
    np.testing.assert_allclose(np.exp(pi).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(after, np.stack([pi] * 3, -1), atol=1e-5)


def _pair(kernel, states):
    """Two of the kernel's distributions of batch shape (4,)."""
    rates = SCHEDULES["ordinary"].rates().at(slice(1, 2))
    a, b, c, d = states
    return kernel.posterior(a, b, rates), kernel.posterior(c, d, rates)


@over(MAIN)
def test_kl_is_positive_and_the_mean_of_the_log_ratio(case):
    kernel = case.kernel
    drawn = [draw_state(kernel, case.num_states, k, (4,)) for k in jax.random.split(jax.random.key(3), 4)]
    keys = jax.random.split(jax.random.key(4), 4000)

    @jax.jit
    def quantities(drawn):
        q, p = _pair(kernel, drawn)
        x, ratio = jax.vmap(lambda k: kernel.draw_and_log_ratio(k, q, p))(keys)
        direct = p.log_prob(x) - q.log_prob(x)
        if case.num_states is None:
            return kernel.kl(q, p), kernel.kl(q, q), x, ratio, direct
        states = all_states(kernel, case.num_states)[:, None]
        log_q, log_p = q.log_prob(states), p.log_prob(states)
        return kernel.kl(q, p), kernel.kl(q, q), x, ratio, direct, (jnp.exp(log_q) * (log_q - log_p)).sum(0)

    kl, self_kl, x, ratio, direct, *exact = quantities(drawn)
    assert kl.shape == (4,) and ratio.shape == (4000, 4)
    assert x.shape == (4000, 4, *kernel.event_shape) and x.dtype == kernel.as_state(0).dtype
    assert (kl >= -1e-6).all()
    np.testing.assert_allclose(self_kl, 0, atol=1e-6)
    np.testing.assert_allclose(ratio, direct, rtol=1e-4, atol=2e-4)
    error = np.std(ratio, 0) / math.sqrt(len(keys))
    np.testing.assert_array_less(np.abs(kl + np.mean(ratio, 0)), 4.5 * error + 1e-5)
    for value in exact:
        np.testing.assert_allclose(kl, value, rtol=1e-4, atol=1e-5)


@over(MAIN)
def test_closed_forms_equal_the_general_defaults(case):
    kernel, rates = case.kernel, SCHEDULES["ordinary"].rates()
    x_0 = draw_state(kernel, case.num_states, jax.random.key(7), (3,))
    keys = jax.random.split(jax.random.key(8), 3000)
    default_last_step = ppd.Kernel.expected_last_step

    @jax.jit
    def quantities(x_0):
        general = kernel.kl(kernel.marginal(x_0, rates.log_snr[2]), kernel.stationary().expand((3,)))
        closed = kernel.expected_last_step(keys[0], x_0, rates.at(0))
        drawn = jax.vmap(lambda k: default_last_step(kernel, k, x_0, rates.at(0)))(keys)
        nulls = kernel.null_log_prob(x_0), kernel.stationary().log_prob(x_0)
        return (kernel.prior_kl(x_0, rates.log_snr[2]), general), nulls, closed, drawn

    prior_kls, nulls, closed, drawn = quantities(x_0)
    np.testing.assert_allclose(*prior_kls, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(*nulls, rtol=1e-6)
    assert closed.shape == (3,)
    if type(kernel).expected_last_step is not default_last_step:
        error = np.std(drawn, 0) / math.sqrt(len(keys))
        np.testing.assert_array_less(np.abs(closed - np.mean(drawn, 0)), 4.5 * error + 1e-4)


@over(CASES)
def test_prior_kl_vanishes_under_full_erasure(case):
    x_0 = draw_state(case.kernel, case.num_states, jax.random.key(10), (3,))
    np.testing.assert_allclose(case.kernel.prior_kl(x_0, -jnp.inf), 0, atol=1e-6)


# --- shapes and transformations ------------------------------------------------------------------------------------


@over(CASES)
def test_shapes_and_support(case):
    kernel, rates = case.kernel, SCHEDULES["ordinary"].rates()
    assert kernel.event_ndim == len(kernel.event_shape)
    assert kernel.is_discrete == (case.num_states is not None)
    assert kernel.stationary().batch_shape == ()
    assert kernel.stationary().event_shape == kernel.event_shape

    def check(x):
        batch = x.shape[: x.ndim - kernel.event_ndim]
        steps = rates if batch else rates.at(2)  # one rate per column, or one for all
        assert jnp.shape(kernel.support(x)) == batch
        for d in (kernel.transition(x, steps.beta), kernel.marginal(x, steps.log_snr), kernel.posterior(x, x, steps)):
            assert (d.batch_shape, d.event_shape) == (batch, kernel.event_shape)
            assert d.sample(jax.random.key(1)).shape == batch + kernel.event_shape
            assert d.log_prob(x).shape == batch
        return x

    for batch in ((), (4,), (3, 4)):
        jax.eval_shape(check, jax.eval_shape(lambda b=batch: draw_state(kernel, case.num_states, jax.random.key(0), b)))
    assert kernel.support(draw_state(kernel, case.num_states, jax.random.key(0)))


@over([CASES[2], CASES[5], CASES[6]])
def test_jit_and_vmap_agree(case):
    kernel, rates = case.kernel, SCHEDULES["ordinary"].rates()
    x_0, x_prev, x_t = (draw_state(kernel, case.num_states, k, (4,)) for k in jax.random.split(jax.random.key(11), 3))

    def law(kernel, step, x_0, x_prev, x_t):
        return kernel.posterior(x_t, x_0, step).log_prob(x_prev) + kernel.transition(x_prev, step.beta).log_prob(x_t)

    static = jax.jit(law, static_argnums=0)
    expected = static(kernel, rates.at(2), x_0, x_prev, x_t)
    traced = jax.jit(jax.vmap(law, in_axes=(None, None, 0, 0, 0)))
    np.testing.assert_allclose(traced(kernel, rates.at(2), x_0, x_prev, x_t), expected, rtol=1e-5, atol=1e-6)
    each_its_step = jax.jit(jax.vmap(law, in_axes=(None, 0, 0, 0, 0)))(kernel, rates, x_0, x_prev, x_t)
    np.testing.assert_allclose(each_its_step[2], expected[2], rtol=1e-5, atol=1e-6)


@over([CASES[1], CASES[5], CASES[6]])
def test_x64(case):
    kernel = case.kernel
    with jax.enable_x64(True):
        rates = SCHEDULES["ordinary"].rates()
        assert rates.beta.dtype == jnp.float64

        @jax.jit
        def sides(step):
            keys = jax.random.split(jax.random.key(2), 3)
            x_0, x_prev, x_t = (draw_state(kernel, case.num_states, k, (4,)) for k in keys)
            left = kernel.posterior(x_t, x_0, step).log_prob(x_prev) + kernel.marginal(x_0, step.log_snr).log_prob(x_t)
            right = kernel.transition(x_prev, step.beta).log_prob(x_t)
            return left, right + kernel.marginal(x_0, step.previous_log_snr).log_prob(x_prev)

        left, right = sides(rates.at(2))
        assert left.dtype == jnp.float64
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)


# --- the ends ------------------------------------------------------------------------------------------------------


@over([CASES[1], CASES[4], CASES[5], CASES[6]])
def test_finite_at_the_ends(case):
    kernel = case.kernel
    x_0 = draw_state(kernel, case.num_states, jax.random.key(12), (16, 1))
    if case.num_states is None:
        x_0 = x_0.at[0].set(0.0).at[1].set(30.0)

    def values(x_0, rates):
        """Every quantity of every step, of shape (16, T), and the ends, (16, 1)."""
        marginal = kernel.marginal(x_0, rates.log_snr)
        x_t = kernel.as_state(marginal.sample(jax.random.key(0)))
        out = {
            "last step": kernel.expected_last_step(jax.random.key(1), x_0, rates.at(0)),
            "prior_kl": kernel.prior_kl(jnp.broadcast_to(x_0, x_t.shape), rates.log_snr),
            "marginal": marginal.log_prob(x_t),
        }
        inner, x_t = rates.at(slice(1, None)), x_t[:, 1:]
        q, p = kernel.posterior(x_t, x_0, inner), kernel.posterior(x_t, x_t, inner)
        x_prev, out["log ratio"] = kernel.draw_and_log_ratio(jax.random.key(2), q, p)
        return out | {"posterior": q.log_prob(x_prev), "kl": kernel.kl(q, p), "kl to itself": kernel.kl(q, q)}

    compiled = jax.jit(values)
    gradient = jax.jit(jax.jacrev(lambda x, rates: {k: v.sum() for k, v in values(x, rates).items()}))
    for name, schedule in EXTREMES.items():
        for quantity, value in compiled(x_0, schedule.rates()).items():
            assert np.isfinite(value).all(), (name, quantity)
            if "kl" in quantity:
                assert (value >= -1e-5).all(), (name, quantity)
        if case.num_states is None:
            for quantity, value in gradient(x_0, schedule.rates()).items():
                assert np.isfinite(value).all(), (name, "gradient", quantity)


HUGE = jnp.array([0.0, 1e-30, -1e4, 1e4, -3e38, 3e38])


@pytest.mark.parametrize("rule", ["direct", "paper", "x0"])
def test_binomial_rules_are_finite_with_certain_outputs(rule):
    """f_b exactly 0 or 1 and huge logits: finite values and gradients (NaN in a float32 prototype)."""
    outputs = jnp.array([0.0, 1.0, 1e-45, 0.5, 1e-38, 1 - 2**-24]) if rule == "direct" else HUGE
    kernel = ppd.BinomialKernel((6,), probs=0.2)

    def cost(outputs, x, x_0, steps):
        x, x_0, outputs = (jnp.broadcast_to(a, (2, 6)) for a in (x, x_0, outputs))
        p = kernel.parameterizations[rule].reverse(kernel, x, steps, outputs)
        return (kernel.kl(kernel.posterior(x, x_0, steps), p) - p.log_prob(x_0)).sum(), p.sample(jax.random.key(0))

    both = jax.jit(jax.value_and_grad(cost, has_aux=True))
    for name, schedule in EXTREMES.items():
        for x, x_0 in itertools.product((jnp.zeros(6), jnp.ones(6)), repeat=2):
            (value, drawn), gradient = both(outputs, x, x_0, schedule.rates().at(slice(1, None)))
            assert np.isfinite(value), (name, x[0], x_0[0])
            assert np.isin(drawn, [0, 1]).all()
            assert np.isfinite(gradient).all(), (name, x[0], x_0[0], gradient)


@pytest.mark.parametrize("rule", ["v", "x0", "noise", "paper"])
def test_gaussian_rules_are_finite_at_the_ends(rule):
    kernel = ppd.GaussianKernel((3,))
    x_0 = jnp.array([-1.0, 0.2, 3.0])

    def cost(outputs, steps):
        x_t = kernel.marginal(jnp.broadcast_to(x_0, (2, 3)), steps.log_snr).sample(jax.random.key(0))
        p = kernel.parameterizations[rule].reverse(kernel, x_t, steps, *outputs)
        return kernel.kl(kernel.posterior(x_t, x_0, steps), p).sum()

    both = jax.jit(jax.value_and_grad(cost))
    outputs = (jnp.array([[0.0, 0.3, -2.0]] * 2), jnp.array([[0.0, 1.0, -1.0]] * 2))
    for name, schedule in EXTREMES.items():
        rates = schedule.rates()
        if rule == "noise" and rates.alpha_bar[-1] < 1e-30:
            continue  # infinite by its definition, and β_T = 1 is refused by Diffusion
        value, gradient = both(outputs, rates.at(slice(1, None)))
        assert np.isfinite(value) and value >= -1e-5, name
        assert all(np.isfinite(g).all() for g in gradient), name


# --- values --------------------------------------------------------------------------------------------------------


@over(CASES)
def test_pytree_round_trip_equality_and_hash(case):
    kernel = case.kernel
    leaves, structure = jax.tree.flatten(kernel)
    again = jax.tree.unflatten(structure, leaves)
    assert again == kernel and hash(again) == hash(kernel) and type(again) is type(kernel)
    assert copy.deepcopy(kernel) == kernel
    assert all(kernel != other.kernel for other in CASES if other.name != case.name)
    assert isinstance(repr(kernel), str) and type(kernel).__name__ in repr(kernel)


def test_equal_values_are_equal():
    assert ppd.GaussianKernel((2,)) == ppd.GaussianKernel([2])
    assert ppd.BinomialKernel((2,), 0.2) == ppd.BinomialKernel((2,), np.float64(0.2))
    assert hash(ppd.BinomialKernel((2,), [0.2, 0.3])) == hash(ppd.BinomialKernel((2,), np.array([0.2, 0.3])))
    assert ppd.BinomialKernel((2,), 0.2) != ppd.BinomialKernel((2,), 0.3)
    assert ppd.GaussianKernel((2,)) != ppd.BinomialKernel((2,))
    assert ppd.GaussianKernel((2,)) != "a string"


@over(CASES)
def test_immutable(case):
    with pytest.raises(AttributeError, match="immutable"):
        case.kernel.event_shape = (5,)


# --- the user's kernel is enough for everything ---------------------------------------------------------------------


def toy_network(x_t, t):
    """One logit per state, which favours the state as it is."""
    return tuple(jnp.where(x_t == k, 2.0, 0.0) / t[..., None] for k in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_a_third_kernel_goes_through_the_whole_package(last_step):
    kernel = UniformCategorical((2,))
    diffusion = ppd.Diffusion(kernel, ppd.FixedSchedule.constant_erasure(3), toy_network, last_step=last_step)
    prior = diffusion.prior({})
    x = prior.sample(jax.random.key(0), (200,))
    assert x.shape == (200, 2) and prior.support(x).all()

    states = all_states(kernel, 3)
    bound = ppd.lower_bound(jax.random.key(1), prior, states, num_samples=64)
    weighted = diffusion.prior({}, log_prob=ppd.Importance(jax.random.key(2), 256)).log_prob(states)
    np.testing.assert_allclose(jnp.exp(weighted).sum(), 1, atol=0.05)  # unbiased for p, so it sums to one
    assert (bound.value <= weighted + 5 * bound.std_error + 0.1).all()

    log_p = enumerate_chain(diffusion, states)
    np.testing.assert_allclose(weighted, log_p, atol=0.3)
    np.testing.assert_array_less(bound.value, log_p + 5 * bound.std_error + 1e-3)
    with pytest.raises(ValueError, match="x must"):
        ppd.lower_bound(jax.random.key(0), prior, states + 1)


@partial(jax.jit, static_argnums=0)
def enumerate_chain(diffusion, states):
    """log p(x_0) by summing over every path."""
    process = diffusion.reverse_process({})
    log_p = process.kernel.stationary().log_prob(states)
    for i in range(process.num_timesteps - 1, 0, -1):
        log_p = logsumexp(log_p[:, None] + process(states[:, None], process.rates.at(i)).log_prob(states[None]), 0)
    return logsumexp(log_p[:, None] + process.last(states[:, None]).log_prob(states[None]), 0)


class ToyNet(nn.Module):
    @nn.compact
    def __call__(self, x_t, t):
        out = nn.Dense(6)(jax.nn.one_hot(x_t, 3).reshape(*t.shape, -1)).reshape(*t.shape, 2, 3)
        return tuple(out[..., k] for k in range(3))


@pytest.mark.slow
def test_a_third_kernel_trains():
    diffusion = ppd.Diffusion(UniformCategorical((2,)), ppd.FixedSchedule.constant_erasure(4), ToyNet())
    data = np.array([[0, 0], [1, 1], [2, 2]] * 10)
    settings = dict(num_steps=150, batch_size=30, num_times=3, optimizer=optax.adam(3e-2), progress_bar=False)
    fit = ppd.fit(jax.random.key(0), diffusion, data, **settings)
    assert fit.losses[-30:].mean() < fit.losses[:5].mean() - 0.1
