"""The swiss roll on which everything here is measured, in our terms and in those of the hand-written reference."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import jax
import optax
from jax import Array

import pp_diffusion as ppd
from benchmarks.reference import handwritten
from examples import digits

FIRST_BETA, FINAL_LOG_SNR = 1e-4, -7.0
BATCH = 512


def swiss_roll(small: bool) -> ppd.datasets.Dataset:
    """Training and test points."""
    return ppd.datasets.swiss_roll(jax.random.key(0), *((2_000, 100) if small else (50_000, 10_000)))


def diffusion(
    num_timesteps: int, train: Array, network: Any = None, last_step: Literal["kernel", "network"] = "kernel"
) -> ppd.Diffusion:
    """Ours, on data in their own units."""
    return ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.FixedSchedule.log_linear(num_timesteps, FIRST_BETA, FINAL_LOG_SNR),
        network or ppd.networks.MLP(),
        last_step=last_step,
        transform=ppd.standardize(train),
    )


@cache
def trained_swiss_roll(small: bool) -> ppd.DiffusionPrior:
    """T = 1000, the last step by the network, 40 000 updates: that of ``benchmarks/flow.py``."""
    updates = 20 if small else 40_000
    program = diffusion(20 if small else 1000, swiss_roll(small).train, last_step="network")
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(500, updates // 2), updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    settings = {"batch_size": BATCH, "num_times": 2, "optimizer": optimizer, "progress_bar": False}
    return ppd.fit(jax.random.key(1), program, swiss_roll(small).train, num_steps=updates, **settings).prior


@cache
def trained_digits(small: bool) -> ppd.DiffusionPrior:
    """As in ``examples/digits.py``."""
    return digits.train(ppd.datasets.digits(jax.random.key(0)), 5 if small else None, progress=False)[0].prior


def chain(num_timesteps: int) -> handwritten.Chain:
    """The reference's, on standardised data."""
    return handwritten.log_linear(num_timesteps, FIRST_BETA, FINAL_LOG_SNR)


def as_weights(params: dict[str, Any]) -> handwritten.Weights:
    """The parameters of our MLP as the reference's weights."""
    (layers,) = params.values()
    dense = [layers[name] for name in sorted(layers) if name != "readout"] + [layers["readout"]["Dense_0"]]
    return [(layer["kernel"], layer["bias"]) for layer in dense]
