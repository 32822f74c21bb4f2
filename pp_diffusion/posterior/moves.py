"""Metropolis moves of the latents beside x. Arrays have shape ``(P, C, S, …)``: particles, chains, systems."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.matrices import cholesky, einsum
from pp_diffusion.posterior.factors import Factors, Latents
from pp_diffusion.posterior.latents import redraw_discrete
from pp_diffusion.posterior.particles import over_systems


class RandomWalk(NamedTuple):
    """Steps of the continuous latents, normal with the particles' own covariance.

    :ivar root: the Cholesky factor of that covariance, shape ``(C, S, n, n)``.
    """

    root: Array

    @classmethod
    def over(cls, latents: Latents) -> RandomWalk:
        flat = _flatten(latents)
        centred = flat - flat.mean(0)
        covariance = einsum("p...i,p...j->...ij", centred, centred) / len(flat)
        size = flat.shape[-1]
        floor = 1e-4 * jnp.trace(covariance, axis1=-2, axis2=-1) / size + 1e-8
        return cls(cholesky(covariance + floor[..., None, None] * jnp.eye(size, dtype=flat.dtype)))

    def propose(self, rng_key: Array, uniform: Array, latents: Latents) -> Latents:
        """A step, at a scale between a tenth of the best one for a normal target and the whole, by a uniform number."""
        flat = _flatten(latents)
        scale = 10 ** -uniform[..., None]
        noise = jax.random.normal(rng_key, flat.shape, flat.dtype)
        direction = einsum("...ij,p...j->p...i", self.root, noise)
        return _unflatten(flat + 2.38 / math.sqrt(flat.shape[-1]) * scale * direction, latents)


class Position(NamedTuple):
    """Where a particle's latents are, and what follows from that.

    :ivar latents: in unconstrained space.
    :ivar log_density: of the moves' target.
    :ivar carried: what was computed with it, arrays of particles.
    """

    latents: Latents
    log_density: Array
    carried: Any


def move(
    rng_key: Array,
    factors: Factors,
    latents: Latents,
    target: Callable[[Latents], Position],
    num_moves: int,
    is_wanted: Array | bool = True,
) -> tuple[Position, Array]:
    """The position at these latents after so many Metropolis moves, or none, and the share that was accepted, shape
    ``(C, S)``.

    Continuous latents move by a random walk, discrete ones by new draws of their prior; where there are both, in turn,
    so many times each. The first pass of the loop finds the position at the latents themselves: the target is compiled
    once.

    :param target: the position at latents; the moves leave its density invariant.
    """
    continuous = {name: u for name, u in latents.items() if jnp.issubdtype(u.dtype, jnp.floating)}
    has_discrete = len(continuous) < len(latents)
    walk = None
    if continuous:  # not where nothing moves
        still = partial(zeros_of, RandomWalk.over)
        walk = jax.lax.cond(is_wanted, RandomWalk.over, still, continuous)
    num_moves *= 2 if walk and has_discrete else 1
    keys = jax.random.split(rng_key, (num_moves + 1, 2))
    start = zeros_of(target, latents)._replace(latents=latents)
    batch = start.log_density.shape

    def by_walk(key: Array, uniform: Array, latents: Latents) -> tuple[Latents, Array]:
        assert walk is not None
        moved = walk.propose(key, uniform, {name: latents[name] for name in continuous})
        return {**latents, **moved}, jnp.zeros(batch)

    def by_prior(key: Array, uniform: Array, latents: Latents) -> tuple[Latents, Array]:
        return redraw_discrete(factors, key, latents)

    def propose(i: Array, key: Array, uniform: Array, latents: Latents) -> tuple[Latents, Array]:
        if walk is None:
            return by_prior(key, uniform, latents)
        if not has_discrete:
            return by_walk(key, uniform, latents)
        return jax.lax.cond(i % 2 == 0, by_prior, by_walk, key, uniform, latents)

    def one(i: Array, carry: tuple[Position, Array]) -> tuple[Position, Array]:
        now, accepted = carry
        draw_key, uniform_key = keys[i]
        is_start = i == 0

        def stay() -> tuple[Latents, Array]:
            return now.latents, jnp.zeros(batch)

        def go() -> tuple[Latents, Array]:
            for_scale, for_acceptance = jax.random.uniform(uniform_key, (2, *batch))
            proposed, log_ratio = propose(i, draw_key, for_scale, now.latents)
            return proposed, log_ratio - jnp.log(for_acceptance)

        proposed, log_odds = jax.lax.cond(is_start, stay, go)
        new = target(proposed)
        log_new = jnp.where(jnp.isnan(new.log_density), -jnp.inf, new.log_density)
        accept = is_start | (log_new - now.log_density + log_odds > 0)
        now = jax.tree.map(lambda new, old: jnp.where(over_systems(accept, new), new, old), new, now)
        return now, accepted + jnp.where(is_start, 0.0, accept.mean(0))

    count = 1 + jnp.where(is_wanted, num_moves, 0)
    end, accepted = jax.lax.fori_loop(0, count, one, (start, jnp.zeros(batch[1:])))
    return end, accepted / num_moves


def zeros_of(function: Callable[..., Any], *args: Any) -> Any:
    """Zeros of the shapes of what a function returns, which is not computed."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *args))


def _flatten(latents: Latents) -> Array:
    return jnp.concatenate([u.reshape(*u.shape[:3], -1) for u in latents.values()], -1)


def _unflatten(flat: Array, like: Latents) -> Latents:
    sizes = [math.prod(u.shape[3:]) for u in like.values()]
    pieces = jnp.split(flat, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    return {name: piece.reshape(u.shape) for (name, u), piece in zip(like.items(), pieces, strict=True)}
