"""Handwritten digits denoised and completed, with the uncertainty of every pixel.

Digits are seen through noise, or only their upper halves are. All are inferred in one run, a plate of independent
systems, under a twist of our own. The true pixels are known, so that one can ask how many of them the 90 % intervals
cover: of digits that the prior has drawn itself, which asks whether the posterior is right, and of held-out real ones,
which asks how good the prior is too. The mean of the training digits says what was to be had without a diffusion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pp_diffusion as ppd
from examples import digits
from examples.report import (
    arguments,
    chain_evidences,
    interval,
    print_table,
    save_figure,
    size_between_chains,
    with_error,
)


class Task(NamedTuple):
    """What is seen: pixels (a mask), through normal noise in levels."""

    name: str
    noise: float
    seen: np.ndarray


UPPER = np.repeat([True, False], 4)[:, None] & np.ones(8, bool)
TASKS = {
    "noisy": Task("all pixels, noise of sd 4", 4.0, np.ones((8, 8), bool)),
    "half": Task("upper half, noise of sd 2", 2.0, UPPER),
}
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def train(data: Any, num_steps: int | None = None, *, progress: bool = True) -> ppd.DiffusionPrior:
    """As in ``examples/digits.py``."""
    fit, _ = digits.train(data, num_steps, progress=progress)
    return fit.prior


def model(prior: ppd.DiffusionPrior, task: Task, y: Any) -> None:
    """Pixels through normal noise, where they are seen."""
    with numpyro.plate("images", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, task.noise).mask(task.seen).to_event(2), obs=y)


def twist(prior: ppd.DiffusionPrior, task: Task, y: Any) -> Callable:
    """Each pixel's level given x_t as a normal variable, with the mean and the variance that five nodes give.

    From the model's space to levels it is anything but linear, and a Jacobian for all pixels at every particle would
    cost more than particles do.
    """
    transform = prior.transform

    def log_twist(prediction: Any, log_r: Callable) -> jax.Array:
        levels = transform(prediction.x_0[..., None] + jnp.sqrt(prediction.variance)[..., None] * NODES)
        mean = levels @ WEIGHTS
        variance = (levels - mean[..., None]) ** 2 @ WEIGHTS
        log_prob = dist.Normal(mean, jnp.sqrt(task.noise**2 + variance)).log_prob(y)
        return jnp.where(task.seen, log_prob, 0.0).sum((-2, -1))

    return log_twist


class Result(NamedTuple):
    """Of one task.

    :ivar seen: what was seen, NaN where nothing was.
    :ivar draws: shape ``(draws, images, 8, 8)``.
    :ivar ess: per image, the number of exact draws whose means of the inferred pixels would err as much.
    """

    seen: np.ndarray
    draws: np.ndarray
    ess: np.ndarray
    seconds: float


def inferred(task: Task) -> np.ndarray:
    """The pixels that are asked for: the unseen ones, where there are any."""
    return np.ones((8, 8), bool) if task.seen.all() else ~task.seen


def infer(
    rng_key: jax.Array, prior: ppd.DiffusionPrior, task: Task, x: jax.Array, num_particles: int, *, progress: bool
) -> Result:
    """Adds the noise, and infers all images in one run of 8 chains, whose spread tells what the draws are worth; the
    seconds are with compiling."""
    y = x + task.noise * jax.random.normal(rng_key, x.shape)
    started = time.perf_counter()
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=8, twist=twist(prior, task, y), progress_bar=progress)
    smc.run(rng_key, prior, task, y)
    draws = np.asarray(smc.get_samples()["x"], np.float64)
    seconds = time.perf_counter() - started
    print(f"\n{task.name}")
    smc.print_summary(max_rows=0)
    chains = np.asarray(smc.get_samples(group_by_chain=True)["x"], np.float64)[..., inferred(task)]
    evidences = chain_evidences(smc)
    ess = np.array([size_between_chains(chains[:, :, i], evidences[:, i]) for i in range(len(x))])
    return Result(np.where(task.seen, np.asarray(y), np.nan), draws, ess, seconds)


def run(
    *,
    num_steps: int | None = None,
    num_timesteps: int = 60,
    num_images: int = 16,
    num_test: int | None = None,
    num_particles: int = 128,
    figures: Path,
    progress: bool = True,
) -> dict[str, Result]:
    """Trains, prints the table, writes the figures; ``num_images`` real digits, and as many drawn ones."""
    data = ppd.datasets.digits(jax.random.key(0))
    trained = train(data, num_steps, progress=progress)
    prior = trained.shortened(num_timesteps)
    held_out = ppd.datasets.dequantize(jax.random.key(1), data.test)
    for chain in (trained, prior):  # what a shorter chain costs
        bound = ppd.lower_bound(jax.random.key(2), chain, held_out[:num_test], progress_bar=progress)
        print(f"K of held-out digits, T = {chain.num_timesteps}: {with_error(bound.value, 2)} nats")
    x = jnp.concatenate([held_out[:num_images], prior.sample(jax.random.key(3), (num_images,))])
    table, results = [], {}
    for key, task in TASKS.items():
        results[key] = infer(jax.random.key(4), prior, task, x, num_particles, progress=progress)
        for kind, which in (("drawn from the prior", np.s_[num_images:]), ("real, held out", np.s_[:num_images])):
            cells = _cells(task, results[key], np.asarray(x), np.asarray(data.train).mean(0) + 0.5, which)
            table.append((f"{task.name}: {kind}", *cells))
        save_figure(_figure(task, results[key], np.asarray(x), num_images), figures, f"posterior_digits_{key}.png")
    columns = (
        "covered, of 90 %",
        "their width",
        "RMSE of the mean",
        "of the mean digit",
        "ESS of the means",
        "s, both",
    )
    setting = f"{num_images} digits each, 8 times {num_particles} particles, T = {num_timesteps}"
    print_table(f"Inferred pixels, in levels 0…17; {setting}", columns, table)
    return results


def _cells(task: Task, found: Result, x: np.ndarray, mean_digit: np.ndarray, which: slice) -> tuple[str, ...]:
    x, draws, ess = x[which], found.draws[:, which], found.ess[which]
    asked = inferred(task)
    low, high = interval(draws, 0.9)
    covered = ((low <= x) & (x <= high))[:, asked].mean(-1)  # per image; its pixels are not independent

    def rmse(estimate: np.ndarray) -> np.ndarray:
        return np.sqrt(((estimate - x)[:, asked] ** 2).mean(-1))

    return (
        with_error(100 * covered, 1),
        f"{(high - low)[:, asked].mean():.1f}",
        with_error(rmse(draws.mean(0)), 2),
        with_error(rmse(mean_digit), 2),
        f"{ess.min():.0f}…{ess.max():.0f}",
        f"{found.seconds:.0f}",
    )


def _figure(task: Task, found: Result, x: np.ndarray, num_images: int, shown: int = 12) -> Any:
    from matplotlib.figure import Figure

    half = min(shown // 2, num_images)
    chosen = np.r_[:half, num_images : num_images + half]  # real ones, then drawn ones
    third = len(found.draws) // 3
    rows = {
        "true": x,
        "seen": found.seen,
        "mean": found.draws.mean(0),
        "sd": found.draws.std(0),
        **{f"draw {i + 1}": found.draws[i * third] for i in range(3)},
    }
    figure = Figure(figsize=(0.8 * len(chosen) + 0.6, 0.8 * len(rows) + 0.6), layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for (label, images), line in zip(rows.items(), axes, strict=True):
        for axis, image in zip(line, images[chosen], strict=True):
            axis.imshow(image, cmap="magma" if label == "sd" else "gray", vmin=0, vmax=8 if label == "sd" else 17)
            axis.set(xticks=[], yticks=[], facecolor="lightsteelblue")  # behind what was not seen
        line[0].set_ylabel(label)
    axes[0][half // 2].set_title("real, held out", fontsize=9)
    axes[0][half + half // 2].set_title("drawn from the prior", fontsize=9)
    figure.suptitle(f"Digits by SMC: {task.name} (sd from black, 0, to white, 8 levels)", fontsize=10)
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"num_steps": 5, "num_timesteps": 10, "num_images": 2, "num_test": 4, "num_particles": 8}
    run(**size, figures=args.figures, progress=args.progress)
