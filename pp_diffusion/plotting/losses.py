"""Training: the objective by update, the held-out rows, and what each time step costs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pp_diffusion.plotting.panels import panel, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def losses(result: Any, *, window: int = 100, ax: Any = None) -> Figure:
    """The objective over training (the bound K, unless trained otherwise): each update's batch, a running mean, and
    the held-out rows where there are some, with the updates whose parameters are returned.

    :param result: what :func:`~pp_diffusion.fit` returned.
    :param window: updates in the running mean.
    :param ax: axes to draw on.
    """
    is_bound = getattr(result, "objective", "bound") == "bound"  # or an SVI result
    bound = -np.asarray(result.losses) if is_bound else np.asarray(result.losses)
    figure, axis = panel(ax)
    axis.plot(np.arange(1, len(bound) + 1), bound, lw=0.3, alpha=0.4, label="one batch")
    if len(bound) >= window:
        mean = np.convolve(bound, np.ones(window) / window, mode="valid")
        axis.plot(np.arange(window, len(bound) + 1), mean, label=f"mean of {window}")
    limits = np.nanquantile(bound, [0.02, 1.0] if is_bound else [0.0, 0.98])
    if (held_out := getattr(result, "validation", None)) is not None and len(held_out.steps):
        values = held_out.values if is_bound else -held_out.values
        axis.plot(held_out.steps, values, color="C3", marker=".", label="held-out rows")
        axis.axvline(held_out.best_step, color="C3", lw=0.7, ls="--")
        last = values[held_out.steps <= held_out.best_step]
        limits = min(limits[0], last.min()), max(limits[1], last.max())
    axis.set(xlabel="update", ylabel="K (nats)" if is_bound else "squared error", ylim=tuple(limits))
    axis.legend()
    return figure


def loss_by_time(result: Any, *, num_bins: int = 20, axes: Any = None) -> Figure:
    """What each time step takes from K of the held-out rows, at the first evaluation, the best and the last; steps in
    bins of equal width, each with the mean of its steps.

    Beside it, all evaluations: how the cost of each bin fell, or rose again.

    :param result: what :func:`~pp_diffusion.fit` returned, with held-out rows.
    :param num_bins: at most so many.
    :param axes: two axes to draw on.
    :raises ValueError: where no rows were held out.
    """
    held_out = getattr(result, "validation", None)
    if held_out is None or not len(held_out.steps):
        raise ValueError("result must have held-out rows: fit(..., val_prop=0.1) or validation_data")
    num_steps = held_out.per_step.shape[1]
    edges = np.unique(np.linspace(0, num_steps, min(num_bins, num_steps) + 1).astype(int))
    means = np.add.reduceat(held_out.per_step, edges[:-1], axis=1) / np.diff(edges)
    centres = (edges[:-1] + 1 + edges[1:]) / 2
    figure, axes = panels(axes, 1, 2, 4.0)
    best = int(np.searchsorted(held_out.steps, held_out.best_step))
    for index, label in {0: "first", best: "best", len(means) - 1: "last"}.items():
        axes[0][0].plot(centres, means[index], marker=".", label=f"{label}: {held_out.steps[index]} updates")
    axes[0][0].set(xlabel="t", ylabel="cost of a step (nats)")
    axes[0][0].legend()
    change = means - means[best]
    limit = max(float(np.quantile(np.abs(change), 0.98)), 1e-12)
    mesh = axes[0][1].pcolormesh(
        edges + 0.5, _borders(held_out.steps), change, cmap="coolwarm", vmin=-limit, vmax=limit, shading="flat"
    )
    axes[0][1].axhline(held_out.best_step, color="k", lw=0.7, ls="--")
    axes[0][1].set(xlabel="t", ylabel="update")
    figure.colorbar(mesh, ax=axes[0][1], label="above that of the best (nats)")
    return figure


def _borders(places: np.ndarray) -> np.ndarray:
    """Of cells about these places."""
    inner = (places[1:] + places[:-1]) / 2
    return np.concatenate([[0.0], inner, [2 * places[-1] - (inner[-1] if len(inner) else 0.0)]])
