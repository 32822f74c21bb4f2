"""Figures: draws beside data, tables by pairs of columns, images, the paper's figure 1, losses, entropies, likelihoods.

Each returns its matplotlib figure, which a notebook shows whether pyplot has been imported or not. Each draws on axes
of your own where they are given: ``ax``, or ``axes`` of those that have several panels.
"""

from pp_diffusion.plotting.draws import images as images
from pp_diffusion.plotting.draws import pairs as pairs
from pp_diffusion.plotting.draws import samples as samples
from pp_diffusion.plotting.draws import trajectories as trajectories
from pp_diffusion.plotting.likelihoods import convergence as convergence
from pp_diffusion.plotting.likelihoods import entropies as entropies
from pp_diffusion.plotting.likelihoods import pareto_k as pareto_k
from pp_diffusion.plotting.losses import loss_by_time as loss_by_time
from pp_diffusion.plotting.losses import losses as losses

__all__ = [
    "convergence",
    "entropies",
    "images",
    "loss_by_time",
    "losses",
    "pairs",
    "pareto_k",
    "samples",
    "trajectories",
]
