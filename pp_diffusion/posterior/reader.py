"""Densities of a traced model, system by system."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.transforms import Transform

from pp_diffusion.frozen import Frozen
from pp_diffusion.posterior.messages import Message, is_deterministic, log_prob_of
from pp_diffusion.posterior.program import Latents, Program, Traced, full_precision
from pp_diffusion.posterior.sites import Kind, Site, SitePart
from pp_diffusion.posterior.systems import Layout, Systems
from pp_diffusion.states.lines import MOST_LINES


class Numbers(NamedTuple):
    """Single numbers, whose densities are averaged along the line that each depends on.

    :ivar mean: of each, up to a constant; zero where there is none. Shape ``(…, L)``.
    :ivar density: the log density of each, as scaled and masked.
    """

    mean: Array
    density: Array


class Reading(NamedTuple):
    r"""A model's densities at given x and latents, nats; arrays with the axes of the particles in front, the systems'
    the last of them.

    The observations that are normal, or can be taken for it, are :math:`y = h(x) + \text{noise}`, k numbers in all.

    :ivar log_r: log r(x), the log density of everything observed (exact observations apart).
    :ivar log_other: the part of it without a normal form.
    :ivar log_prior: the other latents' log density, in unconstrained space.
    :ivar residual: y − h(x), shape ``(…, k)``; zero where masked.
    :ivar noise: the noise's variances, of the same shape: correlated observations are whitened.
    :ivar correction: log r less the normal density of the residuals, where they are normal (masks, scales), and what
        depends on nothing.
    :ivar discrepancy: the same per residual, where a density was taken for a normal one.
    :ivar elements: log r per number observed, where all sites' densities come so; else none.
    :ivar numbers: what is no part of ``residual`` nor ``log_other``, where densities of single numbers are few enough
        to be averaged one by one.
    """

    log_r: Array
    log_other: Array
    log_prior: Array
    residual: Array
    noise: Array
    correction: Array
    discrepancy: Array
    elements: Array
    numbers: Numbers


class LatentSite(NamedTuple):
    """A latent site that is not x: what is fixed of it."""

    name: str
    layout: Layout
    is_discrete: bool


class Measured(NamedTuple):
    """All that is read off a model at some x and latents.

    :ivar sites: per observed site.
    :ivar observations: what is observed there.
    :ivar values: of the latents, as the user knows them.
    :ivar log_priors: per latent, of its batch shape, in unconstrained space.
    :ivar deterministic: values of the deterministic sites.
    :ivar prior: what the diffusion prior is made of.
    """

    sites: dict[str, SitePart]
    observations: dict[str, Array]
    values: Latents
    log_priors: dict[str, Array]
    deterministic: dict[str, Array]
    prior: list[Any]


def measure(
    program: Program, x: Array, latents: Latents, rng_key: Array, *, name: str, kinds: dict[str, Kind]
) -> Measured:
    """Runs a model at x and latents, in the shapes of their sites."""
    trace = program.trace(x, latents, rng_key)
    return Measured(
        {n: kind.read(trace.sites[n]) for n, kind in kinds.items()},
        {n: jnp.asarray(trace.sites[n]["value"]) for n in kinds},
        {n: trace.sites[n]["value"] for n in latents},
        {n: _log_prior(trace.sites[n], trace.log_det.get(n)) for n in latents},
        {n: jnp.asarray(m["value"]) for n, m in trace.sites.items() if is_deterministic(m)},
        [*jax.tree.leaves(trace.sites[name]["fn"]), trace.sites[name]["scale"]],
    )


def _log_prior(message: Message, log_det: Array | None) -> Array:
    fn = message["fn"]
    fn = fn.base_dist if isinstance(fn, dist.MaskedDistribution) else fn  # proper where it goes nowhere, too
    log_prob = log_prob_of({**message, "fn": fn, "scale": None})
    return log_prob if log_det is None else log_prob + log_det


class Reader(Frozen):
    """A traced model whose systems are known: it reads the densities of one particle's systems.

    States are those of the model's space, of shape ``(S, *state_shape)``; latents are in unconstrained space, each with
    its systems in front.

    :param program: the model and its arguments.
    :param traced: :func:`measure` as a function of the program, x, latents, and a random key.
    :param draws: the latents as a function of the program and a random key; ``None`` without latents.
    :param redraws: the same, with the continuous ones given; ``None`` without discrete ones.
    :param systems: the independent systems.
    :param latents: the latents that tell.
    :param observed: the sites that make up r.
    :param transform: from the model's space to the data's.
    :param sets_known: whether exact observations set coordinates, and are no part of r.
    :param deterministic: the deterministic sites that x and these latents tell.
    :param shapes: of all latents that ``traced`` takes, also those that tell nothing: name, shape, dtype.
    """

    data_fields = ("program", "transform")

    program: Program
    traced: Traced
    draws: Traced | None
    redraws: Traced | None
    systems: Systems
    latents: tuple[LatentSite, ...]
    observed: tuple[Site, ...]
    transform: Transform | None
    sets_known: bool
    deterministic: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], Any], ...]

    def __init__(
        self,
        program: Program,
        traced: Traced,
        draws: Traced | None,
        redraws: Traced | None,
        *,
        systems: Systems,
        latents: tuple[LatentSite, ...],
        observed: tuple[Site, ...],
        transform: Transform | None,
        sets_known: bool,
        deterministic: tuple[str, ...],
        shapes: tuple[tuple[str, tuple[int, ...], Any], ...],
    ) -> None:
        self._set(program=program, traced=traced, draws=draws, redraws=redraws, systems=systems, latents=latents)
        self._set(observed=observed, transform=transform, sets_known=sets_known, shapes=shapes)
        self._set(deterministic=deterministic)

    def in_data_units(self, z: Array) -> Array:
        """States of the model's space in data units."""
        with full_precision():
            return z if self.transform is None else self.transform(z)

    def join(self, latents: Latents) -> Latents:
        """The latents in the shapes of their sites."""
        return {site.name: site.layout.join(latents[site.name], self.systems.shape) for site in self.latents}

    def split(self, latents: Latents) -> Latents:
        """The inverse of :meth:`join`."""
        return {site.name: site.layout.split(latents[site.name]) for site in self.latents}

    def measure(self, x: Array, latents: Latents) -> Measured:
        """What the model says at x and latents in the shapes of their sites; latents that are not given are zero."""
        given = {name: jnp.zeros(shape, dtype) for name, shape, dtype in self.shapes} | latents
        return self.traced(self.program, x.astype(self.systems.dtype), given, jax.random.key(0))

    def measure_states(self, z: Array, latents: Latents) -> Measured:
        """The same at states and latents of systems."""
        return self.measure(self.systems.to_site(self.in_data_units(z)), self.join(latents))

    def shown(self, z: Array, latents: Latents) -> list[Array]:
        """What exact observations show of x."""
        found = self.measure_states(z, latents).sites
        parts = [site.split(found[site.name], self.systems.number).exact for site in self.observed]
        return [part.shown for part in parts if part is not None]

    def is_along_line(self, site: Site) -> bool:
        """Whether a site's numbers are averaged one by one, each along the line that it depends on."""
        number = 0
        for other in self.observed:
            is_chosen = other.kind.is_single and number + other.size <= MOST_LINES
            number += other.size if is_chosen else 0
            if other.name == site.name:
                return is_chosen
        return False

    @property
    def has_elements(self) -> bool:
        """Whether all that is observed is told number by number."""
        shapes = self.traced.shapes.sites
        return all(site.kind.elements(shapes[site.name]) is not None for site in self.observed)

    def origin(self) -> Array:
        """x at the model's origin, in data units and the shape of its site."""
        systems = self.systems
        return systems.to_site(self.in_data_units(jnp.zeros((systems.number, *systems.state_shape), systems.dtype)))

    def draw(self, rng_key: Array) -> Latents:
        """The latents from their prior."""
        return {} if self.draws is None else self.split(self.draws(self.program, rng_key))

    def redraw_discrete(self, rng_key: Array, latents: Latents) -> Latents:
        """The latents, with the discrete ones from their prior given the others."""
        if self.redraws is None:
            return latents
        joined = self.join(latents)
        kept = {site.name: joined[site.name] for site in self.latents if not site.is_discrete}
        return self.split(joined | self.redraws(self.program, kept, rng_key))

    def log_priors(self, found: Measured) -> dict[str, Array]:
        """Each latent's log density per system, shape ``(S,)``."""
        systems = self.systems.number
        return {
            site.name: site.layout.split(found.log_priors[site.name]).reshape(systems, -1).sum(-1)
            for site in self.latents
        }

    def read(self, z: Array, latents: Latents) -> Reading:
        """The densities at states and latents of systems."""
        found = self.measure_states(z, latents)
        systems, dtype = self.systems.number, jnp.result_type(float)  # states may be integers
        zero, empty = jnp.zeros(systems, dtype), jnp.zeros((systems, 0), dtype)
        log_prior = sum(self.log_priors(found).values(), start=zero)
        log_r, log_other, correction = zero, zero, zero
        residuals, noises, discrepancies = [empty], [empty], [empty]
        elements: list[Array | None] = [empty]
        means, densities = [empty], [empty]
        for site in self.observed:
            part, kind = site.split(found.sites[site.name], systems), site.kind
            if kind.is_exact and self.sets_known:
                continue
            log_prob = part.log_prob.sum(-1)
            log_r += log_prob
            if kind.is_constant:
                correction += log_prob
            if self.is_along_line(site) and part.elements is not None:
                means.append(jnp.zeros_like(part.elements) if part.normal is None else -part.normal.residual)
                densities.append(part.elements)
            elif kind.is_averaged:
                log_other += log_prob
            elif kind.is_normal_form and part.normal is not None:
                residuals.append(part.normal.residual)
                noises.append(part.normal.noise)
                discrepancies.append(part.normal.discrepancy)
                correction += part.normal.correction.sum(-1)
            elements.append(kind.elements(part))
        known = [part for part in elements if part is not None]
        known = known if len(known) == len(elements) else [empty]
        reading = Reading(
            log_r,
            log_other,
            log_prior,
            jnp.concatenate(residuals, -1),
            jnp.concatenate(noises, -1),
            correction,
            jnp.concatenate(discrepancies, -1),
            jnp.concatenate(known, -1),
            Numbers(jnp.concatenate(means, -1), jnp.concatenate(densities, -1)),
        )
        return jax.tree.map(lambda a: a.astype(dtype), reading)
