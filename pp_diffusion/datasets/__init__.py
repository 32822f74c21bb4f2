"""Data for the examples: generated ones with their exact densities, and real ones, read from the user's folder."""

from pp_diffusion.datasets.batches import draw_rows as draw_rows
from pp_diffusion.datasets.batches import random_crops as random_crops
from pp_diffusion.datasets.batches import random_flips as random_flips
from pp_diffusion.datasets.batches import random_patches as random_patches
from pp_diffusion.datasets.binarized_mnist import binarized_mnist as binarized_mnist
from pp_diffusion.datasets.cifar10 import cifar10 as cifar10
from pp_diffusion.datasets.dataset import Dataset as Dataset
from pp_diffusion.datasets.dead_leaves import dead_leaves as dead_leaves
from pp_diffusion.datasets.digits import dequantize as dequantize
from pp_diffusion.datasets.digits import digits as digits
from pp_diffusion.datasets.heartbeat import heartbeat as heartbeat
from pp_diffusion.datasets.image_folder import image_folder as image_folder
from pp_diffusion.datasets.mnist import mnist as mnist
from pp_diffusion.datasets.swiss_roll import sample_swiss_roll as sample_swiss_roll
from pp_diffusion.datasets.swiss_roll import swiss_roll as swiss_roll

__all__ = [
    "Dataset",
    "binarized_mnist",
    "cifar10",
    "dead_leaves",
    "dequantize",
    "digits",
    "draw_rows",
    "heartbeat",
    "image_folder",
    "mnist",
    "random_crops",
    "random_flips",
    "random_patches",
    "sample_swiss_roll",
    "swiss_roll",
]
