"""ArviZ of either generation: what it is given, and that it reads it as meant."""

import jax
import matplotlib
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion import likelihood
from pp_diffusion.inference_data import import_arviz, is_first_generation, pareto_smooth

matplotlib.use("Agg")
az = import_arviz()

EXACT = {} if is_first_generation(az) else {"round_to": "none"}  # of ArviZ 1's compare
KEY = jax.random.key(0)
X = np.array([[0.5, -1.0], [2.0, 0.3], [0.1, 0.2], [-0.7, 1.5], [0.0, -0.4]])
FIELDS = ("value", "psis_value", "std_error", "ess", "pareto_k", "bound", "bound_std_error", "gap", "verdict")


def network(x_t, t):
    return 0.2 * x_t + 0.05 * t[..., None], 0.1 * x_t - 0.1


SCHEDULE = ppd.FixedSchedule([0.1, 0.4, 0.25, 0.7])
PRIOR = ppd.Diffusion(ppd.GaussianKernel((2,)), SCHEDULE, network).prior({})


@pytest.fixture(scope="module")
def estimate():
    return ppd.estimate_log_prob(KEY, PRIOR, X, 400)


def made_of(*columns):
    """An estimate of given log weights, a column per datum."""
    log_weights = np.stack(columns, -1)
    source = likelihood.Trajectories(PRIOR, np.zeros((len(columns), 2)), 16)
    return likelihood.summarise(log_weights, None, source)


def exponential(num, seed=0):
    """Quantiles, in no order: ``k`` times these are log weights with a Pareto tail of shape k."""
    return np.random.default_rng(seed).permutation(-np.log((np.arange(num) + 0.5) / num))


def groups_of(idata):
    """Names of the groups and attributes, in both generations."""
    groups = idata.groups() if callable(idata.groups) else [name.strip("/") for name in idata.groups if name != "/"]
    return set(groups), dict(idata.attrs)


# --- to_arviz --------------------------------------------------------------------------------------------------------


def test_groups_variables_and_attributes(estimate):
    idata = estimate.to_arviz()
    groups, attrs = groups_of(idata)
    assert groups == {"posterior", "sample_stats", "observed_data", "estimate"}
    assert attrs["inference_library"] == "pp_diffusion" and attrs["units"] == "nats"
    assert idata.estimate.attrs == {"units": "nats", "num_trajectories": 400, "good_k": estimate.good_k}
    assert set(idata.estimate.data_vars) == set(FIELDS)
    for name in FIELDS:
        np.testing.assert_array_equal(idata.estimate[name], getattr(estimate, name))
    np.testing.assert_allclose(idata.observed_data["x"], X, rtol=1e-6)
    log_weight = idata.sample_stats["log_weight"]
    assert log_weight.dims == idata.posterior["log_prob"].dims == ("chain", "draw", "datum")
    np.testing.assert_array_equal(log_weight, estimate.log_weights.reshape(4, 100, 5))


@pytest.mark.parametrize("num, num_chains", [(28, 4), (30, 2), (31, 1)])
def test_chains(num, num_chains):
    posterior = ppd.estimate_log_prob(KEY, PRIOR, X, num).to_arviz().posterior
    assert posterior["log_prob"].shape == (num_chains, num // num_chains, 5)
    np.testing.assert_array_equal(posterior["draw"], np.arange(num // num_chains))


def test_dims_and_coords():
    x = np.stack([X[:3], X[2:]])
    estimate = ppd.estimate_log_prob(KEY, PRIOR, x, 28)
    default = estimate.to_arviz()
    assert default.observed_data["x"].dims == ("datum_dim_0", "datum_dim_1", "x_dim_0")
    coords = {"group": ["old", "new"], "x_dim_0": ["length", "width"]}
    idata = estimate.to_arviz(dims=["group", "item"], coords=coords)
    assert idata.posterior["log_prob"].dims == ("chain", "draw", "group", "item")
    assert idata.estimate["verdict"].dims == ("group", "item")
    np.testing.assert_array_equal(idata.estimate["value"].sel(group="new"), estimate.value[1])
    np.testing.assert_allclose(idata.observed_data["x"].sel(x_dim_0="width"), x[..., 1], rtol=1e-6)
    np.testing.assert_array_equal(idata.estimate["item"], np.arange(3))
    one = ppd.estimate_log_prob(KEY, PRIOR, X[0], 28).to_arviz()
    assert one.posterior["log_prob"].dims == ("chain", "draw") and one.estimate["value"].dims == ()


@pytest.mark.parametrize("dims", [["a", "b"], [], "datum"], ids=str)
def test_wrong_dims_are_refused(estimate, dims):
    with pytest.raises(ValueError, match="dims must name the data's 1 batch axes"):
        estimate.to_arviz(dims=dims)


def test_wrong_coords_are_refused(estimate):
    with pytest.raises(ValueError, match=r"coords must be for axes among \['datum', 'x_dim_0'\]; got \['patient'\]"):
        estimate.to_arviz(coords={"patient": np.arange(5)})
    with pytest.raises(ValueError, match="datum"):  # xarray's own complaint about the length
        estimate.to_arviz(coords={"datum": np.arange(4)})


# --- what ArviZ makes of it ------------------------------------------------------------------------------------------


def test_summary_has_value_and_error():
    """4000 draws: the mean to a tenth of an error, and the standard deviation as stated."""
    estimate = ppd.estimate_log_prob(KEY, PRIOR, X, 4000)
    table = az.summary(estimate.to_arviz(), round_to="none").astype(float)
    assert list(table.index) == [f"log_prob[{i}]" for i in range(5)]
    assert (np.abs(table["mean"] - estimate.value) < 0.1 * estimate.std_error + estimate.std_error**2).all()
    np.testing.assert_allclose(table["sd"], estimate.std_error, rtol=1e-3)
    draws = estimate.to_arviz().posterior["log_prob"].values.reshape(-1, 5)
    assert len(np.unique(draws)) == draws.size and np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.08


def test_summary_is_nan_where_the_error_is():
    e = exponential(400)
    estimate = made_of(0.2 * e, 1.5 * e)
    np.testing.assert_array_equal(np.isnan(estimate.std_error), [False, True])
    table = az.summary(estimate.to_arviz(), round_to="none").astype(float)
    np.testing.assert_array_equal(np.isnan(table["mean"]), np.isnan(estimate.std_error))
    np.testing.assert_array_equal(np.isnan(table["sd"]), np.isnan(estimate.std_error))


def test_summary_of_the_weights(estimate):
    table = az.summary(estimate.to_arviz(), group="sample_stats", round_to="none").astype(float)
    assert list(table.index) == [f"log_weight[{i}]" for i in range(5)]
    np.testing.assert_allclose(table["mean"], estimate.log_weights.mean(0), rtol=1e-5)
    np.testing.assert_allclose(table["sd"], estimate.log_weights.std(0, ddof=1), rtol=1e-2)


def test_loo_refuses(estimate):
    with pytest.raises(TypeError, match="log likelihood not found"):
        az.loo(estimate.to_arviz())


def test_elpd(estimate):
    elpd = estimate.to_elpd()
    name = "elpd_loo" if is_first_generation(az) else "elpd"
    np.testing.assert_allclose(elpd[name] if is_first_generation(az) else elpd.elpd, estimate.value.sum())
    np.testing.assert_allclose(elpd.se, np.sqrt(5) * estimate.value.std())
    np.testing.assert_array_equal(elpd.pareto_k, estimate.pareto_k)
    assert elpd.good_k == estimate.good_k and not elpd.warning
    heavy = made_of(1.5 * exponential(400), 0.2 * exponential(400)).to_elpd()
    assert heavy.warning


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ArviZ 0.23's, of matplotlib
def test_plot_khat_shows_the_estimates(estimate):
    plot = az.plot_khat(estimate.to_elpd())
    figure = plot.get_figure() if is_first_generation(az) else plot.viz["figure"].item()
    shown = [c.get_offsets()[:, 1] for a in figure.axes for c in a.collections if len(c.get_offsets()) == 5]
    np.testing.assert_allclose(shown[0], estimate.pareto_k)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ArviZ 0.23's, of pandas
def test_compare_ranks_models(estimate):
    """The same data under a model that is better by as much as the values say."""
    worse = ppd.Diffusion(PRIOR.kernel, SCHEDULE, lambda x_t, t: (x_t + 2, 0 * x_t)).prior({})
    other = ppd.estimate_log_prob(KEY, worse, X, 400)
    assert other.value.sum() < estimate.value.sum() - 1
    table = az.compare({"worse": other.to_elpd(), "better": estimate.to_elpd()}, method="pseudo-BMA", **EXACT)
    assert list(table.index) == ["better", "worse"]
    difference = estimate.value.sum() - other.value.sum()
    np.testing.assert_allclose(np.abs(table["elpd_diff"].astype(float)), [0, difference], atol=0.1)


# --- Pareto smoothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9, 1.5])
def test_pareto_k_is_the_shape_of_the_tail(shape):
    """From quantiles of 4000: within the tail's finite size and the prior at 0.5 that PSIS puts on it."""
    log_weights = shape * exponential(4000)
    _, (k, mirrored) = pareto_smooth(np.stack([log_weights, -log_weights], -1))
    np.testing.assert_allclose(k, shape, atol=0.08)
    assert mirrored < 0.1  # weights in (0, 1], with no tail at all: had their negatives entered, they would be swapped


def test_smoothing_keeps_the_scale_and_all_but_the_tail():
    log_weights = 0.5 * exponential(1000)
    raw = np.stack([log_weights, log_weights - 700, log_weights + 900], -1)
    smoothed, k = pareto_smooth(raw)
    assert smoothed.shape == (1000, 3) and k.shape == (3,)
    np.testing.assert_allclose(k, k[0], rtol=1e-6)
    np.testing.assert_allclose(smoothed - raw, np.tile((smoothed - raw)[:, :1], 3), atol=1e-9)
    tail = np.argsort(log_weights)[-95:]  # 3 sqrt(1000)
    changed = np.abs(smoothed - raw)[:, 0] > 1e-9
    assert set(np.flatnonzero(changed)) <= set(tail) and changed.sum() > 80
    assert (smoothed.max(0) <= raw.max(0) + 1e-9).all()
    assert (np.diff(smoothed[np.argsort(log_weights), 0]) > -1e-9).all()


def test_smoothing_is_arvizs_own():
    log_weights = 0.3 * np.random.default_rng(1).standard_normal((500, 3)) + 2
    smoothed, k = pareto_smooth(log_weights)
    if is_first_generation(az):
        theirs, their_k = az.psislw(log_weights.T)
    else:
        from arviz_stats.base import array_stats

        theirs, their_k = array_stats.psislw(-log_weights.T)  # of log likelihoods
    theirs = theirs.T
    np.testing.assert_allclose(k, their_k, rtol=1e-9)
    normalised = smoothed - np.log(np.exp(smoothed).sum(0))
    np.testing.assert_allclose(normalised, theirs - np.log(np.exp(theirs).sum(0)), atol=1e-9)


@pytest.mark.parametrize(
    "column, k",
    [
        (np.zeros(100), -np.inf),  # constant
        (np.where(np.arange(100) < 30, 3.0, 0.0), -np.inf),  # the largest are equal
        (np.where(np.arange(100) < 3, 3.0 + np.arange(100), 0.0), np.inf),  # three huge ones
        (np.where(np.arange(100) < 3, np.arange(100), -np.inf), np.inf),  # three at all
        (np.full(100, -np.inf), np.inf),
        (np.arange(24.0), np.inf),  # too few
    ],
    ids=["constant", "equal", "three huge", "three", "none", "few"],
)
def test_tails_that_cannot_be_fitted(column, k):
    smoothed, found = pareto_smooth(column[:, None])
    assert found == k
    np.testing.assert_array_equal(smoothed[:, 0], column)


# --- what is kept in files, and drawn --------------------------------------------------------------------------------


def test_a_file_of_netcdf_holds_all_of_an_estimate(estimate, tmp_path):
    idata = estimate.to_arviz()
    idata.to_netcdf(tmp_path / "estimate.nc")
    again = az.from_netcdf(tmp_path / "estimate.nc")
    assert groups_of(again)[0] == groups_of(idata)[0] and groups_of(again)[1].keys() >= groups_of(idata)[1].keys()
    for group in groups_of(idata)[0]:
        assert set(again[group].data_vars) == set(idata[group].data_vars)
        assert again[group].attrs.keys() >= idata[group].attrs.keys()
        for name in idata[group].data_vars:
            np.testing.assert_array_equal(again[group][name], idata[group][name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ArviZ 0.23's, of matplotlib
@pytest.mark.parametrize("name", ["plot_trace", "plot_pair"])
def test_arviz_draws_an_estimate(estimate, name):
    plot = getattr(az, name)(estimate.to_arviz())
    figure = np.ravel(plot)[0].figure if is_first_generation(az) else plot.viz["figure"].item()
    if name == "plot_pair":
        assert len([axis for axis in figure.axes if axis.lines or axis.collections]) >= 10  # pairs of five data
    else:
        assert sum(len(axis.lines) for axis in figure.axes) >= 5  # in one panel with ArviZ 0
    matplotlib.pyplot.close("all")
