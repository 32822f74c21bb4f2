"""MNIST by a Parzen window, as in the paper's Table 2: a figure to compare with others' of its kind, not to believe.

    python -m benchmarks.parzen --data DIR [--prior FILE] [--num 10000]

10 000 samples, a normal bump on each, one bandwidth for all, chosen on held-out training images; the mean log density
of the test images, which lie in 0…1. Without ``--prior`` the samples are training images: the ceiling, which a model
that has learned nothing but these by heart would reach. That is the reason not to trust it: in 784 dimensions so few
bumps say next to nothing of a density, a model's true likelihood may be anything beside them (Theis et al. 2016), and
samples that are closer to the test images than real ones, because they are smoother, are paid for it.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pp_diffusion as ppd
from examples.report import mean_and_error, print_table

BANDWIDTHS = np.exp(np.linspace(math.log(0.08), math.log(0.4), 24))
NUM_VALID = 2_000
ROWS = 200  # test images at a time
PUBLISHED = (  # bits; Goodfellow et al. 2014 have the same in nats, and 225 for GAN
    ("stacked CAE", "174 ± 2.3"),
    ("DBN", "199 ± 2.9"),
    ("deep GSN", "309 ± 1.6"),
    ("diffusion (the paper)", "317 ± 2.7"),
    ("adversarial net", "325 ± 2.9"),
    ("perfect model, 10 000 training images (the paper)", "349 ± 3.3"),
)


class Parzen(NamedTuple):
    """Of a set of test images.

    :ivar value: the mean log density, bits.
    :ivar error: its standard error over test images.
    :ivar bandwidth: the one chosen.
    """

    value: float
    error: float
    bandwidth: float


@partial(jax.jit, static_argnums=3)
def log_density(samples: Array, x: Array, bandwidths: Array, rows: int = ROWS) -> Array:
    """The log of the mean of normal bumps about the samples, nats.

    :param samples: shape ``(N, d)``.
    :param x: shape ``(M, d)``.
    :param bandwidths: standard deviations, shape ``(B,)``.
    :param rows: of x at a time.
    :return: shape ``(M, B)``.
    """
    num, size = samples.shape
    squares = (samples**2).sum(-1)

    def one(x: Array) -> Array:
        distance = jnp.maximum(squares - 2 * jnp.matmul(samples, x, precision="highest") + x @ x, 0.0)
        exponents = -0.5 * distance / bandwidths[:, None] ** 2
        norm = math.log(num) + size * (0.5 * math.log(2 * math.pi) + jnp.log(bandwidths))
        return jax.nn.logsumexp(exponents, axis=1) - norm

    return jax.lax.map(one, x, batch_size=min(rows, len(x)))


def parzen(samples: Any, valid: Any, test: Any) -> Parzen:
    """Chooses the bandwidth on ``valid`` and tells the density of ``test``; all of shape ``(N, …)``, values 0…1."""
    samples, valid, test = (jnp.asarray(a, dtype=float).reshape(len(a), -1) for a in (samples, valid, test))
    best = int(np.argmax(np.asarray(log_density(samples, valid, jnp.asarray(BANDWIDTHS))).mean(0)))
    if best in (0, len(BANDWIDTHS) - 1):
        print(f"bandwidth {BANDWIDTHS[best]:.3g} is the last that was tried")
    values = np.asarray(log_density(samples, test, jnp.asarray(BANDWIDTHS[best : best + 1])))[:, 0]
    value, error = mean_and_error(ppd.units.nats_to_bits(values.astype(np.float64)))
    return Parzen(value, error, float(BANDWIDTHS[best]))


def draw(rng_key: Array, prior: ppd.DiffusionPrior, num: int, chunk: int = 500) -> np.ndarray:
    """Samples in 0…1, clipped."""
    keys = jax.random.split(rng_key, -(-num // chunk))
    drawn = np.concatenate([np.asarray(prior.sample(key, (chunk,))) for key in keys])[:num]
    return np.clip(drawn / 256, 0, 1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--prior", type=Path, help="a trained diffusion of levels, as ppd.save writes it")
    parser.add_argument("--num", type=int, default=10_000, help="samples (default: 10000)")
    args = parser.parse_args()
    data = ppd.datasets.mnist(args.data)
    order = np.random.default_rng(0).permutation(len(data.train))
    train, test = data.train[order] / 255, data.test / 255
    valid, train = train[:NUM_VALID], train[NUM_VALID:]
    rows = []
    cases = {"training images": lambda: train[: args.num]}
    if args.prior is not None:
        cases["ours"] = lambda: draw(jax.random.key(0), ppd.load(args.prior), args.num)
    for name, samples in cases.items():
        found = parzen(samples(), valid, test)
        rows.append((name, f"{found.value:.1f} ± {found.error:.1f}", f"{found.bandwidth:.3f}"))
    print_table(
        f"MNIST, Parzen window: {args.num} samples, {len(test)} test images",
        ("bits per image", "bandwidth"),
        [*rows, *((name, value, "") for name, value in PUBLISHED)],
    )


if __name__ == "__main__":
    main()
