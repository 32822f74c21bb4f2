"""What a run of SMC will cost, said before it starts, and where another sampler is the way."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

from pp_diffusion.posterior.factors import Factors
from pp_diffusion.posterior.messages import in_words

#: A particle of R rows is worth about as much as one of 2^R is for one row: more rows than the binary logarithm of the
#: particles' number are too many.
LEAST_ROWS = 5


class CostWarning(UserWarning):
    """A model that SMC's particles are not for, because rows share latents; it names the samplers that are."""


class Cost(NamedTuple):
    """Of a run, before it starts.

    :ivar rows: the x that make up one system: each particle is of all of them at once.
    :ivar size: the numbers of one system's state.
    :ivar shared: the names of the latents that couple them.
    :ivar num_particles: of each system.
    :ivar network_calls: of a single x, with all particles, chains, systems and steps.
    """

    rows: int
    size: int
    shared: tuple[str, ...]
    num_particles: int
    network_calls: int

    @classmethod
    def of(cls, factors: Factors, num_particles: int, num_chains: int) -> Cost:
        """As the model that was read tells it."""
        systems = factors.reader.systems
        rows = math.prod(systems.batch_shape[1:])
        calls = num_particles * num_chains * systems.number * rows * factors.prior.num_timesteps
        shared = tuple(site.name for site in factors.latents)
        return cls(rows, systems.state_size, shared, num_particles, calls)

    @property
    def is_too_much(self) -> bool:
        """Whether rows that share latents are more than these particles can carry: at least 5, and more than
        log₂(particles)."""
        return bool(self.shared) and self.rows >= LEAST_ROWS and self.rows > math.log2(self.num_particles)

    def warn(self) -> None:
        """Says so, and which samplers do."""
        if self.is_too_much:
            warnings.warn(
                f"{self.rows} rows of x share the latents {in_words(self.shared)}: a particle is of all of them at "
                f"once, {self.size} numbers, and {self.num_particles} particles carry about "
                f"{math.log2(self.num_particles):.0f} such rows. The run takes {self.network_calls:.1e} network calls "
                "for a row. pp_diffusion.ParticleGibbs(model) draws row by row; so does NUTS, of the same network as a "
                "flow, diffusion.flow(params), with pp_diffusion.FlowReparam",
                CostWarning,
                stacklevel=3,
            )
