"""scikit-learn's handwritten digits: a density over 64 pixels with fresh dequantisation noise, and samples.

The paper has no figures for these data. K bounds the code length of the integer levels 0…16, in bits per dimension.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

import pp_diffusion as ppd
from examples.report import arguments, mean_and_error, print_table, save_figure, with_error
from models import digits as script

NUM_STEPS = 2_500


def train(data: Any, num_steps: int | None = None, *, progress: bool = True) -> tuple[Any, float]:
    """The fit, and its seconds without compiling.

    Clipped Adam as in ``fit``, with decay of the weights: 1 437 images are soon known by heart.
    """
    num_steps = num_steps or NUM_STEPS
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, num_steps // 20, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.3))
    batches = partial(script.batch, levels=data.train)
    fit = partial(ppd.fit, jax.random.key(3), script.diffusion(), batches, optimizer=optimizer)
    fit(num_steps=1, progress_bar=False)  # compiles
    started = time.perf_counter()
    result = fit(num_steps=num_steps, progress_bar=progress)
    return result, time.perf_counter() - started


def run(
    *, num_steps: int = NUM_STEPS, num_test: int = 360, num_samples: int = 100, figures: Path, progress: bool = True
) -> dict[str, Any]:
    """Trains, prints the table, writes the figure.

    :return: the bound on the code length in bits/dim, its error over the test images, and the fit.
    """
    data = ppd.datasets.digits(jax.random.key(0), num_test=num_test)
    test = ppd.datasets.dequantize(jax.random.key(1), data.test)
    fit, seconds = train(data, num_steps, progress=progress)
    bound = ppd.lower_bound(jax.random.key(4), fit.prior, test, progress_bar=progress)
    code_length = partial(ppd.units.bits_per_dim, num_dims=64)
    value, error = mean_and_error(code_length(bound.value))
    bits = ppd.units.nats_to_bits
    print_table(
        f"Digits 8×8, T = {script.T}, {num_steps} updates of 256 in {seconds:.0f} s; {num_test} test images",
        ("ours", "in bits/dim of code length"),
        [
            ("K (bits per image)", with_error(bits(bound.value), 2), f"at most {value:.3f} ± {error:.3f}"),
            ("L_null", with_error(bits(bound.null), 2), f"{code_length(bound.null.mean()):.3f}"),
            ("K - L_null", with_error(bits(bound.above_null), 2), ""),
        ],
    )
    x = fit.prior.sample(jax.random.key(5), (num_samples,))
    save_figure(ppd.plotting.samples(x, test, title="Handwritten digits, 8×8"), figures, "digits_samples.png")
    return {"bits_per_dim": value, "error": error, "fit": fit}


if __name__ == "__main__":
    args = arguments(__doc__)
    size = {"num_steps": 5, "num_test": 4, "num_samples": 4} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
