"""Data for the examples: generated ones with their exact densities, and scikit-learn's real digits."""

from pp_diffusion.datasets.dataset import Dataset as Dataset
from pp_diffusion.datasets.digits import dequantize as dequantize
from pp_diffusion.datasets.digits import digits as digits
from pp_diffusion.datasets.heartbeat import heartbeat as heartbeat
from pp_diffusion.datasets.swiss_roll import sample_swiss_roll as sample_swiss_roll
from pp_diffusion.datasets.swiss_roll import swiss_roll as swiss_roll

__all__ = ["Dataset", "dequantize", "digits", "heartbeat", "sample_swiss_roll", "swiss_roll"]
