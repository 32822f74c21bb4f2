"""Sequential Monte Carlo as pure functions, and their façade; see :mod:`pp_diffusion.posterior.smc`."""

from pp_diffusion.posterior.api import SMC as SMC
from pp_diffusion.posterior.smc import Sampler as Sampler
from pp_diffusion.posterior.smc import SMCInfo as SMCInfo
from pp_diffusion.posterior.smc import SMCState as SMCState
from pp_diffusion.posterior.smc import finish as finish
from pp_diffusion.posterior.smc import init as init
from pp_diffusion.posterior.smc import step as step
