"""The rows with images: training by the clock, K, rates, and figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pp_diffusion as ppd
from benchmarks import flops
from benchmarks.parzen import draw, parzen
from examples import bark, binarized_mnist, cifar10, dead_leaves, image_posteriors, images, mnist


class Row(NamedTuple):
    """A line of the table.

    :ivar what: what was measured.
    :ivar result: in words; ``None`` if it was not.
    :ivar note: how, or why not.
    """

    what: str
    result: str | None
    note: str = ""


class NotRun(Exception):
    """Something that a row needs is missing."""


class Case(NamedTuple):
    """An experiment with its data."""

    how: images.Experiment
    train: Any
    test: Any


class Trained(NamedTuple):
    """A case after training."""

    case: Case
    training: images.Training


MINUTES = {"cifar10": 4.5, "binarized_mnist": 2.0, "multi_scale": 1.5, "mnist": 1.0, "bark": 0.75, "dead_leaves": 0.75}


@dataclass
class Run:
    """One call.

    :ivar data: folder of the data sets, each in its standard files, in this folder or in one below.
    :ivar out: folder of the results.
    :ivar state: file of the CIFAR-10 U-Net's training state; the others' are beside it.
    :ivar minutes: of training, by row.
    :ivar small: whether sizes are tiny, to see that it runs.
    """

    data: Path | None
    out: Path
    state: Path
    minutes: dict[str, float]
    small: bool
    started: float = field(default_factory=time.perf_counter)
    numbers: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Trained] = field(default_factory=dict)

    def folder_of(self, pattern: str, what: str) -> Path:
        """The folder below ``data`` that holds such a file."""
        found = sorted(self.data.glob(f"**/{pattern}")) if self.data is not None else []
        if not found:
            raise NotRun(f"{what} is not at hand (--data)")
        return found[0].parent

    @cached_property
    def cifar10(self) -> ppd.datasets.Dataset:
        folder = self.folder_of("data_batch_[1-5]", "CIFAR-10")
        return ppd.datasets.cifar10(folder, num_batches=len(list(folder.glob("data_batch_[1-5]"))))

    def trained(self, name: str) -> Trained:
        """A trained network; from its file, where the row has been measured by an earlier call."""
        if name not in self.done:
            state = self.state if name == "cifar10" else self.state.with_name(f"{self.state.stem}_{name}.npz")
            measured = name in self.numbers
            if measured and not state.exists():
                raise NotRun(f"the trained network of an earlier call is not at hand ({state.name})")
            case = CASES[name](self)
            minutes = 0.0 if measured else 0.02 if self.small else self.minutes[name]
            say = partial(_say, case.how)
            training = images.train(case.train, case.how, minutes, resume=state, progress=False, after=say)
            self.done[name] = Trained(case, training)
            ppd.save(self.out / f"{name}.ppd", training.fit.prior)
        return self.done[name]

    @property
    def num_draws(self) -> int:
        """Images drawn at a time from networks of small images, everywhere: few shapes are compiled."""
        return 4 if self.small else 400

    @property
    def cifar10_chunk(self) -> int:
        """States per call of CIFAR-10's network, everywhere: few shapes are compiled."""
        return self.trained("cifar10").case.how.batch_size

    def few(self) -> Any:
        """CIFAR-10 images whose whole trajectories are followed, with noise on their levels."""
        return ppd.datasets.dequantize(jax.random.key(1), self.cifar10.test[: self.cifar10_chunk])


def _say(how: images.Experiment, training: images.Training) -> None:
    seconds, updates, bound = training.stages[-1]
    value = how.units[0].of(bound, 0.0)
    print(f"  {seconds:.0f} s, {updates} updates, batches' {value:.3f}; {training.per_update * 1e3:.1f} ms", flush=True)


# --- what is trained -----------------------------------------------------------------------------------------------


def _cifar10(run: Run) -> Case:
    how = cifar10.SMALL if run.small else cifar10.experiment()
    return Case(how, run.cifar10.train, run.cifar10.test)


def _multi_scale(run: Run) -> Case:
    how = cifar10.papers()
    if run.small:
        how = replace(how, diffusion=cifar10.script.diffusion(cifar10.papers_network(features=(4,), pixel_units=(4,))))
    return Case(replace(how, batch_size=8) if run.small else how, run.cifar10.train, run.cifar10.test)


def _binarized_mnist(run: Run) -> Case:
    data = ppd.datasets.binarized_mnist(run.folder_of("binarized_mnist_*", "binarized MNIST"))
    return Case(binarized_mnist.SMALL if run.small else binarized_mnist.experiment(), data.train, data.test)


def _mnist(run: Run) -> Case:
    data = ppd.datasets.mnist(run.folder_of("train-images-idx3-ubyte*", "MNIST"))
    return Case(mnist.SMALL if run.small else mnist.experiment(), data.train, data.test)


def _bark(run: Run) -> Case:
    data = ppd.datasets.image_folder(run.folder_of("*bark*.jpg", "a folder of bark"), grey=True)
    how = bark.small(data.train) if run.small else bark.experiment(data.train)
    return Case(how, data.train, bark.test_patches(data.test, 2_000))


def _dead_leaves(run: Run) -> Case:
    data = dead_leaves.data(run.small)
    return Case(dead_leaves.SMALL if run.small else dead_leaves.experiment(), data.train, data.test)


CASES: dict[str, Callable[[Run], Case]] = {
    "cifar10": _cifar10,
    "binarized_mnist": _binarized_mnist,
    "multi_scale": _multi_scale,
    "mnist": _mnist,
    "bark": _bark,
    "dead_leaves": _dead_leaves,
}


def training(name: str, run: Run) -> list[Row]:
    """Training by the clock, and K of the test images."""
    (how, train, test), trained = run.trained(name)
    fit = trained.fit
    num_times = 4 if run.small else 16
    rows = max(how.batch_size // num_times, 1)
    test = test[: 2 * rows] if run.small else test
    timed = time.perf_counter()
    found = images.bounds(jax.random.key(4), how, fit.params, test, num_times=num_times, rows=rows)
    took = time.perf_counter() - timed
    updates, weights = int(fit.state.step), sum(a.size for a in jax.tree.leaves(fit.params))
    rate = training_flops(how) * how.batch_size / max(trained.per_update, 1e-9)
    kind = "bfloat16" if getattr(how.network, "dtype", None) else "float32"
    ceiling = run.numbers.get("ceilings", {}).get(kind)
    share = f", {rate / ceiling:.0%} of the matrix product's in {kind}" if ceiling else ""
    stages = [(s.seconds, s.updates, float(how.units[0].of(s.bound, 0.0))) for s in trained.stages]
    run.numbers[name] = {
        **{f"{unit.what}, {unit.name}": unit.found(found) for unit in how.units},
        "updates": updates,
        "per_update": trained.per_update,
        "compile_seconds": trained.compile_seconds,
        "flops_per_second": rate,
        "stages": stages,
        "num_train": len(train),
        "num_test": len(test),
        "weights": weights,
    }
    path = ", ".join(f"{bound:.3f} after {seconds:.0f} s" for seconds, _, bound in stages)
    num_draws = run.cifar10_chunk if name == "cifar10" else run.num_draws
    x = images.sample_images(jax.random.key(7), how, fit.prior, num_draws)
    shown = how.shown(np.asarray(test[:num_draws]))
    figure = ppd.plotting.samples(x, shown, num_columns=10, title=how.title)
    figure.savefig(run.out / f"{name}_samples.png")
    drawn = f"{len(test)} images, {num_times} of T = {fit.diffusion.num_timesteps} steps drawn per image"
    return [
        *(
            Row(f"{how.title}, test images: {unit.what}", unit.say(found), f"{drawn}, in {took:.0f} s with compilation")
            for unit in how.units
        ),
        Row(
            "– training",
            f"{sum(s.seconds for s in trained.stages[-1:]) / 60:.3g} minutes, {updates} updates of {how.batch_size}",
            f"{_in_words(how.network)}, {weights / 1e6:.3g} M weights; {len(train)} training images; compilation "
            f"{trained.compile_seconds:.0f} s; {how.units[0].what} of training batches: {path}",
        ),
        Row(
            "– updates/s",
            f"{1 / trained.per_update:.1f} ({how.batch_size / trained.per_update:.0f} images/s)",
            f"{rate / 1e12:.3g} TFLOP/s in products{share}",
        ),
    ]


def _in_words(network: Any) -> str:
    if isinstance(network, ppd.networks.UNet):
        return f"U-Net {network.channels}, {network.num_blocks} blocks"
    return f"multi-scale convolutions {network.features}, dense {network.dense_units}, pixels {network.pixel_units}"


def training_flops(how: images.Experiment) -> int:
    """Of an update, per image: those of a call of the network, three times over."""
    x, t, level = jnp.zeros((1, *how.diffusion.event_shape)), jnp.ones(1, int), jnp.zeros(1)

    def call(params: Any, x: Any) -> Any:
        return how.diffusion.network(params, x, t, level, None)

    params = jax.eval_shape(lambda: how.diffusion.network.init(jax.random.key(0), x, t, level, None))
    return 3 * flops.count(call, params, x)


# --- CIFAR-10's U-Net ----------------------------------------------------------------------------------------------


def likelihood(run: Run) -> list[Row]:
    """K by whole trajectories, beside K by drawn steps, of the same images."""
    (how, _, test), trained = run.trained("cifar10")
    few, fit, chunk = run.few(), trained.fit, run.cifar10_chunk
    bound = partial(ppd.lower_bound, jax.random.key(5), fit.prior, num_samples=1, chunk_size=chunk)
    bound(few)  # compiles
    timed = time.perf_counter()
    value, error = _bits(how, bound(few))
    took = time.perf_counter() - timed
    drawn = images.bounds(jax.random.key(6), how, fit.params, test[: len(few)], num_times=4, rows=chunk // 4)
    return [
        Row(
            "K by whole trajectories, T = 1000",
            f"{len(few) / took:.3g} images/s",
            f"at most {value:.3f} ± {error:.3f} bits/dim of {len(few)} images; by drawn steps "
            f"{how.units[0].found(drawn)[0]:.3f}",
        )
    ]


def _bits(how: images.Experiment, bound: ppd.LowerBound) -> tuple[float, float]:
    return how.units[0].found(images.Bounds(np.asarray(bound.value, np.float64), np.asarray(bound.null, np.float64)))


def sampling(run: Run) -> list[Row]:
    """Draws by the whole chain and by a short one, and what the short one's bound is worse by."""
    (how, _, _), trained = run.trained("cifar10")
    fit, rows, few, chunk = trained.fit, [], run.few(), run.cifar10_chunk
    for num_timesteps in (fit.diffusion.num_timesteps, 50):
        prior = fit.diffusion.prior(fit.params, num_timesteps=num_timesteps)
        images.sample_images(jax.random.key(7), how, prior, chunk)  # compiles
        timed = time.perf_counter()
        x = images.sample_images(jax.random.key(8), how, prior, chunk)
        took = time.perf_counter() - timed
        figure = ppd.plotting.samples(x, title=f"CIFAR-10, {num_timesteps} steps")
        figure.savefig(run.out / f"cifar10_{num_timesteps}_steps.png")
        note = ""
        if num_timesteps < fit.diffusion.num_timesteps:
            bound = ppd.lower_bound(jax.random.key(5), prior, few, num_samples=1, chunk_size=chunk)
            value, error = _bits(how, bound)
            note = f"K of this chain: at most {value:.3f} ± {error:.3f} bits/dim of {len(few)} images"
        rows.append(Row(f"sampling, {num_timesteps} steps", f"{chunk / took:.3g} images/s", note))
    return rows


def precision(run: Run) -> list[Row]:
    """What computing inside the network in bfloat16 costs K: the same weights in float32, the same draws."""
    (how, _, test), trained = run.trained("cifar10")
    chunk = run.cifar10_chunk
    full = cifar10.script.diffusion(how.network.clone(dtype="float32", precision="highest"))
    ours, exact = (
        images.bounds(
            jax.random.key(9),
            replace(how, diffusion=diffusion),
            trained.fit.params,
            test[: 2 * chunk],
            num_times=4,
            rows=chunk // 4,
        )
        for diffusion in (how.diffusion, full)
    )
    less = how.units[0].found(ours)[0] - how.units[0].found(exact)[0]
    return [
        Row(
            f"K in {how.network.dtype or 'float32'} inside, less K in float32",
            f"{less:+.4f} bits/dim",
            f"the same weights and draws; {2 * chunk} images",
        )
    ]


def log_prob(run: Run) -> list[Row]:
    """log p by whole trajectories (eq. 9) beside K, where the verdict allows it."""
    (how, _, test), trained = run.trained("binarized_mnist")
    num, num_trajectories = (2, 4) if run.small else (32, 32)
    timed = time.perf_counter()
    found = ppd.estimate_log_prob(
        jax.random.key(6), trained.fit.prior, test[:num], num_trajectories, progress_bar=False
    )
    took = time.perf_counter() - timed
    verdicts = [str(name) for name in found.verdict.ravel()]
    said = ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts))
    value, error = images.mean_and_error(found.value)
    gap, gap_error = images.mean_and_error(found.value - found.bound)
    return [
        Row(
            f"{how.title}, log p by {num_trajectories} trajectories",
            f"{value:.1f} ± {error:.1f} nats, {gap:.1f} ± {gap_error:.1f} above K by the same trajectories",
            f"{num} images in {took:.0f} s with compilation; verdicts: {said}",
        )
    ]


# --- Table 2, and the paper's figures --------------------------------------------------------------------------------


def parzen_window(run: Run) -> list[Row]:
    """The paper's Table 2."""
    (_, train, test), trained = run.trained("mnist")
    num = 64 if run.small else 10_000
    timed = time.perf_counter()
    samples = draw(jax.random.key(0), trained.fit.prior, num, chunk=run.num_draws)
    took = time.perf_counter() - timed
    found = parzen(samples, train[-num // 5 :] / 255, test[:num] / 255)
    note = f"{num} samples in {took:.0f} s; bandwidth {found.bandwidth:.3f}; a figure not to be trusted"
    return [Row("MNIST, Parzen window", f"{found.value:.1f} ± {found.error:.1f} bits", note)]


SOURCES = {"denoise": "multi_scale", "digits": "mnist", "hole": "bark"}


def posterior(name: str, run: Run) -> list[Row]:
    """Noise taken from photographs, digits completed, or a hole in bark filled."""
    source, task = SOURCES[name], image_posteriors.TASKS[name]
    case, trained = run.trained(source)
    sizes = image_posteriors.SMALL if run.small else image_posteriors.LARGE
    data = _whole_bark(run) if name == "hole" else case.test
    timed = time.perf_counter()
    found = task.run(jax.random.key(3), trained.fit.prior, data, **sizes[name], progress=False)
    took = time.perf_counter() - timed
    found.figure.savefig(run.out / f"posterior_{name}.png")
    return [Row(task.title, found.text, f"{found.note}; {took:.0f} s with compilation")]


def _whole_bark(run: Run) -> Any:
    return ppd.datasets.image_folder(run.folder_of("*bark*.jpg", "a folder of bark"), grey=True).test
