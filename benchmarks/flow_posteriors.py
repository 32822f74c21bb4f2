"""Posteriors of models with flows: modes through a noisy line, a hierarchy with two priors, digits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.diagnostics import split_gelman_rubin
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS

import pp_diffusion as ppd
from benchmarks.setting import trained_digits, trained_swiss_roll
from benchmarks.timing import Row
from examples import posterior_swiss_roll as line
from examples.report import interval
from pp_diffusion import solvers
from pp_diffusion.posterior.target import read_target
from pp_diffusion.posterior.tempered import TemperedRun, plain_estimate, run_chains
from pp_diffusion.posterior.tempering import Moves
from pp_diffusion.posterior.verdicts import BELIEVABLE

REPARAM = {"x": ppd.FlowReparam()}


def rows(small: bool) -> list[Row]:
    """All of them."""
    return through_a_line(small) + hierarchy(small) + digits(small)


def nuts(
    rng_key: Array, model: Callable[..., Any], *args: Any, small: bool, num_samples: int = 1000
) -> tuple[dict[str, np.ndarray], float, float]:
    """Draws of four chains, the largest R-hat, and seconds with compiling."""
    started = time.perf_counter()
    warmup, samples = (3, 4) if small else (500, num_samples)
    kernel = NUTS(model, max_tree_depth=2 if small else 10)
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=samples, num_chains=4, chain_method="vectorized",
                progress_bar=False)  # fmt: skip
    mcmc.run(rng_key, *args)
    draws = {name: np.asarray(a, np.float64) for name, a in mcmc.get_samples(group_by_chain=True).items()}
    took = time.perf_counter() - started
    rhat = max(float(np.max(split_gelman_rubin(a))) for a in draws.values())
    return draws, rhat, took


# --- modes that a line leaves -------------------------------------------------------------------------------------


def through_a_line(small: bool) -> list[Row]:
    """One number seen of a point on the swiss roll: several turns of the spiral go with it."""
    prior = trained_swiss_roll(small)
    flow = ppd.DiffusionFlow(prior, num_steps=8, solver=solvers.RALSTON3, sampler=solvers.Multistep(20))
    exact = line.truth(ppd.datasets.swiss_roll(jax.random.key(0), 1).log_prob)
    own = line.truth(lambda x: jax.lax.map(flow.log_prob, x))

    def distances(x: Any) -> str:
        cells = line.histogram(x.reshape(-1, 2))
        return f"TV {line.variation(cells, exact.cells):.3f}, to its own {line.variation(cells, own.cells):.3f}"

    what = "swiss roll through a noisy line: "
    evidences = f"log Z {own.log_evidence:.4f}, exactly {exact.log_evidence:.4f}"
    table = [Row(f"{what}the flow's own", note=f"TV {line.variation(own.cells, exact.cells):.3f}; {evidences}")]
    over_noise = reparam(line.model, config=REPARAM)
    for name, model in (("NUTS over the noise", over_noise), ("NUTS on x", line.model)):
        draws, rhat, took = nuts(jax.random.key(1), model, flow, small=small)
        chains, num = draws["x"].shape[:2]
        size = line.size_within_chains(line.in_cells(draws["x"]))
        note = f"R-hat {rhat:.3f}; {distances(draws['x'])}; worth {size:.0f} draws; {took:.0f} s"
        table.append(Row(f"{what}{name}, {chains} × {num}", note=note))
    started = time.perf_counter()
    smc = ppd.TemperedSMC(over_noise, num_particles=20 if small else 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppd.CollapseWarning)  # the verdict is in the row
        smc.run(jax.random.key(2), flow)
    took = time.perf_counter() - started
    error = "without an error" if np.isnan(smc.log_evidence_error) else f"± {smc.log_evidence_error:.4f}"
    off = 100 * np.expm1(smc.log_evidence - exact.log_evidence)
    words = [
        distances(np.asarray(smc.get_samples()["x"])),
        f"of as many exact draws {line.of_exact_draws(exact.cells, 8 * smc.num_particles):.3f}",
        f"log Z {smc.log_evidence:.4f} {error}, {off:+.1f} %",
        f"{smc.verdict}, {int(smc.state.num_temperatures.max())} temperatures, {took:.0f} s",
    ]
    return [*table, Row(f"{what}TemperedSMC, 8 × {smc.num_particles}", note="; ".join(words))]


# --- a hierarchy --------------------------------------------------------------------------------------------------


def curved(rng_key: Array, num: int = 512) -> Array:
    """Intercept and slope, which go together on a curve."""
    a, b = jax.random.normal(rng_key, (2, num))
    return jnp.stack([a, 0.5 * a**2 - 0.5 + 0.4 * b], -1)


def skewed(rng_key: Array, num: int = 512) -> Array:
    """What a row adds: a long tail to the right, of mean 0."""
    return jax.random.gamma(rng_key, 2.0, (num, 1)) / 2.0**0.5 - 2.0**0.5


def learned(source: Callable[[Array], Array], size: int, name: str, small: bool) -> ppd.DiffusionFlow:
    """A flow of so many numbers, from endless draws."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((size,)), ppd.FixedSchedule.log_linear(100, 1e-3, -7.0), ppd.networks.MLP((32, 32)),
        last_step="network", name=name,
    )  # fmt: skip
    fit = ppd.fit(jax.random.key(3), diffusion, source, num_steps=20 if small else 4_000, progress_bar=False)
    return diffusion.flow(fit.params, sampler=solvers.Multistep(20))


def grouped(coefficients: Any, of_rows: Any, t: Array, y: Any = None) -> None:
    """A line whose coefficients have one prior, rows that deviate by another, and the scale of these."""
    x = numpyro.sample("x", coefficients)
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(t)):
        u = numpyro.sample("u", of_rows)
        numpyro.sample("y", dist.Normal(x[..., 0] + x[..., 1] * t + scale * u[..., 0], 0.2), obs=y)


def hierarchy(small: bool) -> list[Row]:
    """Thirty rows, by NUTS over the noise of both priors: 33 numbers."""
    priors = learned(curved, 2, "coefficients", small), learned(skewed, 1, "rows", small)
    t = jnp.linspace(-2.0, 2.0, 5 if small else 30)
    x, scale, u = jnp.array([0.8, -0.3]), 0.6, skewed(jax.random.key(4), len(t))[:, 0]
    y = x[0] + x[1] * t + scale * u + 0.2 * jax.random.normal(jax.random.key(5), t.shape)
    model = reparam(grouped, config={"x": ppd.FlowReparam(), "u": ppd.FlowReparam()})
    draws, rhat, took = nuts(jax.random.key(6), model, *priors, t, y, small=small)
    found = ", ".join(
        f"{name} {np.mean(a):.2f} ± {np.std(a):.2f} (true {truth:.2f})"
        for name, a, truth in (
            ("intercept", draws["x"][..., 0], x[0]),
            ("slope", draws["x"][..., 1], x[1]),
            ("scale", draws["scale"], scale),
        )
    )
    what = f"two priors, a pooled scale, {len(t)} rows: NUTS, 4 × {draws['scale'].shape[1]}"
    return [Row(what, note=f"R-hat {rhat:.4f}, {took:.0f} s; {found}")]


# --- digits -------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What is seen of a digit: pixels (a mask), through normal noise in levels; and which are asked for."""

    name: str
    noise: float
    seen: np.ndarray
    asked: np.ndarray


ALL, UPPER = np.ones((8, 8), bool), np.repeat([True, False], 4)[:, None] & np.ones(8, bool)
VIEWS = (Seen("all pixels, noise of sd 4", 4.0, ALL, ALL), Seen("upper half, noise of sd 2", 2.0, UPPER, ~UPPER))


def digits(small: bool, num: int = 16, num_particles: int = 128) -> list[Row]:
    """Digits that the flow has drawn, each seen by itself: 64 numbers, tempered; beside twisted SMC over the chain."""
    num, num_particles = (2, 8) if small else (num, num_particles)
    prior = trained_digits(small)
    flow = ppd.DiffusionFlow(prior, sampler=solvers.Multistep(20))
    x = flow.sample(jax.random.key(1), (num,))
    table = []
    for view in VIEWS:
        y = x + view.noise * jax.random.normal(jax.random.key(2), x.shape)
        started = time.perf_counter()
        found = tempered(flow, view, y, num_particles)
        took = time.perf_counter() - started
        covered = np.array([coverage(run, view, np.asarray(truth)) for run, truth in zip(found, x, strict=True)])
        verdicts = [str(run.verdict) for run in found]
        twisted = ppd.SMC(through_noise, num_particles=num_particles, num_chains=8, twist=by_nodes(prior, view, y),
                          progress_bar=False)  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ppd.CollapseWarning)
            started = time.perf_counter()
            twisted.run(jax.random.key(4), prior.shortened(min(60, prior.num_timesteps)), view, y)
        ours = np.array([float(run.log_evidence) for run in found])
        both = twisted.reliable & np.array([v == BELIEVABLE for v in verdicts])
        off = np.abs(ours - twisted.log_evidence)[both]
        worst = f"{off.max():.2f}, mean {off.mean():.2f}" if len(off) else "none"
        words = [
            f"90 % intervals cover {100 * covered.mean():.1f} ± {100 * covered.std(ddof=1) / num**0.5:.1f} %",
            ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))),
            f"{max(int(run.state.num_temperatures.max()) for run in found)} temperatures, {took:.0f} s",
            f"twisted SMC {time.perf_counter() - started:.0f} s",
            f"of {both.sum()} reliable by both, log Z differs by at most {worst}",
        ]
        table.append(Row(f"digits, {view.name}: TemperedSMC, {num} × 8 × {num_particles}", note="; ".join(words)))
    return table


def through_noise(law: Any, view: Seen, y: Array) -> None:
    """One digit, or a plate of them."""
    with numpyro.plate("images", len(y)) if y.ndim > 2 else nullcontext():
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(x, view.noise).mask(view.seen).to_event(2), obs=y)


def tempered(flow: ppd.DiffusionFlow, view: Seen, y: Array, num_particles: int) -> list[TemperedRun]:
    """A run of its own for each digit, all of them at once."""

    def model(y: Array) -> None:
        through_noise(flow, view, y)

    target, moves = read_target(reparam(model, config=REPARAM), (y[0],), {}), Moves(0.5, 3, 6)
    one = partial(run_chains, num_particles=num_particles, moves=moves)
    keys = jax.random.split(jax.random.key(3), (len(y), 8))
    state, samples, _, starts = jax.vmap(
        lambda y, keys: one(target.replace(program=target.program.replace(arrays=(y,))), keys)
    )(y, keys)
    starts = np.asarray(starts).reshape(len(y), -1, 1)
    return [
        TemperedRun(
            *jax.tree.map(lambda a, i=i: a[i], (state, samples)),
            {},
            partial(model, y[i]),
            plain_estimate(jnp.asarray(starts[i])),
        )
        for i in range(len(y))
    ]


def coverage(run: TemperedRun, view: Seen, truth: np.ndarray) -> float:
    """The share of the pixels asked for that lie in their intervals."""
    low, high = interval(np.asarray(run.pooled["x"], np.float64), 0.9)
    return float(((low <= truth) & (truth <= high))[view.asked].mean())


def by_nodes(prior: ppd.DiffusionPrior, view: Seen, y: Array) -> Callable[..., Array]:
    """A twist: each pixel's level given x_t as a normal variable, by five nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()

    def log_twist(prediction: Any, log_r: Any) -> Array:
        levels = prior.transform(prediction.x_0[..., None] + jnp.sqrt(prediction.variance)[..., None] * nodes)
        mean = levels @ weights
        variance = (levels - mean[..., None]) ** 2 @ weights
        log_prob = dist.Normal(mean, jnp.sqrt(view.noise**2 + variance)).log_prob(y)
        return jnp.where(view.seen, log_prob, 0.0).sum((-2, -1))

    return log_twist
