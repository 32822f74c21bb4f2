"""Figures of the estimates: entropies between their bounds, k-hat, and what more trajectories change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pp_diffusion.entropies import EntropyBounds, ReverseEntropy
from pp_diffusion.likelihood import LogProbEstimate
from pp_diffusion.plotting.panels import panel, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def entropies(bounds: EntropyBounds, entropy: ReverseEntropy, *, axes: Any = None) -> Figure:
    """The model's entropy of each step between its bounds (eq. 24), and all three less the upper one; steps outside
    are marked.

    :param bounds: what :func:`~pp_diffusion.entropy_bounds` returned.
    :param entropy: what :func:`~pp_diffusion.reverse_entropy` returned.
    :param axes: two axes to draw on.
    """
    t, outside = np.arange(1, len(bounds.upper) + 1), bounds.outside(entropy)
    figure, axes = panels(axes, 1, 2, 4.0)
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


def pareto_k(estimate: LogProbEstimate, *, ax: Any = None) -> Figure:
    """k-hat over the data, coloured by verdict.

    :param estimate: what :func:`~pp_diffusion.estimate_log_prob` returned.
    :param ax: axes to draw on.
    """
    khat, verdict = estimate.pareto_k.ravel(), estimate.verdict.ravel()
    datum = np.arange(khat.size)
    figure, axis = panel(ax)
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


def convergence(estimate: LogProbEstimate, exact: Any = None, *, ax: Any = None) -> Figure:
    """The mean over the data of log p as estimated from the first 1, 2, 4, … trajectories, beside K.

    The log of a mean is biased low, the less the more trajectories there are.

    :param estimate: what :func:`~pp_diffusion.estimate_log_prob` returned.
    :param exact: log p where it is known, of the data's batch shape, nats.
    :param ax: axes to draw on.
    """
    count = estimate.num_trajectories
    log_sums = np.logaddexp.accumulate(estimate.log_weights.reshape(count, -1), axis=0)
    numbers = np.unique(np.append(2 ** np.arange(int(np.log2(count)) + 1), count))
    values = log_sums[numbers - 1] - np.log(numbers)[:, None]
    against = estimate.bound.ravel()  # paired, so that the spread over the data drops out
    with np.errstate(invalid="ignore"):  # trajectories without any weight
        gains = values - against
        mean, error = gains.mean(1), gains.std(1) / np.sqrt(gains.shape[1])
    figure, axis = panel(ax)
    axis.errorbar(numbers, mean, error, marker=".", capsize=2, label="log p, as estimated")
    axis.axhline(0, color="C1", label="K")
    if exact is not None:
        truth = (np.asarray(exact).ravel() - against).mean()
        axis.axhline(truth, color="k", ls="--", lw=0.8, label="log p of the data's own law")
    axis.set(xscale="log", xlabel="trajectories per datum", ylabel="above K, mean over the data (nats)")
    axis.legend()
    return figure
