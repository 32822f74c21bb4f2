"""What figures are drawn on: axes that are given, or those of a figure that a notebook shows by itself."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # where it is used


def panel(ax: Any, size: float = 4.0) -> tuple[Figure, Any]:
    """A figure and its axes: ``ax``, or new ones of ``size`` inches.

    :raises TypeError: if ``ax`` is no axes of matplotlib.
    """
    if ax is None:
        figure, axes = panels(None, 1, 1, size)
        return figure, axes[0, 0]
    _check(ax, "ax")
    return _root(ax), ax


def panels(axes: Any, rows: int, columns: int, size: float) -> tuple[Figure, Any]:
    """A figure and axes of shape ``(rows, columns)``: those given, in any nesting, or new ones of ``size`` inches each.

    :raises ValueError: if ``axes`` are not so many.
    :raises TypeError: if one of them is no axes of matplotlib.
    """
    if axes is not None:
        given = np.array(axes, dtype=object)
        if given.size != rows * columns:
            raise ValueError(f"axes must be {rows * columns} ({rows} × {columns}); got {given.size}")
        for ax in given.flat:
            _check(ax, "axes")
        return _root(given.flat[0]), given.reshape(rows, columns)
    # a figure of its own, without pyplot's global state and back ends
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * columns, size * rows), layout="constrained", dpi=120)
    vars(figure)["_repr_png_"] = partial(_png, figure)  # what a notebook shows, with or without pyplot
    return figure, figure.subplots(rows, columns, squeeze=False)


def _check(ax: Any, name: str) -> None:
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise TypeError(f"{name} must be of matplotlib.axes.Axes; got {type(ax).__name__}")


def _root(ax: Any) -> Figure:
    """The figure, also of axes in a figure's part."""
    figure = ax.figure
    while figure is not figure.figure:
        figure = figure.figure
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
