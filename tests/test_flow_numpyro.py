"""What NumPyro does with a distribution, it does with a flow: each against the exact answer for normal data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from numpyro.infer.util import log_density

import pp_diffusion as ppd
from pp_diffusion import solvers
from tests.exact.flow_oracles import NORMAL, Mixture
from tests.exact.oracles import Z, z_score

BRIEF = {"num_steps": 5, "solver": solvers.RALSTON3}
FLOW = NORMAL.diffusion().flow({}, **BRIEF)
MEAN, SD = NORMAL.means[0], NORMAL.scales[0]
EXACT = dist.Normal(jnp.asarray(MEAN, jnp.float32), jnp.asarray(SD, jnp.float32)).to_event(1)  # FLOW, but for its steps
CENTRES = np.array([[0.0, 0.0], [3.0, 3.0], [-3.0, 1.0]])
LABELLED = Mixture([1.0], [[0.0, 0.0]], [[1.0, 1.0]], shift=lambda label: label @ jnp.asarray(CENTRES, jnp.float32))
SHARES = np.array([0.5, 0.3, 0.2])
Y = jnp.array([0.2, 1.0])
NOISE = 0.6
REPARAM = {"x": ppd.FlowReparam()}
SLOW = pytest.mark.slow


def model(y=None, prior=FLOW):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def posterior(y=Y):
    precision = 1 / SD**2 + 1 / NOISE**2
    return (MEAN / SD**2 + np.asarray(y) / NOISE**2) / precision, precision**-0.5


def nuts(model, *args, num_samples=300, num_chains=2, **kwargs):
    mcmc = MCMC(NUTS(model), num_warmup=150, num_samples=num_samples, num_chains=num_chains, progress_bar=False,
                chain_method="vectorized")  # fmt: skip
    mcmc.run(jax.random.key(1), *args, **kwargs)
    return mcmc


def is_posterior(draws, y=Y, tolerance=0.15):
    mean, sd = posterior(y)
    assert np.abs((draws.mean(0) - mean) / sd).max() < tolerance  # the draws depend on each other
    assert np.abs(draws.std(0) / sd - 1).max() < tolerance


@pytest.fixture(scope="module")
def fitted():
    """NUTS over the noise, once for all that follows a run."""
    return nuts(handlers.reparam(model, config=REPARAM), Y)


@pytest.mark.slow
def test_nuts_on_noise(fitted):
    draws = fitted.get_samples()
    assert draws["x"].shape == draws["x_noise"].shape == (600, 2)
    is_posterior(draws["x"])


@SLOW
def test_nuts_on_x():
    is_posterior(nuts(model, Y).get_samples()["x"])


def test_predictive(fitted):
    """Of the model and of the reparameterised one, from the same draws."""
    draws = fitted.get_samples()
    mean, sd = posterior()
    for program in (model, handlers.reparam(model, config=REPARAM)):
        y = Predictive(program, draws)(jax.random.key(2))["y"]
        assert np.abs((y.mean(0) - mean) / np.hypot(sd, NOISE)).max() < 0.2
        assert np.abs(y.std(0) / np.hypot(sd, NOISE) - 1).max() < 0.2
    prior = Predictive(model, num_samples=500)(jax.random.key(3))["x"]
    assert np.abs(z_score(prior, MEAN)).max() < Z


def test_log_likelihood(fitted):
    draws = fitted.get_samples()
    for program in (model, handlers.reparam(model, config=REPARAM)):
        values = log_likelihood(program, draws, Y)["y"]
        np.testing.assert_allclose(values, dist.Normal(draws["x"], NOISE).to_event(1).log_prob(Y), rtol=1e-4)


def test_arviz(fitted):
    az = pytest.importorskip("arviz")
    posterior_group = az.from_numpyro(fitted)["posterior"]
    assert posterior_group["x"].shape == (2, 300, 2)


def test_draws_without_their_noise():
    x = jnp.array([[3.0, 1.0], [-2.0, 0.0]])
    again = Predictive(handlers.reparam(model, config=REPARAM), {"x": x})(jax.random.key(0))
    np.testing.assert_array_equal(again["x"], x)
    assert np.abs(again["y"] - x).max() < 4 * NOISE


def three_rows(y=None, prior=FLOW):
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


CHAIN = NORMAL.diffusion().prior({}, num_timesteps=2)  # whose noise has three entries


@pytest.mark.parametrize(
    "program, strategy, prior, own, others",
    [
        (model, ppd.FlowReparam, FLOW, (2,), [(3, 2)]),
        (model, ppd.TrajectoryReparam, CHAIN, (3, 2), [(2,), (5, 2)]),
        (three_rows, ppd.FlowReparam, FLOW, (3, 2), [(2,), (3, 3, 2)]),
        (three_rows, ppd.TrajectoryReparam, CHAIN, (3, 3, 2), [(3, 2), (3, 5, 2)]),
    ],
)
def test_noise_that_is_not_ones_own(program, strategy, prior, own, others):
    """Another strategy's, also where there are as many rows as entries; of another length; of other plates."""
    shape = (3, 2) if program is three_rows else (2,)
    program = handlers.reparam(partial(program, prior=prior), config={"x": strategy()})
    x = 10 * jnp.arange(4.0).reshape(4, *(1,) * len(shape)) * jnp.ones(shape)
    for other in others:
        stale = {"x_noise": jnp.zeros((4, *other))}
        with pytest.raises(ValueError, match=r"'x_noise' is given values of shape .* not the noise of this"):
            Predictive(program, stale)(jax.random.key(0))
        y = Predictive(program, {"x": x, **stale})(jax.random.key(0))["y"]
        np.testing.assert_allclose(y, x, atol=5 * NOISE)
    noise = jax.random.normal(jax.random.key(1), (4, *own))
    drawn = Predictive(program, {"x": x, "x_noise": noise}, return_sites=["x"])(jax.random.key(0))["x"]
    assert np.abs(drawn - x).max() > 5
    with pytest.raises(ValueError, match="site 'x' is given values of shape"):
        Predictive(program, {"x": x[..., :1]})(jax.random.key(0))


def test_a_trajectory_has_one_noise_for_all_labels():
    """Where a label is enumerated, x has a value for each."""
    prior = LABELLED.diffusion().prior({}, context=jnp.eye(3), context_event_dim=1, num_timesteps=4)
    program = handlers.reparam(lambda: numpyro.sample("x", prior), config={"x": ppd.TrajectoryReparam()})
    x = handlers.substitute(program, {"x_noise": jnp.zeros((5, 2))})()
    np.testing.assert_allclose(x - x[0], CENTRES, atol=1e-4)


@SLOW
@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoIAFNormal])
@pytest.mark.slow
def test_autoguides(guide):
    guide = guide(model)
    svi = SVI(model, guide, optax.adam(0.03), Trace_ELBO(8))
    result = svi.run(jax.random.key(0), 300, Y, progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(2000,))["x"]
    is_posterior(draws, tolerance=0.25)


OTHER = Mixture([1.0], [[-1.0]], [[0.4]]).diffusion(name="other").flow({}, **BRIEF)


def two_priors(y=None):
    x = numpyro.sample("x", FLOW)
    w = numpyro.sample("w", OTHER)
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(x.sum(-1) + w[..., 0], 0.1 + scale), obs=y)


def test_several_sites():
    """Two different priors, and a scale."""
    density, _ = log_density(two_priors, (2.0,), {}, {"x": Y, "w": jnp.array([-0.9]), "scale": 0.5})
    exact = EXACT.log_prob(Y) + dist.Normal(-1.0, 0.4).log_prob(-0.9) + dist.HalfNormal(1.0).log_prob(0.5)
    np.testing.assert_allclose(density, exact + dist.Normal(0.3, 0.6).log_prob(2.0), atol=0.1)


@SLOW
@pytest.mark.slow
def test_nuts_over_several_sites():
    program = handlers.reparam(two_priors, config={"x": ppd.FlowReparam(), "w": ppd.FlowReparam()})
    draws = nuts(program, 2.0, num_samples=150).get_samples()
    assert {"x", "w", "scale", "x_noise", "w_noise"} == set(draws)
    assert abs(draws["x"].sum(-1).mean() + draws["w"].mean() - 2.0) < 1.0


@pytest.mark.slow
def test_mixture_of_two_flows():
    far = Mixture([1.0], [[5.0, 5.0]], [[0.5, 0.5]]).diffusion().flow({}, **BRIEF)
    mixture = dist.MixtureGeneral(dist.Categorical(jnp.array([0.25, 0.75])), [FLOW, far])
    x = jnp.stack([Y, Y + 5.0])
    expected = jnp.logaddexp(jnp.log(0.25) + FLOW.log_prob(x), jnp.log(0.75) + far.log_prob(x))
    np.testing.assert_allclose(mixture.log_prob(x), expected, atol=1e-4)
    draws = mixture.sample(jax.random.key(0), (400,))
    assert abs(z_score((draws > 2.5).all(-1), 0.75)) < Z


def flow_of_label(label):
    return LABELLED.diffusion().flow({}, context=jax.nn.one_hot(label, 3), context_event_dim=1, **BRIEF)


def chain_of_label(label):
    schedule = ppd.FixedSchedule.log_linear(8, 0.02, -8.0)
    return LABELLED.diffusion(schedule).prior({}, context=jax.nn.one_hot(label, 3), context_event_dim=1)


def labelled(y=None, law=flow_of_label):
    label = numpyro.sample("label", dist.Categorical(jnp.asarray(SHARES)), infer={"enumerate": "parallel"})
    x = numpyro.sample("x", law(label))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


@pytest.mark.slow
def test_enumeration_of_a_label():
    pytest.importorskip("funsor")
    y = jnp.array([1.5, 1.5])
    draws = nuts(labelled, y, num_samples=400).get_samples()
    log_weights = np.log(SHARES) - 0.25 * np.sum((np.asarray(y) - CENTRES) ** 2, -1)
    exact = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    labels = Predictive(labelled, draws, infer_discrete=True)(jax.random.key(3), y)["label"]
    assert abs(np.bincount(labels, minlength=3) / len(labels) - exact).max() < 0.12
    mean = exact @ (CENTRES + np.asarray(y)) / 2
    assert np.abs(draws["x"].mean(0) - mean).max() < 0.35


@SLOW
@pytest.mark.parametrize("strategy", [ppd.FlowReparam, ppd.TrajectoryReparam])
def test_enumeration_of_a_label_over_noise(strategy):
    """The noise is one for all labels, and x has one value for each."""
    pytest.importorskip("funsor")
    y, is_flow = jnp.array([1.5, 1.5]), strategy is ppd.FlowReparam
    program = partial(labelled, law=flow_of_label if is_flow else chain_of_label)
    program = handlers.reparam(program, config={"x": strategy()})
    fitted = nuts(program, y, num_samples=400)
    draws = fitted.get_samples()
    assert draws["x_noise"].shape == ((800, 2) if is_flow else (800, 9, 2))
    log_weights = np.log(SHARES) - 0.25 * np.sum((np.asarray(y) - CENTRES) ** 2, -1)
    exact = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    if is_flow:  # x = N(centre, 1)'s map of the noise: given a label, the noise is normal about half its residual
        mean = exact @ (np.asarray(y) - CENTRES) / 2
        assert np.abs(draws["x_noise"].mean(0) - mean).max() < 0.25
    label = Predictive(program, draws, infer_discrete=True)(jax.random.key(3), y)["label"]
    assert abs(np.bincount(label, minlength=3) / 800 - exact).max() < 0.12
    # the x of that label: NumPyro hands out no deterministic sites beside inferred labels
    x = Predictive(program, {**draws, "label": label})(jax.random.key(4), y)["x"]
    assert np.abs(x.mean(0) - exact @ (CENTRES + np.asarray(y)) / 2).max() < 0.35


def rows_with_labels(y=None):
    with numpyro.plate("rows", 4):
        label = numpyro.sample("label", dist.Categorical(jnp.asarray(SHARES)), infer={"enumerate": "parallel"})
        x = numpyro.sample("x", flow_of_label(label))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


@pytest.mark.slow
def test_enumeration_in_a_plate():
    """A label for each row, summed out: the joint density of all x is the product of the rows' mixtures."""
    pytest.importorskip("funsor")
    from numpyro.contrib.funsor import config_enumerate, enum
    from numpyro.contrib.funsor import log_density as summed

    x = jnp.asarray([[0.3, -0.2], [3.1, 2.5], [-2.0, 1.0], [1.0, 1.0]])
    program = enum(config_enumerate(rows_with_labels), first_available_dim=-2)
    found, _ = summed(program, (x,), {}, {"x": x})
    each = np.log(SHARES) + dist.Normal(CENTRES, 1.0).to_event(1).log_prob(x[:, None])
    exact = np.logaddexp.reduce(each, -1).sum() + 4 * dist.Normal(0.0, 1.0).log_prob(0.0) * 2
    np.testing.assert_allclose(found, exact, atol=0.1)


def test_condition_do_mask_scale():
    at = {"x": Y}
    density = FLOW.log_prob(Y)
    conditioned = handlers.trace(handlers.condition(model, at)).get_trace(Y)
    assert conditioned["x"]["is_observed"]
    np.testing.assert_allclose(log_density(handlers.condition(model, at), (Y,), {}, {})[0],
                               density + dist.Normal(Y, NOISE).log_prob(Y).sum(), rtol=1e-4)  # fmt: skip
    done = handlers.trace(handlers.seed(handlers.do(model, at), 0)).get_trace()
    np.testing.assert_array_equal(done["y"]["fn"].mean, Y)

    def one_site():
        numpyro.sample("x", FLOW)

    for handler, expected in (
        (handlers.mask(one_site, mask=False), 0.0),
        (handlers.scale(one_site, scale=3.0), 3 * density),
    ):
        np.testing.assert_allclose(log_density(handler, (), {}, at)[0], expected, rtol=1e-5)
        if not isinstance(handler, handlers.mask):
            with pytest.raises(ValueError, match="scaled"):
                handlers.seed(handlers.reparam(handler, config=REPARAM), 0)()
    observed = handlers.reparam(handlers.condition(one_site, at), config=REPARAM)
    np.testing.assert_allclose(log_density(handlers.condition(observed, at), (), {}, {})[0], density, rtol=1e-5)


def test_nested_plates():
    def grid(y=None):
        with numpyro.plate("rows", 3, dim=-1), numpyro.plate("tables", 2, dim=-2):
            x = numpyro.sample("x", FLOW)
            numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)

    x = jnp.asarray(NORMAL.sample(0, 6), jnp.float32).reshape(2, 3, 2)
    np.testing.assert_allclose(
        log_density(grid, (), {}, {"x": x, "y": x})[0],
        FLOW.log_prob(x).sum() + 6 * dist.Normal(0.0, NOISE).log_prob(0.0) * 2,
        rtol=1e-4,
    )
    trace = handlers.trace(handlers.seed(handlers.reparam(grid, config=REPARAM), 0)).get_trace()
    assert trace["x"]["value"].shape == trace["x_noise"]["value"].shape == (2, 3, 2)


@SLOW
@pytest.mark.filterwarnings("ignore:Some donated buffers")  # NumPyro's own, under vmap
def test_vmap_over_data_sets():
    """A posterior for each, in one program."""
    ys = jnp.stack([Y, Y + 1.0])

    def run(key, y):
        program = handlers.reparam(model, config=REPARAM)
        kernel = NUTS(program)
        mcmc = MCMC(kernel, num_warmup=100, num_samples=200, progress_bar=False)
        mcmc.run(key, y)
        return mcmc.get_samples()["x"]

    draws = jax.vmap(run)(jax.random.split(jax.random.key(0), 2), ys)
    for x, y in zip(draws, ys, strict=True):
        is_posterior(x, y, tolerance=0.3)


def test_refusals_of_the_reparam():
    with pytest.raises(TypeError, match="FlowReparam needs a DiffusionFlow at site 'x'"):
        handlers.seed(handlers.reparam(lambda: model(prior=EXACT), config=REPARAM), 0)()
    with pytest.raises(ValueError, match="masked"):
        handlers.seed(handlers.reparam(lambda: model(prior=FLOW.mask(jnp.array(True))), config=REPARAM), 0)()
