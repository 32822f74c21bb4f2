"""A network whose context goes through a network of its own."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax import Array


class Embedded(nn.Module):
    """A stock network that is given an embedding of the context, trained along with it.

    For images, time series or sets: the embedding sees each context as training encoded it, and the network the
    numbers that it returns. It runs again at each step of a chain.

    .. doctest::

        >>> import flax.linen as nn, pp_diffusion as ppd
        >>> class Pooled(nn.Module):  # of a set of points, in whatever order
        ...     @nn.compact
        ...     def __call__(self, context):
        ...         return nn.gelu(nn.Dense(32)(context)).mean(-2)
        >>> network = ppd.networks.Embedded(ppd.networks.MLP((64, 64)), embedding=Pooled())

    :param network: the stock network, or a linen module that names ``log_snr`` and ``context`` as they do.
    :param embedding: a linen module, from contexts ``(*batch, *event)`` to numbers ``(*batch, k)``.
    :param num_timesteps: T, set by :class:`~pp_diffusion.Diffusion`.
    :param outputs: a link per output, set by it too.
    """

    network: nn.Module
    embedding: nn.Module
    num_timesteps: int | None = None
    outputs: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x_t: Array, t: Array, log_snr: Array, context: Any) -> tuple[Array, ...]:
        settings = {name: getattr(self, name) for name in ("num_timesteps", "outputs") if hasattr(self.network, name)}
        network = self.network.clone(**settings, name="inner", parent=self)
        return tuple(network(x_t, t, log_snr=log_snr, context=self.embedding(context)))
