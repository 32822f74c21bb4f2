"""The variance of K's gradient: times per datum, stratified over the batch, against one time for the whole batch.

The authors' code draws one t per minibatch. Swiss roll, batches of 512, the network at its start and after training;
the figure is the total variance of the gradient over draws, and their ratio is how many more updates' worth of
averaging the shared time would need. Run: ``python -m benchmarks.gradient_variance``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import Array

import pp_diffusion as ppd
from pp_diffusion.diffusion import stratified_times
from pp_diffusion.trajectories import step_cost

BATCH, DRAWS = 512, 256


def gradient_variance(diffusion: ppd.Diffusion, params: dict[str, Any], x: Array, kind: str) -> float:
    """Total variance over draws of rows, times and noise of the gradient of the sampled part of −K per datum."""

    def loss(params: dict[str, Any], key: Array) -> Array:
        row_key, time_key, noise_key = jax.random.split(key, 3)
        z = diffusion.to_model_space(x[jax.random.randint(row_key, (BATCH,), 0, len(x))])
        process = diffusion.reverse_process(params)
        first = process.first_network_step
        num_steps = process.num_timesteps - first
        if kind == "shared":
            index = jnp.broadcast_to(jax.random.randint(time_key, (), 0, num_steps), (BATCH,))
        elif kind == "independent":
            index = jax.random.randint(time_key, (BATCH,), 0, num_steps)
        else:
            index = stratified_times(time_key, BATCH, 1, num_steps)[0]
        return num_steps * step_cost(noise_key, process, z, first + index).mean()

    def flat_gradient(key: Array) -> Array:
        return jax.flatten_util.ravel_pytree(jax.grad(loss)(params, key))[0]

    gradients = jax.jit(lambda keys: jax.lax.map(flat_gradient, keys))(jax.random.split(jax.random.key(7), DRAWS))
    return float(gradients.var(0, ddof=1).sum())


def main() -> list[tuple[str, float, float, float]]:
    """Prints the table and returns its rows: case, then the three variances."""
    data = ppd.datasets.swiss_roll(jax.random.key(0), 20_000, 1)
    rows = []
    for num_timesteps in (40, 1000):
        diffusion = ppd.Diffusion(
            ppd.GaussianKernel((2,)),
            ppd.FixedSchedule.log_linear(num_timesteps, 3e-4, -4.0),
            ppd.networks.MLP((64, 64)),
            transform=ppd.standardize(data.train),
        )
        start = diffusion.init_params(jax.random.key(1))
        trained = ppd.fit(jax.random.key(2), diffusion, data.train, num_steps=2000, progress_bar=False).params
        for label, params in (("at the start", start), ("trained", trained)):
            kinds = ("stratified", "independent", "shared")
            variances = [gradient_variance(diffusion, params, data.train, kind) for kind in kinds]
            rows.append((f"T = {num_timesteps}, {label}", *variances))
    print(f"{'':>24} {'stratified':>12} {'independent':>12} {'shared t':>12} {'shared / stratified':>20}")
    for case, ours, independent, shared in rows:
        print(f"{case:>24} {ours:>12.4g} {independent:>12.4g} {shared:>12.4g} {shared / ours:>20.1f}")
    return rows


if __name__ == "__main__":
    main()
