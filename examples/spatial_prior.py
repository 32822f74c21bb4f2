"""A spatial prior learned from simulation: counts at some sites of a line, beside NUTS on the Gaussian process itself.

The surface f is a Gaussian process of which nobody knows the length scale. A diffusion learns the law of f, length
scale and all, from endless draws, and then stands for it in a model of counts with an unknown intercept and amplitude.
NUTS samples the same model with the Gaussian process written out. Both are asked for 90 % intervals of the log rate at
all sites, of surfaces that the model itself has drawn, so that nine in ten are to be covered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, Predictive

import pp_diffusion as ppd
from examples.report import (
    arguments,
    chain_evidences,
    interval,
    print_table,
    save_figure,
    size_between_chains,
    size_within_chains,
    with_error,
)

NUM_SITES = 40
SITES = np.linspace(0, 1, NUM_SITES)
OBSERVED = np.arange(0, NUM_SITES, 3)
LENGTH_SCALE = dist.LogNormal(np.log(0.3), 0.5)
INTERCEPT, AMPLITUDE = dist.Normal(1.0, 0.5), dist.Gamma(8.0, 8.0)
JITTER = 1e-4


def covariance(length_scale: Any) -> jax.Array:
    """A Matérn process, ν = 3/2, of variance 1."""
    distance = np.sqrt(3) * np.abs(SITES[:, None] - SITES) / length_scale
    return ((1 + distance) * jnp.exp(-distance) + JITTER * jnp.eye(NUM_SITES)) / (1 + JITTER)


def quantiles(num: int = 200) -> jax.Array:
    """Length scales of equal probability, for averages over them."""
    return LENGTH_SCALE.icdf((jnp.arange(num) + 0.5) / num)


def surfaces(rng_key: jax.Array, num_scales: int = 64, num_each: int = 8) -> jax.Array:
    """A batch of draws: some to each length scale, because a Cholesky factor costs more than they do."""
    scale_key, key = jax.random.split(rng_key)
    roots = jnp.linalg.cholesky(jax.vmap(covariance)(LENGTH_SCALE.sample(scale_key, (num_scales,))))
    noise = jax.random.normal(key, (num_scales, num_each, NUM_SITES))
    return jnp.einsum("sij,snj->sni", roots, noise).reshape(-1, NUM_SITES)


def exact_log_prob(f: jax.Array) -> np.ndarray:
    """Of surfaces, averaged over length scales."""

    def given(length_scale: jax.Array) -> jax.Array:
        return dist.MultivariateNormal(0.0, covariance(length_scale)).log_prob(f)

    log_probs = np.asarray(jax.lax.map(given, quantiles()), np.float64)
    return np.logaddexp.reduce(log_probs, axis=0) - np.log(len(log_probs))


def train(num_steps: int, *, num_timesteps: int = 100, progress: bool = True) -> ppd.FitResult:
    """In a space where the average covariance is the identity, so that fine and coarse structure have one scale."""
    average = jax.vmap(covariance)(quantiles()).mean(0)
    transform = dist.transforms.LowerCholeskyAffine(jnp.zeros(NUM_SITES), jnp.linalg.cholesky(average))
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((NUM_SITES,)),
        ppd.FixedSchedule.log_linear(num_timesteps, first_beta=1e-2, final_log_snr=-7.0),
        ppd.networks.MLP(),
        transform=transform,
        last_step="network",
    )
    return ppd.fit(jax.random.key(0), diffusion, surfaces, num_steps=num_steps, progress_bar=progress)


def counts(f: jax.Array, y: Any) -> None:
    """Counts at the observed sites."""
    intercept, amplitude = numpyro.sample("intercept", INTERCEPT), numpyro.sample("amplitude", AMPLITUDE)
    log_rate = intercept[..., None] + amplitude[..., None] * f
    numpyro.sample("y", dist.Poisson(jnp.exp(log_rate[..., OBSERVED])).to_event(1), obs=y)


def model(prior: ppd.DiffusionPrior, y: Any = None, num: int = 1) -> None:
    """With the learned prior; many independent data sets in a plate."""
    with numpyro.plate("data sets", num if y is None else len(y)):
        counts(numpyro.sample("f", prior), y)


def process_model(y: Any = None) -> None:
    """With the Gaussian process itself; one data set."""
    length_scale = numpyro.sample("length_scale", LENGTH_SCALE)
    noise = numpyro.sample("noise", dist.Normal().expand((NUM_SITES,)).to_event(1))
    counts(numpyro.deterministic("f", jnp.linalg.cholesky(covariance(length_scale)) @ noise), y)


def log_rates(samples: dict[str, Any]) -> np.ndarray:
    """At all sites, shape ``(..., NUM_SITES)``."""
    intercept, amplitude, f = (np.asarray(samples[name], np.float64) for name in ("intercept", "amplitude", "f"))
    return intercept[..., None] + amplitude[..., None] * f


class Result(NamedTuple):
    """What a way gives, for all data sets.

    :ivar draws: of the log rates, shape ``(draws, data sets, NUM_SITES)``.
    :ivar ess: per data set, the number of exact draws whose means of the log rates would err as much.
    :ivar seconds: with compiling.
    """

    draws: np.ndarray
    ess: np.ndarray
    seconds: float


def twist(prior: ppd.DiffusionPrior, y: Any) -> Callable:
    """r at the prediction, to a power that is small while the surface is still open.

    A count y tells its log rate with a precision of about y + 1. A normal likelihood of that precision, averaged over a
    log rate of variance v, is its power 1 / (1 + (y + 1) v), but for a factor; here the least power of all sites.
    Without it particles follow predictions that are not to be relied upon yet. The default twist would need a
    covariance of all counts for each particle and move.
    """
    shares = jnp.asarray(prior.transform.scale_tril[OBSERVED] ** 2)  # the transform is linear

    def log_twist(prediction: Any, log_r: Callable) -> jax.Array:
        variance = prediction.variance @ shares.T
        return log_r(prediction.x_0) / (1 + ((y + 1.0) * variance).max(-1))

    return log_twist


def by_smc(rng_key: jax.Array, prior: ppd.DiffusionPrior, y: Any, num_particles: int, *, progress: bool) -> Result:
    """All data sets in one run, 8 chains, whose spread tells what the draws are worth."""
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=8, twist=twist(prior, y), progress_bar=progress)
    started = time.perf_counter()
    smc.run(rng_key, prior, y)
    draws = log_rates(smc.get_samples())
    seconds = time.perf_counter() - started
    smc.print_summary(max_rows=0)
    chains = log_rates(smc.get_samples(group_by_chain=True))
    evidences = chain_evidences(smc)
    ess = np.array([size_between_chains(chains[:, :, i], evidences[:, i]) for i in range(len(y))])
    return Result(draws, ess, seconds)


def by_nuts(rng_key: jax.Array, y: Any, num_samples: int, *, progress: bool) -> Result:
    """One data set after another."""
    mcmc = MCMC(
        NUTS(process_model),
        num_warmup=num_samples // 2,
        num_samples=num_samples,
        progress_bar=False,
        jit_model_args=True,
    )
    started = time.perf_counter()
    draws = []
    for i, one in enumerate(y):
        mcmc.run(jax.random.fold_in(rng_key, i), one)
        draws.append(log_rates(mcmc.get_samples()))
    seconds = time.perf_counter() - started
    draws = np.stack(draws, 1)
    ess = np.array([size_within_chains(draws[None, :, i]) for i in range(len(y))])
    return Result(draws, ess, seconds)


def run(
    *,
    num_steps: int = 6_000,
    num_data_sets: int = 24,
    num_particles: int = 256,
    num_samples: int = 500,
    figures: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, prints both tables, writes the figure."""
    started = time.perf_counter()
    prior = train(num_steps, progress=progress).prior
    seconds = time.perf_counter() - started
    f = surfaces(jax.random.key(1))
    bound = ppd.lower_bound(jax.random.key(2), prior, f, progress_bar=progress)
    gap = exact_log_prob(f) - np.asarray(bound.value)
    print_table(
        f"The law of f at {NUM_SITES} sites, {num_steps} updates in {seconds:.0f} s; nats",
        ("K", "exact log p", "gap of K", "L_null"),
        [
            (
                f"diffusion, T = {prior.num_timesteps}",
                with_error(bound.value, 2),
                with_error(exact_log_prob(f), 2),
                with_error(gap, 2),
                with_error(bound.null, 2),
            )
        ],
    )
    simulated = simulate(jax.random.key(3), num_data_sets)
    y, true = simulated["y"], log_rates(simulated)
    results = {
        "SMC, learned prior": by_smc(jax.random.key(4), prior, y, num_particles, progress=progress),
        "NUTS, Gaussian process": by_nuts(jax.random.key(5), y, num_samples, progress=progress),
    }
    _print(results, true)
    save_figure(_figure(results, true, np.asarray(y)), figures, "spatial_prior.png")
    return {"gap": gap, "true": true, **results}


def simulate(rng_key: jax.Array, num: int) -> dict[str, jax.Array]:
    """Data sets and what is behind them, by the Gaussian process."""
    return Predictive(process_model, num_samples=num)(rng_key)


def _print(results: dict[str, Result], true: np.ndarray) -> None:
    table = []
    for name, found in results.items():
        low, high = interval(found.draws, 0.9)
        covered = ((low <= true) & (true <= high)).mean(-1)  # per data set; its sites are not independent
        error = np.sqrt(((found.draws.mean(0) - true) ** 2).mean(-1))
        table.append(
            (
                name,
                with_error(100 * covered, 1),
                f"{(high - low).mean():.3f}",
                with_error(error),
                f"{found.ess.mean():.0f}",
                f"{found.ess.sum() / found.seconds:.0f}",
                f"{found.seconds / len(found.ess):.2f}",
            )
        )
    columns = ("covered, of 90 %", "their width", "RMSE of the mean", "ESS of the means", "per s", "s per data set")
    num = len(true)
    print_table(f"Log rates at {NUM_SITES} sites, {len(OBSERVED)} of them observed; {num} data sets", columns, table)


def _figure(results: dict[str, Result], true: np.ndarray, y: np.ndarray, shown: int = 3) -> Any:
    from matplotlib.figure import Figure

    shown = min(shown, len(y))
    figure = Figure(figsize=(4 * shown, 3.5), layout="constrained", dpi=120)
    for i, axis in enumerate(figure.subplots(1, shown, squeeze=False, sharey=True)[0]):
        for color, (name, found) in zip(("C0", "C1"), results.items(), strict=True):
            low, high = np.exp(interval(found.draws[:, i], 0.9))
            axis.fill_between(SITES, low, high, color=color, alpha=0.25, lw=0, label=f"90 %: {name}")
            axis.plot(SITES, np.exp(np.median(found.draws[:, i], axis=0)), color=color, lw=1)
        axis.plot(SITES, np.exp(true[i]), "k", lw=1, label="true rate")
        axis.plot(SITES[OBSERVED], y[i], "k.", label="counts")
        axis.set(xlabel="place", yscale="symlog")
    figure.axes[0].set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
    figure.axes[0].set_ylim(-0.2, 1.5 * max(y[:shown].max(), 10))
    figure.axes[0].set_ylabel("rate")
    figure.axes[0].legend(fontsize=7, loc="upper center")
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"num_steps": 5, "num_data_sets": 2, "num_particles": 16, "num_samples": 10}
    run(**size, figures=args.figures, progress=args.progress)
