"""Diffusion probabilistic models as NumPyro programs."""

from pp_diffusion import datasets as datasets
from pp_diffusion import networks as networks
from pp_diffusion import plotting as plotting
from pp_diffusion import units as units
from pp_diffusion.bounds import Bound as Bound
from pp_diffusion.bounds import LowerBound as LowerBound
from pp_diffusion.bounds import lower_bound as lower_bound
from pp_diffusion.checkpoint import load as load
from pp_diffusion.checkpoint import save as save
from pp_diffusion.diffusion import Diffusion as Diffusion
from pp_diffusion.fit import FitResult as FitResult
from pp_diffusion.fit import NonFiniteLossError as NonFiniteLossError
from pp_diffusion.fit import fit as fit
from pp_diffusion.kernels import BinomialKernel as BinomialKernel
from pp_diffusion.kernels import GaussianKernel as GaussianKernel
from pp_diffusion.kernels import Kernel as Kernel
from pp_diffusion.likelihood import Importance as Importance
from pp_diffusion.parameterizations import Parameterization as Parameterization
from pp_diffusion.prior import DiffusionPrior as DiffusionPrior
from pp_diffusion.reverse import ReverseProcess as ReverseProcess
from pp_diffusion.schedules import FixedSchedule as FixedSchedule
from pp_diffusion.schedules import LearnedSchedule as LearnedSchedule
from pp_diffusion.schedules import Rates as Rates
from pp_diffusion.schedules import Schedule as Schedule
from pp_diffusion.trajectories import ForwardTrajectory as ForwardTrajectory
from pp_diffusion.trajectories import PosteriorTrajectory as PosteriorTrajectory
from pp_diffusion.trajectories import ReverseTrajectory as ReverseTrajectory
from pp_diffusion.trajectories import log_weight as log_weight
from pp_diffusion.transforms import standardize as standardize

__version__ = "0.1.0"
