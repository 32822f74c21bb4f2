r"""What a NumPyro model says about x below its line ``x = numpyro.sample("x", prior)``: the paper's r(x).

The model is read by handlers: x and the other latent sites are put in, the densities of the observed sites come out,
whole or in the parts that a twist can use. Arrays of particles have shape ``(P, S, …)``: P particles of each of S
independent systems (chains, and within each the elements of a plate that holds all there is).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.ops.provenance import track_deps_jaxpr
from numpyro.primitives import Messenger

from pp_diffusion.frozen import Frozen, is_key
from pp_diffusion.matrices import einsum, half_log_det, solve_lower
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.reverse import ReverseProcess

#: What a twist can make of an observed site.
NORMAL, MULTIVARIATE, EXACT, MOMENTS = "normal", "multivariate normal", "exact", "moments"
OTHER, FACTOR, CONSTANT = "other", "factor", "constant"
NUM_WORDS = 32  # at which it is found out which bits an observed number depends on
NUM_STATES = 5  # at which it is found out whether systems depend on each other
SEED = "the seed"  # among the names of sites
Latents = dict[str, Array]


class Layout(NamedTuple):
    """Where the independent systems lie in a site's value, and back.

    :ivar axes: the systems' axes, counted from the right of the batch shape (negative).
    :ivar batch_ndim: of the site.
    """

    axes: tuple[int, ...]
    batch_ndim: int

    def split(self, value: Array) -> Array:
        """``(*batch, *rest)`` to ``(S, *other batch axes, *rest)``."""
        value = jnp.moveaxis(value, [self.batch_ndim + axis for axis in self.axes], range(len(self.axes)))
        return value.reshape(-1, *value.shape[len(self.axes) :])

    def join(self, value: Array, sizes: tuple[int, ...]) -> Array:
        """The inverse of :meth:`split`, for systems in an array of shape ``sizes``."""
        value = value.reshape(*sizes, *value.shape[1:])
        return jnp.moveaxis(value, range(len(self.axes)), [self.batch_ndim + axis for axis in self.axes])


class Site(NamedTuple):
    """A site of the model: what is fixed of it."""

    name: str
    kind: str
    layout: Layout


class Reading(NamedTuple):
    r"""A model's densities at given x and latents; arrays of shape ``(P, S, …)``, nats.

    The observations that are normal, or can be taken for it, are :math:`y = h(x) + \text{noise}`, k numbers in all.

    :ivar log_r: log r(x), the log density of everything observed (exact observations apart).
    :ivar log_other: the part of it without a normal form.
    :ivar log_prior: the other latents' log density, in unconstrained space.
    :ivar residual: y − h(x), shape ``(…, k)``; zero where masked.
    :ivar noise: the noise's variances, of the same shape: correlated observations are whitened.
    :ivar correction: log r less the normal density of the residuals, where they are normal (masks, scales), and what
        depends on nothing.
    :ivar discrepancy: the same per residual, where a density was taken for a normal one.
    :ivar elements: log r per number observed, where all sites' densities come so.
    """

    log_r: Array
    log_other: Array
    log_prior: Array
    residual: Array
    noise: Array
    correction: Array
    discrepancy: Array
    elements: Array


class Exact(NamedTuple):
    """Coordinates of x that are observed without noise, in the model's space.

    :ivar where: the coordinates, in a system's flattened x; shape ``(S, n)``.
    :ivar value: theirs.
    :ivar counts: False where masked.
    :ivar log_det: log |dx/dz| summed over them; shape ``(S,)``.
    """

    where: Array
    value: Array
    counts: Array
    log_det: Array


class _NormalPart(NamedTuple):
    residual: Array
    noise: Array
    correction: Array
    discrepancy: Array


class Factors(Frozen):
    """The likelihood factors of a model with one :class:`DiffusionPrior` site, and its other latents.

    Made by :func:`read_model`. A pytree: the prior's arrays and the model's array arguments are leaves, so that a new
    y needs no new compilation.

    :ivar name: the prior's site.
    :ivar prior: the prior found there.
    :ivar latents: the other latent sites.
    :ivar observed: the sites that make up r.
    :ivar systems: the shape of the plates whose elements are independent systems; ``()`` is one system.
    :ivar dropped: latent sites that no observation depends on, left to ``Predictive``.
    """

    data_fields = ("prior", "arrays", "known", "owner")

    prior: DiffusionPrior
    latents: tuple[Site, ...]
    observed: tuple[Site, ...]
    systems: tuple[int, ...]
    arrays: tuple[Any, ...]
    _layout: Layout
    _model: Callable
    _structure: Any
    _static: tuple[Any, ...]
    _fingerprint: str
    state_shape: tuple[int, ...]
    name: str
    dropped: tuple[str, ...]
    is_discrete: bool
    owner: Array | None
    known: dict[str, Array]

    @property
    def num_systems(self) -> int:
        return math.prod(self.systems)

    @property
    def num_rows(self) -> int:
        """How many numbers of a system are observed exactly, or as normal ones."""
        return self.count_rows((NORMAL, MULTIVARIATE, MOMENTS, EXACT))

    def count_rows(self, kinds: tuple[str, ...]) -> int:
        """How many numbers of a system are observed at sites of these kinds."""
        trace, _ = self.trace(self._zeros(), {})
        sizes = [_value(trace[site.name]).size for site in self.observed if site.kind in kinds]
        return sum(sizes) // self.num_systems

    @property
    def is_exact(self) -> bool:
        """Whether coordinates of x are observed without noise."""
        return any(site.kind == EXACT for site in self.observed)

    @property
    def model(self) -> Callable:
        """The user's model."""
        return self._model

    def observed_values(self) -> dict[str, Array]:
        """The observed sites' values, factors apart."""
        trace, _ = self.trace(self._zeros(), {})
        return {site.name: trace[site.name]["value"] for site in self.observed if site.kind != FACTOR}

    def replace(self, **changes: Any) -> Factors:
        """With some attributes changed."""
        new = object.__new__(Factors)
        new._set(**{**self.__dict__, **changes})
        return new

    def in_data_units(self, z: Array) -> Array:
        """States of the model's space in data units."""
        transform = self.prior.transform
        with _full_precision():
            return z if transform is None else transform(z)

    def to_site(self, x: Array) -> Array:
        """Systems ``(S, …)`` of one particle as the value of the prior's site."""
        return self._layout.join(x, self.systems)

    def trace(self, x: Array, latents: Latents, *, rng_key: Any = 0, constrained: bool = False) -> tuple[dict, _Fill]:
        """The model's trace with x (the site's shape, data units) and latents put in; others are drawn."""
        leaves, arrays = [], iter(self.arrays)
        for leaf in self._static:
            leaves.append(next(arrays) if leaf is None else leaf.value)
        args, kwargs = jax.tree.unflatten(self._structure, leaves)
        fill = _Fill(self._model, x, latents, constrained)
        with _full_precision():
            return handlers.trace(handlers.seed(fill, rng_key)).get_trace(*args, **kwargs), fill

    def process(self, num_chains: int) -> ReverseProcess:
        """The reverse process of states ``(P, S, *state_shape)``."""
        prior = self.prior
        ndim, shape = self._layout.batch_ndim, self.to_site(jnp.zeros((self.num_systems, *self.state_shape))).shape

        def per_system(context: Array) -> Array:
            rest = jnp.shape(context)[prior.process.context_batch_ndim :]
            context = self._layout.split(jnp.broadcast_to(context, shape[:ndim] + rest))
            return jnp.tile(context, (num_chains,) + (1,) * (context.ndim - 1))

        return prior.process.with_context(jax.tree.map(per_system, prior.process.context), ndim - len(self.systems) + 1)

    def draw_latents(self, rng_key: Array, shape: tuple[int, int]) -> Latents:
        """The other latents from their prior, in unconstrained space, shape ``(P, S, …)`` for ``shape = (P, C)``."""
        x = self._zeros()

        def draw(key: Array) -> Latents:
            trace, _ = self.trace(x, {}, rng_key=key)
            values = {}
            for site in self.latents:
                message = trace[site.name]
                value = _unconstrain(message["fn"], message["value"])
                values[site.name] = site.layout.split(value)
            return values

        draws = jax.vmap(jax.vmap(draw))(jax.random.split(rng_key, shape))
        return jax.tree.map(_merge_chains, draws)

    def draw_evenly(self, rng_key: Array, shape: tuple[int, int]) -> Latents:
        """Discrete latents of finite support, each value as probable as another; shapes as of :meth:`draw_latents`."""
        trace, _ = self.trace(self._zeros(), {})
        values = {}
        for i, site in enumerate(self.latents):
            fn = trace[site.name]["fn"]
            if fn.support.is_discrete and fn.has_enumerate_support:
                support = fn.enumerate_support(expand=False)
                support = support.reshape(len(support), *fn.event_shape)
                which = jax.random.randint(jax.random.fold_in(rng_key, i), (*shape, *fn.batch_shape), 0, len(support))
                values[site.name] = _merge_chains(jax.vmap(jax.vmap(site.layout.split))(support[which]))
        return values

    def redraw_discrete(self, rng_key: Array, latents: Latents) -> tuple[Latents, Array]:
        """The discrete latents drawn anew from their prior, and the log ratio of the proposal's probabilities, back
        over there."""
        systems = self.num_systems

        def redraw(key: Array, u: Latents) -> tuple[Latents, Array]:
            joined, x = self._join(u), self._zeros()
            old, _ = self.trace(x, joined)
            discrete = [site for site in self.latents if old[site.name]["fn"].support.is_discrete]
            kept = {n: v for n, v in joined.items() if n not in {site.name for site in discrete}}
            new, _ = self.trace(x, kept, rng_key=key)
            ratio = jnp.zeros(systems)
            for site in discrete:
                for trace, sign in ((old, 1), (new, -1)):
                    log_prob = _scaled(trace[site.name], _log_prob(trace[site.name]))
                    ratio += sign * site.layout.split(log_prob).reshape(systems, -1).sum(-1)
            return u | {site.name: site.layout.split(new[site.name]["value"]) for site in discrete}, ratio

        count = next(iter(latents.values())).shape
        keys = jax.random.split(rng_key, (count[0], count[1] // systems))
        latents, ratio = jax.vmap(jax.vmap(redraw))(keys, self._by_chain(latents))
        return jax.tree.map(_merge_chains, (latents, ratio))

    def constrain(self, z: Array, latents: Latents) -> Latents:
        """All latents as the user knows them, each of the site's shape with ``(P, C)`` in front; x among them."""

        def values(z: Array, u: Latents) -> Latents:
            x = self.to_site(self.in_data_units(z))
            trace, _ = self.trace(x, self._join(u))
            return {self.name: x} | {site.name: trace[site.name]["value"] for site in self.latents}

        return jax.vmap(jax.vmap(values))(*self._by_chain((z, latents)))

    def read(self, z: Array, latents: Latents) -> Reading:
        """The model's densities at states of the model's space, shape ``(P, S, *state_shape)``."""
        reading = jax.vmap(jax.vmap(self._read_one))(*self._by_chain((z, latents)))
        return jax.tree.map(_merge_chains, reading)

    def _by_chain(self, arrays: Any) -> Any:
        def split(a: Array) -> Array:
            return a.reshape(a.shape[0], -1, self.num_systems, *a.shape[2:])

        return jax.tree.map(split, arrays)

    def _join(self, latents: Latents) -> Latents:
        return {site.name: site.layout.join(latents[site.name], self.systems) for site in self.latents}

    def _zeros(self) -> Array:
        shape = (self.num_systems, *self.state_shape)
        return self.to_site(self.in_data_units(jnp.zeros(shape)))

    def _read_one(self, z: Array, latents: Latents) -> Reading:
        trace, fill = self.trace(self.to_site(self.in_data_units(z)), self._join(latents))
        systems, dtype = self.num_systems, z.dtype
        zero = jnp.zeros(systems, dtype)

        def total(site: Site, log_prob: Array) -> Array:
            return site.layout.split(log_prob).reshape(systems, -1).sum(-1)

        log_prior = zero
        for site in self.latents:
            fn = trace[site.name]["fn"]
            fn = fn.base_dist if isinstance(fn, dist.MaskedDistribution) else fn  # proper where it goes nowhere, too
            log_prob = jnp.broadcast_to(fn.log_prob(trace[site.name]["value"]), fn.batch_shape)
            log_prior += total(site, log_prob + fill.log_det.get(site.name, 0.0))
        log_r, log_other, correction = zero, zero, zero
        residuals, noises, discrepancies, elements = [], [], [], []
        for site in self.observed:
            message = trace[site.name]
            if site.kind == EXACT and not self.is_discrete:
                continue
            if site.kind in (NORMAL, MULTIVARIATE, MOMENTS):
                part = _normal_part(site, message, systems)
                residuals.append(part.residual)
                noises.append(part.noise)
                correction += part.correction
                discrepancies.append(part.discrepancy)
            if site.kind == MULTIVARIATE:  # not by NumPyro's own, whose LAPACK calls would be in a compiled loop
                as_normal = part.residual**2 / part.noise + jnp.log(2 * math.pi * part.noise)
                log_prob = part.correction - 0.5 * as_normal.sum(-1)
            else:
                log_prob = total(site, _scaled(message, _log_prob(message)))
            log_r += log_prob
            log_other += log_prob if site.kind in (OTHER, FACTOR) else 0.0
            correction += log_prob if site.kind == CONSTANT else 0.0
            if self.owner is not None:
                elements.append(site.layout.split(_log_prob_elements(message)).reshape(systems, -1))
        empty = jnp.zeros((systems, 0), dtype)
        return Reading(
            log_r.astype(dtype),
            log_other.astype(dtype),
            log_prior.astype(dtype),
            jnp.concatenate([empty, *residuals], -1).astype(dtype),
            jnp.concatenate([empty, *noises], -1).astype(dtype),
            correction.astype(dtype),
            jnp.concatenate([empty, *discrepancies], -1).astype(dtype),
            jnp.concatenate([empty, *elements], -1),
        )

    def _shown(self, z: Array, latents: Latents) -> list[Array]:
        """What exact observations show of the systems of one chain."""
        trace, _ = self.trace(self.to_site(self.in_data_units(z)), self._join(latents))
        found = []
        for site in self.observed:
            if site.kind == EXACT:
                value = _unwrap(trace[site.name]["fn"]).base.v
                found.append(site.layout.split(jnp.broadcast_to(value, _value(trace[site.name]).shape)))
        return found

    def exact(self) -> Exact:
        """What is observed of a continuous x without noise, for the systems of one chain."""
        systems, size = self.num_systems, math.prod(self.state_shape)
        trace, _ = self.trace(self._zeros(), {})
        indices, values, weights = [jnp.zeros((systems, 0), int)], [jnp.zeros((systems, 0))], [jnp.zeros((systems, 0))]
        for site in self.observed:
            if site.kind == EXACT:
                message = trace[site.name]
                indices.append(self.known[site.name])
                value = _value(message).astype(float)
                for found, a in ((values, value), (weights, _entry_weights(message))):
                    found.append(site.layout.split(a).reshape(systems, -1))
        where, y, weight = (jnp.concatenate(part, -1) for part in (indices, values, weights))
        counts = weight > 0
        x = self._layout.split(self._zeros()).reshape(systems, size)
        target = jnp.where(counts, where, size)  # what does not count is written nowhere
        x = jax.vmap(lambda row, i, v: row.at[i].set(v, mode="drop"))(x, target, y)
        transform = self.prior.transform
        if transform is None or not self.is_exact:  # a transform may join the coordinates, where none is known
            return Exact(where, jnp.take_along_axis(x, where, -1), counts, jnp.zeros(systems))
        x = x.reshape(systems, *self.state_shape)
        z = transform.inv(x)
        log_det = transform.log_abs_det_jacobian(z, x).reshape(systems, size)
        log_det = jnp.where(counts, jnp.take_along_axis(log_det, where, -1), 0.0).sum(-1)
        return Exact(where, jnp.take_along_axis(z.reshape(systems, size), where, -1), counts, log_det)


def read_model(model: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Factors:
    """Reads a model's prior site, its other latents and its observations, and refuses what SMC cannot do exactly.

    :param model: a NumPyro model with one site ``numpyro.sample(name, prior)``.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :raises ValueError: naming the site: no prior site or two; one that is observed, masked, scaled or under
        ``obs_mask``; a subsampled plate; a latent that enters the prior's context, or depends on x; an exact
        observation that is not a selection of coordinates.
    """
    if not callable(model):
        raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
    return _describe(_draft(model, args, dict(kwargs)))


def _draft(model: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Factors:
    """The model with its arguments: arrays and floats as what compiled programs are given, if the model lets them."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    kinds = (jax.Array, np.ndarray, float, np.floating)
    arrays = {i: getattr(leaf, "dtype", float) for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)}

    def attempt(known: set[int]) -> Factors:
        static, given = _partition(leaves, set(arrays) - known)
        draft = object.__new__(Factors)
        draft._set(_model=model, _structure=structure, _static=static, arrays=given)
        jax.eval_shape(lambda a: [draft.replace(arrays=a).trace(None, {}), None][1], given)
        return draft

    # the model may need an array's values, for a shape, a condition or an index; or be in error
    whole = {i for i, dtype in arrays.items() if getattr(dtype, "kind", "") in tuple("biu")}
    for known in (set(), whole, set(arrays)):
        try:
            draft = attempt(known)
        except Exception:
            if known == set(arrays):
                raise
        else:
            break
    for argument in _of_arguments(args, kwargs) if known else []:  # of which of them?
        try:
            draft = attempt(known - argument)
        except Exception:
            continue
        known = known - argument
    return draft


def _of_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[set[int]]:
    """For each argument, the numbers of its leaves."""
    numbers = iter(range(len(jax.tree.leaves((args, kwargs)))))
    in_order = [*args, *(kwargs[name] for name in sorted(kwargs))]  # as they are flattened
    return [{next(numbers) for _ in jax.tree.leaves(argument)} for argument in in_order]


def _describe(draft: Factors) -> Factors:
    trace, _ = draft.trace(None, {})
    message = _prior_site(trace)
    base = _unwrap(message["fn"]).base
    name, kernel = message["name"], base.kernel
    found = {n: m for n, m in trace.items() if m["type"] == "sample" and n != name}
    latents = {n: m for n, m in found.items() if not (m["is_observed"] or _is_fixed(m))}
    for site, m in found.items():
        if not m["is_observed"] and _is_fixed(m) and np.any(_unwrap(m["fn"]).base.log_density):
            raise ValueError(f"site {site!r}: a Delta must be one without log_density; write it as numpyro.factor")
    depends, fingerprint = _dependencies(draft, trace, name, latents)
    draft = draft.replace(_fingerprint=fingerprint)
    if latent := depends[name] - {SEED}:
        raise ValueError(
            f"site {name!r}: its prior depends on the latent site {_names(latent)} (through context, say), and "
            "the path's density with it; use NUTS with pp_diffusion.TrajectoryReparam, which handles that"
        )
    dropped = tuple(n for n in latents if name in depends[n])
    observed = {n: m for n, m in found.items() if m["is_observed"] and depends[n]}
    for site in observed:
        if wrong := depends[site] & set(dropped):
            raise ValueError(
                f"latent site {_names(wrong)} depends on {name!r}, and the observed site {site!r} on it: write it "
                "non-centred, so that its own distribution does not depend on x (numpyro.infer.reparam.LocScaleReparam"
                "(0), say), or sum it out"
            )
    if not any(name in depends[n] for n in observed):
        raise ValueError(f"model must have an observed site (or a factor) that depends on the prior's site {name!r}")
    kept = {n: m for n, m in latents.items() if n not in dropped}
    for site, m in kept.items():
        is_imputed = f"{site.removesuffix('_unobserved')}_observed" in found  # by NumPyro, for obs_mask
        if m["scale"] is not None or (_unwrap(m["fn"]).mask is not None and not is_imputed):
            raise ValueError(
                f"latent site {site!r} is {'masked' if m['scale'] is None else 'scaled'}; SMC draws it from its prior, "
                "which is then none: write a density of its own for it, and what else is meant as numpyro.factor"
            )
    again = draft.trace(None, {}, rng_key=1)[0] if kept else {}
    for site, m in kept.items():
        if not m["fn"].support.is_discrete and np.array_equal(m["value"], again[site]["value"]):
            raise ValueError(
                f"latent site {site!r} is drawn the same whatever the seed: give the model without handlers.seed, and "
                "fix latents by handlers.condition, not by substitute"
            )
    for site in (name, *kept, *observed):
        if SEED in depends[site]:
            raise ValueError(
                f"the density at site {site!r} is random: it depends on random numbers that are no sample site of the "
                "model, such as those of numpyro.prng_key, of a network that was not trained (handlers.substitute puts "
                "parameters in), or of a latent site within numpyro's scan or cond"
            )
    plates = sorted(message["cond_indep_stack"], key=lambda frame: frame.dim)  # as the axes of x
    shared = [frame for frame in plates if all(_has(m, frame) for m in (*kept.values(), *observed.values()))]
    constants = {n: m for n, m in found.items() if m["is_observed"] and not depends[n]}
    for systems in (shared, []):
        draft = _with_layout(draft, message, systems)
        # what depends on nothing is part of the evidence still, if it can be told whose
        observed |= {n: m for n, m in constants.items() if all(_has(m, frame) for frame in systems)}
        sites = {n: _layout(m, systems) for n, m in {**kept, **observed}.items()}
        draft = draft.replace(
            name=name,
            prior=base,
            latents=tuple(Site(n, "latent", sites[n]) for n in kept),
            observed=tuple(Site(n, CONSTANT if n in constants else _kind(m), sites[n]) for n, m in observed.items()),
            dropped=dropped,
            known={},
            owner=None,
            is_discrete=kernel.is_discrete,
        )
        if not systems or draft.num_systems == 1 or _are_independent(draft):
            break
    if kernel.is_discrete:
        return draft.replace(owner=_owners(draft))
    known: dict[str, Array] = {}
    for site in draft.observed:
        if site.kind == EXACT:
            if latent := depends[site.name] - {name}:
                raise ValueError(
                    f"site {site.name!r}: an exact observation (Delta) must depend on {name!r} alone; it depends on "
                    f"the latent site {_names(latent)}"
                )
            known[site.name] = _selected(draft, site, trace)
    for row in np.concatenate([np.zeros((draft.num_systems, 0), int), *known.values()], -1):
        if len(set(row)) < len(row):
            raise ValueError(f"site {_names(known)} observes a coordinate of {name!r} twice")
    return draft.replace(known=known)


def _prior_site(trace: Mapping[str, Any]) -> Any:
    """The one site with a diffusion prior, as it must be."""
    for name, message in trace.items():
        if message["type"] == "plate" and message["value"].shape[0] != message["args"][0]:
            raise ValueError(f"plate {name!r} is subsampled: SMC needs the whole likelihood, without subsample_size")
    priors = [
        message
        for message in trace.values()
        if message["type"] == "sample" and isinstance(_unwrap(message["fn"]).base, DiffusionPrior)
    ]
    names = [message["name"] for message in priors]
    if not priors:
        raise ValueError("model must have a site numpyro.sample(name, prior) with a DiffusionPrior; it has none")
    for name in names:
        stem = name.removesuffix("_observed")
        if stem != name and f"{stem}_unobserved" in names:
            raise ValueError(
                f"site {stem!r}: obs_mask on a DiffusionPrior masks whole data, not coordinates. Observe coordinates "
                f"by a site below it: numpyro.sample('y', dist.Delta({stem}[known], event_dim=1), obs=y)"
            )
    if len(priors) > 1:
        raise ValueError(f"model must have one site with a DiffusionPrior; it has {len(priors)}: {_names(names)}")
    (message,) = priors
    name = message["name"]
    if message["is_observed"]:
        raise ValueError(f"site {name!r} with the DiffusionPrior is observed; there is nothing to infer about x")
    if _unwrap(message["fn"]).mask is not None:
        raise ValueError(f"site {name!r} with the DiffusionPrior is masked; a masked prior is no density")
    if message["scale"] is not None:
        raise ValueError(f"site {name!r} with the DiffusionPrior is scaled; SMC has no power of a path's density")
    return message


def _dependencies(
    draft: Factors, trace: Mapping[str, Any], name: str, latents: Mapping[str, Any]
) -> tuple[dict[str, frozenset[str]], str]:
    """Per sample site, which latents, whether x and whether the seed enters its density; the model's fingerprint."""

    def read(values: dict[str, Any], arrays: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        latents = {n: v for n, v in values.items() if n not in (name, SEED)}
        again, _ = draft.replace(arrays=arrays).trace(values[name], latents, constrained=True, rng_key=values[SEED])
        found = {n: m for n, m in again.items() if m["type"] == "sample"}
        exact = {n: m["value"] for n, m in found.items() if m["is_observed"] and _is_fixed(m)}
        densities = {n: [*jax.tree.leaves(m["fn"]), m["scale"]] for n, m in found.items() if n == name}
        return densities | {n: _scaled(m, _log_prob(m)) for n, m in found.items() if n != name}, exact

    values = {n: trace[n]["value"] for n in (name, *latents)} | {SEED: jax.random.PRNGKey(0)}
    with jax.ensure_compile_time_eval():
        program, shapes = jax.make_jaxpr(read, return_shape=True)(values, draft.arrays)
    sources = {n: jax.tree.map(lambda _, n=n: frozenset({n}), value) for n, value in values.items()}
    of_arrays = jax.tree.map(lambda _: frozenset(), draft.arrays)
    # not by NumPyro's eval_provenance, whose versions up to 0.21 fail under jax 0.11
    found = track_deps_jaxpr(program.jaxpr, jax.tree.leaves((sources, of_arrays)))
    found, exact = jax.tree.unflatten(jax.tree.structure(shapes), found)
    for site, of_value in exact.items():
        if name in of_value:
            raise ValueError(f"site {site!r}: the value of an exact observation (Delta) must not depend on {name!r}")
    depends = {n: frozenset().union(*jax.tree.leaves(f)) - {n} for n, f in found.items()}
    if any(SEED in d for d in depends.values()):  # a seed that numpyro's scan is given need not be used
        values[name] = _feasible(trace[name]["fn"], is_origin=False)
        first, second = (read(values | {SEED: jax.random.PRNGKey(seed)}, draft.arrays)[0] for seed in (0, 1))
        same = {n for n in depends if _all_equal(first[n], second[n])}
        depends = {n: d - {SEED} if n in same else d for n, d in depends.items()}
    return depends, _fingerprint(program)


def _fingerprint(program: Any) -> str:
    """Of a model as traced, with what it refers to: compiled programs of a model are not used after it has changed."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(program.jaxpr)).encode())
    for constant in _constants(program):
        value = np.asarray(jax.random.key_data(constant) if is_key(constant) else constant)
        digest.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
    return digest.hexdigest()


def _constants(program: Any) -> Iterator[Any]:
    """All that a traced program refers to, in the programs within it too."""
    if hasattr(program, "consts"):
        yield from program.consts
        program = program.jaxpr
    for equation in program.eqns:
        yield from (v.val for v in equation.invars if np.ndim(getattr(v, "val", 0)))
        for part in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield from _constants(part)


def _all_equal(first: Any, second: Any) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _kind(message: Any) -> str:
    base, _, _ = _unwrap(message["fn"])
    if isinstance(base, dist.Normal):
        return NORMAL
    if isinstance(base, dist.MultivariateNormal):
        return MULTIVARIATE
    if isinstance(base, dist.Delta):
        return EXACT
    if isinstance(base, dist.Unit):
        return FACTOR
    if base.event_dim:
        return OTHER
    try:
        usable = np.isfinite(base.mean).all() and np.isfinite(base.variance).all() and np.all(base.variance > 0)
    except NotImplementedError:
        usable = False
    return MOMENTS if usable else OTHER


def _is_fixed(message: Any) -> bool:
    """Whether there is nothing random about a site, given those before it."""
    return isinstance(_unwrap(message["fn"]).base, dist.Delta)


def _has(message: Any, frame: Any) -> bool:
    return any(f.name == frame.name for f in message["cond_indep_stack"])


def _layout(message: Any, frames: list[Any]) -> Layout:
    return Layout(tuple(frame.dim for frame in frames), len(message["fn"].batch_shape))


def _with_layout(draft: Factors, message: Any, frames: list[Any]) -> Factors:
    fn = message["fn"]
    event_ndim = _unwrap(fn).base.event_dim
    inner = fn.event_dim - event_ndim  # to_event's axes are part of one system's x
    layout = Layout(tuple(frame.dim - inner for frame in frames), len(fn.shape()) - event_ndim)
    systems = tuple(frame.size for frame in frames)
    state_shape = layout.split(np.zeros(fn.shape())).shape[1:]
    return draft.replace(_layout=layout, systems=systems, state_shape=state_shape)


def _are_independent(draft: Factors) -> bool:
    """Whether x and the latents of a system leave the others' densities alone, as the plate says they do.

    For each pair of systems there is a digit of their numbers by which one is changed and the other is not.
    """
    numbers = np.arange(draft.num_systems)
    changed = [numbers >> bit & 1 == value for bit in range(draft.num_systems.bit_length()) for value in (0, 1)]
    return all(
        bool(_same_elsewhere(draft, jax.random.key(i), jnp.asarray(which), jnp.asarray(i / (NUM_STATES - 1))))
        for i in range(NUM_STATES)
        for which in changed
        if which.any() and not which.all()
    )


@jax.jit
def _same_elsewhere(draft: Factors, rng_key: Array, changed: Array, spread: Array) -> Array:
    """Whether all that is read of the other systems is the same, for two states of those that are changed.

    :param spread: between 0 and 1: how far out the states are; of bits, how many are 1.
    """
    systems, keys = draft.num_systems, jax.random.split(rng_key)
    kernel = draft.prior.kernel
    events = draft.state_shape[: len(draft.state_shape) - kernel.event_ndim]
    if draft.is_discrete:
        word = jax.random.bernoulli(keys[0], spread, (systems, *draft.state_shape)).astype(float)
        z = jnp.stack([word, 1 - word])
    else:
        z = kernel.as_state((0.5 + 3 * spread) * kernel.stationary().sample(keys[0], (2, systems, *events)))
    latents = draft.draw_latents(keys[1], (2, 1)) | draft.draw_evenly(keys[1], (2, 1))

    def with_change(a: Array) -> Array:
        return a.at[1].set(jnp.where(changed.reshape(-1, *(1,) * (a.ndim - 2)), a[1], a[0]))

    def read(state: tuple[Array, Latents]) -> list[Array]:
        # not the sums alone: what is zero, or known exactly, is not in them
        parts = (*draft._read_one(*state), *draft._shown(*state))
        return [jnp.nan_to_num(a.astype(float).reshape(systems, -1)) for a in parts]

    # one after the other, by the same operations
    both = jax.lax.map(read, jax.tree.map(with_change, (z, latents)))
    same = [(a[0] == a[1]).all(-1) for a in both]
    return (jnp.stack(same).all(0) | changed).all()


def _selected(draft: Factors, site: Site, trace: Mapping[str, Any]) -> Array:
    """Which coordinates of x an exact observation shows, as positions in each system's flattened x."""
    size = draft.num_systems * math.prod(draft.state_shape)
    positions = np.arange(size, dtype=np.float32)
    shape = jnp.shape(trace[draft.name]["value"])
    other = np.random.default_rng(0).uniform(size=size).astype(np.float32)

    def shown(values: np.ndarray) -> np.ndarray:
        x = jnp.asarray(values.reshape(shape))
        again, _ = draft.trace(x, {})
        message = again[site.name]
        if np.any(_unwrap(message["fn"]).base.log_density):
            raise ValueError(f"site {site.name!r}: an exact observation (Delta) must be one without log_density")
        return np.asarray(jnp.broadcast_to(_unwrap(message["fn"]).base.v, jnp.shape(_value(message))), np.float64)

    index = shown(positions)
    inside = (index == np.round(index)) & (index >= 0) & (index < size)
    if size > 2**24 or not inside.all() or not np.array_equal(shown(other), other[index.astype(int)]):
        raise ValueError(
            f"site {site.name!r}: an exact observation (Delta) must be a selection of the coordinates of "
            f"{draft.name!r}, such as x[..., known]; for other functions of x use a Normal with a small scale"
        )
    transform = draft.prior.transform
    if transform is not None and (transform.domain.event_dim or transform.codomain.event_dim):
        raise ValueError(
            f"site {site.name!r}: an exact observation needs a transform that acts on each coordinate alone; "
            f"{type(transform).__name__} does not"
        )
    value, weight = np.asarray(_value(trace[site.name])), np.asarray(_entry_weights(trace[site.name]))
    outside = ~np.asarray(_base_constraint(draft.prior.support)(value)) & (weight > 0)
    if outside.any():
        raise ValueError(
            f"site {site.name!r}: observed values must be in the support of {draft.name!r}; "
            f"{value[outside].flat[0]} is not"
        )
    where = draft._layout.split(positions.reshape(shape)).reshape(draft.num_systems, -1).astype(int)
    place = np.empty(size, int)  # from a position in x to one in its system
    place[where.ravel()] = np.tile(np.arange(where.shape[1]), draft.num_systems)
    index = np.asarray(site.layout.split(index)).reshape(draft.num_systems, -1).astype(int)
    return jnp.asarray(place[index])


def _base_constraint(constraint: Any) -> Any:
    while isinstance(constraint, dist.constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _owners(draft: Factors) -> Array | None:
    """Which bit of x each observed number depends on, where none depends on two: shape ``(S, k)``; the number of bits
    where it depends on none. ``None`` where r does not factorise so."""
    if any(site.kind in (MULTIVARIATE, OTHER, FACTOR) for site in draft.observed):
        return None
    draft = draft.replace(owner=jnp.zeros(()))  # so that the elements are read
    latents = draft.draw_latents(jax.random.key(0), (NUM_WORDS, 1))
    size = math.prod(draft.state_shape)
    # a bit may matter only where another has one value: from all bits 0 to all 1, as an AND or an OR needs
    words = zip(jax.random.split(jax.random.key(0), NUM_WORDS), np.linspace(0, 1, NUM_WORDS), strict=True)
    of_words = [jax.tree.map(lambda u, i=i: u[i], latents) for i in range(NUM_WORDS)]
    found = [_depends_on(draft, u, *word) for u, word in zip(of_words, words, strict=True)]
    by_zeros, by_ones = np.any(found, axis=0)  # per digit of a bit's number
    if (by_zeros & by_ones).any():
        return None
    owner = (by_ones * 2 ** np.arange(len(by_ones))[:, None, None]).sum(0)
    return jnp.asarray(np.where((by_zeros | by_ones).any(0), owner, size))


@jax.jit
def _depends_on(factors: Factors, latents: Latents, rng_key: Array, share: Array) -> Array:
    """Whether each observed number changes with the bits whose number has a digit 0 there, or 1, around a word with
    this share of ones: shape ``(2, digits, S, k)``. What depends on two bits changes with both for some digit."""
    systems, size = factors.num_systems, math.prod(factors.state_shape)

    def elements(z: Array) -> Array:
        return factors._read_one(z.reshape(systems, *factors.state_shape), latents).elements

    bits = jax.random.bernoulli(rng_key, share, (systems, size)).astype(float)
    digits = np.arange(size) >> np.arange(max(1, (size - 1).bit_length()))[:, None] & 1
    flips = jnp.asarray(np.stack([1 - digits, digits]), bits.dtype)
    before = elements(bits)
    changed = jax.lax.map(lambda flip: elements(jnp.abs(bits - flip)) != before, flips.reshape(-1, size))
    return changed.reshape(*flips.shape[:2], *changed.shape[1:])


def _full_precision() -> Any:
    """For the user's matrix products, unless the user has chosen: a GPU's default is in error by .05 %, and so would be
    residuals, which are divided by the noise."""
    chosen = jax.config.jax_default_matmul_precision is not None
    return nullcontext() if chosen else jax.default_matmul_precision("highest")


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _partition(leaves: list[Any], traced: set[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What programs know (``None`` where they are given an array), and those arrays."""
    static = [None if i in traced else _Constant(leaf) for i, leaf in enumerate(leaves)]
    given = [leaf for i, leaf in enumerate(leaves) if i in traced]
    return tuple(static), tuple(jnp.asarray(leaf) if isinstance(leaf, float) else leaf for leaf in given)


class _Constant:
    """An argument that a compiled program may depend on, with equality by value (by identity where it has none)."""

    def __init__(self, value: Any) -> None:
        self.value = value = np.asarray(value) if isinstance(value, jax.Array) and not is_key(value) else value
        if isinstance(value, np.ndarray):
            self.key: Any = (value.shape, value.dtype.str, value.tobytes())
        else:
            try:
                hash(value)
                self.key = (type(value), value)
            except TypeError:
                self.key = id(value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self.key == other.key


class _Fill(Messenger):
    """Puts x at the prior's site and values at the latent sites: unconstrained ones, unless ``constrained``."""

    def __init__(self, fn: Callable, x: Array | None, latents: Latents, constrained: bool = False) -> None:
        self.x, self.latents, self.constrained = x, latents, constrained
        self.log_det: dict[str, Array] = {}
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["value"] is not None:
            return
        if isinstance(_unwrap(msg["fn"]).base, DiffusionPrior):
            msg["value"] = _feasible(msg["fn"]) if self.x is None else self.x
        elif msg["name"] in self.latents:
            value, fn = self.latents[msg["name"]], msg["fn"]
            if not (self.constrained or fn.support.is_discrete):
                transform = dist.biject_to(fn.support)
                unconstrained, value = value, transform(value)
                log_det = transform.log_abs_det_jacobian(unconstrained, value)
                extra = jnp.ndim(log_det) - len(fn.batch_shape)
                self.log_det[msg["name"]] = log_det.sum(tuple(range(-extra, 0))) if extra > 0 else log_det
            msg["value"] = value


def _unconstrain(fn: dist.Distribution, value: Array) -> Array:
    return value if fn.support.is_discrete else dist.biject_to(fn.support).inv(value)


def _feasible(fn: dist.Distribution, *, is_origin: bool = True) -> Array:
    """A state in data units: the origin, or another."""
    prior = _unwrap(fn).base
    kernel, z = prior.kernel, jnp.zeros(fn.shape())
    if not is_origin:
        z = 1 - z if kernel.is_discrete else jax.random.normal(jax.random.key(0), z.shape)
    z = kernel.as_state(z)
    return z if prior.transform is None else prior.transform(z)


class _Unwrapped(NamedTuple):
    base: dist.Distribution
    event_ndim: int  # batch axes of the base that are event axes of the whole
    mask: Any  # broadcasts against the base's batch shape; None


def _unwrap(fn: dist.Distribution) -> _Unwrapped:
    event_ndim, mask = 0, None
    while True:
        if isinstance(fn, dist.Independent):
            deeper = fn.reinterpreted_batch_ndims
            event_ndim += deeper
            mask = None if mask is None else jnp.reshape(mask, jnp.shape(mask) + (1,) * deeper)
        elif isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else jnp.logical_and(mask, fn._mask)
        elif not isinstance(fn, dist.ExpandedDistribution):
            return _Unwrapped(fn, event_ndim, mask)
        fn = fn.base_dist


def _log_prob(message: Any) -> Array:
    if message["intermediates"]:
        return message["fn"].log_prob(message["value"], message["intermediates"])
    return message["fn"].log_prob(message["value"])


def _scaled(message: Any, log_prob: Array) -> Array:
    shape = jnp.broadcast_shapes(jnp.shape(log_prob), message["fn"].batch_shape)
    log_prob = jnp.broadcast_to(log_prob, shape)
    return log_prob if message["scale"] is None else log_prob * message["scale"]


def _value(message: Any) -> Array:
    """An observed value, in the shape that it is compared in: one number may be observed of many."""
    value = jnp.asarray(message["value"])
    return jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, message["fn"].shape()))


def _weights(message: Any) -> Array:
    """How often each entry of the base's batch shape counts: the scale, and zero where masked."""
    _, event_ndim, mask = _unwrap(message["fn"])
    scale = jnp.asarray(1.0 if message["scale"] is None else message["scale"], dtype=float)
    scale = scale.reshape(scale.shape + (1,) * event_ndim)
    return scale if mask is None else jnp.where(mask, scale, 0.0)


def _entry_weights(message: Any) -> Array:
    """The same for each entry of the value of a Delta, whose log density is one number per event."""
    weights = _weights(message)
    weights = weights.reshape(weights.shape + (1,) * _unwrap(message["fn"]).base.event_dim)
    return jnp.broadcast_to(weights, _value(message).shape)


def _log_prob_elements(message: Any) -> Array:
    base, _, _ = _unwrap(message["fn"])
    value, weights = _value(message), _weights(message)
    if isinstance(base, dist.Delta):
        log_prob = jnp.where(base.v == value, 0.0, -jnp.inf)
        weights = _entry_weights(message)
    else:
        log_prob = jnp.broadcast_to(base.log_prob(value), jnp.shape(value))
    return jnp.where(weights > 0, weights * log_prob, 0.0)


def _normal_part(site: Site, message: Any, systems: int) -> _NormalPart:
    """One site's observations as normal ones."""
    base, _, _ = _unwrap(message["fn"])
    value, weights, split = _value(message).astype(float), _weights(message), site.layout.split
    shape = value.shape if site.kind != MULTIVARIATE else value.shape[:-1]
    weights = jnp.broadcast_to(weights, shape)
    used, weights = weights > 0, jnp.where(weights > 0, weights, 1.0)
    if site.kind == MULTIVARIATE:
        n, root = value.shape[-1], jnp.broadcast_to(base.scale_tril, (*value.shape, value.shape[-1]))
        constant = 0.5 * n * math.log(2 * math.pi)
        correction = constant - 0.5 * n * jnp.log(weights) - weights * (constant + half_log_det(root))
        correction = jnp.where(used, correction, constant)
        # by the inverse, of which there is one for all particles as a rule
        inverse = solve_lower(root[..., None, :, :], jnp.eye(n, dtype=root.dtype))  # transposed
        residual = einsum("...ji,...j->...i", inverse, jnp.where(used[..., None], value - base.loc, 0.0))
        noise = split(jnp.broadcast_to(1 / weights[..., None], value.shape)).reshape(systems, -1)
        discrepancy = jnp.zeros_like(residual)
    else:
        mean = base.loc if site.kind == NORMAL else base.mean
        variance = jnp.broadcast_to(base.scale**2 if site.kind == NORMAL else base.variance, shape)
        residual = jnp.where(used, jnp.where(used, value, 0.0) - mean, 0.0)  # a masked NaN must not reach a gradient
        log_normalizer = jnp.log(2 * math.pi * variance)
        if site.kind == NORMAL:
            correction = 0.5 * (log_normalizer - jnp.log(weights)) - 0.5 * weights * log_normalizer
            discrepancy = jnp.zeros(shape)
        else:
            inside = jnp.where(used, _value(message), base.support.feasible_like(jnp.zeros(shape)))
            as_normal = -0.5 * (log_normalizer - jnp.log(weights) + weights * residual**2 / variance)
            correction = jnp.zeros(shape)
            discrepancy = jnp.where(used, weights * base.log_prob(inside) - as_normal, 0.0)
        correction = jnp.where(used, correction, 0.5 * math.log(2 * math.pi))
        noise = split(jnp.where(used, variance / weights, 1.0)).reshape(systems, -1)
    return _NormalPart(
        split(residual).reshape(systems, -1),
        noise,
        split(correction).reshape(systems, -1).sum(-1),
        split(discrepancy).reshape(systems, -1),
    )


def _merge_chains(a: Array) -> Array:
    return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])
