"""The paper's binary heartbeat: K beside L_null and the best K that any reverse process can have, and samples."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax

import pp_diffusion as ppd
from examples.report import arguments, mean_and_error, print_table, save_figure, with_error
from models import heartbeat as script

CEILING = -2.3681  # bits; the exact factorised reverse process at T = 2000, last step by the kernel
NULL = -14.4386  # 20 bits at base rate 0.2


def run(*, num_steps: int = 6_000, num_test: int = 1_000, figures: Path, progress: bool = True) -> dict[str, Any]:
    """Trains, prints the table, writes the figure.

    :return: K in bits, its Monte Carlo error, and the fit.
    """
    data = ppd.datasets.heartbeat(jax.random.key(0), num_test=num_test)
    started = time.perf_counter()
    fit = ppd.fit(jax.random.key(1), script.diffusion(), data.train, num_steps=num_steps, progress_bar=progress)
    seconds = time.perf_counter() - started
    bound = ppd.lower_bound(jax.random.key(2), fit.prior, data.test, progress_bar=progress)
    bits = ppd.units.nats_to_bits
    value, error = mean_and_error(bits(bound.value))
    print_table(
        f"Binary heartbeat, T = {script.T}, {num_steps} updates of 512 in {seconds:.0f} s; bits per sequence",
        ("paper", "ours", "exact limit"),
        [
            ("K", "-2.414", with_error(bits(bound.value), 4), f"{CEILING:.4f}"),
            ("L_null", "-14.4386", with_error(bits(bound.null), 4), f"{NULL:.4f}"),
            ("K - L_null", "12.024", with_error(bits(bound.above_null), 4), f"{CEILING - NULL:.4f}"),
        ],
    )
    x = fit.prior.sample(jax.random.key(3), (1_000,))
    valid = float((data.log_prob(x) > -float("inf")).mean()) if data.log_prob else float("nan")
    print(f"samples that are heartbeats: {100 * valid:.1f} %")
    figure = ppd.plotting.samples(x, data.test, num_columns=6, title="Binary heartbeat")
    save_figure(figure, figures, "heartbeat_samples.png")
    return {"bound": value, "bound_error": error, "valid": valid, "fit": fit}


if __name__ == "__main__":
    args = arguments(__doc__)
    size = {"num_steps": 50, "num_test": 20} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
