r"""The divergence :math:`\sum_i \partial f_i / \partial x_i` of a map of events: exact, or by probes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.checks import positive_int
from pp_diffusion.frozen import Frozen


class ExactDivergence(Frozen):
    """All d diagonal entries, each by a product of the Jacobian with a unit vector."""

    def __init__(self) -> None:
        self._set()

    def __call__(self, function: Callable[[Array], Array], x: Array, event_ndim: int) -> tuple[Array, Array]:
        """``function(x)``, and its divergence per row.

        :param function: acts on each event alone.
        """
        event_shape = x.shape[x.ndim - event_ndim :]
        units = jnp.eye(prod(event_shape), dtype=x.dtype).reshape(-1, *event_shape)
        value, products = _products(function, x, units)
        return value, jnp.einsum("i...i->...", products.reshape(len(units), *x.shape[: x.ndim - event_ndim], -1))


class Hutchinson(Frozen):
    r"""An unbiased estimate of the divergence, :math:`\epsilon^\top J \epsilon` for random signs :math:`\epsilon`.

    For events too large for an exact trace. The probes are fixed by ``rng_key`` and the same for every datum and step,
    so that ``log_prob`` is a deterministic, differentiable function of x; its error is shared by all data.

    :param rng_key: a JAX random key.
    :param num_probes: the number of probes; the cost of a density is as many derivatives of the network.
    """

    data_fields = ("rng_key",)

    rng_key: Array
    num_probes: int

    def __init__(self, rng_key: Array, num_probes: int = 1) -> None:
        self._set(rng_key=rng_key, num_probes=positive_int("num_probes", num_probes))

    def __call__(self, function: Callable[[Array], Array], x: Array, event_ndim: int) -> tuple[Array, Array]:
        """``function(x)``, and the estimate of its divergence per row."""
        event_shape = x.shape[x.ndim - event_ndim :]
        probes = jax.random.rademacher(self.rng_key, (self.num_probes, *event_shape), x.dtype)
        value, products = _products(function, x, probes)
        products = products.reshape(self.num_probes, *x.shape[: x.ndim - event_ndim], -1)
        return value, jnp.einsum("i...e,ie->...", products, probes.reshape(self.num_probes, -1)) / self.num_probes


def _products(function: Callable[[Array], Array], x: Array, tangents: Array) -> tuple[Array, Array]:
    """``function(x)``, and its Jacobian's products with each of the tangents, events, the same in every row."""
    value, along = jax.linearize(function, x)
    broadcast = partial(jnp.broadcast_to, shape=x.shape)
    return value, jax.vmap(lambda tangent: along(broadcast(tangent)))(tangents)
