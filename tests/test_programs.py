"""A diffusion as NumPyro programs: every ELBO, handlers, plates, Predictive; and as an argument of jit."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro import handlers
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.util import log_density

import pp_diffusion as ppd
from pp_diffusion.objectives import (
    UNIFORM_SHARE,
    draw_steps,
    fixed_terms,
    step_cost,
    stratified_places,
    stratified_times,
)

SCHEDULE = ppd.FixedSchedule([0.1, 0.4, 0.25, 0.7])
X = jnp.array([[0.5, -1.0], [2.0, 0.3], [0.1, 0.2], [-0.7, 1.5]])
BITS = jnp.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])


def network(x_t, t):
    return 0.2 * x_t + 0.05 * t[..., None], 0.1 * x_t - 0.1


def bit_network(x_t, t):
    return 1.5 * x_t - 0.2 * t[..., None]


GAUSSIAN = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, network)
BINOMIAL = ppd.Diffusion(ppd.BinomialKernel((2,), probs=0.3), SCHEDULE, bit_network)
LINEN = ppd.Diffusion(
    ppd.GaussianKernel((2,)),
    ppd.LearnedSchedule(4, first_beta=0.02),
    ppd.networks.MLP((4,)),
    transform=ppd.standardize(X),
)


def mean_loss(elbo, model, guide, *args, num=600, seed=0, **kwargs):
    """The ELBO's mean over keys, and its standard error."""
    loss = jax.jit(jax.vmap(lambda key: elbo.loss(key, {}, model, guide, *args, **kwargs)))
    values = np.asarray(loss(jax.random.split(jax.random.key(seed), num)), np.float64)
    assert np.isfinite(values).all()
    return values.mean(), values.std() / np.sqrt(num)


@pytest.fixture(scope="module")
def exact():
    """K and its error, summed over the data, by the analytic estimator with many draws."""
    out = {}
    for name, diffusion, x in (("gaussian", GAUSSIAN, X), ("binomial", BINOMIAL, BITS)):
        bound = ppd.lower_bound(jax.random.key(1), diffusion.prior({}), x, estimator="analytic", num_samples=4000)
        out[name] = float(bound.value.sum()), float(np.sqrt((bound.std_error**2).sum()))
    return out


def posterior_guide(x, **kwargs):
    return GAUSSIAN.guide(x, order="posterior", **kwargs)


PAIRS = {
    "whole, Trace": (Trace_ELBO(), GAUSSIAN.model, GAUSSIAN.guide, {}),
    "whole, Trace, subsampled": (Trace_ELBO(), GAUSSIAN.model, GAUSSIAN.guide, {"batch_size": 2}),
    "whole, Trace, posterior order": (Trace_ELBO(), GAUSSIAN.model, posterior_guide, {}),
    "whole, mean field, posterior order": (TraceMeanField_ELBO(), GAUSSIAN.model, posterior_guide, {"batch_size": 3}),
    "whole, mean field, forward order": (TraceMeanField_ELBO(), GAUSSIAN.model, GAUSSIAN.guide, {}),  # falls back
    "bound, Trace": (Trace_ELBO(), GAUSSIAN.bound_model, GAUSSIAN.bound_guide, {}),
    "bound, Trace, subsampled": (
        Trace_ELBO(), GAUSSIAN.bound_model, GAUSSIAN.bound_guide, {"batch_size": 3, "num_times": 2}
    ),
    "bound, mean field": (TraceMeanField_ELBO(), GAUSSIAN.bound_model, GAUSSIAN.bound_guide, {"num_times": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_every_route_is_unbiased_for_the_bound(name, exact):
    elbo, model, guide, kwargs = PAIRS[name]
    loss, error = mean_loss(elbo, model, guide, X, num=1500, **kwargs)
    bound, bound_error = exact["gaussian"]
    assert error < 0.35
    assert abs(-loss - bound) < 4.5 * np.hypot(error, bound_error), (loss, error, bound)


BINOMIAL_PAIRS = {
    "whole, graph": (TraceGraph_ELBO(), BINOMIAL.model, BINOMIAL.guide, {}),
    "bound, Trace": (Trace_ELBO(), BINOMIAL.bound_model, BINOMIAL.bound_guide, {"batch_size": 2}),
}


@pytest.mark.parametrize("name", BINOMIAL_PAIRS)
def test_binomial_routes_are_unbiased_for_the_bound(name, exact):
    elbo, model, guide, kwargs = BINOMIAL_PAIRS[name]
    loss, error = mean_loss(elbo, model, guide, BITS, num=3000, **kwargs)
    bound, bound_error = exact["binomial"]
    assert abs(-loss - bound) < 4.5 * np.hypot(error, bound_error), (loss, error, bound)


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"batch_size": 2}], ids=str)
def test_renyi_elbo_is_the_importance_estimate(kwargs, exact):
    """alpha = 0 is eq. 9, per datum of the plate: above K, and near log p with many particles."""
    loss, error = mean_loss(
        RenyiELBO(alpha=0.0, num_particles=64), GAUSSIAN.model, GAUSSIAN.guide, X, num=200, **kwargs
    )
    rule = ppd.Importance(jax.random.key(5), 4000)
    log_p = float(GAUSSIAN.prior({}, log_prob=rule).log_prob(X).sum())
    assert -loss > exact["gaussian"][0]
    np.testing.assert_allclose(-loss, log_p, atol=4.5 * error + 0.3)


@pytest.mark.parametrize("num_times", [1, 3, 4, 7])
@pytest.mark.parametrize("schedule", [SCHEDULE, ppd.FixedSchedule([0.4])], ids=["T=4", "T=1"])
@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_renyi_elbo_refuses_the_bound_pair(num_times, schedule, last_step):
    """A log of a mean does not separate over time steps: in a trial such a factor gave a false bound in silence."""
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), schedule, network, last_step=last_step)
    elbo = RenyiELBO(alpha=0.0, num_particles=2)
    with pytest.raises(ValueError, match=r"plate|subsampl"):
        jax.eval_shape(
            lambda key: elbo.loss(key, {}, diffusion.bound_model, diffusion.bound_guide, X, num_times=num_times),
            jax.random.key(0),
        )


@pytest.mark.slow
@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_one_step_chain(last_step):
    """T = 1: for standard normal data through N(sqrt(1-β) x, β), all routes agree."""
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.4]), network, last_step=last_step)
    bound = ppd.lower_bound(jax.random.key(0), diffusion.prior({}), X, num_samples=2000)
    bound_sum, bound_error = float(bound.value.sum()), float(np.sqrt((bound.std_error**2).sum()))

    def posterior(x):
        diffusion.guide(x, order="posterior")

    pairs = [
        (diffusion.bound_model, diffusion.bound_guide, Trace_ELBO()),
        (diffusion.model, posterior, Trace_ELBO()),
        (diffusion.model, diffusion.guide, Trace_ELBO()),
        (diffusion.model, posterior, TraceMeanField_ELBO()),
    ]
    for model, guide, elbo in pairs if last_step == "network" else pairs[:2]:
        loss, error = mean_loss(elbo, model, guide, X, num=2000)
        assert abs(-loss - bound_sum) < 4.5 * np.hypot(error, bound_error) + 1e-3


# --- SVI -----------------------------------------------------------------------------------------------------------


def run_svi(svi, num_steps, *args, **kwargs):
    return svi.run(jax.random.key(0), num_steps, *args, progress_bar=False, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["bound", "whole"])
def test_svi_trains_the_network_and_a_learned_schedule(pair):
    model, guide = (LINEN.bound_model, LINEN.bound_guide) if pair == "bound" else (LINEN.model, LINEN.guide)
    settings = {"num_times": 3} if pair == "bound" else {"batch_size": 3}
    result = run_svi(SVI(model, guide, optax.adam(1e-2), Trace_ELBO()), 300, X, **settings)
    assert set(result.params) == {"diffusion.network$params", "diffusion.schedule$params"}
    assert np.isfinite(result.losses).all()
    before, after = (
        ppd.lower_bound(jax.random.key(2), LINEN.prior(params), X, num_samples=500).value.sum()
        for params in (jax.jit(LINEN.init_params)(jax.random.key(0)), result.params)
    )
    assert after > before + 0.5
    initial = LINEN.schedule.init_params()
    trained = result.params["diffusion.schedule$params"]
    assert all(np.abs(trained[k] - initial[k]).max() > 1e-3 for k in initial)
    betas = LINEN.schedule.betas(trained)
    np.testing.assert_allclose(betas[0], 0.02, rtol=1e-5)
    assert np.abs(betas[1:] - LINEN.schedule.betas(initial)[1:]).max() > 1e-3
    assert LINEN.prior(result.params).sample(jax.random.key(1), (3,)).shape == (3, 2)


@pytest.mark.slow
def test_whole_binomial_trajectories_train_without_a_warning():
    diffusion = ppd.Diffusion(ppd.BinomialKernel((2,)), SCHEDULE, ppd.networks.RBF(3))
    result = run_svi(SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), TraceGraph_ELBO()), 3, BITS)
    assert np.isfinite(result.losses).all()


@pytest.mark.slow
def test_one_datum_needs_no_plate():
    for name in ("model", "bound_model"):
        with handlers.seed(rng_seed=0), handlers.trace() as tr:
            getattr(GAUSSIAN, name)(X[0])
        sites = {k: v["value"].shape for k, v in tr.items() if v["type"] == "sample" and k in ("path", "x")}
        assert sites == ({"path": (4, 2), "x": (2,)} if name == "model" else {})


def test_bound_model_needs_a_key():
    with pytest.warns(UserWarning, match="seed"), pytest.raises(ValueError, match="seed"):  # the warning is NumPyro's
        GAUSSIAN.bound_model(X)


# --- the other handlers --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_predictive():
    params = jax.jit(LINEN.init_params)(jax.random.key(0))
    draws = Predictive(LINEN.model, params=params, num_samples=100, parallel=True, return_sites=["x"])(
        jax.random.key(1)
    )
    assert draws["x"].shape == (100, 2) and np.isfinite(draws["x"]).all()
    paths = Predictive(BINOMIAL.model, num_samples=3)(jax.random.key(1))
    assert paths["path"].shape == (3, 4, 2) and np.isin(paths["path"], [0, 1]).all()


@pytest.mark.slow
def test_predictive_draws_from_the_prior():
    draws = Predictive(GAUSSIAN.model, num_samples=4000, parallel=True)(jax.random.key(1))["x"]
    direct = GAUSSIAN.prior({}).sample(jax.random.key(2), (4000,))
    np.testing.assert_allclose(draws.mean(0), direct.mean(0), atol=0.1)
    np.testing.assert_allclose(draws.std(0), direct.std(0), rtol=0.08)


def test_log_density_and_subsampling():
    process = GAUSSIAN.reverse_process({})
    path = jax.random.normal(jax.random.key(0), (4, 4, 2))

    @jax.jit
    def densities(path):
        rows = jnp.array([2, 0])
        p = ppd.ReverseTrajectory(GAUSSIAN.kernel, process.rates, process, batch_shape=(4,))
        per_row = p.log_prob(path) + process.last(path[:, 0]).log_prob(X)
        whole, _ = log_density(GAUSSIAN.model, (X,), {}, {"path": path})
        some, _ = log_density(GAUSSIAN.model, (X,), {"batch_size": 2}, {"path": path[rows], "data": rows})
        one, _ = log_density(GAUSSIAN.model, (X[1],), {}, {"path": path[1]})
        return (whole, per_row.sum()), (some, per_row[rows].sum() * 4 / 2), (one, per_row[1])

    for got, expected in densities(path):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_render_model():
    graph = numpyro.render_model(LINEN.model, model_args=(X,), render_params=True)
    assert all(name in graph.source for name in ("path", "x", "data", "diffusion.network$params"))
    graph = numpyro.render_model(GAUSSIAN.bound_model, model_args=(X,))
    assert "diffusion.steps" in graph.source and "diffusion.time" in graph.source
    assert "path" in numpyro.render_model(BINOMIAL.model, model_args=(BITS,)).source


@pytest.mark.slow
def test_two_diffusions_in_one_program():
    first = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, ppd.networks.RBF(2), name="first")
    second = ppd.Diffusion(ppd.BinomialKernel((2,)), SCHEDULE, ppd.networks.MLP((3,)), name="second")

    def model(x, y):
        first.bound_model(x)
        second.bound_model(y, batch_size=2)

    def guide(x, y):
        pass

    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    state, loss = jax.jit(lambda key: svi.update(svi.init(key, X, BITS), X, BITS))(jax.random.key(0))
    params = svi.get_params(state)
    assert np.isfinite(loss)
    assert set(params) == {"first.network$params", "second.network$params"}
    for diffusion in (first, second):
        diffusion.prior(params)

    def generate():
        return numpyro.sample("x", first.prior(params)), numpyro.sample("y", second.prior(params))

    x, y = jax.eval_shape(handlers.seed(generate, jax.random.key(0)))
    assert x.shape == y.shape == (2,)


def test_params_are_declared_inside_a_program():
    with handlers.seed(rng_seed=0), handlers.trace() as tr:
        prior = LINEN.prior()
        numpyro.sample("x", prior)
    assert {k for k, v in tr.items() if v["type"] == "param"} == {
        "diffusion.network$params",
        "diffusion.schedule$params",
    }


# --- stratified times ----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.sampled_from([(1, 1, 1), (8, 1, 5), (3, 5, 5), (8, 2, 11), (3, 11, 5)]), seed=st.integers(0, 10**6)
)  # fmt: skip
def test_stratified_times_are_spread_evenly(sizes, seed):
    batch_size, num_times, num_steps = sizes
    times = np.asarray(TIMES(jax.random.key(seed), batch_size, num_times, num_steps))
    assert times.shape == (num_times, batch_size) and ((times >= 0) & (times < num_steps)).all()
    for column in times.T:
        counts = np.bincount(column, minlength=num_steps)
        assert np.abs(counts - num_times / num_steps).max() < 2
        if num_times == num_steps:
            assert (counts == 1).all()
    counts = np.bincount(times.ravel(), minlength=num_steps)
    assert np.abs(counts - times.size / num_steps).max() < 2 + num_times


@pytest.mark.parametrize(("num_times", "batch_size"), [(1, 1), (1, 512), (3, 512), (7, 5), (64, 512), (1000, 3)])
def test_places_stay_in_their_stratum(num_times, batch_size, monkeypatch):
    """Also with the largest uniform numbers that there are, of which rounding makes the start of the next stratum."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, np.nextafter(np.float32(1), 0)))
    strata = np.broadcast_to(np.arange(num_times)[:, None], (num_times, batch_size))
    for seed in range(3):
        key = jax.random.key(seed)
        places = np.asarray(stratified_places(key, batch_size, num_times))
        assert places.max() < 1
        np.testing.assert_array_equal(np.floor(places.astype(np.float64) * num_times), strata)
        np.testing.assert_array_equal(stratified_times(key, batch_size, num_times, num_times), strata)
        assert stratified_times(key, batch_size, num_times, 1009).max() == 1008


TIMES = jax.jit(stratified_times, static_argnums=(1, 2, 3))


def test_every_time_is_uniform():
    num = 8000
    draw = jax.jit(jax.vmap(lambda key: stratified_times(key, 3, 2, 5)))
    times = np.asarray(draw(jax.random.split(jax.random.key(0), num)))
    for k in range(3):
        own = times[:, :, k]
        shares = np.stack([(own == step).mean() for step in range(5)])
        np.testing.assert_allclose(shares, 0.2, atol=0.015)
        # of each of the two draws, half the range: together they make one uniform column
    np.testing.assert_allclose(
        [(times[:, 0] == s).mean() + (times[:, 1] == s).mean() for s in range(5)], 0.4, atol=0.02
    )
    single = np.asarray(
        jax.jit(jax.vmap(lambda key: stratified_times(key, 3, 1, 5)))(jax.random.split(jax.random.key(1), num))
    )
    for k in range(3):
        np.testing.assert_allclose(np.bincount(single[:, 0, k]) / num, 0.2, atol=0.02)


def test_steps_are_drawn_by_their_importance_and_weighted_back():
    """For any function of the step, the weighted mean over draws is its mean over steps; T = 9 is not symmetric."""
    kernel, schedule = ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(9, 0.01, -3.0)
    for last_step, first in (("kernel", 1), ("network", 0)):
        diffusion = ppd.Diffusion(kernel, schedule, ppd.networks.MLP((4,)), last_step=last_step)
        process = diffusion.reverse_process(diffusion.init_params(jax.random.key(0)))
        rates = process.rates.at(slice(first, None))
        importance = np.asarray(kernel.step_importance(rates))
        shares = UNIFORM_SHARE / len(importance) + (1 - UNIFORM_SHARE) * importance / importance.sum()
        draw = jax.jit(jax.vmap(lambda key, process=process: draw_steps(key, process, 16, 2)))
        index, weight = map(np.asarray, draw(jax.random.split(jax.random.key(1), 4_000)))
        assert index.min() == first and index.max() == 8
        assert weight.max() <= 1 / UNIFORM_SHARE + 1e-5
        np.testing.assert_allclose(np.bincount(index.ravel(), minlength=9)[first:] / index.size, shares, atol=0.002)
        for function in (np.arange(9.0), np.exp(-np.arange(9.0))):
            np.testing.assert_allclose((weight * function[index]).mean(), function[first:].mean(), rtol=0.01)
        if first == 0:  # a t = 1 by the network counts like an e-fold of noise, not like one step of many
            assert shares[0] == shares.max()


def test_all_steps_are_drawn_once_where_they_can_be():
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(6), ppd.networks.MLP((4,)))
    process = diffusion.reverse_process(diffusion.init_params(jax.random.key(0)))
    index, weight = draw_steps(jax.random.key(1), process, 3, 5)
    np.testing.assert_array_equal(np.sort(index, 0), np.broadcast_to(np.arange(1, 6)[:, None], (5, 3)))
    assert weight == 1


# --- squared errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_squared_errors_are_those_of_the_mean(last_step):
    """Against a sum by hand, over all steps: f_mu is 0.3 x_t, so that the error has a closed form."""
    kernel, schedule = ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.3, 0.6])
    diffusion = ppd.Diffusion(
        kernel, schedule, lambda x_t, t: (0.3 * x_t, jnp.ones_like(x_t)), parameterization="direct", last_step=last_step
    )
    x_0 = np.array([1.2, -0.4])
    retained = 1 - np.array([0.1, 0.3, 0.6])
    alpha_bar = np.cumprod(retained)
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    expected = 0.0
    for t in range(1 if last_step == "kernel" else 0, 3):
        from_x_0 = np.sqrt(previous[t]) * (1 - retained[t]) / (1 - alpha_bar[t])
        from_x_t = np.sqrt(retained[t]) * (1 - previous[t]) / (1 - alpha_bar[t]) - 0.3
        mean = from_x_0 * x_0 + from_x_t * np.sqrt(alpha_bar[t]) * x_0
        expected += (mean**2).sum() + 2 * from_x_t**2 * (1 - alpha_bar[t])
    data = jnp.broadcast_to(jnp.asarray(x_0, float), (20_000, 2))
    loss = Trace_ELBO().loss(jax.random.key(0), {}, diffusion.mse_model, diffusion.bound_guide, data)
    np.testing.assert_allclose(loss / len(data), expected, rtol=0.02)


@pytest.mark.slow
def test_squared_errors_of_bits():
    """For binomial kernels f_b is the mean; with the exact posterior's own f_b nothing is left."""
    kernel, schedule = ppd.BinomialKernel((3,), probs=0.3), ppd.FixedSchedule([0.2, 0.4, 0.5])
    datum = jnp.array([1.0, 0.0, 1.0])
    sure = ppd.Diffusion(kernel, schedule, lambda x_t, t: 60.0 * (2 * datum - 1) + 0 * x_t)
    coin = ppd.Diffusion(kernel, schedule, lambda x_t, t: 0 * x_t)
    data = jnp.broadcast_to(datum, (50, 3))
    losses = [
        Trace_ELBO().loss(jax.random.key(0), {}, d.mse_model, d.bound_guide, data, num_times=2) for d in (sure, coin)
    ]
    assert losses[0] < 1e-6 < 0.1 < losses[1] / len(data)


def test_squared_errors_cannot_learn_a_schedule():
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.LearnedSchedule(5, 0.01), ppd.networks.MLP((4,)))
    with pytest.raises(ValueError, match="schedule must be fixed"):
        diffusion.mse_model(jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="objective must be 'bound' for a learned schedule"):
        ppd.fit(jax.random.key(0), diffusion, jnp.eye(2), num_steps=1, objective="mse")


@pytest.mark.slow
def test_times_per_datum_lower_the_gradients_variance():
    """Against one t for the whole batch, as the authors' code draws it; both gradients are unbiased."""
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.LearnedSchedule(6, 0.01), ppd.networks.MLP((4,)))
    x = jax.random.normal(jax.random.key(0), (16, 2)) * jnp.array([1.5, 0.3]) + 0.5
    params = jax.jit(diffusion.init_params)(jax.random.key(1))

    def shared(params, key):
        process = diffusion.reverse_process(params)
        end_key, time_key, noise_key = jax.random.split(key, 3)
        last, prior_kl = fixed_terms(end_key, process, x)
        index = jax.random.randint(time_key, (), 1, 6)
        return -(last - prior_kl - 5 * step_cost(noise_key, process, x, index)).sum()

    def stratified(params, key):
        return Trace_ELBO().loss(key, params, diffusion.bound_model, diffusion.bound_guide, x)

    keys = jax.random.split(jax.random.key(2), 2000)
    both = jax.jit(lambda p: [jax.vmap(jax.grad(f), (None, 0))(p, keys) for f in (shared, stratified)])
    flat = [
        np.concatenate([a.reshape(2000, -1) for a in jax.tree.leaves(g)], 1).astype(np.float64) for g in both(params)
    ]
    variances = [g.var(0).sum() for g in flat]
    difference = flat[0].mean(0) - flat[1].mean(0)
    error = np.sqrt((flat[0].var(0) + flat[1].var(0)) / 2000)
    assert (np.abs(difference) <= 5 * error + 1e-6).all()
    assert variances[1] < 0.8 * variances[0], variances


# --- parameterizations ---------------------------------------------------------------------------------------------


def test_gaussian_parameterizations_describe_the_same_steps():
    kernel = GAUSSIAN.kernel
    x_t, x_0, s = X, X[::-1] * 0.7, 0.3 * X

    @jax.jit
    def moments(rates):
        signal, noise = jnp.sqrt(rates.alpha_bar), jnp.sqrt(rates.erased)
        epsilon = (x_t - signal * x_0) / noise
        given = {"x0": x_0, "noise": epsilon, "v": signal * epsilon - noise * x_0}
        steps = {k: kernel.parameterizations[k].reverse(kernel, x_t, rates, v, s) for k, v in given.items()}
        mean, variance = steps["x0"].mean, steps["x0"].variance
        steps["direct"] = kernel.parameterizations["direct"].reverse(kernel, x_t, rates, mean, variance)
        return {k: (d.mean, d.variance) for k, d in steps.items()}

    for i in range(1, 4):
        got = moments(SCHEDULE.rates().at(i))
        for name, (mean, variance) in got.items():
            np.testing.assert_allclose(mean, got["x0"][0], rtol=1e-4, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(variance, got["x0"][1], rtol=1e-5, err_msg=name)


def test_gaussian_rules_at_their_neutral_outputs():
    """s = 0 is exact for standard normal data; the paper's z = 0 gives variance β_t and mean x_t(1-β_t)."""
    kernel, rates = GAUSSIAN.kernel, SCHEDULE.rates().at(2)
    paper = kernel.parameterizations["paper"].reverse(kernel, X, rates, 0 * X, 0 * X)
    np.testing.assert_allclose(paper.variance, rates.beta, rtol=1e-5)
    np.testing.assert_allclose(paper.mean, X * (1 - rates.beta), rtol=1e-5)
    standard = kernel.parameterizations["v"].reverse(kernel, X, rates, 0 * X, 0 * X)
    np.testing.assert_allclose(standard.variance, rates.beta, rtol=1e-5)
    np.testing.assert_allclose(standard.mean, X * jnp.sqrt(1 - rates.beta), rtol=1e-5)


def test_binomial_parameterizations():
    kernel, rates = BINOMIAL.kernel, SCHEDULE.rates()
    logits = jnp.array([[-2.0, 0.5], [3.0, -0.1], [0.0, 8.0], [1.0, -30.0]])

    @jax.jit
    def probs(step):
        rules = kernel.parameterizations
        paper = rules["paper"].reverse(kernel, BITS, step, logits).mean
        direct = rules["direct"].reverse(kernel, BITS, step, jax.nn.sigmoid(logits)).mean
        x0 = rules["x0"].reverse(kernel, BITS, step, logits).mean
        one, zero = (kernel.posterior(BITS, jnp.full_like(BITS, b), step).mean for b in (1.0, 0.0))
        return paper, direct, x0, jax.nn.sigmoid(logits) * one + jax.nn.sigmoid(-logits) * zero

    for i in range(1, 4):
        paper, direct, x0, mixture = probs(rates.at(i))
        np.testing.assert_allclose(paper, jax.nn.sigmoid(logits), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(direct, paper, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(x0, mixture, rtol=1e-4)


# --- diffusions and priors as arguments of jit ---------------------------------------------------------------------


def build(probs=0.3, width=4, name="diffusion"):
    """All anew: kernel, schedule, network, transform."""
    return {
        "gaussian": ppd.Diffusion(
            ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(4, 0.01), ppd.networks.MLP((width,)),
            transform=ppd.standardize(X), name=name,
        ),
        "binomial": ppd.Diffusion(
            ppd.BinomialKernel((2,), probs=probs), ppd.FixedSchedule([0.1, 1.0]), bit_network, name=name
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["gaussian", "binomial"])
def test_separately_built_equals_trace_once(kind):
    traces = []

    def count(diffusion, x):
        traces.append(diffusion)
        return x + diffusion.schedule.betas().sum()

    one, two = build()[kind], build()[kind]
    assert one == two and hash(one) == hash(two) and one is not two
    static, traced = jax.jit(count, static_argnums=0), jax.jit(count)
    for f in (static, traced):
        traces.clear()
        np.testing.assert_array_equal(f(one, 1.0), f(two, 1.0))
        assert len(traces) == 1

    def sample(prior, key):
        traces.append(prior)
        return prior.sample(key, (2,))

    traces.clear()
    sampled = jax.jit(sample)
    for diffusion in (one, two):
        sampled(diffusion.prior(jax.jit(diffusion.init_params)(jax.random.key(0))), jax.random.key(1))
    assert len(traces) == 1


def test_what_differs_is_unequal():
    one = build()
    assert one["gaussian"] != build(width=5)["gaussian"]
    assert one["gaussian"] != build(name="other")["gaussian"]
    assert one["binomial"] != build(probs=0.4)["binomial"]
    assert one["gaussian"] != one["binomial"]
    assert len({build()["gaussian"], build()["gaussian"], build(width=5)["gaussian"]}) == 2
    with pytest.raises(AttributeError, match="immutable"):
        one["gaussian"].name = "other"


def test_diffusion_as_a_pytree():
    diffusion = build()["gaussian"]
    leaves, structure = jax.tree.flatten(diffusion)
    assert jax.tree.unflatten(structure, leaves) == diffusion
    assert all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)
    hash(structure)  # no array sits in the static part
    halved = jax.tree.map(lambda a: a / 2, diffusion)
    np.testing.assert_allclose(halved.transform.scale, diffusion.transform.scale / 2)


@pytest.mark.slow
def test_users_site_names_do_not_collide_with_the_data_plate():
    """The prior under a user's own plate of another name, next to the diffusion's bound in one program."""

    def model(x):
        GAUSSIAN.bound_model(x)
        with numpyro.plate("mine", 3):
            z = numpyro.sample("z", GAUSSIAN.prior({}))
            numpyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=jnp.zeros(3))

    with handlers.seed(rng_seed=0), handlers.trace() as tr:
        model(X)
    assert tr["z"]["value"].shape == (3, 2)
