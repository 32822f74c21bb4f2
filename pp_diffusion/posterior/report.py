"""The outcome of a run of SMC: evidences, draws, words, and ArviZ's groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import log_likelihood

from pp_diffusion import inference_data
from pp_diffusion.posterior import latents as other_latents
from pp_diffusion.posterior.factors import Factors, Latents
from pp_diffusion.posterior.particles import gather, systematic
from pp_diffusion.posterior.smc import Sampler, SMCInfo, SMCState
from pp_diffusion.posterior.verdicts import (
    BELIEVABLE,
    COLLAPSED,
    DOUBTFUL,
    FEWEST_CHAINS,
    CollapseWarning,
    Findings,
    Plain,
    Verdict,
    evidence_error,
    judge,
)
from pp_diffusion.units import nats_to_bits


class Run:
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
        self.num_particles, self.num_chains = state.log_weights.shape[:2]
        self.shape = (self.num_chains, *sampler.factors.systems)
        self.log_evidences = np.asarray(state.log_evidence, np.float64).reshape(self.shape)
        self.findings = Findings(
            log_evidences=np.asarray(state.log_evidence, np.float64),
            final_ess=self.infos.ess[0],
            least_ess=self.infos.ess.min(0),
            independent_draws=np.asarray(_independent_draws(state), np.float64),
            num_particles=self.num_particles,
            plain=plain,
        )

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each system."""
        return judge(self.findings)

    # --- evidence ----------------------------------------------------------------------------------------------

    @property
    def log_evidence(self) -> np.ndarray:
        """Per system, the log of the mean of the chains' estimates."""
        return np.asarray(np.logaddexp.reduce(self.log_evidences, axis=0) - math.log(self.num_chains))

    @property
    def log_evidence_error(self) -> np.ndarray:
        """Per system; NaN with fewer than eight chains, and where a system collapsed."""
        error = np.where(self.verdict.ravel() == COLLAPSED, np.nan, evidence_error(self.findings))
        return np.asarray(error.reshape(self.shape[1:]))

    @property
    def verdict(self) -> np.ndarray:
        """Per system: ``"believable"``, ``"doubtful"`` or ``"collapsed"``."""
        return np.array([verdict.name for verdict in self.verdicts]).reshape(self.shape[1:])

    @property
    def ess(self) -> np.ndarray:
        """At t = T…0, shape ``(T + 1, num_chains, *systems)``."""
        return self._per_step("ess")

    @property
    def rules(self) -> dict[str, str]:
        """Per observed site, the form that the twist gives it."""
        return self.sampler.twist.rules(self.sampler.factors)

    @property
    def dead_chains(self) -> list[int]:
        """Those with a system whose particles all have likelihood zero."""
        dead = np.isneginf(self.log_evidences).reshape(self.num_chains, -1).any(1)
        return np.flatnonzero(dead).tolist()

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

    def warn(self) -> None:
        """Says which systems collapsed, and what to do."""
        if complaint := self._complaint_in_words(COLLAPSED):
            warnings.warn(
                f"SMC collapsed {complaint}. Neither these draws nor their evidence can be believed: take more "
                "particles or another twist, or NUTS with pp_diffusion.TrajectoryReparam",
                CollapseWarning,
                stacklevel=3,
            )

    # --- draws -------------------------------------------------------------------------------------------------

    def samples(self, group_by_chain: bool) -> dict[str, Array]:
        """All latent sites, in data units; see :meth:`SMC.get_samples`."""
        factors, state = self.sampler.factors, self.state
        if not group_by_chain:
            x, latents = _pooled(state)
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
            self._evidence_in_words(),
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
        lines.append(self._verdict_in_words())
        return "\n".join(lines)

    def _evidence_in_words(self) -> str:
        value, error = np.sum(self.log_evidence), np.sqrt(np.sum(np.square(self.log_evidence_error)))
        unknown = f"it needs {FEWEST_CHAINS} chains" if self.num_chains < FEWEST_CHAINS else "particles collapsed"
        spread = f"error unknown: {unknown}" if np.isnan(error) else f"± {error:.4f}"
        systems = self.log_evidence.size
        whole = f" in all of {systems} systems" if systems > 1 else ""
        return f"log evidence{whole}: {value:.4f} nats ({nats_to_bits(value):.4f} bits), {spread}"

    def _verdict_in_words(self) -> str:
        complaints = [self._complaint_in_words(name) for name in (COLLAPSED, DOUBTFUL)]
        found = [f"{name} {words}" for name, words in zip(("COLLAPSED", "doubtful"), complaints, strict=True) if words]
        if not found:
            return BELIEVABLE
        rest = int(np.sum(self.verdict == BELIEVABLE))
        others = f"; the other {rest} systems are believable" if rest else ""
        return "; ".join(found) + others

    def _complaint_in_words(self, name: str) -> str:
        """Which systems have this verdict, and why the first one has; empty for none."""
        which = [s for s, verdict in enumerate(self.verdicts) if verdict.name == name]
        if not which:
            return ""
        reasons = ", and ".join(self.verdicts[which[0]].reasons)
        if len(self.verdicts) == 1:
            return f"({reasons})"
        named = ", ".join(str(tuple(map(int, np.unravel_index(s, self.shape[1:])))) for s in which[:8])
        more = f" and {len(which) - 8} more" if len(which) > 8 else ""
        return f"in {len(which)} of {len(self.verdicts)} systems, {named}{more} (of the first: {reasons})"

    # --- ArviZ -------------------------------------------------------------------------------------------------

    def to_arviz(self, dims: Mapping[str, list[str]], coords: Mapping[str, Any]) -> Any:
        """See :meth:`SMC.to_arviz`."""
        samples, factors = self.samples(group_by_chain=True), self.sampler.factors
        dataset = partial(_dataset, dims=dims, coords=coords)
        groups = {
            "posterior": dataset(samples, ["chain", "draw"]),
            "sample_stats": self._sample_stats(),
            "observed_data": dataset(factors.observed_values(), []),
        }
        noisy = {site.name for site in factors.observed if site.kind.has_log_likelihood}
        if noisy:
            found = log_likelihood(self.model, dict(samples), batch_ndims=2, parallel=True)
            groups["log_likelihood"] = dataset({n: v for n, v in found.items() if n in noisy}, ["chain", "draw"])
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


def _dataset(
    variables: Mapping[str, Any], leading: list[str], *, dims: Mapping[str, list[str]], coords: Mapping[str, Any]
) -> Any:
    import xarray

    out = {}
    for name, value in variables.items():
        value = np.asarray(value)
        rest = dims.get(name, [f"{name}_dim_{i}" for i in range(value.ndim - len(leading))])
        out[name] = ([*leading, *rest], value)
    found = xarray.Dataset(out)
    index = {d: np.arange(size) for d, size in found.sizes.items()}
    return found.assign_coords(index | {d: c for d, c in coords.items() if d in found.sizes})


@jax.jit
def _constrain(factors: Factors, x: Array, latents: Latents) -> dict[str, Array]:
    return other_latents.constrain(factors, x, latents)


@jax.jit
def _pooled(state: SMCState) -> tuple[Array, Latents]:
    """All chains' particles as one, drawn in proportion to the chains' evidence."""
    chains = state.log_weights.shape[1]
    if chains == 1:
        return state.x, state.latents

    def pool(a: Array) -> Array:
        return jnp.moveaxis(a, 1, 0).reshape(-1, 1, *a.shape[2:])

    weights = pool(jnp.broadcast_to(state.log_evidence, state.log_weights.shape))
    key = jax.random.fold_in(state.rng_key, 1)
    return gather(systematic(key, weights), jax.tree.map(pool, (state.x, state.latents)))


@jax.jit
def _independent_draws(state: SMCState) -> Array:
    """Per system, how many independent draws each chain is worth, by the spread of the chains' means; NaN with one."""
    if state.log_weights.shape[1] == 1:
        return jnp.full(state.log_evidence.shape[1:], jnp.inf)
    kept = [state.x, *(u for u in state.latents.values() if jnp.issubdtype(u.dtype, jnp.floating))]
    draws = jnp.concatenate([a.reshape(*a.shape[:3], -1) for a in kept], -1)
    between, within = draws.mean(0).var(0, ddof=1), draws.var(0).mean(0)
    total = within + between
    varies = total > (1e-5 * draws.mean((0, 1))) ** 2 + jnp.finfo(total.dtype).tiny  # more than by rounding
    share = jnp.where(varies, between / jnp.where(varies, total, 1.0), 0.0).sum(-1) / jnp.maximum(varies.sum(-1), 1)
    return 1 / jnp.maximum(share, 1e-9)
