"""Amortised posteriors: what is simulated, what is given back, and what is refused."""

import warnings

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pp_diffusion as ppd

KEY = jax.random.key(0)


def model(n=3, y=None, z=None):
    x = numpyro.sample("x", dist.Normal(0, 1))
    s = numpyro.sample("s", dist.HalfNormal(1))
    with numpyro.plate("rows", n):
        numpyro.sample("y", dist.Normal(x, s), obs=y)
    numpyro.sample("z", dist.Poisson(jnp.exp(x)), obs=z)


def train(model=model, **settings):
    settings = {"observed": ("y", "z"), "num_steps": 2, "num_simulations": 200, "progress_bar": False, **settings}
    return ppd.amortize(KEY, model, **settings)


@pytest.fixture(scope="module")
def amortized():
    return train()


DATA = {"y": jnp.array([0.1, 0.5, -0.3]), "z": 2}


@pytest.fixture(scope="module")
def smc(amortized):
    smc = amortized.smc(num_particles=300, num_chains=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppd.CollapseWarning)
        smc.run(KEY, **DATA)
    return smc


@pytest.mark.slow
def test_latents_are_one_vector_and_sites_a_context(amortized):
    latents, context = amortized.simulator.batch(KEY, 5)
    assert latents.shape == (5, 2) and {n: a.shape for n, a in context.items()} == {"y": (5, 3), "z": (5, 1)}
    assert amortized.fit.prior({"y": jnp.zeros(3), "z": jnp.zeros(1)}).event_shape == (2,)


@pytest.mark.slow
def test_pairs_are_those_of_the_model(amortized):
    """Means and the dependence of what is observed on the latents."""
    latents, context = amortized.simulator.batch(KEY, 20_000)
    assert abs(latents[:, 0].std() - 1) < 0.03 and abs(jnp.exp(latents[:, 1]).mean() - np.sqrt(2 / np.pi)) < 0.03
    off = (context["y"].mean(1) - latents[:, 0]) / (jnp.exp(latents[:, 1]) / np.sqrt(3))
    assert abs(off.mean()) < 0.03 and abs(off.std() - 1) < 0.03
    assert np.corrcoef(context["z"][:, 0], np.exp(latents[:, 0]))[0, 1] > 0.8


@pytest.mark.slow
def test_a_summary_is_the_context(amortized):
    """Of the sites in their own shapes; it moves no answer's target."""
    own = train(summary=lambda sites: jnp.stack([sites["y"].mean(), 1.0 * sites["z"]]))
    assert own.simulator.batch(KEY, 4)[1].shape == (4, 2)
    assert own.sample(KEY, 3, **DATA)["x"].shape == (3,)


@pytest.mark.slow
def test_simulations_without_end():
    endless = train(num_simulations=None, batch_size=16)
    assert len(endless.fit.validation.values) == 1 and np.isfinite(endless.fit.losses).all()


@pytest.mark.slow
def test_all_that_a_sampler_gives(smc, capsys):
    draws, chains = smc.get_samples(), smc.get_samples(group_by_chain=True)
    assert draws["x"].shape == (600,) and chains["s"].shape == (2, 300) and (draws["s"] > 0).all()
    assert smc.log_evidences.shape == (2,) and np.isnan(smc.log_evidence_error) and 0 < smc.effective_share <= 1
    smc.print_summary()
    out = capsys.readouterr().out
    assert "300 particles in 2 chains, 30 of each drawn from the prior; effective:" in out and "log evidence" in out
    groups = smc.to_arviz()
    assert groups["posterior"]["x"].shape == (2, 300) and "z" in groups["log_likelihood"]
    assert arviz.summary(groups).shape[0] == 2
    np.testing.assert_array_equal(smc.observed_values["y"], DATA["y"])


@pytest.mark.slow
def test_uncorrected_draws_are_in_the_sites_units(amortized):
    draws = amortized.sample(KEY, 7, **DATA)
    assert draws["x"].shape == (7,) and (draws["s"] > 0).all()


@pytest.mark.slow
def test_its_evidence_compares_with_others(smc):
    def other(y, z):
        numpyro.sample("y", dist.Normal(0, 1).expand([3]).to_event(1), obs=y)
        numpyro.sample("z", dist.Poisson(jnp.exp(numpyro.sample("x", dist.Normal(0, 1)))), obs=z)

    tempered = ppd.TemperedSMC(other, num_particles=100, num_chains=2)
    tempered.run(KEY, **DATA)
    compared = ppd.compare_evidence({"own": smc, "other": tempered}) if smc.verdict != "collapsed" else None
    assert compared is None or np.isfinite(compared.log_bayes_factor).all()


def test_a_fit_on_disk_serves_again(amortized, tmp_path):
    amortized.fit.save(tmp_path / "a.fit")
    again = ppd.Amortized(ppd.load_fit(tmp_path / "a.fit"), amortized.simulator)
    np.testing.assert_array_equal(again.sample(KEY, 3, **DATA)["x"], amortized.sample(KEY, 3, **DATA)["x"])


@pytest.mark.slow
def test_a_model_of_ones_own_size():
    other = train(kwargs={"n": 2})
    assert other.simulator.batch(KEY, 4)[1]["y"].shape == (4, 2)
    with pytest.raises(ValueError, match="context must have shape"):
        other.smc().run(KEY, **DATA)


def discrete(y=None):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1), obs=y)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda a: train(observed="w"), ValueError, "observed must name sample sites of the model; it has no 'w'"),
        (lambda a: train(kwargs=DATA), ValueError, "observed site 'y' has its data already"),
        (lambda a: train(discrete, observed="y"), ValueError, "site 'k' is discrete"),
        (lambda a: train(observed=("x", "s", "y", "z")), ValueError, "the model has no latent site"),
        (lambda a: train(num_simulations=0), ValueError, "num_simulations must be an integer >= 1"),
        (lambda a: ppd.amortize(KEY, 3, observed="y"), TypeError, "model must be a NumPyro model"),
        (lambda a: ppd.amortize(0, model, observed="y"), TypeError, "rng_key must be a JAX random key"),
        (lambda a: a.smc(prior_share=1.0), ValueError, r"prior_share must be in \[0, 1\)"),
        (lambda a: a.smc(num_particles=0), ValueError, "num_particles must be an integer >= 1"),
        (lambda a: a.smc().log_evidence, RuntimeError, "AmortizedSMC has no results yet"),
        (lambda a: a.smc().run(KEY, y=DATA["y"]), ValueError, "discrete"),
        (lambda a: a.smc().run(KEY, z=2), ValueError, r"All of \('y', 'z'\) must be observed"),
    ],
)
def test_refusals(amortized, call, error, match):
    with pytest.raises(error, match=match):
        call(amortized)
