"""What the examples with images share: training by the clock, its state on disk, K in the data's units, a command line.

    python -m examples.NAME --data DIR [--minutes M] [--small]

With ``--state FILE`` training goes on from where the last call of this line left it, and writes there again.
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

LAST_STAGE = 90.0  # seconds; with more time left, half of it comes first, and the clock is read again


# --- units ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """How a bound is told.

    :ivar what: what of it.
    :ivar side: ``"at most"`` for lengths of code, ``"at least"`` for log-likelihoods.
    :ivar name: of the unit.
    :ivar of: from K and L_null, in nats per image in data units, to this unit.
    """

    what: str
    side: str
    name: str
    of: Callable[[Any, Any], Any]

    def found(self, bounds: Bounds) -> tuple[float, float]:
        """The mean over the images, and its standard error."""
        return mean_and_error(self.of(bounds.value, bounds.null))

    def say(self, bounds: Bounds) -> str:
        value, error = self.found(bounds)
        return f"{self.side} {value:.3f} ± {error:.3f} {self.name}"


def bits_per_dim(num_dims: int) -> Unit:
    """Of the code of levels one apart, with uniform noise on them."""
    return Unit("K", "at most", "bits/dim", lambda value, null: ppd.units.bits_per_dim(value, num_dims))


def nats() -> Unit:
    """Of the code of bits, per image."""
    return Unit("K", "at most", "nats", lambda value, null: -value)


def bits_per_pixel(num_pixels: int, scale: float) -> Unit:
    """K as in the paper's Table 1: a log density of the data over ``scale``, whose variance is one."""
    return Unit(
        "K",
        "at least",
        "bits/pixel",
        lambda value, null: ppd.units.nats_to_bits(value) / num_pixels + math.log2(scale),
    )


def bits_per_pixel_above_null(num_pixels: int) -> Unit:
    """K - L_null as in the paper's Table 1."""
    return Unit(
        "K - L_null",
        "at least",
        "bits/pixel",
        lambda value, null: ppd.units.nats_to_bits(value - null) / num_pixels,
    )


# --- experiments ---------------------------------------------------------------------------------------------------


def keep(rng_key: Array, x: Array) -> Array:
    """Data as they are."""
    return x


def as_they_are(x: np.ndarray) -> np.ndarray:
    """Values in 0…1, shown so."""
    return np.clip(x, 0, 1)


def as_levels(x: np.ndarray) -> np.ndarray:
    """Levels 0…255 and noise on them, as grey or colours in 0…1."""
    return np.clip(x / 256, 0, 1)


@dataclass(frozen=True)
class Experiment:
    """What is trained, how, and how it is reported.

    :ivar title: of figure and table.
    :ivar diffusion: the diffusion.
    :ivar batch: ``(rng_key, data, size) -> x``, a batch in data units.
    :ivar units: in which K is told; the first is the one to compare with others'.
    :ivar published: others' figures in the first unit, with their source.
    :ivar noise: ``(rng_key, data) -> x``, what is added to images before K is computed.
    :ivar shown: from x to grey or colours in 0…1.
    :ivar batch_size: images per update.
    :ivar rate: the learning rate after warm-up; it falls to zero by a cosine.
    :ivar warm_up: updates of it.
    :ivar weight_decay: of the weights, in units of the learning rate.
    :ivar average: the decay of the parameters' running average.
    """

    title: str
    diffusion: ppd.Diffusion
    batch: Callable[..., Array]
    units: tuple[Unit, ...]
    published: tuple[tuple[str, str], ...] = ()
    noise: Callable[[Array, Array], Array] = ppd.datasets.dequantize
    shown: Callable[[np.ndarray], np.ndarray] = as_levels
    batch_size: int = 32
    rate: float = 1e-3
    warm_up: int = 100
    weight_decay: float = 0.0
    average: float = 0.999

    @property
    def network(self) -> Any:
        """The network, told T and the number of its outputs."""
        return self.diffusion.network.module

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped Adam. How many updates there will be is in its state, so that it can be set by the clock."""

        def adam(num_steps: Any) -> optax.GradientTransformation:
            def rate(step: Array) -> Array:
                fall = 0.5 + 0.5 * jnp.cos(jnp.pi * jnp.minimum(step / num_steps, 1))
                return self.rate * jnp.minimum((step + 1) / self.warm_up, 1) * fall

            return optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=self.weight_decay)
            )

        return optax.inject_hyperparams(adam)(num_steps=1e6)


# --- training ------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """After a call of ``fit``: seconds of training so far, updates so far, and K of that call's last batches, nats."""

    seconds: float
    updates: int
    bound: float


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
    data: Any,
    how: Experiment,
    minutes: float,
    *,
    resume: Path | None = None,
    progress: bool = True,
    after: Callable[[Training], None] | None = None,
) -> Training:
    """Trains by the clock: the learning rate falls to zero when the time is over.

    :param data: what batches are drawn from; kept on the device.
    :param minutes: of training, compilation apart.
    :param resume: a file to go on from, if it is there, and to write the state to after each call of ``fit``.
    :param after: is told after each call of ``fit``.
    """
    draw = jax.jit(lambda data, rng_key: how.batch(rng_key, data, how.batch_size))
    batches = Partial(draw, jnp.asarray(data))
    fits = partial(ppd.fit, jax.random.key(0), how.diffusion, batches, optimizer=how.optimizer())
    fits = partial(fits, progress_bar=progress, average=how.average)
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
        stage = Stage(seconds - started, int(fit.state.step), -float(fit.losses[-200:].mean()))
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


# --- what came of it -----------------------------------------------------------------------------------------------


class Bounds(NamedTuple):
    """K and L_null in nats per image, means of a few images each."""

    value: np.ndarray
    null: np.ndarray


def bounds(rng_key: Array, how: Experiment, params: Any, images: Any, *, num_times: int = 16, rows: int = 8) -> Bounds:
    """K with ``num_times`` steps drawn per image: unbiased, as T network calls per image are.

    :param rows: images at a time; ``rows * num_times`` states are one call of the network.
    """
    num = len(images) // rows
    images = jnp.asarray(images[: num * rows]).reshape(num, rows, *how.diffusion.event_shape)
    keys = jax.random.split(rng_key, num)
    found = _mean_bounds(how.diffusion, params, images, keys, num_times, how.noise)
    return Bounds(*(np.asarray(a, np.float64) for a in found))


@partial(jax.jit, static_argnums=(4, 5))
def _mean_bounds(
    diffusion: ppd.Diffusion, params: Any, images: Array, keys: Array, num_times: int, noise: Any
) -> tuple[Array, Array]:
    """K and L_null of each batch of images, the means over its images, in nats."""

    def one(given: tuple[Array, Array]) -> tuple[Array, Array]:
        noise_key, rng_key = jax.random.split(given[1])
        x = noise(noise_key, given[0])
        z = diffusion.space.to_model(x)
        null = diffusion.kernel.null_log_prob(z) - diffusion.space.log_abs_det(z, x)
        program = partial(diffusion.bound_model, num_times=num_times)
        return -Trace_ELBO().loss(rng_key, params, program, diffusion.bound_guide, x) / len(x), null.mean()

    return jax.lax.map(one, (images, keys))


def sample_images(rng_key: Array, how: Experiment, prior: ppd.DiffusionPrior, num: int) -> np.ndarray:
    """Draws as grey or colours in 0…1."""
    return how.shown(np.asarray(prior.sample(rng_key, (num,))))


def run(
    train_data: Any,
    test: Any,
    how: Experiment,
    *,
    name: str,
    minutes: float,
    num_test: int = 2_000,
    num_times: int = 8,
    num_samples: int = 64,
    resume: Path | None = None,
    prior: Path | None = None,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, prints K and the table, writes ``figures/NAME_samples.png``.

    :param train_data: what batches are drawn from.
    :param test: images to report K of.
    :param prior: a file to write the trained diffusion to.
    :return: K in the first unit, its error over the test images, and the training.
    """
    training = train(train_data, how, minutes, resume=resume, progress=progress)
    fit, test = training.fit, test[:num_test]
    found = bounds(jax.random.key(4), how, fit.params, test, num_times=num_times)
    for unit in how.units:
        print(f"{unit.what}: {unit.say(found)}")
    first = how.units[0]
    print_table(
        f"{how.title}, T = {fit.diffusion.num_timesteps}, {int(fit.state.step)} updates in {minutes:.3g} minutes and "
        f"{training.compile_seconds:.0f} s of compilation; {len(test)} test images",
        (f"{first.what}, {first.name}",),
        [("ours", first.say(found).removesuffix(f" {first.name}")), *how.published],
    )
    if prior is not None:
        ppd.save(prior, fit.prior)
    x = sample_images(jax.random.key(5), how, fit.prior, num_samples)
    num_columns = math.isqrt(num_samples)
    figure = ppd.plotting.samples(x, how.shown(np.asarray(test[:num_samples])), num_columns=num_columns)
    figure.suptitle(how.title)
    save_figure(figure, figures, f"{name}_samples.png")
    value, error = first.found(found)
    return {"value": value, "error": error, "training": training}


def command_line(doc: str | None, minutes: float, *, data: str | None) -> argparse.ArgumentParser:
    """``--minutes``, ``--state``, ``--small``, ``--figures``, ``--no-progress``, and ``--data`` where there is any.

    :param minutes: the default.
    :param data: what the folder holds.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data is not None:
        parser.add_argument("--data", type=Path, required=True, help=f"folder of {data}")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"of training (default: {minutes:g})")
    parser.add_argument("--state", type=Path, help="file to go on from, if it is there, and to write to (.npz)")
    parser.add_argument("--prior", type=Path, help="file to write the trained diffusion to")
    parser.add_argument("--small", action="store_true", help="a small network for seconds, to see that it runs")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder for the figure")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`run` takes of the command line."""
    size = SMALL if args.small else {"minutes": args.minutes}
    return {**size, "resume": args.state, "prior": args.prior, "figures": args.figures, "progress": args.progress}


SMALL: dict[str, Any] = {"minutes": 0.03, "num_test": 16, "num_samples": 4, "num_times": 4}
