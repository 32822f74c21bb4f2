"""SMC as a user meets it: results, keys, programs, errors and reports; and that twists move nothing but the variance.

Posteriors and evidences of whole models are in exact/. Models here share programs: new data need no new compilation.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive
from scipy.stats import norm

import pp_diffusion as ppd
from pp_diffusion import smc as smc_module
from pp_diffusion.inference_data import import_arviz, is_first_generation
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.smc import Sampler
from pp_diffusion.twists import as_twist
from tests.compilations import compilations
from tests.exact.oracles import Z, enable_x64, z_score

KEY, Y, SCALE = jax.random.key(0), jnp.array([2.0, -1.0]), jnp.array(1.0)


def zeros(x_t, t):
    return 0 * x_t, 0 * x_t


def standard_normal(event_shape=(2,), num_steps=6, **settings):
    """The exact reverse process of N(0, 1)."""
    schedule = ppd.FixedSchedule.constant_erasure(num_steps)
    return ppd.Diffusion(ppd.GaussianKernel(event_shape), schedule, zeros, **settings).prior({})


PRIOR, SCALAR = standard_normal(), standard_normal(())


def conjugate(y, scale):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def evidence(y, scale=1.0):
    return norm(0, np.sqrt(1 + scale**2)).logpdf(y).sum(-1)


def in_plates(y):
    with numpyro.plate("m", 2, dim=-2), numpyro.plate("n", 3, dim=-1):
        x = numpyro.sample("x", PRIOR)
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + b[..., None], 1.0).to_event(1), obs=y)


def run(model, *args, num_particles=32, num_chains=1, key=KEY, progress_bar=False, twist=None, **kwargs):
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=num_chains, twist=twist, progress_bar=progress_bar)
    smc.run(key, *args, **kwargs)
    return smc


@pytest.fixture(scope="module")
def eight():
    return run(conjugate, Y, SCALE, num_chains=8)


@pytest.fixture(scope="module")
def plates():
    y = jnp.linspace(-1, 1, 12).reshape(2, 3, 2)
    return run(in_plates, y, num_chains=2, num_particles=400), y


# --- results ---------------------------------------------------------------------------------------------------------


def test_shapes(eight):
    assert eight.get_samples().keys() == {"x"}
    assert eight.get_samples()["x"].shape == (8 * 32, 2)
    assert eight.get_samples(group_by_chain=True)["x"].shape == (8, 32, 2)
    assert isinstance(eight.log_evidence, float) and isinstance(eight.log_evidence_error, float)
    assert eight.ess.shape == (7, 8)
    assert eight.twist_rules == {"y": "linearised, normal"}


def test_an_exact_twist_has_constant_weights(eight):
    assert abs(eight.log_evidence - evidence(Y)) < 1e-4 and eight.log_evidence_error < 1e-4
    np.testing.assert_allclose(eight.ess, 32, rtol=1e-4)


@pytest.mark.slow
def test_shapes_in_plates(plates):
    """Systems in the order of the plates' axes, and each with its own evidence."""
    smc, y = plates
    samples, chains = smc.get_samples(), smc.get_samples(group_by_chain=True)
    assert samples["x"].shape == (800, 2, 3, 2) and samples["b"].shape == (800, 2, 3)
    assert chains["x"].shape == (2, 400, 2, 3, 2) and chains["b"].shape == (2, 400, 2, 3)
    assert smc.log_evidence.shape == smc.log_evidence_error.shape == (2, 3) and np.isnan(smc.log_evidence_error).all()
    assert smc.ess.shape == (7, 2, 2, 3)
    exact = dist.MultivariateNormal(jnp.zeros(2), 2 * jnp.eye(2) + 1).log_prob(y)
    np.testing.assert_allclose(smc.log_evidence, exact, atol=0.1)  # sd 0.02; neighbours differ by 0.1 and more
    np.testing.assert_allclose(samples["b"].mean(0), y.sum(-1) / 4, atol=0.2)  # sd .03 for independent draws


@pytest.mark.slow
def test_error_needs_chains():
    assert np.isnan(run(conjugate, Y, SCALE, num_chains=1).log_evidence_error)


def test_same_key_same_result(eight):
    again, other = run(conjugate, Y, SCALE, num_chains=8), run(conjugate, Y, SCALE, num_chains=8, key=jax.random.key(1))
    np.testing.assert_array_equal(again.get_samples()["x"], eight.get_samples()["x"])
    assert again.log_evidence == eight.log_evidence
    assert not np.array_equal(other.get_samples()["x"], eight.get_samples()["x"])


def test_progress_bar_changes_nothing(eight, capfd):
    shown = run(conjugate, Y, SCALE, num_chains=8, progress_bar=True)
    assert "log Z" in capfd.readouterr().err
    assert shown.log_evidence == eight.log_evidence
    np.testing.assert_array_equal(shown.get_samples()["x"], eight.get_samples()["x"])


@pytest.mark.slow
def test_new_data_same_program(eight):
    other = run(conjugate, jnp.array([0.5, 1.0]), scale=SCALE, num_chains=8)  # by name: one more program
    other.get_samples()
    with compilations() as compiled:
        for y in ([1.0, 0.0], [-3.0, 2.0]):
            other.run(KEY, jnp.array(y), scale=SCALE)
            other.get_samples()
            assert abs(other.log_evidence - evidence(np.array(y))) < 1e-3
        same = run(conjugate, jnp.array([3.0, 0.0]), SCALE, num_chains=8)
        assert abs(same.log_evidence - evidence(np.asarray(Y) + 1)) < 1e-3
    assert not compiled


@pytest.mark.slow
def test_pure_functions_give_what_the_facade_gives(eight):
    sampler = Sampler(read_model(conjugate, (Y, SCALE), {}), as_twist(None))
    step, finish = jax.jit(smc_module.step), jax.jit(smc_module.finish)
    state = jax.jit(smc_module.init, static_argnums=(2, 3))(KEY, sampler, 32, 8)
    first, info = step(sampler, state)
    again, _ = step(sampler, state)
    jax.tree.map(
        np.testing.assert_array_equal, first._replace(rng_key=0, twist_key=0), again._replace(rng_key=0, twist_key=0)
    )
    state = first
    while state.t > 1:
        state, info = step(sampler, state)
    assert info.ess.shape == info.resampled.shape == (8, 1)
    state, _, end = finish(sampler, state)
    assert state.t == 0
    np.testing.assert_allclose(
        state.x[:, :, 0], jnp.moveaxis(eight.get_samples(group_by_chain=True)["x"], 0, 1), atol=1e-5
    )
    np.testing.assert_allclose(state.log_evidence, evidence(Y), atol=1e-4)
    np.testing.assert_allclose(end.ess[:, 0], eight.ess[-1], rtol=1e-5)


def test_predictive(eight):
    draws = Predictive(conjugate, eight.get_samples())(KEY, None, SCALE)["y"]
    assert draws.shape == (256, 2)
    mean, std = np.asarray(Y) / 2, np.sqrt(1.5)
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean), 4 * std / np.sqrt(100))


# --- evidence --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def annealed():
    return run(conjugate, Y, SCALE, num_chains=8, twist="annealed")


@pytest.mark.slow
def test_error_covers(annealed):
    """2 errors cover in 95 of 100 runs; over 200, a share outside 0.88…0.995 has odds of 1 in 3 000."""
    covered = []
    for seed in range(200):
        annealed.run(jax.random.key(seed), Y, SCALE)
        covered.append(abs(annealed.log_evidence - evidence(Y)) < 2 * annealed.log_evidence_error)
    assert 0.88 < np.mean(covered) < 0.995


def misled(prediction, log_r):
    """As if the network were wrong about E[x_0 | x_t]."""
    return 0.7 * log_r(0.8 * prediction.x_0 - 0.5)


def anything(prediction, log_r):
    """A positive function that knows nothing of r."""
    return jnp.sin(3 * prediction.x_0).sum(-1)


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("twist", [misled, "constant", *(pytest.param(t, marks=SLOW) for t in (anything, "lookahead"))])
@pytest.mark.filterwarnings("ignore::pp_diffusion.CollapseWarning")
def test_twists_are_unbiased(twist):
    """Z and the moments under it, times Z, whatever the twist: z-scores of 4.5 over independent runs of 8 particles."""
    smc = run(conjugate, Y, SCALE, num_particles=8, num_chains=1500, twist=twist)
    relative = np.exp(smc.log_evidences - evidence(Y))
    x = np.asarray(smc.get_samples(group_by_chain=True)["x"], np.float64)
    mean = np.asarray(Y) / 2
    assert abs(z_score(relative, 1.0)) < Z
    assert (np.abs(z_score(relative[:, None] * x.mean(1), mean)) < Z).all()
    assert (np.abs(z_score(relative[:, None] * (x**2).mean(1), mean**2 + 0.5)) < Z).all()
    assert relative.std() > 0.01  # else there was nothing to be tested


def half_space(y):
    x = numpyro.sample("x", SCALAR)
    numpyro.factor("r", jnp.where(x > y, 0.0, -jnp.inf))


@pytest.mark.slow
@pytest.mark.parametrize("twist", ["lookahead", pytest.param("moment", marks=SLOW)])
def test_zero_likelihood_at_predictions(twist, capsys):
    """Where r of the prediction is zero, particles go on unguided; p(x > 1) and the mean beyond 1 are unbiased."""
    smc = run(half_space, jnp.array(1.0), num_particles=64, num_chains=300, twist=twist)
    relative = np.exp(smc.log_evidences - norm.logsf(1))
    x = np.asarray(smc.get_samples(group_by_chain=True)["x"], np.float64)
    assert (x > 1).all()
    assert abs(z_score(relative, 1.0)) < Z
    assert abs(z_score(relative * x.mean(1), norm.pdf(1) / norm.sf(1))) < Z
    smc.print_summary()
    assert "was not finite at" in capsys.readouterr().out or twist == "moment"


# --- what is observed exactly, and what is observed by many ----------------------------------------------------------


def rows(y, known, counts):
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", PRIOR)
        shown = jnp.take_along_axis(x, known, -1)
        numpyro.sample("y", dist.Delta(shown).mask(counts).to_event(1), obs=y)


@pytest.mark.slow
def test_exact_observations():
    """Another coordinate in each row, and none in the last: its y may be anything."""
    y, known, counts = jnp.array([[0.7], [-1.3], [jnp.nan]]), jnp.array([[1], [0], [0]]), jnp.array([True, True, False])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Out-of-support")  # NumPyro's, of the NaN
        smc = run(rows, y, known, counts[:, None], num_particles=500)
    x = np.asarray(smc.get_samples()["x"])
    assert (x[:, 0, 1] == np.float32(0.7)).all() and (x[:, 1, 0] == np.float32(-1.3)).all()
    np.testing.assert_allclose(smc.log_evidence, [norm.logpdf(0.7), norm.logpdf(-1.3), 0.0], atol=1e-4)
    free = np.stack([x[:, 0, 0], x[:, 1, 1], x[:, 2, 0], x[:, 2, 1]], -1)
    assert (np.abs(z_score(free, 0.0)) < Z).all() and (np.abs(z_score(free**2, 1.0)) < Z).all()


# --- errors and reports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"num_particles": 0}, ValueError, "num_particles"),
        ({"num_particles": 2.5}, (TypeError, ValueError), "num_particles"),
        ({"num_chains": 0}, ValueError, "num_chains"),
        ({"twist": "moments"}, ValueError, "twist.*'moment'.*'moments'"),
        ({"twist": 3}, ValueError, "twist"),
        ({"ess_threshold": 1.5}, ValueError, "ess_threshold"),
        ({"ess_threshold": float("nan")}, ValueError, "ess_threshold"),
        ({"num_moves": -1}, ValueError, "num_moves"),
        ({"model": 3}, TypeError, "model"),
    ],
)
def test_wrong_settings(settings, error, match):
    settings = {"model": conjugate, "num_particles": 8, **settings}
    with pytest.raises(error, match=match):
        ppd.SMC(settings.pop("model"), **settings)


@pytest.mark.parametrize("name", ["get_samples", "print_summary", "to_arviz"])
def test_results_before_a_run(name):
    with pytest.raises(RuntimeError, match="call run first"):
        getattr(ppd.SMC(conjugate, num_particles=8), name)()
    with pytest.raises(RuntimeError, match="call run first"):
        _ = ppd.SMC(conjugate, num_particles=8).log_evidence


def by_factor(r):
    """r is zero, NaN or infinite at all x but near 0, or everywhere."""
    numpyro.factor("my_factor", numpyro.sample("x", SCALAR) * 0 + r)


@pytest.mark.slow
@pytest.mark.parametrize(
    "r, error, match",
    [
        (jnp.nan, FloatingPointError, "NaN.*'my_factor'"),
        (jnp.inf, FloatingPointError, "infinite.*'my_factor'"),
        (-jnp.inf, ValueError, "zero at every particle.*'my_factor'"),
    ],
)
def test_useless_likelihoods(r, error, match):
    smc = ppd.SMC(by_factor, num_particles=8, progress_bar=False)
    smc.run(KEY, jnp.array(-1.5))
    assert abs(smc.log_evidence + 1.5) < 1e-5
    with pytest.raises(error, match=match):
        smc.run(KEY, jnp.array(r))
    with pytest.raises(RuntimeError, match="call run first"):  # no results of data gone by
        smc.get_samples()


def test_a_twist_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"twist must return.*\(8, 1\)"):
        run(conjugate, Y, SCALE, num_particles=8, twist=lambda prediction, log_r: prediction.x_0)


def test_twists_of_the_state_cannot_be_exact():
    for twist in ("constant", "annealed", "lookahead", misled):
        with pytest.raises(ValueError, match="'moment'"):
            run(rows, jnp.zeros((3, 1)), jnp.zeros((3, 1), int), jnp.ones((3, 1), bool), twist=twist)


def test_summary(eight, plates, capsys):
    eight.print_summary()
    text = capsys.readouterr().out
    assert "x[0]" in text and "x[1]" in text and f"log evidence: {evidence(Y):.3f}" in text and "bits" in text
    assert "COLLAPSED" not in text and "twist 'moment': y: linearised, normal" in text
    plates[0].print_summary(max_rows=5)
    text = capsys.readouterr().out
    assert "the first 5 of 18 numbers" in text and "in all of 6 systems" in text and "needs 8 chains" in text
    assert "moves of other latents" in text or plates[0].ess.min() > 200


def test_a_collapse_is_reported(annealed, capsys):
    with pytest.warns(ppd.CollapseWarning, match="collapsed"):
        smc = run(conjugate, Y, jnp.array(1e-3), num_chains=8, twist="annealed")
    smc.print_summary()
    assert "COLLAPSED" in capsys.readouterr().out
    assert smc.verdict == "collapsed" and not smc.reliable
    assert np.isnan(smc.log_evidence_error) and np.isfinite(smc.log_evidence)


@pytest.mark.slow
def test_one_collapse_of_many_is_named(annealed):
    """One row of three is far out and known to 1e-3; the others are believable, with errors."""

    def model(y, scale):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", PRIOR)
            numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    y, scale = jnp.array([[0.5, 0.1], [2.0, -1.0], [0.0, 0.3]]), jnp.array([[1.0], [1e-3], [1.0]])
    with pytest.warns(ppd.CollapseWarning, match=r"in 1 of 3 systems, \(1,\)"):
        smc = run(model, y, scale, num_particles=400, num_chains=8, twist="annealed")
    assert smc.verdict.tolist() == ["believable", "collapsed", "believable"]
    assert smc.reliable.tolist() == [True, False, True]
    assert np.isnan(smc.log_evidence_error).tolist() == [False, True, False]
    np.testing.assert_allclose(smc.log_evidence[[0, 2]], evidence(np.asarray(y)[[0, 2]]), atol=0.1)


@pytest.mark.slow
def test_to_arviz(eight, plates):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import's own, of the first generation
        import arviz as az
    idata = eight.to_arviz(dims={"x": ["axis"]}, coords={"axis": ["a", "b"]})
    assert idata["posterior"]["x"].dims == ("chain", "draw", "axis") and list(idata["posterior"]["axis"]) == ["a", "b"]
    np.testing.assert_array_equal(idata["posterior"]["x"], eight.get_samples(group_by_chain=True)["x"])
    stats = idata["sample_stats"]
    assert stats["log_weight"].shape == (8, 32)
    assert stats["ess"].dims == stats["resampled"].dims == ("chain", "step")
    np.testing.assert_array_equal(stats["step"], np.arange(6, -1, -1))
    np.testing.assert_allclose(stats["ess"].T, eight.ess)
    np.testing.assert_array_equal(idata["observed_data"]["y"], Y)
    x = np.asarray(idata["posterior"]["x"], np.float64)
    np.testing.assert_allclose(
        idata["log_likelihood"]["y"].values.reshape(8, 32, -1).sum(-1), norm(x).logpdf(Y).sum(-1), rtol=1e-4
    )
    assert list(az.summary(idata).index) == ["x[a]", "x[b]"]

    smc, _ = plates
    idata = smc.to_arviz()
    assert idata["posterior"]["x"].shape == (2, 400, 2, 3, 2) and idata["posterior"]["b"].shape == (2, 400, 2, 3)
    assert idata["sample_stats"]["log_weight"].shape == (2, 400, 2, 3)
    assert idata["sample_stats"]["ess"].shape == (2, 7, 2, 3)
    assert idata["log_likelihood"]["y"].shape[:4] == (2, 400, 2, 3)
    assert len(az.summary(idata)) == 18


def test_a_file_of_netcdf_holds_all_of_it(eight, tmp_path):
    az = import_arviz()
    idata = eight.to_arviz()
    idata.to_netcdf(tmp_path / "eight.nc")
    again = az.from_netcdf(tmp_path / "eight.nc")
    for group in ("posterior", "sample_stats", "observed_data", "log_likelihood"):
        before, after = idata[group], again[group]
        assert set(before.data_vars) == set(after.data_vars) and before.attrs.keys() <= after.attrs.keys()
        for name in before.data_vars:
            assert before[name].dims == after[name].dims
            np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ArviZ 0.23's, of matplotlib
def test_arviz_draws_and_compares_posteriors(eight):
    """Each coordinate's trace, their pair, and two runs by their densities of the data."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    az = import_arviz()
    idata = eight.to_arviz()
    for name, panels in (("plot_trace", 2), ("plot_pair", 1)):
        plot = getattr(az, name)(idata)
        figure = np.ravel(plot)[0].figure if is_first_generation(az) else plot.viz["figure"].item()
        assert len([axis for axis in figure.axes if axis.lines or axis.collections]) >= panels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few draws
        table = az.compare({"a": idata, "b": run(conjugate, Y, 3 * SCALE, num_particles=32, num_chains=8).to_arviz()})
    assert sorted(table.index) == ["a", "b"]


def test_to_arviz_without_a_likelihood_per_datum():
    smc = ppd.SMC(by_factor, num_particles=8, progress_bar=False)
    smc.run(KEY, jnp.array(-1.5))
    idata = smc.to_arviz()
    groups = list(idata.groups() if callable(idata.groups) else idata.groups)
    assert not any("log_likelihood" in group for group in groups)


# --- odd sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_x64():
    with enable_x64():
        prior = standard_normal((), 3)

        def model(y):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0), obs=y)

        smc = run(model, np.float64(2.0), num_particles=16)
        assert smc.get_samples()["x"].dtype == np.float64
        assert abs(smc.log_evidence - norm(0, np.sqrt(2)).logpdf(2.0)) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pp_diffusion.CollapseWarning")
@pytest.mark.parametrize("num_steps", [1, 2])
def test_few_steps_and_one_particle(num_steps):
    """A scalar x, an integer y."""
    prior = standard_normal((), num_steps)

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0), obs=y)

    smc = run(model, 2, num_particles=1)
    assert smc.get_samples()["x"].shape == (1,) and smc.ess.shape == (num_steps + 1, 1)
    assert abs(smc.log_evidence - norm(0, np.sqrt(2)).logpdf(2.0)) < 1e-5
