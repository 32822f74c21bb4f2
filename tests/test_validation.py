"""Held-out rows: what they say, what is returned for it, and when training ends."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.sharding import Layout
from pp_diffusion.training.arrays import hold_out
from pp_diffusion.training.update import OBJECTIVES
from pp_diffusion.training.validation import Validation, evaluate

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(90, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
DIFFUSION = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(6, 1e-2), ppd.networks.MLP((16,)))


def fit(data=X, diffusion=DIFFUSION, **settings):
    settings = {"num_steps": 60, "batch_size": 30, "progress_bar": False, **settings}
    return ppd.fit(jax.random.key(1), diffusion, data, **settings)


@pytest.fixture(scope="module")
def trained():
    return fit(num_steps=200)


def test_which_rows_are_held_out():
    chosen = hold_out(124, 0.1)
    assert len(chosen) == 12 == len(set(chosen)) and (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, hold_out(124, 0.1))
    assert not len(hold_out(19, 0.5)) and not len(hold_out(124, 0.0))
    assert len(hold_out(10_000_000, 0.1)) == 10_000


@pytest.mark.slow
def test_the_best_parameters_are_returned(trained):
    history = trained.validation
    np.testing.assert_array_equal(history.steps, [50, 100, 150, 200])
    assert history.values.shape == history.train.shape == (4,) and history.per_step.shape == (4, 6)
    np.testing.assert_allclose(history.values.max(), trained.state.best.value)
    assert history.best_step == trained.state.best.step
    jax.tree.map(np.testing.assert_array_equal, trained.params, trained.state.best.params)
    assert len(fit(num_steps=10, val_prop=0.0).losses) == 10 and fit(num_steps=10, val_prop=0.0).validation is None


@pytest.mark.parametrize("last_step", ["kernel", "network"])
@pytest.mark.parametrize("num_times", [3, 40])
def test_it_is_the_bound_of_these_rows(last_step, num_times):
    """Against `lower_bound`, with the transform's Jacobian and a context; |z| < 4.5 of its own noise, in the mean."""

    def network(x_t, t, context):
        scale = 0.1 + 0.2 * jax.nn.sigmoid(context[..., :1]) + 0 * x_t
        return 0.6 * x_t, scale

    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.FixedSchedule.log_linear(6, 1e-2),
        network,
        parameterization="direct",
        last_step=last_step,
        transform=ppd.standardize(3 * X),
    )
    x, context = 3 * jnp.asarray(np.tile(X, (20, 1)), float), jnp.asarray(np.tile(X[:, :1], (20, 1)), float)
    judged = evaluate(diffusion, {}, x, context, OBJECTIVES["bound"], num_times, 128, Layout())
    bound = ppd.lower_bound(KEY, diffusion.prior({}, context=context), x, estimator="analytic", num_samples=8)
    difference = np.asarray(judged.rows - bound.value)
    assert abs(difference.mean()) < 4.5 * difference.std() / np.sqrt(len(x)) + 1e-5
    np.testing.assert_allclose(
        judged.rows.mean(), -judged.per_step.sum() - bound.prior_kl.mean() - bound.log_abs_det.mean(), rtol=1e-4
    )
    expected, error = bound.kl_per_step.mean(0), bound.kl_per_step.std(0) / np.sqrt(90)
    np.testing.assert_allclose(judged.per_step, expected, atol=5 * float(error.max()) + 0.02)


@pytest.mark.slow
def test_data_of_ones_own_judge_in_their_place():
    own = X[:25] + 0.1
    result = fit(validation_data=own)
    assert result.validation.steps.tolist() == [50, 60]
    for data in (lambda key: jax.random.normal(key, (16, 2)), [X[:30], X[30:60]]):
        assert fit(data).validation is None
        assert len(fit(data, validation_data=own, num_steps=50).validation.steps) == 1
    with pytest.raises(ValueError, match="validation_data must have shape"):
        fit(validation_data=X[:, :1])


@pytest.mark.slow
def test_overfitting_ends_training_and_is_said():
    """Fifteen rows and a network for many more; what comes back is better than the end, on fresh rows too."""
    schedule, network = ppd.FixedSchedule.log_linear(8, 1e-3), ppd.networks.MLP((64, 64))
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), schedule, network)
    fresh = np.random.default_rng(1).normal(size=(260, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    settings = {"total_steps": 3000, "validation_data": fresh[:60], "max_patience": 15, "row_noise": 0.0}
    with pytest.warns(UserWarning, match="held-out rows part: K of the 60 held-out rows was highest after"):
        result = fit(X[:15], diffusion, num_steps=3000, batch_size=15, **settings)
    steps = result.validation.steps
    assert len(result.losses) == steps[-1] == result.validation.best_step + 15 * 60 < 3000
    with pytest.warns(UserWarning, match="no more to gain"):  # it stays ended
        assert not len(fit(X[:15], diffusion, num_steps=10, batch_size=15, state=result.state, **settings).losses)
    best, last = (
        ppd.lower_bound(KEY, diffusion.prior(p), fresh[60:]).value.mean() for p in (result.params, result.state.average)
    )
    assert best > last + 0.1


def test_noise_on_rows_shrinks_and_goes():
    """At the start of its standard deviation in the model's space, later less, from 70 % on none."""
    from pp_diffusion.training.forms import as_source

    space = ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1]), ppd.networks.MLP((3,)), transform=ppd.standardize(5 * X)
    ).space
    feed, _ = as_source(space, 5 * X, None, 90, KEY, noise=0.4).take(1, 0)

    def spread(progress):
        return np.std((feed.batch(KEY, 0, progress)[0] - 5 * X) / np.std(5 * X, 0))

    np.testing.assert_allclose([spread(1e-6), spread(0.35), spread(0.7)], [0.4, 0.1, 0.0], rtol=0.15, atol=1e-6)
    bits = ppd.Diffusion(ppd.BinomialKernel((2,)), ppd.FixedSchedule([0.1]), ppd.networks.MLP((3,)))
    assert as_source(bits.space, X > 0, None, 90, KEY, noise=0.4).take(1, 0)[0].noise is None


@pytest.mark.slow
def test_they_are_in_the_bar_and_in_the_figures(capsys, trained):
    fit(num_steps=50, progress_bar=True)
    assert "held-out" in capsys.readouterr().err
    axis = ppd.plotting.losses(trained).axes[0]
    held_out = next(line for line in axis.lines if line.get_label() == "held-out rows")
    np.testing.assert_allclose(held_out.get_ydata(), trained.validation.values)
    figure = ppd.plotting.loss_by_time(trained, num_bins=3)
    np.testing.assert_allclose(
        figure.axes[0].lines[0].get_ydata(), trained.validation.per_step[0].reshape(3, 2).mean(1), rtol=1e-5
    )
    with pytest.raises(ValueError, match="result must have held-out rows"):
        ppd.plotting.loss_by_time(fit(num_steps=1, val_prop=0.0))


@pytest.mark.slow
def test_few_rows_are_all_trained_on():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(X[:19], num_steps=2).validation is None
    assert isinstance(fit(X[:20], num_steps=1).validation, Validation)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"val_prop": 1.0}, r"val_prop must be in \[0, 1\)"),
        ({"max_patience": 0}, "max_patience must be an integer >= 1"),
        ({"row_noise": -1.0}, "row_noise must be a standard deviation >= 0"),
        ({"accumulate": 0}, "accumulate must be an integer >= 1"),
        ({"accumulate": 4}, "accumulate must divide a batch of 30 rows"),
        ({"mesh": 3}, "mesh must be a jax.sharding.Mesh"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(**settings)
