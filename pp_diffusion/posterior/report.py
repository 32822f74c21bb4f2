"""The outcome of a run of SMC: evidences, draws, words, and ArviZ's groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.handlers import seed
from numpyro.infer import log_likelihood

from pp_diffusion import inference_data
from pp_diffusion.posterior import latents as other_latents
from pp_diffusion.posterior.factors import Factors, Latents
from pp_diffusion.posterior.outcome import Outcome, dataset, independent_draws
from pp_diffusion.posterior.particles import gather, systematic
from pp_diffusion.posterior.smc import Sampler, SMCInfo, SMCState
from pp_diffusion.posterior.verdicts import Findings, Plain


class Run(Outcome):
    """The outcome of a run.

    :param sampler: what was run.
    :param state: the particles at t = 0.
    :param infos: what happened at t = 0…T, in this order.
    :param model: the user's model with its arguments bound.
    :param plain: a second estimate of the evidence.
    """

    def __init__(
        self, sampler: Sampler, state: SMCState, infos: SMCInfo, model: Callable[[], Any], plain: Plain | None
    ) -> None:
        self.sampler, self.state, self.model = sampler, state, model
        self.infos: SMCInfo = jax.tree.map(np.asarray, infos)
        findings = Findings(
            log_evidences=np.asarray(state.log_evidence, np.float64),
            final_ess=self.infos.ess[0],
            least_ess=self.infos.ess.min(0),
            independent_draws=np.asarray(independent_of(state), np.float64),
            num_particles=len(state.log_weights),
            plain=plain,
        )
        super().__init__(findings, sampler.factors.systems)

    @property
    def advice(self) -> str:
        return "take more particles or another twist, or NUTS with pp_diffusion.TrajectoryReparam"

    @property
    def ess(self) -> np.ndarray:
        """At t = T…0, shape ``(T + 1, num_chains, *systems)``."""
        return self._per_step("ess")

    @property
    def rules(self) -> dict[str, str]:
        """Per observed site, the form that the twist gives it."""
        return self.sampler.twist.rules(self.sampler.factors)

    def check(self) -> None:
        """Refuses an outcome in which r itself was unusable.

        :raises FloatingPointError: if r is NaN or infinite at a draw.
        :raises ValueError: if r is zero at every particle.
        """
        names = ", ".join(repr(site.name) for site in self.sampler.factors.observed)
        if bad := int(self.infos.num_unguided[0].sum()):
            raise FloatingPointError(
                f"the model's likelihood is NaN or infinite at {bad} of {self.state.log_weights.size} draws of x; it "
                f"is that of the sites {names}"
            )
        if np.isneginf(self.log_evidences).all(0).any():
            raise ValueError(f"the model's likelihood is zero at every particle; it is that of the sites {names}")

    # --- draws -------------------------------------------------------------------------------------------------

    def samples(self, group_by_chain: bool) -> dict[str, Array]:
        """All latent and deterministic sites, in data units; see :meth:`SMC.get_samples`."""
        factors, state = self.sampler.factors, self.state
        if not group_by_chain:
            x, latents = pooled(state)
            return {name: value[:, 0] for name, value in _constrain(factors, x, latents).items()}
        if dead := self.dead_chains:
            raise RuntimeError(
                f"chains {dead} have no draws: the likelihood is zero at all of their particles. Take more "
                "particles, or the draws of the other chains by group_by_chain=False"
            )
        found = _constrain(factors, state.x, state.latents)
        return {name: jnp.moveaxis(value, 0, 1) for name, value in found.items()}

    # --- words -------------------------------------------------------------------------------------------------

    def in_words(self) -> str:
        """How far the particles can be trusted."""
        infos, many = self.infos, math.prod(self.shape)
        final, least = infos.ess[0], infos.ess.min(0)
        found = "; ".join(f"{name}: {rule}" for name, rule in self.rules.items())
        ancestors = [
            len(np.unique(column)) for column in np.asarray(self.state.lineage).reshape(self.num_particles, -1).T
        ]
        lines = [
            self.evidence_in_words(),
            f"{self.num_particles} particles in {many} system{'s' if many > 1 else ''}; effective at the end: "
            f"{final.min():.1f} (least of all steps: {least.min():.1f}); "
            f"resampled {infos.resampled[1:].sum(0).mean():.1f} times",
            f"twist {self.sampler.twist.name!r}: {found}",
            f"the draws descend from {min(ancestors)} particles at t = T, in the system with the fewest",
        ]
        if unguided := int(infos.num_unguided[1:].sum()):
            lines.append(f"the likelihood was not finite at {unguided} predictions of x, which were left unguided")
        if dead := self.dead_chains:
            lines.append(f"the likelihood is zero at all particles of the chains {dead}")
        if infos.moved.any():
            lines.append(f"moves of other latents accepted: {infos.acceptance[infos.moved].mean():.2f}")
        lines.append(self.verdict_in_words())
        return "\n".join(lines)

    # --- ArviZ -------------------------------------------------------------------------------------------------

    def to_arviz(self, dims: Mapping[str, list[str]], coords: Mapping[str, Any]) -> Any:
        """See :meth:`SMC.to_arviz`."""
        samples, factors = self.samples(group_by_chain=True), self.sampler.factors
        grouped = partial(dataset, dims=dims, coords=coords)
        groups = {
            "posterior": grouped(samples, ["chain", "draw"]),
            "sample_stats": self._sample_stats(),
            "observed_data": grouped(factors.observed_values(), []),
        }
        noisy = {site.name for site in factors.observed if site.kind.has_log_likelihood}
        if noisy:
            seeded = seed(self.model, jax.random.key(0))  # for latents that no observation depends on
            found = log_likelihood(seeded, dict(samples), batch_ndims=2, parallel=True)
            groups["log_likelihood"] = grouped({n: v for n, v in found.items() if n in noisy}, ["chain", "draw"])
        attrs = {"units": "nats", "twist": self.sampler.twist.name, "inference_library": "pp_diffusion"}
        return inference_data.inference_data(groups, attrs)

    def _sample_stats(self) -> Any:
        import xarray

        systems = [f"system_dim_{i}" for i in range(len(self.shape) - 1)]
        log_weights = np.asarray(self.state.log_weights).reshape(self.num_particles, *self.shape)
        variables = {
            "log_weight": (["chain", "draw", *systems], np.moveaxis(log_weights, 0, 1)),
            "log_evidence": (["chain", *systems], self.log_evidences),
        }
        for name in ("ess", "resampled"):
            variables[name] = (["chain", "step", *systems], np.moveaxis(self._per_step(name), 0, 1))
        steps = np.arange(len(self.infos.ess))[::-1]
        index = {"chain": np.arange(self.num_chains), "draw": np.arange(self.num_particles), "step": steps}
        return xarray.Dataset(variables, index)

    def _per_step(self, name: str) -> np.ndarray:
        return getattr(self.infos, name).reshape(-1, *self.shape)[::-1]


@jax.jit
def _constrain(factors: Factors, x: Array, latents: Latents) -> dict[str, Array]:
    return other_latents.constrain(factors, x, latents)


@jax.jit
def pooled(state: SMCState) -> tuple[Array, Latents]:
    """All chains' particles as one, drawn in proportion to the chains' evidence."""
    chains = state.log_weights.shape[1]
    if chains == 1:
        return state.x, state.latents

    def pool(a: Array) -> Array:
        return jnp.moveaxis(a, 1, 0).reshape(-1, 1, *a.shape[2:])

    weights = pool(jnp.broadcast_to(state.log_evidence, state.log_weights.shape))
    key = jax.random.fold_in(state.rng_key, 1)
    return gather(systematic(key, weights), jax.tree.map(pool, (state.x, state.latents)))


def independent_of(state: SMCState) -> Array:
    """In each chain; infinite with one."""
    if state.log_weights.shape[1] == 1:
        return jnp.full(state.log_evidence.shape[1:], jnp.inf)
    kept = [state.x, *(u for u in state.latents.values() if jnp.issubdtype(u.dtype, jnp.floating))]
    return independent_draws(jnp.concatenate([a.reshape(*a.shape[:3], -1) for a in kept], -1))
