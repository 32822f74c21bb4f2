"""Stock networks, as linen modules: hashable, shaped by their first input, without state.

Each is called as ``network(x_t, t, log_snr=..., context=...)`` and returns one array of the state's shape per output.
``num_timesteps`` and ``outputs`` are filled in by :class:`~pp_diffusion.Diffusion`.
"""

from pp_diffusion.networks.embedded import Embedded as Embedded
from pp_diffusion.networks.entrywise import Entrywise as Entrywise
from pp_diffusion.networks.mlp import MLP as MLP
from pp_diffusion.networks.multi_scale import MultiScaleConv as MultiScaleConv
from pp_diffusion.networks.rbf import RBF as RBF
from pp_diffusion.networks.unet import UNet as UNet

__all__ = ["MLP", "RBF", "Embedded", "Entrywise", "MultiScaleConv", "UNet"]
