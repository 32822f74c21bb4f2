"""The noise of a trajectory in the place of a prior's site: the map against NumPy, posteriors against exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pp_diffusion as ppd
from tests.exact.oracles import Z, enable_x64, z_score

NUM_STEPS = 20
REPARAM = {"x": ppd.TrajectoryReparam()}


def standard_normal(num_steps=NUM_STEPS, event_shape=(1,), **kwargs):
    """The exact reverse process of N(0, 1)."""
    return ppd.Diffusion(
        ppd.GaussianKernel(event_shape), ppd.FixedSchedule.constant_erasure(num_steps), _zeros, **kwargs
    ).prior({})


def _zeros(x_t, t):
    return 0 * x_t, 0 * x_t


class Linear:
    """x_{t-1} ~ N(A_t x_t + b_t, diag(v_t)): correlated, with nothing that a reversed order would leave as it is."""

    def __init__(self, num_steps=5):
        i = np.arange(1, num_steps + 1)[:, None, None] / num_steps
        self.gain = np.array([[0.9, 0.3], [-0.2, 0.7]]) + i * np.array([[-0.3, 0.1], [0.5, 0.2]])
        self.offset = np.array([0.6, -0.4]) * np.linspace(1, -0.5, num_steps)[:, None]
        self.variance = np.array([0.2, 0.4]) * np.linspace(0.3, 1.4, num_steps)[:, None]
        self.num_steps = num_steps

    def network(self, x_t, t):
        gain, offset, variance = (jnp.asarray(a, x_t.dtype)[t - 1] for a in (self.gain, self.offset, self.variance))
        return (gain @ x_t[..., None])[..., 0] + offset, jnp.broadcast_to(variance, x_t.shape)

    def prior(self, **kwargs):
        schedule = ppd.FixedSchedule(np.linspace(0.1, 0.6, self.num_steps))
        kwargs = {"last_step": "network", **kwargs}
        return ppd.Diffusion(
            ppd.GaussianKernel((2,)), schedule, self.network, parameterization="direct", **kwargs
        ).prior({})

    def from_noise(self, noise):
        """Entry t of the noise belongs to x_t."""
        x = noise[-1]
        for t in range(self.num_steps, 0, -1):
            x = self.gain[t - 1] @ x + self.offset[t - 1] + np.sqrt(self.variance[t - 1]) * noise[t - 1]
        return x

    def moments(self):
        mean, cov = np.zeros(2), np.eye(2)
        for t in range(self.num_steps, 0, -1):
            gain = self.gain[t - 1]
            mean, cov = gain @ mean + self.offset[t - 1], gain @ cov @ gain.T + np.diag(self.variance[t - 1])
        return mean, cov


LINEAR = Linear()


def one_site(prior, y=None, scale=1.0):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def sites(model, *args, data=None, **kwargs):
    """The trace under the strategy, with the noise given or drawn."""
    model = handlers.seed(handlers.reparam(model, config=REPARAM), 0)
    return handlers.trace(handlers.substitute(model, data or {})).get_trace(*args, **kwargs)


def run_nuts(model, *args, num_warmup=300, num_samples=1500, num_chains=1, seed=0, **kwargs):
    kernel = NUTS(handlers.reparam(model, config=REPARAM))
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), *args, extra_fields=("~z.x_noise",), **kwargs)
    return mcmc


def mcmc_z_score(chains, truth):
    """How many standard errors, by the effective sample size, the mean over chains and draws is from the truth."""
    chains = np.asarray(chains, dtype=np.float64)
    error = chains.std((0, 1)) / np.sqrt(effective_sample_size(chains))
    return (chains.mean((0, 1)) - truth) / error


# --- the map from noise to x ---------------------------------------------------------------------------------------


def test_each_step_has_its_own_noise():
    noise = np.random.default_rng(0).standard_normal((LINEAR.num_steps + 1, 2))
    x = sites(one_site, LINEAR.prior(), data={"x_noise": jnp.asarray(noise, float)})["x"]
    assert x["type"] == "deterministic"
    np.testing.assert_allclose(x["value"], LINEAR.from_noise(noise), rtol=1e-5)
    reversed_time = LINEAR.from_noise(noise[::-1])
    assert np.abs(x["value"] - reversed_time).max() > 0.1


def test_last_step_by_the_kernel():
    prior = LINEAR.prior(last_step="kernel")
    noise = np.random.default_rng(1).standard_normal((LINEAR.num_steps + 1, 2))
    x = sites(one_site, prior, data={"x_noise": jnp.asarray(noise, float)})["x"]["value"]
    chain = Linear()
    chain.gain[0], chain.offset[0], chain.variance[0] = np.sqrt(0.9) * np.eye(2), 0, 0.1  # beta_1 = 0.1
    np.testing.assert_allclose(x, chain.from_noise(noise), rtol=1e-5)


def test_in_data_units():
    transform = ComposeTransform([AffineTransform(jnp.array([0.5, -1.0]), jnp.array([0.5, 0.3])), ExpTransform()])
    noise = np.random.default_rng(2).standard_normal((LINEAR.num_steps + 1, 2))
    x = sites(one_site, LINEAR.prior(transform=transform), data={"x_noise": jnp.asarray(noise, float)})["x"]["value"]
    np.testing.assert_allclose(x, np.exp([0.5, -1.0] + np.array([0.5, 0.3]) * LINEAR.from_noise(noise)), rtol=1e-5)


def test_one_step():
    prior = ppd.Diffusion(ppd.GaussianKernel((1,)), ppd.FixedSchedule([0.19]), _zeros).prior({})
    x = sites(one_site, prior, data={"x_noise": jnp.array([[2.0], [1.0]])})["x"]["value"]
    np.testing.assert_allclose(x, [0.9 + 2 * np.sqrt(0.19)], rtol=1e-6)


def test_equal_in_law_to_the_prior():
    prior, num = LINEAR.prior(), 20_000
    mean, cov = LINEAR.moments()
    draws = [
        prior.sample(jax.random.key(3), (num,)),
        sites(lambda: numpyro.sample("x", prior.expand([num])))["x"]["value"],
    ]
    for x in draws:
        x = np.asarray(x, dtype=np.float64)
        products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
        assert np.abs(z_score(x, mean)).max() < Z
        assert np.abs(z_score(products, cov)).max() < Z


def test_noise_is_standard_normal():
    noise = sites(one_site, LINEAR.prior())["x_noise"]
    np.testing.assert_allclose(
        noise["fn"].log_prob(noise["value"]), dist.Normal().log_prob(noise["value"]).sum(), rtol=1e-6
    )


def test_memory_of_the_gradient_holds_no_networks():
    """A step's hidden layer, 1000 numbers, is run again and not stored for all steps."""

    def wide(x_t, t):
        hidden = jnp.tanh(x_t * jnp.arange(1000.0))
        return hidden.mean(-1, keepdims=True), 0 * x_t

    prior = ppd.Diffusion(ppd.GaussianKernel((1,)), ppd.FixedSchedule.constant_erasure(50), wide).prior({})

    def potential(noise):
        return sites(one_site, prior, data={"x_noise": noise})["x"]["value"].sum()

    program = jax.jit(jax.grad(potential)).lower(jnp.zeros((51, 1))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 50 * 1000 * 4 / 2


# --- wrappers, plates, context -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "noise_batch", "event_shape"),
    [
        (lambda p: p, (), (2,)),
        (lambda p: p.expand([3]), (3,), (2,)),
        (lambda p: p.expand([3]).to_event(1), (), (3, 2)),
        (lambda p: p.expand([4, 3]).to_event(1), (4,), (3, 2)),
        (lambda p: p.expand([3]).to_event(1).expand((4,)), (4,), (3, 2)),
        (lambda p: p.expand([3]).expand([4, 3]).to_event(2), (), (4, 3, 2)),
    ],
)
def test_expand_and_to_event(wrap, noise_batch, event_shape):
    law = wrap(LINEAR.prior())
    trace = sites(lambda: numpyro.sample("x", law))
    noise, x = trace["x_noise"], trace["x"]["value"]
    assert x.shape == law.shape() == (*noise_batch, *event_shape)
    assert noise["fn"].batch_shape == noise_batch
    assert noise["value"].shape == (*noise_batch, *event_shape[:-1], LINEAR.num_steps + 1, 2)
    rows = np.asarray(noise["value"]).reshape(-1, LINEAR.num_steps + 1, 2)
    np.testing.assert_allclose(x.reshape(-1, 2), [LINEAR.from_noise(row) for row in rows], rtol=2e-5, atol=1e-5)


def test_plates():
    def model():
        with numpyro.plate("outer", 4, dim=-2), numpyro.plate("inner", 3, dim=-1):
            numpyro.sample("x", LINEAR.prior())

    trace = sites(model)
    assert trace["x"]["value"].shape == (4, 3, 2)
    assert trace["x_noise"]["value"].shape == (4, 3, LINEAR.num_steps + 1, 2)
    assert trace["x_noise"]["fn"].batch_shape == (4, 3)
    with handlers.reparam(config=REPARAM), numpyro.plate("rows", 3):
        x = handlers.seed(lambda: numpyro.sample("x", LINEAR.prior()), 0)()
    assert x.shape == (3, 2)


def network_with_context(x_t, t, context):
    """Steps that keep N(0, 1), and the last adds the context: x_0 ~ N(context, 1)."""
    return 0.5 * x_t + jnp.where(t[..., None] == 1, context, 0.0), jnp.full_like(x_t, 0.75)


def shifted_prior(loc):
    schedule = ppd.FixedSchedule.constant_erasure(4)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((1,)), schedule, network_with_context, parameterization="direct", last_step="network"
    )
    return diffusion.prior({}, context=loc, context_event_dim=1)


def context_model(y=None):
    loc = numpyro.sample("loc", dist.Normal(jnp.zeros(1), 2.0).to_event(1))
    x = numpyro.sample("x", shifted_prior(loc))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def test_context_that_is_a_latent():
    for loc in (3.0, -1.0):
        trace = sites(context_model, data={"loc": jnp.array([loc]), "x_noise": jnp.zeros((5, 1))})
        np.testing.assert_allclose(trace["x"]["value"], [loc], rtol=1e-6)


def test_context_gives_the_batch_shape():
    prior = shifted_prior(jnp.zeros((3, 1)))
    for law, shape in ((prior, (3, 1)), (prior.expand((2, 3)), (2, 3, 1)), (prior.to_event(1), (3, 1))):
        assert sites(lambda d=law: numpyro.sample("x", d))["x"]["value"].shape == shape


# --- posteriors ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nuts_on_the_conjugate_case():
    """p = N(0, 1) and r = N(2; x, 1): the posterior is N(1, 0.5)."""
    mcmc = run_nuts(one_site, standard_normal(), y=jnp.array([2.0]), num_chains=2)
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(draws) == {"x"} and draws["x"].shape == (2, 1500, 1)  # the noise is not among the draws
    x = draws["x"][..., 0]
    assert abs(mcmc_z_score(x, 1.0)) < Z
    assert abs(mcmc_z_score((x - 1.0) ** 2, 0.5)) < Z
    assert effective_sample_size(np.asarray(x)) > 300  # so that 4.5 errors are at most 0.2


@pytest.mark.slow
def test_nuts_on_a_correlated_prior():
    mean, cov = LINEAR.moments()
    y, scale = np.array([1.5, -0.5]), 0.7
    gain = cov @ np.linalg.inv(cov + scale**2 * np.eye(2))
    posterior_mean, posterior_cov = mean + gain @ (y - mean), cov - gain @ cov
    mcmc = run_nuts(one_site, LINEAR.prior(), y=jnp.asarray(y, float), scale=scale)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], dtype=np.float64)
    residual = x - posterior_mean
    assert np.abs(mcmc_z_score(x, posterior_mean)).max() < Z
    assert (
        np.abs(
            mcmc_z_score(residual[..., [0, 1, 0]] * residual[..., [0, 1, 1]], posterior_cov[[0, 1, 0], [0, 1, 1]])
        ).max()
        < Z
    )


@pytest.mark.slow
def test_nuts_with_other_latents_and_data_units():
    """x = 3 + 2z, y_i ~ N(loc + x, 1) for three i: jointly Gaussian, and so exact."""
    prior, y = standard_normal(transform=AffineTransform(3.0, 2.0)), np.array([4.0, 5.5, 4.3])

    def model(y=None):
        loc = numpyro.sample("loc", dist.Normal(-1.0, 0.5))
        x = numpyro.sample("x", prior)
        with numpyro.plate("data", 3):
            numpyro.sample("y", dist.Normal(loc + x[0], 1.0), obs=y)

    cov, design = np.diag([0.25, 4.0]), np.ones((3, 2))
    posterior_cov = np.linalg.inv(np.linalg.inv(cov) + design.T @ design)
    posterior_mean = posterior_cov @ (np.linalg.inv(cov) @ [-1.0, 3.0] + design.T @ y)
    draws = run_nuts(model, y=jnp.asarray(y, float)).get_samples(group_by_chain=True)
    assert set(draws) == {"loc", "x"}
    both = np.stack([draws["loc"], draws["x"][..., 0]], -1)
    assert np.abs(mcmc_z_score(both, posterior_mean)).max() < Z
    assert np.abs(mcmc_z_score((both - posterior_mean) ** 2, np.diag(posterior_cov))).max() < Z
    draws = {name: a.reshape(-1, *a.shape[2:]) for name, a in draws.items()}
    again = Predictive(model, draws, parallel=True)(jax.random.key(1))
    residual = np.asarray(again["y"]) - np.asarray(both.reshape(-1, 2).sum(-1))[:, None]
    assert abs(z_score(residual.reshape(-1) ** 2, 1.0)) < Z  # about the x that was drawn, not about a new one
    likelihood = log_likelihood(model, draws, y=jnp.asarray(y, float))["y"]
    np.testing.assert_allclose(likelihood, dist.Normal(both.reshape(-1, 2).sum(-1)[:, None]).log_prob(y), rtol=1e-4)


@pytest.mark.slow
def test_svi():
    """The posterior of the noise is Gaussian, so that a full Gaussian guide reaches the evidence N(2; 0, 2)."""
    import optax

    model = handlers.reparam(one_site, config=REPARAM)
    prior, y = standard_normal(8), jnp.array([2.0])
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(0.05, 1000)), Trace_ELBO(num_particles=4))
    result = svi.run(jax.random.key(0), 1000, prior, y=y, progress_bar=False)
    predictive = Predictive(model, guide=guide, params=result.params, num_samples=4000, parallel=True)
    x = np.asarray(predictive(jax.random.key(1), prior)["x"])[:, 0]
    # 4000 draws have errors 0.011 in both; the rest is for the optimiser
    assert abs(x.mean() - 1.0) < 0.1 and abs(x.var() - 0.5) < 0.1
    elbo, log_evidence = -np.mean(result.losses[-200:]), dist.Normal(0.0, np.sqrt(2)).log_prob(2.0)
    assert abs(elbo - log_evidence) < 0.05


@pytest.mark.slow
def test_svi_in_a_plate():
    """With a factorised guide: per row the same, and a bound."""
    import optax

    def model(y):
        with numpyro.plate("rows", 2):
            x = numpyro.sample("x", standard_normal(4))
            numpyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)

    model, y = handlers.reparam(model, config=REPARAM), jnp.array([2.0, -1.0])
    svi = SVI(model, AutoNormal(model), optax.adam(0.02), Trace_ELBO(num_particles=4))
    result = svi.run(jax.random.key(0), 500, y, progress_bar=False)
    log_evidence = dist.Normal(0.0, np.sqrt(2)).log_prob(y).sum()
    assert log_evidence - 1 < -np.mean(result.losses[-100:]) < log_evidence + 0.05


def test_predictive_draws_the_prior():
    model = handlers.reparam(one_site, config=REPARAM)
    x = Predictive(model, num_samples=2000, parallel=True)(jax.random.key(0), LINEAR.prior())["x"]
    assert np.abs(z_score(x, LINEAR.moments()[0])).max() < Z


@pytest.mark.slow
def test_nuts_with_a_context_that_is_a_latent():
    """loc ~ N(0, 4), x ~ N(loc, 1), y = 3 ~ N(x, 1)."""
    draws = run_nuts(context_model, y=jnp.array([3.0])).get_samples(group_by_chain=True)
    assert set(draws) == {"loc", "x"}
    loc, x = draws["loc"][..., 0], draws["x"][..., 0]
    assert max(abs(mcmc_z_score(loc, 2.0)), abs(mcmc_z_score(x, 2.5))) < Z
    assert abs(mcmc_z_score((loc - 2.0) * (x - 2.5), 4 - 20 / 6)) < Z


def test_x64():
    with enable_x64():
        trace = sites(one_site, LINEAR.prior())
        assert trace["x_noise"]["value"].dtype == trace["x"]["value"].dtype == jnp.float64
        x = LINEAR.from_noise(np.asarray(trace["x_noise"]["value"]))
        np.testing.assert_allclose(trace["x"]["value"], x, rtol=1e-12)


# --- refused -------------------------------------------------------------------------------------------------------


def _with(wrap):
    return lambda: wrap(lambda: numpyro.sample("x", LINEAR.prior()))()


def _subsampled():
    with numpyro.plate("rows", 10, subsample_size=2):
        numpyro.sample("x", LINEAR.prior())


bits = ppd.Diffusion(ppd.BinomialKernel((2,)), ppd.FixedSchedule([0.1, 0.4]), lambda x_t, t: x_t).prior({})
mask = jnp.array([True, False, True])


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda: numpyro.sample("x", LINEAR.prior(), obs=jnp.zeros(2)), ValueError, "'x' is observed"),
        (lambda: numpyro.sample("x", bits), ValueError, r"'x'.*BinomialKernel.*SMC"),
        (lambda: numpyro.sample("x", bits.expand([3]).to_event(1)), ValueError, r"'x'.*BinomialKernel.*SMC"),
        (lambda: numpyro.sample("x", dist.Normal(0, 1)), TypeError, r"DiffusionPrior at site 'x'.*got a Normal"),
        (lambda: numpyro.sample("x", LINEAR.prior().expand([3]).mask(mask)), ValueError, "'x' is masked"),
        (lambda: numpyro.sample("x", LINEAR.prior().mask(False).expand([3])), ValueError, "'x' is masked"),
        (_with(lambda f: handlers.mask(f, mask=False)), ValueError, "'x' is masked"),
        (_with(lambda f: handlers.scale(f, scale=0.5)), ValueError, "'x' is scaled"),
        (_subsampled, ValueError, r"'x' is scaled.*subsampled plate"),
        (_with(lambda f: handlers.substitute(f, {"x": jnp.zeros(2)})), ValueError, "'x' is observed"),
    ],
)
def test_refused_by_name(model, error, match):
    with pytest.raises(error, match=match):
        sites(model)


def test_refused_outside_the_strategy():
    for handler in (lambda f: handlers.mask(f, mask=jnp.array(True)), lambda f: handlers.scale(f, scale=2.0)):
        with pytest.raises(ValueError, match=r"'x' is (masked|scaled)"):
            handlers.seed(handler(handlers.reparam(one_site, config=REPARAM)), 0)(LINEAR.prior())


def test_draws_without_their_noise():
    """What MCMC gives without the noise leads to the right replications, also with the reparameterised model."""
    model = handlers.reparam(one_site, config=REPARAM)
    prior = standard_normal(5)
    x = jnp.array([[3.0], [-2.0], [0.5]])
    again = Predictive(model, {"x": x}, return_sites=["x", "y"])(jax.random.key(0), prior, scale=1e-3)
    np.testing.assert_array_equal(again["x"], x)
    np.testing.assert_allclose(again["y"], x, atol=0.01)
    likelihood = log_likelihood(model, {"x": x}, prior, jnp.zeros(1))["y"]
    np.testing.assert_allclose(likelihood, dist.Normal(x[:, 0]).log_prob(0.0), rtol=1e-5)
    noise = jax.random.normal(jax.random.key(1), (3, 6, 1))  # where there is noise, it counts
    with_noise = Predictive(model, {"x": x, "x_noise": noise}, return_sites=["x"])(jax.random.key(0), prior)["x"]
    only_noise = Predictive(model, {"x_noise": noise}, return_sites=["x"])(jax.random.key(0), prior)["x"]
    np.testing.assert_array_equal(with_noise, only_noise)


def test_draws_without_their_noise_in_plates_and_scopes():
    def model(y=None):
        with numpyro.plate("rows", 2):
            x = numpyro.sample("x", standard_normal(5))
            numpyro.sample("y", dist.Normal(x, 1e-3).to_event(1), obs=y)

    x = jnp.array([[[3.0], [-2.0]], [[0.5], [1.0]]])
    again = Predictive(handlers.reparam(model, config=REPARAM), {"x": x})(jax.random.key(0))["y"]
    np.testing.assert_allclose(again, x, atol=0.01)
    scoped = handlers.scope(handlers.reparam(model, config=REPARAM), prefix="a")
    again = Predictive(scoped, {"a/x": x})(jax.random.key(0))["a/y"]
    np.testing.assert_allclose(again, x, atol=0.01)
