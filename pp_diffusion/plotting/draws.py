"""Draws: points, images, tables by pairs of columns, beside data; and the paper's figure 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.plotting.panels import panel, panels
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.trajectories import ForwardTrajectory, ReverseTrajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # where it is used

DRAWN, GIVEN = "C0", "black"


def samples(x: Any, data: Any = None, *, num_columns: int = 10, title: str | None = None, axes: Any = None) -> Figure:
    """Draws of a model, beside data where given.

    Points of two dimensions are scattered, images are tiled in a square as :func:`images` does, and all else
    (sequences) are rows of a raster. Tables of more than two columns are seen better by :func:`pairs`.

    :param x: draws of shape ``(N, *event_shape)``.
    :param data: data to compare with, of the same event shape.
    :param num_columns: images to a row; ``num_columns**2`` are shown.
    :param title: a title for the figure.
    :param axes: axes to draw on: one, or two with data.
    :raises ValueError: if ``x`` is no batch of events.
    """
    shown = [("samples", np.asarray(x))] + ([] if data is None else [("data", np.asarray(data))])
    if shown[0][1].ndim < 2:
        raise ValueError(f"x must have shape (N, *event_shape); got {shown[0][1].shape}")
    figure, axes = panels(axes, 1, len(shown), 4.0)
    for axis, (label, values) in zip(axes[0], shown, strict=True):
        if values.shape[1:] == (2,):
            axis.scatter(*values.T, s=2, linewidths=0, alpha=0.5)
            axis.set_aspect("equal")
        elif values.ndim >= 3:
            first = values[: num_columns**2]
            images(first, num_columns=num_columns, value_range=_value_range(shown[-1][1]), ax=axis)
        else:
            axis.imshow(values[: 3 * num_columns], cmap="gray_r", interpolation="nearest", aspect="auto")
            axis.set_xlabel("position")
            axis.set_ylabel("draw")
        axis.set_title(label)
    if len(shown) == 2 and shown[0][1].shape[1:] == (2,):
        axes[0][0].set_xlim(axes[0][1].get_xlim())
        axes[0][0].set_ylim(axes[0][1].get_ylim())
    if title:
        figure.suptitle(title)
    return figure


def images(
    x: Any,
    *,
    num_columns: int = 10,
    value_range: tuple[float, float] | None = None,
    title: str | None = None,
    ax: Any = None,
) -> Figure:
    """Images as images: tiles in reading order, a pixel apart, grey or in color.

    :param x: shape ``(N, height, width)``, or with a last axis of one channel or three.
    :param num_columns: images to a row.
    :param value_range: what is black, and what is white. By default 0 and 255 for integers in color, 0 and 1 for colors
        between them, and else the least and the greatest of ``x``.
    :param title: a title for the axes.
    :param ax: axes to draw on.
    :raises ValueError: if ``x`` has another shape, if ``num_columns`` is below 1, or if the range is empty.

    **Example:**

    .. doctest::

        >>> import numpy as np
        >>> import pp_diffusion as ppd
        >>> figure = ppd.plotting.images(np.eye(8)[None].repeat(6, 0), num_columns=3)
        >>> figure.axes[0].images[0].get_array().shape  # two rows of three, with frames
        (20, 30)
    """
    values = np.asarray(x)
    if values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[-1] not in (1, 3)) or not len(values):
        raise ValueError(f"x must have shape (N, height, width), with 1 or 3 channels last or none; got {values.shape}")
    if num_columns < 1:
        raise ValueError(f"num_columns must be at least 1; got {num_columns}")
    low, high = _value_range(values) if value_range is None else value_range
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high; got {value_range}")
    if values.shape[3:] == (1,):
        values = values[..., 0]
    shown = _tile(np.clip((values - low) / (high - low), 0.0, 1.0), num_columns)
    height, width = shown.shape[:2]
    figure, axis = panel(ax)
    if ax is None:  # the paper of the tiles' form
        figure.set_size_inches(4.0, min(max(4.0 * height / width, 0.8), 8.0) + (0.3 if title else 0.0))
    axis.imshow(shown, cmap="gray", interpolation="nearest", vmin=0.0, vmax=1.0)
    axis.set_axis_off()
    if title:
        axis.set_title(title)
    return figure


def pairs(
    x: Any,
    data: Any = None,
    *,
    names: Sequence[str] | None = None,
    labels: tuple[str, str] = ("drawn", "data"),
    num_points: int = 1000,
    axes: Any = None,
) -> Figure:
    """Draws of a table beside data, by pairs of columns: each column's histogram, and below it its scatter with each
    later one.

    Histograms are of all rows, as densities. Missing values (NaN) are left out.

    :param x: draws of shape ``(N, D)``: of a prior, or a posterior's.
    :param data: data to compare with, ``D`` columns.
    :param names: the columns' names; by default those of a data frame, ``data`` or ``x``, and else ``x[0]``, ….
    :param labels: what draws and data are called.
    :param num_points: at most so many rows of each are scattered, the first ones.
    :param axes: ``D * D`` axes to draw on, as ``plt.subplots(D, D)`` gives them.
    :raises ValueError: if ``x`` or ``data`` is no table, or if columns or names are not as many.

    **Example:**

    .. doctest::

        >>> import numpy as np
        >>> import pp_diffusion as ppd
        >>> rng = np.random.default_rng(0)
        >>> figure = ppd.plotting.pairs(rng.normal(size=(500, 2)), rng.normal(size=(30, 2)), names=["width", "height"])
        >>> figure.axes[2].get_xlabel(), figure.axes[2].get_ylabel()
        ('width', 'height')
    """
    tables = [np.asarray(values, np.float64) for values in (x, *([] if data is None else [data]))]
    if tables[0].ndim != 2 or not tables[0].size:
        raise ValueError(f"x must be a table of shape (N, D); got {tables[0].shape}")
    count = tables[0].shape[1]
    if tables[-1].ndim != 2 or tables[-1].shape[1] != count:
        raise ValueError(f"data must have the {count} columns of x; got shape {tables[-1].shape}")
    if names is None:
        named = getattr(data, "columns", getattr(x, "columns", None))
        names = [f"x[{i}]" for i in range(count)] if named is None else [str(name) for name in named]
    if len(names) != count:
        raise ValueError(f"names must be {count}, one for each column; got {len(names)}: {list(names)}")
    figure, axes = panels(axes, count, count, max(1.3, min(2.2, 9.0 / count)))
    limits = [_limits([table[:, i] for table in tables]) for i in range(count)]
    for row in range(count):
        for column in range(count):
            axis = axes[row, column]
            if column > row:
                axis.set_axis_off()
                continue
            if column == row:
                _histograms(axis, [table[:, row] for table in tables], limits[row])
                axis.set_yticks([])
            else:
                for table, style in zip(tables, _scatters(len(tables[0])), strict=False):
                    axis.scatter(table[:num_points, column], table[:num_points, row], linewidths=0, **style)
                axis.set_ylim(limits[row])
                axis.locator_params(axis="y", nbins=4)
            axis.set_xlim(limits[column])
            axis.locator_params(axis="x", nbins=4)
            axis.tick_params(labelsize=8, labelbottom=row == count - 1, labelleft=column == 0)
            if row == count - 1:
                axis.set_xlabel(names[column])
            if column == 0 and row > 0:
                axis.set_ylabel(names[row])
    if data is not None:
        _legend(axes, labels)
    figure.align_labels()
    return figure


def trajectories(
    rng_key: Array, prior: DiffusionPrior, data: Any, *, num_points: int = 2000, axes: Any = None
) -> Figure:
    r"""The paper's figure 1, for data of two dimensions: slices of the forward trajectory at t = 0, T/2 and T, the same
    of the reverse trajectory, and the drift :math:`f_\mu(x_t, t) - x_t`.

    In the model's space.

    :param rng_key: a JAX random key.
    :param prior: the trained diffusion.
    :param data: data in data units, shape ``(N, 2)``.
    :param num_points: points in each slice.
    :param axes: nine axes to draw on.
    :raises ValueError: if the data are not two-dimensional.
    """
    if prior.event_shape != (2,) or prior.kernel.is_discrete:
        raise ValueError(f"trajectories draws diffusions of event shape (2,); got {prior.event_shape}")
    forward_key, reverse_key, last_key = jax.random.split(rng_key, 3)
    process = prior.process
    kernel, rates = process.kernel, process.rates
    z = prior.space.to_model(prior.space.check(data, "data")[:num_points])
    forward = ForwardTrajectory(kernel, rates, z).sample(forward_key)
    reverse = ReverseTrajectory(kernel, rates, process, batch_shape=(num_points,)).sample(reverse_key)
    last = process.last(reverse[:, 0]).sample(last_key)
    shown = [0, max(1, process.num_timesteps // 2), process.num_timesteps]
    figure, axes = panels(axes, 3, 3, 2.6)
    limit = 3.0
    for column, t in enumerate(shown):
        for row, (label, start, path) in enumerate((("forward", z, forward), ("reverse", last, reverse))):
            points = np.asarray(start if t == 0 else path[:, t - 1])
            axes[row][column].scatter(*points.T, s=1.5, linewidths=0, alpha=0.6)
            axes[row][column].set_title(f"{label}, t = {t}", fontsize=9)
        _draw_drift(axes[2][column], process, max(t, process.first_network_step + 1), limit)
    for axis in axes.flat:
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    return figure


def _draw_drift(axis: Any, process: Any, t: int, limit: float) -> None:
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(-limit, limit, 15)] * 2), -1).reshape(-1, 2)
    step = process.rates.at(min(t, process.num_timesteps) - 1)
    drift = np.asarray(process(grid, step).mean - grid)
    axis.quiver(*np.asarray(grid).T, *drift.T, angles="xy", width=0.005)
    axis.set_title(f"drift $f_\\mu - x_t$, t = {int(step.t)}", fontsize=9)


def _value_range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if values.shape[3:] == (3,):
        if np.issubdtype(values.dtype, np.integer) and low >= 0 and high <= 255:
            return 0.0, 255.0
        if low >= 0 and high <= 1:
            return 0.0, 1.0
    return low, high if high > low else low + 1.0


def _tile(images: np.ndarray, num_columns: int) -> np.ndarray:
    """Images between 0 and 1 row by row, each with a white frame; the last row is filled with white."""
    columns = min(num_columns, len(images))
    rows = -(-len(images) // columns)
    edge = [(1, 1), (1, 1), *[(0, 0)] * (images.ndim - 3)]
    images = np.pad(images, [(0, rows * columns - len(images)), *edge], constant_values=1.0)
    height, width = images.shape[1:3]
    shown = images.reshape(rows, columns, *images.shape[1:])
    return np.moveaxis(shown, 2, 1).reshape(rows * height, columns * width, *images.shape[3:])


def _limits(columns: list[np.ndarray]) -> tuple[float, float]:
    """Of one column: all of the data, and of the draws all but their far tails."""
    drawn, *given = [column[np.isfinite(column)] for column in columns]
    ends = np.concatenate([*(np.quantile(drawn, [0.002, 0.998])[None] if len(drawn) else []), *given])
    if not len(ends):
        return 0.0, 1.0
    margin = 0.04 * float(np.ptp(ends)) or 0.5
    return float(ends.min()) - margin, float(ends.max()) + margin


def _histograms(axis: Any, columns: list[np.ndarray], limits: tuple[float, float]) -> None:
    styles: tuple[dict[str, Any], ...] = ({"color": DRAWN, "alpha": 0.5}, {"color": GIVEN, "histtype": "step"})
    for column, style in zip(columns, styles, strict=False):
        inside = column[(column >= limits[0]) & (column <= limits[1])]  # also without NaN
        if len(inside):
            count = int(np.clip(2 * len(inside) ** (1 / 3), 6, 30))  # Rice's rule
            axis.hist(inside, np.linspace(*limits, count + 1), density=True, **style)


def _scatters(num_drawn: int) -> tuple[dict[str, Any], dict[str, Any]]:
    alpha = 0.25 if num_drawn > 300 else 0.6
    return {"s": 4, "color": DRAWN, "alpha": alpha}, {"s": 7, "color": GIVEN, "alpha": 0.8}


def _legend(axes: Any, labels: tuple[str, str]) -> None:
    """Beside the first histogram, where nothing is drawn."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker="o", color=color, label=label)
        for color, label in zip((DRAWN, GIVEN), labels, strict=True)
    ]
    place = axes[0, min(1, len(axes) - 1)]
    place.legend(handles=handles, loc="upper left" if len(axes) > 1 else "best", frameon=False)
