"""A posterior in two dimensions: the swiss roll seen through y = a·x + noise, of which the truth is known on a grid.

``SMC`` beside the exact posterior, beside that of the trained prior itself (very many draws of it, weighted by the
likelihood: what SMC converges to), and beside NUTS over the trajectory's noise (``TrajectoryReparam``). The total
variation is over a grid of cells, and even exact draws have some, because they are finitely many: as many of them are
beside it as the draws are worth, for the cells' probabilities, by the spread or the autocorrelation of the chains.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import split_gelman_rubin
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS

import pp_diffusion as ppd
from examples.report import (
    arguments,
    chain_evidences,
    print_table,
    save_figure,
    size_between_chains,
    size_within_chains,
)

A, NOISE, Y = jnp.array([0.6, 0.8]), 1.0, 3.0
LIMIT, CELLS, FINE = 16.0, 20, 20  # cells per axis, and points per axis of a cell for the truth


def model(prior: Any, y: Any = Y) -> None:
    """One number is seen of two."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x @ A, NOISE), obs=y)


def train(num_timesteps: int, num_steps: int, *, progress: bool = True) -> ppd.DiffusionPrior:
    """Learned rates, and new points in every batch."""
    data = ppd.datasets.swiss_roll(jax.random.key(0), 50_000)
    schedule = ppd.LearnedSchedule(num_timesteps, first_beta=3e-4)
    transform = ppd.standardize(data.train)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), schedule, ppd.networks.MLP(), transform=transform, last_step="network"
    )
    batches = partial(ppd.datasets.sample_swiss_roll, num=512)
    return ppd.fit(jax.random.key(1), diffusion, batches, num_steps=num_steps, num_times=4, progress_bar=progress).prior


class Posterior(NamedTuple):
    """What a way gives.

    :ivar cells: probabilities, shape ``(CELLS, CELLS)``; points outside of the grid count in none.
    :ivar size: the number of exact draws that would know the cells' probabilities as well; infinite for the truth.
    :ivar rhat: of NUTS, the largest one.
    """

    cells: np.ndarray
    log_evidence: float = float("nan")
    error: float = float("nan")
    size: float = float("inf")
    seconds: float = float("nan")
    rhat: float = float("nan")
    x: Any = None


def truth(log_prob: Any) -> Posterior:
    """By the exact density, on a fine grid."""
    step = 2 * LIMIT / (CELLS * FINE)
    points = -LIMIT + step * (np.arange(CELLS * FINE) + 0.5)
    grid = jnp.asarray(np.stack(np.meshgrid(points, points, indexing="ij"), -1), float)
    joint = np.asarray(log_prob(grid) + dist.Normal(grid @ A, NOISE).log_prob(Y), np.float64)
    cells = np.exp(joint).reshape(CELLS, FINE, CELLS, FINE).sum((1, 3)) * step**2
    return Posterior(cells / cells.sum(), float(np.log(cells.sum())))


def histogram(x: Any, weights: Any = None) -> np.ndarray:
    """The share of points, or of weights, in each cell."""
    edges = np.linspace(-LIMIT, LIMIT, CELLS + 1)
    x = np.asarray(x, np.float64)
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    return np.histogram2d(*x.T, bins=(edges, edges), weights=weights)[0]


def in_cells(x: Any) -> np.ndarray:
    """Of each point, which of the cells that any of them is in it is in; a new last axis, zeros and ones."""
    cells = np.floor((np.asarray(x) + LIMIT) * (CELLS / (2 * LIMIT))).astype(int)
    flat = np.where((cells >= 0).all(-1) & (cells < CELLS).all(-1), cells @ np.array([CELLS, 1]), -1)
    used = np.unique(flat)
    return flat[..., None] == used[used >= 0]


def weighted_draws(rng_key: jax.Array, prior: ppd.DiffusionPrior, num: int) -> Posterior:
    """Importance sampling from the prior: the model's own posterior, given enough draws."""
    started = time.perf_counter()
    keys = jax.random.split(rng_key, max(1, num // 20_000))
    x = np.concatenate([np.asarray(prior.sample(key, (num // len(keys),))) for key in keys])
    weights = np.exp(np.asarray(dist.Normal(x @ A, NOISE).log_prob(Y), np.float64))
    error = weights.std() / weights.mean() / np.sqrt(num)
    size = weights.sum() ** 2 / (weights**2).sum()
    return Posterior(
        histogram(x, weights), float(np.log(weights.mean())), float(error), size, time.perf_counter() - started
    )


def by_smc(rng_key: jax.Array, prior: ppd.DiffusionPrior, num_particles: int, *, progress: bool) -> Posterior:
    """SMC, 16 chains: from 8 on they tell the error of the evidence, and more tell better how many draws these are."""
    started = time.perf_counter()
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=16, progress_bar=progress)
    smc.run(rng_key, prior)
    x = smc.get_samples()["x"]
    seconds = time.perf_counter() - started
    smc.print_summary()
    size = size_between_chains(in_cells(smc.get_samples(group_by_chain=True)["x"]), chain_evidences(smc))
    return Posterior(histogram(x), smc.log_evidence, smc.log_evidence_error, size, seconds, x=x)


def by_nuts(rng_key: jax.Array, prior: ppd.DiffusionPrior, num_samples: int, *, progress: bool) -> Posterior:
    """NUTS over the noise of the trajectory, 16 chains: they take hardly longer than four.

    They walk from one turn of the spiral to another too rarely, 500 samples of each do not mend it, and R-hat says so.
    """
    started = time.perf_counter()
    kernel = NUTS(reparam(model, config={"x": ppd.TrajectoryReparam()}))
    mcmc = MCMC(
        kernel,
        num_warmup=num_samples // 2,
        num_samples=num_samples,
        num_chains=16,
        chain_method="vectorized",
        progress_bar=progress,
    )
    mcmc.run(rng_key, prior)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
    seconds = time.perf_counter() - started
    rhat = float(np.max(split_gelman_rubin(x)))
    return Posterior(
        histogram(x.reshape(-1, 2)),
        size=size_within_chains(in_cells(x)),
        seconds=seconds,
        rhat=rhat,
        x=x.reshape(-1, 2),
    )


def variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation over the cells; what is outside of them counts too."""
    return 0.5 * float(np.abs(p - q).sum() + abs(p.sum() - q.sum()))


def of_exact_draws(cells: np.ndarray, size: float, repeats: int = 50) -> float:
    """The mean total variation of that many exact draws."""
    draws = np.random.default_rng(0).multinomial(int(size), cells.ravel() / cells.sum(), repeats) / int(size)
    return float(np.mean([variation(draw, cells.ravel()) for draw in draws]))


def run(
    *,
    lengths: tuple[int, ...] = (40, 100),
    num_steps: tuple[int, ...] = (8_000, 16_000),
    num_particles: int = 1024,
    num_draws: int = 400_000,
    num_nuts: int = 100,
    figures: Path,
    progress: bool = True,
) -> dict[str, Posterior]:
    """Trains a prior for each T, prints the table, writes the figure. NUTS takes the first T."""
    data = ppd.datasets.swiss_roll(jax.random.key(0), 1)
    exact = truth(data.log_prob)
    results, own = {}, {}
    for length, steps in zip(lengths, num_steps, strict=True):
        prior = train(length, steps, progress=progress)
        own[length] = weighted_draws(jax.random.key(2), prior, num_draws)
        ways = {f"SMC, T = {length}": by_smc(jax.random.key(3), prior, num_particles, progress=progress)}
        if length == lengths[0]:
            ways[f"NUTS, T = {length}"] = by_nuts(jax.random.key(4), prior, num_nuts, progress=progress)
        for name, found in {f"prior's own, T = {length}": own[length], **ways}.items():
            results[name] = found
    _print(exact, results, own)
    save_figure(_figure(data.log_prob, exact, results), figures, "posterior_swiss_roll.png")
    return results | {"exact": exact}


def _print(exact: Posterior, results: dict[str, Posterior], own: dict[int, Posterior]) -> None:
    table = [("exact", "0", "", "", f"{exact.log_evidence:.4f}", "", "", "", "")]
    for name, found in results.items():
        if name.startswith("NUTS") and not found.rhat < 1.01:
            distance = "not mixed"
        else:
            distance = f"{variation(found.cells, exact.cells):.3f}"
        model_cells = own[int(name.split()[-1])].cells
        evidence = off = ""
        if not np.isnan(found.error):
            evidence = f"{found.log_evidence:.4f} ± {found.error:.4f}"
            ratio = np.exp(found.log_evidence - exact.log_evidence)
            off = f"{100 * (ratio - 1):+.1f} ± {100 * ratio * found.error:.1f} %"
        table.append(
            (
                name,
                distance,
                f"{of_exact_draws(exact.cells, found.size):.3f}",
                "" if model_cells is found.cells else f"{variation(found.cells, model_cells):.3f}",
                evidence,
                off,
                f"{found.size:.0f}",
                "" if np.isnan(found.rhat) else f"{found.rhat:.3f}",
                f"{found.seconds:.0f}",
            )
        )
    columns = ("TV to the truth", "as many exact draws'", "TV to the prior's own", "log evidence", "off by")
    columns = (*columns, "effective draws", "R-hat", "s")
    print_table(f"Swiss roll seen through y = a·x + N(0, {NOISE:g}²); TV over {CELLS} × {CELLS} cells", columns, table)


def _figure(log_prob: Any, exact: Posterior, results: dict[str, Posterior]) -> Any:
    from matplotlib.figure import Figure

    drawn = {name: found for name, found in results.items() if found.x is not None}
    figure = Figure(figsize=(4 * (1 + len(drawn)), 4.3), layout="constrained", dpi=120)
    axes = figure.subplots(1, 1 + len(drawn), sharex=True, sharey=True)
    points = np.linspace(-LIMIT, LIMIT, 201)
    grid = jnp.asarray(np.stack(np.meshgrid(points, points), -1), float)
    prior_density = np.exp(np.asarray(log_prob(grid)))
    posterior = prior_density * np.exp(np.asarray(dist.Normal(grid @ A, NOISE).log_prob(Y)))
    levels = posterior.max() * np.linspace(0.02, 1, 12)  # white where there is hardly anything
    axes[0].contourf(points, points, posterior, levels=levels, cmap="Blues")
    axes[0].set_title("exact posterior")
    for axis, (name, found) in zip(axes[1:], drawn.items(), strict=True):
        axis.scatter(*np.asarray(found.x)[:: max(1, len(found.x) // 2_000)].T, s=2, linewidths=0, alpha=0.5)
        axis.set_title(name)
    for axis in axes:
        axis.contour(points, points, prior_density, levels=[prior_density.max() / 4], colors="0.7", linewidths=0.5)
        axis.axline((0, Y / float(A[1])), slope=-float(A[0] / A[1]), color="k", lw=0.5, ls=":")
        axis.set(aspect="equal", xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT))
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"lengths": (10,), "num_steps": (5,), "num_particles": 32, "num_draws": 1_000, "num_nuts": 10}
    run(**size, figures=args.figures, progress=args.progress)
