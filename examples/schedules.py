"""Learned schedules against fixed ones on the swiss roll, beside the best schedule that there is.

T = 40, the same network, updates and seeds for all: constant erasure (the paper's 1/(T-t+1)), log-linear with its end
tuned too, learned. Then T = 1000, where the paper's footnote 2 calls constant erasure "just as effective". And the mean
squared error of later practice in place of the bound, with the best of the fixed schedules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import pp_diffusion as ppd
from examples import gap, optimum
from examples.report import arguments, mean_and_error, print_table, save_figure

KERNEL = ppd.GaussianKernel((2,))
FIRST_BETA, ENDS = 3e-4, (-6.0, -4.0, -3.0, -2.0, -1.25, -0.5)
SHORT, LONG = 40, 1000


def run(
    *,
    num_steps: int = 3_000,
    long_steps: int = 15_000,
    num_seeds: int = 3,
    num_test: int = 5_000,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains all of them, prints the table, draws the schedules.

    :return: mean gap of K over the seeds in bits, and its standard error over them, by schedule.
    """
    data = ppd.datasets.swiss_roll(jax.random.key(0), 50_000, num_test)
    transform = ppd.standardize(data.train)

    def train(schedule: ppd.Schedule, seed: int, steps: int = num_steps, objective: Any = "bound") -> tuple[float, Any]:
        diffusion = ppd.Diffusion(KERNEL, schedule, ppd.networks.MLP(), transform=transform)
        fit = ppd.fit(
            jax.random.key(seed),
            diffusion,
            data.train,
            num_steps=steps,
            num_times=4 if schedule.num_timesteps == SHORT else 2,
            objective=objective,
            progress_bar=progress,
        )
        return gap.of_bound(jax.random.key(100), fit.prior, data).value, fit.prior

    def log_linear(end: float) -> ppd.FixedSchedule:
        return ppd.FixedSchedule.log_linear(SHORT, FIRST_BETA, end)

    tuned = {end: train(log_linear(end), 0)[0] for end in ENDS}
    best_end = min(tuned, key=lambda end: tuned[end])
    schedules = {
        "constant erasure": ppd.FixedSchedule.constant_erasure(SHORT),
        "log-linear to -6": log_linear(-6.0),
        f"log-linear to {best_end:g} (tuned)": log_linear(best_end),
        "learned": ppd.LearnedSchedule(SHORT, FIRST_BETA),
    }
    results: dict[str, tuple[float, float]] = {}
    rows, priors = [], {}
    for name, schedule in schedules.items():
        gaps = [train(schedule, seed) for seed in range(1, 1 + num_seeds)]
        priors[name] = gaps[0][1]
        results[name] = mean_and_error([value for value, _ in gaps]) if num_seeds > 1 else (gaps[0][0], float("nan"))
        rows.append((name, f"{SHORT}", "bound", "{:.4f} ± {:.4f}".format(*results[name]), _end(priors[name])))
    value, prior = train(log_linear(best_end), 1, objective="mse")
    results["mse"] = value, float("nan")
    rows.append((f"log-linear to {best_end:g} (tuned)", f"{SHORT}", "mse", f"{value:.4f}", _end(prior)))
    best = optimum.best_schedule(jax.random.key(9), data.train[:3_000], transform, SHORT, FIRST_BETA)
    floor = gap.of_bound(jax.random.key(100), optimum.best_process(best, transform), data, num_samples=8)
    results["best"] = floor.value, floor.error
    rows.append(("the best there is", f"{SHORT}", "exact", f"{floor.value:.4f}", f"{float(best.log_snr()[-1]):.2f}"))
    for name, schedule in (
        ("constant erasure", ppd.FixedSchedule.constant_erasure(LONG)),
        ("log-linear to -7, same beta_1", ppd.FixedSchedule.log_linear(LONG, 1 / LONG, -7.0)),
        ("learned, same beta_1", ppd.LearnedSchedule(LONG, 1 / LONG)),
    ):
        value, prior = train(schedule, 1, long_steps)
        results[f"{name}, T={LONG}"] = value, float("nan")
        rows.append((name, f"{LONG}", "bound", f"{value:.4f}", _end(prior)))
    title = (
        f"Swiss roll, beta_1 = {FIRST_BETA:g} at T = {SHORT}; means and standard errors over {num_seeds} seeds; bits"
    )
    print_table(title, ("T", "objective", "gap of K", "last log-SNR"), rows)
    print("tuning the end: " + ", ".join(f"{end:g}: {value:.4f}" for end, value in tuned.items()))
    save_figure(_figure(priors, best), figures, "schedules.png")
    return results


def _end(prior: Any) -> str:
    return f"{float(prior.process.rates.log_snr[-1]):.2f}"


def _figure(priors: dict[str, Any], best: ppd.FixedSchedule) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    betas, levels = figure.subplots(1, 2)
    curves = {name: prior.process.rates for name, prior in priors.items()} | {"the best there is": best.rates()}
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
    size = {"num_steps": 50, "long_steps": 20, "num_seeds": 2, "num_test": 200} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
