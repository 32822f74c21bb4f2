"""Data in boxes, on simplices and of positive numbers: every part of the package through NumPyro's bijections."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import reparam, seed, substitute, trace

import pp_diffusion as ppd

KEY = jax.random.key(0)
LOW, HIGH = jnp.array([-1.0, 2.0, 0.0]), jnp.array([1.0, 5.0, 10.0])
SHARES = dist.Dirichlet(jnp.array([2.0, 3.0, 4.0]))
LAWS = {
    "box": dist.TransformedDistribution(
        dist.Beta(2.0, jnp.array([2.0, 3.0, 4.0])), dist.transforms.AffineTransform(LOW, HIGH - LOW)
    ).to_event(1),
    "positive": dist.Gamma(jnp.array([2.0, 5.0]), 1.0).to_event(1),
    "simplex": SHARES,
    "above": dist.TransformedDistribution(
        dist.Gamma(jnp.array([2.0, 5.0]), 1.0), dist.transforms.AffineTransform(jnp.array([-3.0, 20.0]), 1.0)
    ).to_event(1),
}
SUPPORTS = {
    "box": constraints.interval(LOW, HIGH),
    "positive": constraints.positive,
    "simplex": constraints.simplex,
    "above": constraints.greater_than(jnp.array([-3.0, 20.0])),
}


def normal_about(z):
    """The reverse process of N(0, I): exact where states are standard normal."""

    def network(x_t, t):
        return jnp.sqrt(1 - 1 / (31 - t))[..., None] * x_t, jnp.broadcast_to(1 / (31 - t)[..., None], x_t.shape)

    return network


def diffusion_of(name, data, network=None, **settings):
    transform = ppd.transform_to(SUPPORTS[name], data)
    size = transform.inv(data[:1]).shape[-1]
    if network is None:
        settings = {"parameterization": "direct", "last_step": "network", **settings}
        return ppd.Diffusion(
            ppd.GaussianKernel((size,)),
            ppd.FixedSchedule.constant_erasure(30),
            normal_about(data),
            transform=transform,
            **settings,
        )
    schedule = ppd.FixedSchedule.log_linear(50, 1e-2, -6.0)
    return ppd.Diffusion(ppd.GaussianKernel((size,)), schedule, network, transform=transform, **settings)


@pytest.fixture(params=["box", *(pytest.param(n, marks=pytest.mark.slow) for n in ("positive", "simplex", "above"))])
def name(request):
    return request.param


@pytest.fixture
def data(name):
    return LAWS[name].sample(KEY, (2000,))


def test_states_are_of_unit_scale(name, data):
    transform = ppd.transform_to(SUPPORTS[name], data)
    states = transform.inv(data)
    np.testing.assert_allclose(states.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(states.std(0), 1, atol=1e-3)
    np.testing.assert_allclose(transform(states), data, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_density_and_draws_are_those_of_the_transformed_normal(name, data):
    """Of exactly normal states: log p is known, whatever the bijection."""
    diffusion = diffusion_of(name, data)
    prior = diffusion.prior({})
    x = prior.sample(KEY, (5,))
    assert x.shape == (5, *data.shape[1:]) == (5, *prior.event_shape) and diffusion.event_shape == prior.event_shape
    assert prior.support(x).all() and LAWS[name].support(x).all()
    size = diffusion.kernel.event_shape[0]
    exact = dist.TransformedDistribution(dist.Normal(jnp.zeros(size), 1.0).to_event(1), diffusion.transform)
    bound = ppd.lower_bound(KEY, prior, x, estimator="log_ratio")
    np.testing.assert_allclose(bound.value, exact.log_prob(x), atol=2e-3)
    estimate = ppd.estimate_log_prob(KEY, prior, x, 4)
    np.testing.assert_allclose(estimate.value, exact.log_prob(x), atol=2e-3)


@pytest.mark.slow
def test_smc(name, data):
    """A likelihood of one number of x: moments by weighing plain draws of the prior."""
    prior = diffusion_of(name, data).prior({})
    y = float(data[:, 0].mean() + data[:, 0].std())

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[0], data[:, 0].std() / 2), obs=y)

    smc = ppd.SMC(model, num_particles=1000, progress_bar=False)
    smc.run(KEY, y)
    x = prior.sample(jax.random.key(1), (20_000,))
    log_r = dist.Normal(x[:, 0], data[:, 0].std() / 2).log_prob(y)
    weights = jax.nn.softmax(log_r)
    assert abs(smc.log_evidence - (jax.nn.logsumexp(log_r) - np.log(20_000))) < 0.15
    draws = smc.get_samples()["x"]
    assert draws.shape == (1000, *data.shape[1:]) and LAWS[name].support(draws).all()
    np.testing.assert_allclose(draws.mean(0), weights @ x, atol=0.15 * float(data.std(0).max()))


@pytest.mark.slow
def test_noise_has_the_shape_of_states(name, data):
    diffusion = diffusion_of(name, data)
    prior, size = diffusion.prior({}), diffusion.kernel.event_shape[0]
    model = reparam(lambda: numpyro.sample("x", prior), config={"x": ppd.TrajectoryReparam()})
    sites = trace(seed(model, KEY)).get_trace()
    assert sites["x_noise"]["value"].shape == (31, size) and sites["x"]["value"].shape == data.shape[1:]
    flow = diffusion.flow({}, num_steps=8)
    noise = flow.to_noise(x := flow.sample(KEY, (3,)))
    assert noise.shape == (3, size) and x.shape == (3, *data.shape[1:])
    np.testing.assert_allclose(flow.from_noise(noise), x, rtol=1e-2, atol=1e-2)
    assert np.isfinite(flow.log_prob(x)).all()
    model = reparam(lambda: numpyro.sample("x", flow), config={"x": ppd.FlowReparam()})
    moved = trace(substitute(seed(model, KEY), {"x_noise": noise[0]})).get_trace()["x"]["value"]
    np.testing.assert_allclose(moved, x[0], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_plates_and_the_programs(name, data):
    diffusion = diffusion_of(name, data, ppd.networks.MLP((8,)))
    params = diffusion.init_params(KEY)
    model = substitute(seed(diffusion.model, KEY), params)
    assert model(data[:4]).shape == (4, *data.shape[1:]) and model().shape == data.shape[1:]

    def in_plate():
        with numpyro.plate("rows", 3):
            x = numpyro.sample("x", diffusion.prior(params))
            numpyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=jnp.zeros(3))

    smc = ppd.SMC(in_plate, num_particles=20, progress_bar=False)
    smc.run(KEY)
    assert smc.get_samples()["x"].shape == (20, 3, *data.shape[1:])


def test_files(name, data, tmp_path):
    diffusion = diffusion_of(name, data, ppd.networks.MLP((8,)))
    prior = diffusion.prior(diffusion.init_params(KEY))
    ppd.save(tmp_path / "a.ppd", prior)
    assert ppd.load(tmp_path / "a.ppd") == prior


@pytest.mark.slow
def test_a_trained_density_is_near_the_law(name, data):
    """log p within .1 nats of the truth on the average, and never above it by more than its error."""
    train, test = LAWS[name].sample(KEY, (10_000,)), LAWS[name].sample(jax.random.key(1), (500,))
    diffusion = diffusion_of(name, train, ppd.networks.MLP((64, 64)), last_step="network")
    result = ppd.fit(KEY, diffusion, train, num_steps=2000, batch_size=256, progress_bar=False)
    gap = LAWS[name].log_prob(test) - ppd.lower_bound(KEY, result.prior, test).value
    assert -4 * gap.std() / np.sqrt(500) < gap.mean() < 0.1


@pytest.mark.parametrize(
    "constraint, edge, match",
    [
        (constraints.interval(0.0, 1.0), [[0.5, 0.2], [1.0, 0.3]], r"on its edge.*1 of 4 values in column 0"),
        (constraints.positive, [[0.5, 0.0], [1.0, 0.3]], r"data must be in Positive.*1 of 4 are not"),
        (constraints.nonnegative, [[0.5, 0.0], [1.0, 0.3]], r"on its edge.*column 1"),
        (constraints.simplex, [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], "on its edge"),
        (constraints.interval(0.0, 1.0), [[0.5, 1.2], [1.0, 0.3]], r"data must be in Interval.*1 of 4 are not"),
        (constraints.positive, [[0.5, np.nan], [1.0, 0.3]], "data must be finite"),
        (constraints.boolean, None, "constraint must be one that NumPyro has a bijection to; got Boolean"),
    ],
)
def test_edges_and_others_are_named(constraint, edge, match):
    with pytest.raises(ValueError, match=match):
        ppd.transform_to(constraint, edge)


@pytest.mark.slow
def test_training_refuses_data_on_the_edge():
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.FixedSchedule.log_linear(4),
        ppd.networks.MLP((4,)),
        transform=ppd.transform_to(constraints.interval(0.0, 1.0)),
    )
    x = np.random.default_rng(0).uniform(size=(30, 2))
    x[3, 1] = 1.0
    with pytest.raises(ValueError, match="not on its edge"):
        ppd.fit(KEY, diffusion, x, num_steps=1, progress_bar=False)
    shares = np.array([[0.2, 0.8, 0.0], [0.1, 0.2, 0.7]])
    with pytest.raises(ValueError, match="not on its edge"):
        diffusion_of("simplex", SHARES.sample(KEY, (100,))).check_data(shares)


def test_the_support_of_a_distribution():
    for law, shape in ((dist.Uniform(jnp.zeros(2), 3.0).to_event(1), (2,)), (SHARES, (2,)), (dist.Normal(0, 1), ())):
        transform = ppd.transform_to(law.support)
        assert law.support(transform(jnp.zeros(shape))).all()


def test_exact_observations_of_shares_are_named():
    prior = diffusion_of("simplex", SHARES.sample(KEY, (100,))).prior({})

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Delta(x[:1], event_dim=1), obs=y)

    with pytest.raises(ValueError, match="site 'y': an exact observation needs a transform that acts on each"):
        ppd.SMC(model, num_particles=10).run(KEY, jnp.array([0.2]))
