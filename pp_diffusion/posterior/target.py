"""Prior and likelihood of a model of continuous latents, all of them in one vector of real numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.frozen import Frozen
from pp_diffusion.posterior.messages import Message, base_of, is_deterministic, is_fixed, log_prob_of
from pp_diffusion.posterior.program import Latents, Program, Traced, trace_model, trace_with_arrays, unconstrained
from pp_diffusion.prior import DiffusionPrior

Shapes = tuple[tuple[str, tuple[int, ...], Any], ...]


class Measured(NamedTuple):
    """What a model says at some latents.

    :ivar log_prior: in unconstrained space.
    :ivar log_likelihood: minus infinity where it is NaN.
    :ivar sites: values of the latent and the deterministic sites.
    :ivar observed: of the observed ones, ``numpyro.factor`` apart.
    """

    log_prior: Array
    log_likelihood: Array
    sites: dict[str, Array]
    observed: dict[str, Array]


class Target(Frozen):
    """A traced model: its prior is drawn, its densities are read. Made by :func:`read_target`.

    :param program: the model and its arguments; a leaf, so that new data need no new compilation.
    :param draws: the latents, unconstrained, as a function of the program and a random key.
    :param densities: :class:`Measured` as a function of the program and the latents.
    :param shapes: of the latents: name, shape, dtype.
    """

    data_fields = ("program",)

    program: Program
    draws: Traced
    densities: Traced
    shapes: Shapes

    def __init__(self, program: Program, draws: Traced, densities: Traced, shapes: Shapes) -> None:
        self._set(program=program, draws=draws, densities=densities, shapes=shapes)

    def draw(self, rng_key: Array) -> Array:
        """A draw of the prior, as one vector."""
        latents = self.draws(self.program, rng_key)
        return jnp.concatenate([jnp.ravel(latents[name]) for name, _, _ in self.shapes])

    def measure(self, position: Array) -> Measured:
        """All that the model says at a vector of latents."""
        latents, at = {}, 0
        for name, shape, dtype in self.shapes:
            size = math.prod(shape)
            latents[name] = position[at : at + size].reshape(shape).astype(dtype)
            at += size
        return self.densities(self.program, latents)

    @property
    def size(self) -> int:
        """How many numbers the latents are."""
        return sum(math.prod(shape) for _, shape, _ in self.shapes)

    def observed(self) -> dict[str, Array]:
        """What is observed, ``numpyro.factor`` apart."""
        return self.measure(jnp.zeros(self.size)).observed

    def log_densities(self, position: Array) -> tuple[Array, Array]:
        """Log prior and log likelihood."""
        found = self.measure(position)
        return found.log_prior, found.log_likelihood


def read_target(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, sampler: str = "TemperedSMC"
) -> Target:
    """Reads a model's latents.

    :param sampler: whose name errors say.
    :raises ValueError: naming the site: for discrete latents, a prior without a density, a subsampled plate; or where
        there is no latent.
    """
    messages = trace_model(model, args, kwargs).sites
    _check(messages, sampler)
    values = {n: unconstrained(m) for n, m in messages.items() if is_latent(m)}
    key = jax.random.key(0)
    program, densities = trace_with_arrays(model, args, kwargs, lambda program: Traced(_measure, program, values))
    draws = Traced(lambda program, key: _draw(tuple(values), program, key), program, key)
    return Target(program, draws, densities, tuple((n, u.shape, u.dtype) for n, u in values.items()))


def _check(messages: Mapping[str, Message], sampler: str) -> None:
    for name, site in messages.items():
        if site["type"] == "plate" and len(site["value"]) != site["args"][0]:
            raise ValueError(f"plate {name!r} is subsampled: {sampler} needs the whole likelihood")
        if not is_latent(site):
            continue
        if isinstance(base_of(site), DiffusionPrior):
            raise ValueError(
                f"site {name!r} has a DiffusionPrior, which has no density: give it the same network as a flow, "
                "diffusion.flow(params), with pp_diffusion.FlowReparam; or use pp_diffusion.SMC"
            )
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r} is discrete: {sampler} is for continuous latents. Run it for each value, given "
                "by handlers.condition, and weigh the runs by their evidence; or take NUTS, which sums it "
                "out, by infer={'enumerate': 'parallel'}"
            )
    if not any(map(is_latent, messages.values())):
        raise ValueError("the model has no latent site")


def _draw(names: tuple[str, ...], program: Program, rng_key: Array) -> Latents:
    sites = program.trace(None, {}, rng_key).sites
    return {name: unconstrained(sites[name]) for name in names}


def _measure(program: Program, latents: Latents) -> Measured:
    trace = program.trace(None, latents, jax.random.key(0))
    sample = {n: m for n, m in trace.sites.items() if m["type"] == "sample"}
    log_probs = {n: jnp.sum(log_prob_of(m)) for n, m in sample.items()}
    zero = jnp.zeros(())
    log_prior = sum((p for n, p in log_probs.items() if not sample[n]["is_observed"]), start=zero)
    likelihood = sum((p for n, p in log_probs.items() if sample[n]["is_observed"]), start=zero)
    observed = {n: m for n, m in sample.items() if m["is_observed"] and not m["infer"].get("is_auxiliary")}
    return Measured(
        log_prior + sum(map(jnp.sum, trace.log_det.values()), start=zero),
        jnp.where(jnp.isnan(likelihood), -jnp.inf, likelihood),
        {n: jnp.asarray(m["value"]) for n, m in trace.sites.items() if is_latent(m) or is_deterministic(m)},
        {n: jnp.asarray(m["value"]) for n, m in observed.items()},
    )


def is_latent(message: Message) -> bool:
    """Whether a site is one that a sampler draws."""
    return message["type"] == "sample" and not message["is_observed"] and not is_fixed(message)
