"""MNIST: a U-Net trained for so many minutes, the bound K in bits per dimension, and samples.

    python -m examples.mnist --data DIR [--minutes M] [--small]

DIR holds the four IDX files, gzipped or not. The paper has no K for MNIST, but a Parzen window over samples
(``benchmarks/parzen.py``). With ``--state FILE`` training goes on from where the last call of this line left it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax

import pp_diffusion as ppd
from examples import images
from models import mnist as script

PUBLISHED = (
    ("Real NVP (as in Grathwohl et al. 2019)", "1.06"),
    ("Glow (Kingma and Dhariwal 2018)", "1.05"),
    ("FFJORD (Grathwohl et al. 2019)", "0.99"),
)
ON_CPU = images.Experiment(
    "MNIST",
    script.diffusion(script.for_cpu),
    script.batch,
    (images.bits_per_dim(math.prod(script.SHAPE)),),
    PUBLISHED,
    batch_size=64,
    rate=1e-3,
)
ON_GPU = replace(ON_CPU, diffusion=script.diffusion(script.for_gpu), batch_size=128, rate=1e-3, warm_up=200)
SMALL = replace(
    ON_CPU,
    diffusion=script.diffusion(script.sizes(channels=(8,), num_blocks=1, attention_levels=0)),
    batch_size=8,
    warm_up=10,
)


def experiment() -> images.Experiment:
    """What is trained on the device at hand."""
    return ON_CPU if jax.default_backend() == "cpu" else ON_GPU


def main() -> None:
    """The command line."""
    args = images.command_line(__doc__, 30.0, data="the IDX files").parse_args()
    data = ppd.datasets.mnist(args.data)
    how = SMALL if args.small else experiment()
    images.run(data.train, data.test, how, name="mnist", **images.settings(args))


if __name__ == "__main__":
    main()
