"""Figures: samples, the paper's figure 1, losses, entropies, likelihoods; each drawn with matplotlib and returned.

A notebook shows what is returned, whether pyplot has been imported or not."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.entropies import EntropyBounds, ReverseEntropy
from pp_diffusion.likelihood import LogProbEstimate
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.trajectories import ForwardTrajectory, ReverseTrajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # where it is used


def samples(x: Any, data: Any = None, *, num_columns: int = 10, title: str | None = None) -> Figure:
    """Draws of a model, beside data where given.

    Points of two dimensions are scattered, images are tiled in a square, and all else (sequences) are rows of a raster.

    :param x: draws of shape ``(N, *event_shape)``.
    :param data: data to compare with, of the same event shape.
    :param num_columns: images to a row; ``num_columns**2`` are shown.
    :param title: a title for the figure.
    :raises ValueError: if ``x`` is no batch of events.
    """
    panels = [("samples", np.asarray(x))] + ([] if data is None else [("data", np.asarray(data))])
    if panels[0][1].ndim < 2:
        raise ValueError(f"x must have shape (N, *event_shape); got {panels[0][1].shape}")
    figure, axes = _subplots(1, len(panels), 4.0)
    low, high = panels[-1][1].min(), panels[-1][1].max()  # one grey scale, the data's
    for axis, (label, values) in zip(axes[0], panels, strict=True):
        axis.set_title(label)
        if values.shape[1:] == (2,):
            axis.scatter(*values.T, s=2, linewidths=0, alpha=0.5)
            axis.set_aspect("equal")
        elif values.ndim >= 3:
            axis.imshow(_tile(values, num_columns), cmap="gray", interpolation="nearest", vmin=low, vmax=high)
            axis.set_axis_off()
        else:
            axis.imshow(values[: 3 * num_columns], cmap="gray_r", interpolation="nearest", aspect="auto")
            axis.set_xlabel("position")
            axis.set_ylabel("draw")
    if len(panels) == 2 and panels[0][1].shape[1:] == (2,):
        axes[0][0].set_xlim(axes[0][1].get_xlim())
        axes[0][0].set_ylim(axes[0][1].get_ylim())
    if title:
        figure.suptitle(title)
    return figure


def trajectories(rng_key: Array, prior: DiffusionPrior, data: Any, *, num_points: int = 2000) -> Figure:
    r"""The paper's figure 1, for data of two dimensions: slices of the forward trajectory at t = 0, T/2 and T, the same
    of the reverse trajectory, and the drift :math:`f_\mu(x_t, t) - x_t`.

    In the model's space.

    :param rng_key: a JAX random key.
    :param prior: the trained diffusion.
    :param data: data in data units, shape ``(N, 2)``.
    :param num_points: points in each slice.
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
    figure, axes = _subplots(3, 3, 2.6)
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


def losses(result: Any, *, window: int = 100) -> Figure:
    """The objective over training (the bound K, unless trained otherwise): each update's batch, a running mean, and
    the held-out rows where there are some, with the updates whose parameters are returned.

    :param result: what :func:`~pp_diffusion.fit` returned.
    :param window: updates in the running mean.
    """
    is_bound = getattr(result, "objective", "bound") == "bound"  # or an SVI result
    bound = -np.asarray(result.losses) if is_bound else np.asarray(result.losses)
    figure, axes = _subplots(1, 1, 4.0)
    axis = axes[0][0]
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


def loss_by_time(result: Any, *, num_bins: int = 20) -> Figure:
    """What each time step takes from K of the held-out rows, at the first evaluation, the best and the last; steps in
    bins of equal width, each with the mean of its steps.

    Beside it, all evaluations: how the cost of each bin fell, or rose again.

    :param result: what :func:`~pp_diffusion.fit` returned, with held-out rows.
    :param num_bins: at most so many.
    :raises ValueError: where no rows were held out.
    """
    held_out = getattr(result, "validation", None)
    if held_out is None or not len(held_out.steps):
        raise ValueError("result must have held-out rows: fit(..., val_prop=0.1) or validation_data")
    num_steps = held_out.per_step.shape[1]
    edges = np.unique(np.linspace(0, num_steps, min(num_bins, num_steps) + 1).astype(int))
    means = np.add.reduceat(held_out.per_step, edges[:-1], axis=1) / np.diff(edges)
    centres = (edges[:-1] + 1 + edges[1:]) / 2
    figure, axes = _subplots(1, 2, 4.0)
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


def entropies(bounds: EntropyBounds, entropy: ReverseEntropy) -> Figure:
    """The model's entropy of each step between its bounds (eq. 24), and all three less the upper one; steps outside
    are marked.

    :param bounds: what :func:`~pp_diffusion.entropy_bounds` returned.
    :param entropy: what :func:`~pp_diffusion.reverse_entropy` returned.
    """
    t, outside = np.arange(1, len(bounds.upper) + 1), bounds.outside(entropy)
    figure, axes = _subplots(1, 2, 4.0)
    for axis, origin in zip(axes[0], (0, bounds.upper), strict=True):
        axis.fill_between(t, bounds.lower - origin, bounds.upper - origin, alpha=0.25, lw=0, label="between the bounds")
        axis.plot(t, entropy.value - origin, color="k", lw=1, label="model")
        if len(outside):
            marked = (entropy.value - origin)[outside - 1]
            axis.plot(outside, marked, "x", color="C3", ms=4, label=f"outside: {len(outside)} steps")
        axis.set(xlabel="t", xscale="log")
    axes[0][0].set(ylabel="entropy of $x_{t-1}$ given $x_t$ (nats)")
    axes[0][1].set(ylabel="less the upper bound (nats)")
    finite = np.isfinite(bounds.lower)  # not t = 1 of continuous data
    if finite.any():
        low = float(np.quantile((bounds.lower - bounds.upper)[finite], 0.05))
        lowest = min(low, float((entropy.value - bounds.upper)[finite].min()))
        axes[0][1].set_ylim(1.1 * lowest, -0.1 * low)
    axes[0][0].legend()
    return figure


def pareto_k(estimate: LogProbEstimate) -> Figure:
    """k-hat over the data, coloured by verdict.

    :param estimate: what :func:`~pp_diffusion.estimate_log_prob` returned.
    """
    khat, verdict = estimate.pareto_k.ravel(), estimate.verdict.ravel()
    datum = np.arange(khat.size)
    figure, axes = _subplots(1, 1, 4.0)
    axis = axes[0][0]
    for color, name in zip(("C0", "C1", "C3"), ("believable", "doubtful", "bound only"), strict=True):
        chosen = verdict == name
        label = f"{name}: {100 * chosen.mean():.1f} %"
        axis.scatter(datum[chosen], khat[chosen], s=6, color=color, linewidths=0, label=label)
        for sign, marker in ((-1, "v"), (1, "^")):  # no tail, or none that could be fitted: at the edges
            beyond = datum[chosen & np.isinf(khat) & (np.sign(khat) == sign)]
            if len(beyond):
                place = np.full(len(beyond), 0.01 if sign < 0 else 0.99)
                axis.scatter(beyond, place, s=12, color=color, marker=marker, transform=axis.get_xaxis_transform())
    axis.axhline(0.7, color="k", lw=0.7, ls="--")
    axis.axhline(estimate.good_k, color="k", lw=0.7, ls=":")
    axis.set(xlabel="datum", ylabel="Pareto k-hat", title=f"{estimate.num_trajectories} trajectories per datum")
    axis.legend(fontsize=8)
    return figure


def convergence(estimate: LogProbEstimate, exact: Any = None) -> Figure:
    """The mean over the data of log p as estimated from the first 1, 2, 4, … trajectories, beside K.

    The log of a mean is biased low, the less the more trajectories there are.

    :param estimate: what :func:`~pp_diffusion.estimate_log_prob` returned.
    :param exact: log p where it is known, of the data's batch shape, nats.
    """
    count = estimate.num_trajectories
    log_sums = np.logaddexp.accumulate(estimate.log_weights.reshape(count, -1), axis=0)
    numbers = np.unique(np.append(2 ** np.arange(int(np.log2(count)) + 1), count))
    values = log_sums[numbers - 1] - np.log(numbers)[:, None]
    against = estimate.bound.ravel()  # paired, so that the spread over the data drops out
    with np.errstate(invalid="ignore"):  # trajectories without any weight
        gains = values - against
        mean, error = gains.mean(1), gains.std(1) / np.sqrt(gains.shape[1])
    figure, axes = _subplots(1, 1, 4.0)
    axis = axes[0][0]
    axis.errorbar(numbers, mean, error, marker=".", capsize=2, label="log p, as estimated")
    axis.axhline(0, color="C1", label="K")
    if exact is not None:
        truth = (np.asarray(exact).ravel() - against).mean()
        axis.axhline(truth, color="k", ls="--", lw=0.8, label="log p of the data's own law")
    axis.set(xscale="log", xlabel="trajectories per datum", ylabel="above K, mean over the data (nats)")
    axis.legend()
    return figure


def _draw_drift(axis: Any, process: Any, t: int, limit: float) -> None:
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(-limit, limit, 15)] * 2), -1).reshape(-1, 2)
    step = process.rates.at(min(t, process.num_timesteps) - 1)
    drift = np.asarray(process(grid, step).mean - grid)
    axis.quiver(*np.asarray(grid).T, *drift.T, angles="xy", width=0.005)
    axis.set_title(f"drift $f_\\mu - x_t$, t = {int(step.t)}", fontsize=9)


def _borders(places: np.ndarray) -> np.ndarray:
    """Of cells about these places."""
    inner = (places[1:] + places[:-1]) / 2
    return np.concatenate([[0.0], inner, [2 * places[-1] - (inner[-1] if len(inner) else 0.0)]])


def _subplots(rows: int, columns: int, size: float) -> Any:
    # a figure of its own, without pyplot's global state and back ends
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * columns, size * rows), layout="constrained", dpi=120)
    vars(figure)["_repr_png_"] = partial(_png, figure)  # what a notebook shows, with or without pyplot
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _tile(images: np.ndarray, num_columns: int) -> np.ndarray:
    """Images in a square, a pixel apart."""
    edge = [(0, 0), (1, 1), (1, 1), *[(0, 0)] * (images.ndim - 3)]
    images = np.pad(images, edge, constant_values=images.max())
    height, width = images.shape[1:3]
    rows = max(1, min(num_columns, len(images) // num_columns))
    columns = min(num_columns, len(images))
    shown = images[: rows * columns].reshape(rows, columns, *images.shape[1:])
    return np.moveaxis(shown, 2, 1).reshape(rows * height, columns * width, *images.shape[3:])
