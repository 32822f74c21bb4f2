"""A U-Net over images, made for likelihoods."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.networks.convolution import Convolution
from pp_diffusion.networks.features import context_features, sinusoids
from pp_diffusion.networks.images import as_images, pad_to_multiple, repeat_pixels, space_to_depth
from pp_diffusion.networks.readout import Readout


class UNet(nn.Module):
    r"""Residual blocks at several resolutions, down and up again, for images of any size and number of channels.

    The event has the shape ``(height, width)`` or ``(height, width, channels)``; sizes that do not halve often enough
    are padded with zeros. Time enters every block as log-SNR, with the covariates ``context``, if there are any, as a
    scale and a shift of its normalised channels.

    Fine structure of the data, such as integer levels, shows in :math:`x_t` only where the noise is small, and there
    in differences that are small too: beside :math:`x_t` the network sees sines and cosines of :math:`x_0` at
    ``frequencies`` as far as :math:`x_t` tells them, :math:`E[e^{i\omega x_0} \mid x_t]` under a flat prior.

    :param tuple channels: per resolution, from the full one, each half as wide and high as the one before.
    :param int num_blocks: residual blocks per resolution, on the way down and again on the way up.
    :param int attention_levels: at so many of the lowest resolutions, blocks are followed by self-attention.
    :param frequencies: k of the angular frequencies :math:`2^k \pi`, in the model's space.
    :param int num_groups: groups of channels that are normalised together, at most.
    :param activation: the name of a function in :mod:`jax.nn`.
    :param dtype: to compute in, such as ``"bfloat16"``; inputs, normalisation and outputs stay in full precision.
    :param precision: of the products; full float32 unless asked otherwise, because less changes K.
    :param num_timesteps: T, set by :class:`~pp_diffusion.Diffusion`.
    :param outputs: a link per output, set by :class:`~pp_diffusion.Diffusion`.

    .. doctest::

        >>> import jax, pp_diffusion as ppd
        >>> network = ppd.networks.UNet(channels=(8, 16), num_blocks=1)
        >>> kernel, schedule = ppd.GaussianKernel((5, 6, 3)), ppd.FixedSchedule.log_linear(10)
        >>> diffusion = ppd.Diffusion(kernel, schedule, network)
        >>> prior = diffusion.prior(diffusion.init_params(jax.random.key(0)))
        >>> prior.sample(jax.random.key(1), (2,)).shape
        (2, 5, 6, 3)
    """

    channels: tuple[int, ...] = (32, 64, 64)
    num_blocks: int = 1
    attention_levels: int = 1
    frequencies: tuple[int, ...] = (3, 4, 5)
    num_groups: int = 8
    activation: str = "silu"
    dtype: str | None = None
    precision: str | None = "highest"
    num_timesteps: int | None = None
    outputs: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x_t: Array, t: Array, log_snr: Array, context: Any = None) -> tuple[Array, ...]:
        if not self.channels or min(*self.channels, self.num_blocks) < 1:
            raise ValueError(f"channels and num_blocks must be positive; got {self.channels} and {self.num_blocks}")
        exact = as_images(x_t, t.ndim)
        rows, height, width, num_channels = exact.shape
        level = log_snr.reshape(-1)
        time = self._time(level, [c.reshape(rows, -1) for c in context_features(context, t)])
        dtype = self.dtype or exact.dtype
        x = pad_to_multiple(self.inputs(exact, level).astype(dtype), 2 ** (len(self.channels) - 1))

        # the highest first; each is half as wide and high as the one before
        x, skips = self._conv(self.channels[0])(x), []
        for depth, features in enumerate(self.channels):
            if depth:
                x = self._dense(features)(space_to_depth(x))
            x = self._blocks(x, time, depth)
            skips.append(x)
        skips.pop()
        for depth, features in reversed(list(enumerate(self.channels))):
            if depth < len(skips):
                x = jnp.concatenate([repeat_pixels(self._dense(features)(x)), skips[depth]], -1)
                x = self._dense(features)(x)
            x = self._blocks(x, time, depth)

        x = getattr(jax.nn, self.activation)(Normalised(self.num_groups)(x))[:, :height, :width]
        readout = Readout("shared", self.outputs, self.num_timesteps, self.precision, name="readout")
        out = readout(x.astype(exact.dtype), jnp.broadcast_to(t.reshape(-1, 1, 1), x.shape[:-1]), (num_channels,))
        return tuple(o.reshape(x_t.shape) for o in out)

    def inputs(self, x: Array, log_snr: Array) -> Array:
        """The state, in two parts where the inner precision holds it only in two, and its sines and cosines."""
        parts = [x]
        if self.dtype is not None:
            parts.append(x - x.astype(self.dtype).astype(x.dtype))
        # x_0 | x_t under a flat prior: x_t / √ᾱ with variance 1/SNR
        x_0, variance = (a[:, None, None, None] for a in (jax.lax.rsqrt(jax.nn.sigmoid(log_snr)), jnp.exp(-log_snr)))
        for k in self.frequencies:
            omega = math.pi * 2.0**k
            seen = jnp.exp(-0.5 * omega**2 * variance)
            parts += [seen * jnp.sin(omega * x_0 * x), seen * jnp.cos(omega * x_0 * x)]
        return jnp.concatenate(parts, -1)

    def _time(self, log_snr: Array, context: list[Array]) -> Array:
        """Log-SNR and covariates as features, one row per image."""
        level = log_snr[:, None] / 8
        features = jnp.concatenate([level, sinusoids(level, 4), *context], -1)
        activation, width = getattr(jax.nn, self.activation), 4 * self.channels[0]
        for _ in range(2):
            features = activation(nn.Dense(width, precision=self.precision)(features))
        return features

    def _blocks(self, x: Array, time: Array, depth: int) -> Array:
        for _ in range(self.num_blocks):
            x = Block(self.num_groups, self.activation, self.precision)(x, time)
            if len(self.channels) - depth <= self.attention_levels:
                x = Attention(self.num_groups, self.precision)(x)
        return x

    def _conv(self, features: int) -> Convolution:
        return Convolution(features, dtype=self.dtype, precision=self.precision)

    def _dense(self, features: int) -> Convolution:
        return Convolution(features, size=1, dtype=self.dtype, precision=self.precision)


class Normalised(nn.Module):
    """Group normalisation with a learned scale and shift per channel, which may also depend on the image.

    Its moments are those of channels first and of groups after, so that one pass over the pixels finds them.
    """

    num_groups: int

    @nn.compact
    def __call__(self, x: Array, scale: Array | None = None, shift: Array | None = None) -> Array:
        channels = x.shape[-1]
        groups = math.gcd(self.num_groups, channels)
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        moments = [a.reshape(len(x), groups, -1).mean(-1) for a in (exact.mean((1, 2)), (exact**2).mean((1, 2)))]
        inverse = jax.lax.rsqrt(jnp.maximum(moments[1] - moments[0] ** 2, 0) + 1e-5)
        mean, inverse = (jnp.repeat(a, channels // groups, -1) for a in (moments[0], inverse))
        slope = inverse * self.param("scale", nn.initializers.ones, (channels,))
        if scale is not None:
            slope = slope * (1 + scale)
        offset = self.param("bias", nn.initializers.zeros, (channels,)) - mean * slope
        if shift is not None:
            offset = offset + shift
        return (exact * slope[:, None, None] + offset[:, None, None]).astype(x.dtype)


class Block(nn.Module):
    """Two convolutions of normalised channels, added to the input; at the start, nothing is added."""

    num_groups: int
    activation: str
    precision: str | None

    @nn.compact
    def __call__(self, x: Array, time: Array) -> Array:
        activation, channels = getattr(jax.nn, self.activation), x.shape[-1]
        told = nn.Dense(2 * channels, kernel_init=nn.initializers.zeros, precision=self.precision)(time)
        h = Convolution(channels, precision=self.precision)(activation(Normalised(self.num_groups)(x)))
        h = activation(Normalised(self.num_groups)(h, *jnp.split(told, 2, -1)))
        return x + Convolution(channels, precision=self.precision, kernel_init=nn.initializers.zeros)(h)


class Attention(nn.Module):
    """Self-attention over the pixels, heads of about 64 channels, added to the input; at the start, nothing is."""

    num_groups: int
    precision: str | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rows, height, width, channels = x.shape
        heads = math.gcd(max(1, channels // 64), channels)
        qkv = Convolution(3 * channels, size=1, precision=self.precision)(Normalised(self.num_groups)(x))
        qkv = qkv.reshape(rows, height * width, 3, heads, channels // heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        score = jnp.einsum("bqhc,bkhc->bhqk", query, key, precision=self.precision) / math.sqrt(channels // heads)
        share = jax.nn.softmax(score.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", share, value, precision=self.precision).reshape(x.shape)
        return x + Convolution(channels, size=1, precision=self.precision, kernel_init=nn.initializers.zeros)(mixed)
