"""Missing values of a whole table: ours beside random forests (MissForest) and linear regressions, on the same holes.

``python -m benchmarks.imputation [--seeds 5] [--rows 20]``. The public protocol: scikit-learn's breast cancer table,
each column scaled to 0…1 by its minimum and maximum, and 30 % of all values taken away at random, so that no row is
complete. What is compared is the error at these, of all ways in the same rows: of a random share of the table, because
particles cost more than regressions do.

A diffusion learns from complete rows. Here these are the table's own, completed a few times by draws from linear
regressions (``IterativeImputer``); what is missing is then drawn anew by SMC, what is known being observed exactly.
Both linear ways and ours see log(x + .05), in which columns are less skew.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pp_diffusion as ppd

SHARE, OFFSET = 0.3, 0.05
T = 100


class Holes(NamedTuple):
    """A table scaled to 0…1, and which of its values are missing."""

    true: np.ndarray
    missing: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """NaN where a value is missing."""
        return np.where(self.missing, np.nan, self.true)


class Scores(NamedTuple):
    """Of one way, at the missing values of some rows.

    :ivar squared: error of the mean, of each value.
    :ivar crps: of each value; of a way without draws, the absolute error.
    :ivar covered: the share of the values in the middle 90 % of the draws; NaN without draws.
    :ivar seconds: of CPU.
    """

    squared: np.ndarray
    crps: np.ndarray
    covered: float
    seconds: float

    @property
    def rmse(self) -> float:
        """Root mean square error of the mean."""
        return float(np.sqrt(self.squared.mean()))


class Row(NamedTuple):
    """The ways' scores for one mask, and the verdicts of the systems of particles."""

    seed: int
    scores: dict[str, Scores]
    verdicts: dict[str, int]


def holes(seed: int) -> Holes:
    """The table, with a mask of this seed."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer().data
    true = (data - data.min(0)) / (data.max(0) - data.min(0))
    return Holes(true, np.random.default_rng(seed).random(true.shape) < SHARE)


class Scale(NamedTuple):
    """Standardised logarithms, by what is seen."""

    loc: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, seen: np.ndarray) -> Scale:
        """From a table with holes."""
        logs = np.log(seen + OFFSET)
        return cls(np.nanmean(logs, 0), np.nanstd(logs, 0))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (np.log(x + OFFSET) - self.loc) / self.scale

    def back(self, z: np.ndarray) -> np.ndarray:
        """To 0…1."""
        return np.exp(z * self.scale + self.loc) - OFFSET


def imputed(rows: np.ndarray, estimator: Any = None, **settings: Any) -> np.ndarray:
    """scikit-learn's iterative imputation."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return np.asarray(IterativeImputer(estimator, **settings).fit_transform(rows))


def by_forests(seen: np.ndarray, num_trees: int, max_iter: int) -> np.ndarray:
    """MissForest (Stekhoven & Bühlmann 2012): a forest for each column, the square root of the others at a split."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(num_trees, max_features="sqrt", random_state=0)
    return imputed(seen, forest, max_iter=max_iter, random_state=0)


def by_lines(z: np.ndarray, num_draws: int) -> np.ndarray:
    """Completed tables, shape ``(num_draws, rows, columns)``."""
    return np.stack([imputed(z, sample_posterior=True, max_iter=5, random_state=i) for i in range(num_draws)])


def learned(completed: np.ndarray, num_steps: int) -> ppd.DiffusionPrior:
    """By ``fit``'s defaults; of every tenth row all completions are held out."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((completed.shape[-1],)),
        ppd.FixedSchedule.log_linear(T, first_beta=3e-4, final_log_snr=-7.0),
        ppd.networks.MLP((64, 64)),
        last_step="network",
    )
    held_out = np.arange(completed.shape[1]) % 10 == 0
    train, held = (
        jnp.asarray(completed[:, rows].reshape(-1, completed.shape[-1]), float) for rows in (~held_out, held_out)
    )
    return ppd.fit(
        jax.random.key(0), diffusion, train, num_steps=num_steps, validation_data=held, progress_bar=False
    ).prior


def model(prior: ppd.DiffusionPrior, known: Any, y: Any) -> None:
    """Each row has its own holes."""
    with numpyro.plate("rows", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Delta(x).mask(known).to_event(1), obs=y)


def scores(draws: np.ndarray, true: np.ndarray, missing: np.ndarray, seconds: float) -> Scores:
    """Of draws, shape ``(draws, rows, columns)``; one is taken for a point."""
    draws, true = draws[:, missing], true[missing]
    squared, distance = (draws.mean(0) - true) ** 2, np.abs(draws - true).mean(0)
    if len(draws) == 1:
        return Scores(squared, distance, np.nan, seconds)
    others = np.roll(draws, len(draws) // 2, axis=0)  # of other chains
    low, high = np.quantile(draws, (0.05, 0.95), axis=0)
    crps = distance - 0.5 * np.abs(draws - others).mean(0)
    return Scores(squared, crps, float(((low <= true) & (true <= high)).mean()), seconds)


def rows(
    num_seeds: int,
    num_rows: int,
    *,
    num_steps: int = 3000,
    num_draws: int = 10,
    num_particles: int = 64,
    num_chains: int = 4,
    num_trees: int = 100,
    max_iter: int = 5,
) -> Iterator[Row]:
    """Mask by mask."""
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=num_chains, progress_bar=False)
    for seed in range(num_seeds):
        table = holes(seed)
        scale, some = Scale.of(table.seen), np.random.default_rng(100 + seed).permutation(len(table.true))[:num_rows]
        z = scale(table.seen)
        started = [time.process_time()]
        forests = by_forests(table.seen, num_trees, max_iter)
        started.append(time.process_time())
        completed = by_lines(z, num_draws)
        started.append(time.process_time())
        prior = learned(completed, num_steps)
        y = jnp.asarray(np.where(table.missing, 0.0, z)[some], float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ppd.CollapseWarning)  # counted
            smc.run(jax.random.key(seed), prior, jnp.asarray(~table.missing[some]), y)
        x = scale.back(np.asarray(smc.get_samples()["x"], np.float64))
        started.append(time.process_time())
        seconds = np.diff(started)
        ways = {
            "mean": np.broadcast_to(np.nanmean(table.seen, 0), (1, *x.shape[1:])),
            "MissForest": forests[None, some],
            "linear": scale.back(completed[:, some]),
            "diffusion": x,
        }
        spent = {"mean": 0.0, **dict(zip(("MissForest", "linear", "diffusion"), seconds, strict=True))}
        found = {
            name: scores(draws, table.true[some], table.missing[some], spent[name]) for name, draws in ways.items()
        }
        names, counts = np.unique(np.asarray(smc.verdict), return_counts=True)
        yield Row(seed, found, dict(zip(names.tolist(), counts.tolist(), strict=True)))


def main() -> None:
    """A line for each mask and way as they come, and of all masks together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="masks")
    parser.add_argument("--rows", type=int, default=20, help="of the table, of which the errors are taken")
    parser.add_argument("--small", action="store_true", help="few updates, to see that it runs")
    options = parser.parse_args()
    small = {"num_steps": 5, "num_draws": 2, "num_particles": 4, "num_chains": 2, "num_trees": 2, "max_iter": 1}
    found: list[Row] = []
    for row in rows(options.seeds, options.rows, **(small if options.small else {})):
        found.append(row)
        print(f"mask {row.seed}; systems of particles: {row.verdicts}", flush=True)
        for name, score in row.scores.items():
            print(
                f"  {name:12} RMSE {score.rmse:.4f}  CRPS {score.crps.mean():.4f}  90 % intervals hold "
                f"{100 * score.covered:5.1f} %  {score.seconds:.0f} CPU s",
                flush=True,
            )
    print(f"mean of {len(found)} masks")
    for name in found[0].scores:
        mine = [row.scores[name] for row in found]
        rmse, crps, covered = np.mean([(score.rmse, score.crps.mean(), score.covered) for score in mine], 0)
        print(f"  {name:12} RMSE {rmse:.4f}  CRPS {crps:.4f}  90 % intervals hold {100 * covered:5.1f} %")


if __name__ == "__main__":
    main()
