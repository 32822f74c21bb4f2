"""Posterior and evidence of any continuous NumPyro model, by particles that go from its prior to its posterior."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.diagnostics import print_summary
from numpyro.distributions import biject_to

from pp_diffusion.checks import positive_int
from pp_diffusion.posterior.particles import ess, gather, log_mean, systematic

#: Of the moves' step size.
TARGET_ACCEPTANCE = 0.8


class _State(NamedTuple):
    """One chain's particles; ``position`` has shape (P, d), all else of them (P,)."""

    rng_key: Array
    position: Array
    log_prior: Array
    log_likelihood: Array
    temperature: Array
    log_evidence: Array
    step_size: Array
    acceptance: Array
    num_temperatures: Array


class TemperedSMC:
    r"""Particles from p to p·r by way of :math:`p\, r^\beta`, :math:`\beta` from 0 to 1 by steps that keep the weights
    even; used like :class:`~pp_diffusion.SMC`.

    For a model with a :class:`~pp_diffusion.DiffusionFlow` and whatever other continuous latents, also such that the
    flow depends on. With :class:`~pp_diffusion.FlowReparam` the particles live in the flow's noise, where p is N(0, I)
    and modes are as near to each other as they can be. Particles find modes by the prior's draws, and the share of each
    by their weights, which no chain of NUTS does; at each temperature they are resampled and then moved by Hamiltonian
    steps, scaled to the particles.

    :param model: the model, all of whose latents are continuous (enumeration is not supported here).
    :param num_particles: of each chain.
    :param num_chains: independent runs, of which the error of the evidence is the spread; at least 2.
    :param ess_threshold: the share of the particles that one step of the temperature leaves as effective ones.
    :param num_moves: Hamiltonian moves at each temperature.
    :param num_leapfrog: their length, in gradients.

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> smc = ppd.TemperedSMC(model, num_particles=500)
        >>> smc.run(jax.random.key(0), 2.0)
        >>> abs(smc.log_evidence - dist.Normal(0, 2**0.5).log_prob(2.0)) < 0.1
        Array(True, dtype=bool)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int = 1000,
        num_chains: int = 4,
        ess_threshold: float = 0.5,
        num_moves: int = 3,
        num_leapfrog: int = 5,
    ) -> None:
        if not 0 < ess_threshold < 1:
            raise ValueError(f"ess_threshold must be between 0 and 1; got {ess_threshold}")
        if positive_int("num_chains", num_chains) < 2:
            raise ValueError("num_chains must be at least 2: the error of the evidence is their spread")
        self.model = model
        self.num_particles, self.num_chains = positive_int("num_particles", num_particles), num_chains
        self.ess_threshold = float(ess_threshold)
        self.num_moves = positive_int("num_moves", num_moves)
        self.num_leapfrog = positive_int("num_leapfrog", num_leapfrog)
        self._state: _State | None = None
        self._samples: dict[str, Array] = {}

    def run(self, rng_key: Array, *args: Any, **kwargs: Any) -> None:
        """Runs all chains on these arguments of the model."""
        target = _Target(self.model, args, kwargs)
        settings = (self.ess_threshold, self.num_moves, self.num_leapfrog)

        def chain(rng_key: Array) -> tuple[_State, dict[str, Array]]:
            init_key, run_key = jax.random.split(rng_key)
            position = jax.vmap(target.draw)(jax.random.split(init_key, self.num_particles))
            state = _temper(run_key, target, position, *settings)
            return state, jax.vmap(target.sites)(state.position)

        keys = jax.random.split(rng_key, self.num_chains)
        self._state, self._samples = jax.jit(jax.vmap(chain))(keys)

    @property
    def state(self) -> _State:
        """The particles at the end, and what is known of the run; each field with the chains in front."""
        if self._state is None:
            raise ValueError("run it first")
        return self._state

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Array]:
        """Equally weighted draws of all latent and deterministic sites."""
        self.state  # noqa: B018
        if group_by_chain:
            return dict(self._samples)
        return {name: a.reshape(-1, *a.shape[2:]) for name, a in self._samples.items()}

    @property
    def log_evidence(self) -> Array:
        """log ∫ p r, in nats: of the mean of the chains' estimates."""
        return log_mean(self.state.log_evidence)

    @property
    def log_evidence_error(self) -> Array:
        """Its standard error, by the chains' spread."""
        weights = jnp.exp(self.state.log_evidence - self.log_evidence)
        return weights.std(ddof=1) / self.num_chains**0.5

    def print_summary(self) -> None:
        """Of all sites, with R-hat between the chains; the evidence; how the run went."""
        print_summary({name: np.asarray(a) for name, a in self.get_samples(group_by_chain=True).items()})
        state = self.state
        print(f"log evidence {self.log_evidence:.3f} ± {self.log_evidence_error:.3f} nats")
        print(f"{int(state.num_temperatures.max())} temperatures, moves accepted {float(state.acceptance.mean()):.2f}")


class _Target:
    """A model's prior and likelihood over its latents, unconstrained and in one vector."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.program = lambda: model(*args, **kwargs)
        shapes = jax.eval_shape(lambda: self._unconstrained(jax.random.key(0)))
        self.unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))[1]

    def _unconstrained(self, rng_key: Array) -> dict[str, Array]:
        latents = {}
        for name, site in handlers.trace(handlers.seed(self.program, rng_key)).get_trace().items():
            if site["type"] == "sample" and not site["is_observed"]:
                if site["fn"].support.is_discrete:
                    raise ValueError(f"site {name!r} is discrete: TemperedSMC is for continuous latents")
                latents[name] = biject_to(site["fn"].support).inv(site["value"])
        if not latents:
            raise ValueError("the model has no latent site")
        return latents

    def draw(self, rng_key: Array) -> Array:
        """A draw of the prior."""
        return ravel_pytree(self._unconstrained(rng_key))[0]

    def _trace(self, position: Array) -> tuple[dict[str, Any], list[Array]]:
        latents, log_dets = self.unravel(position), []

        def fill(site: dict[str, Any]) -> Array | None:
            if site["type"] != "sample" or site["name"] not in latents:
                return None
            transform, z = biject_to(site["fn"].support), latents[site["name"]]
            value = transform(z)
            log_dets.append(jnp.sum(transform.log_abs_det_jacobian(z, value)))
            return value

        program = handlers.substitute(handlers.seed(self.program, jax.random.key(0)), substitute_fn=fill)
        return handlers.trace(program).get_trace(), log_dets

    def log_densities(self, position: Array) -> tuple[Array, Array]:
        """Log prior, with the Jacobian of what constrains, and log likelihood."""
        trace, log_dets = self._trace(position)
        prior, likelihood = sum(log_dets), jnp.zeros(())
        for site in trace.values():
            if site["type"] == "sample":
                log_prob = jnp.sum(site["fn"].log_prob(site["value"]))
                log_prob *= 1.0 if site.get("scale") is None else site["scale"]
                if site["is_observed"]:
                    likelihood += log_prob
                else:
                    prior += log_prob
        return jnp.asarray(prior), jnp.where(jnp.isnan(likelihood), -jnp.inf, likelihood)

    def sites(self, position: Array) -> dict[str, Array]:
        """Values of the latent and the deterministic sites."""
        trace = self._trace(position)[0].items()
        return {
            name: site["value"]
            for name, site in trace
            if site["type"] == "deterministic" or (site["type"] == "sample" and not site["is_observed"])
        }


def _temper(
    rng_key: Array, target: _Target, position: Array, threshold: float, num_moves: int, num_leapfrog: int
) -> _State:
    count = len(position)

    def one_temperature(state: _State) -> _State:
        keys = jax.random.split(state.rng_key, num_moves + 2)
        rise = _rise(state.log_likelihood, 1 - state.temperature, threshold * count)
        log_weights = rise * state.log_likelihood
        temperature = jnp.where(rise >= 1 - state.temperature, 1.0, state.temperature + rise)
        index = systematic(keys[0], log_weights)
        scale = jnp.std(state.position, axis=0, where=jnp.isfinite(state.log_likelihood)[:, None]) + 1e-6
        particles = gather(index, (state.position, state.log_prior, state.log_likelihood))
        move = partial(_move, target, temperature, scale, num_leapfrog)

        def one_move(carry: Any, rng_key: Array) -> tuple[Any, Array]:
            particles, step_size = carry
            particles, acceptance = move(rng_key, particles, step_size)
            return (particles, jnp.clip(step_size * jnp.exp(acceptance - TARGET_ACCEPTANCE), 1e-3, 2.0)), acceptance

        (particles, step_size), acceptance = jax.lax.scan(one_move, (particles, state.step_size), keys[1:-1])
        log_evidence = state.log_evidence + log_mean(log_weights)
        number = state.num_temperatures + 1
        position, prior, likelihood = particles
        return _State(
            keys[-1], position, prior, likelihood, temperature, log_evidence, step_size, acceptance.mean(), number
        )

    prior, likelihood = jax.vmap(target.log_densities)(position)
    zero = jnp.zeros(())
    start = _State(rng_key, position, prior, likelihood, zero, zero, jnp.asarray(0.5), zero, jnp.zeros((), int))
    return jax.lax.while_loop(lambda s: (s.temperature < 1) & (s.num_temperatures < 1000), one_temperature, start)


def _rise(log_likelihood: Array, most: Array, effective: float) -> Array:
    """The rise of the temperature that leaves so many effective particles, by bisection; at most ``most``."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = ess(middle * log_likelihood) >= effective
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros(()), most))
    return jnp.where(ess(most * log_likelihood) >= effective, most, jnp.maximum(low, 1e-6))


def _move(
    target: _Target, temperature: Array, scale: Array, num_leapfrog: int, rng_key: Array, particles: Any, size: Array
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

        def leap(carry: tuple[Array, Array, Array], _: None) -> tuple[Any, None]:
            q, p, gradient = carry
            p = p + 0.5 * step * gradient
            q = q + step * p
            gradient = slope(q)[0]
            return (q, p + 0.5 * step * gradient, gradient), None

        (q, p, _), _ = jax.lax.scan(leap, (position, momentum, slope(position)[0]), None, num_leapfrog)
        value, (new_prior, new_likelihood) = tempered(q)
        ratio = value - 0.5 * jnp.sum(p**2) - (prior + temperature * likelihood) + 0.5 * jnp.sum(momentum**2)
        ratio = jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)
        accept = jnp.log(jax.random.uniform(accept_key)) < ratio
        new = (q, new_prior, new_likelihood)
        old = (position, prior, likelihood)
        return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old), jnp.exp(jnp.minimum(ratio, 0.0))

    particles, acceptance = jax.vmap(one)(jax.random.split(rng_key, len(particles[0])), *particles)
    return particles, acceptance.mean()
