"""Nats inside; bits only here, at the reporting edge."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from jax import Array

T = TypeVar("T", float, Array, np.ndarray)


def nats_to_bits(nats: T) -> T:
    """Nats as bits.

    .. doctest::

        >>> from pp_diffusion.units import nats_to_bits
        >>> round(nats_to_bits(1.0), 4)
        1.4427
    """
    return nats / math.log(2)


def bits_to_nats(bits: T) -> T:
    """Bits as nats."""
    return bits * math.log(2)


def bits_per_dim(log_density: T, num_dims: int, bin_width: float = 1.0) -> T:
    r"""The code length of dequantised data, :math:`-(\log_2 p(x) + d \log_2 w)/d`, in bits per dimension.

    Of integer data by ``last_step="discretized"`` it is read off as it is, with w = 1: they have probabilities.

    :param log_density: log p(x) or K, in nats, a density over ``num_dims`` dimensions in the data's units.
    :param num_dims: d, colours counted (a 32×32 RGB image has 3072).
    :param bin_width: w, the width of one level in the data's units; uniform noise of this width must have been added.

    .. doctest::

        >>> from pp_diffusion.units import bits_per_dim
        >>> round(bits_per_dim(-128.0, num_dims=64), 4)  # nats per image of 64 pixels
        2.8854
    """
    return -nats_to_bits(log_density) / num_dims - math.log2(bin_width)
