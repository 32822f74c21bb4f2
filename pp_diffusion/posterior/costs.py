"""What a run of SMC will cost, said before it starts, and where another sampler is the way."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

from pp_diffusion.posterior.factors import Factors
from pp_diffusion.posterior.messages import in_words
from pp_diffusion.states.continuous import MOST_ROWS

#: Fewer rows that share latents are no matter.
LEAST_ROWS = 5
#: Particles for each row and each number that rows share, below which they are too few.
LEAST_PARTICLES = 20
#: Network calls of a single row above which a run takes minutes on a CPU.
MOST_CALLS = 1e8


class CostWarning(UserWarning):
    """A model that SMC's particles are not for, because rows share latents; it names the samplers that are."""


class Cost(NamedTuple):
    """Of a run, before it starts.

    :ivar rows: the x that make up one system: each particle is of all of them at once.
    :ivar size: the numbers of one system's x.
    :ivar shared: the names of the other latents.
    :ivar num_shared: how many numbers these are.
    :ivar num_particles: of each system.
    :ivar network_calls: of a single row, with those for the gradients of what is observed: one for each number, up to
        x's own size, through all rows.
    """

    rows: int
    size: int
    shared: tuple[str, ...]
    num_shared: int
    num_particles: int
    network_calls: int

    @classmethod
    def of(cls, factors: Factors, num_particles: int, num_chains: int) -> Cost:
        """As the model that was read tells it."""
        systems = factors.reader.systems
        rows, size = math.prod(systems.batch_shape[1:]), systems.state_size
        shared = tuple(site.name for site in factors.latents)
        numbers = {name: math.prod(shape) for name, shape, _ in factors.reader.shapes}
        calls = num_particles * num_chains * systems.number * rows * factors.prior.num_timesteps
        gradients = min(factors.num_rows, size, MOST_ROWS)
        num_shared = sum(numbers[name] for name in shared) // systems.number
        return cls(rows, size, shared, num_shared, num_particles, calls * (1 + gradients))

    @property
    def complaint(self) -> str:
        """What speaks against the run, in words; empty for nothing."""
        if not self.shared or self.rows < LEAST_ROWS:
            return ""
        needed = LEAST_PARTICLES * self.rows * self.num_shared
        if self.num_particles < needed:
            return f"it takes {needed} particles or more, and there are {self.num_particles}"
        return f"it takes {self.network_calls:.0e} network calls" if self.network_calls > MOST_CALLS else ""

    def warn(self) -> None:
        """Says so, and which samplers do."""
        if self.complaint:
            warnings.warn(
                f"{self.rows} rows of x share the latents {in_words(self.shared)}, so that SMC's particles are of all "
                f"rows at once, {self.size} numbers: {self.complaint}. pp_diffusion.ParticleGibbs(model) draws row by "
                "row; so does NUTS, of the same network as a flow, diffusion.flow(params), with "
                "pp_diffusion.FlowReparam",
                CostWarning,
                stacklevel=3,
            )
