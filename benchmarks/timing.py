"""Paired timing, working memory, and the table that they end in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

CAPTION = (
    "Seconds: medians of runs in alternating order, after compilation; ours/theirs: the median of the pairs' ratios, "
    "with quartiles. Compile: the first call with empty caches, less a later one. Memory: XLA's temporary buffers of "
    "one compiled update, or of one call (memory_analysis().temp_size_in_bytes); data and parameters come on top."
)


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g}" + (f" ({self.low:.3g}–{self.high:.3g})" if self.low < self.high else "")


class Sides(NamedTuple):
    """One figure of ours, one of theirs."""

    ours: float
    theirs: float

    def __str__(self) -> str:
        return f"{self.ours:.3g} / {self.theirs:.3g}"


@dataclass(frozen=True)
class Row:
    """A line of the table; what was not measured is ``None``.

    :ivar what: the comparison.
    :ivar seconds: ours and theirs.
    :ivar ratio: of the seconds, ours over theirs.
    :ivar compile: seconds of compilation.
    :ivar memory: MiB.
    :ivar note: what else was found, or why it was not run.
    """

    what: str
    seconds: Sides | None = None
    ratio: Spread | None = None
    compile: Sides | None = None
    memory: Sides | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        ours, theirs = (f"{s:.3g}" for s in self.seconds) if self.seconds else ("", "")
        measured = (str(part) if part else "" for part in (self.ratio, self.compile, self.memory))
        return (self.what, ours, theirs, *measured, device(), self.note)


HEADS = ("", "ours (s)", "theirs (s)", "ours/theirs", "compile (s)", "memory (MiB)", "device", "")


def not_run(what: str, reason: str) -> Row:
    """The row of a comparison whose requirement is missing."""
    return Row(what, note=f"not run: {reason}")


def device() -> str:
    """The device that JAX computes on."""
    kind = jax.devices()[0].device_kind
    return f"{os.cpu_count()} CPU cores" if kind == "cpu" else kind


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def paired(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, per: tuple[int, int] = (1, 1), num_pairs: int = 7
) -> dict[str, Any]:
    """Times two functions in alternating order; the seconds, ratio and compile of a :class:`Row`.

    :param per: how many units (updates) a call of each does; seconds are per unit.
    """
    sides = (ours, theirs)
    jax.clear_caches()
    first = [seconds(side) for side in sides]  # small programs that they share are compiled at our cost
    runs = np.empty((num_pairs, 2))
    for i in range(num_pairs):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            runs[i, j] = seconds(sides[j])
    medians = np.median(runs, 0)
    units = np.asarray(per)
    ratios = runs[:, 0] / runs[:, 1] * units[1] / units[0]
    return {
        "seconds": Sides(*(medians / units)),
        "ratio": Spread(*np.quantile(ratios, (0.25, 0.5, 0.75))),
        "compile": Sides(*np.maximum(np.asarray(first) - medians, 0)),
    }


def seconds(function: Callable[[], Any]) -> float:
    """The wall time of a call, its arrays computed."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def memory(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """MiB of temporary buffers of a jitted function."""
    analysis = function.lower(*args, **kwargs).compile().memory_analysis()  # type: ignore[attr-defined]
    return analysis.temp_size_in_bytes / 2**20


def as_text(rows: list[Row]) -> str:
    """The table in plain text."""
    table = [HEADS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def as_markdown(rows: list[Row]) -> str:
    """The table as GitHub's markdown."""
    lines = [HEADS, ("---",) * len(HEADS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
