"""CIFAR-10: a U-Net trained for so many minutes, the bound K in bits per dimension, and samples.

    python -m examples.cifar10 --data DIR [--minutes M] [--small]

DIR holds the python version, ``cifar-10-batches-py``. On a CPU the network is small, on an accelerator larger. With
``--state FILE`` training goes on from where the last call of this line left it, and writes there again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd
from examples.report import mean_and_error, print_table, save_figure
from models import cifar10 as script

NUM_DIMS = math.prod(script.SHAPE)
LAST_STAGE = 90.0  # seconds; with more time left, half of it comes first, and the clock is read again
PUBLISHED = (
    ("the paper (2015), 5.4 bits/pixel", "4.20"),
    ("DDPM's bound (Ho et al. 2020)", "3.75"),
    ("Improved DDPM (Nichol and Dhariwal 2021)", "2.94"),
    ("VDM (Kingma et al. 2021)", "2.65"),
)


@dataclass(frozen=True)
class Settings:
    """Of the training.

    :ivar network: the network.
    :ivar batch_size: images per update.
    :ivar rate: the learning rate after warm-up; it falls to zero by a cosine.
    :ivar warm_up: updates of it.
    """

    network: Any
    batch_size: int
    rate: float
    warm_up: int

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped Adam. How many updates there will be is in its state, so that it can be set by the clock."""

        def adam(num_steps: Any) -> optax.GradientTransformation:
            def rate(step: Array) -> Array:
                fall = 0.5 + 0.5 * jnp.cos(jnp.pi * jnp.minimum(step / num_steps, 1))
                return self.rate * jnp.minimum((step + 1) / self.warm_up, 1) * fall

            return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

        return optax.inject_hyperparams(adam)(num_steps=1e6)


def settings() -> Settings:
    """What is trained on the device at hand."""
    if jax.default_backend() == "cpu":
        return Settings(script.for_cpu, batch_size=32, rate=1e-3, warm_up=100)
    return Settings(script.for_gpu, batch_size=128, rate=5e-4, warm_up=500)


class Stage(NamedTuple):
    """After a call of ``fit``: seconds of training so far, updates so far, and K of that call's last batches."""

    seconds: float
    updates: int
    bits_per_dim: float


@dataclass(frozen=True)
class Training:
    """What came of it.

    :ivar fit: the last fit; its parameters are running averages.
    :ivar compile_seconds: of the first update.
    :ivar per_update: seconds.
    :ivar stages: one after each call of ``fit``.
    """

    fit: ppd.FitResult = field(repr=False)
    compile_seconds: float
    per_update: float
    stages: tuple[Stage, ...]


def train(
    levels: Any,
    how: Settings,
    minutes: float,
    *,
    resume: Path | None = None,
    progress: bool = True,
    after: Callable[[Training], None] | None = None,
) -> Training:
    """Trains by the clock: the learning rate falls to zero when the time is over.

    :param levels: images, unsigned bytes of shape ``(N, 32, 32, 3)``; they are kept on the device.
    :param minutes: of training, compilation apart.
    :param resume: a file to go on from, if it is there, and to write the state to after each call of ``fit``.
    :param after: is told after each call of ``fit``.
    """
    batches = Partial(jax.jit(partial(script.batch, size=how.batch_size)), levels=jnp.asarray(levels))
    fits = partial(ppd.fit, jax.random.key(0), script.diffusion(how.network), batches, optimizer=how.optimizer())
    fits = partial(fits, progress_bar=progress)
    started = time.perf_counter()
    fit = fits(num_steps=1)
    found = Training(fit, time.perf_counter() - started, 0.0, ())
    if resume is not None and resume.exists():
        fit = replace(fit, state=load_state(resume, fit.state))
    started, took = time.perf_counter(), []
    for count in (8, 64):  # they tell what a call costs, and what an update
        timed = time.perf_counter()
        fit = fits(num_steps=count, state=fit.state)
        took.append(time.perf_counter() - timed)
    per_update = max((took[1] - took[0]) / (64 - 8), 1e-6)
    per_call = max(took[0] - 8 * per_update, 0.0)
    while (left := 60 * minutes - (time.perf_counter() - started)) > per_call + per_update:
        to_come = int((left - per_call) / per_update)
        state = optax.tree_utils.tree_set(fit.state, num_steps=jnp.float32(fit.state.step + to_come))
        count = to_come if left < LAST_STAGE else (to_come + 1) // 2
        timed = time.perf_counter()
        fit = fits(num_steps=count, state=state)
        seconds = time.perf_counter()
        per_update = max((seconds - timed - per_call) / count, 1e-6)
        reached = ppd.units.bits_per_dim(-float(fit.losses[-200:].mean()), NUM_DIMS)
        stage = Stage(seconds - started, int(fit.state.step), reached)
        found = replace(found, fit=fit, per_update=per_update, stages=(*found.stages, stage))
        if resume is not None:
            save_state(resume, fit.state)
        if after is not None:
            after(found)
    return replace(found, fit=fit, per_update=per_update)


def save_state(path: Path, state: Any) -> None:
    """Writes the arrays of a state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, *(jax.random.key_data(a) if _is_key(a) else a for a in jax.tree.leaves(state)))


def load_state(path: Path, like: Any) -> Any:
    """The state that :func:`save_state` wrote, of the structure of another one.

    :raises ValueError: if it is that of another network or optimiser.
    """
    leaves, structure = jax.tree.flatten(like)
    with np.load(path) as arrays:
        read = [jnp.asarray(arrays[name]) for name in arrays.files]
    shapes = [jnp.shape(jax.random.key_data(a) if _is_key(a) else a) for a in leaves]
    if [a.shape for a in read] != shapes:
        raise ValueError(f"{path} is the state of another network or optimizer: its arrays have other shapes")
    return structure.unflatten(
        [jax.random.wrap_key_data(new) if _is_key(old) else new for new, old in zip(read, leaves, strict=True)]
    )


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def bits_per_dim(
    rng_key: Array, diffusion: ppd.Diffusion, params: Any, levels: Any, *, num_times: int = 16, rows: int = 8
) -> tuple[float, float]:
    """An upper bound on the code length, by K with ``num_times`` steps drawn per image, and its standard error over
    images and draws. Unbiased, as T network calls per image are.

    :param rows: images at a time; ``rows * num_times`` states are one call of the network.
    """
    num = len(levels) // rows
    images = jnp.asarray(levels[: num * rows]).reshape(num, rows, *script.SHAPE)
    keys = jax.random.split(rng_key, num)
    values = np.asarray(_mean_bounds(diffusion, params, images, keys, num_times), np.float64)
    return mean_and_error(ppd.units.bits_per_dim(values, NUM_DIMS))


@partial(jax.jit, static_argnums=4)
def _mean_bounds(diffusion: ppd.Diffusion, params: Any, images: Array, keys: Array, num_times: int) -> Array:
    """K of each batch of images, the mean over its images, in nats."""

    def one(given: tuple[Array, Array]) -> Array:
        noise_key, rng_key = jax.random.split(given[1])
        x = ppd.datasets.dequantize(noise_key, given[0])
        program = partial(diffusion.bound_model, num_times=num_times)
        return -Trace_ELBO().loss(rng_key, params, program, diffusion.bound_guide, x) / len(x)

    return jax.lax.map(one, (images, keys))


def sample_images(rng_key: Array, prior: ppd.DiffusionPrior, num: int) -> np.ndarray:
    """Draws as colours in 0…1."""
    return np.clip(np.asarray(prior.sample(rng_key, (num,))) / 256, 0, 1)


def run(
    data: ppd.datasets.Dataset,
    *,
    minutes: float = 30.0,
    how: Settings | None = None,
    num_test: int = 2_000,
    num_times: int = 8,
    num_samples: int = 64,
    resume: Path | None = None,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, prints the table, writes the figure.

    :return: the bound on the code length in bits/dim, its error over the test images, and the training.
    """
    training = train(data.train, how or settings(), minutes, resume=resume, progress=progress)
    fit = training.fit
    test = data.test[:num_test]
    value, error = bits_per_dim(jax.random.key(4), fit.diffusion, fit.params, test, num_times=num_times)
    print(f"K: at most {value:.3f} ± {error:.3f} bits/dim")
    print_table(
        f"CIFAR-10, T = {script.T}, {int(fit.state.step)} updates in {minutes:.3g} minutes and "
        f"{training.compile_seconds:.0f} s of compilation; {len(test)} test images",
        ("bits/dim of code length",),
        [("ours", f"at most {value:.3f} ± {error:.3f}"), *((name, f"at most {bits}") for name, bits in PUBLISHED)],
    )
    x = sample_images(jax.random.key(5), fit.prior, num_samples)
    figure = ppd.plotting.samples(x, data.test / 256, num_columns=math.isqrt(num_samples), title="CIFAR-10")
    save_figure(figure, figures, "cifar10_samples.png")
    return {"bits_per_dim": value, "error": error, "training": training}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the python version")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training (default: 30)")
    parser.add_argument("--state", type=Path, help="file to go on from, if it is there, and to write to (.npz)")
    parser.add_argument("--small", action="store_true", help="a small network for seconds, to see that it runs")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder for the figure")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    args = parser.parse_args()
    sizes = SMALL if args.small else {"minutes": args.minutes}
    data = ppd.datasets.cifar10(args.data)
    run(data, **sizes, resume=args.state, figures=args.figures, progress=args.progress)


SMALL: dict[str, Any] = {
    "minutes": 0.05,
    "how": Settings(script.sizes(channels=(8, 8), num_blocks=1), batch_size=8, rate=1e-3, warm_up=10),
    "num_test": 16,
    "num_samples": 4,
}

if __name__ == "__main__":
    main()
