"""What plain draws of the prior tell before a run: a second estimate of the evidence, and how good predictions are.

It has nothing in common with the guided particles, so that their evidence stays unbiased and can be compared with it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.chain import sample_chain
from pp_diffusion.compiling import jit_once
from pp_diffusion.posterior import latents as other_latents
from pp_diffusion.posterior.factors import Factors
from pp_diffusion.posterior.particles import ess, log_mean
from pp_diffusion.posterior.prediction import predict
from pp_diffusion.posterior.verdicts import Plain

#: Draws, of all systems together, by which predictions are judged.
NUM_JUDGED = 256


class Survey(NamedTuple):
    """What plain draws tell.

    :ivar log_evidence: per system, shape ``(S,)``, nats.
    :ivar ess: of its weights.
    :ivar calibration: per step, what the state space makes of the errors of predictions; leaves of first axis T.
    """

    log_evidence: Array
    ess: Array
    calibration: Any

    def plain(self, num_draws: int) -> Plain:
        """The evidence with its error."""
        size = np.asarray(self.ess, np.float64)
        error = np.sqrt(np.maximum(1 / np.maximum(size, 1e-12) - 1 / num_draws, 0.0))
        return Plain(np.asarray(self.log_evidence, np.float64), error, size)


def num_draws(factors: Factors, num_wanted: int) -> int:
    """So many draws for each system, or as many as it takes to judge predictions."""
    return max(num_wanted, math.ceil(NUM_JUDGED / factors.num_systems))


@partial(jit_once, static_argnames=("num_draws",))
def survey(rng_key: Array, factors: Factors, num_draws: int) -> Survey:
    """By so many draws for each system."""
    x_key, latent_key, error_key = jax.random.split(rng_key, 3)
    x_0 = sample_chain(x_key, factors.process, (num_draws, 1, *factors.reader.systems.batch_shape))
    log_r = factors.read(x_0, other_latents.draw(factors, latent_key, (num_draws, 1))).log_r
    judged = x_0[: math.ceil(NUM_JUDGED / factors.num_systems)]
    return Survey(log_mean(log_r)[0], ess(log_r)[0], _calibration(error_key, factors, judged))


def _calibration(rng_key: Array, factors: Factors, x_0: Array) -> Any:
    process, space = factors.process, factors.space
    if not space.has_errors:
        return None

    def at_step(at: tuple[Array, Array]) -> Any:
        t, key = at
        noise_key, direction_key = jax.random.split(key)
        rates = process.rates.at(t - 1)
        x_t = process.kernel.as_state(process.kernel.marginal(x_0, rates.log_snr).sample(noise_key))
        return space.errors(predict(process, x_t, rates), x_0, direction_key)

    steps = jnp.arange(1, process.num_timesteps + 1)
    return jax.lax.map(at_step, (steps, jax.random.split(rng_key, process.num_timesteps)))
