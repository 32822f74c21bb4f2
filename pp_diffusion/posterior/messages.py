"""What NumPyro's record of a site (a message of its handlers) says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.transforms import Transform

Message = dict[str, Any]


class Unwrapped(NamedTuple):
    """A distribution without ``to_event``, ``expand`` and ``mask``.

    :ivar base: what is within.
    :ivar event_ndim: batch axes of the base that are event axes of the whole.
    :ivar mask: broadcasts against the base's batch shape; ``None`` without.
    """

    base: Any
    event_ndim: int
    mask: Any


def unwrap(fn: Any) -> Unwrapped:
    """The distribution within, and what is around it."""
    event_ndim, mask = 0, None
    while True:
        if isinstance(fn, dist.Independent):
            deeper = fn.reinterpreted_batch_ndims
            event_ndim += deeper
            mask = None if mask is None else jnp.reshape(mask, jnp.shape(mask) + (1,) * deeper)
        elif isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else jnp.logical_and(mask, fn._mask)
        elif not isinstance(fn, dist.ExpandedDistribution):
            return Unwrapped(fn, event_ndim, mask)
        fn = fn.base_dist


def base_of(message: Message) -> Any:
    """A site's distribution without wrappers."""
    return unwrap(message["fn"]).base


def is_fixed(message: Message) -> bool:
    """Whether there is nothing random about a site, given those before it."""
    return isinstance(base_of(message), dist.Delta)


def is_deterministic(message: Message) -> bool:
    """Whether it is a ``numpyro.deterministic`` of an array."""
    return message["type"] == "deterministic" and jax.tree_util.all_leaves([message["value"]])


def lies_in(message: Message, frame: Any) -> bool:
    """Whether a site lies in a plate."""
    return any(f.name == frame.name for f in message["cond_indep_stack"])


def bijector(fn: Any) -> Transform | None:
    """From real numbers to a latent's support; ``None`` where its values are held as they are: discrete ones, and those
    that NumPyro has no transform for."""
    if fn.support.is_discrete:
        return None
    try:
        return dist.biject_to(fn.support)
    except NotImplementedError:
        return None


def log_prob_of(message: Message) -> Array:
    """The log density of a site's value, as scaled; of its batch shape."""
    fn, value = message["fn"], message["value"]
    extra = (message["intermediates"],) if message["intermediates"] else ()
    log_prob = fn.log_prob(value, *extra)
    log_prob = jnp.broadcast_to(log_prob, jnp.broadcast_shapes(jnp.shape(log_prob), fn.batch_shape))
    return log_prob if message["scale"] is None else log_prob * message["scale"]


def value_shape(message: Message) -> tuple[int, ...]:
    """The shape in which an observed value is compared: one number may be observed of many."""
    return np.broadcast_shapes(np.shape(message["value"]), message["fn"].shape())


def value_of(message: Message) -> Array:
    """An observed value, of that shape."""
    return jnp.broadcast_to(jnp.asarray(message["value"]), value_shape(message))


def weights_of(message: Message) -> Array:
    """How often each entry of the base's batch shape counts: the scale, and zero where masked."""
    _, event_ndim, mask = unwrap(message["fn"])
    scale = jnp.asarray(1.0 if message["scale"] is None else message["scale"], dtype=float)
    scale = scale.reshape(scale.shape + (1,) * event_ndim)
    return scale if mask is None else jnp.where(mask, scale, 0.0)


def entry_weights_of(message: Message) -> Array:
    """The same for each entry of the value, for a base whose log density may be one number per event."""
    weights = weights_of(message)
    weights = weights.reshape(weights.shape + (1,) * base_of(message).event_dim)
    return jnp.broadcast_to(weights, value_shape(message))


def in_words(names: Iterable[str]) -> str:
    """Names of sites, for errors."""
    return ", ".join(repr(name) for name in sorted(names))
