"""Figures are made, in the right panels, from the right data."""

import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import pp_diffusion as ppd
from pp_diffusion import likelihood

KEY = jax.random.key(0)
DIFFUSION = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(6), ppd.networks.MLP((4,)))

BOUNDS = ppd.EntropyBounds(np.array([-np.inf, 0.2, 1.0]), np.array([1.0, 2.0, 3.0]), 0.1)


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


@pytest.mark.parametrize(
    "shape, scale, dtype",
    [((3, 4, 6), 16.0, float), ((3, 4, 6, 1), 1, int), ((3, 4, 6, 3), 255, np.uint8), ((3, 4, 6, 3), 1.0, float)],
    ids=str,
)
def test_images_are_shown_whole_and_in_their_own_range(shape, scale, dtype):
    """Black, white and a grey in the middle keep their places; an unfilled row ends in white."""
    x = np.zeros(shape, dtype)
    x[0], x[2, 0] = scale, scale // 2 if dtype is np.uint8 else scale / 2
    figure = ppd.plotting.images(x, num_columns=2, title="three")
    (axis,) = figure.axes
    shown = axis.images[0].get_array()
    assert shown.shape == (2 * 6, 2 * 8, *shape[3:]) if shape[3:] != (1,) else (2 * 6, 2 * 8)
    np.testing.assert_allclose(shown[1:5, 1:7], 1.0)
    np.testing.assert_allclose(shown[1:5, 9:15], 0.0)
    np.testing.assert_allclose(shown[7, 1:7], 0.0 if dtype is int else 0.5, atol=3e-3)
    np.testing.assert_allclose(shown[7:11, 9:15], 1.0)  # no fourth
    assert axis.get_title() == "three" and not axis.axison
    half = ppd.plotting.images(x, value_range=(0, 2 * scale)).axes[0].images[0].get_array()
    np.testing.assert_allclose(half[1:5, 1:7], 0.5)


def test_images_refuse_what_is_none():
    for shape in ((3, 4), (3, 4, 6, 2), (0, 4, 6)):
        with pytest.raises(ValueError, match="x must have shape"):
            ppd.plotting.images(np.ones(shape))
    with pytest.raises(ValueError, match="value_range must be"):
        ppd.plotting.images(np.ones((3, 4, 6)), value_range=(1, 1))
    with pytest.raises(ValueError, match="num_columns must be at least 1"):
        ppd.plotting.images(np.ones((3, 4, 6)), num_columns=0)


# --- tables ----------------------------------------------------------------------------------------------------------

DRAWN = np.stack([np.arange(40.0), 3 * np.arange(40.0) % 7, -(np.arange(40.0) ** 2)], -1)


def test_pairs_of_a_table():
    """Row by row below the diagonal: x is the earlier column, y the later; names at the edges; draws, then data."""
    data = DRAWN[:5] + 0.5
    data[0, 1] = np.nan  # missing
    figure = ppd.plotting.pairs(DRAWN, data, names=["a", "b", "c"], labels=("model", "table"), num_points=30)
    axes = np.array(figure.axes).reshape(3, 3)
    for row in range(3):
        for column in range(row):
            drawn, given = (np.asarray(c.get_offsets()) for c in axes[row, column].collections)
            np.testing.assert_array_equal(drawn, DRAWN[:30][:, [column, row]])
            np.testing.assert_array_equal(np.ma.getdata(given)[1:], data[1:][:, [column, row]])
            assert axes[row, column].get_xlim() == axes[2, column].get_xlim()  # one scale for a column
        assert all(not axes[row, column].axison for column in range(row + 1, 3))
    assert [axis.get_xlabel() for axis in axes[2]] == ["a", "b", "c"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["", "b", "c"]
    assert labels(axes[0, 1]) == ["model", "table"]
    for axis, column in zip(axes.diagonal(), range(3), strict=True):  # densities, of all rows
        bars = [patch for patch in axis.patches if hasattr(patch, "get_width")]
        np.testing.assert_allclose(sum(bar.get_height() * bar.get_width() for bar in bars), 1.0)
        low, high = axis.get_xlim()
        assert low < np.nanmin(data[:, column]) and np.nanmax(data[:, column]) < high


def test_pairs_take_the_names_of_a_data_frame():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(DRAWN, columns=["width", "height", 3])
    for arguments in ((DRAWN, table), (table,)):
        assert [axis.get_xlabel() for axis in ppd.plotting.pairs(*arguments).axes[6:]] == ["width", "height", "3"]
    assert ppd.plotting.pairs(DRAWN[:, :1] * 0).axes[0].get_xlabel() == "x[0]"  # also of a constant


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((np.ones(3),), "x must be a table"),
        ((np.ones((0, 2)),), "x must be a table"),
        ((DRAWN, DRAWN[:, :2]), r"data must have the 3 columns of x; got shape \(40, 2\)"),
        ((DRAWN, None, ["a"]), r"names must be 3, one for each column; got 1: \['a'\]"),
    ],
)
def test_pairs_refuse_what_is_no_table(arguments, match):
    x, data, names = (*arguments, None, None)[:3]
    with pytest.raises(ValueError, match=match):
        ppd.plotting.pairs(x, data, names=names)


# --- axes of one's own ------------------------------------------------------------------------------------------------


def own_axes(count):
    """In a part of a figure."""
    part, _ = Figure(figsize=(6, 6)).subfigures(1, 2)
    return np.atleast_1d(part.subplots(1, count))


IMAGE = np.random.default_rng(0).uniform(size=(4, 3, 3))
RESULT = SimpleNamespace(
    losses=np.linspace(3.0, 2.0, 20),
    validation=ppd.Validation(np.array([10, 20]), np.array([-3.0, -2.5]), np.ones((2, 4)), np.ones(2)),
)


@pytest.mark.parametrize(
    "count, draw",
    [
        (1, lambda axes: ppd.plotting.images(IMAGE, ax=axes[0])),
        (1, lambda axes: ppd.plotting.samples(IMAGE, axes=axes[0])),
        (2, lambda axes: ppd.plotting.samples(DRAWN[:, :2], DRAWN[:5, :2], axes=axes)),
        (9, lambda axes: ppd.plotting.pairs(DRAWN, DRAWN, axes=list(axes))),
        (9, lambda axes: ppd.plotting.trajectories(KEY, trained(), DRAWN[:, :2], num_points=30, axes=axes)),
        (1, lambda axes: ppd.plotting.losses(RESULT, window=5, ax=axes[0])),
        (2, lambda axes: ppd.plotting.loss_by_time(RESULT, axes=axes)),
        (2, lambda axes: ppd.plotting.entropies(BOUNDS, ppd.ReverseEntropy(np.ones(3), np.ones(3)), axes=axes)),
        (1, lambda axes: ppd.plotting.pareto_k(estimate(), ax=axes[0])),
        (1, lambda axes: ppd.plotting.convergence(estimate(), ax=axes[0])),
    ],
    ids=[
        "images",
        "samples",
        "samples2",
        "pairs",
        "trajectories",
        "losses",
        "by_time",
        "entropies",
        "khat",
        "converge",
    ],
)
def test_all_draw_on_given_axes(count, draw):
    """On each of them, and the figure is theirs."""
    axes = own_axes(count)
    figure = draw(axes)
    assert figure is axes[0].figure.figure and isinstance(figure, Figure)
    drawn = [ax for ax in axes if ax.collections or ax.images or ax.lines or ax.patches or not ax.axison]
    assert len(drawn) == count


def test_wrong_axes_are_refused():
    with pytest.raises(TypeError, match=r"ax must be of matplotlib.axes.Axes; got Figure"):
        ppd.plotting.images(IMAGE, ax=Figure())
    with pytest.raises(ValueError, match=r"axes must be 2 .*; got 3"):
        ppd.plotting.samples(IMAGE, IMAGE, axes=own_axes(3))
    with pytest.raises(TypeError, match=r"axes must be of matplotlib.axes.Axes; got str"):
        ppd.plotting.samples(IMAGE, axes=["left"])


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


@pytest.mark.slow
def test_losses():
    data = jax.random.normal(jax.random.key(0), (50, 2))
    result = ppd.fit(jax.random.key(1), DIFFUSION, data, num_steps=30, batch_size=10, progress_bar=False)
    lines = ppd.plotting.losses(result, window=10).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), -result.losses)
    np.testing.assert_allclose(lines[1].get_ydata()[0], -result.losses[:10].mean(), rtol=1e-5)


# --- entropies and likelihoods ---------------------------------------------------------------------------------------


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
