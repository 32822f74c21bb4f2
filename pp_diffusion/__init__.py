"""Diffusion probabilistic models as NumPyro programs: learn a density, judge it, use it as a prior.

From data to a posterior:

    diffusion = ppd.Diffusion(kernel, schedule, network, transform=ppd.standardize(x))
    fit = ppd.fit(rng_key, diffusion, x)                      # by NumPyro's SVI, on the bound K
    prior = fit.prior                                         # a numpyro.distributions.Distribution
    ppd.lower_bound(rng_key, prior, x).print_summary()        # K per datum, in nats and bits
    ppd.estimate_log_prob(rng_key, prior, x, 256).print_summary()  # log p, its error, and whether to believe it
    smc = ppd.SMC(model, num_particles=1024)                  # of a model with numpyro.sample("x", prior)
    smc.run(rng_key, y); smc.get_samples(); smc.log_evidence

Parts: ``GaussianKernel`` (numbers) and ``BinomialKernel`` (bits); ``FixedSchedule`` and ``LearnedSchedule``;
``networks`` (MLP, UNet, ...), or any callable; ``standardize``, ``whiten``, ``transform_to``.
Judging: ``lower_bound``, ``estimate_log_prob``, ``entropy_bounds``, ``reverse_entropy``; ``plotting``; ``units``.
For NUTS and SVI: ``diffusion.flow(params)``, a density; ``FlowReparam``, ``TrajectoryReparam``; ``solvers``.
Posteriors and evidences: ``SMC``, ``ParticleGibbs``, ``TemperedSMC``, ``amortize``, ``trust``, ``compare_evidence``;
``perturb``, the paper's own composition.
Files: ``save``, ``load``, ``load_fit``. Example data: ``datasets``. ``python -m pp_diffusion`` prints versions.
"""

from types import ModuleType as _ModuleType

from pp_diffusion import datasets as datasets
from pp_diffusion import networks as networks
from pp_diffusion import plotting as plotting
from pp_diffusion import solvers as solvers
from pp_diffusion import units as units
from pp_diffusion.bounds import Bound as Bound
from pp_diffusion.bounds import LowerBound as LowerBound
from pp_diffusion.bounds import lower_bound as lower_bound
from pp_diffusion.covariates import Covariates as Covariates
from pp_diffusion.diffusion import Diffusion as Diffusion
from pp_diffusion.divergence import Hutchinson as Hutchinson
from pp_diffusion.entropies import EntropyBounds as EntropyBounds
from pp_diffusion.entropies import ReverseEntropy as ReverseEntropy
from pp_diffusion.entropies import entropy_bounds as entropy_bounds
from pp_diffusion.entropies import reverse_entropy as reverse_entropy
from pp_diffusion.flow import DiffusionFlow as DiffusionFlow
from pp_diffusion.flow import FlowCheck as FlowCheck
from pp_diffusion.kernels import BinomialKernel as BinomialKernel
from pp_diffusion.kernels import GaussianKernel as GaussianKernel
from pp_diffusion.kernels import Kernel as Kernel
from pp_diffusion.last_step import Discretized as Discretized
from pp_diffusion.likelihood import LogProbEstimate as LogProbEstimate
from pp_diffusion.likelihood import estimate_log_prob as estimate_log_prob
from pp_diffusion.objectives import log_weight as log_weight
from pp_diffusion.posterior.amortized import Amortized as Amortized
from pp_diffusion.posterior.amortized import AmortizedSMC as AmortizedSMC
from pp_diffusion.posterior.amortized import amortize as amortize
from pp_diffusion.posterior.api import SMC as SMC
from pp_diffusion.posterior.comparison import EvidenceComparison as EvidenceComparison
from pp_diffusion.posterior.comparison import compare_evidence as compare_evidence
from pp_diffusion.posterior.costs import CostWarning as CostWarning
from pp_diffusion.posterior.flow_reparam import FlowReparam as FlowReparam
from pp_diffusion.posterior.particle_gibbs import ParticleGibbs as ParticleGibbs
from pp_diffusion.posterior.perturb import perturb as perturb
from pp_diffusion.posterior.reparam import TrajectoryReparam as TrajectoryReparam
from pp_diffusion.posterior.tempered import TemperedSMC as TemperedSMC
from pp_diffusion.posterior.trust import Trust as Trust
from pp_diffusion.posterior.trust import trust as trust
from pp_diffusion.posterior.verdicts import CollapseWarning as CollapseWarning
from pp_diffusion.prior import ConditionalPrior as ConditionalPrior
from pp_diffusion.prior import DiffusionPrior as DiffusionPrior
from pp_diffusion.reverse import ReverseProcess as ReverseProcess
from pp_diffusion.rules import Parameterization as Parameterization
from pp_diffusion.saving import load as load
from pp_diffusion.saving import save as save
from pp_diffusion.schedules import FixedSchedule as FixedSchedule
from pp_diffusion.schedules import LearnedSchedule as LearnedSchedule
from pp_diffusion.schedules import Rates as Rates
from pp_diffusion.schedules import Schedule as Schedule
from pp_diffusion.training.fit import FitResult as FitResult
from pp_diffusion.training.fit import NonFiniteLossError as NonFiniteLossError
from pp_diffusion.training.fit import fit as fit
from pp_diffusion.training.fit import load_fit as load_fit
from pp_diffusion.training.validation import Validation as Validation
from pp_diffusion.trajectories import ForwardTrajectory as ForwardTrajectory
from pp_diffusion.trajectories import PosteriorTrajectory as PosteriorTrajectory
from pp_diffusion.trajectories import ReverseTrajectory as ReverseTrajectory
from pp_diffusion.transforms import UniformBlocks as UniformBlocks
from pp_diffusion.transforms import standardize as standardize
from pp_diffusion.transforms import transform_to as transform_to
from pp_diffusion.transforms import whiten as whiten
from pp_diffusion.version import __version__ as __version__
from pp_diffusion.weights import Importance as Importance

_MODULES = ("datasets", "networks", "plotting", "solvers", "units")


def __dir__() -> list[str]:
    """The public names: other modules, imported on the way, are no part of them."""
    names = (name for name, value in globals().items() if not isinstance(value, _ModuleType) or name in _MODULES)
    return sorted(name for name in names if not name.startswith("_") or name == "__version__")
