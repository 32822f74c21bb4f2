"""Posteriors by simulation: sbibm's tasks with its reference posteriors, by one recipe, and with the likelihood known.

``python -m benchmarks.simulation --data FOLDER [--task NAME …] [--simulations 10000] [--observations 10]``. FOLDER is
``sbibm/tasks`` of the unzipped wheel of sbibm 1.1.0 (``pip download sbibm==1.1.0 --no-deps``).

C2ST is the accuracy of a classifier that tells 10 000 draws from the reference's 10 000, by scikit-learn's
``MLPClassifier`` and 5 folds, as sbibm has it; .5 is best. *Amortised* are draws of ``amortize``, by one recipe for all
tasks: a wide network without and a narrow one with decay of its weights, of which the held-out simulations choose.
*Exact* are those of ``amortized.smc()``, which knows the likelihood. Coverage: how often the central 90 % of the
amortised draws hold the truth, coordinate by coordinate, of 1000 new pairs.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pp_diffusion as ppd
from benchmarks.simulation_tasks import Observation, Task, read_observation, tasks

NUM_DRAWS = 10_000
#: Mean C2ST of 10 observations at 10 000 simulations, from sbi-benchmark's results: NPE, and the best of its methods.
PUBLISHED = {
    "two_moons": (0.606, 0.554),
    "gaussian_mixture": (0.615, 0.551),
    "slcp": (0.901, 0.713),
    "bernoulli_glm": (0.678, 0.553),
    "gaussian_linear": (0.552, 0.536),
}


def c2st(draws: np.ndarray, reference: np.ndarray, seed: int = 1) -> float:
    """As sbibm: by a network of two layers of ten units for each coordinate, in 5 folds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, sd = reference.mean(0), reference.std(0, ddof=1)
    x = np.concatenate([(reference - mean) / sd, (draws - mean) / sd])
    labels = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * x.shape[1]
    classifier = MLPClassifier(hidden_layer_sizes=(width, width), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(classifier, x, labels, cv=folds).mean())


class Candidate(NamedTuple):
    """What is trained: the widths of the network's layers, and the decay of its weights."""

    hidden_units: tuple[int, ...]
    decay: float

    def diffusion(self, latents: Any) -> ppd.Diffusion:
        """As ``amortize`` has it by default, but for the network."""
        return ppd.Diffusion(
            ppd.GaussianKernel(latents.shape[1:]),
            ppd.LearnedSchedule(100, 1e-5),
            ppd.networks.MLP(self.hidden_units),
            transform=ppd.standardize(latents),
        )

    def optimizer(self, num_steps: int) -> Any:
        """As ``fit`` has it by default, and the decay; not of the schedule."""
        rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(50, num_steps // 2), num_steps)
        decayed = optax.adamw(rate, weight_decay=self.decay, mask=lambda params: {n: "network" in n for n in params})
        return optax.chain(optax.clip_by_global_norm(1.0), decayed)


#: One recipe for all tasks: both are trained, and the held-out rows choose.
RECIPE = (Candidate((256, 256, 256), 0.0), Candidate((128, 128, 128), 0.3))


def train(task: Task, num_simulations: int, num_steps: int, *, progress: bool = True) -> tuple[ppd.Amortized, float]:
    """The amortised posterior, and the seconds of both trainings."""
    started = time.perf_counter()
    found = [
        ppd.amortize(
            jax.random.key(0),
            task.model,
            observed="y",
            summary=lambda sites: task.summary(sites["y"]),
            num_simulations=num_simulations,
            num_steps=num_steps,
            diffusion=candidate.diffusion,
            optimizer=candidate.optimizer(num_steps),
            progress_bar=progress,
        )
        for candidate in RECIPE
    ]
    return max(found, key=lambda amortized: held_out(amortized)), time.perf_counter() - started


def held_out(amortized: ppd.Amortized) -> float:
    """The highest K of the held-out rows."""
    assert amortized.fit.validation is not None
    return float(amortized.fit.validation.values.max())


def coverage(amortized: ppd.Amortized, num_pairs: int = 1000, num_draws: int = 200) -> float:
    """The share of new pairs whose latents are in the central 90 % of the amortised draws, coordinate by coordinate."""
    latents, context = jax.jit(amortized.simulator.batch, static_argnums=1)(jax.random.key(1), num_pairs)
    draws = amortized.fit.prior(context).sample(jax.random.key(2), (num_draws,))
    rank = (draws < latents).mean(0)
    return float(jnp.mean((rank > 0.05) & (rank < 0.95)))


def exact_draws(amortized: ppd.Amortized, y: Any, num_particles: int) -> tuple[np.ndarray, ppd.AmortizedSMC]:
    """Of the posterior with the likelihood known."""
    smc = amortized.smc(num_particles=num_particles, num_chains=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppd.CollapseWarning)  # the table tells
        smc.run(jax.random.key(4), y=y)
    draws = np.asarray(smc.get_samples()["x"])
    return draws[np.random.default_rng(0).choice(len(draws), min(NUM_DRAWS, len(draws)), replace=False)], smc


def measure(
    name: str, task: Task, observations: list[Observation], num_simulations: int, **sizes: Any
) -> dict[str, Any]:
    """One row: C2ST of each observation, both ways, and what training and the weights say."""
    amortized, seconds = train(task, num_simulations, sizes["num_steps"], progress=sizes.get("progress", True))
    row: dict[str, Any] = {"task": name, "simulations": num_simulations, "seconds": seconds}
    row["held_out"] = held_out(amortized)
    row["coverage"] = coverage(amortized, *sizes.get("coverage", ()))
    row["amortised"], row["exact"], row["share"], row["verdicts"] = [], [], [], []
    for observation in observations:
        y, reference = jnp.asarray(observation.y), observation.reference
        draws = np.asarray(amortized.sample(jax.random.key(3), len(reference), y=y)["x"])
        row["amortised"].append(c2st(draws, reference))
        if sizes["num_particles"]:
            draws, smc = exact_draws(amortized, y, sizes["num_particles"])
            row["exact"].append(c2st(draws, reference[: len(draws)]))
            row["share"].append(float(smc.effective_share))
            row["verdicts"].append(smc.verdict)
        print(f"  {name}: {in_words(row)}", flush=True)
    return row


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    npe, best = PUBLISHED[row["task"]]
    published = f"published {npe:.3f} (NPE), {best:.3f} (best)" if row["simulations"] == 10_000 else ""
    told = [f"{row['simulations']} simulations, trained in {row['seconds']:.0f} s"]
    for way in ("amortised", "exact"):
        if row[way]:
            told.append(f"{way} {np.mean(row[way]):.3f} over {len(row[way])} ({min(row[way]):.3f}…{max(row[way]):.3f})")
    if row["share"]:
        told.append(f"effective {100 * np.mean(row['share']):.0f} %, {', '.join(sorted(set(row['verdicts'])))}")
    told.append(f"held-out K {row['held_out']:.2f}, coverage {row['coverage']:.3f}")
    return "; ".join([*told, published]).rstrip("; ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="sbibm/tasks of the unzipped wheel")
    parser.add_argument("--task", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--simulations", type=int, nargs="+", default=[10_000])
    parser.add_argument("--observations", type=int, default=10, help="the first so many of ten")
    parser.add_argument("--num-steps", type=int, default=6000)
    parser.add_argument("--particles", type=int, default=5000, help="in each of 8 chains; 0 does without exact rows")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    args = parser.parse_args()
    known = tasks(args.data)
    for name in args.task:
        numbers = range(1, args.observations + 1)
        observations = [read_observation(args.data, name, known[name].file, number) for number in numbers]
        for num_simulations in args.simulations:
            sizes = {"num_steps": args.num_steps, "num_particles": args.particles, "progress": args.progress}
            print(in_words(measure(name, known[name], observations, num_simulations, **sizes)), flush=True)


if __name__ == "__main__":
    main()
