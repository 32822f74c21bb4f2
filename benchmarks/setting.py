"""The swiss roll on which everything here is measured, in our terms and in those of the hand-written reference."""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax import Array

import pp_diffusion as ppd
from benchmarks.reference import handwritten

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


def chain(num_timesteps: int) -> handwritten.Chain:
    """The reference's, on standardised data."""
    return handwritten.log_linear(num_timesteps, FIRST_BETA, FINAL_LOG_SNR)


def as_weights(params: dict[str, Any]) -> handwritten.Weights:
    """The parameters of our MLP as the reference's weights."""
    (layers,) = params.values()
    dense = [layers[name] for name in sorted(layers) if name != "readout"] + [layers["readout"]["Dense_0"]]
    return [(layer["kernel"], layer["bias"]) for layer in dense]
