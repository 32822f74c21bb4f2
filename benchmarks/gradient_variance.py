"""The variance of K's gradient: how the time steps of a batch are drawn.

By their importance or uniformly, per datum and stratified over the batch; or one for the whole batch, as the authors'
code does. Swiss roll with a learned schedule, batches of 512, at the start and after training. The figures are total
variances over draws of rows, times and noise, of −K per datum itself, of its gradient for the network and of that for
the schedule.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pp_diffusion as ppd
from benchmarks.setting import BATCH, swiss_roll
from benchmarks.timing import Row
from pp_diffusion.objectives import draw_steps, fixed_terms, step_cost, stratified_times

Times = Literal["importance", "uniform", "one for the batch"]
LastStep = Literal["kernel", "network"]


def rows(small: bool) -> list[Row]:
    """Three rows per chain and stage of training, each with the variances of the three ways."""
    train = swiss_roll(small).train
    cases: list[tuple[int, LastStep]] = [(40, "kernel"), (1000, "kernel"), (1000, "network")]
    updates, num_draws = (8, 8) if small else (2000, 400)
    return [row for case in (cases[:1] if small else cases) for row in compare(train, *case, updates, num_draws)]


def compare(train: Array, num_timesteps: int, last_step: LastStep, updates: int, num_draws: int) -> list[Row]:
    """At the start and after so many updates: the loss, its gradient for the network, and that for the schedule."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.LearnedSchedule(num_timesteps, 3e-4),
        ppd.networks.MLP((64, 64)),
        transform=ppd.standardize(train),
        last_step=last_step,
    )
    names = {"loss": "loss", diffusion.network_site: "network", diffusion.schedule_site: "schedule"}
    start = diffusion.init_params(jax.random.key(1))
    trained = ppd.fit(jax.random.key(2), diffusion, train, num_steps=updates, progress_bar=False).params
    table = []
    for stage, params in (("at the start", start), ("trained", trained)):
        found = {times: variances(draws(diffusion, params, train, times, num_draws)) for times in get_args(Times)}
        table += [
            Row(
                f"gradient variance, T = {num_timesteps}, last step by the {last_step}, {stage}: {name}",
                note=", ".join(f"{times}: {found[times][site]:.4g}" for times in found),
            )
            for site, name in names.items()
        ]
    return table


@partial(jax.jit, static_argnames=("times", "num"))
def draws(diffusion: ppd.Diffusion, params: dict[str, Any], x: Array, times: Times, num: int) -> dict[str, Any]:
    """So many losses of a batch and their gradients by parameter site, along a first axis."""

    def loss(params: dict[str, Any], key: Array) -> Array:
        row_key, time_key, noise_key, end_key = jax.random.split(key, 4)
        z = diffusion.to_model_space(x[jax.random.randint(row_key, (BATCH,), 0, len(x))])
        process = diffusion.reverse_process(params)
        num_steps = process.num_timesteps - process.first_network_step
        first, weight = process.first_network_step, jnp.ones(())
        if times == "one for the batch":
            index = first + jnp.broadcast_to(jax.random.randint(time_key, (), 0, num_steps), (1, BATCH))
        elif times == "uniform":
            index = first + stratified_times(time_key, BATCH, 1, num_steps)
        else:
            index, weight = draw_steps(time_key, process, BATCH, 1)
        last, prior_kl = fixed_terms(end_key, process, z)
        cost = num_steps * weight * step_cost(noise_key, process, z[None], index)
        return jnp.mean(cost + prior_kl - last)

    keys = jax.random.split(jax.random.key(7), num)
    values, gradients = jax.lax.map(lambda key: jax.value_and_grad(loss)(params, key), keys)
    return {"loss": values, **gradients}


def variances(drawn: dict[str, Any]) -> dict[str, float]:
    """Total variances over the first axis."""
    return {
        site: float(sum(np.asarray(leaf, np.float64).var(0, ddof=1).sum() for leaf in jax.tree.leaves(tree)))
        for site, tree in drawn.items()
    }
