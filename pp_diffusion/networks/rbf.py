"""Normalised radial basis functions, the paper's network for the swiss roll."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.networks.features import context_features, flatten_event
from pp_diffusion.networks.readout import Readout, ReadoutKind


class RBF(nn.Module):
    r"""One hidden layer of normalised Gaussian bumps in the state, with a linear readout per t (the paper, D.1.1).

    :param int hidden_units: the number of bumps; their centres and widths are learned and shared over t.
    :param readout: ``"per_step"``, or ``"bumps"``, in which readouts change smoothly with time.
    :param precision: of the matrix products.
    :param num_timesteps: T, set by :class:`~pp_diffusion.Diffusion`.
    :param outputs: a link per output, set by :class:`~pp_diffusion.Diffusion`.
    """

    hidden_units: int = 16
    readout: ReadoutKind = "per_step"
    precision: str | None = "highest"
    num_timesteps: int | None = None
    outputs: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x_t: Array, t: Array, context: Any = None) -> tuple[Array, ...]:
        inputs = jnp.concatenate([flatten_event(x_t, t), *context_features(context, t)], -1)
        size = inputs.shape[-1]
        centres = self.param("centres", nn.initializers.normal(1.0), (self.hidden_units, size))
        log_widths = self.param("log_widths", nn.initializers.constant(-0.5), (self.hidden_units,))
        squares = jnp.sum((inputs[..., None, :] - centres) ** 2, -1)
        features = jax.nn.softmax(-0.5 * squares * jnp.exp(-2 * log_widths))
        readout = Readout(self.readout, self.outputs, self.num_timesteps, self.precision, name="readout")
        return readout(features, t, x_t.shape[t.ndim :])
