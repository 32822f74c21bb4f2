"""What the examples share: their command line, their tables, and where figures go."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpyro.diagnostics import effective_sample_size


def arguments(description: str | None, rows: list[str] | None = None) -> argparse.Namespace:
    """``--small`` (seconds, to see that it runs), ``--figures DIR``, ``--no-progress`` and, of an example with many
    rows, ``--rows``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few updates, to see that it runs")
    parser.add_argument(
        "--figures", type=Path, default=Path("figures"), help="folder for the figures (default: figures)"
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    if rows:
        parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help="only these rows of the table")
    return parser.parse_args()


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table in plain text, its first column to the left, the others to the right."""
    table = [("", *columns), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    print(f"\n{title}")
    for row in table:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean over the data, and its standard error."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


def with_error(values: Any, digits: int = 3) -> str:
    """``mean ± standard error``."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def interval(draws: Any, share: float) -> np.ndarray:
    """Low and high ends that hold that share of what the draws (first axis) are of, the same to both sides.

    Not NumPy's default quantiles: between those of 20 exact draws, 90 % of them, only 81 % of new ones fall.
    """
    return np.quantile(draws, [(1 - share) / 2, (1 + share) / 2], axis=0, method="weibull")


def chain_evidences(smc: Any) -> np.ndarray:
    """Each chain's log evidence, shape ``(chains, *systems)``: chains count in proportion to their evidences."""
    return np.asarray(smc.to_arviz()["sample_stats"]["log_evidence"], np.float64)


def size_between_chains(draws: Any, log_evidences: Any) -> float:
    """The number of exact draws whose means would err as much as those of all these draws of SMC together, of shape
    ``(chains, draws, *functions)``: the functions' variances over the variances of their means, as independent chains
    tell them, which count in proportion to their evidences.

    The effective sample size of the last weights (``smc.ess[-1]``) is no such number: it does not know that particles
    that descend from one ancestor are alike. With 8 chains, that of one function is known within a factor of two; that
    of many better, and so their variances are summed before they are divided.
    """
    draws = np.asarray(draws, np.float64)
    weights = np.exp(log_evidences - np.logaddexp.reduce(log_evidences))
    mean, square = (np.tensordot(weights, moment, 1) for moment in (draws.mean(1), (draws**2).mean(1)))
    of_means = (weights**2).sum() * draws.mean(1).var(0, ddof=1)
    return float((square - mean**2).sum() / of_means.sum())


def size_within_chains(draws: Any) -> float:
    """The same number for Markov chains, whose autocorrelations tell the variances of their means."""
    draws = np.asarray(draws, np.float64).reshape(*np.shape(draws)[:2], -1)
    draws = draws[..., draws.std((0, 1)) > 0]
    variances = draws.var((0, 1))
    return float(variances.sum() / (variances / effective_sample_size(draws)).sum())


def save_figure(figure: Any, folder: Path, name: str) -> Path:
    """Writes ``folder/name`` and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    figure.savefig(path)
    print(f"figure: {path}")
    return path
