"""Posterior and evidence of the 25-mode mixture: ``SMC`` against a hand-written SMC, and against the exact answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

import pp_diffusion as ppd
from benchmarks import mixture, mixture_plane
from benchmarks.reference import handwritten_smc
from benchmarks.timing import Row, not_run, on_gpu, paired

NUM_PARTICLES = 1000


def rows(small: bool) -> list[Row]:
    """A row per size: seconds per run of 1000 particles, and how far from the exact answer; then the plane's."""
    cases = [(8, 1)] if small else [(d_x, d_y) for d_x in (8, 80, 800) for d_y in (1, 2, 4)]
    num_seeds, num_runs = (1, 2) if small else (20, 8)
    table = []
    for d_x, d_y in cases:
        seeds = num_seeds if d_x < 800 else max(2, num_seeds // 4)
        timed = against_handwritten(mixture.problem(d_x, d_y, 0), 1 if small else 5)
        ours, theirs = (accuracy(d_x, d_y, run, seeds, num_runs) for run in (run_ours, run_by_hand))
        what = f"mixture, d_x = {d_x}, d_y = {d_y}, T = 100, {NUM_PARTICLES} particles: SMC / hand-written"
        table.append(Row(what, **timed, note=f"{ours}; by hand {theirs}"))
    table += [in_the_plane(make, num_seeds) for make in (mixture_plane.counts, mixture_plane.magnitudes)]
    return table if on_gpu() else [*table, not_run("SMC, on a GPU", "no GPU here")]


def model(prior: ppd.DiffusionPrior, matrix: Any, noise: Any, y: Any) -> None:
    x = numpyro.sample("x", prior)
    measured = jnp.matmul(x, matrix.T, precision="highest")
    numpyro.sample("y", dist.Normal(measured, noise).to_event(1), obs=y)


def run_ours(prior: ppd.DiffusionPrior, problem: mixture.Problem, smc: ppd.SMC, rng_key: Array) -> tuple[float, Any]:
    """log Z and equally weighted draws."""
    smc.run(rng_key, prior, *(jnp.asarray(part, float) for part in (problem.matrix, problem.noise, problem.y)))
    return smc.log_evidence, smc.get_samples()["x"]


def run_by_hand(prior: ppd.DiffusionPrior, problem: mixture.Problem, smc: Any, rng_key: Array) -> tuple[float, Any]:
    """The same of the reference."""
    covariance = problem.noise**2 * np.eye(len(problem.y))
    parts = mixture.by_hand(prior, problem.y, problem.matrix, covariance)
    result = handwritten_smc.run(rng_key, *parts, NUM_PARTICLES)
    z = handwritten_smc.equally_weighted(jax.random.fold_in(rng_key, 1), result)
    assert prior.diffusion.transform is not None
    return float(result.log_evidence), prior.diffusion.transform(z)


def new_smc(of: Any) -> ppd.SMC:
    return ppd.SMC(of, num_particles=NUM_PARTICLES, progress_bar=False)


def against_handwritten(problem: mixture.Problem, num_pairs: int) -> dict[str, Any]:
    """Both from arrays to log Z and draws in data units."""
    prior, key = mixture.mixture_prior(problem.weights, problem.matrix.shape[1]), jax.random.key(0)
    sides = (partial(run, prior, problem, new_smc(model), key) for run in (run_ours, run_by_hand))
    return paired(*(partial(_second, side) for side in sides), num_pairs=num_pairs)


def _second(run: Any) -> Any:
    return run()[1]


def accuracy(d_x: int, d_y: int, run: Any, num_seeds: int, num_runs: int) -> str:
    """The mean error of log Z and the spread of runs (rms over seeds), the total variation of the modes' probabilities
    and the sliced Wasserstein distance to as many exact draws (both of one run per seed)."""
    smc, errors, modes, distances = new_smc(model), [], [], []
    for seed in range(num_seeds):
        problem, rng = mixture.problem(d_x, d_y, seed), np.random.default_rng(seed)
        prior = mixture.mixture_prior(problem.weights, d_x)
        runs = [run(prior, problem, smc, jax.random.key(i)) for i in range(num_runs)]
        errors.append([log_evidence - problem.log_evidence for log_evidence, _ in runs])
        x = np.asarray(runs[0][1], dtype=np.float64)
        modes.append(mixture.total_variation(problem.mode_probabilities(x), problem.posterior_weights))
        distances.append(mixture.sliced_wasserstein(x, problem.draw_posterior(rng, len(x)), rng, 2_000))
    by_seed = np.mean(errors, 1)
    spread = np.sqrt(np.var(errors, axis=1, ddof=1).mean())
    return (
        f"log Z {by_seed.mean():+.3f} (mean size {np.abs(by_seed).mean():.3f}), sd {spread:.3f}, "
        f"modes' TV {np.mean(modes):.3f}, SW {np.mean(distances):.2f}"
    )


def in_the_plane(make: Any, num_seeds: int) -> Row:
    """Against a grid: 4000 particles, T = 100."""
    errors, cells, least = [], [], []
    for seed in range(num_seeds):
        seen = make(seed)
        prior = mixture.mixture_prior(seen.weights, 2)

        def plane(y: Any, seen: Any = seen, prior: Any = prior) -> None:
            numpyro.sample("y", seen.observe(numpyro.sample("x", prior)), obs=y)

        smc = ppd.SMC(plane, num_particles=4000, progress_bar=False)
        smc.run(jax.random.key(seed), seen.y)
        errors.append(smc.log_evidence - seen.log_evidence)
        cells.append(mixture.total_variation(seen.cells_of(np.asarray(smc.get_samples()["x"])), seen.cells))
        exact = np.random.default_rng(seed).multinomial(4000, seen.cells.ravel()).reshape(seen.cells.shape) / 4000
        least.append(mixture.total_variation(exact, seen.cells))
    note = (
        f"log Z {np.mean(errors):+.3f} (root mean square {np.sqrt(np.mean(np.square(errors))):.3f}), "
        f"TV on 20 × 20 cells {np.mean(cells):.3f} (of exact draws {np.mean(least):.3f})"
    )
    return Row(f"mixture in the plane, {make.__name__}, T = 100, 4000 particles, against a grid", note=note)
