"""Densities of real tables by one call each: ours beside a Gaussian mixture and a spline flow, on rows none has seen.

``python -m benchmarks.tables [--data DIR] [--tables NAME,…] [--splits 3]``. scikit-learn's tables are always there; of
treforevans/uci_datasets, DIR holds ``NAME.csv`` or ``NAME/data.csv.gz``. Everything is at its default: no setting is
chosen by table. The mixture's number of components and form are chosen by a tenth of the rows, and it is then fitted to
all; the flow ends by flowjax's own early stopping; ours by ``fit``'s.

A table's columns are those that have a density: none of fewer than 20 values, none of which one value takes a twentieth
of the rows, none that follows another with |correlation| above .98. Values on a grid get uniform noise of its step.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pp_diffusion as ppd

UCI = ("concrete", "energy", "housing", "airfoil", "parkinsons", "elevators", "pol", "kin40k", "protein")
MOST_TEST_ROWS = 500
NUM_TRAJECTORIES = 64


class Table(NamedTuple):
    """Training and test rows."""

    train: np.ndarray
    test: np.ndarray


class Density(NamedTuple):
    """What a method says of the test rows, nats, and its CPU seconds of training."""

    log_prob: np.ndarray
    seconds: float


class Row(NamedTuple):
    """One table and split."""

    name: str
    split: int
    shape: tuple[int, ...]
    ours: Density
    bound: np.ndarray
    others: dict[str, Density]

    @property
    def best(self) -> str:
        """Which of the others has the highest mean."""
        return max(self.others, key=lambda name: float(self.others[name].log_prob.mean()))

    def against_best(self, values: np.ndarray) -> tuple[float, float]:
        """Nats per row above the best of the others, paired, and the standard error over rows."""
        difference = values - self.others[self.best].log_prob
        return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def read(name: str, folder: Path | None) -> np.ndarray | None:
    """All rows as they are; ``None`` where they are not to be had."""
    if name in ("wine", "diabetes", "breast_cancer", "iris"):
        from sklearn import datasets

        return np.asarray(getattr(datasets, f"load_{name}")().data, np.float64)
    for path in [] if folder is None else [folder / f"{name}.csv", folder / name / "data.csv.gz"]:
        if path.exists():
            return np.loadtxt(path, delimiter=",")
    return None


def prepare(data: np.ndarray) -> np.ndarray:
    """The columns that have a density, dequantised; see above."""
    rng = np.random.default_rng(0)
    chosen: list[np.ndarray] = []
    for column in data.T:
        values, counts = np.unique(column, return_counts=True)
        if len(values) < 20 or counts.max() > 0.05 * len(column):
            continue
        if any(abs(np.corrcoef(column, other)[0, 1]) > 0.98 for other in chosen):
            continue
        if counts[counts > 1].sum() > 0.1 * len(column):
            step = max(float(np.quantile(np.diff(values), 0.05)), float(np.diff(values).min()))
            column = column + step * rng.uniform(-0.5, 0.5, len(column))
        chosen.append(column)
    return np.stack(chosen, 1)


def split(data: np.ndarray, seed: int) -> Table:
    """A tenth of the rows is for testing, of small tables three tenths; at most 500 of them."""
    order = np.random.default_rng(seed).permutation(len(data))
    count = int((0.3 if len(data) < 3000 else 0.1) * len(data))
    return Table(data[order[count:]], data[order[:count][:MOST_TEST_ROWS]])


def by_ours(table: Table, seed: int, num_steps: int | None = None) -> tuple[Density, np.ndarray]:
    """One call of ``fit`` as docs/training.md has it; and K."""
    started = time.process_time()
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((table.train.shape[1],)),
        ppd.LearnedSchedule(num_timesteps=100, first_beta=1e-4),
        ppd.networks.MLP(),
        transform=ppd.whiten(table.train),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it ends early, and says so
        fit = ppd.fit(jax.random.key(seed), diffusion, table.train, num_steps=num_steps, progress_bar=False)
    seconds = time.process_time() - started
    key = jax.random.key(100 + seed)
    estimate = ppd.estimate_log_prob(key, fit.prior, table.test, NUM_TRAJECTORIES, progress_bar=False)
    bound = ppd.lower_bound(key, fit.prior, table.test, num_samples=8).value
    return Density(np.asarray(estimate.value, np.float64), seconds), np.asarray(bound, np.float64)


def by_mixture(table: Table, seed: int) -> Density:
    """scikit-learn's, chosen by a tenth of the rows."""
    from sklearn.mixture import GaussianMixture

    started = time.process_time()
    loc, scale = table.train.mean(0), table.train.std(0)
    train, test = (table.train - loc) / scale, (table.test - loc) / scale
    held_out = max(len(train) // 10, 10)
    most = min(len(train), 10_000)  # to choose by

    def mixture(rows: np.ndarray, number: int, form: str) -> Any:
        return GaussianMixture(number, covariance_type=form, reg_covar=1e-4, random_state=seed, n_init=2).fit(rows)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that did not suffice
        forms = [(n, form) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24) for form in ("full", "diag") if 5 * n < held_out * 9]
        scores = {form: mixture(train[held_out:most], *form).score(train[:held_out]) for form in forms}
        chosen = mixture(train, *max(scores, key=lambda form: scores[form]))
    return Density(chosen.score_samples(test) - np.log(scale).sum(), time.process_time() - started)


def by_flow(table: Table, seed: int, max_epochs: int | None = None) -> Density:
    """flowjax's masked autoregressive spline flow, with its own settings and early stopping.

    :raises ImportError: where it is not installed.
    """
    import equinox as eqx
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data

    started = time.process_time()
    loc, scale = table.train.mean(0), table.train.std(0)
    train, test = (jnp.asarray((x - loc) / scale, float) for x in table)
    flow = masked_autoregressive_flow(
        jax.random.key(seed),
        base_dist=Normal(jnp.zeros(train.shape[1])),
        transformer=RationalQuadraticSpline(knots=8, interval=4),
    )
    settings = {} if max_epochs is None else {"max_epochs": max_epochs}
    flow, _ = fit_to_data(jax.random.key(1000 + seed), flow, data=train, show_progress=False, **settings)
    seconds = time.process_time() - started
    log_prob = np.asarray(eqx.filter_jit(flow.log_prob)(test), np.float64)
    return Density(log_prob - np.log(scale).sum(), seconds)


def rows(
    names: tuple[str, ...], folder: Path | None, splits: int, *, num_steps: int | None = None, epochs: int | None = None
) -> Iterator[Row]:
    """Table by table, split by split; those that are not there are left out, which is said."""
    for name in names:
        raw = read(name, folder)
        if raw is None:
            print(f"{name}: not there", flush=True)
            continue
        data = prepare(raw)
        for seed in range(splits):
            table = split(data, seed)
            others = {"mixture": by_mixture(table, seed)}
            try:
                others["flow"] = by_flow(table, seed, epochs)
            except ImportError:
                print("flowjax is not installed: the mixture alone", flush=True)
            ours, bound = by_ours(table, seed, num_steps)
            yield Row(name, seed, table.train.shape, ours, bound, others)
            jax.clear_caches()


def main() -> None:
    """Prints the rows as they come, and how many tables are at least as good as the best of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the tables of treforevans/uci_datasets")
    parser.add_argument("--tables", help="some of them, by name")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few updates, to see that it runs")
    options = parser.parse_args()
    names = tuple(options.tables.split(",")) if options.tables else ("wine", "diabetes", "breast_cancer", *UCI)
    short = {"num_steps": 20, "epochs": 2} if options.small else {}
    print(
        f"{'table':14} split   rows cols {'log p':>9} {'K':>9} {'mixture':>9} {'flow':>9}  log p and K above the best"
    )
    found: dict[str, list[Row]] = {}
    for row in rows(names, options.data, options.splits, **short):
        found.setdefault(row.name, []).append(row)
        others = [f"{row.others[n].log_prob.mean():9.3f}" if n in row.others else " " * 9 for n in ("mixture", "flow")]
        gains = [f"{mean:7.3f} ± {error:.3f}" for mean, error in map(row.against_best, (row.ours.log_prob, row.bound))]
        seconds = ", ".join(f"{n} {d.seconds:.0f}" for n, d in {"ours": row.ours, **row.others}.items())
        print(
            f"{row.name:14} {row.split:5} {row.shape[0]:6} {row.shape[1]:4} {row.ours.log_prob.mean():9.3f} "
            f"{row.bound.mean():9.3f} {' '.join(others)}  {'  '.join(gains)}  CPU seconds: {seconds}",
            flush=True,
        )
    for what, values in (("log p", lambda row: row.ours.log_prob), ("K", lambda row: row.bound)):
        good, worst = 0, np.inf
        for table in found.values():
            gains = [row.against_best(values(row)) for row in table]
            mean = np.mean([gain for gain, _ in gains])
            error = np.sqrt(np.sum([error**2 for _, error in gains])) / len(gains)
            good += bool(mean >= -error)
            worst = min(worst, mean / table[0].shape[1])
        print(f"{what}: at least the best of the others on {good} of {len(found)}; worst {worst:.3f} nats per column")


if __name__ == "__main__":
    main()
