"""What reduced precision of the network's matrix products does to K: one trained model, the same random numbers.

On a GPU the products themselves run in TF32 and bfloat16. On a CPU, which has neither, their inputs are rounded to as
many bits and added up in float32, which is what those units do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pp_diffusion as ppd
from benchmarks.setting import BATCH, diffusion, swiss_roll
from benchmarks.timing import Row, on_gpu

MANTISSA_BITS = {"TF32": 10, "bfloat16": 7}
ALGORITHMS = {"TF32": "TF32_TF32_F32", "bfloat16": "BF16_BF16_F32"}


class Rounded(ppd.networks.MLP):
    """The MLP, with the inputs of its matrix products rounded."""

    mantissa_bits: int = 23

    def __call__(self, x_t: Array, t: Array, log_snr: Array, context: Any = None) -> tuple[Array, ...]:
        with nn.intercept_methods(partial(_rounded_product, self.mantissa_bits)):
            return super().__call__(x_t, t, log_snr, context)


def rows(small: bool) -> list[Row]:
    """A row per precision: the difference in K, in bits."""
    data, num_timesteps = swiss_roll(small), 40 if small else 1000
    program = diffusion(num_timesteps, data.train)
    updates = 20 if small else 3_000
    fit = ppd.fit(
        jax.random.key(1),
        program,
        data.train,
        num_steps=updates,
        batch_size=BATCH,
        num_times=2,
        val_prop=0.0,
        progress_bar=False,
    )
    test = data.test[:2_000]

    def bound(network: ppd.networks.MLP) -> np.ndarray:
        prior = diffusion(num_timesteps, data.train, network).prior(fit.params)
        return np.asarray(ppd.lower_bound(jax.random.key(2), prior, test, num_samples=2).value, dtype=np.float64)

    full = bound(ppd.networks.MLP())
    table = []
    for name in MANTISSA_BITS:
        if on_gpu():
            network, how = ppd.networks.MLP(precision=ALGORITHMS[name]), "on the device"
        else:
            network, how = Rounded(mantissa_bits=MANTISSA_BITS[name]), "emulated: inputs rounded"
        change = ppd.units.nats_to_bits(bound(network) - full)
        error = change.std(ddof=1) / np.sqrt(change.size)
        table.append(
            Row(
                f"K of a swiss roll, T = {num_timesteps}: products in {name} ({how}) less full float32",
                note=f"{change.mean():+.5f} ± {error:.5f} bits",
            )
        )
    return table


def _rounded_product(mantissa_bits: int, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if not isinstance(context.module, nn.Dense):
        return call(*args, **kwargs)
    weights = context.module.variables["params"]
    inputs, kernel = (jax.lax.reduce_precision(a, 8, mantissa_bits) for a in (args[0], weights["kernel"]))
    return jnp.dot(inputs, kernel, precision="highest") + weights["bias"]
