"""Dead leaves: the paper's multi-scale convolutions on generated images, K - L_null in bits per pixel, and samples.

    python -m examples.dead_leaves [--minutes M] [--small]

The paper's images are not to be had; these are our own generator's, and so figures for them are not comparable with
its 3.536 bits/pixel. ``benchmarks/image_baselines.py`` has other models of these same images. With ``--state FILE``
training goes on from where the last call of this line left it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax

import pp_diffusion as ppd
from examples import images
from models import dead_leaves as script

NUM_PIXELS = math.prod(script.SHAPE)
PUBLISHED = (
    ("the paper (2015), on other images", "3.536"),
    ("MCGSM (Theis et al. 2012), on those", "3.291"),
)
ON_CPU = images.Experiment(
    "Dead leaves",
    script.diffusion(script.for_cpu),
    script.batch,
    (images.bits_per_pixel_above_null(NUM_PIXELS), images.bits_per_pixel(NUM_PIXELS, float(script.transform.scale))),
    PUBLISHED,
    noise=images.keep,
    shown=images.as_they_are,
    batch_size=32,
    rate=2e-3,
)
ON_GPU = replace(ON_CPU, diffusion=script.diffusion(script.for_gpu), batch_size=128, rate=1e-3, warm_up=300)
SMALL = replace(
    ON_CPU, diffusion=script.diffusion(script.sizes(features=(4,), pixel_units=(4,))), batch_size=8, warm_up=10
)


def experiment() -> images.Experiment:
    """What is trained on the device at hand."""
    return ON_CPU if jax.default_backend() == "cpu" else ON_GPU


def data(small: bool = False) -> ppd.datasets.Dataset:
    """The images of the figures."""
    return ppd.datasets.dead_leaves(jax.random.key(0), *((32, 16) if small else (20_000, 2_000)))


def main() -> None:
    """The command line."""
    args = images.command_line(__doc__, 20.0, data=None).parse_args()
    leaves = data(args.small)
    how = SMALL if args.small else experiment()
    images.run(leaves.train, leaves.test, how, name="dead_leaves", **images.settings(args))


if __name__ == "__main__":
    main()
