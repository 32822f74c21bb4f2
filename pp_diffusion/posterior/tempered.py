"""Posterior and evidence of any continuous NumPyro model, by particles that go from its prior to its posterior."""

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
from pp_diffusion.checks import check_key, positive_int, typed_key
from pp_diffusion.posterior.outcome import Outcome, dataset, independent_draws, print_moments
from pp_diffusion.posterior.particles import ess, gather, log_mean, systematic
from pp_diffusion.posterior.target import Target, read_target
from pp_diffusion.posterior.tempering import MOST_TEMPERATURES, Moves, TemperedState, start, temper
from pp_diffusion.posterior.verdicts import BELIEVABLE, COLLAPSED, Findings, Plain, Verdict
from pp_diffusion.training.sharding import as_layout


class TemperedRun(Outcome):
    """The outcome of a run.

    :param state: of all chains, which are the first axis.
    :param samples: all latent and deterministic sites, chain by chain.
    :param observed: what was observed.
    :param model: the user's model with its arguments bound.
    :param plain: a second estimate of the evidence, by the draws of the prior that the particles started from.
    """

    def __init__(
        self,
        state: TemperedState,
        samples: dict[str, Array],
        observed: dict[str, Array],
        model: Callable[[], Any],
        plain: Plain,
    ) -> None:
        self.state, self.by_chain, self.observed, self.model = state, samples, observed, model
        chains = len(state.log_evidence)
        positions = jnp.moveaxis(state.position, 0, 1)[:, :, None]
        independent = independent_draws(positions) if chains > 1 else np.full(1, np.inf)
        findings = Findings(
            log_evidences=np.asarray(state.log_evidence, np.float64)[:, None],
            final_ess=np.asarray(state.ess, np.float64)[:, None],
            least_ess=np.asarray(state.least_ess, np.float64)[:, None],
            independent_draws=np.asarray(independent, np.float64),
            num_particles=state.position.shape[1],
            plain=plain,
        )
        super().__init__(findings)

    @property
    def advice(self) -> str:
        return "take more particles, or more moves at each temperature"

    @cached_property
    def verdicts(self) -> list[Verdict]:
        (found,) = super().verdicts
        cold = int(np.sum(np.asarray(self.state.temperature) < 1))
        if not cold:
            return [found]
        reason = f"{cold} of {self.num_chains} chains did not come to the end in {MOST_TEMPERATURES} temperatures"
        return [Verdict(COLLAPSED, (*found.reasons, reason))]

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
        each = np.broadcast_to(self.state.log_evidence[:, None], (self.num_chains, self.num_particles))
        index = systematic(jax.random.fold_in(self.state.rng_key[0], 1), jnp.asarray(each).reshape(-1))
        return gather(index, {n: a.reshape(-1, *a.shape[2:]) for n, a in self.by_chain.items()})

    def in_words(self) -> str:
        """How far the particles can be trusted."""
        state = self.state
        lines = [
            self.evidence_in_words(),
            f"{self.num_particles} particles in {self.num_chains} chains; {int(state.num_temperatures.max())} "
            f"temperatures, at the last of which {float(state.ess.min()):.0f} were effective and "
            f"{float(state.acceptance.mean()):.2f} of the moves accepted",
            self.verdict_in_words(),
        ]
        return "\n".join(lines)


class TemperedSMC:
    r"""Particles from p to p·r by way of :math:`p\, r^\beta`, :math:`\beta` from 0 to 1 by steps that keep the weights
    even; used like :class:`~pp_diffusion.SMC`.

    For a model with a :class:`~pp_diffusion.DiffusionFlow` and whatever other continuous latents, also such that the
    flow depends on. With :class:`~pp_diffusion.FlowReparam` the particles live in the flow's noise, where p is N(0, I)
    and modes are as near to each other as they can be. Particles find modes by the prior's draws, and the share of each
    by their weights, which no chain of NUTS does; at each temperature they are resampled and then moved by Hamiltonian
    steps, scaled to the particles.

    A run is judged as one of :class:`~pp_diffusion.SMC`: by how far its chains agree, and by the plain draws of the
    prior that it starts from.

    :param model: the model, all of whose latents are continuous (enumeration is not supported here).
    :param num_particles: of each chain.
    :param num_chains: independent runs; from 8 on, their spread gives ``log_evidence_error``.
    :param ess_threshold: the share of the particles that one step of the temperature leaves as effective ones.
    :param num_moves: Hamiltonian moves at each temperature.
    :param num_leapfrog: their length, in gradients.
    :param mesh: devices over whose axis ``"data"`` the chains are spread, ``jax.make_mesh((n,), ("data",))``.

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> smc = ppd.TemperedSMC(model, num_particles=500)
        >>> smc.run(jax.random.key(0), 2.0)
        >>> bool(abs(smc.log_evidence - dist.Normal(0, 2**0.5).log_prob(2.0)) < 0.1), smc.verdict
        (True, 'believable')
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int = 500,
        num_chains: int = 8,
        ess_threshold: float = 0.5,
        num_moves: int = 3,
        num_leapfrog: int = 5,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        if not 0 < ess_threshold < 1:
            raise ValueError(f"ess_threshold must be between 0 and 1; got {ess_threshold}")
        self.model = model
        self.num_particles = positive_int("num_particles", num_particles)
        self.num_chains = positive_int("num_chains", num_chains)
        self.layout = as_layout(mesh)
        self.layout.share("num_chains", self.num_chains)
        self.moves = Moves(
            float(ess_threshold), positive_int("num_moves", num_moves), positive_int("num_leapfrog", num_leapfrog)
        )
        self._run: TemperedRun | None = None

    def run(self, rng_key: Array, *args: Any, **kwargs: Any) -> None:
        """Runs all chains on these arguments of the model.

        :param rng_key: a JAX random key.
        :raises TypeError: if it is none.
        :raises ValueError: naming the site, where it does not serve the model; or if the likelihood is zero or NaN at
            every particle.
        """
        self._run = None
        check_key(rng_key)
        target = read_target(self.model, args, kwargs)
        keys = self.layout.rows(jax.random.split(typed_key(rng_key), self.num_chains))
        state, samples, observed, log_likelihoods = run_chains(target, keys, self.num_particles, self.moves)
        plain = plain_estimate(log_likelihoods.reshape(-1, 1))
        run = TemperedRun(state, samples, observed, partial(self.model, *args, **kwargs), plain)
        run.check()
        self._run = run
        run.warn()

    @property
    def _done(self) -> TemperedRun:
        if self._run is None:
            raise RuntimeError("TemperedSMC has no results yet: call run first")
        return self._run

    @property
    def state(self) -> TemperedState:
        """The particles at the end, and what is known of the run; each field with the chains in front."""
        return self._done.state

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
        return self._done.log_evidences

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
        return self._done.observed

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
        run = self._done
        grouped = partial(dataset, dims=dims or {}, coords=coords or {})
        groups = {
            "posterior": grouped(run.grouped, ["chain", "draw"]),
            "sample_stats": grouped({"log_evidence": run.log_evidences}, ["chain"]),
            "observed_data": grouped(run.observed, []),
        }
        if run.observed:
            seeded = seed(run.model, jax.random.key(0))
            found = log_likelihood(seeded, dict(run.by_chain), batch_ndims=2, parallel=True)
            groups["log_likelihood"] = grouped({n: found[n] for n in run.observed}, ["chain", "draw"])
        return inference_data.inference_data(groups, {"units": "nats", "inference_library": "pp_diffusion"})


@partial(jax.jit, static_argnames=("num_particles", "moves"))
def run_chains(
    target: Target, keys: Array, num_particles: int, moves: Moves
) -> tuple[TemperedState, dict[str, Array], dict[str, Array], Array]:
    """A chain for each key; the sites at its end, what is observed, and the log likelihoods at its start."""

    def chain(rng_key: Array) -> tuple[TemperedState, dict[str, Array], Array]:
        first = start(rng_key, target, num_particles)
        last = temper(target, first, moves)
        return last, jax.vmap(lambda position: target.measure(position).sites)(last.position), first.log_likelihood

    state, samples, log_likelihoods = jax.vmap(chain)(keys)
    observed = target.measure(state.position[0, 0]).observed
    return state, samples, observed, log_likelihoods


def plain_estimate(log_likelihoods: Array) -> Plain:
    """Of draws of the prior, shape ``(N, 1)``."""
    size = np.asarray(ess(log_likelihoods), np.float64)
    error = np.sqrt(np.maximum(1 / np.maximum(size, 1e-12) - 1 / len(log_likelihoods), 0.0))
    return Plain(np.asarray(log_mean(log_likelihoods), np.float64), error, size)
