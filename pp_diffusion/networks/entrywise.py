"""A dense network over the event that a small one, shared by all entries, reads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.networks.features import context_features, flatten_event, sinusoids
from pp_diffusion.networks.readout import Readout


class Entrywise(nn.Module):
    r"""A perceptron over the whole event tells each entry a few numbers; a small one, the same for all entries, reads
    them together with the entry's own value and the log-SNR.

    What an entry's law is, given what the others say of it, is learned from all entries at once: for images of few
    pixels, or other events of many entries of one kind and of little data. Each entry also has numbers of its own,
    learned ones that say which it is.

    :param tuple hidden_units: the widths of the layers over the event.
    :param int num_features: how many numbers each entry is told.
    :param tuple entry_units: the widths of the layers that all entries share; at least one.
    :param activation: the name of a function in :mod:`jax.nn`.
    :param precision: of the matrix products; full float32 unless asked otherwise, because less changes K.
    :param num_timesteps: T, set by :class:`~pp_diffusion.Diffusion`.
    :param outputs: a link per output, set by :class:`~pp_diffusion.Diffusion`.
    """

    hidden_units: tuple[int, ...] = (128, 128)
    num_features: int = 4
    entry_units: tuple[int, ...] = (32, 32)
    activation: str = "gelu"
    precision: str | None = "highest"
    num_timesteps: int | None = None
    outputs: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x_t: Array, t: Array, log_snr: Array, context: Any = None) -> tuple[Array, ...]:
        if not self.entry_units:
            raise ValueError("entry_units must hold at least one width; got ()")
        activation = getattr(jax.nn, self.activation)
        x, level = flatten_event(x_t, t), log_snr[..., None] / 8
        time = jnp.concatenate([level, sinusoids(level, 4)], -1)
        hidden = jnp.concatenate([x, time, *context_features(context, t)], -1)
        # rows, as in MLP
        x, time, hidden = (a.reshape(-1, a.shape[-1]) for a in (x, time, hidden))
        for width in self.hidden_units:
            hidden = activation(nn.Dense(width, precision=self.precision)(hidden))
        shape = (x.shape[-1], self.num_features)
        told = nn.Dense(shape[0] * shape[1], precision=self.precision)(hidden).reshape(-1, *shape)
        told += self.param("entries", nn.initializers.normal(0.5), shape)
        entry = jnp.concatenate([x[..., None], told], -1)
        from_time = nn.Dense(self.entry_units[0], use_bias=False, precision=self.precision)(time)[:, None]
        for i, width in enumerate(self.entry_units):
            entry = nn.Dense(width, precision=self.precision)(entry)
            entry = activation(entry if i else entry + from_time)
        readout = Readout("shared", self.outputs, self.num_timesteps, self.precision, name="readout")
        outputs = readout(entry, jnp.broadcast_to(t.reshape(-1, 1), x.shape), ())
        return tuple(out.reshape(x_t.shape) for out in outputs)
