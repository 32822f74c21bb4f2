"""Multi-scale convolutions, the paper's network for images."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.networks.convolution import Convolution
from pp_diffusion.networks.features import context_features
from pp_diffusion.networks.images import as_images, mean_pool, pad_to_multiple, repeat_pixels
from pp_diffusion.networks.readout import Readout


class MultiScaleConv(nn.Module):
    r"""The paper's network for images (appendix D.2): convolutions at several scales, beside them a dense path, then
    layers that act on each pixel, and a readout that alone depends on time.

    A multi-scale convolution pools the image to ``num_scales`` resolutions by means, each half of the one before,
    convolves each, brings all to full resolution, sums them, and takes :math:`\log(1 + e^x)`. The dense path is layers
    of tanh over the whole image, of which the last gives each pixel ``dense_features`` numbers. What both say of a
    pixel goes through layers of tanh that all pixels share. These end in J coefficients for each output of a pixel,
    which softmax-normalised bumps over time mix (eqs. 62–63): the layers below do not see t.

    Without the dense path all of it is convolutional: trained on patches, its parameters serve images of any size.
    The event has the shape ``(height, width)`` or ``(height, width, channels)``; sizes that do not halve often enough
    are padded with zeros. ``parameterization="paper"`` is that of eqs. 64–65; any other goes with it too.

    The authors' published code differs from the paper: there bumps are half as wide (``bump_width=0.5``) and ten, units
    are leaky and rectified, each scale goes through its own before the sum, and there is one scale unless asked
    otherwise. J and the layers' sizes are not in the paper. ``context``, covariates that all pixels are told, is ours.

    :param tuple features: channels of each multi-scale convolution, in order; none with ``()``, for the dense path
        alone.
    :param int num_scales: resolutions in each of them.
    :param int size: of the kernels' sides, odd.
    :param tuple dense_units: widths of the layers over the whole image; no such path with ``()``.
    :param int dense_features: numbers that the dense path gives each pixel.
    :param tuple pixel_units: widths of the layers that act on each pixel.
    :param int num_bumps: J.
    :param float bump_width: w, in units of the bumps' spacing.
    :param dtype: to compute the convolutions in, such as ``"bfloat16"``; all else stays in full precision.
    :param precision: of the products; full float32 unless asked otherwise, because less changes K.
    :param num_timesteps: T, set by :class:`~pp_diffusion.Diffusion`.
    :param outputs: a link per output, set by :class:`~pp_diffusion.Diffusion`.

    .. doctest::

        >>> import jax, pp_diffusion as ppd
        >>> network = ppd.networks.MultiScaleConv(features=(8,), pixel_units=(8,))
        >>> diffusion, larger = (
        ...     ppd.Diffusion(
        ...         ppd.GaussianKernel(shape), ppd.FixedSchedule.log_linear(10), network, parameterization="paper"
        ...     )
        ...     for shape in ((8, 8), (12, 20))
        ... )
        >>> prior = larger.prior(diffusion.init_params(jax.random.key(0)))
        >>> prior.sample(jax.random.key(1), (2,)).shape
        (2, 12, 20)
    """

    features: tuple[int, ...] = (32, 32, 32)
    num_scales: int = 3
    size: int = 3
    dense_units: tuple[int, ...] = ()
    dense_features: int = 2
    pixel_units: tuple[int, ...] = (64, 64)
    num_bumps: int = 10
    bump_width: float = 1.0
    dtype: str | None = None
    precision: str | None = "highest"
    num_timesteps: int | None = None
    outputs: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x_t: Array, t: Array, context: Any = None) -> tuple[Array, ...]:
        self._check()
        images = as_images(x_t, t.ndim)
        rows, height, width, num_channels = images.shape
        covariates = [c.reshape(rows, -1) for c in context_features(context, t)]
        parts = [images]
        if self.features:
            x = pad_to_multiple(images.astype(self.dtype or images.dtype), 2 ** (self.num_scales - 1))
            for features in self.features:
                x = self._multi_scale(x, features)
            parts.append(x[:, :height, :width].astype(images.dtype))
        if self.dense_units:
            hidden = jnp.concatenate([images.reshape(rows, -1), *covariates], -1)
            for units in (*self.dense_units, height * width * self.dense_features):
                hidden = jnp.tanh(nn.Dense(units, precision=self.precision)(hidden))
            parts.append(hidden.reshape(rows, height, width, self.dense_features))
        parts += [jnp.broadcast_to(c[:, None, None], (rows, height, width, c.shape[-1])) for c in covariates]
        x = jnp.concatenate(parts, -1)
        for units in self.pixel_units:
            x = jnp.tanh(nn.Dense(units, precision=self.precision)(x))
        readout = Readout(
            "bumps",
            self.outputs,
            self.num_timesteps,
            self.precision,
            num_bumps=self.num_bumps,
            bump_width=self.bump_width,
            name="readout",
        )
        out = readout(x, jnp.broadcast_to(t.reshape(-1, 1, 1), x.shape[:-1]), (num_channels,))
        return tuple(o.reshape(x_t.shape) for o in out)

    def _multi_scale(self, x: Array, features: int) -> Array:
        """Pools, convolves, brings back, sums; in Horner's manner, from the lowest resolution up."""
        pyramid = [x]
        for _ in range(self.num_scales - 1):
            pyramid.append(mean_pool(pyramid[-1]))
        lowest, *others = reversed(pyramid)
        total = self._convolution(features)(lowest)
        for level in others:
            total = self._convolution(features)(level) + repeat_pixels(total)
        return jax.nn.softplus(total)

    def _convolution(self, features: int) -> Convolution:
        # of the sum of all scales, that of He for units that let half of the variance through
        init = nn.initializers.variance_scaling(2 / self.num_scales, "fan_in", "truncated_normal")
        return Convolution(features, size=self.size, dtype=self.dtype, precision=self.precision, kernel_init=init)

    def _check(self) -> None:
        if not (self.features or self.dense_units):
            raise ValueError("features or dense_units must hold at least one width; both are ()")
        widths = (*self.features, *self.dense_units, *self.pixel_units)
        for name, value in (("num_scales", self.num_scales), ("num_bumps", self.num_bumps)):
            if value < 1:
                raise ValueError(f"{name} must be positive; got {value}")
        if min(*widths, self.dense_features) < 1:
            raise ValueError(f"all widths must be positive; got {widths} and dense_features={self.dense_features}")
        if not (self.bump_width > 0 and math.isfinite(self.bump_width)):
            raise ValueError(f"bump_width must be positive; got {self.bump_width}")
