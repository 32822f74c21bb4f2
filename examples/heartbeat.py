"""The paper's binary heartbeat: its own network, an MLP, and one that makes the last step too, beside exact limits.

A limit is K of the exact factorised reverse process; nothing can be above it but by Monte Carlo error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import pp_diffusion as ppd
from examples.report import arguments, mean_and_error, print_table, save_figure, with_error
from models import heartbeat as script

NULL = -14.4386  # bits; 20 of them at base rate 0.2


class Row(NamedTuple):
    """One model: its network, how it is trained, and the highest possible K in bits."""

    name: str
    network: Any
    num_steps: int = 4_000
    num_times: int = 4
    peak_rate: float = 1e-2
    b2: float = 0.999
    last_step: Any = "kernel"
    limit: float = -2.3681


SMALL = ppd.networks.MLP((50, 50, 50))
ROWS = {
    "paper": Row(
        "the paper's network",  # two million weights of readouts; each is drawn rarely, hence the many times and rates
        ppd.networks.MLP((50, 50, 50), activation="sigmoid", readout="per_step"),
        2_000,
        16,
        3e-2,
        0.99,
    ),
    "quick": Row("MLP 50-50-50, briefly", SMALL, 300),
    "small": Row("MLP 50-50-50", SMALL),
    "default": Row("MLP 128-128-128 (default)", ppd.networks.MLP(), 5_000, 2, 6e-3),
    "network": Row("MLP 50-50-50, last step by it", SMALL, last_step="network", limit=-2.3241),
}


def optimizer(row: Row, num_steps: int) -> optax.GradientTransformation:
    """Clipped Adam as in ``fit``, with rates for these networks."""
    rate = optax.warmup_cosine_decay_schedule(0.0, row.peak_rate, num_steps // 20, num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=row.b2))


def train(row: Row, data: Any, num_steps: int | None = None, *, progress: bool = True) -> tuple[Any, float]:
    """The fit of a row, and its seconds without compiling."""
    diffusion = ppd.Diffusion(script.kernel, script.schedule, row.network, last_step=row.last_step)
    num_steps = num_steps or row.num_steps
    fit = partial(ppd.fit, jax.random.key(1), diffusion, data.train, num_times=row.num_times, val_prop=0.0)
    rule = optimizer(row, num_steps)
    fit(num_steps=1, optimizer=rule, progress_bar=False)  # compiles
    started = time.perf_counter()
    result = fit(num_steps=num_steps, optimizer=rule, progress_bar=progress)
    return result, time.perf_counter() - started


def run(
    rows: Sequence[str] = tuple(ROWS),
    *,
    num_steps: int | None = None,
    num_test: int = 4_000,
    num_samples: int = 1_000,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains each row, prints the table, writes the figures.

    :return: for each row K in bits, its Monte Carlo error, and the fit.
    """
    data = ppd.datasets.heartbeat(jax.random.key(0), num_test=num_test)
    bits, table, results = ppd.units.nats_to_bits, [], {}
    for key in rows:
        row = ROWS[key]
        fit, seconds = train(row, data, num_steps, progress=progress)
        bound = ppd.lower_bound(jax.random.key(2), fit.prior, data.test, progress_bar=progress)
        value, error = mean_and_error(bits(bound.value))
        x = fit.prior.sample(jax.random.key(3), (num_samples,))
        valid = float((data.log_prob(x) > -float("inf")).mean()) if data.log_prob else float("nan")
        table.append(
            (
                row.name,
                f"{num_steps or row.num_steps} × 512 × {row.num_times} in {seconds:.1f} s",
                with_error(bits(bound.value), 4),
                f"{row.limit:.4f}",
                with_error(bits(bound.above_null), 4),
                f"{100 * valid:.1f} %",
            )
        )
        results[key] = {"bound": value, "bound_error": error, "valid": valid, "fit": fit, "seconds": seconds}
        figure = ppd.plotting.samples(x, data.test, num_columns=6, title=f"Binary heartbeat: {row.name}")
        save_figure(figure, figures, f"heartbeat_{key}_samples.png")
    paper = ("paper", "", "-2.414", "-2.3681", "12.024", "")
    columns = ("updates × rows × times", "K", "exact limit", "K - L_null", "heartbeats among samples")
    title = (
        f"Binary heartbeat, T = {script.T}; seconds without compiling; bits per sequence; "
        f"L_null = {NULL}, log p of the data = -2.3219"
    )
    print_table(title, columns, [paper, *table])
    return results


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"rows": ["paper", "network"], "num_steps": 5, "num_test": 10, "num_samples": 10}
    run(**size, figures=args.figures, progress=args.progress)
