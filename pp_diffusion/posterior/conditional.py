r"""Conditional sequential Monte Carlo: a new trajectory of x in exchange for a kept one, which leaves p·r invariant.

The kept trajectory is the last particle at every step; all others go as in :mod:`pp_diffusion.posterior.smc` (Andrieu,
Doucet & Holenstein 2010). Where particles are resampled, the kept one's past is drawn anew among all particles
(ancestor sampling, Lindsten, Jordan & Schön 2014), so that few particles do. One of them all is kept at the end, by its
weight. Exact at any number of particles of at least 2, whatever the twist.

Arrays of particles have shape ``(P, 1, S, …)``: P particles, S systems; a trajectory has shape ``(T + 1, 1, S, …)``,
entry t being :math:`x_t`, in the model's space.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.posterior.particles import ess, gather, is_dead
from pp_diffusion.posterior.prediction import predict_last, predict_start
from pp_diffusion.posterior.smc import Sampler, SMCState, init, weigh, with_fallback
from pp_diffusion.states.space import BATCH_NDIM, Prediction


class Swept(NamedTuple):
    """A trajectory drawn in exchange for another.

    :ivar path: shape ``(T + 1, 1, S, *state_shape)``.
    :ivar is_new: whether a system's :math:`x_0` is another; shape ``(S,)``.
    :ivar least_ess: of all steps; shape ``(S,)``.
    """

    path: Array
    is_new: Array
    least_ess: Array


class Step(NamedTuple):
    """What is remembered of a step.

    :ivar x: the particles at its start.
    :ivar come_from: which of them each particle at its end comes from.
    :ivar ess: effective sample size of their weights, shape ``(1, S)``.
    """

    x: Array
    come_from: Array
    ess: Array


def sweep(rng_key: Array, sampler: Sampler, kept: Array, num_particles: int) -> Swept:
    """A trajectory given a kept one.

    Memory is that of all steps' particles.

    :param sampler: of a model without other latents.
    :param kept: a trajectory.
    :param num_particles: at least 2, the kept one among them.
    """
    init_key, choose_key = jax.random.split(rng_key)
    state = _start(init_key, sampler, kept, num_particles)
    factors = sampler.factors

    def onward(state: SMCState, kept: Array) -> tuple[SMCState, Step]:
        return _step(sampler, state, lambda x: sampler.predict(x, state.t), kept)

    state, steps = jax.lax.scan(onward, state, kept[-2:0:-1])
    state, last = _step(sampler, state, partial(predict_last, factors.process), kept[0])
    log_r = factors.read(state.x, state.latents).log_r
    log_weights = state.log_weights + jnp.where(jnp.isnan(log_r), -jnp.inf, log_r) - state.exact.log_det
    chosen = jax.random.categorical(choose_key, log_weights, axis=0)
    chosen = jnp.where(is_dead(log_weights), num_particles - 1, chosen)
    steps = jax.tree.map(lambda all_, one: jnp.concatenate([all_, one[None]]), steps, last)
    path = _traced_back(chosen, state.x, steps)
    differs = path[0, 0] != kept[0, 0]
    is_new = differs.reshape(len(differs), -1).any(-1)
    return Swept(path, is_new, jnp.minimum(steps.ess.min(0), ess(log_weights))[0])


def _start(rng_key: Array, sampler: Sampler, kept: Array, num_particles: int) -> SMCState:
    """Particles at x_T, the kept one the last of them."""
    state = init(rng_key, sampler, num_particles)
    log_weights = state.log_weights
    if sampler.twist.starts:
        start = predict_start(sampler.factors.process, (1, 1, *sampler.factors.reader.systems.batch_shape))
        log_ratio = sampler.twist_at(state, start, state.latents).proposal.log_ratio(kept[-1][None])
        log_weights = log_weights.at[-1].set(log_ratio[0])
    return state._replace(x=state.x.at[-1].set(kept[-1]), log_weights=log_weights)


def _step(
    sampler: Sampler, state: SMCState, predict_at: Callable[[Array], Prediction], kept: Array
) -> tuple[SMCState, Step]:
    """From x_t to x_{t-1}, of which ``kept`` is the last particle's.

    Particles are resampled one independently of the other: the kept one's being there is then no news to them.
    """
    index_key, kept_key, draw_key, rng_key = jax.random.split(state.rng_key, 4)
    prediction = predict_at(state.x)
    found = sampler.twist_at(state, prediction, state.latents)
    weighed = weigh(sampler, state, found)
    found = with_fallback(found, weighed.least)
    shape = weighed.log_weights.shape
    index = jax.random.categorical(index_key, weighed.log_weights, axis=0, shape=shape)
    # the twist is part of the weights at t alone: whose future is known needs none
    index = index.at[-1].set(jax.random.categorical(kept_key, state.log_weights + _log_step(prediction, kept), 0))
    index = jnp.where(weighed.needed, index, jnp.arange(shape[0])[:, None, None])
    found = gather(index, found)
    x, log_ratio = found.proposal.draw(draw_key, state.x.shape)
    last = jax.tree.map(lambda a: a[-1:], found.proposal)
    x, log_ratio = x.at[-1].set(kept), log_ratio.at[-1].set(last.log_ratio(kept[None])[0])
    log_weights = jnp.where(weighed.needed, 0.0, weighed.log_weights) + log_ratio - found.log_twist
    after = state._replace(t=state.t - 1, x=x, log_weights=log_weights, rng_key=rng_key)
    return after, Step(state.x, index, weighed.ess)


def _log_step(prediction: Prediction, kept: Array) -> Array:
    """log p(kept | x_t) of every particle, shape ``(P, 1, S)``."""
    log_prob = prediction.reverse.log_prob(kept[None])
    return log_prob.sum(tuple(range(BATCH_NDIM, log_prob.ndim)))


def _traced_back(chosen: Array, x_0: Array, steps: Step) -> Array:
    """The trajectory of the chosen particles.

    :param chosen: shape ``(1, S)``.
    :param steps: of t = T…1.
    """

    def back(at: Array, step: Step) -> tuple[Array, Array]:
        at = _taken(step.come_from, at)
        return at, _taken(step.x, at)

    _, path = jax.lax.scan(back, chosen, steps, reverse=True)
    return jnp.concatenate([_taken(x_0, chosen)[None], path[::-1]])


def _taken(particles: Array, at: Array) -> Array:
    """Of each system the particle of this number."""
    return jnp.take_along_axis(particles, at.reshape(1, *at.shape, *(1,) * (particles.ndim - BATCH_NDIM)), axis=0)[0]
