"""Posterior and evidence of the 25-mode mixture: ``SMC`` against a hand-written SMC in speed, and beside it, lookahead,
importance sampling and exact draws in error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
SIZES = [(d_x, d_y) for d_x in (8, 80, 800) for d_y in (1, 2, 4)]
Draws = tuple[float, np.ndarray]  # log Z, and equally weighted draws
Way = Callable[[mixture.Problem, ppd.DiffusionPrior, int], Draws]  # the last being the run's number


def rows(small: bool) -> list[Row]:
    """Per size, seconds per run of 1000 particles, and how far every way is from the exact answer; then the plane's."""
    table, num_seeds = [], 2 if small else 20
    for d_x, d_y in SIZES[:1] if small else SIZES:
        timed = against_handwritten(mixture.problem(d_x, d_y, 0), 1 if small else 5)
        what = f"mixture, d_x = {d_x}, d_y = {d_y}, T = 100, {NUM_PARTICLES} particles"
        table.append(Row(f"{what}: SMC / hand-written", **timed))
        found = errors(d_x, d_y, num_seeds, 2 if small or d_x == 800 else 8)
        table += [Row(f"{what}: {name}", note=error.in_words(found["SMC"])) for name, error in found.items()]
    table += [in_the_plane(make, num_seeds) for make in (mixture_plane.counts, mixture_plane.magnitudes)]
    return table if on_gpu() else [*table, not_run("SMC, on a GPU", "no GPU here")]


def model(prior: ppd.DiffusionPrior, matrix: Any, noise: Any, y: Any) -> None:
    x = numpyro.sample("x", prior)
    measured = jnp.matmul(x, matrix.T, precision="highest")
    numpyro.sample("y", dist.Normal(measured, noise).to_event(1), obs=y)


def arguments(problem: mixture.Problem) -> tuple[Array, ...]:
    """The model's, after the prior."""
    return tuple(jnp.asarray(part, float) for part in (problem.matrix, problem.noise, problem.y))


# --- speed ---------------------------------------------------------------------------------------------------------


def against_handwritten(problem: mixture.Problem, num_pairs: int) -> dict[str, Any]:
    """Both from arrays to log Z and draws in data units."""
    prior = mixture.mixture_prior(problem.weights, problem.matrix.shape[1])
    sides = (partial(way, problem, prior, 0) for way in (by_smc("moment"), by_hand))
    return paired(*(partial(_draws, side) for side in sides), num_pairs=num_pairs)


def _draws(side: Callable[[], Draws]) -> np.ndarray:
    return side()[1]


# --- accuracy ------------------------------------------------------------------------------------------------------


def by_smc(twist: str) -> Way:
    """Ours."""
    smc = ppd.SMC(model, num_particles=NUM_PARTICLES, twist=twist, progress_bar=False)

    def run(problem: mixture.Problem, prior: ppd.DiffusionPrior, number: int) -> Draws:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ppd.CollapseWarning)  # its row shows what a collapse comes to
            smc.run(jax.random.key(number), prior, *arguments(problem))
        return smc.log_evidence, np.asarray(smc.get_samples()["x"])

    return run


def by_hand(problem: mixture.Problem, prior: ppd.DiffusionPrior, number: int) -> Draws:
    """The reference."""
    key, covariance = jax.random.key(number), problem.noise**2 * np.eye(len(problem.y))
    parts = mixture.by_hand(prior, problem.y, problem.matrix, covariance)
    result = handwritten_smc.run(key, *parts, NUM_PARTICLES)
    z = handwritten_smc.equally_weighted(jax.random.fold_in(key, 1), result)
    assert prior.transform is not None
    return float(result.log_evidence), np.asarray(prior.transform(z))


def by_weighted_draws(problem: mixture.Problem, prior: ppd.DiffusionPrior, number: int) -> Draws:
    """Importance sampling: as many exact draws of the mixture, weighted by the likelihood and resampled."""
    rng = np.random.default_rng((1, number))
    x = problem.draw_prior(rng, NUM_PARTICLES)
    log_weights = np.asarray(problem.log_likelihood(x))
    log_evidence = np.logaddexp.reduce(log_weights)
    chosen = rng.choice(len(x), len(x), p=np.exp(log_weights - log_evidence))
    return float(log_evidence - np.log(len(x))), x[chosen]


def exactly(problem: mixture.Problem, prior: ppd.DiffusionPrior, number: int) -> Draws:
    """As many draws of the posterior itself: what the distances are at best."""
    return problem.log_evidence, problem.draw_posterior(np.random.default_rng((2, number)), NUM_PARTICLES)


class Errors(NamedTuple):
    """Of one way, over problems.

    :ivar log_evidence: error of log Z, nats, shape ``(problems, runs)``.
    :ivar modes: total variation of the modes' probabilities, from all runs of a problem together, per problem.
    :ivar distance: sliced Wasserstein distance of the first run to as many exact draws, per problem.
    """

    log_evidence: np.ndarray
    modes: np.ndarray
    distance: np.ndarray

    @property
    def bias(self) -> float:
        """The mean error of log Z."""
        return float(self.log_evidence.mean())

    @property
    def sd(self) -> float:
        """Standard deviation of log Z's error, of all runs."""
        return float(self.log_evidence.std())

    def in_words(self, ours: Errors) -> str:
        """With the distance paired with ours."""
        paired = ""
        if self is not ours:
            gap = ours.distance - self.distance
            paired = f" (ours less that {gap.mean():+.3f} ± {gap.std(ddof=1) / np.sqrt(len(gap)):.3f})"
        return (
            f"log Z {self.bias:+.3f}, sd {self.sd:.3f}, modes' TV {self.modes.mean():.3f}, "
            f"SW {self.distance.mean():.3f}{paired}"
        )


def all_ways() -> dict[str, Way]:
    """Ours first."""
    return {
        "SMC": by_smc("moment"),
        "hand-written": by_hand,
        "SMC, plain lookahead": by_smc("lookahead"),
        "importance sampling": by_weighted_draws,
        "exact draws": exactly,
    }


def errors(d_x: int, d_y: int, num_seeds: int, num_runs: int, ways: dict[str, Way] | None = None) -> dict[str, Errors]:
    """Every way on the problems of seeds 0, 1, …, against the exact answer."""
    ways = all_ways() if ways is None else ways
    found: dict[str, list[tuple[list[float], float, float]]] = {name: [] for name in ways}
    for seed in range(num_seeds):
        problem = mixture.problem(d_x, d_y, seed)
        prior, rng = mixture.mixture_prior(problem.weights, d_x), np.random.default_rng(seed)
        exact = problem.draw_posterior(rng, NUM_PARTICLES)
        for name, way in ways.items():
            runs = [way(problem, prior, 1000 * seed + i) for i in range(num_runs)]
            shares = np.mean([problem.mode_probabilities(x) for _, x in runs], 0)
            x = np.asarray(runs[0][1], np.float64)
            found[name].append(
                (
                    [log_evidence - problem.log_evidence for log_evidence, _ in runs],
                    mixture.total_variation(shares, problem.posterior_weights),
                    mixture.sliced_wasserstein(x, exact, np.random.default_rng(seed), 1_000),
                )
            )
    return {name: Errors(*map(np.asarray, zip(*of_seeds, strict=True))) for name, of_seeds in found.items()}


def plane(prior: ppd.DiffusionPrior, observe: Any, y: Any) -> None:
    """``observe`` is a pytree, so that other measurements need no new compilation."""
    numpyro.sample("y", observe(numpyro.sample("x", prior)), obs=y)


class PlaneErrors(NamedTuple):
    """Of problems in the plane, against a grid.

    :ivar log_evidence: error of log Z, nats, per problem.
    :ivar cells: total variation over 20 × 20 cells, per problem.
    :ivar least: the same of as many exact draws.
    :ivar rule: what the twist makes of the observations.
    """

    log_evidence: np.ndarray
    cells: np.ndarray
    least: np.ndarray
    rule: str


def plane_errors(make: Any, num_seeds: int, num_particles: int = 4000) -> PlaneErrors:
    """SMC on the problems of seeds 0, 1, …"""
    smc = ppd.SMC(plane, num_particles=num_particles, progress_bar=False)
    missed, cells, least = [], [], []
    for seed in range(num_seeds):
        seen = make(seed)
        smc.run(jax.random.key(seed), mixture.mixture_prior(seen.weights, 2), seen.observe, seen.y)
        missed.append(smc.log_evidence - seen.log_evidence)
        cells.append(mixture.total_variation(seen.cells_of(np.asarray(smc.get_samples()["x"])), seen.cells))
        exact = np.random.default_rng(seed).multinomial(num_particles, seen.cells.ravel()) / num_particles
        least.append(mixture.total_variation(exact, seen.cells.ravel()))
    return PlaneErrors(np.array(missed), np.array(cells), np.array(least), smc.twist_rules["y"])


def in_the_plane(make: Any, num_seeds: int) -> Row:
    found = plane_errors(make, num_seeds)
    note = (
        f"twist: {found.rule}; log Z {found.log_evidence.mean():+.3f}, sd {found.log_evidence.std():.3f}, "
        f"TV on 20 × 20 cells {found.cells.mean():.3f} (of exact draws {found.least.mean():.3f})"
    )
    return Row(f"mixture in the plane, {make.__name__}, T = 100, 4000 particles, against a grid", note=note)
