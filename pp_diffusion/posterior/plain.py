"""The evidence by plain draws of the prior: an estimate that has nothing in common with the guided particles."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jax import Array

from pp_diffusion.chain import sample_chain
from pp_diffusion.posterior import latents as other_latents
from pp_diffusion.posterior.factors import Factors
from pp_diffusion.posterior.particles import ess, log_mean
from pp_diffusion.posterior.verdicts import Plain


def plain_evidence(rng_key: Array, factors: Factors, num_draws: int) -> Plain | None:
    """By so many draws for each system; ``None`` where coordinates are known exactly, which no draw meets."""
    if factors.is_exact:
        return None
    log_evidence, size = (np.asarray(a, np.float64)[0] for a in _estimate(rng_key, factors, num_draws))
    error = np.sqrt(np.maximum(1 / np.maximum(size, 1e-12) - 1 / num_draws, 0.0))
    return Plain(log_evidence, error, size)


@partial(jax.jit, static_argnames="num_draws")
def _estimate(rng_key: Array, factors: Factors, num_draws: int) -> tuple[Array, Array]:
    x_key, latent_key = jax.random.split(rng_key)
    inner = factors.state_shape[: len(factors.state_shape) - factors.prior.kernel.event_ndim]
    x = sample_chain(x_key, factors.process, (num_draws, 1, factors.num_systems, *inner))
    log_r = factors.read(x, other_latents.draw(factors, latent_key, (num_draws, 1))).log_r
    return log_mean(log_r), ess(log_r)
