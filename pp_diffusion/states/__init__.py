"""State spaces: what particles of a kernel's states can be asked, and what they are drawn from."""

from pp_diffusion.states.bits import Bits as Bits
from pp_diffusion.states.continuous import Continuous as Continuous
from pp_diffusion.states.finite import Finite as Finite
from pp_diffusion.states.space import StateSpace as StateSpace
from pp_diffusion.states.space import Words as Words
