"""The variance of K's gradient: times per datum, stratified over the batch, against one time for the whole batch.

The authors' code draws one t per minibatch. Swiss roll with a learned schedule, batches of 512, at the start and after
training. The figures are total variances over draws of rows, times and noise, of −K per datum itself, of its gradient
for the network and of that for the schedule. Run: ``python -m benchmarks.gradient_variance``.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pp_diffusion as ppd
from pp_diffusion.diffusion import stratified_times
from pp_diffusion.trajectories import fixed_terms, step_cost

BATCH, DRAWS = 512, 400
Times = Literal["stratified", "shared"]


def variances(diffusion: ppd.Diffusion, params: dict[str, Any], x: Array, times: Times) -> dict[str, float]:
    """Total variances over draws: of the loss, and of its gradient by parameter site."""

    def loss(params: dict[str, Any], key: Array) -> Array:
        row_key, time_key, noise_key, end_key = jax.random.split(key, 4)
        z = diffusion.to_model_space(x[jax.random.randint(row_key, (BATCH,), 0, len(x))])
        process = diffusion.reverse_process(params)
        num_steps = process.num_timesteps - process.first_network_step
        if times == "shared":
            index = jnp.broadcast_to(jax.random.randint(time_key, (), 0, num_steps), (BATCH,))
        else:
            index = stratified_times(time_key, BATCH, 1, num_steps)[0]
        last, prior_kl = fixed_terms(end_key, process, z)
        cost = num_steps * step_cost(noise_key, process, z, process.first_network_step + index)
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
    print(f"{'':>36} {'stratified':>12} {'shared t':>12} {'ratio':>8}")
    for num_timesteps in (40, 1000):
        diffusion = ppd.Diffusion(
            ppd.GaussianKernel((2,)),
            ppd.LearnedSchedule(num_timesteps, 3e-4),
            ppd.networks.MLP((64, 64)),
            transform=ppd.standardize(data.train),
        )
        start = diffusion.init_params(jax.random.key(1))
        trained = ppd.fit(jax.random.key(2), diffusion, data.train, num_steps=2000, progress_bar=False).params
        for label, params in (("at the start", start), ("trained", trained)):
            ours, shared = (variances(diffusion, params, data.train, times) for times in ("stratified", "shared"))
            names = {"loss": "loss", diffusion.network_site: "network", diffusion.schedule_site: "schedule"}
            for site, name in names.items():
                case = f"T = {num_timesteps}, {label}: {name}"
                print(f"{case:>36} {ours[site]:>12.4g} {shared[site]:>12.4g} {shared[site] / ours[site]:>8.1f}")


if __name__ == "__main__":
    main()
