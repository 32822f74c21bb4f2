"""A trained diffusion as a NumPyro distribution: the contract, and its use in a user's model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.inspect import get_model_relations

import pp_diffusion as ppd

SCHEDULE = ppd.FixedSchedule([0.1, 0.4, 0.25, 0.7])
DATA = np.array([[0.5, -1.0], [2.0, 0.3], [0.1, 0.2], [-0.7, 1.5]])
LABELS = jax.nn.one_hot(jnp.array([0, 2, 1]), 3)


def network(x_t, t):
    return 0.2 * x_t + 0.05 * t[..., None], 0.1 * x_t - 0.1


def bit_network(x_t, t):
    return 1.5 * x_t - 0.2 * t[..., None]


EXP = ComposeTransform([AffineTransform(jnp.array([0.5, -1.0]), jnp.array([0.5, 0.3])), ExpTransform()])
DIFFUSIONS = {
    "gaussian": ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, network),
    "mlp": ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.LearnedSchedule(4, 0.02), ppd.networks.MLP((4,)), transform=ppd.standardize(DATA)
    ),
    "exp": ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, network, transform=EXP),
    "binomial": ppd.Diffusion(ppd.BinomialKernel((2,), probs=0.3), SCHEDULE, bit_network),
    "labels": ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, ppd.networks.MLP((4,))),
}
PRIORS = {
    "gaussian": lambda **kw: DIFFUSIONS["gaussian"].prior({}, **kw),
    "mlp": lambda **kw: DIFFUSIONS["mlp"].prior(PARAMS["mlp"], **kw),
    "exp": lambda **kw: DIFFUSIONS["exp"].prior({}, **kw),
    "binomial": lambda **kw: DIFFUSIONS["binomial"].prior({}, **kw),
    "labels": lambda **kw: DIFFUSIONS["labels"].prior(PARAMS["labels"], context=LABELS, **kw),
    "one label": lambda **kw: DIFFUSIONS["labels"].prior(PARAMS["labels"], context=LABELS[1], **kw),
}


def _params(name, *context):
    """Not the initial ones, whose outputs are zero."""
    params = jax.jit(lambda key: DIFFUSIONS[name].init_params(key, *context))(jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.1 * np.sin(np.arange(a.size)).reshape(a.shape), params)


PARAMS = {}


@pytest.fixture(scope="module", autouse=True)
def _parameters():
    PARAMS.update(mlp=_params("mlp"), labels=_params("labels", LABELS, 1))


over = pytest.mark.parametrize("name", PRIORS)


# --- the distribution contract -------------------------------------------------------------------------------------


@over
def test_shapes(name):
    prior = PRIORS[name]()
    batch = (3,) if name == "labels" else ()
    assert isinstance(prior, dist.Distribution)
    assert (prior.batch_shape, prior.event_shape, prior.event_dim) == (batch, (2,), 1)
    assert prior.is_discrete == (name == "binomial") and prior.has_rsample == (name != "binomial")
    for sample_shape in ((), (4,), (2, 1)):
        for law, shape in ((prior, batch), (prior.expand((5, *batch)), (5, *batch))):
            x = jax.eval_shape(lambda key, d=law, s=sample_shape: d.sample(key, s), jax.random.key(0))
            assert x.shape == sample_shape + shape + (2,)
    expanded = prior.expand((5, 3))
    assert expanded.to_event(1).event_shape == (3, 2) and expanded.to_event(1).batch_shape == (5,)
    assert prior.expand_by([7]).batch_shape == (7, *batch)


@over
def test_samples_lie_in_the_support(name):
    prior = PRIORS[name]()
    x = prior.sample(jax.random.key(0), (6,))
    assert np.isfinite(x).all() and np.asarray(prior.support(x)).all()
    assert np.shape(prior.support(x)) == x.shape[:-1]
    np.testing.assert_array_equal(x, prior.sample(jax.random.key(0), (6,)))
    assert not np.array_equal(x, prior.sample(jax.random.key(1), (6,)))
    x = x.astype(float)
    outside = {"binomial": 0.5, "exp": -1.0}.get(name, jnp.nan)
    assert not np.asarray(prior.support(x.at[..., 0].set(outside))).any()
    if name == "binomial":
        assert prior.support.is_discrete
        assert isinstance(prior.support, type(constraints.independent(constraints.boolean, 1)))


@over
def test_pytree_round_trip_and_leaves(name):
    prior = PRIORS[name](log_prob=ppd.Bound(jax.random.key(9)))
    leaves, structure = jax.tree.flatten(prior)
    again = jax.tree.unflatten(structure, leaves)
    assert vars(again).keys() - {"_validate_args"} == vars(prior).keys() - {"_validate_args"}
    assert (again.batch_shape, again.event_shape) == (prior.batch_shape, prior.event_shape)
    held = jax.tree.leaves((prior.process.params, prior.context, prior.transform))
    held += [prior.process.held_rates.log_snr]
    held += [prior.kernel.probs] if name == "binomial" else []
    assert all(any(leaf is array for leaf in leaves) for array in held)
    hash(structure)  # nothing but leaves holds an array
    np.testing.assert_array_equal(again.sample(jax.random.key(0)), prior.sample(jax.random.key(0)))


@pytest.mark.parametrize("name", ["mlp", "binomial", "labels"])
def test_jit_and_vmap(name):
    prior = PRIORS[name]()
    keys = jax.random.split(jax.random.key(0), 3)
    expected = prior.sample(keys[1])
    many = jax.jit(jax.vmap(lambda d, key: d.sample(key), (None, 0)))(prior, keys)
    assert many.shape == (3, *prior.batch_shape, 2)
    np.testing.assert_allclose(many[1], expected, rtol=2e-5, atol=1e-5)


@pytest.mark.slow
def test_vmap_over_parameters():
    stacked = jax.tree.map(lambda a: jnp.stack([a, a + 0.5]), PARAMS["mlp"])
    draw = jax.jit(jax.vmap(lambda p: DIFFUSIONS["mlp"].prior(p).sample(jax.random.key(0))))
    x = draw(stacked)
    assert x.shape == (2, 2) and not np.allclose(x[0], x[1])
    np.testing.assert_allclose(x[0], PRIORS["mlp"]().sample(jax.random.key(0)), rtol=1e-4, atol=1e-5)
    # the distribution itself made under vmap
    priors = jax.vmap(DIFFUSIONS["mlp"].prior)(stacked)
    again = jax.jit(jax.vmap(lambda d: d.sample(jax.random.key(0))))(priors)
    np.testing.assert_allclose(again, x, rtol=1e-4, atol=1e-5)


def test_samples_are_differentiable():
    gradient = jax.jit(jax.grad(lambda p: DIFFUSIONS["mlp"].prior(p).sample(jax.random.key(0)).sum()))(PARAMS["mlp"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_validate_args():
    prior = DIFFUSIONS["binomial"].prior({}, log_prob=ppd.Bound(jax.random.key(0)), validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        prior.log_prob(jnp.array([0.5, 1.0]))


def test_exact_moments():
    """The exact reverse process of standard normal data, moved and scaled."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), SCHEDULE, lambda x_t, t: (0 * x_t, 0 * x_t), transform=AffineTransform(3.0, 2.0)
    )
    x = diffusion.prior({}).sample(jax.random.key(0), (20_000,))
    np.testing.assert_allclose(x.mean(0), 3.0, atol=0.06)
    np.testing.assert_allclose(np.cov(x.T), 4 * np.eye(2), atol=0.15)


def test_x64():
    with jax.enable_x64(True):
        prior = DIFFUSIONS["gaussian"].prior({}, log_prob=ppd.Bound(jax.random.key(1)))
        x = prior.sample(jax.random.key(0), (3,))
        assert x.dtype == prior.log_prob(x).dtype == jnp.float64


# --- in a user's model ---------------------------------------------------------------------------------------------


def users_model(prior, num, y=None):
    """A regression whose coefficients of each group come from the diffusion."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("groups", num):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x @ jnp.array([1.0, -2.0]), scale + 0.1), obs=y)


@pytest.mark.parametrize("name", ["mlp", "binomial", "labels"])
def test_in_a_users_model(name):
    prior = PRIORS[name]()
    draws = Predictive(users_model, num_samples=5, parallel=True)(jax.random.key(0), prior, 3)
    assert draws["x"].shape == (5, 3, 2) and draws["y"].shape == (5, 3)
    assert np.isfinite(draws["y"]).all()
    assert len(np.unique(np.asarray(draws["x"]).reshape(-1, 2), axis=0)) >= (2 if name == "binomial" else 15)
    conditioned = jax.eval_shape(
        lambda key: handlers.trace(handlers.seed(users_model, key)).get_trace(prior, 3, y=jnp.zeros(3))["x"]["value"],
        jax.random.key(0),
    )
    assert conditioned.shape == (3, 2)


def test_log_prob_is_never_silent():
    prior = PRIORS["mlp"]()
    for x in (jnp.zeros(2), jnp.zeros((3, 2))):
        with pytest.raises(NotImplementedError, match=r"(?s)SMC.*TrajectoryReparam"):
            prior.log_prob(x)
    with pytest.raises(NotImplementedError, match=r"(?s)SMC.*TrajectoryReparam"):
        prior.expand((3,)).log_prob(jnp.zeros((3, 2)))


def test_nuts_on_a_prior_site_fails_with_the_two_right_ways():
    mcmc = MCMC(NUTS(users_model), num_warmup=2, num_samples=2, progress_bar=False)
    with pytest.raises(NotImplementedError, match=r"(?s)SMC.*TrajectoryReparam"):
        mcmc.run(jax.random.key(0), PRIORS["gaussian"](), 3, y=jnp.zeros(3))


@pytest.mark.slow
def test_trained_in_a_users_own_program():
    """prior(None) declares the parameters; with a rule, its log_prob is an objective."""
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, ppd.networks.RBF(2), name="mine")

    def model(x):
        prior = diffusion.prior(log_prob=ppd.Bound(numpyro.prng_key()))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", prior, obs=x)

    import optax

    svi = SVI(model, lambda x: None, optax.adam(1e-2), Trace_ELBO())
    x = jnp.asarray(DATA, float)
    state, loss = jax.jit(lambda key: svi.update(svi.init(key, x), x))(jax.random.key(0))
    params = svi.get_params(state)
    assert set(params) == {"mine.network$params"} and np.isfinite(loss)
    assert any(
        np.abs(a).max() > 0 for a in jax.tree.leaves(params["mine.network$params"]["readout"])
    )  # they start at 0


# --- shorter chains ------------------------------------------------------------------------------------------------


def test_shorter_chains():
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(6, 0.01), network)
    x = jnp.asarray(DATA, float)
    for num in (1, 3):
        prior = diffusion.prior({}, num_timesteps=num)
        assert prior.num_timesteps == num and prior.process.num_timesteps == num
        assert jax.eval_shape(prior.sample, jax.random.key(0)).shape == (2,)
        if num != 1:
            bound = ppd.lower_bound(jax.random.key(0), prior, x)
            assert bound.kl_per_step.shape == (4, num) and np.isfinite(bound.value).all()
    direct = ppd.Diffusion(
        ppd.GaussianKernel((2,)), SCHEDULE, lambda x_t, t: (x_t, 1 + x_t**2), parameterization="direct"
    )
    with pytest.raises(ValueError, match="num_timesteps must be 4 for parameterization 'direct'"):
        direct.prior({}, num_timesteps=2)
    assert direct.prior({}, num_timesteps=4).num_timesteps == 4


# --- log_prob rules ------------------------------------------------------------------------------------------------

RULES = {"bound": ppd.Bound(jax.random.key(3), num_samples=2), "importance": ppd.Importance(jax.random.key(3), 8)}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["exp", "binomial", "labels"])
def test_rules_make_log_prob_a_deterministic_function(name, rule):
    prior = PRIORS[name](log_prob=RULES[rule])
    x = (
        jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        if name == "binomial"
        else jnp.array([[0.5, 1.0], [2.0, 0.3], [1.0, 0.2]])
    )
    log_prob = prior.log_prob(x)
    assert log_prob.shape == (3,) and np.isfinite(log_prob).all()
    np.testing.assert_array_equal(log_prob, prior.log_prob(x))
    jitted = jax.jit(lambda d, x: d.log_prob(x))
    if name == "labels":
        np.testing.assert_allclose(jitted(prior, x), log_prob, rtol=1e-5)
    if name == "exp":
        gradient = jax.jit(jax.grad(lambda x: prior.log_prob(x).sum()))(x)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
        assert jax.eval_shape(jitted, prior, x[0]).shape == ()
        assert jax.eval_shape(prior.expand((2, 3)).log_prob, x).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "binomial"])
def test_importance_is_above_the_bound_on_average(name):
    x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    means = {}
    for rule, make in (("bound", ppd.Bound), ("importance", lambda key: ppd.Importance(key, 32))):
        run = jax.jit(jax.vmap(lambda key: PRIORS[name](log_prob=make(key)).log_prob(x)))  # noqa: B023
        means[rule] = run(jax.random.split(jax.random.key(0), 500)).mean(0)
    assert (means["importance"] > means["bound"]).all()


def test_rules_are_values():
    assert ppd.Bound(jax.random.key(0)) == ppd.Bound(jax.random.key(0))
    assert hash(ppd.Importance(jax.random.key(0), 4)) == hash(ppd.Importance(jax.random.key(0), 4))
    assert ppd.Bound(jax.random.key(0)) != ppd.Bound(jax.random.key(1))
    assert ppd.Importance(jax.random.key(0), 4) != ppd.Importance(jax.random.key(0), 5)


@pytest.mark.slow
def test_a_rule_lets_nuts_run():
    """With a rule the user has asked for an estimate by name, and NUTS is theirs to use."""
    prior = PRIORS["gaussian"](log_prob=ppd.Bound(jax.random.key(0)))
    mcmc = MCMC(NUTS(users_model, max_tree_depth=2), num_warmup=3, num_samples=2, progress_bar=False)
    mcmc.run(jax.random.key(0), prior, 1, y=jnp.zeros(1))
    assert mcmc.get_samples()["x"].shape == (2, 1, 2)


# --- context -------------------------------------------------------------------------------------------------------


def test_context_gives_the_batch_shape():
    diffusion, params = DIFFUSIONS["labels"], PARAMS["labels"]
    grid = jnp.broadcast_to(LABELS, (2, 3, 3))
    for context, batch in ((LABELS[0], ()), (LABELS, (3,)), (LABELS[:1], (1,)), (grid, (2, 3))):
        prior = diffusion.prior(params, context=context)
        assert prior.batch_shape == batch
        assert jax.eval_shape(prior.sample, jax.random.key(0)).shape == (*batch, 2)
    bound = ppd.lower_bound(jax.random.key(0), diffusion.prior(params, context=LABELS), jnp.ones((3, 2)), num_samples=2)
    alone = ppd.lower_bound(
        jax.random.key(0), diffusion.prior(params, context=LABELS[1]), jnp.ones((3, 2)), num_samples=2
    )
    assert bound.value.shape == alone.value.shape == (3,)
    np.testing.assert_allclose(bound.value[1], alone.value[1], rtol=1e-5)  # the same label, and the same noise
    assert (np.abs(bound.value - alone.value)[np.array([0, 2])] > 1e-4).all()
    with pytest.raises(ValueError, match="x has batch shape"):
        ppd.lower_bound(jax.random.key(0), diffusion.prior(params, context=LABELS), jnp.ones((2, 2)))
    with pytest.raises(Exception):  # noqa: B017  the network's own complaint: a label of the wrong width
        diffusion.prior(params, context=jnp.ones(5))


def test_samples_follow_their_context():
    prior = PRIORS["labels"]()
    x = prior.sample(jax.random.key(0), (2,))
    one = DIFFUSIONS["labels"].prior(PARAMS["labels"], context=LABELS[::-1]).sample(jax.random.key(0), (2,))
    assert not np.allclose(x[:, 0], one[:, 0]) and not np.allclose(x[:, 2], one[:, 2])
    np.testing.assert_allclose(x[:, 1], one[:, 1], rtol=1e-5)  # the middle label is the same


# --- a value among others ------------------------------------------------------------------------------------------


@over
def test_copies_are_equal(name):
    import copy
    import pickle

    prior = PRIORS[name]()
    assert copy.copy(prior) == copy.deepcopy(prior) == prior and hash(copy.deepcopy(prior)) == hash(prior)
    assert prior != prior.with_log_prob(ppd.Bound(jax.random.key(0))) and prior != 3
    if name == "mlp":
        assert pickle.loads(pickle.dumps(prior)) == prior


def test_moments_say_how_to_estimate_them():
    prior = PRIORS["gaussian"]()
    for name, method in (("mean", "mean"), ("variance", "var")):
        with pytest.raises(NotImplementedError, match=rf"a DiffusionPrior's {name} .*prior.sample\(.*\).{method}\(0\)"):
            getattr(prior, name)


def test_a_prior_made_of_another():
    prior = PRIORS["mlp"]()
    short = prior.shortened(2)
    assert short == DIFFUSIONS["mlp"].prior(PARAMS["mlp"], num_timesteps=2)
    rule = ppd.Bound(jax.random.key(0))
    assert prior.with_log_prob(rule) == DIFFUSIONS["mlp"].prior(PARAMS["mlp"], log_prob=rule)


def test_a_model_with_a_prior_is_drawn():
    """``render_model`` asks what log densities depend on, and for no value: with a rule for it and without."""
    pytest.importorskip("graphviz")
    for rule in (None, ppd.Bound(jax.random.key(0))):
        prior = PRIORS["mlp"](log_prob=rule)
        graph = numpyro.render_model(users_model, (prior, 3, jnp.zeros(3)), render_distributions=True)
        assert "x ~ DiffusionPrior" in graph.source
        assert {"x -> y", "scale -> y"} <= {line.strip() for line in graph.source.splitlines()}


def test_the_graph_has_what_a_context_depends_on():
    def model():
        z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.sample("x", PRIORS["one label"]().with_context(z))

    relations = get_model_relations(model)
    assert relations["sample_sample"] == {"z": [], "x": ["z"]}


@pytest.mark.parametrize("use", [lambda f, x: f(x), lambda f, x: jax.jit(f)(x), lambda f, x: jax.grad(f)(x),
                                 lambda f, x: jax.vmap(f)(x[None])])  # fmt: skip
def test_no_program_computes_a_density_that_there_is_not(use):
    with pytest.raises(NotImplementedError, match=r"(?s)diffusion.flow.*SMC.*TrajectoryReparam"):
        use(PRIORS["mlp"]().log_prob, jnp.zeros(2))
