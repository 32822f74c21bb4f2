r"""The last layer of the stock networks: features to outputs, with weights that may depend on time."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

ReadoutKind = Literal["shared", "per_step", "bumps"]
LINKS = {"real": lambda z: z, "positive": jax.nn.softplus, "unit": jax.nn.sigmoid}


class Readout(nn.Module):
    r"""Linear readouts of features, one per output, starting at zero.

    ``"per_step"`` has weights of its own for each t (the paper, appendix D.1); ``"bumps"`` mixes ``num_bumps`` readouts
    by softmax-normalised Gaussian bumps over time (eqs. 62–63), whose width is ``bump_width`` of their spacing;
    ``"shared"`` has one for all t.
    """

    kind: ReadoutKind
    outputs: tuple[str, ...] | None
    num_timesteps: int | None
    precision: str | None
    num_bumps: int = 10
    bump_width: float = 0.5

    @nn.compact
    def __call__(self, features: Array, t: Array, event_shape: tuple[int, ...]) -> tuple[Array, ...]:
        if self.outputs is None or self.num_timesteps is None:
            raise ValueError(
                "outputs and num_timesteps are needed; ppd.Diffusion sets them, or give them to the network"
            )
        size = 1
        for n in event_shape:
            size *= n
        width = size * len(self.outputs)
        if self.kind == "shared":
            out = nn.Dense(width, kernel_init=nn.initializers.zeros, precision=self.precision)(features)
        elif self.kind == "per_step":
            shape = (self.num_timesteps, features.shape[-1], width)
            kernel = self.param("kernel", nn.initializers.zeros, shape)[t - 1]
            bias = self.param("bias", nn.initializers.zeros, (self.num_timesteps, width))[t - 1]
            out = jnp.einsum("...h,...hf->...f", features, kernel, precision=self.precision) + bias
        elif self.kind == "bumps":
            dense = nn.Dense(width * self.num_bumps, kernel_init=nn.initializers.zeros, precision=self.precision)
            readouts = dense(features).reshape(*features.shape[:-1], self.num_bumps, width)
            out = jnp.sum(readouts * self._bumps(t)[..., None], axis=-2)
        else:
            raise ValueError(f"readout must be 'shared', 'per_step' or 'bumps'; got {self.kind!r}")
        parts = out.reshape(*t.shape, len(self.outputs), *event_shape)
        return tuple(
            LINKS[link](parts[(..., i) + (slice(None),) * len(event_shape)]) for i, link in enumerate(self.outputs)
        )

    def _bumps(self, t: Array) -> Array:
        assert self.num_timesteps is not None
        centres = (jnp.arange(self.num_bumps) + 0.5) / self.num_bumps * self.num_timesteps
        width = self.bump_width * self.num_timesteps / self.num_bumps
        return jax.nn.softmax(-((t[..., None] - centres) ** 2) / (2 * width**2))
