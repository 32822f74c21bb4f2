"""All side-by-side measurements in one table: ``python -m benchmarks [--small] [--only NAME,...]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import (
    digits,
    fit_overhead,
    flow,
    flow_accuracy,
    flow_density,
    flow_draws,
    flow_posteriors,
    gradient_variance,
    likelihood,
    naive_numpyro,
    posterior,
    precision,
    sampling,
    training_step,
    unet_step,
)
from benchmarks.timing import CAPTION, Row, as_markdown, as_text


def main() -> None:
    """Measures, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--only",
        help="some of training_step, fit_overhead, sampling, likelihood, naive_numpyro, gradient_variance, precision, "
        "flow, flow_accuracy, flow_density, flow_draws, flow_posteriors, digits, posterior, unet_step",
    )
    parser.add_argument("--markdown", action="store_true", help="the table as GitHub's markdown")
    parser.add_argument("--fresh", action="store_true", help="flow: endless fresh points for both")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder for the figure of flow")
    args = parser.parse_args()
    comparisons: dict[str, Callable[[bool], list[Row]]] = {
        "training_step": training_step.rows,
        "fit_overhead": fit_overhead.rows,
        "sampling": sampling.rows,
        "likelihood": likelihood.rows,
        "naive_numpyro": naive_numpyro.rows,
        "gradient_variance": gradient_variance.rows,
        "precision": precision.rows,
        "flow": partial(flow.rows, fresh=args.fresh, figures=args.figures),
        "flow_accuracy": flow_accuracy.rows,
        "flow_density": flow_density.rows,
        "flow_draws": flow_draws.rows,
        "flow_posteriors": flow_posteriors.rows,
        "digits": digits.rows,
        "posterior": posterior.rows,
        "unet_step": unet_step.rows,
    }
    names = args.only.split(",") if args.only else list(comparisons)
    if unknown := set(names) - set(comparisons):
        parser.error(f"--only takes {', '.join(comparisons)}; got {', '.join(sorted(unknown))}")
    table = []
    for name in names:
        print(f"{name} …", flush=True)
        table += comparisons[name](args.small)
    print("\n" + (as_markdown if args.markdown else as_text)(table))
    print("\n" + CAPTION)


if __name__ == "__main__":
    main()
