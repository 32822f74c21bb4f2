"""The paper's swiss roll: its own network, an MLP, and a long chain, beside the exact density.

The paper gives neither its generator nor its noise, so its figures are those of other data; the exact density is the
yardstick here, and the best reverse process of diagonal Gaussians (``examples/optimum.py``) is what a gap can fall to.
``python -m examples.swiss_roll`` runs all rows (about ten minutes on two cores); the short tour runs the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import AffineTransform

import pp_diffusion as ppd
from examples import gap
from examples.report import arguments, print_table, save_figure, with_error
from models import swiss_roll as script

KERNEL = ppd.GaussianKernel((2,))
MIDDLE = ppd.FixedSchedule.log_linear(400, first_beta=1e-4, final_log_snr=-7.0)
LONG = ppd.FixedSchedule.log_linear(1000, first_beta=1e-4, final_log_snr=-7.0)


def one_scale(data: Any) -> AffineTransform:
    """One constant scale for both coordinates, to variance 1 in the mean, as the paper scales its data."""
    x = np.asarray(data, np.float64)
    scale = float(np.sqrt(x.var(0).mean()))
    return AffineTransform(jnp.asarray(x.mean(0), float), jnp.full(2, scale), domain=script.dist.constraints.real)


class Row(NamedTuple):
    """One model: how it is made and trained, and the smallest gap that its kind can have, in bits (None: not known)."""

    name: str
    schedule: ppd.Schedule
    network: Any
    num_steps: int
    num_times: int = 4
    last_step: Any = "kernel"
    floor: float | None = None
    floor_of_log_p: float | None = None
    fresh: bool = False
    transform: Callable[[Any], Any] = ppd.standardize


SHORT, MLP = script.schedule, ppd.networks.MLP()
ROWS = {
    # read as in eqs. 64-65 (parameterization="paper"), its outputs leave up to twice the gap after as many updates
    "paper": Row("the paper's network, v, T=40", SHORT, ppd.networks.RBF(16), 8_000, transform=one_scale),
    "short": Row("MLP, T=40", SHORT, MLP, 4_000, floor=0.090, floor_of_log_p=0.011),
    "short-network": Row("MLP, T=40, last step by it", SHORT, MLP, 4_000, last_step="network", floor=0.051),
    "middle": Row("MLP, T=400", MIDDLE, MLP, 40_000, 2),
    "long": Row("MLP, T=1000", LONG, MLP, 40_000, 2, floor=0.018),
    "long-network": Row("MLP, T=1000, last step by it", LONG, MLP, 40_000, 2, "network", 0.005),
    "fresh": Row("MLP, T=1000, fresh points", LONG, MLP, 40_000, 2, floor=0.018, fresh=True),
    "fresh-network": Row("MLP, T=1000, fresh, last by it", LONG, MLP, 40_000, 2, "network", 0.005, fresh=True),
}


def fresh_points(rng_key: jax.Array) -> jax.Array:
    """A batch of new points."""
    return ppd.datasets.sample_swiss_roll(rng_key, 512)


def train(row: Row, data: Any, num_steps: int | None = None, *, progress: bool = True) -> tuple[Any, float]:
    """The fit of a row, and its seconds without compiling."""
    transform = row.transform(data.train)
    diffusion = ppd.Diffusion(KERNEL, row.schedule, row.network, transform=transform, last_step=row.last_step)
    source = fresh_points if row.fresh else data.train
    fit = partial(ppd.fit, jax.random.key(1), diffusion, source, num_times=row.num_times, val_prop=0.0)
    fit(num_steps=1, progress_bar=False)  # compiles
    started = time.perf_counter()
    result = fit(num_steps=num_steps or row.num_steps, progress_bar=progress)
    return result, time.perf_counter() - started


def run(
    rows: Sequence[str] = tuple(ROWS),
    *,
    num_steps: int | None = None,
    num_train: int = 50_000,
    num_test: int = 10_000,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains each row, prints the table, writes its samples and, with T = 40, the paper's figure 1.

    :return: for each row the paired gap of K to the exact density in bits, its error, and the fit.
    """
    data = ppd.datasets.swiss_roll(jax.random.key(0), num_train, num_test)
    bits, table, results = ppd.units.nats_to_bits, [], {}
    assert data.log_prob is not None
    for key in rows:
        row = ROWS[key]
        fit, seconds = train(row, data, num_steps, progress=progress)
        result = gap.of_bound(jax.random.key(2), fit.prior, data, progress=progress)
        bound, scale = result.bound, result.bound.log_abs_det  # densities of the scaled data, as in the paper's table
        if row.floor_of_log_p is None:
            log_p = ""
        else:
            few = ppd.datasets.Dataset(data.train, data.test[: num_test // 5], data.log_prob)
            log_p = "{:.4f} ± {:.4f}".format(*gap.of_log_prob(jax.random.key(3), fit.prior, few))
            log_p += f" ({row.floor_of_log_p})"
        table.append(
            (
                row.name,
                f"{num_steps or row.num_steps} in {seconds:.0f} s",
                with_error(bits(bound.value + scale)),
                with_error(bits(np.asarray(data.log_prob(data.test)) + np.asarray(scale))),
                with_error(bits(bound.above_null)),
                f"{result.value:.4f} ± {result.error:.4f}" + (f" ({row.floor})" if row.floor else ""),
                log_p,
            )
        )
        results[key] = {"gap": result.value, "gap_error": result.error, "fit": fit, "seconds": seconds}
    paper = ("paper, other data", "", "2.35", "", "6.45", "", "")
    columns = ("updates of 512", "K", "exact log p", "K - L_null", "gap of K (floor)", "gap of log p (floor)")
    print_table("Swiss roll; seconds without compiling; bits per point of the scaled data", columns, [paper, *table])
    for key in rows:
        prior, row = results[key]["fit"].prior, ROWS[key]
        x = prior.sample(jax.random.key(3), (min(num_test, 2_000),))
        figure = ppd.plotting.samples(x, data.test[:2_000], title=f"Swiss roll: {row.name}")
        save_figure(figure, figures, f"swiss_roll_{key}_samples.png")
        if row.schedule is SHORT:
            figure = ppd.plotting.trajectories(jax.random.key(4), prior, data.test)
            save_figure(figure, figures, f"swiss_roll_{key}_figure_1.png")
    return results


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"rows": ["paper", "short", "long-network"], "num_steps": 5, "num_test": 20}
    run(**size, figures=args.figures, progress=args.progress)
