"""Static binarized MNIST: a binomial diffusion with a U-Net, K in nats, and samples.

    python -m examples.binarized_mnist --data DIR [--minutes M] [--small]

DIR holds ``binarized_mnist_train.amat`` and so on, or ``binarized_mnist_packed.npz``. Trained on the 50 000 training
images alone. With ``--state FILE`` training goes on from where the last call of this line left it.
"""

from __future__ import annotations

from dataclasses import replace

import jax

import pp_diffusion as ppd
from examples import images
from models import binarized_mnist as script

PUBLISHED = (
    ("NADE (Larochelle and Murray 2011)", "88.3"),
    ("DARN (Gregor et al. 2014)", "about 84.1"),
    ("PixelRNN (van den Oord et al. 2016)", "79.2"),
)
ON_CPU = images.Experiment(
    "Binarized MNIST",
    script.diffusion(script.for_cpu),
    script.batch,
    (images.nats(),),
    PUBLISHED,
    noise=images.keep,
    shown=images.as_they_are,
    batch_size=64,
    rate=2e-3,
    weight_decay=0.1,
)
ON_GPU = replace(ON_CPU, diffusion=script.diffusion(script.for_gpu), batch_size=256, rate=1.5e-3, warm_up=300)
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
    args = images.command_line(__doc__, 45.0, data="the lines of bits").parse_args()
    data = ppd.datasets.binarized_mnist(args.data)
    how = SMALL if args.small else experiment()
    images.run(data.train, data.test, how, name="binarized_mnist", **images.settings(args))


if __name__ == "__main__":
    main()
