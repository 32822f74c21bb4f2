"""Gibbs sweeps over x and the other latents of a model, as pure functions of one chain: :func:`begin`, :func:`advance`.

A sweep draws each system's trajectory by :func:`~pp_diffusion.posterior.conditional.sweep`, given the other latents,
moves these and x together at fixed noise (:mod:`~pp_diffusion.posterior.held_noise`), and then draws them by a step of
NumPyro's NUTS, given x. Rows that share latents are independent systems given these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer.hmc import hmc

from pp_diffusion.chain import draw_state, start, walk_to_x_1
from pp_diffusion.frozen import Frozen
from pp_diffusion.posterior import held_noise
from pp_diffusion.posterior.conditional import sweep
from pp_diffusion.posterior.program import Latents
from pp_diffusion.posterior.smc import Sampler
from pp_diffusion.posterior.target import Target

#: Draws of the prior, of which a chain starts at the one with the largest likelihood.
NUM_STARTS = 16


class GibbsState(NamedTuple):
    """Where a chain is.

    :ivar path: x's trajectory, shape ``(T + 1, 1, S, *state_shape)``.
    :ivar hmc: the other latents, and NUTS's adaptation.
    :ivar is_new: whether the last sweep changed a system's :math:`x_0`; shape ``(S,)``.
    :ivar least_ess: of its particles, at any step; shape ``(S,)``.
    :ivar walk: what moves at fixed noise have learned of the other latents.
    :ivar accepted: the share of the last sweep's that was accepted.
    :ivar rng_key: for the sweeps to come.
    """

    path: Array
    hmc: Any
    is_new: Array
    least_ess: Array
    walk: held_noise.Walk
    accepted: Array
    rng_key: Array


class Gibbs(Frozen):
    """A model read twice: x given the other latents, and these given x.

    :param sampler: of x; the first argument of its program holds the other latents.
    :param target: of these; the first argument of its program is x.
    :param names: theirs.
    :param num_particles: for each system.
    :param num_warmup: sweeps in which NUTS adapts itself, and the random walk of the moves at fixed noise.
    :param target_accept_prob: of NUTS.
    :param num_moves: at fixed noise, in a sweep.
    """

    data_fields = ("sampler", "target")

    sampler: Sampler
    target: Target
    names: tuple[str, ...]
    num_particles: int
    num_warmup: int
    target_accept_prob: float
    num_moves: int

    def __init__(
        self,
        sampler: Sampler,
        target: Target,
        names: tuple[str, ...],
        *,
        num_particles: int,
        num_warmup: int,
        target_accept_prob: float = 0.8,
        num_moves: int = 0,
    ) -> None:
        self._set(sampler=sampler, target=target, names=names, num_particles=num_particles)
        self._set(num_warmup=num_warmup, target_accept_prob=target_accept_prob, num_moves=num_moves)

    def target_at(self, x: Array) -> Target:
        """The other latents' density, given x in data units and the shape of its site."""
        return self.target.replace(program=self.target.program.with_first(x))

    def sampler_at(self, latents: Latents) -> Sampler:
        """That of x, given the other latents."""
        return self.sampler.replace(factors=self.sampler.factors.with_first(latents))

    def x_of(self, path: Array) -> Array:
        """x in data units and the shape of its site."""
        factors = self.sampler.factors
        return factors.to_site(factors.in_data_units(path[0, 0])).astype(factors.reader.systems.dtype)

    def sampler_by(self, position: Array, x: Array) -> Sampler:
        """That of x, given the other latents as one vector; what x is does not matter."""
        sites = self.target_at(x).measure(position).sites
        return self.sampler_at({name: sites[name] for name in self.names})

    def log_density(self, position: Array, path: Array) -> Array:
        """Of the other latents and all that is observed, given a trajectory."""
        log_prior, log_likelihood = self.target_at(self.x_of(path)).log_densities(position)
        return log_prior + log_likelihood

    def sites(self, state: GibbsState) -> dict[str, Array]:
        """All latent and deterministic sites."""
        return self.target_at(self.x_of(state.path)).measure(state.hmc.z).sites

    def _potential(self, x: Array) -> Callable[[Array], Array]:
        target = self.target_at(x)

        def potential(position: Array) -> Array:
            log_prior, log_likelihood = target.log_densities(position)
            return -(log_prior + log_likelihood)

        return potential

    def nuts(self, rng_key: Array, position: Array, x: Array) -> tuple[Any, Callable[[Any, Array], Any]]:
        """NumPyro's own: its first state, and its step given x."""
        init, sample = hmc(potential_fn_gen=self._potential, algo="NUTS")
        settings = {"target_accept_prob": self.target_accept_prob, "model_args": (x,), "rng_key": rng_key}
        first = init(position, self.num_warmup, **settings)

        def step(state: Any, x: Array) -> Any:
            potential, gradient = jax.value_and_grad(self._potential(x))(state.z)
            return sample(state._replace(potential_energy=potential, z_grad=gradient), (x,), {})

        return first, step


def begin(gibbs: Gibbs, rng_key: Array) -> GibbsState:
    """A chain at the likeliest of some draws of the prior."""
    draw_key, path_key, nuts_key, rng_key = jax.random.split(rng_key, 4)
    positions = jax.vmap(gibbs.target.draw)(jax.random.split(draw_key, NUM_STARTS))
    paths = _prior_paths(path_key, gibbs.sampler)
    x = jax.vmap(gibbs.x_of)(paths)
    found = jax.vmap(lambda x, position: gibbs.target_at(x).log_densities(position)[1])(x, positions)
    best = jnp.argmax(found)
    first, _ = gibbs.nuts(nuts_key, positions[best], x[best])
    systems = jnp.zeros(gibbs.sampler.factors.num_systems)
    walk = held_noise.Walk.begin(positions[best])
    return GibbsState(paths[best], first, systems.astype(bool), systems, walk, jnp.zeros(()), rng_key)


def _prior_paths(rng_key: Array, sampler: Sampler) -> Array:
    """Trajectories of the prior, shape ``(NUM_STARTS, T + 1, 1, S, …)``."""
    factors = sampler.factors
    process, kernel = factors.process, factors.prior.kernel
    last_key, rng_key = jax.random.split(rng_key)
    batch = (NUM_STARTS, 1, *factors.reader.systems.batch_shape)
    x_T, keys = start(rng_key, kernel, process.rates, batch)
    x_1, between = walk_to_x_1(process, process.rates, draw_state(kernel), x_T, keys, keep_path=True)
    x_0 = kernel.as_state(process.last(x_1).sample(last_key))
    whole = [x_0[None], x_T[None]] if between is None else [x_0[None], between, x_T[None]]
    return jnp.moveaxis(jnp.concatenate(whole), 0, 1)


def advance(gibbs: Gibbs, state: GibbsState) -> GibbsState:
    """A sweep: the trajectories, all together, and the other latents."""
    sweep_key, move_key, rng_key = jax.random.split(state.rng_key, 3)
    x = gibbs.x_of(state.path)
    # NUTS knows how to adapt itself once it has begun; where it begins is dropped
    _, nuts = gibbs.nuts(state.hmc.rng_key, state.hmc.z, x)
    position = state.hmc.z
    swept = sweep(sweep_key, gibbs.sampler_by(position, x), state.path, gibbs.num_particles)
    path, accepted = swept.path, jnp.zeros(())
    if gibbs.num_moves:
        position, path, accepted = held_noise.move(
            move_key,
            lambda position: gibbs.sampler_by(position, x),
            gibbs.log_density,
            position,
            path,
            state.walk,
            gibbs.num_moves,
        )
    after = nuts(state.hmc._replace(z=position), gibbs.x_of(path))
    walk = state.walk.learn(after.z, state.walk.learned < gibbs.num_warmup)
    return GibbsState(path, after, swept.is_new, swept.least_ess, walk, accepted, rng_key)
