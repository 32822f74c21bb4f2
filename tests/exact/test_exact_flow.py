"""The flow's density against the truth: normal data, mixtures; orders of the solvers; what the ends cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion import solvers
from tests.exact.flow_oracles import NORMAL, TWO, Mixture
from tests.exact.oracles import Z, enable_x64, z_score


def error(data, num_steps, **kwargs):
    x = data.sample(0, 300)
    flow = data.diffusion().flow({}, num_steps=num_steps, **kwargs)
    return np.asarray(flow.log_prob(jnp.asarray(x)), np.float64) - data.log_prob(x)


@pytest.mark.parametrize("data", [NORMAL, TWO], ids=["normal", "mixture"])
def test_density_in_float32(data):
    """Measured (root mean square): 50 steps 2e-6."""
    assert np.sqrt(np.mean(error(data, 50) ** 2)) < 1e-5


@pytest.mark.parametrize("data", [NORMAL, TWO], ids=["normal", "mixture"])
def test_density_in_float64_and_its_order(data):
    """Measured (mean absolute), mixture: 20, 50, 100 steps 3e-5, 8e-8, 3e-9."""
    with enable_x64():
        errors = {n: np.abs(error(data, n)).mean() for n in (20, 50)}
    assert errors[50] < 1e-6
    assert 1e-3 > errors[20] > errors[50] * (2.5**4.5 if data is TWO else 1)


@pytest.mark.slow
@pytest.mark.parametrize("data", [NORMAL, TWO], ids=["normal", "mixture"])
def test_density_at_many_steps(data):
    with enable_x64():
        assert np.abs(error(data, 100)).mean() < 2e-8


@pytest.mark.parametrize("solver, order", [("EULER", 1), ("MIDPOINT", 2), ("RALSTON3", 3), ("RK4", 4), ("TSIT5", 5)])
def test_orders_of_the_solvers(solver, order):
    """The error falls by 2^order or more when steps are halved."""

    def end(solver, num):
        at = np.arange(num) / num
        return getattr(solvers, solver).solve(
            lambda x, t, kind: jnp.cos(3 * t) - x**2, 1.0, at, np.full(num, 1 / num), at
        )

    with enable_x64():
        truth = end("TSIT5", 400)
        ratio = abs((end(solver, 16) - truth) / (end(solver, 32) - truth))
    assert np.log2(ratio) > order - 0.1
    assert order > 3 or np.log2(ratio) < order + 0.1  # the higher ones have errors that cross 0


@pytest.mark.parametrize("order", [1, 2])
def test_orders_of_the_multistep_samplers(order):
    """The distance of draws from those of many steps, of the same noise, falls by 2^order when calls are doubled."""
    noise = jax.random.normal(jax.random.key(0), (300, 2))

    def draws(**kwargs):
        return TWO.diffusion(ppd.FixedSchedule.log_linear(200, 1e-3, -9.0)).flow({}, **kwargs).from_noise(noise)

    with enable_x64():
        fine = draws(num_steps=60)
        coarse, finer = (
            jnp.sqrt(jnp.mean((draws(sampler=solvers.Multistep(n + 2, order)) - fine) ** 2)) for n in (60, 120)
        )
    assert abs(np.log2(coarse / finer) - order) < 0.2, (coarse, finer)


def test_a_multistep_sampler_follows_normal_data_between_trained_steps():
    """Of a network that knows trained steps alone: levels are taken from these, with one call each."""
    schedule = ppd.FixedSchedule.log_linear(100, 1e-4, -9.0)
    log_snrs = jnp.asarray(schedule.log_snr())
    calls = []

    def by_step(x_t, t):
        calls.append(t)
        return NORMAL(x_t, t, log_snrs[t - 1])

    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), schedule, by_step, parameterization="x0", last_step="network")
    flow = diffusion.flow({}, sampler=solvers.Multistep(25))
    assert not flow.ode.between and flow.num_calls == 25
    noise = jax.random.normal(jax.random.key(0), (100, 2))
    np.testing.assert_allclose(flow.from_noise(noise), NORMAL.means[0] + NORMAL.scales[0] * noise, atol=0.03)


def test_diffrax_methods_by_their_tableau():
    diffrax = pytest.importorskip("diffrax")
    ours = solvers.RungeKutta.of(diffrax.Tsit5())
    assert ours.num_stages == 6
    np.testing.assert_allclose(ours.weights, solvers.TSIT5.weights, atol=1e-12)
    for row, own in zip(ours.stages, solvers.TSIT5.stages, strict=True):
        np.testing.assert_allclose(row, own, atol=1e-12)
    for wrong in (diffrax.Kvaerno3(), "heun", diffrax.ReversibleHeun()):
        with pytest.raises(TypeError, match="solver must be"):
            solvers.RungeKutta.of(wrong)


def test_full_erasure_takes_the_mean_that_the_network_tells():
    """beta_T = 1, 20 coarse steps, data far from 0: the mean is the network's, and what is left is alpha_bar_19 / 2."""
    far = Mixture([1.0], [[4.0, -3.0]], [[1.0, 1.0]])
    flow = far.diffusion(ppd.FixedSchedule.constant_erasure(20)).flow({}, num_steps=10)
    x = far.sample(1, 100)
    assert (
        np.abs(flow.log_prob(jnp.asarray(x)) - far.log_prob(x)).max() < 1e-2
    )  # measured 5e-3, of the first level; 2.2 where x_19 ~ N(0, 1)


@pytest.mark.slow
def test_interpolation_between_trained_steps():
    """A network that reads t alone, and outputs that mean a step: the same density but for the spacing's square."""
    schedule = ppd.FixedSchedule.log_linear(400, 1e-4, -12.0)
    log_snrs = jnp.asarray(schedule.log_snr())

    def by_step(x_t, t):
        return TWO(x_t, t, log_snrs[t - 1])

    def direct(x_t, t):
        rates = schedule.rates().at(t - 1)
        step = ppd.GaussianKernel((2,)).posterior(x_t, by_step(x_t, t)[0], rates)
        return step.mean, step.variance + 1e-9

    x = TWO.sample(2, 100)
    for network, rule in ((by_step, "x0"), (direct, "direct")):
        diffusion = ppd.Diffusion(
            ppd.GaussianKernel((2,)), schedule, network, parameterization=rule, last_step="network"
        )
        flow = diffusion.flow({}, num_steps=20)
        assert not flow.ode.between
        assert np.abs(flow.log_prob(jnp.asarray(x)) - TWO.log_prob(x)).mean() < 2e-3
    assert TWO.diffusion().flow({}).ode.between


def test_draws_have_the_data_s_moments():
    x = TWO.diffusion().flow({}).sample(jax.random.key(0), (4000,))
    mean = TWO.weights @ TWO.means
    second = TWO.weights @ (TWO.means**2 + TWO.scales**2)
    assert np.abs(z_score(x, mean)).max() < Z
    assert np.abs(z_score(np.asarray(x) ** 2, second)).max() < Z


@pytest.mark.slow
def test_hutchinson_is_unbiased():
    x = jnp.asarray(TWO.sample(3, 3))
    flow = TWO.diffusion().flow({}, num_steps=8, solver=solvers.RALSTON3)
    exact = flow.log_prob(x)

    def estimate(key):
        return TWO.diffusion().flow({}, num_steps=8, solver=solvers.RALSTON3, trace=ppd.Hutchinson(key)).log_prob(x)

    estimates = jax.vmap(estimate)(jax.random.split(jax.random.key(1), 400))
    assert np.abs(z_score(estimates, np.asarray(exact))).max() < Z
    assert estimates.std(0).min() > 0
