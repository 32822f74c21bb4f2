r"""What a NumPyro model says about x below its line ``x = numpyro.sample("x", prior)``: the paper's r(x).

:func:`read_model` runs the model once, traces it once more with x and the other latents put in, and evaluates what was
traced from there on. Arrays of particles have shape ``(P, C, S, …)``: P particles, C chains, and S independent systems
(the elements of a plate that holds all there is).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.frozen import Frozen
from pp_diffusion.posterior import refusals
from pp_diffusion.posterior.dependencies import Dependencies, are_independent, curved_sites, dependencies, owners
from pp_diffusion.posterior.exact import Exact, known_places, known_values
from pp_diffusion.posterior.messages import Message, base_of, is_fixed, lies_in, value_shape
from pp_diffusion.posterior.program import (
    SEED,
    Latents,
    Program,
    Traced,
    trace_model,
    trace_with_arrays,
    unconstrained,
)
from pp_diffusion.posterior.reader import LatentSite, Reader, Reading, measure
from pp_diffusion.posterior.sites import Constant, Curved, Kind, Site, kind_of
from pp_diffusion.posterior.systems import systems_of
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.states import StateSpace


class Factors(Frozen):
    """The likelihood factors of a model with one :class:`~pp_diffusion.DiffusionPrior` site, and its other latents.

    Made by :func:`read_model`. A pytree: the prior's arrays and the model's array arguments are leaves, so that a new
    y needs no new compilation.

    :param name: the prior's site.
    :param prior: the prior found there.
    :param reader: the model as traced.
    :param dropped: latent sites that no observation depends on, left to ``Predictive``.
    :param known: per site that is an exact observation, which coordinates it shows, shape ``(S, k)``.
    :param owner: which entry of x each observed number depends on, shape ``(S, k)``, and the number of entries where it
        depends on none; ``None`` where one depends on two, or where the state space need not know.
    """

    data_fields = ("prior", "reader", "known", "owner")

    name: str
    prior: DiffusionPrior
    reader: Reader
    dropped: tuple[str, ...]
    known: dict[str, Array]
    owner: Array | None

    def __init__(
        self,
        name: str,
        prior: DiffusionPrior,
        reader: Reader,
        dropped: tuple[str, ...],
        known: dict[str, Array],
        owner: Array | None,
    ) -> None:
        self._set(name=name, prior=prior, reader=reader, dropped=dropped, known=known, owner=owner)

    def __reduce__(self) -> Any:
        return read_model, self.reader.program.call  # what is traced cannot be pickled

    def with_first(self, argument: Any) -> Factors:
        """Those of another first argument of the model; see :meth:`Program.with_first`."""
        return self.replace(reader=self.reader.replace(program=self.reader.program.with_first(argument)))

    # --- what is fixed ---

    @property
    def model(self) -> Callable[..., Any]:
        """The user's model."""
        return self.reader.program.model

    @property
    def space(self) -> StateSpace:
        """The state space of the prior's kernel."""
        return self.prior.kernel.state_space

    @property
    def systems(self) -> tuple[int, ...]:
        """The shape of the plates whose elements are independent systems; ``()`` is one system."""
        return self.reader.systems.shape

    @property
    def num_systems(self) -> int:
        """S."""
        return self.reader.systems.number

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one system's x."""
        return self.reader.systems.state_shape

    @property
    def latents(self) -> tuple[LatentSite, ...]:
        """The other latent sites."""
        return self.reader.latents

    @property
    def observed(self) -> tuple[Site, ...]:
        """The sites that make up r."""
        return self.reader.observed

    @property
    def num_known(self) -> int:
        """How many numbers of a system are observed exactly."""
        return sum(site.size for site in self.observed if site.kind.is_exact)

    @property
    def num_rows(self) -> int:
        """How many numbers of a system are observed exactly, or as normal ones, which those along lines become."""
        sites = [site for site in self.observed if site.kind.is_normal_form and not self.reader.is_along_line(site)]
        return self.num_known + self.num_numbers + sum(site.size for site in sites)

    @property
    def num_numbers(self) -> int:
        """How many numbers of a system have densities that are averaged along lines."""
        return sum(site.size for site in self.observed if self.reader.is_along_line(site))

    @property
    def has_other(self) -> bool:
        """Whether there are sites without a form of their own."""
        return any(site.kind.is_averaged and not self.reader.is_along_line(site) for site in self.observed)

    @property
    def is_exact(self) -> bool:
        """Whether numbers of x are observed without noise."""
        return any(site.kind.is_exact for site in self.observed)

    # --- what is computed ---

    @property
    def process(self) -> ReverseProcess:
        """The reverse process; its context has the systems' shape ``(S, …)``."""
        prior, systems = self.prior, self.reader.systems
        ndim, shape = systems.layout.batch_ndim, systems.site_shape

        def per_system(context: Array) -> Array:
            rest = jnp.shape(context)[prior.process.context_batch_ndim :]
            return systems.layout.split(jnp.broadcast_to(context, shape[:ndim] + rest))

        return prior.process.with_context(jax.tree.map(per_system, prior.context), ndim - len(systems.shape) + 1)

    def read(self, z: Array, latents: Latents) -> Reading:
        """The model's densities at states of the model's space, shape ``(P, C, S, *state_shape)``."""
        return jax.vmap(jax.vmap(self.reader.read))(z, latents)

    def exact(self) -> Exact:
        """What is observed of x without noise."""
        return known_values(self.reader, self.known)

    def observed_values(self) -> dict[str, Array]:
        """The observed sites' values, factors apart."""
        found = _observations(self.reader)
        return {site.name: found[site.name] for site in self.observed if site.kind.has_values}

    def in_data_units(self, z: Array) -> Array:
        """States of the model's space in data units."""
        return self.reader.in_data_units(z)

    def to_site(self, x: Array) -> Array:
        """Systems ``(S, …)`` of one particle as the value of the prior's site."""
        return self.reader.systems.to_site(x)


def read_model(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Factors:
    """Reads a model's prior site, its other latents and its observations, and refuses what SMC cannot do exactly.

    :param model: a NumPyro model with one site ``numpyro.sample(name, prior)``.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :raises ValueError: naming the site: no prior site or two; one that is observed, masked, scaled or under
        ``obs_mask``; a subsampled plate; a latent that enters the prior's context, or depends on x; an exact
        observation that is not a selection of coordinates.
    :raises NotImplementedError: if the prior's kernel has no state space to draw particles in.
    """
    if not callable(model):
        raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
    sites = _sites_of(trace_model(model, args, kwargs).sites)
    space = sites.prior.kernel.state_space
    program, measured = trace_with_arrays(model, args, kwargs, partial(_trace_measure, sites))
    depends = _dependencies(program, measured, sites, space)
    data = {n: m for n, m in sites.observed.items() if n in depends.data}
    refusals.check_observed(data)
    # exact observations of x have its support besides
    refusals.check_missing({n: m for n, m in data.items() if not (space.sets_known and sites.kinds[n].is_exact)})
    kept = {n: m for n, m in sites.latents.items() if n not in depends.dropped}
    refusals.check_latents(kept, sites.messages)
    draws = Traced(partial(_draw, tuple(kept)), program, jax.random.key(0)) if kept else None
    redraws = _trace_redraws(program, kept)
    if draws is not None:
        refusals.check_draws(draws.sources(frozenset(), frozenset({SEED})))
    refusals.check_randomness([sites.name, *kept, *_telling(sites, depends)], depends.of)

    make = partial(_reader, program, measured, draws, redraws, sites, depends, kept, space)
    reader = make(_shared_plates(sites, kept, _telling(sites, depends)))
    if reader.systems.number > 1 and not are_independent(reader, space, sites.messages):
        reader = make([])
    known: dict[str, Array] = {}
    if space.sets_known:
        refusals.check_exact(reader.observed, depends.of, sites.name)
        known = known_places(reader, sites.prior, sites.name)
        curved = curved_sites(reader, space, sites.messages)
        observed = tuple(s._replace(kind=Curved()) if s.name in curved else s for s in reader.observed)
        reader = reader.replace(observed=observed)
    return Factors(sites.name, sites.prior, reader, depends.dropped, known, owners(reader, space))


class _Sites(NamedTuple):
    """A model's sites, as one run of it has them.

    :ivar name: of the prior's.
    :ivar prior: the prior.
    :ivar x: its site.
    :ivar latents: the others that are random and not observed.
    :ivar observed: the observed ones.
    :ivar kinds: of these.
    :ivar messages: all of them.
    """

    name: str
    prior: DiffusionPrior
    x: Message
    latents: dict[str, Message]
    observed: dict[str, Message]
    kinds: dict[str, Kind]
    messages: dict[str, Message]

    @property
    def values(self) -> Latents:
        """The latents' values, unconstrained."""
        return {n: unconstrained(m) for n, m in self.latents.items()}


def _sites_of(messages: dict[str, Message]) -> _Sites:
    x = refusals.prior_site(messages)
    name = x["name"]
    found = {n: m for n, m in messages.items() if m["type"] == "sample" and n != name}
    refusals.check_fixed(found)
    latents = {n: m for n, m in found.items() if not (m["is_observed"] or is_fixed(m))}
    observed = {n: m for n, m in found.items() if m["is_observed"]}
    kinds = {n: kind_of(m) for n, m in observed.items()}
    return _Sites(name, base_of(x), x, latents, observed, kinds, messages)


def _trace_measure(sites: _Sites, program: Program) -> Traced:
    function = partial(measure, name=sites.name, kinds=sites.kinds)
    return Traced(function, program, sites.x["value"], sites.values, jax.random.key(0))


def _draw(names: tuple[str, ...], program: Program, rng_key: Array) -> Latents:
    """These latents from their prior."""
    found = program.trace(None, {}, rng_key).sites
    return {n: unconstrained(found[n]) for n in names}


def _trace_redraws(program: Program, kept: Mapping[str, Message]) -> Traced | None:
    """The discrete latents from their prior, given the others; ``None`` without any."""
    discrete = tuple(n for n, m in kept.items() if m["fn"].support.is_discrete)
    given = {n: unconstrained(m) for n, m in kept.items() if n not in discrete}

    def redraw(program: Program, given: Latents, rng_key: Array) -> Latents:
        found = program.trace(None, given, rng_key).sites
        return {n: found[n]["value"] for n in discrete}

    return Traced(redraw, program, given, jax.random.key(0)) if discrete else None


def _dependencies(program: Program, measured: Traced, sites: _Sites, space: StateSpace) -> Dependencies:
    def away() -> Array:
        shape, transform = sites.x["fn"].shape(), sites.prior.transform
        z = space.pair(jax.random.key(0), shape[: len(shape) - sites.prior.event_dim], 0.5)[0]
        return z if transform is None else transform(z)

    exact = [n for n, kind in sites.kinds.items() if kind.is_exact]
    depends = dependencies(program, measured, sites.name, sites.values, away, exact)
    refusals.check_dependencies(sites.name, _telling(sites, depends), depends.of, depends.dropped)
    return depends


def _telling(sites: _Sites, depends: Dependencies) -> dict[str, Message]:
    """The observed sites that depend on something."""
    return {n: m for n, m in sites.observed.items() if depends.of[n]}


def _shared_plates(sites: _Sites, kept: Mapping[str, Message], telling: Mapping[str, Message]) -> list[Any]:
    """The plates of x that hold all other sites, too, as the axes of x."""
    plates = sorted(sites.x["cond_indep_stack"], key=lambda frame: frame.dim)
    return [frame for frame in plates if all(lies_in(m, frame) for m in (*kept.values(), *telling.values()))]


def _reader(
    program: Program,
    measured: Traced,
    draws: Traced | None,
    redraws: Traced | None,
    sites: _Sites,
    depends: Dependencies,
    kept: Mapping[str, Message],
    space: StateSpace,
    plates: list[Any],
) -> Reader:
    """The reader of a model whose systems are the elements of these plates."""
    systems = systems_of(sites.x, plates)
    # what depends on nothing is part of the evidence still, if it can be told whose
    observed = {n: m for n, m in sites.observed.items() if depends.of[n] or all(lies_in(m, f) for f in plates)}

    def site(name: str, message: Message) -> Site:
        kind = sites.kinds[name] if depends.of[name] else Constant(sites.kinds[name])
        size = math.prod(value_shape(message)) // systems.number
        return Site(name, kind, systems.of_site(message, plates), size)

    def latent(name: str, message: Message) -> LatentSite:
        return LatentSite(name, systems.of_site(message, plates), bool(message["fn"].support.is_discrete))

    return Reader(
        program,
        measured,
        draws,
        redraws,
        systems=systems,
        latents=tuple(latent(n, m) for n, m in kept.items()),
        observed=tuple(site(n, m) for n, m in observed.items()),
        transform=sites.prior.transform,
        sets_known=space.sets_known,
        deterministic=depends.deterministic,
        shapes=tuple((n, u.shape, u.dtype) for n, u in sites.values.items()),
    )


@jax.jit
def _observations(reader: Reader) -> dict[str, Array]:
    return reader.measure(reader.origin(), {}).observations
