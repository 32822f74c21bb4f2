"""What the examples share: their command line, their tables, and where figures go."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np


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


def save_figure(figure: Any, folder: Path, name: str) -> Path:
    """Writes ``folder/name`` and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    figure.savefig(path)
    print(f"figure: {path}")
    return path
