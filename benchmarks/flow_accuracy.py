"""A flow's log density against exact ones: of normal data and a mixture, by exact networks; of a learned swiss roll."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pp_diffusion as ppd
from benchmarks.setting import swiss_roll, trained_swiss_roll
from benchmarks.timing import Row
from examples import gap
from pp_diffusion import solvers

WEIGHTS, MEANS, SCALES = (
    np.array([0.3, 0.7]),
    np.array([[-1.2, 0.5], [0.6, -0.3]]),
    np.array([[0.3, 0.5], [0.4, 0.25]]),
)
LAWS = {
    "normal": (np.ones(1), np.array([[0.7, -0.4]]), np.array([[0.5, 1.3]])),
    "mixture of two": (WEIGHTS, MEANS, SCALES),
}


def rows(small: bool) -> list[Row]:
    """Of the exact networks, then of the swiss roll."""
    return [row for name in LAWS for row in of_law(name, small)] + of_swiss_roll(small)


# --- exact networks -----------------------------------------------------------------------------------------------


def of_law(name: str, small: bool) -> list[Row]:
    """Mean absolute errors by the number of steps, and by how much halved steps lower them."""
    steps, num = ((2, 4), 8) if small else ((20, 50, 100), 300)
    table = []
    for bits in (32, 64):
        with x64(bits == 64):
            x = draws(name, num)
            truth = log_prob(name, x)
            errors = {n: float(np.abs(flow_of(name, n).log_prob(x) - truth).mean()) for n in steps}
            coarse, fine = (np.abs(flow_of(name, n).log_prob(x) - truth).mean() for n in (steps[0] // 2, steps[0]))
        words = ", ".join(f"{n} steps {error:.1e}" for n, error in errors.items())
        note = f"{words} nats; {steps[0] // 2} to {steps[0]} steps: by 2^{np.log2(coarse / fine):.1f}"
        table.append(Row(f"flow's log p, {name}, exact network, float{bits}", note=note))
    return table


def x64(is_on: bool) -> Any:
    """A context."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(is_on)
    return jax.experimental.enable_x64(is_on)  # before JAX 0.8


def flow_of(name: str, num_steps: int) -> ppd.DiffusionFlow:
    """The exact network's."""
    schedule = ppd.FixedSchedule.log_linear(200, 1e-6, -20.0)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), schedule, denoiser(name), parameterization="x0", last_step="network"
    )
    return diffusion.flow({}, num_steps=num_steps)


def denoiser(name: str) -> Callable[..., Any]:
    """E[x_0 | x_t]."""

    def network(x_t: Array, t: Array, log_snr: Array) -> tuple[Array, Array]:
        weights, means, scales = (jnp.asarray(a, x_t.dtype) for a in LAWS[name])
        x, log_snr = x_t[..., None, :], log_snr[..., None, None]
        signal, erased = jnp.sqrt(jax.nn.sigmoid(log_snr)), jax.nn.sigmoid(-log_snr)
        variance = signal**2 * scales**2 + erased
        logits = jnp.log(weights) - 0.5 * jnp.sum((x - signal * means) ** 2 / variance + jnp.log(variance), -1)
        each = (means * erased + signal * scales**2 * x) / variance
        return jnp.sum(jax.nn.softmax(logits, -1)[..., None] * each, -2), 0 * x_t

    return network


def draws(name: str, num: int) -> Array:
    weights, means, scales = LAWS[name]
    rng = np.random.default_rng(0)
    which = rng.choice(len(weights), num, p=weights)
    return jnp.asarray(means[which] + scales[which] * rng.normal(size=(num, 2)))


def log_prob(name: str, x: Array) -> np.ndarray:
    weights, means, scales = LAWS[name]
    z = (np.asarray(x, np.float64)[:, None] - means) / scales
    parts = np.log(weights) - 0.5 * (z**2).sum(-1) - np.log(scales).sum(-1) - np.log(2 * np.pi)
    return np.logaddexp.reduce(parts, -1)


# --- a learned one ------------------------------------------------------------------------------------------------


def of_swiss_roll(small: bool) -> list[Row]:
    """The gap to the true density, its integral, the chain beside it, and what the solvers' steps cost."""
    prior, data = trained_swiss_roll(small), swiss_roll(small)
    data = replace(data, test=data.test[: 20 if small else 3000])
    flow = ppd.DiffusionFlow(prior)
    value, x, few = flow.log_prob(data.test), data.test, data.test[: 5 if small else 200]
    bound = ppd.lower_bound(jax.random.key(2), prior, x, num_samples=2, progress_bar=False).value
    chain = ppd.estimate_log_prob(jax.random.key(3), prior, few, 25 if small else 128).value
    less = np.asarray(ppd.units.nats_to_bits(chain - value[: len(few)]), np.float64)
    table = [
        Row("swiss roll: the flow's gap", note="{:.4f} ± {:.4f} bits".format(*gap.paired(data, value))),
        Row("swiss roll: K's gap, the same points", note="{:.4f} ± {:.4f} bits".format(*gap.paired(data, bound))),
        Row(
            f"swiss roll: log p of the chain less the flow's, {len(few)} points",
            note=f"{less.mean():.4f} ± {less.std(ddof=1) / len(less) ** 0.5:.4f} bits, sd {less.std():.3f}",
        ),
        Row("swiss roll: integral of the flow's density", note=f"{integral(flow, 20 if small else 400):.4f}"),
        Row(
            "swiss roll: flow.check", note=f"error {flow.check(jax.random.key(4), 8 if small else 256).error:.4f} nats"
        ),
    ]
    fine = ppd.DiffusionFlow(prior, num_steps=4 if small else 40).log_prob(few)
    methods = (("MIDPOINT", 30), ("RALSTON3", 20), ("RK4", 20), ("TSIT5", 10), ("TSIT5", 16), ("TSIT5", 20))
    for name, steps in methods[: 1 if small else None]:
        coarse = ppd.DiffusionFlow(prior, num_steps=steps, solver=getattr(solvers, name))
        error = float(jnp.sqrt(jnp.mean((coarse.log_prob(few) - fine) ** 2)))
        what = f"swiss roll: {name}, {steps} steps, {coarse.num_calls} calls"
        table.append(Row(what, note=f"log p off by {error:.4f} nats (root mean square)"))
    return table


def integral(flow: ppd.DiffusionFlow, num: int, limit: float = 20.0) -> float:
    """Of exp(log_prob) over a grid of cells."""
    middle = limit * ((jnp.arange(num) + 0.5) * 2 / num - 1)
    density = jax.lax.map(lambda a: jnp.exp(flow.log_prob(jnp.stack([jnp.full(num, a), middle], -1))).sum(), middle)
    return float(np.asarray(density, np.float64).sum() * (2 * limit / num) ** 2)
