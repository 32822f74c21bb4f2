"""Simple densities of the same images, in the same units: what a diffusion has to be better than.

    python -m benchmarks.image_baselines [--data DIR] [--only cifar10,mnist,bark,dead_leaves] [--small]

An isotropic normal law, one with a full covariance, scikit-learn's mixture of normal laws over patches of 8 × 8 (an
image is a product of its patches), and, for grey images, a conditional mixture in the manner of the MCGSM (Theis et al.
2012), which reads an image pixel by pixel. Each is fitted to the training images of the example of that name, and is
told by its test images; the diffusions' own figures are those of ``python -m examples.NAME``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import pp_diffusion as ppd
from examples import bark, cifar10, dead_leaves, images, mnist
from examples.report import print_table

PATCH = 8


class Case(NamedTuple):
    """Images, in data units with noise on their levels.

    :ivar how: the experiment, for its units.
    """

    how: images.Experiment
    train: np.ndarray
    test: np.ndarray


LogDensity = Callable[[np.ndarray], np.ndarray]
"""From images to log densities, nats."""


# --- normal laws ---------------------------------------------------------------------------------------------------


def isotropic(train: np.ndarray) -> LogDensity:
    """One mean and one variance for all pixels."""
    mean, variance = train.mean(), train.var()

    def log_density(x: np.ndarray) -> np.ndarray:
        return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance)).reshape(len(x), -1).sum(1)

    return log_density


def full(train: np.ndarray) -> LogDensity:
    """A mean for each pixel, and their covariance, shrunk as Ledoit and Wolf do."""
    from scipy.linalg import solve_triangular
    from sklearn.covariance import ledoit_wolf

    flat = train.reshape(len(train), -1)
    mean = flat.mean(0)
    root = np.linalg.cholesky(ledoit_wolf(flat - mean, assume_centered=True)[0])
    norm = np.log(np.diag(root)).sum() + 0.5 * len(mean) * math.log(2 * math.pi)

    def log_density(x: np.ndarray) -> np.ndarray:
        whitened = solve_triangular(root, (x.reshape(len(x), -1) - mean).T, lower=True)
        return -0.5 * (whitened**2).sum(0) - norm

    return log_density


def mixture(train: np.ndarray, num_components: int = 32, num_patches: int = 40_000) -> LogDensity:
    """Of patches, as if those of an image did not know of each other."""
    from sklearn.mixture import GaussianMixture

    patches = as_patches(train)
    flat = patches.reshape(-1, patches.shape[-1])
    chosen = np.random.default_rng(0).permutation(len(flat))[:num_patches]
    scale = flat.std()
    model = GaussianMixture(num_components, covariance_type="full", reg_covar=1e-5, max_iter=60, random_state=0)
    model.fit(flat[chosen] / scale)

    def log_density(x: np.ndarray) -> np.ndarray:
        patches = as_patches(x)
        scores = model.score_samples(patches.reshape(-1, patches.shape[-1]) / scale)
        return scores.reshape(len(x), -1).sum(1) - x[0].size * math.log(scale)

    return log_density


def as_patches(x: np.ndarray, side: int = PATCH) -> np.ndarray:
    """Shape ``(N, patches, side * side * colours)``; they tile the image.

    :raises ValueError: if they do not.
    """
    num, height, width = x.shape[:3]
    if height % side or width % side:
        raise ValueError(f"images must be tiled by patches of {side} × {side}; theirs is {height} × {width}")
    x = x.reshape(num, height // side, side, width // side, side, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(num, (height // side) * (width // side), -1)


# --- pixel by pixel ------------------------------------------------------------------------------------------------


def neighbours(x: Array, radius: int) -> Array:
    """The pixels that come before each one in reading order, up to ``radius`` away: rows above, and the left.

    :param x: shape ``(N, height, width)``.
    :return: shape ``(N, height, width, k)``; what is outside of the image is zero, and its last entries say what is.
    """
    height, width = x.shape[1:]
    both = jnp.stack([x, jnp.ones_like(x)], -1)
    padded = jnp.pad(both, ((0, 0), (radius, 0), (radius, radius), (0, 0)))
    before = [(i, j) for i in range(radius) for j in range(2 * radius + 1)] + [(radius, j) for j in range(radius)]
    found = jnp.stack([padded[:, i : i + height, j : j + width] for i, j in before], -2)
    # the farthest in each direction, and the nearest ones, say how near an edge is
    edges = [(0, 0), (0, radius), (0, 2 * radius), (radius, 0), (radius, radius - 1), (radius - 1, radius)]
    outside = 1 - found[..., jnp.array([before.index(place) for place in edges]), 1]
    return jnp.concatenate([found[..., 0], outside], -1)


def init(rng_key: Array, num_inputs: int, num_components: int, num_scales: int, rank: int) -> dict[str, Array]:
    """Weights of the conditional mixture."""
    keys = jax.random.split(rng_key, 3)
    spread = jnp.linspace(-1.0, 3.0, num_scales)
    return {
        "mean": 0.1 * jax.random.normal(keys[0], (num_components, num_inputs)),
        "offset": jnp.zeros(num_components),
        "gate": 0.1 * jax.random.normal(keys[1], (num_components, num_inputs)),
        "features": 0.1 * jax.random.normal(keys[2], (num_components, num_inputs, rank)),
        "bias": jnp.zeros((num_components, num_scales)),
        "log_precision": jnp.broadcast_to(spread, (num_components, num_scales)) + 1.0,
    }


def pixel_log_density(weights: dict[str, Array], x: Array, radius: int) -> Array:
    """log p(pixel | pixels before it), of shape ``(N, height, width)``: components c with means that are linear in the
    neighbours, scales s, and gates that know the neighbours' energy."""
    inputs = neighbours(x, radius)
    mean = inputs @ weights["mean"].T + weights["offset"]
    energy = ((jnp.einsum("...k,ckr->...cr", inputs, weights["features"])) ** 2).sum(-1)
    precision = jnp.exp(weights["log_precision"])
    gate = weights["bias"] + (inputs @ weights["gate"].T)[..., None] - 0.5 * precision * energy[..., None]
    residual = (x[..., None] - mean)[..., None]
    normal = 0.5 * (weights["log_precision"] - math.log(2 * math.pi) - precision * residual**2)
    joint = jax.nn.log_softmax(gate.reshape(*gate.shape[:-2], -1)) + normal.reshape(*normal.shape[:-2], -1)
    return jax.nn.logsumexp(joint, -1)


def conditional(
    train: np.ndarray,
    *,
    num_components: int = 16,
    num_scales: int = 4,
    rank: int = 6,
    radius: int = 4,
    updates: int = 3_000,
    pixels: int = 8_192,
) -> LogDensity:
    """Fitted by Adam to the log density of whole images, so many that an update has about as many pixels."""
    batch = max(pixels // math.prod(train.shape[1:]), 1)
    loc, scale = float(train.mean()), float(train.std())
    data = jnp.asarray((train - loc) / scale, dtype=float)
    size = neighbours(data[:1], radius).shape[-1]
    weights = init(jax.random.key(0), size, num_components, num_scales, rank)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.warmup_cosine_decay_schedule(0.0, 5e-3, 50, updates))
    )

    def loss(weights: dict[str, Array], x: Array) -> Array:
        return -pixel_log_density(weights, x, radius).mean()

    @jax.jit
    def fit(weights: dict[str, Array]) -> dict[str, Array]:
        def update(i: Array, carry: Any) -> Any:
            weights, state = carry
            x = ppd.datasets.draw_rows(jax.random.fold_in(jax.random.key(1), i), data, batch)
            step, state = optimizer.update(jax.grad(loss)(weights, x), state)
            return optax.apply_updates(weights, step), state

        return jax.lax.fori_loop(0, updates, update, (weights, optimizer.init(weights)))[0]

    weights = fit(weights)

    @jax.jit
    def of(x: Array) -> Array:
        return jax.lax.map(lambda one: pixel_log_density(weights, one[None], radius).sum(), x, batch_size=8)

    def log_density(x: np.ndarray) -> np.ndarray:
        found = of(jnp.asarray((x - loc) / scale, dtype=float))
        return np.asarray(found, np.float64) - x[0].size * math.log(scale)

    return log_density


# --- the table -----------------------------------------------------------------------------------------------------


def levels_of(data: ppd.datasets.Dataset, num_train: int, num_test: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels with noise on them, as the diffusions are told of them."""
    keys = jax.random.split(jax.random.key(4))
    train, test = data.train[:num_train], data.test[:num_test]
    return tuple(
        np.asarray(ppd.datasets.dequantize(k, x), np.float64) for k, x in zip(keys, (train, test), strict=True)
    )


def cases(folder: Path | None, small: bool) -> dict[str, Callable[[], Case]]:
    """The images, read when they are asked for."""
    num_train, num_test = (300, 20) if small else (50_000, 2_000)

    def of_bark() -> Case:
        data = ppd.datasets.image_folder(folder, grey=True)
        patches = partial(ppd.datasets.random_patches, height=64, width=64)
        train = patches(jax.random.key(5), jnp.asarray(data.train), num_train // 5)
        both = ppd.datasets.Dataset(train, bark.test_patches(data.test, num_test))
        return Case(bark.experiment(data.train), *levels_of(both, num_train, num_test))

    def of_leaves() -> Case:
        data = dead_leaves.data(small)
        train, test = (np.asarray(x[:n], np.float64) for x, n in ((data.train, num_train), (data.test, num_test)))
        return Case(dead_leaves.experiment(), train, test)

    return {
        "cifar10": lambda: Case(cifar10.experiment(), *levels_of(ppd.datasets.cifar10(folder), num_train, num_test)),
        "mnist": lambda: Case(mnist.experiment(), *levels_of(ppd.datasets.mnist(folder), num_train, num_test)),
        "bark": of_bark,
        "dead_leaves": of_leaves,
    }


def rows(case: Case, small: bool) -> list[tuple[str, ...]]:
    """The table of one data set."""
    sizes = {"num_components": 2, "updates": 5} if small else {}
    fits: dict[str, Callable[[np.ndarray], LogDensity]] = {"isotropic normal": isotropic, "normal": full}
    if not any(side % PATCH for side in case.train.shape[1:3]):
        fits["mixture over patches of 8 × 8"] = partial(mixture, **({"num_components": 2} if small else {}))
    if case.train.ndim == 3:
        fits["conditional mixture, pixel by pixel"] = partial(conditional, **sizes)
    kernel, space = case.how.diffusion.kernel, case.how.diffusion.space
    z = space.to_model(jnp.asarray(case.test, dtype=float))
    null = np.asarray(kernel.null_log_prob(z) - space.log_abs_det(z, case.test), np.float64)
    table = []
    for name, fit in fits.items():
        started = time.perf_counter()
        values = fit(case.train)(case.test)
        took = time.perf_counter() - started
        told = [f"{value:.3f} ± {error:.3f}" for value, error in _told(case.how, values, null)]
        table.append((name, *told, f"{took:.0f}"))
        print(table[-1], flush=True)
    return table


def _told(how: images.Experiment, values: np.ndarray, null: np.ndarray) -> list[tuple[float, float]]:
    return [unit.found(images.Bounds(values, null)) for unit in how.units]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--only", default="dead_leaves", help="some of cifar10, mnist, bark, dead_leaves")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    known = cases(args.data, args.small)
    names = args.only.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"--only takes {', '.join(known)}; got {', '.join(sorted(unknown))}")
    for name in names:
        case = known[name]()
        heads = tuple(f"{unit.what}, {unit.name}".replace("K", "log p") for unit in case.how.units)
        title = f"{case.how.title}: {len(case.train)} training images, {len(case.test)} test images"
        print_table(title, (*heads, "seconds"), rows(case, args.small))


if __name__ == "__main__":
    main()
