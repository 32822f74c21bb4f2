"""Stock networks, and the adapter that takes networks of any make."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pp_diffusion as ppd
from pp_diffusion.reverse import Network

T = 4
SCHEDULE = ppd.FixedSchedule.log_linear(T, first_beta=0.01)
STOCK = {
    "mlp_shared": ppd.networks.MLP((5,)),
    "mlp_per_step": ppd.networks.MLP((5,), readout="per_step"),
    "mlp_bumps": ppd.networks.MLP((5,), readout="bumps"),
    "mlp_frequencies": ppd.networks.MLP((5, 4), num_frequencies=2, activation="tanh"),
    "rbf_per_step": ppd.networks.RBF(3),
    "entrywise": ppd.networks.Entrywise((5,), num_features=2, entry_units=(4, 3)),
    "rbf_bumps": ppd.networks.RBF(3, readout="bumps"),
}
LABELS = jax.nn.one_hot(jnp.array([0, 2, 1]), 3)


def make(network, event_shape=(2,), **settings):
    return ppd.Diffusion(ppd.GaussianKernel(event_shape), SCHEDULE, network, **settings)


def call(diffusion, params, x_t, t, context=None):
    return diffusion.network(params.get(diffusion.network_site, {}), x_t, t, SCHEDULE.log_snr()[t - 1], context)


# --- stock networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_stock_networks_learn_their_outputs_and_start_at_zero(name):
    diffusion = make(STOCK[name])
    module = diffusion.network.module
    assert (module.num_timesteps, module.outputs) == (T, ("real", "real"))
    for event_shape, batch, context in (
        ((), (), None),
        ((2,), (3,), None),
        ((2, 3), (2, 3), None),
        ((2,), (3,), LABELS),
    ):
        other = make(STOCK[name], event_shape)

        def run(key, other=other, batch=batch, context=context):
            params = other.init_params(key, context, 0 if context is None else 1)
            x_t = jnp.ones((*batch, *other.event_shape))
            return params, call(other, params, x_t, jnp.full(batch, T), context)

        params, outputs = jax.eval_shape(run, jax.random.key(0))
        assert set(params) == {"diffusion.network$params"}
        assert [out.shape for out in outputs] == [batch + event_shape] * 2
    x_t, t = jax.random.normal(jax.random.key(1), (3, 2)), jnp.array([1, 2, T])
    params = jax.jit(diffusion.init_params)(jax.random.key(0))
    for out in jax.jit(lambda p: call(diffusion, p, x_t, t))(params):
        np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("name", ["mlp_shared", "mlp_per_step", "mlp_bumps", "entrywise"])
def test_every_network_depends_on_time_and_rows_do_not_mix(name):
    diffusion = make(STOCK[name])
    params = jax.jit(diffusion.init_params)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = structure.unflatten([jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])
    x_t = jnp.broadcast_to(jnp.array([0.3, -1.2]), (T, 2))
    run = jax.jit(lambda x, t: call(diffusion, params, x, t)[0])
    out = run(x_t, jnp.arange(1, T + 1))
    assert (np.abs(np.diff(out, axis=0)).max(1) > 1e-4).all()
    np.testing.assert_allclose(run(x_t[::-1], jnp.arange(1, T + 1)[::-1]), out[::-1], rtol=1e-5)
    changed = run(x_t.at[0].set(5.0), jnp.arange(1, T + 1))
    np.testing.assert_allclose(changed[1:], out[1:], rtol=1e-5)
    assert np.abs(changed[0] - out[0]).max() > 1e-4


@pytest.mark.parametrize("name", ["mlp_shared", "entrywise"])
def test_context_reaches_a_stock_network(name):
    diffusion = make(STOCK[name])
    params = jax.jit(lambda k: diffusion.init_params(k, LABELS, 1))(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jnp.arange(1.0, a.size + 1).reshape(a.shape), params)
    run = jax.jit(lambda c: call(diffusion, params, jnp.ones((3, 2)), jnp.full(3, 2), c)[0])
    out = run(LABELS)
    np.testing.assert_allclose(run(LABELS[::-1]), out[::-1], rtol=1e-5)
    assert np.abs(out[0] - out[1]).max() > 0


@pytest.mark.slow
def test_an_entry_reads_itself_and_is_told_of_the_others():
    """With nothing told, an output depends on its own entry alone, by the same function for all; told, on all."""
    diffusion = make(ppd.networks.Entrywise((5,)), (2, 2))
    params = jax.jit(diffusion.init_params)(jax.random.key(0))
    (layers,) = params.values()
    (dense,) = (layers["readout"][name] for name in layers["readout"])
    dense["kernel"] = jax.random.normal(jax.random.key(1), dense["kernel"].shape)
    deaf = jax.tree.map(lambda a: a, layers)
    deaf["Dense_1"], deaf["entries"] = jax.tree.map(jnp.zeros_like, (layers["Dense_1"], layers["entries"]))
    x, t = jax.random.normal(jax.random.key(2), (2, 2)), jnp.array(2)

    @jax.jit
    def derivative(layers, x):
        return jax.jacobian(lambda x: call(diffusion, {diffusion.network_site: layers}, x, t)[0])(x).reshape(4, 4)

    own = np.eye(4, dtype=bool)
    assert (derivative(deaf, x)[~own] == 0).all() and (derivative(deaf, x)[own] != 0).all()
    same = derivative(deaf, jnp.full((2, 2), 0.3))[own]
    np.testing.assert_allclose(same, same[0], rtol=1e-5)
    assert (derivative(layers, x)[~own] != 0).all()


def test_stock_networks_refuse_integer_labels_and_unknown_readouts():
    with pytest.raises(ValueError, match=r"context must be floating.*one_hot"):
        make(ppd.networks.MLP((5,))).init_params(jax.random.key(0), jnp.array([0, 1]), 1)
    with pytest.raises(ValueError, match="readout"):
        make(ppd.networks.MLP((5,), readout="fourier")).init_params(jax.random.key(0))
    with pytest.raises(ValueError, match="num_timesteps"):
        ppd.networks.RBF(3).init(jax.random.key(0), jnp.ones((1, 2)), jnp.ones(1, int))


@pytest.mark.parametrize(("parameterization", "links"), [("direct", ("real", "positive")), ("paper", ("real", "real"))])
def test_links_follow_the_parameterization(parameterization, links):
    diffusion = make(ppd.networks.RBF(3), parameterization=parameterization)
    assert diffusion.network.module.outputs == links
    assert ppd.Diffusion(
        ppd.BinomialKernel((2,)), SCHEDULE, ppd.networks.RBF(3), parameterization="direct"
    ).network.module.outputs == ("unit",)


def test_what_the_user_set_is_kept_where_it_fits():
    own = ppd.networks.MLP((5,), num_timesteps=make(ppd.networks.MLP((5,))).num_timesteps)
    assert make(own).network.module.num_timesteps == own.num_timesteps
    with pytest.raises(ValueError, match="network has num_timesteps=9"):
        make(ppd.networks.MLP((5,), num_timesteps=9))


# --- the adapter ---------------------------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x_t, t):
        out = nn.Dense(4)(jnp.concatenate([x_t, t[..., None] / T], -1))
        return out[..., :2], out[..., 2:]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x_t, t):
        out = self.out(jnp.tanh(self.hidden(jnp.concatenate([x_t, t[..., None] / T], -1))))
        return out[..., :2], out[..., 2:]


def closure(scale):
    return lambda x_t, t: (scale * x_t, scale * x_t)


def function(x_t, t):
    return 0.1 * x_t, 0 * x_t


NETWORKS = {
    "linen": Linen(),
    "nnx": Nnx(nnx.Rngs(0)),
    "function": function,
    "closure": closure(0.2),
    "list": lambda x_t, t: [x_t, x_t],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_any_make_sample_and_bound(name):
    diffusion = make(NETWORKS[name])
    params = diffusion.init_params(jax.random.key(0))
    assert set(params) == ({"diffusion.network$params"} if name in ("linen", "nnx") else set())
    prior = diffusion.prior(params)
    x = prior.sample(jax.random.key(1), (5,))
    assert x.shape == (5, 2) and np.isfinite(x).all()
    assert hash(diffusion) == hash(make(NETWORKS[name])) and diffusion == make(NETWORKS[name])


def test_a_closure_keeps_its_own_value():
    x = jnp.ones((2, 2))
    for scale in (0.2, 0.7):
        out = jax.jit(lambda d, x: call(d, {}, x, jnp.ones(2, int))[0], static_argnums=0)(make(closure(scale)), x)
        np.testing.assert_allclose(out, scale, rtol=1e-6)


def test_the_signature_says_what_a_network_is_given():
    for names in (["log_snr"], ["context"], ["context", "log_snr"], ["log_snr=None"], ["*", "context=None"]):
        plain = [n.split("=")[0] for n in names if n != "*"]
        seen = {}
        record = f"seen.update({', '.join(f'{n}={n}' for n in plain)})"
        network = eval(f"lambda x_t, t, {', '.join(names)}: ({record}, (x_t, x_t))[1]", {"seen": seen})
        assert set(Network(network).inputs) == set(plain)
        diffusion = make(network)
        call(diffusion, {}, jnp.ones((3, 2)), jnp.full(3, 2), LABELS)
        assert seen.keys() == set(plain)
        if "context" in seen:
            np.testing.assert_array_equal(seen["context"], LABELS)
        if "log_snr" in seen:
            np.testing.assert_allclose(seen["log_snr"], SCHEDULE.log_snr()[1], rtol=1e-6)

    def takes_any(x_t, t, **kwargs):
        assert set(kwargs) == {"log_snr", "context"}
        return x_t, x_t

    call(make(takes_any), {}, jnp.ones((3, 2)), jnp.full(3, 2), LABELS)
    assert Network(function).inputs == ()


def test_log_snr_is_clipped():
    seen = []
    schedule = ppd.FixedSchedule.from_log_snr([30.0, 0.0, -jnp.inf])
    network = Network(lambda x_t, t, log_snr: (seen.append(log_snr), (x_t, x_t))[1])
    network({}, jnp.ones((3, 2)), jnp.arange(1, 4), schedule.log_snr(), None)
    np.testing.assert_array_equal(seen[0], [20.0, 0.0, -20.0])


def test_the_network_is_not_called_at_the_kernels_last_step():
    seen = []

    def network(x_t, t):
        jax.debug.callback(lambda t: seen.append(int(t[0])), t, ordered=True)
        return 0 * x_t, 0 * x_t

    for last_step, expected in (("kernel", [4, 3, 2]), ("network", [4, 3, 2, 1])):
        seen.clear()
        make(network, last_step=last_step).prior({}).sample(jax.random.key(0), (2,))
        jax.effects_barrier()
        assert seen == expected


class Wrong(nn.Module):
    @nn.compact
    def __call__(self, x_t, t):
        return nn.Dense(2)(x_t)


WRONG = {
    "one output": lambda x_t, t: x_t,
    "three outputs": lambda x_t, t: (x_t, x_t, x_t),
    "flat": lambda x_t, t: (x_t.reshape(-1), x_t.reshape(-1)),
    "summed": lambda x_t, t: (x_t.sum(-1), x_t.sum(-1)),
    "scalar variance": lambda x_t, t: (x_t, 1.0),
    "linen": Wrong(),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_outputs_are_refused_before_anything_compiles(name):
    diffusion = make(WRONG[name])
    params = diffusion.init_params(jax.random.key(0))
    with pytest.raises(ValueError, match=r"network must return 2 array"):
        diffusion.prior(params)
    with pytest.raises(ValueError, match=r"network must return 2 array"):
        ppd.fit(
            jax.random.key(0), diffusion, np.random.default_rng(0).normal(size=(9, 2)), num_steps=1, progress_bar=False
        )


def test_networks_that_are_none():
    with pytest.raises(TypeError, match="network must be a linen module, an nnx module or a callable"):
        make(3)
    with pytest.raises(TypeError, match=r"network must take \(x_t, t\)"):
        make(lambda x_t: x_t)


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x_t, t):
        x = nn.BatchNorm(use_running_average=False)(x_t)
        return x, x


class Dropout(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x_t, t):
        out = self.dropout(self.linear(x_t))
        return out, out


class NnxBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x_t, t):
        return self.norm(x_t), x_t


def test_stateful_modules_are_refused():
    with pytest.raises(ValueError, match=r"network must be stateless; BatchNorm"):
        make(BatchNorm()).init_params(jax.random.key(0))
    for module in (Dropout, NnxBatchNorm):
        with pytest.raises(ValueError, match=rf"network must be stateless; {module.__name__}"):
            make(module(nnx.Rngs(0)))


@pytest.mark.slow
def test_an_nnx_module_trains_and_is_not_changed():
    module = Nnx(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    data = 0.3 + 0.4 * jax.random.normal(jax.random.key(0), (64, 2))
    settings = dict(num_steps=200, batch_size=64, num_times=2, optimizer=optax.adam(1e-2), progress_bar=False)
    fit = ppd.fit(jax.random.key(1), make(module), data, **settings)
    assert fit.losses[-20:].mean() < fit.losses[:5].mean() - 0.15
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    trained = fit.params["diffusion.network$params"]
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), trained, before)
    assert np.isfinite(fit.prior.sample(jax.random.key(2), (3,))).all()
