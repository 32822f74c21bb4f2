"""All that is measured on a GPU, in one call of eight minutes.

    python -m benchmarks.gpu [--data DIR] [--out DIR] [--minutes M] [--deadline M] [--only NAME,...] [--small]

Rows are written to ``DIR/gpu.json`` and, as a table, ``DIR/gpu.md`` as they are measured; those that are there are not
measured again. What fails, lacks its data or comes after the deadline is a row that says so, and is tried anew by the
next call. It runs on any device, and names it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pp_diffusion as ppd
from benchmarks import flops, mixture, posterior, sampling, training_step
from benchmarks.setting import swiss_roll
from benchmarks.timing import Row as Comparison
from benchmarks.timing import device, seconds
from examples import cifar10 as example
from models import cifar10 as script


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


@dataclass
class Run:
    """One call.

    :ivar data: folder of CIFAR-10's python version.
    :ivar out: folder of the results.
    :ivar state: file of the training's state.
    :ivar minutes: of training.
    :ivar small: whether sizes are tiny, to see that it runs.
    :ivar peak: matrix products per second by precision, in FLOP, as measured.
    """

    data: Path | None
    out: Path
    state: Path
    minutes: float
    small: bool
    started: float = field(default_factory=time.perf_counter)
    numbers: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def how(self) -> example.Settings:
        return example.SMALL["how"] if self.small else example.settings()

    @cached_property
    def images(self) -> ppd.datasets.Dataset:
        if self.data is None:
            raise NotRun("CIFAR-10 is not at hand (--data)")
        num_batches = len(list(self.data.glob("**/data_batch_[1-5]")))
        return ppd.datasets.cifar10(self.data, num_batches=max(num_batches, 1))

    @cached_property
    def training(self) -> example.Training:
        """The trained network; from the file, where the row has been measured by an earlier call."""
        done = "cifar10" in self.numbers
        if done and not self.state.exists():
            raise NotRun("the trained network of an earlier call is not at hand (--state)")
        minutes = 0.0 if done else self.minutes
        return example.train(self.images.train, self.how, minutes, resume=self.state, progress=False, after=_say)

    @property
    def chunk(self) -> int:
        """States per call of the network, everywhere: few shapes are compiled."""
        return self.how.batch_size

    @property
    def num_few(self) -> int:
        """Images whose whole trajectories are followed."""
        return self.chunk

    def few(self) -> Any:
        """Those images, with noise on their levels."""
        return ppd.datasets.dequantize(jax.random.key(1), self.images.test[: self.num_few])


def _say(training: example.Training) -> None:
    print(f"  {training.stages[-1]}, {training.per_update * 1e3:.1f} ms per update", flush=True)


# --- rows: each returns its lines, and may leave numbers for others ------------------------------------------------


def ceilings(run: Run) -> list[Row]:
    """Matrix products as fast as they are had here."""
    size, repeats = (256, 2) if run.small else (8192, 20)
    rates = {}
    for name, dtype, precision in (
        ("float32", "float32", "highest"),
        ("TF32", "float32", "default"),
        ("bfloat16", "bfloat16", "default"),
    ):
        a, b = (jax.random.normal(jax.random.key(i), (size, size)) / size**0.5 for i in range(2))
        multiply = _repeated(repeats, precision)
        a, b = a.astype(dtype), b.astype(dtype)
        multiply(a, b).block_until_ready()
        taken = min(seconds(partial(multiply, a, b)) for _ in range(3))
        rates[name] = 2 * size**3 * repeats / taken
    run.numbers["ceilings"] = rates
    note = f"{size} × {size}, random numbers; TF32 is the default of float32 on a GPU"
    return [Row(f"matrix product, {name}", f"{rate / 1e12:.3g} TFLOP/s", note) for name, rate in rates.items()]


def _repeated(repeats: int, precision: str) -> Callable[[Any, Any], Any]:
    def multiply(a: Any, b: Any) -> Any:
        return jax.lax.fori_loop(0, repeats, lambda _, x: jnp.matmul(x, b, precision=precision), a)

    return jax.jit(multiply)


def cifar10(run: Run) -> list[Row]:
    """Training by the clock, and K of the test images."""
    images, training = run.images, run.training
    fit = training.fit
    num_test = 16 if run.small else len(images.test)
    num_times = 4 if run.small else 16
    timed = time.perf_counter()
    bound = partial(example.bits_per_dim, num_times=num_times, rows=max(run.chunk // num_times, 1))
    value, error = bound(jax.random.key(4), fit.diffusion, fit.params, images.test[:num_test])
    took = time.perf_counter() - timed
    updates = int(fit.state.step)
    rate = training_flops(run.how) * run.how.batch_size / training.per_update
    ceiling = run.numbers.get("ceilings", {}).get("bfloat16" if run.how.network.dtype else "float32")
    share = f", {rate / ceiling:.0%} of the matrix product's" if ceiling else ""
    weights = sum(a.size for a in jax.tree.leaves(fit.params))
    run.numbers["cifar10"] = {
        "bits_per_dim": value,
        "error": error,
        "updates": updates,
        "per_update": training.per_update,
        "compile_seconds": training.compile_seconds,
        "flops_per_second": rate,
        "stages": training.stages,
        "num_train": len(images.train),
        "num_test": num_test,
        "weights": weights,
    }
    how = f"U-Net {run.how.network.channels}, {run.how.network.num_blocks} blocks, {weights / 1e6:.3g} M weights"
    path = ", ".join(f"{stage.bits_per_dim:.3f} after {stage.seconds:.0f} s" for stage in training.stages)
    return [
        Row(
            "CIFAR-10, test images: K",
            f"at most {value:.3f} ± {error:.3f} bits/dim",
            f"{num_test} images, {num_times} of T = {script.T} steps drawn per image, in {took:.0f} s with compilation",
        ),
        Row(
            "– training",
            f"{run.minutes:.3g} minutes, {updates} updates of {run.how.batch_size}",
            f"{how}; trained on {len(images.train)} images; compilation {training.compile_seconds:.0f} s; "
            f"training batches: {path}",
        ),
        Row(
            "– updates/s",
            f"{1 / training.per_update:.1f} ({run.how.batch_size / training.per_update:.0f} images/s)",
            f"{rate / 1e12:.3g} TFLOP/s in products{share}",
        ),
    ]


def training_flops(how: example.Settings) -> int:
    """Of an update, per image: those of a call of the network, three times over."""
    x, t, level = jnp.zeros((1, *script.SHAPE)), jnp.ones(1, int), jnp.zeros(1)
    params = jax.eval_shape(how.network.init, jax.random.key(0), x, t, level)
    return 3 * flops.count(how.network.apply, params, x, t, level)


def likelihood(run: Run) -> list[Row]:
    """K by whole trajectories, beside K by drawn steps, of the same images."""
    few, fit = run.few(), run.training.fit
    bound = partial(ppd.lower_bound, jax.random.key(5), fit.prior, num_samples=1, chunk_size=run.chunk)
    bound(few)  # compiles
    timed = time.perf_counter()
    value, error = example.mean_and_error(ppd.units.bits_per_dim(np.asarray(bound(few).value), example.NUM_DIMS))
    took = time.perf_counter() - timed
    levels = run.images.test[: run.num_few]
    drawn, _ = example.bits_per_dim(
        jax.random.key(6), fit.diffusion, fit.params, levels, num_times=4, rows=run.chunk // 4
    )
    return [
        Row(
            "K by whole trajectories, T = 1000",
            f"{len(few) / took:.3g} images/s",
            f"at most {value:.3f} ± {error:.3f} bits/dim of {len(few)} images; by drawn steps {drawn:.3f}",
        )
    ]


def sampling_images(run: Run) -> list[Row]:
    """Draws by the whole chain and by a short one, and what the short one's bound is worse by."""
    fit, rows, few = run.training.fit, [], run.few()
    for num_timesteps in (script.T, 50):
        prior = fit.diffusion.prior(fit.params, num_timesteps=num_timesteps)
        example.sample_images(jax.random.key(7), prior, run.chunk)  # compiles
        timed = time.perf_counter()
        x = example.sample_images(jax.random.key(8), prior, run.chunk)
        took = time.perf_counter() - timed
        figure = ppd.plotting.samples(x, title=f"CIFAR-10, {num_timesteps} steps")
        figure.savefig(run.out / f"cifar10_{num_timesteps}_steps.png")
        note = ""
        if num_timesteps < script.T:
            bound = ppd.lower_bound(jax.random.key(5), prior, few, num_samples=1, chunk_size=run.chunk)
            value, error = example.mean_and_error(ppd.units.bits_per_dim(np.asarray(bound.value), example.NUM_DIMS))
            note = f"K of this chain: at most {value:.3f} ± {error:.3f} bits/dim of {len(few)} images"
        rows.append(Row(f"sampling, {num_timesteps} steps", f"{run.chunk / took:.3g} images/s", note))
    return rows


def precision(run: Run) -> list[Row]:
    """What computing inside the network in bfloat16 costs K: the same weights in float32, the same draws."""
    fit = run.training.fit
    full = script.diffusion(run.how.network.clone(dtype="float32", precision="highest"))
    levels = run.images.test[: 2 * run.chunk]
    bound = partial(example.bits_per_dim, jax.random.key(9), params=fit.params, levels=levels, num_times=4)
    ours, exact = (bound(diffusion=d, rows=run.chunk // 4)[0] for d in (fit.diffusion, full))
    return [
        Row(
            f"K in {run.how.network.dtype or 'float32'} inside, less K in float32",
            f"{ours - exact:+.4f} bits/dim",
            f"the same weights and draws; {len(levels)} images",
        )
    ]


def mlp(run: Run) -> list[Row]:
    """Training and draws of the swiss roll's perceptron, beside hand-written JAX."""
    train = swiss_roll(run.small).train
    updates, pairs = (16, 1) if run.small else (1000, 3)
    compared = [training_step.against_handwritten(train, 1000, 1, updates, pairs)]
    compared.append(training_step.against_single_updates(train, 1000, updates // 4, pairs))
    compared.append(sampling.against_handwritten(train, 1000, pairs))
    return [_as_row(comparison) for comparison in compared]


def smc(run: Run) -> list[Row]:
    """Posterior and evidence of the 25-mode mixture."""
    problem = mixture.problem(8, 2, 0)
    what = f"SMC of the mixture, d_x = 8, d_y = 2, {posterior.NUM_PARTICLES} particles: ours / hand-written"
    rows = [_as_row(Comparison(what, **posterior.against_handwritten(problem, 1 if run.small else 3)))]
    prior = mixture.mixture_prior(problem.weights, problem.matrix.shape[1])
    for num_particles in (1000,) if run.small else (1000, 65_536):
        sampler = ppd.SMC(posterior.model, num_particles=num_particles, twist="moment", progress_bar=False)
        arguments = (prior, *posterior.arguments(problem))
        sampler.run(jax.random.key(0), *arguments)  # compiles
        taken = min(seconds(partial(sampler.run, jax.random.key(1), *arguments)) for _ in range(3))
        rate = num_particles * prior.num_timesteps / taken
        error = sampler.log_evidence - problem.log_evidence
        note = f"{taken:.3g} s per run; error of log Z {error:+.3f}"
        rows.append(Row(f"– {num_particles} particles, T = 100", f"{rate:.3g} particles × steps/s", note))
    return rows


def _as_row(comparison: Comparison) -> Row:
    """A paired comparison as a line here."""
    assert comparison.seconds is not None and comparison.ratio is not None
    ours, theirs = comparison.seconds
    note = f"ours / theirs {comparison.ratio}" + (f"; {comparison.note}" if comparison.note else "")
    return Row(comparison.what, f"{ours * 1e3:.3g} ms / {theirs * 1e3:.3g} ms", note)


# in the order in which they matter, but for the first, which takes seconds and is needed by the next
ROWS: dict[str, Callable[[Run], list[Row]]] = {
    "ceilings": ceilings,
    "cifar10": cifar10,
    "sampling": sampling_images,
    "likelihood": likelihood,
    "precision": precision,
    "mlp": mlp,
    "smc": smc,
}


class Results:
    """The file of the rows, written anew after each of them."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "gpu.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def has(self, name: str) -> bool:
        """Whether it was measured, here or before."""
        return name in self.found and self.found[name]["measured"]

    def add(self, name: str, rows: list[Row], run: Run, took: float, *, measured: bool = True) -> None:
        self.found[name] = {
            "rows": [row._asdict() for row in rows],
            "numbers": run.numbers.get(name),
            "device": device(),
            "versions": f"jax {jax.__version__}",
            "seconds": took,
            "measured": measured,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1, ensure_ascii=False))
        (self.out / "gpu.md").write_text(self.as_markdown() + "\n")

    def as_markdown(self) -> str:
        """The table that the docs take in."""
        lines = ["| | measured | how | device |", "|---|---|---|---|"]
        for name in [*ROWS, *(name for name in self.found if name not in ROWS)]:
            if name not in self.found:
                lines.append(f"| {name} | not run | | |")
                continue
            for row in self.found[name]["rows"]:
                result = row["result"] or "not run"
                lines.append(f"| {row['what']} | {result} | {row['note']} | {self.found[name]['device']} |")
        return "\n".join(lines)


def measure(run: Run, names: list[str], deadline: float) -> Results:
    """The rows of these names that are not there yet.

    :param deadline: seconds after the start; no row is begun later.
    """
    results = Results(run.out)
    run.numbers |= {name: found["numbers"] for name, found in results.found.items() if found["numbers"]}
    for name in names:
        if results.has(name):
            continue
        timed = time.perf_counter()
        print(f"{name} … ({timed - run.started:.0f} s)", flush=True)
        try:
            if timed - run.started > deadline:
                raise NotRun("out of time")
            rows, measured = ROWS[name](run), True
        except NotRun as reason:
            rows, measured = [Row(name, None, f"not run: {reason}")], False
        except Exception as error:  # the other rows are worth having
            first = str(error).split("\n")[0][:300]
            rows, measured = [Row(name, None, f"failed: {type(error).__name__}: {first}")], False
        results.add(name, rows, run, time.perf_counter() - timed, measured=measured)
        for row in rows:
            print(f"  {row.what}: {row.result or 'not run'} ({row.note})", flush=True)
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's python version")
    parser.add_argument("--out", type=Path, default=Path("figures/gpu"), help="folder of the results")
    parser.add_argument("--state", type=Path, help="file of the training's state (default: state.npz beside them)")
    parser.add_argument("--minutes", type=float, default=4.5, help="of training on CIFAR-10 (default: 4.5)")
    parser.add_argument("--deadline", type=float, default=8.0, help="minutes after which no row is begun (default: 8)")
    parser.add_argument("--only", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"--only takes {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.data, args.out, args.state or args.out / "state.npz", args.minutes, args.small)
    print(f"{device()}, jax {jax.__version__}", flush=True)
    print(measure(run, names, 60 * args.deadline).as_markdown())


if __name__ == "__main__":
    main()
