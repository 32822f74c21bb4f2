"""Learned schedules against fixed ones on the swiss roll, beside the best schedule that there is.

T = 40, the same network, updates and seeds for all: constant erasure (the paper's 1/(T-t+1), whose own beta_1 is 1/T,
and the same behind the others' beta_1), log-linear with its end tuned too, learned. Then T = 1000, where the paper's
footnote 2 calls constant erasure "just as effective". And squared errors of f_mu in place of the bound, with the best
of the fixed schedules; they leave the variances at beta_t, which costs K too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import pp_diffusion as ppd
from examples import gap, optimum
from examples.report import arguments, mean_and_error, print_table, save_figure

KERNEL = ppd.GaussianKernel((2,))
FIRST_BETA, ENDS = 3e-4, (-6.0, -4.0, -3.0, -2.0, -1.25, -0.5, 0.0, 0.5)
SHORT, LONG = 40, 1000


class Trained(NamedTuple):
    """One training: the gap of K in bits, the prior, seconds without compiling."""

    gap: float
    prior: Any
    seconds: float


def erasure_behind(num_timesteps: int, first_beta: float) -> ppd.FixedSchedule:
    """beta_1, then steps that each erase the same share of what is left of the signal."""
    alpha_bar = (1 - first_beta) * np.linspace(1, 0, num_timesteps)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
    return ppd.FixedSchedule.from_log_snr(log_snr)


def run(
    *,
    num_steps: int = 3_000,
    long_steps: int = 15_000,
    num_seeds: int = 3,
    num_test: int = 5_000,
    ends: Sequence[float] = ENDS,
    num_long: int = 3,
    grid: int = 240,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains all of them, prints the table, draws the schedules.

    :param num_long: how many of the schedules of T = 1000, the learned one first.
    :param grid: of log-SNRs among which the best schedule is sought.
    :return: mean gap of K over the seeds in bits, and its standard error over them, by schedule.
    """
    data = ppd.datasets.swiss_roll(jax.random.key(0), 50_000, num_test)
    transform = ppd.standardize(data.train)

    def train(schedule: ppd.Schedule, seed: int, steps: int = num_steps, objective: Any = "bound") -> Trained:
        diffusion = ppd.Diffusion(KERNEL, schedule, ppd.networks.MLP(), transform=transform)
        num_times = 4 if schedule.num_timesteps == SHORT else 2
        fit = partial(ppd.fit, jax.random.key(seed), diffusion, data.train, num_times=num_times, objective=objective)
        fit = partial(fit, val_prop=0.0)  # the law of the data is known, and there are enough of them
        fit(num_steps=1, progress_bar=False)  # compiles
        started = time.perf_counter()
        prior = fit(num_steps=steps, progress_bar=progress).prior
        seconds = time.perf_counter() - started
        return Trained(gap.of_bound(jax.random.key(100), prior, data).value, prior, seconds)

    def row(name: str, objective: str, trained: list[Trained]) -> tuple[str, ...]:
        values = [one.gap for one in trained]
        value, error = mean_and_error(values) if len(values) > 1 else (values[0], float("nan"))
        label = name if trained[0].prior.num_timesteps == SHORT else f"{name}, T={LONG}"
        results[label if objective == "bound" else objective] = value, error
        rates, seconds = trained[0].prior.process.rates, float(np.median([one.seconds for one in trained]))
        cells = (f"{float(rates.beta[0]):.2g}", objective, f"{len(values)}", f"{seconds:.1f}")
        shown = f"{value:.4f}" + (f" ± {error:.4f}" if len(values) > 1 else "")
        return (label, *cells, shown, f"{float(rates.log_snr[-1]):.2f}")

    def log_linear(end: float) -> ppd.FixedSchedule:
        return ppd.FixedSchedule.log_linear(SHORT, FIRST_BETA, end)

    results: dict[str, tuple[float, float]] = {}
    tuned = {end: train(log_linear(end), 0).gap for end in ends}
    best_end = min(tuned, key=lambda end: tuned[end])
    schedules = {
        "constant erasure": ppd.FixedSchedule.constant_erasure(SHORT),
        "constant erasure behind beta_1": erasure_behind(SHORT, FIRST_BETA),
        "log-linear to -6": log_linear(-6.0),
        f"log-linear to {best_end:g} (tuned)": log_linear(best_end),
        "learned": ppd.LearnedSchedule(SHORT, FIRST_BETA),
    }
    rows, priors = [], {}
    for name, schedule in schedules.items():
        trained = [train(schedule, seed) for seed in range(1, 1 + num_seeds)]
        priors[name] = trained[0].prior
        rows.append(row(name, "bound", trained))
    rows.append(row(f"log-linear to {best_end:g} (tuned)", "mse", [train(log_linear(best_end), 1, objective="mse")]))
    best = optimum.best_schedule(jax.random.key(9), data.train[: 12 * grid], transform, SHORT, FIRST_BETA, grid=grid)
    process = optimum.best_process(best, transform)
    floor = gap.of_bound(jax.random.key(100), process, data, num_samples=8)
    results["best"] = floor.value, floor.error
    end = f"{float(best.log_snr()[-1]):.2f}"
    rows.append(("best (exact, on a grid)", f"{FIRST_BETA:.2g}", "", "", "", f"{floor.value:.4f}", end))
    long = (
        ("learned", ppd.LearnedSchedule(LONG, 1 / LONG)),
        ("log-linear to -7", ppd.FixedSchedule.log_linear(LONG, 1 / LONG, -7.0)),
        ("constant erasure", ppd.FixedSchedule.constant_erasure(LONG)),
    )
    for name, schedule in reversed(long[:num_long]):
        rows.append(row(name, "bound", [train(schedule, 1, long_steps)]))
    columns = ("beta_1", "objective", "seeds", "seconds", "gap of K (bits)", "last log-SNR")
    print_table(f"Swiss roll, T = {SHORT} where not said otherwise; ± over seeds", columns, rows)
    print("tuning the end: " + ", ".join(f"{end:g}: {value:.4f}" for end, value in tuned.items()))
    save_figure(_figure(priors, best), figures, "schedules.png")
    return results


def _figure(priors: dict[str, Any], best: ppd.FixedSchedule) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    betas, levels = figure.subplots(1, 2)
    curves = {name: prior.process.rates for name, prior in priors.items()} | {"best (exact)": best.rates()}
    for name, rates in curves.items():
        style: dict[str, Any] = {"color": "black", "ls": "--"} if "best" in name else {}
        betas.plot(rates.t, rates.beta, label=name, **style)
        levels.plot(rates.t, np.where(np.isfinite(rates.log_snr), rates.log_snr, np.nan), label=name, **style)
    betas.set(xlabel="t", ylabel=r"$\beta_t$", yscale="log")
    levels.set(xlabel="t", ylabel=r"$\lambda_t$ (log-SNR)")
    levels.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"num_steps": 5, "long_steps": 5, "num_seeds": 2, "num_test": 10}
        size |= {"ends": ENDS[:2], "num_long": 1, "grid": 60}
    run(**size, figures=args.figures, progress=args.progress)
