"""What depends on what in a model: sites on latents and on x, systems on each other, numbers on entries of x."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.compiling import jit_once
from pp_diffusion.posterior.messages import Message
from pp_diffusion.posterior.program import SEED, Latents, Program, Traced
from pp_diffusion.posterior.reader import Measured, Reader
from pp_diffusion.posterior.sites import Normal, NormalPart
from pp_diffusion.states import StateSpace

NUM_PAIRS = 8  # of states, half-way between which it is found out whether a mean is linear in x
NUM_STATES = 5  # at which it is found out whether systems depend on each other


class Dependencies(NamedTuple):
    """What enters the densities of a model's sites.

    :ivar of: per site, the names of latents, that of x, and :data:`SEED`.
    :ivar dropped: latents whose density depends on x, if only through others.
    :ivar data: the observed sites whose values depend on nothing.
    :ivar deterministic: the deterministic sites that depend neither on the seed nor on what is dropped.
    """

    of: dict[str, frozenset[str]]
    dropped: tuple[str, ...]
    data: tuple[str, ...]
    deterministic: tuple[str, ...]


def dependencies(
    program: Program, traced: Traced, name: str, latents: Latents, away: Callable[[], Array], exact: list[str]
) -> Dependencies:
    """Per sample site, which latents, whether x and whether the seed enters its density.

    :param traced: :func:`~pp_diffusion.posterior.reader.measure`.
    :param name: of the site of x.
    :param latents: values of the others.
    :param away: makes a value of x that is not the origin.
    :param exact: the sites that are exact observations.
    :raises ValueError: if the value of one of these depends on x.
    """
    labels = {n: frozenset({n}) for n in latents}
    found: Measured = traced.sources(frozenset(), frozenset({name}), labels, frozenset({SEED}))
    for site in exact:
        part = found.sites[site].exact
        if part is not None and name in part.value:
            raise ValueError(f"site {site!r}: the value of an exact observation (Delta) must not depend on {name!r}")
    parts = found.sites | found.log_priors | {name: found.prior}
    of = {n: frozenset().union(*jax.tree.leaves(part, is_leaf=_is_set)) - {n} for n, part in parts.items()}
    if any(SEED in d for d in of.values()):  # a seed that numpyro's scan is given need not be used
        same = _unmoved_by_seed(program, traced, name, latents, away())
        of = {n: d - {SEED} if n in same else d for n, d in of.items()}
    dropped = {n for n in latents if name in of[n]}
    while more := {n for n in latents if of[n] & dropped} - dropped:
        dropped |= more
    data = tuple(n for n, d in found.observations.items() if not d)
    enters: dict[str, Any] = found.deterministic
    told = tuple(n for n, d in enters.items() if not d & {SEED, *dropped})
    return Dependencies(of, tuple(n for n in latents if n in dropped), data, told)


def _is_set(part: Any) -> bool:
    return isinstance(part, frozenset)


def _unmoved_by_seed(program: Program, traced: Traced, name: str, latents: Latents, x: Array) -> set[str]:
    """The sites whose densities are the same for two seeds."""
    evaluate = jax.jit(traced)
    first, second = (evaluate(program, x, latents, jax.random.key(seed)) for seed in (0, 1))
    pairs = [
        (n, getattr(first, field)[n], getattr(second, field)[n])
        for field in ("sites", "log_priors")
        for n in getattr(first, field)
    ]
    return {n for n, a, b in (*pairs, (name, first.prior, second.prior)) if _all_equal(a, b)}


def _all_equal(first: Any, second: Any) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def even_draws(messages: Mapping[str, Message], reader: Reader, rng_key: Array, count: int) -> Latents:
    """Discrete latents of finite support, each value as probable as another, shape ``(count, S, …)``."""
    values = {}
    for i, site in enumerate(reader.latents):
        fn = messages[site.name]["fn"]
        if site.is_discrete and fn.has_enumerate_support:
            support = fn.enumerate_support(expand=False)
            support = support.reshape(len(support), *fn.event_shape)
            which = jax.random.randint(jax.random.fold_in(rng_key, i), (count, *fn.batch_shape), 0, len(support))
            values[site.name] = jax.vmap(site.layout.split)(support[which])
    return values


def are_independent(reader: Reader, space: StateSpace, messages: Mapping[str, Message]) -> bool:
    """Whether x and the latents of a system leave the others' densities alone, as the plate says they do.

    For each pair of systems there is a digit of their numbers by which one is changed and the other is not.
    """
    count = reader.systems.number
    numbers = np.arange(count)
    halves = [numbers >> bit & 1 == value for bit in range(count.bit_length()) for value in (0, 1)]
    changed = jnp.asarray(np.stack([which for which in halves if which.any() and not which.all()]))
    for i in range(NUM_STATES):
        keys = jax.random.split(jax.random.key(i))
        even = even_draws(messages, reader, keys[1], 2)
        if not _same_elsewhere(reader, space, keys, even, changed, jnp.asarray(i / (NUM_STATES - 1))).all():
            return False
    return True


@jax.jit
def _same_elsewhere(
    reader: Reader, space: StateSpace, keys: Array, even: Latents, changed: Array, spread: Array
) -> Array:
    """Whether all that is read of the other systems is the same, for two states of those that are changed.

    :param changed: which these are, one after the other; shape ``(n, S)``.
    :param spread: between 0 and 1: how far out the states are.
    """
    systems = reader.systems
    z = space.pair(keys[0], systems.batch_shape, spread)
    latents = jax.vmap(reader.draw)(jax.random.split(keys[1])) | even

    def read(which: Array) -> list[Array]:
        def choose(a: Array) -> Array:
            return jnp.where(which.reshape(-1, *(1,) * (a.ndim - 2)), a[1], a[0])

        state = jax.tree.map(choose, (z, latents))
        # not the sums alone: what is zero, or known exactly, is not in them
        parts = (*jax.tree.leaves(reader.read(*state)), *reader.shown(*state))
        return [jnp.nan_to_num(a.astype(float).reshape(systems.number, -1)) for a in parts]

    # one after the other, by the same operations
    found = jax.lax.map(read, jnp.concatenate([jnp.zeros_like(changed[:1]), changed]))
    equal = [(a[1:] == a[:1]).all(-1) for a in found]
    return (jnp.stack(equal).all(0) | changed).all(-1)


def curved_sites(reader: Reader, space: StateSpace, messages: dict[str, Message]) -> frozenset[str]:
    """The sites with normal noise whose mean is not linear in x, or whose noise is not the same everywhere."""
    normal = [site for site in reader.observed if isinstance(site.kind, Normal)]
    if not normal:
        return frozenset()
    keys = jax.random.split(jax.random.key(0))
    found = _bends(reader, space, keys, even_draws(messages, reader, keys[1], 1))
    return frozenset(site.name for site in normal if found[site.name])


@jit_once
def _bends(reader: Reader, space: StateSpace, keys: Array, even: Latents) -> dict[str, Array]:
    """Whether what is observed with normal noise is elsewhere than half-way, between two states, of their own."""
    systems = reader.systems
    latents = reader.draw(keys[1]) | jax.tree.map(lambda u: u[0], even)

    def normal_parts(z: Array) -> dict[str, NormalPart]:
        found = reader.measure_states(z, latents).sites
        parts = {site.name: site.split(found[site.name], systems.number).normal for site in reader.observed}
        return {name: part for name, part in parts.items() if part is not None}

    def at(rng_key: Array) -> dict[str, Array]:
        a, b = space.pair(rng_key, systems.batch_shape, 0.2)
        low, half, high = (normal_parts(z) for z in (a, (a + b) / 2, b))
        return {
            # a correction has the logarithm of the noise's scale
            n: _is_bent(low[n].residual, half[n].residual, high[n].residual)
            | _differ(low[n].correction, high[n].correction)
            for n in low
        }

    found = jax.lax.map(at, jax.random.split(keys[0], NUM_PAIRS))
    return jax.tree.map(lambda bent: bent.any(), found)


def _is_bent(low: Array, half: Array, high: Array) -> Array:
    away = jnp.abs(low + high - 2 * half)
    return (away > 1e-3 * jnp.abs(high - low) + 1e-5 * (jnp.abs(low) + jnp.abs(high))).any()


def _differ(a: Array, b: Array) -> Array:
    return (jnp.abs(a - b) > 1e-5 * (1 + jnp.abs(a))).any()


def owners(reader: Reader, space: StateSpace) -> Array | None:
    """Which entry of x each observed number depends on, where none depends on two: shape ``(S, k)``; the number of
    entries where it depends on none. ``None`` where r does not factorise so, or the space need not know."""
    if not reader.has_elements:
        return None

    def changes(rng_key: Array, spread: Any) -> Array:
        return _changes(reader, space, rng_key, jnp.asarray(spread, float))

    return space.owners(changes, reader.systems.state_size)


@jax.jit
def _changes(reader: Reader, space: StateSpace, rng_key: Array, spread: Array) -> Array:
    state_key, latent_key = jax.random.split(rng_key)
    latents = reader.draw(latent_key)

    def elements(z: Array) -> Array:
        z = z.reshape(reader.systems.number, *reader.systems.state_shape)
        return reader.read(z, latents).elements

    return space.changes(elements, state_key, spread, reader.systems.batch_shape)
