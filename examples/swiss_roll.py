"""The paper's swiss roll: K beside L_null and the exact log density, samples, and its figure 1.

The paper gives neither its generator nor its noise, so its figures are those of other data; the exact density is the
yardstick here. At T = 40 and beta_1 = 3e-4 no model can come closer to it than 0.090 bits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pp_diffusion as ppd
from examples.report import arguments, mean_and_error, print_table, save_figure, with_error
from models import swiss_roll as script

FLOOR = 0.090  # bits; the best diagonal-Gaussian reverse kernel, T = 40, beta_1 = 3e-4, last step by the kernel


def run(
    *, num_steps: int = 8_000, num_train: int = 50_000, num_test: int = 2_000, figures: Path, progress: bool = True
) -> dict[str, Any]:
    """Trains, prints the table, writes the figures.

    :return: the paired gap to the exact density in bits, its error, and the fit.
    """
    data = ppd.datasets.swiss_roll(jax.random.key(0), num_train, num_test)
    diffusion = script.diffusion(ppd.standardize(data.train))
    started = time.perf_counter()
    fit = ppd.fit(jax.random.key(1), diffusion, data.train, num_steps=num_steps, progress_bar=progress)
    seconds = time.perf_counter() - started
    bound = ppd.lower_bound(jax.random.key(2), fit.prior, data.test, progress_bar=progress)

    assert data.log_prob is not None
    bits = ppd.units.nats_to_bits
    scale = bound.log_abs_det  # densities of the standardised data, as in the paper's table
    exact = np.asarray(data.log_prob(data.test))
    gap, error = mean_and_error(bits(exact - bound.value))
    print_table(
        f"Swiss roll, T = 40, {num_steps} updates of 512 in {seconds:.0f} s; bits per point of the standardised data",
        ("paper (other data)", "ours", "exact limit"),
        [
            ("K", "2.35", with_error(bits(bound.value + scale)), f"{bits(exact + scale).mean() - FLOOR:.3f}"),
            ("L_null", "-4.10", with_error(bits(bound.null + scale)), ""),
            ("K - L_null", "6.45", with_error(bits(bound.above_null)), ""),
            ("log p - K, paired", "", f"{gap:.3f} ± {error:.3f}", f"{FLOOR:.3f}"),
        ],
    )
    x = fit.prior.sample(jax.random.key(3), (num_test,))
    save_figure(ppd.plotting.samples(x, data.test, title="Swiss roll"), figures, "swiss_roll_samples.png")
    save_figure(ppd.plotting.trajectories(jax.random.key(4), fit.prior, data.test), figures, "swiss_roll_figure_1.png")
    return {"gap": gap, "gap_error": error, "fit": fit}


if __name__ == "__main__":
    args = arguments(__doc__)
    size = {"num_steps": 100, "num_test": 200} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
