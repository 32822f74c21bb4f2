"""The log likelihood itself (eq. 9), beside K and the truth, with what tells whether to believe it.

Swiss roll at several T, binary heartbeat, handwritten digits. ``python -m examples.likelihood`` runs all rows (half an
hour on two cores, most of it T = 1000).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import pp_diffusion as ppd
from examples import digits, gap, heartbeat, swiss_roll
from examples.report import arguments, mean_and_error, print_table, save_figure

bits = ppd.units.nats_to_bits


class Fitted(NamedTuple):
    """A trained model and data that it has not seen.

    :ivar exact: log p of the data's own law, where it is known, a function of data.
    """

    prior: ppd.DiffusionPrior
    test: jax.Array
    exact: Callable[[Any], Any] | None = None


def fit_swiss_roll(key: str, num_steps: int | None, num_data: int, progress: bool) -> Fitted:
    data = ppd.datasets.swiss_roll(jax.random.key(0), 50_000, num_data)
    fit, _ = swiss_roll.train(swiss_roll.ROWS[key], data, num_steps, progress=progress)
    assert data.log_prob is not None
    return Fitted(fit.prior, data.test, data.log_prob)


def fit_heartbeat(key: str, num_steps: int | None, num_data: int, progress: bool) -> Fitted:
    """The test data are each of the five sequences once."""
    data = ppd.datasets.heartbeat(jax.random.key(0))
    fit, _ = heartbeat.train(heartbeat.ROWS[key], data, num_steps, progress=progress)
    assert data.log_prob is not None
    test = jax.numpy.unique(data.test, axis=0)[:num_data]
    return Fitted(fit.prior, test, data.log_prob)


def fit_digits(key: str, num_steps: int | None, num_data: int, progress: bool) -> Fitted:
    data = ppd.datasets.digits(jax.random.key(0), num_test=360)
    fit, _ = digits.train(data, num_steps, progress=progress)
    return Fitted(fit.prior, ppd.datasets.dequantize(jax.random.key(1), data.test)[:num_data])


class Row(NamedTuple):
    """One model: how it is trained, on how many data log p is estimated, and by how many trajectories each.

    :ivar num_paired: points for the gap to the exact density, with 48 trajectories each: there the spread over points
        is what counts.
    """

    name: str
    fit: Callable[[str, int | None, int, bool], Fitted]
    key: str
    num_data: int
    num_trajectories: int
    expected: str = ""
    num_paired: int = 0


ROWS = {
    "roll-40": Row("swiss roll, T=40", fit_swiss_roll, "short", 2_000, 1024, "gap .011", 10_000),
    "roll-40-network": Row(
        "swiss roll, T=40, last step by network", fit_swiss_roll, "short-network", 2_000, 1024, "", 10_000
    ),
    "roll-400": Row("swiss roll, T=400", fit_swiss_roll, "middle", 500, 1024, "", 6_000),
    "roll-1000": Row("swiss roll, T=1000", fit_swiss_roll, "long", 300, 1024, "", 4_000),
    "heartbeat": Row("heartbeat, T=2000", fit_heartbeat, "small", 5, 16_384, "log p -2.3312"),
    "heartbeat-network": Row("heartbeat, last step by network", fit_heartbeat, "network", 5, 16_384, "log p -2.3227"),
    "digits": Row("digits, 8×8", fit_digits, "", 360, 256),
}


def run(
    rows: Sequence[str] = tuple(ROWS),
    *,
    num_steps: int | None = None,
    most_data: int | None = None,
    num_trajectories: int | None = None,
    figures: Path,
    progress: bool = True,
) -> dict[str, ppd.LogProbEstimate]:
    """Trains each row, prints the table and what the verdict says, writes the figures; returns the estimates."""
    table, results = [], {}
    for key in rows:
        row = ROWS[key]
        num_data = min(most_data or row.num_data, row.num_data)
        fitted = row.fit(row.key, num_steps, max(num_data, min(most_data or row.num_paired, row.num_paired)), progress)
        prior, test, exact = fitted.prior, fitted.test[:num_data], fitted.exact and fitted.exact(fitted.test[:num_data])
        started = time.perf_counter()
        estimate = ppd.estimate_log_prob(
            jax.random.key(10), prior, test, num_trajectories or row.num_trajectories, progress_bar=progress
        )
        seconds = time.perf_counter() - started
        print(f"\n{row.name}")
        estimate.print_summary(max_rows=3)
        table.append((row.name, *_cells(row, estimate, fitted, exact), f"{seconds:.0f}"))
        _draw(key, row, prior, test, exact, estimate, figures)
        results[key] = estimate
    columns = ("K", "log p", "exact log p", "gap of log p", "ESS/n", "k-hat < .7", "verdict", "best possible", "s")
    print_table("Means over test data; bits (digits: bits per dimension of code length)", columns, table)
    return results


def _cells(row: Row, estimate: ppd.LogProbEstimate, fitted: Fitted, exact: Any) -> tuple[str, ...]:
    if row.fit is fit_digits:
        code_lengths = (ppd.units.bits_per_dim(value, num_dims=64) for value in (estimate.bound, estimate.value))
        values = ["{:.3f} ± {:.3f}".format(*mean_and_error(value)) for value in code_lengths]
        truth = ["", ""]
    elif row.fit is fit_heartbeat:  # the sequences are all there are: no error but the draws'
        errors = (estimate.bound_std_error, estimate.std_error)
        totals = [bits(float(np.sqrt((error**2).sum())) / len(error)) for error in errors]
        values = [
            f"{bits(float(value.mean())):.4f} ± {'unknown' if np.isnan(error) else f'{error:.4f}'}"
            for value, error in zip((estimate.bound, estimate.value), totals, strict=True)
        ]
        difference = bits(float(np.mean(exact - estimate.value)))
        truth = [f"{bits(float(np.mean(exact))):.4f}", f"{difference:.4f}"]
    else:
        data = ppd.datasets.Dataset(fitted.test, fitted.test, fitted.exact)
        values = [f"{bits(float(value.mean())):.4f}" for value in (estimate.bound, estimate.value)]
        paired = gap.of_log_prob(jax.random.key(12), fitted.prior, data, num_trajectories=48)
        truth = [f"{bits(float(np.mean(exact))):.4f}", "{:.4f} ± {:.4f}".format(*paired)]
    share = 100 * float(np.mean(estimate.pareto_k < 0.7))
    ess = float(np.median(estimate.ess)) / estimate.num_trajectories
    return (*values, *truth, f"{ess:.2f}", f"{share:.1f} %", estimate.total_verdict, row.expected)


def _draw(key: str, row: Row, prior: Any, test: Any, exact: Any, estimate: ppd.LogProbEstimate, figures: Path) -> None:
    save_figure(ppd.plotting.pareto_k(estimate), figures, f"likelihood_{key}_khat.png")
    save_figure(ppd.plotting.convergence(estimate, exact), figures, f"likelihood_{key}_convergence.png")
    bounds = ppd.entropy_bounds(prior, test)
    entropy = ppd.reverse_entropy(jax.random.key(11), prior, np.repeat(np.asarray(test), max(1, 500 // len(test)), 0))
    print(f"{row.name}: entropies of the steps")
    bounds.print_summary(entropy)
    save_figure(ppd.plotting.entropies(bounds, entropy), figures, f"likelihood_{key}_entropies.png")


if __name__ == "__main__":
    args = arguments(__doc__, rows=list(ROWS))
    size: dict[str, Any] = {}
    if args.small:
        args.rows = ["roll-40"] if args.rows == list(ROWS) else args.rows
        size = {"num_steps": 5, "most_data": 5, "num_trajectories": 30}
    run(args.rows, **size, figures=args.figures, progress=args.progress)
