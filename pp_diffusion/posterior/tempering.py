r"""Particles from p to p·r by way of :math:`p\, r^\beta`, as pure functions of one chain."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.posterior.particles import ess, gather, log_mean, systematic
from pp_diffusion.posterior.target import Target

#: Of the moves' step size.
TARGET_ACCEPTANCE = 0.8
#: At most so many temperatures.
MOST_TEMPERATURES = 1000


class TemperedState(NamedTuple):
    """One chain's particles; ``position`` has shape (P, d), ``log_prior`` and ``log_likelihood`` (P,).

    :ivar position: all latents in one vector, unconstrained.
    :ivar temperature: β.
    :ivar log_evidence: of p r^β.
    :ivar step_size: of the moves.
    :ivar ess: the effective sample size of the weights, at the last temperature.
    :ivar least_ess: at any.
    :ivar acceptance: of the moves, at the last temperature.
    :ivar num_temperatures: so far.
    """

    rng_key: Array
    position: Array
    log_prior: Array
    log_likelihood: Array
    temperature: Array
    log_evidence: Array
    step_size: Array
    ess: Array
    least_ess: Array
    acceptance: Array
    num_temperatures: Array


class Moves(NamedTuple):
    """Settings.

    :ivar ess_threshold: the share of the particles that one step of the temperature leaves as effective ones.
    :ivar num_moves: Hamiltonian moves at each temperature.
    :ivar num_leapfrog: their length, in gradients.
    """

    ess_threshold: float
    num_moves: int
    num_leapfrog: int


def start(rng_key: Array, target: Target, num_particles: int) -> TemperedState:
    """Draws of the prior."""
    init_key, rng_key = jax.random.split(rng_key)
    position = jax.vmap(target.draw)(jax.random.split(init_key, num_particles))
    prior, likelihood = jax.vmap(target.log_densities)(position)
    zero, many = jnp.zeros(()), jnp.asarray(float(num_particles))
    return TemperedState(
        rng_key, position, prior, likelihood, zero, zero, jnp.asarray(0.5), many, many, zero, jnp.zeros((), int)
    )


def temper(target: Target, state: TemperedState, moves: Moves) -> TemperedState:
    """All steps of the temperature, to 1; fewer where no particle is left, or it takes too many."""

    def goes_on(state: TemperedState) -> Array:
        is_alive = ~jnp.isneginf(state.log_evidence)
        return (state.temperature < 1) & is_alive & (state.num_temperatures < MOST_TEMPERATURES)

    return jax.lax.while_loop(goes_on, partial(step, target, moves), state)


def step(target: Target, moves: Moves, state: TemperedState) -> TemperedState:
    """One: weigh, resample, move."""
    count = len(state.position)
    resample_key, rng_key, *move_keys = jax.random.split(state.rng_key, moves.num_moves + 2)
    rise = rise_of(state.log_likelihood, 1 - state.temperature, moves.ess_threshold * count)
    log_weights = rise * state.log_likelihood
    temperature = jnp.where(rise >= 1 - state.temperature, 1.0, state.temperature + rise)
    size = ess(log_weights)
    index = systematic(resample_key, log_weights)
    scale = jnp.std(state.position, axis=0, where=jnp.isfinite(state.log_likelihood)[:, None]) + 1e-6
    particles = gather(index, (state.position, state.log_prior, state.log_likelihood))

    def one_move(carry: Any, rng_key: Array) -> tuple[Any, Array]:
        particles, step_size = carry
        particles, acceptance = move(target, temperature, scale, moves.num_leapfrog, rng_key, particles, step_size)
        return (particles, jnp.clip(step_size * jnp.exp(acceptance - TARGET_ACCEPTANCE), 1e-3, 2.0)), acceptance

    (particles, step_size), acceptance = jax.lax.scan(one_move, (particles, state.step_size), jnp.stack(move_keys))
    position, log_prior, log_likelihood = particles
    return TemperedState(
        rng_key,
        position,
        log_prior,
        log_likelihood,
        temperature=temperature,
        log_evidence=state.log_evidence + log_mean(log_weights),
        step_size=step_size,
        ess=size,
        least_ess=jnp.minimum(state.least_ess, size),
        acceptance=acceptance.mean(),
        num_temperatures=state.num_temperatures + 1,
    )


def rise_of(log_likelihood: Array, most: Array, effective: Any) -> Array:
    """The rise of the temperature that leaves so many effective particles, by bisection; at most ``most``."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = ess(middle * log_likelihood) >= effective
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(most), most))
    return jnp.where(ess(most * log_likelihood) >= effective, most, jnp.maximum(low, 1e-6))


def move(
    target: Target, temperature: Array, scale: Array, num_leapfrog: int, rng_key: Array, particles: Any, size: Array
) -> tuple[Any, Array]:
    """A Hamiltonian move of all particles, with the mass that their spread asks for, and the share accepted."""

    def tempered(position: Array) -> tuple[Array, tuple[Array, Array]]:
        prior, likelihood = target.log_densities(position)
        return prior + temperature * likelihood, (prior, likelihood)

    def one(rng_key: Array, position: Array, prior: Array, likelihood: Array) -> tuple[Any, Array]:
        momentum_key, length_key, accept_key = jax.random.split(rng_key, 3)
        step = size * scale * jax.random.uniform(length_key, minval=0.7, maxval=1.3)
        momentum = jax.random.normal(momentum_key, position.shape)
        slope = jax.grad(tempered, has_aux=True)

        def leap(carry: Any, _: None) -> tuple[Any, None]:
            q, p, gradient, _ = carry
            p = p + 0.5 * step * gradient
            q = q + step * p
            gradient, parts = slope(q)
            return (q, p + 0.5 * step * gradient, gradient, parts), None

        here = (position, momentum, slope(position)[0], (prior, likelihood))
        (q, p, _, (new_prior, new_likelihood)), _ = jax.lax.scan(leap, here, None, num_leapfrog)
        value = new_prior + temperature * new_likelihood
        ratio = value - 0.5 * jnp.sum(p**2) - (prior + temperature * likelihood) + 0.5 * jnp.sum(momentum**2)
        ratio = jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)
        accept = jnp.log(jax.random.uniform(accept_key)) < ratio
        new = (q, new_prior, new_likelihood)
        old = (position, prior, likelihood)
        return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old), jnp.exp(jnp.minimum(ratio, 0.0))

    particles, acceptance = jax.vmap(one)(jax.random.split(rng_key, len(particles[0])), *particles)
    return particles, acceptance.mean()
