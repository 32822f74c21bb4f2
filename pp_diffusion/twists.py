"""Twists, as :class:`pp_diffusion.SMC` takes them; see :mod:`pp_diffusion.posterior.twists`."""

from pp_diffusion.posterior.twists import TWISTS as TWISTS
from pp_diffusion.posterior.twists import Custom as Custom
from pp_diffusion.posterior.twists import Lookahead as Lookahead
from pp_diffusion.posterior.twists import Moment as Moment
from pp_diffusion.posterior.twists import Power as Power
from pp_diffusion.posterior.twists import Twist as Twist
from pp_diffusion.posterior.twists import as_twist as as_twist
from pp_diffusion.posterior.twists import likelihood as likelihood
from pp_diffusion.states.space import Guided as Guided
from pp_diffusion.states.space import Prediction as Prediction
