"""Handwritten digits denoised and completed, with the uncertainty of every pixel.

Held-out digits are seen through noise, or their lower half is hidden. All are inferred in one run, a plate of
independent systems. The true pixels are known, so that one can ask how many of them the 90 % intervals cover; the noise
alone, and the training digits alone, say what was to be had without the diffusion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import pp_diffusion as ppd
from examples import digits
from examples.report import arguments, print_table, save_figure, with_error

NOISE = 4.0  # levels; pixels are in 0…17
UPPER = np.arange(32)  # the pixels of the upper half


def train(data: Any, num_steps: int | None = None, *, progress: bool = True) -> ppd.DiffusionPrior:
    """As in ``examples/digits.py``."""
    fit, _ = digits.train(data, num_steps, progress=progress)
    return fit.prior


def noisy(prior: ppd.DiffusionPrior, y: Any) -> None:
    """Every pixel through normal noise."""
    with numpyro.plate("images", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(2), obs=y)


def upper_half(prior: ppd.DiffusionPrior, y: Any) -> None:
    """The upper half is known exactly."""
    with numpyro.plate("images", len(y)):
        x = numpyro.sample("x", prior)
        pixels = x.reshape(*x.shape[:-2], 64)
        numpyro.sample("y", dist.Delta(pixels[..., UPPER], event_dim=1), obs=y)


class Result(NamedTuple):
    """Of one task; draws have shape ``(particles, images, 8, 8)``.

    :ivar hidden: which pixels are inferred.
    :ivar simple: the estimate that needs no diffusion, and its name.
    """

    seen: np.ndarray
    draws: np.ndarray
    hidden: np.ndarray
    ess: np.ndarray
    seconds: float
    simple: np.ndarray
    simple_name: str


def infer(
    model: Callable, prior: ppd.DiffusionPrior, y: Any, num_particles: int, twist: str, *, progress: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Draws for all images, how many of them are effective, and the seconds with compiling."""
    started = time.perf_counter()
    smc = ppd.SMC(model, num_particles=num_particles, twist=twist, progress_bar=progress)
    smc.run(jax.random.key(0), prior, y)
    draws = np.asarray(smc.get_samples()["x"], np.float64)
    smc.print_summary(max_rows=0)
    return draws, smc.ess[0].reshape(-1), time.perf_counter() - started


def run(
    *,
    num_steps: int | None = None,
    num_timesteps: int = 100,
    num_images: int = 20,
    num_particles: int = 128,
    figures: Path,
    progress: bool = True,
) -> dict[str, Result]:
    """Trains, prints the tables, writes the figures."""
    data = ppd.datasets.digits(jax.random.key(0))
    trained = train(data, num_steps, progress=progress)
    prior = trained.diffusion.prior(trained.params, num_timesteps=num_timesteps)
    held_out = ppd.datasets.dequantize(jax.random.key(1), data.test)
    for name, chain in (("trained", trained), ("used here", prior)):
        bound = ppd.lower_bound(jax.random.key(2), chain, held_out, progress_bar=progress)
        print(f"K, T = {chain.num_timesteps} ({name}): {with_error(bound.value, 2)} nats per image")
    x = held_out[:num_images]
    shape = (num_images, 8, 8)
    y = x + NOISE * jax.random.normal(jax.random.key(3), shape)
    known = x.reshape(num_images, 64)[:, UPPER]
    mean = np.broadcast_to(np.asarray(data.train).mean(0) + 0.5, shape)
    everything, lower = np.ones((8, 8), bool), np.arange(64).reshape(8, 8) >= 32
    half = np.where(lower, np.nan, np.asarray(x))
    results = {
        f"noise of sd {NOISE:g}": Result(
            np.asarray(y),
            *_with(everything, infer(noisy, prior, y, num_particles, "lookahead", progress=progress)),
            np.clip(np.asarray(y), 0, 17),
            "the noisy pixels",
        ),
        "lower half hidden": Result(
            half,
            *_with(lower, infer(upper_half, prior, known, num_particles, "moment", progress=progress)),
            mean,
            "mean of the training digits",
        ),
    }
    _print(results, np.asarray(x), num_timesteps)
    for i, (name, found) in enumerate(results.items()):
        figure = _figure(name, found, np.asarray(x))
        save_figure(figure, figures, f"posterior_digits_{('noisy', 'half')[i]}.png")
    return results


def _with(hidden: np.ndarray, found: tuple[Any, Any, float]) -> tuple[Any, ...]:
    draws, ess, seconds = found
    return draws, hidden, ess, seconds


def _print(results: dict[str, Result], x: np.ndarray, num_timesteps: int) -> None:
    table = []
    for name, found in results.items():
        low, high = np.quantile(found.draws, [0.05, 0.95], axis=0)
        covered = ((low <= x) & (x <= high))[:, found.hidden].mean(-1)

        def rmse(estimate: np.ndarray, hidden: np.ndarray = found.hidden) -> np.ndarray:
            return np.sqrt(((estimate - x)[:, hidden] ** 2).mean(-1))

        table.append(
            (
                name,
                with_error(100 * covered, 1),
                f"{(high - low)[:, found.hidden].mean():.1f}",
                with_error(rmse(found.draws.mean(0)), 2),
                f"{with_error(rmse(found.simple), 2)} ({found.simple_name})",
                f"{found.ess.min():.0f}…{np.median(found.ess):.0f} of {len(found.draws)}",
                f"{found.seconds:.0f}",
            )
        )
    columns = ("covered, of 90 %", "their width", "RMSE of the mean", "RMSE without the model", "ESS", "s")
    print_table(f"Inferred pixels of {len(x)} held-out digits, in levels; T = {num_timesteps}", columns, table)


def _figure(name: str, found: Result, x: np.ndarray, shown: int = 10) -> Any:
    from matplotlib.figure import Figure

    shown = min(shown, len(x))
    rows = {
        "true": x,
        "seen": found.seen,
        "mean": found.draws.mean(0),
        "sd": found.draws.std(0),
        **{f"draw {i + 1}": found.draws[i * (len(found.draws) // 3)] for i in range(3)},
    }
    figure = Figure(figsize=(0.9 * shown + 0.6, 0.9 * len(rows) + 0.5), layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), shown, squeeze=False)
    for (label, images), line in zip(rows.items(), axes, strict=True):
        for axis, image in zip(line, images[:shown], strict=True):
            highest = 8 if label == "sd" else 17
            axis.imshow(image, cmap="magma" if label == "sd" else "gray", vmin=0, vmax=highest)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label)
    figure.suptitle(f"Digits, {name}: posterior by SMC (sd: black 0, white 8 levels)", fontsize=10)
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"num_steps": 50, "num_timesteps": 10, "num_images": 3, "num_particles": 16}
    run(**size, figures=args.figures, progress=args.progress)
