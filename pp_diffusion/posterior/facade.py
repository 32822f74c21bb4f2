"""What the samplers of a model's latents share: an outcome with draws of all sites, and the façade over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.handlers import seed
from numpyro.infer import log_likelihood

from pp_diffusion import inference_data
from pp_diffusion.checks import positive_int
from pp_diffusion.posterior.outcome import Outcome, dataset, independent_draws, print_moments
from pp_diffusion.posterior.particles import ess, gather, log_mean, systematic
from pp_diffusion.posterior.verdicts import BELIEVABLE, Findings, Plain


class LatentRun(Outcome):
    """The outcome of a run; all arrays have the chains in front.

    :param position: the particles of equal weights, as vectors, shape ``(C, P, n)``.
    :param log_evidence: per chain.
    :param final_ess, least_ess: of the draws, and the least of all steps.
    :param samples: all latent and deterministic sites.
    :param observed: what was observed.
    :param model: the user's model with its arguments bound.
    :param plain: a second estimate of the evidence, by draws of the prior; ``None`` without.
    :param pool_key: for the draws of all chains.
    """

    def __init__(
        self,
        position: Array,
        log_evidence: Array,
        final_ess: Array,
        least_ess: Array,
        samples: dict[str, Array],
        observed: dict[str, Array],
        model: Callable[[], Any],
        plain: Plain | None,
        pool_key: Array,
    ) -> None:
        self.by_chain, self.observed, self.model, self.pool_key = samples, observed, model, pool_key
        positions = jnp.moveaxis(position, 0, 1)[:, :, None]
        independent = independent_draws(positions) if len(position) > 1 else np.full(1, np.inf)
        findings = Findings(
            log_evidences=np.asarray(log_evidence, np.float64)[:, None],
            final_ess=np.asarray(final_ess, np.float64)[:, None],
            least_ess=np.asarray(least_ess, np.float64)[:, None],
            independent_draws=np.asarray(independent, np.float64),
            num_particles=position.shape[1],
            plain=plain,
        )
        super().__init__(findings)

    def check(self) -> None:
        """Refuses an outcome without any likelihood.

        :raises ValueError: if r is zero or NaN at every particle.
        """
        if np.isneginf(self.log_evidences).all():
            names = ", ".join(map(repr, self.observed)) or "numpyro.factor"
            raise ValueError(f"the model's likelihood is zero or NaN at every particle; it is that of {names}")

    @property
    def grouped(self) -> dict[str, Array]:
        """Each chain's draws.

        :raises RuntimeError: if there are none of some chain.
        """
        if dead := self.dead_chains:
            raise RuntimeError(f"chains {dead} have no draws: the likelihood is zero at all of their particles")
        return self.by_chain

    @cached_property
    def pooled(self) -> dict[str, Array]:
        """All chains' draws, drawn in proportion to the chains' evidence."""
        each = np.broadcast_to(self.log_evidences[:, None], (self.num_chains, self.num_particles))
        index = systematic(self.pool_key, jnp.asarray(each, float).reshape(-1))
        return gather(index, {n: a.reshape(-1, *a.shape[2:]) for n, a in self.by_chain.items()})

    def in_words(self) -> str:
        """How far the particles can be trusted."""
        return "\n".join([self.evidence_in_words(), self.particles_in_words(), self.verdict_in_words()])

    def particles_in_words(self) -> str:
        """How many there are, and how many were effective."""
        raise NotImplementedError

    def to_arviz(self, dims: Mapping[str, list[str]], coords: Mapping[str, Any]) -> Any:
        """See :meth:`LatentSampler.to_arviz`."""
        grouped = partial(dataset, dims=dims, coords=coords)
        groups = {
            "posterior": grouped(self.grouped, ["chain", "draw"]),
            "sample_stats": grouped({"log_evidence": self.log_evidences}, ["chain"]),
            "observed_data": grouped(self.observed, []),
        }
        if self.observed:
            seeded = seed(self.model, jax.random.key(0))
            found = log_likelihood(seeded, dict(self.by_chain), batch_ndims=2, parallel=True)
            groups["log_likelihood"] = grouped({n: found[n] for n in self.observed}, ["chain", "draw"])
        return inference_data.inference_data(groups, {"units": "nats", "inference_library": "pp_diffusion"})


class LatentSampler:
    """Used like :class:`numpyro.infer.MCMC`; a subclass defines ``run``, which sets the outcome.

    :param num_particles: of each chain.
    :param num_chains: independent runs; from 8 on, their spread gives ``log_evidence_error``.
    """

    def __init__(self, num_particles: int, num_chains: int) -> None:
        self.num_particles = positive_int("num_particles", num_particles)
        self.num_chains = positive_int("num_chains", num_chains)
        self._run: Any = None

    def _keep(self, run: LatentRun) -> None:
        """As the outcome, once it is checked; warns where it collapsed."""
        run.check()
        self._run = run
        run.warn()

    @property
    def _done(self) -> Any:
        if self._run is None:
            raise RuntimeError(f"{type(self).__name__} has no results yet: call run first")
        return self._run

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Array]:
        """Draws of equal weights of all latent and deterministic sites.

        :param group_by_chain: shape ``(num_chains, num_particles, …)``, each chain's own. Otherwise
            ``(num_chains * num_particles, …)``, with the chains drawn from in proportion to their evidence.
        :raises RuntimeError: for the draws of a chain whose particles all have likelihood zero.
        """
        return dict(self._done.grouped if group_by_chain else self._done.pooled)

    @property
    def log_evidence(self) -> float:
        """log ∫ p r, in nats: of the mean of the chains' estimates."""
        return float(self._done.log_evidence)

    @property
    def log_evidences(self) -> np.ndarray:
        """The log of each chain's estimate, nats, shape ``(num_chains,)``."""
        return np.asarray(self._done.log_evidences)

    @property
    def log_evidence_error(self) -> float:
        """Its standard error, nats, by the spread of the chains, so scaled that ±2 of it cover 95 % (Student's t). NaN
        with fewer than 8 chains, and where the run collapsed."""
        return float(self._done.log_evidence_error)

    @property
    def verdict(self) -> str:
        """``"believable"``, ``"doubtful"`` or ``"collapsed"``; :meth:`print_summary` has the reasons."""
        return str(self._done.verdict)

    @property
    def reliable(self) -> bool:
        """Whether the verdict is ``"believable"``."""
        return self.verdict == BELIEVABLE

    @property
    def observed_values(self) -> dict[str, Array]:
        """The values of the observed sites, ``numpyro.factor`` apart."""
        return dict(self._done.observed)

    def print_summary(self, max_rows: int = 20) -> None:
        """Prints the sites' moments and quantiles (the first ``max_rows`` numbers), the evidence, and how far the
        particles can be trusted."""
        print_moments(self.get_samples(), max_rows)
        print(self._done.in_words())

    def to_arviz(self, *, dims: Mapping[str, list[str]] | None = None, coords: Mapping[str, Any] | None = None) -> Any:
        """For ArviZ: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x), in nats, with the groups ``posterior``,
        ``sample_stats`` (``log_evidence`` per chain), ``log_likelihood`` and ``observed_data``.

        :param dims: names of the axes of a variable.
        :param coords: coordinates by the names of axes.
        """
        return self._done.to_arviz(dims or {}, coords or {})


def plain_estimate(log_likelihoods: Array) -> Plain:
    """Of draws of the prior, shape ``(N, 1)``."""
    return Plain.by_weights(log_mean(log_likelihoods), ess(log_likelihoods), len(log_likelihoods))
