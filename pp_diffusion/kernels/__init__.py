"""Markov diffusion kernels, one file each."""

from pp_diffusion.kernels.base import Kernel as Kernel
from pp_diffusion.kernels.binomial import BinomialKernel as BinomialKernel
from pp_diffusion.kernels.gaussian import GaussianKernel as GaussianKernel
