"""The latents of a model that are not x: drawn from their prior, drawn anew, and as the user knows them.

Arrays have shape ``(P, C, S, …)``: P particles, C chains, S systems.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.posterior.factors import Factors
from pp_diffusion.posterior.program import Latents


def draw(factors: Factors, rng_key: Array, shape: tuple[int, int]) -> Latents:
    """The latents from their prior, in unconstrained space, for ``shape = (P, C)``."""
    return jax.vmap(jax.vmap(factors.reader.draw))(jax.random.split(rng_key, shape))


def redraw_discrete(factors: Factors, rng_key: Array, latents: Latents) -> tuple[Latents, Array]:
    """The discrete latents drawn anew from their prior, and the log ratio of the proposal's probabilities, back over
    there, of shape ``(P, C, S)``."""
    reader = factors.reader
    x = reader.origin()
    discrete = [site.name for site in reader.latents if site.is_discrete]

    def log_prob(u: Latents) -> Array:
        found = reader.log_priors(reader.measure(x, reader.join(u)))
        return sum((found[name] for name in discrete), start=jnp.zeros(reader.systems.number))

    def redraw(key: Array, u: Latents) -> tuple[Latents, Array]:
        new = reader.redraw_discrete(key, u)
        return new, log_prob(u) - log_prob(new)

    keys = jax.random.split(rng_key, next(iter(latents.values())).shape[:2])
    return jax.vmap(jax.vmap(redraw))(keys, latents)


def constrain(factors: Factors, z: Array, latents: Latents) -> Latents:
    """All latents as the user knows them, each of the site's shape with ``(P, C)`` in front; x among them, and what the
    model makes of them in deterministic sites."""
    reader = factors.reader

    def values(z: Array, u: Latents) -> Latents:
        x = reader.systems.to_site(reader.in_data_units(z))
        found = reader.measure(x, reader.join(u))
        latents = {site.name: found.values[site.name] for site in reader.latents}
        return {factors.name: x} | latents | {name: found.deterministic[name] for name in reader.deterministic}

    return jax.vmap(jax.vmap(values))(z, latents)
