"""The variance of K's gradient: how the time steps of a batch are drawn.

By their importance or uniformly, per datum and stratified over the batch; or one for the whole batch, as the authors'
code does. Swiss roll with a learned schedule, batches of 512, at the start and after training. The figures are total
variances over draws of rows, times and noise, of −K per datum itself, of its gradient for the network and of that for
the schedule. Run: ``python -m benchmarks.gradient_variance``.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pp_diffusion as ppd
from pp_diffusion.diffusion import draw_steps, stratified_times
from pp_diffusion.trajectories import fixed_terms, step_cost

BATCH, DRAWS = 512, 400
Times = Literal["importance", "uniform", "shared"]


def variances(diffusion: ppd.Diffusion, params: dict[str, Any], x: Array, times: Times) -> dict[str, float]:
    """Total variances over draws: of the loss, and of its gradient by parameter site."""

    def loss(params: dict[str, Any], key: Array) -> Array:
        row_key, time_key, noise_key, end_key = jax.random.split(key, 4)
        z = diffusion.to_model_space(x[jax.random.randint(row_key, (BATCH,), 0, len(x))])
        process = diffusion.reverse_process(params)
        num_steps = process.num_timesteps - process.first_network_step
        first, weight = process.first_network_step, jnp.ones(())
        if times == "shared":
            index = first + jnp.broadcast_to(jax.random.randint(time_key, (), 0, num_steps), (1, BATCH))
        elif times == "uniform":
            index = first + stratified_times(time_key, BATCH, 1, num_steps)
        else:
            index, weight = draw_steps(time_key, process, BATCH, 1)
        last, prior_kl = fixed_terms(end_key, process, z)
        cost = num_steps * weight * step_cost(noise_key, process, z[None], index)
        return jnp.mean(cost + prior_kl - last)

    keys = jax.random.split(jax.random.key(7), DRAWS)
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: jax.value_and_grad(loss)(params, key), keys))
    values, gradients = draw(keys)
    total = {"loss": float(values.var(ddof=1))}
    for site, gradient in gradients.items():
        total[site] = float(sum(np.asarray(leaf).var(0, ddof=1).sum() for leaf in jax.tree.leaves(gradient)))
    return total


def main() -> None:
    """Prints the table."""
    data = ppd.datasets.swiss_roll(jax.random.key(0), 20_000, 1)
    columns: tuple[Times, ...] = ("importance", "uniform", "shared")
    print(f"{'':>60}" + "".join(f"{name:>12}" for name in columns))
    for num_timesteps, last_step in ((40, "kernel"), (1000, "kernel"), (1000, "network")):
        diffusion = ppd.Diffusion(
            ppd.GaussianKernel((2,)),
            ppd.LearnedSchedule(num_timesteps, 3e-4),
            ppd.networks.MLP((64, 64)),
            transform=ppd.standardize(data.train),
            last_step=last_step,  # type: ignore[arg-type]
        )
        start = diffusion.init_params(jax.random.key(1))
        trained = ppd.fit(jax.random.key(2), diffusion, data.train, num_steps=2000, progress_bar=False).params
        for label, params in (("at the start", start), ("trained", trained)):
            found = [variances(diffusion, params, data.train, times) for times in columns]
            names = {"loss": "loss", diffusion.network_site: "network", diffusion.schedule_site: "schedule"}
            for site, name in names.items():
                case = f"T = {num_timesteps}, last step by the {last_step}, {label}: {name}"
                print(f"{case:>60}" + "".join(f"{one[site]:>12.4g}" for one in found))


if __name__ == "__main__":
    main()
