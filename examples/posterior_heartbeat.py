"""Posteriors of bits: heartbeats of which some bins are known, or all are seen through flips, beside enumeration.

The data are five sequences of 20 bits, so that each posterior and each evidence is a sum of five terms. The diffusion
has learned them from examples; its sequences are those five but for one in some hundreds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pp_diffusion as ppd
from examples import heartbeat
from examples.report import arguments, print_table, save_figure
from models import heartbeat as script

KNOWN = {"bin 3 is 1": {3: 1}, "bins 0, 7 are 0": {0: 0, 7: 0}, "bins 1, 6, 12 are 0": {1: 0, 6: 0, 12: 0}}
PERIOD = 5
SEQUENCES = (np.arange(script.LENGTH) % PERIOD == np.arange(PERIOD)[:, None]).astype(int)
FLIPS = 0.25


def train(data: Any, num_steps: int | None = None, *, progress: bool = True) -> ppd.DiffusionPrior:
    """The network makes the last step too, so that a short chain of the same network loses little."""
    fit, _ = heartbeat.train(heartbeat.ROWS["network"], data, num_steps, progress=progress)
    return fit.prior


def bins_known(prior: ppd.DiffusionPrior, bins: Any, y: Any) -> None:
    """Some bins are observed exactly."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Delta(x[..., bins], event_dim=1), obs=y)


def flipped(prior: ppd.DiffusionPrior, y: Any) -> None:
    """Every bin of many sequences is observed, each through a flip with probability ``FLIPS``."""
    with numpyro.plate("sequences", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Bernoulli(jnp.where(x == 1, 1 - FLIPS, FLIPS)).to_event(1), obs=y)


def truth(log_likelihood: Any) -> tuple[np.ndarray, np.ndarray]:
    """The posterior of the five sequences, and the log evidence, from the log likelihood of each in the last axis."""
    joint = np.asarray(log_likelihood) - np.log(PERIOD)
    log_evidence = np.logaddexp.reduce(joint, axis=-1)
    return np.exp(joint - log_evidence[..., None]), log_evidence


class Result(NamedTuple):
    """Per observed y, the shares of the five sequences and the log evidence, beside the truth."""

    shares: np.ndarray
    exact: np.ndarray
    log_evidence: np.ndarray
    log_evidence_error: np.ndarray
    exact_log_evidence: np.ndarray


def infer(rng_key: jax.Array, model: Callable, exact: Any, *args: Any, num_particles: int, progress: bool) -> Result:
    """SMC, 8 chains."""
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=8, progress_bar=progress)
    smc.run(rng_key, *args)
    x = np.asarray(smc.get_samples()["x"])
    shares = np.stack([(x == sequence).all(-1).mean(0) for sequence in SEQUENCES], -1)
    return Result(shares, exact[0], np.asarray(smc.log_evidence), np.asarray(smc.log_evidence_error), exact[1])


def run(
    *,
    num_steps: int | None = None,
    num_timesteps: int = 200,
    num_particles: int = 256,
    num_sequences: int = 40,
    figures: Path,
    progress: bool = True,
) -> dict[str, Result]:
    """Trains, prints both tables, writes the figure."""
    data = ppd.datasets.heartbeat(jax.random.key(0))
    trained = train(data, num_steps, progress=progress)
    prior = trained.shortened(num_timesteps)
    setting = partial(infer, jax.random.key(1), num_particles=num_particles, progress=progress)
    results = {}
    for name, bins in KNOWN.items():
        index, y = np.array(list(bins)), np.array(list(bins.values()))
        possible = (SEQUENCES[:, index] == y).all(-1)
        exact = truth(np.where(possible, 0.0, -np.inf))
        results[name] = setting(bins_known, exact, prior, jnp.asarray(index), jnp.asarray(y))
    key = jax.random.key(2)
    y = jnp.where(jax.random.bernoulli(key, FLIPS, data.test[:num_sequences].shape), 1, 0) ^ data.test[:num_sequences]
    agree = (np.asarray(y)[:, None] == SEQUENCES).sum(-1)
    exact = truth(agree * np.log(1 - FLIPS) + (script.LENGTH - agree) * np.log(FLIPS))
    many = f"{num_sequences} sequences, each bin flipped with probability {FLIPS}"
    results[many] = setting(flipped, exact, prior, y)
    _print(results, many, f"T = {num_timesteps}, 8 times {num_particles} particles")
    save_figure(_figure(np.asarray(y), results[many]), figures, "posterior_heartbeat.png")
    return results


def _print(results: dict[str, Result], many: str, setting: str) -> None:
    table = []
    for name, found in results.items():
        if name == many:
            continue
        table.append(
            (name, "enumeration", *(f"{share:.3f}" for share in found.exact), f"{found.exact_log_evidence:.4f}")
        )
        evidence = f"{found.log_evidence:.4f} ± {found.log_evidence_error:.4f}"
        table.append(("", "SMC", *(f"{share:.3f}" for share in found.shares), evidence))
    columns = ("", *(f"phase {i}" for i in range(PERIOD)), "log evidence")
    print_table(f"Bins known exactly: posterior of the five heartbeats; {setting}", columns, table)
    found = results[many]
    variation = 0.5 * (np.abs(found.shares - found.exact).sum(-1) + 1 - found.shares.sum(-1))
    misses = found.log_evidence - found.exact_log_evidence
    errors = found.log_evidence_error[np.isfinite(found.log_evidence_error)]
    stated = (f"{errors.mean():.4f}", f"{errors.max():.4f}") if len(errors) else ("none", "none")
    others = 1 - found.shares.sum(-1)
    print_table(
        f"{many}: SMC beside enumeration",
        ("mean", "largest"),
        [
            ("total variation of the posterior", f"{variation.mean():.4f}", f"{variation.max():.4f}"),
            ("log evidence, SMC less exact (nats)", f"{misses.mean():.4f}", f"{np.abs(misses).max():.4f}"),
            (f"its standard error (nats), of {len(errors)} that did not collapse", *stated),
            ("share of draws that are none of the five", f"{others.mean():.4f}", f"{others.max():.4f}"),
        ],
    )


def _figure(y: np.ndarray, found: Result, num_shown: int = 12) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    panels = (
        ("seen, through flips", y),
        ("P(bin = 1), enumeration", found.exact @ SEQUENCES),
        ("P(bin = 1), SMC", found.shares @ SEQUENCES),
    )
    for axis, (title, bins) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        axis.imshow(bins[:num_shown], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set(title=title, xlabel="bin", xticks=range(0, script.LENGTH, PERIOD))
    figure.axes[0].set_ylabel("sequence")
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"num_steps": 5, "num_timesteps": 10, "num_particles": 32, "num_sequences": 4}
    run(**size, figures=args.figures, progress=args.progress)
