"""The façade: used like :class:`numpyro.infer.MCMC`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from pp_diffusion.checks import check_key, positive_int, typed_key
from pp_diffusion.compiling import jit_once, jit_run
from pp_diffusion.posterior.costs import Cost
from pp_diffusion.posterior.factors import Factors, read_model
from pp_diffusion.posterior.outcome import print_moments
from pp_diffusion.posterior.particles import log_mean
from pp_diffusion.posterior.report import Run
from pp_diffusion.posterior.smc import Sampler, SMCInfo, SMCState, finish, init, step
from pp_diffusion.posterior.survey import PLAIN_SHARE, Judge, num_plain_draws, survey
from pp_diffusion.posterior.twists import as_twist
from pp_diffusion.posterior.verdicts import BELIEVABLE, Plain
from pp_diffusion.sharding import Layout, as_layout
from pp_diffusion.units import nats_to_bits


class SMC:
    r"""Posterior and evidence of a NumPyro model with one :class:`~pp_diffusion.DiffusionPrior` site.

    Used like :class:`numpyro.infer.MCMC`. What the model says below ``x = numpyro.sample("x", prior)`` (observed sites,
    ``numpyro.factor``, any deterministic code, ``handlers.mask``, ``scale`` and ``obs_mask``) is its likelihood r.

    ``numpyro.sample("y", dist.Delta(x[known], event_dim=1), obs=y)`` observes coordinates exactly; the evidence is then
    the density of what is observed. Other latent sites are drawn from their prior and moved by Metropolis steps. N
    independent x under a plate are N particle systems in one run, if all likelihood sites and latents lie in that
    plate; a site outside couples them, and x is then one joint state. Binary data: r is called on bits only.

    Cost: ``num_particles * num_chains * T`` network calls, with the moment twist a vector-Jacobian product for each
    observed number, and once more where other latents are moved. Memory is that of one step, whatever T. Where 5
    rows or more share latents, and there are fewer than 20 particles for each row and shared number, or more than 1e8
    network calls to make, a :class:`~pp_diffusion.CostWarning` says so before the run, and what to take instead.

    :param model: a NumPyro model.
    :param num_particles: particles of each system.
    :param twist: ``"moment"`` (the default), ``"lookahead"``, ``"annealed"``, ``"constant"``, or a function
        ``(prediction, log_r) -> log r_t``, see :mod:`pp_diffusion.twists`. It decides how many particles are needed,
        never what they converge to.
    :param ess_threshold: particles are resampled where the effective sample size is below this share of them.
    :param num_chains: independent systems with ``num_particles`` each; from 8 on, they give ``log_evidence_error``.
    :param num_moves: Metropolis steps for other latents after each resampling, with scales by the particles' spread
        (the evidence is unbiased up to a share of the order of one over ``num_particles`` then).
    :param plain_share: so many plain draws of the prior for each particle give a second estimate of the evidence. A run
        that missed what they found is called collapsed. 0 does without.
    :param mesh: devices over whose axis ``"data"`` the chains are spread, ``jax.make_mesh((n,), ("data",))``.
    :param progress_bar: shows one, over time steps.
    :raises TypeError, ValueError: naming the argument that does not fit.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> prior = ppd.Diffusion(  # the exact reverse process of standard normal data
        ...     ppd.GaussianKernel((1,)),
        ...     ppd.FixedSchedule.constant_erasure(20),
        ...     lambda x_t, t: (jnp.sqrt(1 - 1 / (21 - t))[..., None] * x_t, jnp.ones_like(x_t) / (21 - t)[..., None]),
        ...     parameterization="direct",
        ...     last_step="network",
        ... ).prior({})
        >>> def model(y):
        ...     x = numpyro.sample("x", prior)
        ...     numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        >>> smc = ppd.SMC(model, num_particles=1000, progress_bar=False)
        >>> smc.run(jax.random.key(0), jnp.array([2.0]))
        >>> f"{smc.log_evidence:.2f}", f"{smc.get_samples()['x'].mean():.1f}"  # exactly log N(2; 0, 2), and 1
        ('-2.27', '1.0')
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int,
        twist: Any = None,
        ess_threshold: float = 0.5,
        num_chains: int = 1,
        num_moves: int = 5,
        plain_share: float = PLAIN_SHARE,
        mesh: jax.sharding.Mesh | None = None,
        progress_bar: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        if isinstance(model, jax.stages.Wrapped):
            raise TypeError("model must be a plain function; got one made by jax.jit, which hides its sites")
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold must be in [0, 1]; got {ess_threshold}")
        if isinstance(num_moves, bool) or not isinstance(num_moves, int) or num_moves < 0:
            raise ValueError(f"num_moves must be an integer >= 0; got {num_moves!r}")
        if not 0 <= plain_share <= 1:
            raise ValueError(f"plain_share must be in [0, 1]; got {plain_share}")
        self.model, self.plain_share = model, float(plain_share)
        self.num_particles = positive_int("num_particles", num_particles)
        self.num_chains = positive_int("num_chains", num_chains)
        self.layout = as_layout(mesh)
        self.layout.share("num_chains", self.num_chains)
        self.twist = as_twist(twist)
        self.ess_threshold, self.num_moves, self.progress_bar = ess_threshold, num_moves, progress_bar
        self._run: Run | None = None
        self._judge = Judge()

    def run(self, rng_key: Array, *args: Any, **kwargs: Any) -> None:
        """Runs the particles from T to 0.

        :param rng_key: a JAX random key.
        :param args: the model's arguments. Arrays among them are traced: a new y needs no new compilation.
        :param kwargs: its keyword arguments.
        :raises TypeError: if ``rng_key`` is no key; under ``jit`` or ``vmap``, for which see plates.
        :raises ValueError: if SMC does not serve the model (see :func:`pp_diffusion.posterior.factors.read_model`), or
            its likelihood is zero at every particle.
        :raises FloatingPointError: if the likelihood is NaN or infinite at an :math:`x_0`.
        """
        self._run = None
        _refuse_tracers(rng_key, args, kwargs)
        check_key(rng_key)
        rng_key = typed_key(rng_key)
        factors = read_model(self.model, args, kwargs)
        Cost.of(factors, self.num_particles, self.num_chains).warn()
        plain = self._plain(jax.random.fold_in(rng_key, 1), factors)
        sampler = Sampler(factors, self.twist, self.ess_threshold, self.num_moves, self._judge(factors))
        state, infos = _spread(self.layout, *_init(rng_key, sampler, self.num_particles, self.num_chains))
        total = sampler.num_timesteps
        segment = max(1, -(-(total - 1) // 20)) if self.progress_bar else max(1, total - 1)
        with tqdm(total=total, desc="SMC", unit="step", disable=not self.progress_bar) as bar:
            for done in range(0, total - 1, segment):
                count = min(segment, total - 1 - done)
                state, infos = _advance(sampler, state, infos, count)
                if self.progress_bar:
                    nats = float(np.mean(_evidence_so_far(state)))
                    bar.set_postfix_str(f"log Z {nats:.3f} nats, {nats_to_bits(nats):.3f} bits", refresh=False)
                    bar.update(count)
            state, infos = _finish(sampler, state, infos)
            bar.update(1)
        run = Run(sampler, state, infos, partial(self.model, *args, **kwargs), plain)
        run.check()
        self._run = run
        run.warn()

    def _plain(self, rng_key: Array, factors: Factors) -> Plain | None:
        """The evidence by plain draws of the prior."""
        number = num_plain_draws(factors, self.num_particles * self.num_chains, self.plain_share)
        return survey(rng_key, factors, number).plain(number) if number else None

    @property
    def _done(self) -> Run:
        if self._run is None:
            raise RuntimeError("SMC has no results yet: call run first")
        return self._run

    @property
    def log_evidence(self) -> Any:
        r""":math:`\log \int p(x)\, r(x)\, dx`, nats: the log of an unbiased estimate. A number; for x in a plate of
        independent systems, an array with one for each of them, whose sum is the whole model's, but for sites outside
        of the plate that depend on no latent."""
        return _plain(self._done.log_evidence)

    @property
    def log_evidences(self) -> np.ndarray:
        """The log of each chain's estimate, nats, shape ``(num_chains, *systems)``."""
        return self._done.log_evidences

    @property
    def log_evidence_error(self) -> Any:
        """Its standard error, nats, by the spread of the chains, so scaled that ±2 of it cover 95 % (Student's t). NaN
        with fewer than 8 chains, and where the run collapsed."""
        return _plain(self._done.log_evidence_error)

    @property
    def verdict(self) -> Any:
        """``"believable"``, ``"doubtful"`` or ``"collapsed"``; for x in a plate, an array with one for each system.
        :meth:`print_summary` has the reasons."""
        return _plain(self._done.verdict)

    @property
    def reliable(self) -> Any:
        """Whether the verdict is ``"believable"``; for x in a plate, an array."""
        return _plain(self._done.verdict == BELIEVABLE)

    @property
    def ess(self) -> np.ndarray:
        """Effective sample size of the weights at t = T…0, shape ``(T + 1, num_chains, *systems)``; the last is that of
        the draws of x."""
        return self._done.ess

    @property
    def state(self) -> SMCState:
        """The particles at t = 0, of equal weights; ``log_weights`` are those of before the last resampling."""
        return self._done.state

    @property
    def infos(self) -> SMCInfo:
        """What happened at t = 0…T; arrays of shape ``(T + 1, num_chains, number of systems)``."""
        return self._done.infos

    @property
    def twist_rules(self) -> dict[str, str]:
        """Per observed site, the form that the twist gives it."""
        return self._done.rules

    @property
    def observed_values(self) -> dict[str, Array]:
        """The values of the observed sites, ``numpyro.factor`` apart."""
        return self._done.sampler.factors.observed_values()

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Array]:
        """Draws of the posterior, of equal weights: all latent sites, in data units, and the deterministic sites that
        they tell.

        :param group_by_chain: shape ``(num_chains, num_particles, …)``, each chain's own. Otherwise
            ``(num_chains * num_particles, …)``, with the chains drawn from in proportion to their evidence.
        :raises RuntimeError: for the draws of a chain whose particles all have likelihood zero.
        """
        return self._done.samples(group_by_chain)

    def print_summary(self, max_rows: int = 20) -> None:
        """Prints the latents' moments and quantiles (the first ``max_rows`` numbers), the evidence, and how far the
        particles can be trusted."""
        run = self._done
        print_moments(self.get_samples(), max_rows)
        print(run.in_words())

    def to_arviz(self, *, dims: Mapping[str, list[str]] | None = None, coords: Mapping[str, Any] | None = None) -> Any:
        """For ArviZ: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x), in nats.

        ``posterior``
            the latents, chain by chain, of equal weights.
        ``sample_stats``
            ``log_weight`` of the particles at t = 0, before the last resampling; ``ess`` and ``resampled`` per time
            step, from T to 0; ``log_evidence`` per chain.
        ``log_likelihood``
            at the draws, as :func:`numpyro.infer.log_likelihood` has it: per entry of the batch shape of an observed
            site; not of ``numpyro.factor`` and exact observations.
        ``observed_data``
            the observed sites' values.

        :param dims: names of the axes of a variable.
        :param coords: coordinates by the names of axes.
        """
        return self._done.to_arviz(dims or {}, coords or {})


@partial(jit_once, static_argnames=("num_particles", "num_chains"))
def _init(rng_key: Array, sampler: Sampler, num_particles: int, num_chains: int) -> tuple[SMCState, SMCInfo]:
    """The start, and room for what happens at t = 0…T."""
    state = init(rng_key, sampler, num_particles, num_chains)
    zeros = jnp.zeros((sampler.num_timesteps + 1, *state.log_evidence.shape), state.log_evidence.dtype)
    no, none = zeros.astype(bool), zeros.astype(int)
    return state, SMCInfo(ess=zeros, resampled=no, num_unguided=none, moved=no, acceptance=zeros)


def _spread(layout: Layout, state: SMCState, infos: SMCInfo) -> tuple[SMCState, SMCInfo]:
    """Chains over devices; what runs on them follows."""
    fields = ("x", "latents", "log_weights", "log_twist", "lineage")
    spread = {name: layout.rows(getattr(state, name), axis=1) for name in fields}
    return state._replace(log_evidence=layout.rows(state.log_evidence), **spread), layout.rows(infos, axis=1)


@jit_run
def _advance(sampler: Sampler, state: SMCState, infos: SMCInfo, num_steps: Array) -> tuple[SMCState, SMCInfo]:
    def one(_: Array, carry: tuple[SMCState, SMCInfo]) -> tuple[SMCState, SMCInfo]:
        state, infos = carry
        new, info = step(sampler, state)
        return new, jax.tree.map(lambda all_, now: all_.at[state.t].set(now), infos, info)

    return jax.lax.fori_loop(0, num_steps, one, (state, infos))


@jit_once
def _finish(sampler: Sampler, state: SMCState, infos: SMCInfo) -> tuple[SMCState, SMCInfo]:
    state, last, end = finish(sampler, state)
    for t, info in ((1, last), (0, end)):
        infos = jax.tree.map(lambda all_, now, t=t: all_.at[t].set(now), infos, info)
    return state, infos


@jax.jit
def _evidence_so_far(state: SMCState) -> Array:
    return state.log_evidence + log_mean(state.log_weights + state.log_twist)


def _refuse_tracers(rng_key: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The outcome is judged where it is known.

    :raises TypeError: if an argument is traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((rng_key, args, kwargs))):
        raise TypeError(
            "SMC.run got an argument that is being traced, by jax.jit, vmap or grad, which it does not run under. For "
            "many data sets put x and its observations in a numpyro.plate: its elements run side by side, with an "
            "evidence each"
        )


def _plain(values: np.ndarray) -> Any:
    return values if np.ndim(values) else values.item()
