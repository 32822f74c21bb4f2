"""Photographs of bark: the paper's multi-scale convolutions on patches, K - L_null in bits per pixel, and samples.

    python -m examples.bark --data DIR [--minutes M] [--small]

DIR holds photographs of one size, of any texture. The paper's (Lazebnik et al. 2005, T01-T04) are not shipped, and
figures for other photographs are not comparable with its 1.5 bits/pixel. The lowest quarter of each is the test's. With
``--state FILE`` training goes on from where the last call of this line left it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

import pp_diffusion as ppd
from examples import images
from models import bark as script

NUM_PIXELS = math.prod(script.SHAPE)
PUBLISHED = (("the paper (2015), on other photographs", "1.5"),)


def experiment(levels: Any, *, network: Any = None, **settings: Any) -> images.Experiment:
    """What is trained on the device at hand; mean and scale are those of the photographs."""
    on_cpu = jax.default_backend() == "cpu"
    network = network or (script.for_cpu if on_cpu else script.for_gpu)
    loc, scale = float(levels.mean()) + 0.5, float(levels.std())
    sizes = {"batch_size": 16, "rate": 2e-3} if on_cpu else {"batch_size": 64, "rate": 1e-3, "warm_up": 300}
    return images.Experiment(
        "Bark",
        script.diffusion(network, loc, scale),
        script.batch,
        (
            images.bits_per_pixel_above_null(NUM_PIXELS),
            images.bits_per_pixel(NUM_PIXELS, scale),
            images.bits_per_dim(NUM_PIXELS),
        ),
        PUBLISHED,
        **(sizes | settings),
    )


def small(levels: Any) -> images.Experiment:
    """A tiny one."""
    return experiment(levels, network=script.sizes(features=(4,), pixel_units=(4,)), batch_size=4, warm_up=10)


def test_patches(levels: np.ndarray, num: int) -> np.ndarray:
    """Patches of the test's part, at places drawn once for all."""
    return np.asarray(ppd.datasets.random_patches(jax.random.key(8), jax.numpy.asarray(levels), num, *script.SHAPE))


def main() -> None:
    """The command line."""
    args = images.command_line(__doc__, 20.0, data="photographs").parse_args()
    data = ppd.datasets.image_folder(args.data, grey=True)
    how = small(data.train) if args.small else experiment(data.train)
    test = test_patches(data.test, 2_000)
    images.run(data.train, test, how, name="bark", **images.settings(args))


if __name__ == "__main__":
    main()
