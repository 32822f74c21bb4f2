"""What a flow's log density and its gradient cost, against a hand-written one and diffrax, and what draws cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import pp_diffusion as ppd
from benchmarks.reference import handwritten, handwritten_flow
from benchmarks.setting import as_weights, diffusion, swiss_roll
from benchmarks.timing import Row, not_run, paired

NUM_STEPS = 16


def rows(small: bool) -> list[Row]:
    """A row for the density and one for its gradient, against each."""
    train, num_timesteps = swiss_roll(small).train, 20 if small else 1000
    program = diffusion(num_timesteps, train, last_step="network")
    params = perturbed(program.init_params(jax.random.key(1)))
    num_steps = 2 if small else NUM_STEPS
    flow, x = program.flow(params, num_steps=num_steps), train[: 16 if small else 256]
    sides = {"hand-written JAX": by_hand(program, params, num_steps)}
    try:
        sides["diffrax"] = by_diffrax(flow)
        table = []
    except ImportError:
        table = [not_run("flow: ours / diffrax", "diffrax is not installed")]
    num_pairs = 1 if small else 5
    for name, theirs in sides.items():
        pairs = {"log p": (flow.log_prob, jax.jit(theirs)), "its gradient": (gradient(flow.log_prob), gradient(theirs))}
        for what, (our_side, their_side) in pairs.items():
            timed = paired(lambda f=our_side: f(x), lambda f=their_side: f(x), num_pairs=num_pairs)
            table.append(Row(f"flow: {what} of {len(x)} points, {num_steps} steps, ours / {name}", **timed))
    return table


def gradient(log_prob: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return jax.jit(jax.grad(lambda x: jnp.sum(log_prob(x))))


def perturbed(params: Any) -> Any:
    """Weights none of which is 0."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [a + 0.03 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def by_hand(program: ppd.Diffusion, params: Any, num_steps: int) -> Callable[[Array], Array]:
    """The reference's, in data units."""
    weights, log_snr = as_weights(params), program.schedule.log_snr()
    first, last = float(log_snr[0]), float(log_snr[-1])

    def predict_v(x: Array, log_snr: Array) -> Array:
        return handwritten.network(weights, x, log_snr)[0]

    def log_prob(x: Array) -> Array:
        z = program.transform._inverse(x)
        scale = jnp.sum(jnp.log(program.transform.scale))
        return handwritten_flow.log_prob(predict_v, first, last, num_steps, z) - scale

    return log_prob


def by_diffrax(flow: ppd.DiffusionFlow) -> Callable[[Array], Array]:
    """The same field, method and steps under ``diffrax.diffeqsolve``, but for the step from the first level to 0."""
    import diffrax
    import numpy as np

    ode = flow.ode
    log_snr = np.asarray(ode.levels.log_snr)
    start, end = np.arcsinh(log_snr[[0, -1]] / 4)
    is_end = jnp.asarray(False)
    term = diffrax.ODETerm(lambda time, state, _: ode.slope_and_divergence(state, time, is_end))

    def log_prob(x: Array) -> Array:
        z = flow.prior.space.to_model(x)
        state = z, jnp.zeros(z.shape[:-1])
        step, most = (end - start) / flow.num_steps, flow.num_steps + 1
        solution = diffrax.diffeqsolve(term, diffrax.Tsit5(), start, end, step, state, max_steps=most)
        ends, changes = solution.ys
        return changes[0] - 0.5 * jnp.sum(ends[0] ** 2, -1)

    return log_prob
