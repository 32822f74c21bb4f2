"""Coordinates of x that are observed without noise."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import constraints

from pp_diffusion.posterior.messages import in_words
from pp_diffusion.posterior.reader import Reader
from pp_diffusion.posterior.sites import ExactPart
from pp_diffusion.prior import DiffusionPrior


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


def known_values(reader: Reader, where: dict[str, Array]) -> Exact:
    """What is observed so.

    :param where: per site, the coordinates.
    """
    systems = reader.systems
    count, size = systems.number, systems.state_size
    none = jnp.zeros((count, 0))
    if not where:
        return Exact(none.astype(int), none, none.astype(bool), none.sum(-1))
    origin = reader.origin()
    found = reader.measure(origin, {}).sites
    parts = [_exact(site.split(found[site.name], count).exact) for site in reader.observed if site.name in where]
    places = [where[site.name] for site in reader.observed if site.name in where]
    index, y = jnp.concatenate(places, -1), jnp.concatenate([part.value.astype(float) for part in parts], -1)
    counts = jnp.concatenate([part.weight for part in parts], -1) > 0
    x = systems.layout.split(origin).reshape(count, size)
    target = jnp.where(counts, index, size)  # what does not count is written nowhere
    x = jax.vmap(lambda row, i, v: row.at[i].set(v, mode="drop"))(x, target, y)
    transform = reader.transform
    if transform is None:
        return Exact(index, jnp.take_along_axis(x, index, -1), counts, jnp.zeros(count))
    x = x.reshape(count, *systems.state_shape)
    z = transform.inv(x)
    log_det = transform.log_abs_det_jacobian(z, x).reshape(count, size)
    log_det = jnp.where(counts, jnp.take_along_axis(log_det, index, -1), 0.0).sum(-1)
    return Exact(index, jnp.take_along_axis(z.reshape(count, size), index, -1), counts, log_det)


def known_places(reader: Reader, prior: DiffusionPrior, name: str) -> dict[str, Array]:
    """Per site that is an exact observation, which coordinates it shows, as positions in each system's flattened x.

    :param name: of the site of x.
    :raises ValueError: naming the site that is not a selection of coordinates, or has impossible values; and if a
        coordinate is observed twice.
    """
    sites = [site for site in reader.observed if site.kind.is_exact]
    if not sites:
        return {}
    if (transform := prior.transform) is not None and (transform.domain.event_dim or transform.codomain.event_dim):
        raise ValueError(
            f"site {sites[0].name!r}: an exact observation needs a transform that acts on each coordinate alone; "
            f"{type(transform).__name__} does not"
        )
    systems = reader.systems
    size = systems.number * systems.state_size
    positions = np.arange(size, dtype=np.float32)
    other = np.random.default_rng(0).uniform(size=size).astype(np.float32)
    shape = jnp.shape(reader.origin())
    first, second = (_shown(reader, jnp.asarray(values.reshape(shape))) for values in (positions, other))
    where = systems.layout.split(positions.reshape(shape)).reshape(systems.number, -1).astype(int)
    place = np.empty(size, int)  # from a position in x to one in its system
    place[np.asarray(where).ravel()] = np.tile(np.arange(where.shape[1]), systems.number)
    known = {}
    for site in sites:
        n = site.name
        parts = _exact(first[n]), _exact(second[n])
        if any(np.any(part.log_density) for part in parts):
            raise ValueError(f"site {n!r}: an exact observation (Delta) must be one without log_density")
        index, values = (np.asarray(part.shown, np.float64) for part in parts)
        inside = (index == np.round(index)) & (index >= 0) & (index < size)
        if size > 2**24 or not inside.all() or not np.array_equal(values, other[index.astype(int)]):
            raise ValueError(
                f"site {n!r}: an exact observation (Delta) must be a selection of the coordinates of {name!r}, such "
                "as x[..., known]; for other functions of x use a Normal with a small scale"
            )
        _check_values(n, parts[0], prior, name)
        known[n] = jnp.asarray(place[np.asarray(site.layout.split(index)).reshape(systems.number, -1).astype(int)])
    for row in np.concatenate([*known.values()], -1):
        if len(set(row)) < len(row):
            raise ValueError(f"site {in_words(known)} observes a coordinate of {name!r} twice")
    return known


def _check_values(site: str, part: ExactPart, prior: DiffusionPrior, name: str) -> None:
    support = prior.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    value = np.asarray(part.value)
    outside = ~np.asarray(support(value)) & (np.asarray(part.weight) > 0)
    if outside.any():
        raise ValueError(
            f"site {site!r}: observed values must be in the support of {name!r}; {value[outside].flat[0]} is not"
        )


@jax.jit
def _shown(reader: Reader, x: Array) -> dict[str, ExactPart | None]:
    found = reader.measure(x, {}).sites
    return {site.name: found[site.name].exact for site in reader.observed if site.kind.is_exact}


def _exact(part: ExactPart | None) -> ExactPart:
    assert part is not None  # of a site whose kind is_exact
    return part
