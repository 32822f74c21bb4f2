r"""Moves of a model's latents that take x along: what the trajectory's noise makes of x under other latents.

Under a twist, x is a function of the latents and of standard normal noise, that of the guided steps. At fixed noise the
latents have the density

.. math:: p(\theta)\, \prod_t \frac{p(x_{t-1} \mid x_t)}{m(x_{t-1} \mid x_t; \theta)}\; r(x_0; \theta),

with m what :math:`x_{t-1}` is drawn from. A Metropolis step under it leaves the posterior of x and the latents as it
is, whatever the twist; where the twist is exact, it is one under the posterior of the latents alone, x being summed
out. So latents move freely that x holds fast when it is given: a noise scale, say, where x has moved to fit (the
ancillary parameterisation: Papaspiliopoulos, Roberts & Sköld 2007; correlated pseudo-marginal moves: Deligiannidis,
Doucet & Pitt 2018, here with one particle).

Trajectories have shape ``(T + 1, 1, S, …)``, entry t being :math:`x_t`, in the model's space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.matrices import cholesky
from pp_diffusion.posterior.prediction import predict_last, predict_start
from pp_diffusion.posterior.smc import Sampler, SMCState, init
from pp_diffusion.states.space import Guided, Prediction


class Noise(NamedTuple):
    """A trajectory's, of its guided steps.

    :ivar start: that of :math:`x_T`, or :math:`x_T` itself where the twist does not guide it.
    :ivar steps: of t = T…2, in the first axis.
    :ivar last: of :math:`x_0`.
    """

    start: Array
    steps: Array
    last: Array


class Walk(NamedTuple):
    """What a random walk knows of the latents: a mean and a covariance in which the past counts less and less.

    :ivar learned: from how many positions.
    """

    learned: Array
    mean: Array
    covariance: Array

    @classmethod
    def begin(cls, position: Array) -> Walk:
        """Small steps."""
        return cls(jnp.zeros(()), position, 0.01 * jnp.eye(position.size, dtype=position.dtype))

    def learn(self, position: Array, is_wanted: Array) -> Walk:
        """From one more position."""
        share = jnp.where(is_wanted, 2 / (self.learned + 20), 0.0)
        away = position - self.mean
        covariance = (1 - share) * (self.covariance + share * jnp.outer(away, away))
        return Walk(self.learned + is_wanted, self.mean + share * away, covariance)

    def propose(self, rng_key: Array, position: Array) -> Array:
        """A step, at a scale between a tenth of the best one for a normal target and the whole."""
        scale_key, noise_key = jax.random.split(rng_key)
        floor = 1e-4 * jnp.trace(self.covariance) / position.size + 1e-10
        root = cholesky(self.covariance + floor * jnp.eye(position.size, dtype=position.dtype))
        scale = 2.38 / math.sqrt(position.size) * 10 ** -jax.random.uniform(scale_key)
        return position + scale * root @ jax.random.normal(noise_key, position.shape, position.dtype)


def move(
    rng_key: Array,
    sampler_at: Callable[[Array], Sampler],
    log_density: Callable[[Array, Array], Array],
    position: Array,
    path: Array,
    walk: Walk,
    num_moves: int,
) -> tuple[Array, Array, Array]:
    """Latents and trajectory after so many Metropolis steps at fixed noise, and the share that was accepted.

    :param sampler_at: of x, given the latents.
    :param log_density: of the latents and all that is observed, given them and a trajectory: of all but x.
    :param position: the latents, in one vector.
    """
    noise_key, rng_key = jax.random.split(rng_key)
    noise = noise_of(noise_key, sampler_at(position), path)

    def one(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        position, path, log_now, accepted = carry
        walk_key, accept_key = jax.random.split(jax.random.fold_in(rng_key, i))
        is_first = i == 0  # which finds the density where the chain is: the replay is compiled once
        new = jnp.where(is_first, position, walk.propose(walk_key, position))
        new_path, log_ratio = replay(sampler_at(new), noise)
        log_new = log_ratio.sum() + log_density(new, new_path)
        log_new = jnp.where(jnp.isnan(log_new), -jnp.inf, log_new)
        accept = ~is_first & (jnp.log(jax.random.uniform(accept_key)) < log_new - log_now)
        return (
            jnp.where(accept, new, position),
            jnp.where(accept, new_path, path),
            jnp.where(is_first | accept, log_new, log_now),
            accepted + accept,
        )

    start = position, path, jnp.full((), -jnp.inf), jnp.zeros(())
    position, path, _, accepted = jax.lax.fori_loop(0, num_moves + 1, one, start)
    return position, path, accepted / max(num_moves, 1)


def noise_of(rng_key: Array, sampler: Sampler, path: Array) -> Noise:
    """The noise that made a trajectory; of that which more than one could have, a draw."""
    start_key, last_key, rng_key = jax.random.split(rng_key, 3)
    state = init(jax.random.key(0), sampler, 1)  # of which only what is observed counts
    start = path[-1][None]
    if sampler.twist.starts:
        start = _start(sampler, state).proposal.noise_of(start_key, start)

    def one(_: None, at: tuple[Array, Array, Array, Array]) -> tuple[None, Array]:
        key, t, x_t, before = at
        return None, _step(sampler, state, sampler.predict(x_t[None], t)).proposal.noise_of(key, before[None])

    times = jnp.arange(sampler.num_timesteps, 1, -1)
    _, steps = jax.lax.scan(one, None, (jax.random.split(rng_key, len(times)), times, path[:1:-1], path[-2:0:-1]))
    last = _step(sampler, state, predict_last(sampler.factors.process, path[1][None])).proposal
    return Noise(start, steps, last.noise_of(last_key, path[0][None]))


def replay(sampler: Sampler, noise: Noise) -> tuple[Array, Array]:
    """The trajectory that a noise makes, and log p - log of the density that it is drawn from, shape ``(1, S)``."""
    state = init(jax.random.key(0), sampler, 1)  # of which only what is observed counts
    shape = state.x.shape
    x, log_ratio = noise.start, jnp.zeros(shape[1:3])
    if sampler.twist.starts:
        x, found = _start(sampler, state).proposal.from_noise(noise.start, shape)
        log_ratio += found[0]

    def one(carry: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        x_t, log_ratio = carry
        t, noise = at
        x, found = _step(sampler, state, sampler.predict(x_t, t)).proposal.from_noise(noise, shape)
        return (x, log_ratio + found[0]), x_t[0]

    times = jnp.arange(sampler.num_timesteps, 1, -1)
    (x_1, log_ratio), path = jax.lax.scan(one, (x, log_ratio), (times, noise.steps))
    last = _step(sampler, state, predict_last(sampler.factors.process, x_1)).proposal
    x_0, found = last.from_noise(noise.last, shape)
    return jnp.concatenate([x_0, x_1, path[::-1]]), log_ratio + found[0]


def _step(sampler: Sampler, state: SMCState, prediction: Prediction) -> Guided:
    return sampler.twist_at(state, prediction, state.latents)


def _start(sampler: Sampler, state: SMCState) -> Guided:
    events = (1, 1, *sampler.factors.reader.systems.batch_shape)
    return _step(sampler, state, predict_start(sampler.factors.process, events))
