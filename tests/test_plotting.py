"""Figures are made, in the right panels, from the right data."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion import likelihood

DIFFUSION = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(6), ppd.networks.MLP((4,)))


def trained():
    return DIFFUSION.prior(DIFFUSION.init_params(jax.random.key(0)))


def test_points_images_and_sequences():
    key = jax.random.key(0)
    points = jax.random.normal(key, (50, 2))
    figure = ppd.plotting.samples(points, points * 3, title="points")
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim()  # one scale for both
    np.testing.assert_allclose(left.collections[0].get_offsets(), points)
    image = ppd.plotting.samples(jax.random.uniform(key, (30, 4, 6)), num_columns=5).axes[0].images[0]
    assert image.get_array().shape == (5 * (4 + 2), 5 * (6 + 2))  # a pixel of frame around each
    assert ppd.plotting.samples(jnp.ones((7, 20), int)).axes[0].images[0].get_array().shape == (7, 20)
    with pytest.raises(ValueError, match="x must have shape"):
        ppd.plotting.samples(jnp.ones(3))


def test_a_notebook_shows_a_figure_without_pyplot():
    """By the method that IPython looks for; a figure is still one that can be pickled."""
    figure = ppd.plotting.samples(jnp.ones((7, 20), int))
    for shown in (figure, pickle.loads(pickle.dumps(figure))):
        assert getattr(shown, "_repr_png_")().startswith(b"\x89PNG")  # noqa: B009


@pytest.mark.parametrize("shape", [(30, 4, 6), (30, 4, 6, 3)])
def test_image_tiles_are_in_reading_order(shape):
    images = np.zeros(shape)
    images[1] = 1.0  # the second image is the second tile of the first row
    tiled = ppd.plotting.samples(images, num_columns=5).axes[0].images[0].get_array()
    assert tiled[2, 8 + 3].min() == 1.0
    assert tiled[2, 3].max() == 0.0


def test_figure_1():
    figure = ppd.plotting.trajectories(
        jax.random.key(0), trained(), jax.random.normal(jax.random.key(1), (40, 2)), num_points=30
    )
    assert [axis.get_title() for axis in figure.axes] == [
        *(f"forward, t = {t}" for t in (0, 3, 6)),
        *(f"reverse, t = {t}" for t in (0, 3, 6)),
        *(f"drift $f_\\mu - x_t$, t = {t}" for t in (2, 3, 6)),
    ]
    binary = ppd.Diffusion(ppd.BinomialKernel((2,)), ppd.FixedSchedule.constant_erasure(3), lambda x_t, t: x_t)
    with pytest.raises(ValueError, match="event shape"):
        ppd.plotting.trajectories(jax.random.key(0), binary.prior({}), jnp.ones((3, 2)))


def test_losses():
    data = jax.random.normal(jax.random.key(0), (50, 2))
    result = ppd.fit(jax.random.key(1), DIFFUSION, data, num_steps=30, batch_size=10, progress_bar=False)
    lines = ppd.plotting.losses(result, window=10).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), -result.losses)
    np.testing.assert_allclose(lines[1].get_ydata()[0], -result.losses[:10].mean(), rtol=1e-5)


# --- entropies and likelihoods ---------------------------------------------------------------------------------------

BOUNDS = ppd.EntropyBounds(np.array([-np.inf, 0.2, 1.0]), np.array([1.0, 2.0, 3.0]), 0.1)


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_entropies_between_their_bounds():
    value = np.array([0.5, 1.9, 2.5])
    left, right = ppd.plotting.entropies(BOUNDS, ppd.ReverseEntropy(value, np.full(3, 1e-3))).axes
    np.testing.assert_array_equal(left.lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(left.lines[0].get_ydata(), value)
    np.testing.assert_allclose(right.lines[0].get_ydata(), value - BOUNDS.upper)
    assert labels(left) == ["between the bounds", "model"]
    wide, below = np.array([0.5, 1.9, 0.4]), np.array([0.5, -3.0, 2.5])
    for value, step in ((wide, 3), (below, 2)):
        left, right = ppd.plotting.entropies(BOUNDS, ppd.ReverseEntropy(value, np.full(3, 1e-3))).axes
        np.testing.assert_allclose(left.lines[1].get_xydata(), [[step, value[step - 1]]])
        assert labels(left)[-1] == "outside: 1 steps"
        assert right.get_ylim()[0] < (value - BOUNDS.upper).min()  # it is seen
    with pytest.raises(ValueError, match=r"entropy must have shape \(3,\)"):
        ppd.plotting.entropies(BOUNDS, ppd.ReverseEntropy(np.zeros(4), np.zeros(4)))
    one = ppd.EntropyBounds(BOUNDS.lower[:1], BOUNDS.upper[:1], 0.1)
    assert ppd.plotting.entropies(one, ppd.ReverseEntropy(np.zeros(1), np.zeros(1))).axes


def estimate(num=100):
    """Of one datum that is believable, one whose weights have a heavy tail, and one whose weights are equal."""
    quantiles = -np.log((np.arange(num) + 0.5) / num)[np.random.default_rng(0).permutation(num)]
    log_weights = np.stack([0.1 * quantiles, 1.5 * quantiles, np.full(num, -1.0)], -1)
    return likelihood.summarise(log_weights, None, likelihood.Trajectories(None, np.zeros((3, 2)), 1))


def test_pareto_k_by_verdict():
    found = estimate()
    axis = ppd.plotting.pareto_k(found).axes[0]
    shown = [np.asarray(points.get_offsets()) for points in axis.collections]
    assert [len(points) for points in shown] == [2, 1, 0, 1]
    np.testing.assert_allclose(shown[0][0], [0, found.pareto_k[0]])
    np.testing.assert_allclose(shown[1], [[2, 0.01]])  # without a tail: at the lower edge
    np.testing.assert_allclose(shown[3], [[1, found.pareto_k[1]]])
    assert labels(axis) == ["believable: 66.7 %", "doubtful: 0.0 %", "bound only: 33.3 %"]
    assert [line.get_ydata()[0] for line in axis.lines] == [0.7, found.good_k]
    assert axis.get_title() == "100 trajectories per datum"


def test_convergence_ends_at_the_estimate():
    found = estimate()
    exact = found.value + 0.25
    axis = ppd.plotting.convergence(found, exact).axes[0]
    numbers, gains = axis.lines[0].get_data()
    np.testing.assert_array_equal(numbers, [1, 2, 4, 8, 16, 32, 64, 100])
    np.testing.assert_allclose(gains[0], (found.log_weights[0] - found.bound).mean())
    np.testing.assert_allclose(gains[-1], found.gap.mean())
    np.testing.assert_allclose(axis.lines[-1].get_ydata(), found.gap.mean() + 0.25)
    assert set(labels(axis)) == {"log p, as estimated", "K", "log p of the data's own law"}
    assert set(labels(ppd.plotting.convergence(found).axes[0])) == {"log p, as estimated", "K"}
    for num in (1, 2):  # without warnings
        assert len(ppd.plotting.convergence(estimate(num)).axes[0].lines[0].get_xdata()) == num
