"""Regression with a whole density, on a real table: predictive intervals and CRPS, beside least squares.

scikit-learn's diabetes table: the disease's progression of 442 patients, by ten covariates; a quarter is for tests. The
model is in ``models/regression.py``; nothing is set by hand. Least squares predicts a normal about its line, with the
residuals' variance. CRPS is in units of the progression; less is better.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pp_diffusion as ppd
from examples.report import arguments, mean_and_error, print_table, save_figure, with_error
from models import regression as script


def crps(draws: np.ndarray, y: np.ndarray) -> np.ndarray:
    """E|Y − y| − E|Y − Y'|/2 by draws of Y, first axis, for each y."""
    ordered, count = np.sort(draws, 0), len(draws)
    between = (2 * np.arange(1, count + 1) - count - 1) @ ordered.reshape(count, -1) * 2 / (count * (count - 1))
    return np.abs(draws - y).mean(0) - between / 2


def table(seed: int, num_rows: int | None = None) -> tuple[np.ndarray, ...]:
    """Covariates and progression, shuffled: training's and the tests'."""
    from sklearn.datasets import load_diabetes

    context, y = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(seed).permutation(len(y))[:num_rows]
    context, y, rest = context[order], y[order, None], len(order) // 4
    return context[rest:], y[rest:], context[:rest], y[:rest]


def least_squares(context: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, float]:
    """The line at new covariates, and the residuals' standard deviation."""
    ones = [np.column_stack([np.ones(len(c)), c]) for c in (context, new)]
    weights = np.linalg.lstsq(ones[0], y[:, 0], rcond=None)[0]
    residuals = y[:, 0] - ones[0] @ weights
    return ones[1] @ weights, float(np.sqrt((residuals**2).sum() / (len(y) - ones[0].shape[1])))


def run(
    *,
    num_steps: int = 2_000,
    num_splits: int = 5,
    num_draws: int = 1_000,
    num_rows: int | None = None,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains on each split, prints the table, writes the figure of the last one.

    :return: by method, the figures of all tested rows.
    """
    found: dict[str, list[list[np.ndarray]]] = {"diffusion": [[], [], []], "least squares": [[], [], []]}
    for split in range(num_splits):
        context, y, new, truth = table(split, num_rows)
        diffusion = script.diffusion(ppd.standardize(y))
        settings = {"context": context, "num_steps": num_steps, "progress_bar": progress}
        fit = ppd.fit(jax.random.key(split), diffusion, y, **settings)
        draws = np.asarray(fit.prior(new).sample(jax.random.key(100 + split), (num_draws,)))[..., 0]
        bound = np.asarray(ppd.lower_bound(jax.random.key(200), fit.prior(new), jnp.asarray(truth)).value)
        line, sd = least_squares(context, y, new)
        normal = line + sd * np.random.default_rng(split).normal(size=(num_draws, len(new)))
        residual = (truth[:, 0] - line) / sd
        for name, drawn, log_p in (
            ("diffusion", draws, bound),
            ("least squares", normal, -(residual**2) / 2 - np.log(sd * np.sqrt(2 * np.pi))),
        ):
            low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
            covered = (low < truth[:, 0]) & (truth[:, 0] < high)
            for values, value in zip(found[name], (crps(drawn, truth[:, 0]), covered, log_p), strict=True):
                values.append(value)
    pooled = {name: [np.concatenate(values) for values in figures_] for name, figures_ in found.items()}
    rows = []
    for name, (score, covered, log_p) in pooled.items():
        share, error = mean_and_error(covered)
        kind = "K" if name == "diffusion" else "log p"
        rows.append(
            (name, with_error(score, 2), f"{100 * share:.1f} ± {100 * error:.1f} %", f"{with_error(log_p)} ({kind})")
        )
    difference = pooled["diffusion"][0] - pooled["least squares"][0]
    print_table(
        f"Diabetes, {num_splits} splits of {len(context)} rows and {len(truth)} tests, {num_steps} updates",
        ("CRPS", "90 % intervals hold", "nats"),
        rows,
    )
    print(f"CRPS of the diffusion less that of least squares, row by row: {with_error(difference, 2)}")
    save_figure(_figure(draws, normal, truth[:, 0]), figures, "regression.png")
    return pooled


def _figure(draws: np.ndarray, normal: np.ndarray, truth: np.ndarray) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), (("diffusion", draws), ("least squares", normal)), strict=True)
    for axes, (title, drawn) in panels:
        low, middle, high = np.quantile(drawn, [0.05, 0.5, 0.95], axis=0)
        order = np.argsort(middle)
        place = np.arange(len(order))
        axes.fill_between(place, low[order], high[order], alpha=0.25, linewidth=0, label="90 % interval")
        axes.plot(place, middle[order], linewidth=1, label="median")
        axes.plot(place, truth[order], ".", color="black", markersize=3, label="truth")
        axes.set(title=title, xlabel="patients, by their median")
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Progression of diabetes: tested patients")
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size = {"num_steps": 20, "num_splits": 1, "num_draws": 50, "num_rows": 80} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
