"""What plain draws of the prior tell: a second estimate of the evidence, and how good predictions are.

The first has nothing in common with the guided particles, so that their evidence stays unbiased and can be compared.
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
from pp_diffusion.compiling import jit_once, jit_run
from pp_diffusion.posterior import latents as other_latents
from pp_diffusion.posterior.factors import Factors
from pp_diffusion.posterior.particles import ess, log_mean
from pp_diffusion.posterior.prediction import predict
from pp_diffusion.posterior.verdicts import Plain
from pp_diffusion.reverse import ReverseProcess

#: Plain draws of each system for each of its particles.
PLAIN_SHARE = 0.125
#: Draws, of all systems together, from which on running them costs more than compiling.
MANY = 500
#: Draws, of all systems together, by which predictions are judged.
NUM_JUDGED = 256


class Survey(NamedTuple):
    """What plain draws tell.

    :ivar log_evidence: per system, shape ``(S,)``, nats.
    :ivar ess: of its weights.
    """

    log_evidence: Array
    ess: Array

    def plain(self, num_draws: int) -> Plain:
        """The evidence with its error."""
        return Plain.by_weights(self.log_evidence, self.ess, num_draws)


def num_plain_draws(factors: Factors, num_particles: int, share: float = PLAIN_SHARE) -> int:
    """How many for so many particles; none where numbers of x are known exactly, which no draw meets."""
    return 0 if factors.num_known else math.ceil(share * num_particles)


def by_plain_draws(rng_key: Array, factors: Factors, num_draws: int) -> Survey:
    """By so many draws for each system."""
    x_key, latent_key = jax.random.split(rng_key)
    x_0 = sample_chain(x_key, factors.process, (num_draws, 1, *factors.reader.systems.batch_shape))
    log_r = factors.read(x_0, other_latents.draw(factors, latent_key, (num_draws, 1))).log_r
    return Survey(log_mean(log_r)[0], ess(log_r)[0])


_few = jit_once(by_plain_draws, static_argnames=("num_draws",))
_many = jit_run(by_plain_draws, static_argnames=("num_draws",))


def survey(rng_key: Array, factors: Factors, num_draws: int) -> Survey:
    """By so many draws for each system, compiled: with more care the more there are."""
    compiled = _many if num_draws * factors.num_systems > MANY else _few
    found: Survey = compiled(rng_key, factors, num_draws=num_draws)
    return found


class Judge:
    """Of a prior's predictions, by draws of its own: the same at each run, and remembered while the prior is."""

    def __init__(self) -> None:
        self._seen: tuple[Any, list[np.ndarray]] | None = None
        self._found: Any = None

    def __call__(self, factors: Factors) -> Any:
        """Per step, what the state space makes of the errors of predictions; leaves of first axis T. ``None`` where it
        makes nothing of them."""
        if not factors.space.has_errors:
            return None
        arrays, structure = jax.tree.flatten(factors.prior)
        fixed = structure, factors.systems, [(np.shape(a), jnp.result_type(a)) for a in arrays]
        if self._seen is None or self._seen[0] != fixed or not _are_equal(self._seen[1], arrays):
            self._seen = fixed, [np.array(a) for a in arrays]  # copies: NumPy's arrays may change
            systems = factors.reader.systems
            self._found = calibration(factors.process, systems.batch_shape, systems.number)
        return self._found


def _are_equal(before: list[np.ndarray], now: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))


@partial(jit_once, static_argnames=("batch_shape", "num_systems"))
def calibration(process: ReverseProcess, batch_shape: tuple[int, ...], num_systems: int) -> Any:
    """Of predictions, by the errors that they make of draws of the prior.

    :param batch_shape: the process's own, of the systems.
    """
    space, (x_key, rng_key) = process.kernel.state_space, jax.random.split(jax.random.key(0))
    x_0 = sample_chain(x_key, process, (math.ceil(NUM_JUDGED / num_systems), 1, *batch_shape))

    def at_step(at: tuple[Array, Array]) -> Any:
        t, key = at
        noise_key, direction_key = jax.random.split(key)
        rates = process.rates.at(t - 1)
        x_t = process.kernel.as_state(process.kernel.marginal(x_0, rates.log_snr).sample(noise_key))
        return space.errors(predict(process, x_t, rates), x_0, direction_key)

    steps = jnp.arange(1, process.num_timesteps + 1)
    return jax.lax.map(at_step, (steps, jax.random.split(rng_key, process.num_timesteps)))
