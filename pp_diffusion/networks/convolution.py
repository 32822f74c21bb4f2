"""One convolution layer: patches and a matrix product on a CPU, ``lax.conv`` on an accelerator.

XLA's CPU runtime leaves its fast convolution inside compiled loops, and training, samplers and bounds are loops: there
the same layer as patches times a matrix is tens of times faster.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


def convolve(x: Array, kernel: Array, precision: str | None = None) -> Array:
    """Correlates images with a kernel of odd size, zeros around them, by what is fast on JAX's default backend.

    :param x: images, shape ``(batch, height, width, channels)``.
    :param kernel: shape ``(rows, columns, channels, features)``.
    :param precision: of the products.
    :return: shape ``(batch, height, width, features)``.
    """
    by_product = kernel.shape[:2] == (1, 1) or jax.default_backend() == "cpu"
    return (convolve_by_patches if by_product else convolve_by_lax)(x, kernel, precision)


def convolve_by_patches(x: Array, kernel: Array, precision: str | None = None) -> Array:
    """:func:`convolve` as shifted copies of the images, side by side, times a matrix."""
    rows, columns, channels, features = kernel.shape
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *(((size - 1) // 2, size // 2) for size in (rows, columns)), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    patches = jnp.concatenate(shifted, -1).reshape(-1, rows * columns * channels)
    out = jnp.matmul(patches, kernel.reshape(-1, features), precision=precision)
    return out.reshape(*x.shape[:-1], features)


def convolve_by_lax(x: Array, kernel: Array, precision: str | None = None) -> Array:
    """:func:`convolve` by :func:`jax.lax.conv_general_dilated`."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout, precision=precision)


class Convolution(nn.Module):
    """A convolution with a bias; images keep their size.

    :param int features: channels that leave it.
    :param int size: of the kernel's sides, odd.
    :param dtype: to compute in; ``None`` takes the input's.
    :param precision: of the products.
    :param kernel_init: of the kernel; a normal law scaled by the number of inputs, unless given.
    """

    features: int
    size: int = 3
    dtype: str | None = None
    precision: str | None = "highest"
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.size < 1 or self.size % 2 == 0:
            raise ValueError(f"size must be odd; got {self.size}")
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype or x.dtype) for a in (x, kernel, bias))
        return convolve(x, kernel, self.precision) + bias
