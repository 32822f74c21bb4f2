"""Multi-layer perceptrons."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.networks.features import context_features, flatten_event, sinusoids
from pp_diffusion.networks.readout import Readout, ReadoutKind


class MLP(nn.Module):
    r"""A multi-layer perceptron over the flattened state.

    :param tuple hidden_units: the widths of the hidden layers.
    :param activation: the name of a function in :mod:`jax.nn`.
    :param readout: ``"shared"``: time (as log-SNR) is an input of the first layer, and the readout is one for all t,
        so that the dependence on time is smooth. ``"per_step"``: the paper's, hidden layers that do not see t and
        linear readouts per t. ``"bumps"``: as that, with readouts mixed by bumps over time.
    :param num_frequencies: sin and cos of the state at so many octaves join the inputs; ``None`` takes 2 for states of
        up to 4 entries, which may have fine structure in few dimensions, and none for larger ones.
    :param precision: of the matrix products; full float32 unless asked otherwise, because less changes K.
    :param num_timesteps: T, set by :class:`~pp_diffusion.Diffusion`.
    :param outputs: a link per output, set by :class:`~pp_diffusion.Diffusion`.
    """

    hidden_units: tuple[int, ...] = (128, 128, 128)
    activation: str = "gelu"
    readout: ReadoutKind = "shared"
    num_frequencies: int | None = None
    precision: str | None = "highest"
    num_timesteps: int | None = None
    outputs: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x_t: Array, t: Array, log_snr: Array, context: Any = None) -> tuple[Array, ...]:
        x = flatten_event(x_t, t)
        inputs = [x, *context_features(context, t)]
        num_frequencies = self.num_frequencies
        if num_frequencies is None:
            num_frequencies = 2 if x.shape[-1] <= 4 else 0
        if num_frequencies:
            inputs.append(sinusoids(x, num_frequencies))
        if self.readout == "shared":
            inputs.append(sinusoids(log_snr[..., None] / 8, 4))
            inputs.append(log_snr[..., None] / 8)
        hidden = jnp.concatenate(inputs, -1)
        # rows: products over several batch axes are slower, above all their gradients
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for width in self.hidden_units:
            hidden = getattr(jax.nn, self.activation)(nn.Dense(width, precision=self.precision)(hidden))
        readout = Readout(self.readout, self.outputs, self.num_timesteps, self.precision, name="readout")
        outputs = readout(hidden, t.reshape(-1), x_t.shape[t.ndim :])
        return tuple(out.reshape(x_t.shape) for out in outputs)
