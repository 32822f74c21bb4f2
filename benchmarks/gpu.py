"""All that is measured on a GPU, in calls of eight minutes.

    python -m benchmarks.gpu [--data DIR] [--out DIR] [--minutes NAME=M,...] [--deadline M] [--only NAME,...] [--small]

Rows are written to ``DIR/gpu.json`` and, as a table, ``DIR/gpu.md`` as they are measured; those that are there are not
measured again. What fails, lacks its data or comes after the deadline is a row that says so, and is tried anew by the
next call. It runs on any device, and names it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pp_diffusion as ppd
from benchmarks import gpu_images, mixture, posterior, sampling, training_step
from benchmarks.gpu_images import MINUTES, NotRun, Row, Run
from benchmarks.setting import swiss_roll
from benchmarks.timing import Row as Comparison
from benchmarks.timing import device, seconds

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
    "cifar10": partial(gpu_images.training, "cifar10"),
    "binarized_mnist": partial(gpu_images.training, "binarized_mnist"),
    "log_prob": gpu_images.log_prob,
    "multi_scale": partial(gpu_images.training, "multi_scale"),
    "mnist": partial(gpu_images.training, "mnist"),
    "parzen": gpu_images.parzen_window,
    "bark": partial(gpu_images.training, "bark"),
    "dead_leaves": partial(gpu_images.training, "dead_leaves"),
    "denoise": partial(gpu_images.posterior, "denoise"),
    "digits": partial(gpu_images.posterior, "digits"),
    "hole": partial(gpu_images.posterior, "hole"),
    "sampling": gpu_images.sampling,
    "likelihood": gpu_images.likelihood,
    "precision": gpu_images.precision,
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


def minutes_of(text: str) -> dict[str, float]:
    """``"4"``, or ``"cifar10=4,mnist=1"``.

    :raises ValueError: naming what is no such row.
    """
    parts = text.split(",") if "=" in text else [f"cifar10={text}"]
    given = {name: float(value) for name, _, value in (part.partition("=") for part in parts)}
    if unknown := set(given) - set(MINUTES):
        raise ValueError(f"--minutes takes {', '.join(MINUTES)}; got {', '.join(sorted(unknown))}")
    return {**MINUTES, **given}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's python version, MNIST's files, photographs")
    parser.add_argument("--out", type=Path, default=Path("figures/gpu"), help="folder of the results")
    parser.add_argument("--state", type=Path, help="file of the training's state (default: state.npz beside them)")
    default = ",".join(f"{name}={value:g}" for name, value in MINUTES.items())
    parser.add_argument("--minutes", default=default, help=f"of training; a number is cifar10's (default: {default})")
    parser.add_argument("--deadline", type=float, default=8.0, help="minutes after which no row is begun (default: 8)")
    parser.add_argument("--only", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"--only takes {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.data, args.out, args.state or args.out / "state.npz", minutes_of(args.minutes), args.small)
    print(f"{device()}, jax {jax.__version__}", flush=True)
    print(measure(run, names, 60 * args.deadline).as_markdown())


if __name__ == "__main__":
    main()
