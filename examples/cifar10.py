"""CIFAR-10: a U-Net trained for so many minutes, the bound K in bits per dimension, and samples.

    python -m examples.cifar10 --data DIR [--minutes M] [--small] [--network papers]

DIR holds the python version, ``cifar-10-batches-py``. On a CPU the network is small, on an accelerator larger; or it is
the paper's, of multi-scale convolutions. With ``--state FILE`` training goes on from where the last call of this line
left it, and writes there again.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax

import pp_diffusion as ppd
from examples import images
from models import cifar10 as script

NUM_DIMS = math.prod(script.SHAPE)
PUBLISHED = (
    ("the paper (2015), 5.4 bits/pixel", "at most 4.20"),
    ("DDPM's bound (Ho et al. 2020)", "at most 3.75"),
    ("Improved DDPM (Nichol and Dhariwal 2021)", "at most 2.94"),
    ("VDM (Kingma et al. 2021)", "at most 2.65"),
)
ON_CPU = images.Experiment(
    "CIFAR-10",
    script.diffusion(script.for_cpu),
    script.batch,
    (images.bits_per_dim(NUM_DIMS),),
    PUBLISHED,
    batch_size=32,
    rate=1e-3,
)
ON_GPU = replace(ON_CPU, diffusion=script.diffusion(script.for_gpu), batch_size=128, rate=5e-4, warm_up=500)
SMALL = replace(
    ON_CPU,
    diffusion=script.diffusion(script.sizes(channels=(8,), num_blocks=1, attention_levels=0)),
    batch_size=8,
    warm_up=10,
)


# the paper's: convolutions at four scales beside a dense path, time in the readout alone
papers_network = partial(ppd.networks.MultiScaleConv, num_scales=4)
PAPERS_ON_CPU = papers_network(features=(48,) * 4, dense_units=(256,), pixel_units=(64, 64))
PAPERS_ON_GPU = papers_network(
    features=(96,) * 5, dense_units=(256,), pixel_units=(96, 96), dtype="bfloat16", precision=None
)


def experiment() -> images.Experiment:
    """What is trained on the device at hand."""
    return ON_CPU if jax.default_backend() == "cpu" else ON_GPU


def papers() -> images.Experiment:
    """With the paper's network, of a size for the device at hand."""
    network = PAPERS_ON_CPU if jax.default_backend() == "cpu" else PAPERS_ON_GPU
    return replace(experiment(), title="CIFAR-10, the paper's network", diffusion=script.diffusion(network))


def main() -> None:
    """The command line."""
    parser = images.command_line(__doc__, 30.0, data="the python version")
    parser.add_argument("--network", choices=("unet", "papers"), default="unet", help="the network (default: unet)")
    args = parser.parse_args()
    how = papers() if args.network == "papers" else experiment()
    data = ppd.datasets.cifar10(args.data)
    how = SMALL if args.small else how
    images.run(data.train, data.test, how, name="cifar10", **images.settings(args))


if __name__ == "__main__":
    main()
