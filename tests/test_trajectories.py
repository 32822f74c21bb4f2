"""The three path distributions: shapes, densities against loops written out, transformations, the registered KL."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import pp_diffusion as ppd

T = 4
SCHEDULE = ppd.FixedSchedule([0.05, 0.3, 0.15, 0.6])  # asymmetric, so that a reversed index shows


def gaussian_network(x_t, t):
    scale = t[..., None].astype(float)
    return 0.3 * x_t + 0.1 * scale, -0.2 * scale + 0.05 * x_t


def binomial_network(x_t, t):
    return 2.0 * x_t - 0.3 * t[..., None] + jnp.arange(2)


KERNELS = {
    "gaussian": (ppd.GaussianKernel((2,)), gaussian_network),
    "binomial": (ppd.BinomialKernel((2,), probs=0.3), binomial_network),
}


def process_of(name, last_step="kernel"):
    kernel, network = KERNELS[name]
    return ppd.Diffusion(kernel, SCHEDULE, network, last_step=last_step).reverse_process({})


def data(name, batch=(3,)):
    if name == "gaussian":
        return 0.4 + 1.5 * jax.random.normal(jax.random.key(7), (*batch, 2))
    return jax.random.bernoulli(jax.random.key(7), 0.5, (*batch, 2)).astype(float)


def trajectories(name, batch=(3,)):
    kernel, rates, x_0 = KERNELS[name][0], SCHEDULE.rates(), data(name, batch)
    return {
        "forward": ppd.ForwardTrajectory(kernel, rates, x_0),
        "posterior": ppd.PosteriorTrajectory(kernel, rates, x_0, rng_key=jax.random.key(5)),
        "reverse": ppd.ReverseTrajectory(kernel, rates, process_of(name), batch_shape=batch),
    }


kernels = pytest.mark.parametrize("name", KERNELS)
kinds = pytest.mark.parametrize("kind", ["forward", "posterior", "reverse"])


@kernels
@kinds
def test_shapes(name, kind):
    for batch in ((), (3,)):
        q = trajectories(name, batch)[kind]
        assert (q.batch_shape, q.event_shape) == (batch, (T, 2))
        assert q.is_discrete == (name == "binomial") and q.has_rsample == (name == "gaussian")
        for expanded, shape in ((q, batch), (q.expand((5, *batch)), (5, *batch))):
            assert expanded.batch_shape == shape and type(expanded) is type(q)
            for sample_shape in ((), (4,), (2, 1)):
                path = jax.eval_shape(partial(expanded.sample, sample_shape=sample_shape), jax.random.key(0))
                assert path.shape == sample_shape + shape + (T, 2)
                log_prob = jax.eval_shape(expanded.log_prob, path)
                assert log_prob.shape == sample_shape + shape
    path = q.sample(jax.random.key(0))
    assert q.support(path).all() and jnp.shape(q.support(path)) == (3,)


@kernels
def test_densities_against_loops(name):
    kernel, process, x_0 = KERNELS[name][0], process_of(name), data(name)
    rates = SCHEDULE.rates()

    @jax.jit
    def both():
        laws = trajectories(name)
        path = laws["forward"].sample(jax.random.key(0), (6,))
        steps = [jnp.broadcast_to(x_0, (6, 3, 2)), *(path[:, :, i] for i in range(T))]  # x_0 … x_T
        loops = {"forward": 0.0, "posterior": 0.0, "reverse": 0.0}
        for t in range(1, T + 1):
            loops["forward"] += kernel.transition(steps[t - 1], rates.beta[t - 1]).log_prob(steps[t])
        for t in range(2, T + 1):
            loops["posterior"] += kernel.posterior(steps[t], steps[0], rates.at(t - 1)).log_prob(steps[t - 1])
            loops["reverse"] += process(steps[t], rates.at(t - 1)).log_prob(steps[t - 1])
        loops["posterior"] += kernel.marginal(x_0, rates.log_snr[-1]).log_prob(steps[T])
        loops["reverse"] += kernel.stationary().log_prob(steps[T])
        return {kind: law.log_prob(path) for kind, law in laws.items()}, loops

    got, expected = both()
    for kind in got:
        assert got[kind].shape == (6, 3)
        np.testing.assert_allclose(got[kind], expected[kind], rtol=1e-4, atol=1e-4, err_msg=kind)
    # one law in two orders
    np.testing.assert_allclose(got["forward"], got["posterior"], rtol=1e-4, atol=1e-4)


@kernels
def test_forward_and_posterior_order_draw_the_same_law(name):
    kernel, rates = KERNELS[name][0], SCHEDULE.rates()

    @jax.jit
    def moments(key):
        x_0 = data(name, (1,))
        out = []
        for kind in (ppd.ForwardTrajectory, ppd.PosteriorTrajectory):
            path = kind(kernel, rates, x_0).sample(key, (4000,))[:, 0]
            across = ((path[:, 1:] - path[:, 1:].mean(0)) * (path[:, :-1] - path[:, :-1].mean(0))).mean(0)
            out.append((path.mean(0), path.std(0), across))
        marginal = kernel.marginal(jnp.broadcast_to(x_0, (T, 2)), rates.log_snr)
        return out, marginal.mean

    (forward, posterior), mean = moments(jax.random.key(3))
    for a, b in zip(forward, posterior, strict=True):
        np.testing.assert_allclose(a, b, atol=0.1)
    np.testing.assert_allclose(forward[0], mean, atol=0.08)


@kernels
@kinds
def test_pytree_round_trip_and_jit(name, kind):
    q = trajectories(name)[kind]
    leaves, structure = jax.tree.flatten(q)
    again = jax.tree.unflatten(structure, leaves)
    assert vars(again).keys() >= {"kernel", "rates"}
    draw = jax.jit(lambda q, key: (path := q.sample(key), q.log_prob(path)))
    path, log_prob = draw(q, jax.random.key(0))
    for got, expected in zip(draw(again, jax.random.key(0)), (path, log_prob), strict=True):
        np.testing.assert_array_equal(got, expected)
    # an expanded one crosses jit too
    wide, _ = draw(q.expand((2, 3)), jax.random.key(0))
    assert wide.shape == (2, 3, T, 2)


@kernels
def test_vmap(name):
    kernel, rates = KERNELS[name][0], SCHEDULE.rates()
    x_0 = data(name)

    @jax.jit
    def over_data(paths):
        return jax.vmap(lambda x, p: ppd.ForwardTrajectory(kernel, rates, x).log_prob(p))(x_0, paths)

    q = ppd.ForwardTrajectory(kernel, rates, x_0)
    keys = jax.random.split(jax.random.key(0), 5)
    paths = jax.jit(jax.vmap(q.sample))(keys)
    assert paths.shape == (5, 3, T, 2)
    expected = jax.jit(q.log_prob)(paths[0])
    np.testing.assert_allclose(over_data(paths[0]), expected, rtol=1e-5)

    @jax.jit
    def over_distributions(paths):  # the other order has the same density
        rows = jax.vmap(lambda x: ppd.PosteriorTrajectory(kernel, rates, x))(x_0)
        return jax.vmap(lambda q, p: q.log_prob(p))(rows, paths)

    np.testing.assert_allclose(over_distributions(paths[0]), expected, rtol=1e-4)


@kinds
def test_under_plates(kind):
    q = trajectories("gaussian", ())[kind]

    def model():
        with numpyro.plate("rows", 3):
            return numpyro.sample("path", q)

    trace = jax.jit(lambda key: handlers.trace(handlers.seed(model, key)).get_trace()["path"]["value"])
    path = trace(jax.random.key(0))
    assert path.shape == (3, T, 2)
    assert not np.allclose(path[0], path[1])

    def nested(key):
        rows = trajectories("gaussian", (3,))[kind]
        outer, inner = numpyro.plate("outer", 2, dim=-2), numpyro.plate("inner", 3)
        with handlers.seed(rng_seed=key), outer, inner, handlers.trace() as tr:
            numpyro.sample("path", rows)
        return tr["path"]["value"], tr["path"]["fn"].log_prob(tr["path"]["value"])

    path, log_prob = jax.eval_shape(nested, jax.random.key(0))
    assert path.shape == (2, 3, T, 2) and log_prob.shape == (2, 3)


@kernels
def test_kl_is_registered_for_the_posterior_order_with_a_key_alone(name):
    laws = trajectories(name)
    kl = dist.kl_divergence(laws["posterior"], laws["reverse"])
    assert kl.shape == (3,) and (kl > 0).all()
    with pytest.raises(NotImplementedError):
        dist.kl_divergence(laws["forward"], laws["reverse"])
    keyless = ppd.PosteriorTrajectory(KERNELS[name][0], SCHEDULE.rates(), data(name))
    with pytest.raises(NotImplementedError, match="rng_key"):
        dist.kl_divergence(keyless, laws["reverse"])


@kernels
def test_kl_has_the_mean_of_the_log_ratio(name):
    kernel, rates, x_0 = KERNELS[name][0], SCHEDULE.rates(), data(name)

    @jax.jit
    @jax.vmap
    def both(key):
        q = ppd.PosteriorTrajectory(kernel, rates, x_0, rng_key=key)
        p = ppd.ReverseTrajectory(kernel, rates, process_of(name), batch_shape=(3,))
        path = q.sample(jax.random.fold_in(key, 1))
        return dist.kl_divergence(q, p), q.log_prob(path) - p.log_prob(path)

    kl, ratio = both(jax.random.split(jax.random.key(0), 3000))
    error = np.hypot(kl.std(0), ratio.std(0)) / np.sqrt(3000)
    np.testing.assert_array_less(np.abs(kl.mean(0) - ratio.mean(0)), 4.5 * error)


@pytest.mark.slow
@kernels
def test_streaming_weight_equals_the_path_distributions(name):
    """The network, called once per step, records the path that the streaming function draws and forgets."""
    kernel, network = KERNELS[name]
    seen = {}

    def recording(x_t, t):
        jax.debug.callback(lambda t, x: seen.__setitem__(int(t[0]), np.array(x)), t, x_t, ordered=True)
        return network(x_t, t)

    x_0 = data(name)
    # the last step by the network, so that x_1 is seen too
    process = ppd.Diffusion(kernel, SCHEDULE, recording, last_step="network").reverse_process({})
    for seed in range(2):
        log_w = ppd.log_weight(jax.random.key(seed), process, x_0)
        jax.effects_barrier()
        assert sorted(seen) == list(range(1, T + 1))
        path = jnp.stack([seen.pop(t) for t in range(1, T + 1)], 1)
        plain = process_of(name, "network")
        q = ppd.ForwardTrajectory(kernel, plain.rates, x_0)
        p = ppd.ReverseTrajectory(kernel, plain.rates, plain, batch_shape=(3,))
        expected = p.log_prob(path) + plain.last(path[:, 0]).log_prob(x_0) - q.log_prob(path)
        np.testing.assert_allclose(log_w, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_step():
    kernel, rates = ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.3]).rates()
    x_0 = data("gaussian")
    process = ppd.Diffusion(kernel, ppd.FixedSchedule([0.3]), gaussian_network).reverse_process({})
    q = ppd.PosteriorTrajectory(kernel, rates, x_0, rng_key=jax.random.key(0))
    p = ppd.ReverseTrajectory(kernel, rates, process, batch_shape=(3,))
    path = q.sample(jax.random.key(1))
    assert path.shape == p.sample(jax.random.key(2)).shape == (3, 1, 2)
    np.testing.assert_allclose(q.log_prob(path), ppd.ForwardTrajectory(kernel, rates, x_0).log_prob(path), rtol=1e-5)
    np.testing.assert_allclose(p.log_prob(path), kernel.stationary().log_prob(path[:, 0]), rtol=1e-5)
    np.testing.assert_allclose(dist.kl_divergence(q, p), kernel.prior_kl(x_0, rates.log_snr[-1]), rtol=1e-5)


def test_validate_args():
    q = ppd.ForwardTrajectory(ppd.BinomialKernel((2,)), SCHEDULE.rates(), jnp.zeros(2), validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        q.log_prob(jnp.full((T, 2), 0.5))


@pytest.mark.slow
def test_a_users_reverse_function():
    """Any function of (x_t, rates) will do."""
    kernel, rates = ppd.GaussianKernel(()), SCHEDULE.rates()

    def standard(x_t, rates):  # exact for standard normal data
        return kernel.normal(x_t * jnp.sqrt(rates.retained), jnp.broadcast_to(rates.beta, x_t.shape))

    p = ppd.ReverseTrajectory(kernel, rates, standard)
    path = jax.jit(lambda key: p.sample(key, (8000,)))(jax.random.key(0))
    np.testing.assert_allclose(path.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(path.std(0), 1, atol=0.06)
    assert p.log_prob(path).shape == (8000,)
