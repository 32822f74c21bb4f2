"""How far a prior on the swiss roll is from the exact density."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax import Array

import pp_diffusion as ppd
from examples.report import mean_and_error


class Gap(NamedTuple):
    """The paired gap, log q(x_i) − K_i over the same points, in bits, and the bound that it was taken from.

    :ivar value: its mean.
    :ivar error: the standard error of that over points and draws.
    """

    value: float
    error: float
    bound: ppd.LowerBound


def of_bound(rng_key: Array, prior: Any, data: Any, *, num_samples: int = 4, progress: bool = False) -> Gap:
    """The gap of K on ``data.test``."""
    bound = ppd.lower_bound(rng_key, prior, data.test, num_samples=num_samples, progress_bar=progress)
    return Gap(*paired(data, bound.value), bound)


def of_log_prob(rng_key: Array, prior: Any, data: Any, *, num_trajectories: int = 256) -> tuple[float, float]:
    """The gap of log p by eq. 9, and its standard error, in bits; the log of a mean over trajectories is biased low."""
    return paired(data, ppd.estimate_log_prob(rng_key, prior, data.test, num_trajectories).value)


def paired(data: Any, log_prob: Any) -> tuple[float, float]:
    """The mean of log q(x_i) − ``log_prob[i]`` over ``data.test``, and its standard error, in bits."""
    exact = np.asarray(data.log_prob(data.test), np.float64)
    return mean_and_error(ppd.units.nats_to_bits(exact - np.asarray(log_prob, np.float64)))
