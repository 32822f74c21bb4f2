"""Missing values of a real table drawn from their posterior, beside scikit-learn's iterative imputation.

The table is scikit-learn's breast cancer data, 30 correlated measurements of 569 cell samples, in logarithms and
standardised. A diffusion learns the law of complete rows; 30 % of the values of other rows, at random, are then taken
away, and drawn given those that are left, which are known exactly. Rows are independent, and all in one plate.
``IterativeImputer`` regresses every column on the others, and draws from its predictive distribution, again and again.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import pp_diffusion as ppd
from examples.report import (
    arguments,
    chain_evidences,
    interval,
    print_table,
    save_figure,
    size_between_chains,
    with_error,
)

NUM_COLUMNS, NUM_MISSING = 30, 9
T = 100


class Table(NamedTuple):
    """Complete rows to learn from, and rows to take values away from; logarithms, standardised by the first."""

    train: np.ndarray
    test: np.ndarray
    names: list[str]


def table() -> Table:
    """400 rows to learn from, 169 others; a hundredth of the mean is added before the logarithm, for zeros."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    values = np.log(data.data + 0.01 * data.data.mean(0))
    values = values[np.random.default_rng(0).permutation(len(values))]
    train, test = values[:400], values[400:]
    return Table(
        (train - train.mean(0)) / train.std(0), (test - train.mean(0)) / train.std(0), list(data.feature_names)
    )


def train(rows: np.ndarray, num_steps: int = 5_000, *, progress: bool = True) -> ppd.FitResult:
    """Decay of the weights, and a little noise on the rows: 400 of them are soon known by heart."""
    rows = jnp.asarray(rows, float)

    def batch(rng_key: jax.Array) -> jax.Array:
        which, key = jax.random.split(rng_key)
        x = rows[jax.random.randint(which, (256,), 0, len(rows))]
        return x + 0.03 * jax.random.normal(key, x.shape)

    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((NUM_COLUMNS,)),
        ppd.FixedSchedule.log_linear(T, first_beta=3e-4, final_log_snr=-7.0),
        ppd.networks.MLP((128, 128)),
        last_step="network",
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, num_steps // 20, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.5))
    return ppd.fit(
        jax.random.key(0),
        diffusion,
        batch,
        num_steps=num_steps,
        num_times=2,
        optimizer=optimizer,
        progress_bar=progress,
    )


def model(prior: ppd.DiffusionPrior, known: Any, y: Any) -> None:
    """Each row has its own columns that are known."""
    with numpyro.plate("rows", len(y)):
        x = numpyro.sample("x", prior)
        index = jnp.broadcast_to(known, (*x.shape[:-1], known.shape[-1]))
        numpyro.sample("y", dist.Delta(jnp.take_along_axis(x, index, -1), event_dim=1), obs=y)


def split(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row, the columns that are known and those that are missing, at random."""
    order = np.random.default_rng(1).permuted(np.tile(np.arange(NUM_COLUMNS), (num_rows, 1)), axis=1)
    return np.sort(order[:, NUM_MISSING:], axis=1), np.sort(order[:, :NUM_MISSING], axis=1)


class Result(NamedTuple):
    """What a way gives.

    :ivar draws: of the missing values, shape ``(draws, rows, NUM_MISSING)``; chain after chain, if there are some.
    :ivar ess: per row, the number of exact draws whose means would err as much.
    """

    draws: np.ndarray
    ess: np.ndarray
    seconds: float


def by_smc(
    prior: ppd.DiffusionPrior, x: np.ndarray, known: np.ndarray, missing: np.ndarray, num_particles: int, progress: bool
) -> Result:
    """All rows in one run of 8 chains, whose spread tells what the draws are worth."""
    y = jnp.asarray(np.take_along_axis(x, known, 1), float)
    started = time.perf_counter()
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=8, progress_bar=progress)
    smc.run(jax.random.key(2), prior, jnp.asarray(known), y)
    draws = np.asarray(smc.get_samples()["x"], np.float64)
    seconds = time.perf_counter() - started
    smc.print_summary(max_rows=0)
    chains = np.asarray(smc.get_samples(group_by_chain=True)["x"], np.float64)
    chains = np.take_along_axis(chains, missing[None, None], 3)
    evidences = chain_evidences(smc)
    ess = np.array([size_between_chains(chains[:, :, i], evidences[:, i]) for i in range(len(x))])
    return Result(np.take_along_axis(draws, missing[None], 2), ess, seconds)


def by_iterative_imputer(train: np.ndarray, x: np.ndarray, missing: np.ndarray, num_draws: int) -> Result:
    """Fitted to the complete rows and to those with holes together, once for each draw."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    holes = x.copy()
    np.put_along_axis(holes, missing, np.nan, 1)
    started = time.perf_counter()
    draws = []
    for seed in range(num_draws):
        imputer = IterativeImputer(sample_posterior=True, max_iter=5, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with draws there is nothing to converge to
            draws.append(imputer.fit_transform(np.concatenate([train, holes]))[len(train) :])
    seconds = time.perf_counter() - started
    ess = np.full(len(x), float(num_draws))
    return Result(np.take_along_axis(np.stack(draws), missing[None], 2), ess, seconds)


def scores(found: Result, true: np.ndarray) -> dict[str, np.ndarray]:
    """Per row: shares covered by 50 and 90 % intervals, root mean square error, CRPS and energy score, both without the
    bias of finitely many draws: the distance between two is that of draws half of them apart, of different chains."""
    draws, others = found.draws, np.roll(found.draws, len(found.draws) // 2, axis=0)
    (low, high), (low_50, high_50) = interval(draws, 0.9), interval(draws, 0.5)
    return {
        "covered, of 50 %": 100 * ((low_50 <= true) & (true <= high_50)).mean(-1),
        "of 90 %": 100 * ((low <= true) & (true <= high)).mean(-1),
        "RMSE of the mean": np.sqrt(((draws.mean(0) - true) ** 2).mean(-1)),
        "CRPS": (np.abs(draws - true).mean(0) - 0.5 * np.abs(draws - others).mean(0)).mean(-1),
        "energy score": np.linalg.norm(draws - true, axis=-1).mean(0)
        - 0.5 * np.linalg.norm(draws - others, axis=-1).mean(0),
    }


def run(
    *,
    num_steps: int = 5_000,
    num_rows: int = 40,
    num_particles: int = 64,
    num_draws: int = 40,
    figures: Path,
    progress: bool = True,
) -> dict[str, Result]:
    """Trains, prints both tables, writes the figure."""
    data = table()
    started = time.perf_counter()
    prior = train(data.train, num_steps, progress=progress).prior
    seconds = time.perf_counter() - started
    bound = ppd.lower_bound(jax.random.key(1), prior, jnp.asarray(data.test, float), progress_bar=progress)
    normal = dist.MultivariateNormal(jnp.zeros(NUM_COLUMNS), jnp.asarray(np.cov(data.train.T), float))
    print_table(
        f"The law of complete rows, held-out ones, nats; {num_steps} updates in {seconds:.0f} s",
        ("log p",),
        [
            (f"diffusion, T = {T}", f"at least {with_error(bound.value, 2)}"),
            ("normal distribution", with_error(normal.log_prob(data.test), 2)),
        ],
    )
    x = data.test[:num_rows]
    known, missing = split(len(x))
    true = np.take_along_axis(x, missing, 1)
    results = {
        "SMC": by_smc(prior, x, known, missing, num_particles, progress),
        "IterativeImputer": by_iterative_imputer(data.train, x, missing, num_draws),
    }
    found = {name: scores(result, true) for name, result in results.items()}
    rows = [
        (
            name,
            *(with_error(value, 1 if "%" in score else 3) for score, value in found[name].items()),
            f"{np.median(r.ess):.0f}",
            f"{r.seconds:.0f}",
        )
        for name, r in results.items()
    ]
    less = found["SMC"]["CRPS"] - found["IterativeImputer"]["CRPS"]
    joint = found["SMC"]["energy score"] - found["IterativeImputer"]["energy score"]
    rows.append(("SMC less IterativeImputer", "", "", "", with_error(less), with_error(joint), "", ""))
    title = f"{NUM_MISSING} of {NUM_COLUMNS} values of {len(x)} rows missing; in standard deviations of the columns"
    print_table(title, (*found["SMC"], "ESS of the means", "s"), rows)
    save_figure(_figure(data, results, missing, true), figures, "missing_values.png")
    return results


def _figure(data: Table, results: dict[str, Result], missing: np.ndarray, true: np.ndarray, row: int = 0) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", dpi=120)
    intervals, ranks = figure.subplots(1, 2, width_ratios=(2, 1))
    place = np.arange(NUM_MISSING)
    for shift, (name, found) in zip((-0.15, 0.15), results.items(), strict=True):
        (low, high), median = interval(found.draws[:, row], 0.9), np.median(found.draws[:, row], axis=0)
        intervals.errorbar(place + shift, median, (median - low, high - median), fmt=".", capsize=3, label=name)
        below = (found.draws < true).mean(0).ravel()
        ranks.hist(below, bins=np.linspace(0, 1, 11), density=True, histtype="step", label=name)
    intervals.plot(place, true[row], "kx", label="true value")
    names = [data.names[column] for column in missing[row]]
    intervals.set_xticks(place, names, rotation=30, ha="right", fontsize=8)
    intervals.set(ylabel="standard deviations", title="one row: medians and 90 % intervals")
    intervals.legend(fontsize=8)
    ranks.axhline(1, color="k", lw=0.7, ls=":")
    ranks.set(xlabel="share of the draws below the true value", title="all rows: flat is calibrated")
    ranks.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"num_steps": 5, "num_rows": 4, "num_particles": 16, "num_draws": 4}
    run(**size, figures=args.figures, progress=args.progress)
