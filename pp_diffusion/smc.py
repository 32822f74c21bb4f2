r"""Posteriors p(x) r(x) of a user's model, and their evidence, by sequential Monte Carlo along the reverse trajectory.

The particles follow the paper's composed reverse process (§2.5) under a twist, and weights make up for what it drops.
With many particles the posterior is exact, and at any number :math:`\hat Z` is unbiased for
:math:`\int p(x)\, r(x)\, dx`, whatever the twist (where other latents are moved, up to a share of the order of one over
the number of particles, to which the moves' scales adapt). :func:`init`, :func:`step` and :func:`finish` are pure;
:class:`SMC` is their façade, used like :class:`numpyro.infer.MCMC`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import log_likelihood
from tqdm.auto import tqdm

from pp_diffusion import inference_data
from pp_diffusion.checks import positive_int
from pp_diffusion.factors import EXACT, FACTOR, Exact, Factors, Latents, read_model
from pp_diffusion.frozen import Frozen
from pp_diffusion.matrices import cholesky, einsum
from pp_diffusion.twists import (
    Guided,
    Prediction,
    Twist,
    as_twist,
    predict,
    predict_last,
    predict_start,
)
from pp_diffusion.units import nats_to_bits

FEWEST_ISLANDS = 8  # for an error of the evidence


class SMCState(NamedTuple):
    """Particles at :math:`x_t`; arrays of shape ``(P, S, …)``, P particles of S systems (chains, plate elements).

    :ivar t: 0…T.
    :ivar x: states of the model's space.
    :ivar latents: the other latents, in unconstrained space.
    :ivar log_weights: since the last resampling, of everything but the twist at ``x``.
    :ivar log_twist: the twist's value one step earlier, for the evidence so far.
    :ivar log_evidence: up to the last resampling, shape ``(S,)``.
    :ivar lineage: which particle at T each one descends from.
    :ivar exact: what is observed without noise.
    :ivar twist_key: the twist's, the same at every step.
    :ivar rng_key: for the steps to come.
    """

    t: Array
    x: Array
    latents: Latents
    log_weights: Array
    log_twist: Array
    log_evidence: Array
    lineage: Array
    exact: Exact
    twist_key: Array
    rng_key: Array


class SMCInfo(NamedTuple):
    """What happened at a step; arrays of shape ``(S,)``.

    :ivar ess: effective sample size of the weights, under the twist at this t.
    :ivar resampled: whether it was so small that particles were resampled.
    :ivar num_flat: particles whose twist was not finite, and counted as the least of the others; at the end, those
        whose likelihood is NaN or infinite.
    :ivar acceptance: of the moves of other latents; NaN without.
    """

    ess: Array
    resampled: Array
    num_flat: Array
    acceptance: Array


class Sampler(Frozen):
    """A model's factors, a twist, and the settings: what :func:`init` and :func:`step` work on."""

    data_fields = ("factors",)

    factors: Factors
    twist: Twist
    ess_threshold: float
    num_moves: int

    def __init__(self, factors: Factors, twist: Twist, ess_threshold: float = 0.5, num_moves: int = 5) -> None:
        twist.check(factors)
        self._set(factors=factors, twist=twist, ess_threshold=float(ess_threshold), num_moves=num_moves)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.factors.prior.num_timesteps


def init(rng_key: Array, sampler: Sampler, num_particles: int, num_chains: int = 1) -> SMCState:
    r"""Particles at :math:`x_T`, and other latents from their prior."""
    factors, twist = sampler.factors, sampler.twist
    kernel = factors.prior.kernel
    x_key, draw_key, latent_key, twist_key, rng_key = jax.random.split(rng_key, 5)
    batch = (num_particles, num_chains * factors.num_systems)
    shape = (*batch, *factors.state_shape)
    latents = factors.draw_latents(latent_key, (num_particles, num_chains))
    exact = factors.exact() if not factors.is_discrete else _nothing_exact(factors)
    inner = factors.state_shape[: len(factors.state_shape) - kernel.event_ndim]
    log_weights = jnp.zeros(batch)
    if twist.starts:
        start = predict_start(factors.process(num_chains), (*batch, *inner))
        guide = _finite_guide(
            twist(factors, exact, start._replace(rates=_after(start.rates)), latents, twist_key)
        ).guide
        x, log_weights = guide.draw(draw_key, shape)
    else:
        x = kernel.stationary().sample(x_key, (*batch, *inner))
    lineage = jnp.broadcast_to(jnp.arange(num_particles)[:, None], batch)
    t = jnp.asarray(sampler.num_timesteps)
    zeros = jnp.zeros(batch)
    return SMCState(t, kernel.as_state(x), latents, log_weights, zeros, zeros[0], lineage, exact, twist_key, rng_key)


def step(sampler: Sampler, state: SMCState) -> tuple[SMCState, SMCInfo]:
    r"""From :math:`x_t` to :math:`x_{t-1}`, t >= 2: weigh by the twist, resample where needed, move other latents, and
    draw; one network call and, for the moment twist, a vector-Jacobian product per observed number."""
    process = sampler.factors.process(_num_chains(sampler, state))
    rates = process.rates.at(state.t - 1)
    return _step(sampler, state, lambda x: predict(process, x, rates))


def finish(sampler: Sampler, state: SMCState) -> tuple[SMCState, SMCInfo, SMCInfo]:
    r"""From :math:`x_1` to draws of :math:`x_0`, weighted by r itself, resampled to equal weights.

    The info of the last step, and of the weights of :math:`x_0`. The other latents are moved under r.
    """
    factors = sampler.factors
    process = factors.process(_num_chains(sampler, state))
    state, info = _step(sampler, state, lambda x: predict_last(process, x))
    chains = _num_chains(sampler, state)
    reading = factors.read(state.x, state.latents)
    log_r, log_joint = reading.log_r, reading.log_r + reading.log_prior
    log_weights = state.log_weights + log_r - jnp.tile(state.exact.log_det, chains)
    ess, log_mean = _ess(log_weights), _log_mean(log_weights)
    num_bad = (jnp.isnan(log_r) | jnp.isposinf(log_r)).sum(0)  # zero is a likelihood
    key, move_key, rng_key = jax.random.split(state.rng_key, 3)
    index = _systematic(key, log_weights)
    x, latents, lineage, log_joint = _gather(index, (state.x, state.latents, state.lineage, log_joint))
    acceptance = jnp.full(ess.shape, jnp.nan)
    if factors.latents and sampler.num_moves:

        def log_target(u: Latents) -> Array:
            reading = factors.read(x, u)
            return reading.log_prior + reading.log_r

        latents, acceptance = _move(move_key, factors, latents, log_target, log_joint, 4 * sampler.num_moves)
    state = state._replace(
        x=x,
        latents=latents,
        lineage=lineage,
        log_weights=log_weights,
        log_evidence=state.log_evidence + log_mean,
        rng_key=rng_key,
    )
    return state, info, SMCInfo(ess, jnp.ones(ess.shape, bool), num_bad, acceptance)


def _step(sampler: Sampler, state: SMCState, predict_at: Callable[[Array], Prediction]) -> tuple[SMCState, SMCInfo]:
    factors, twist = sampler.factors, sampler.twist
    resample_key, move_key, draw_key, rng_key = jax.random.split(state.rng_key, 4)

    found = _finite_guide(twist(factors, state.exact, predict_at(state.x), state.latents, state.twist_key))
    is_finite = jnp.isfinite(found.log_twist)
    # what is not finite counts as the least of what is: one number for all, which no move of a latent can change
    least = jnp.min(jnp.where(is_finite, found.log_twist, jnp.inf), axis=0)
    fallback = jnp.where(jnp.isfinite(least), least, 0.0)
    found = found._replace(log_twist=jnp.where(is_finite, found.log_twist, fallback))

    log_weights = state.log_weights + found.log_twist
    ess = _ess(log_weights)
    needed = ess < sampler.ess_threshold * len(log_weights)

    def resample(parts: Any) -> Any:
        index = jnp.where(needed, _systematic(resample_key, log_weights), jnp.arange(len(log_weights))[:, None])
        (x, latents, lineage, found), acceptance = _gather(index, parts), jnp.full(ess.shape, jnp.nan)
        if not (factors.latents and sampler.num_moves):
            return x, latents, lineage, found, acceptance
        prediction = predict_at(x)

        def guided(u: Latents) -> Guided:
            found = _finite_guide(twist(factors, state.exact, prediction, u, state.twist_key))
            return found._replace(log_twist=jnp.where(jnp.isfinite(found.log_twist), found.log_twist, fallback))

        def log_target(u: Latents) -> Array:
            return guided(u).log_twist + factors.read(prediction.x_0, u).log_prior

        log_now = found.log_twist + factors.read(prediction.x_0, latents).log_prior
        moved, acceptance = _move(move_key, factors, latents, log_target, log_now, sampler.num_moves)
        return x, moved, lineage, guided(moved), acceptance

    def keep(parts: Any) -> Any:
        return *parts, jnp.full(ess.shape, jnp.nan)

    parts = (state.x, state.latents, state.lineage, found)
    _, latents, lineage, found, acceptance = jax.lax.cond(needed.any(), resample, keep, parts)
    log_evidence = state.log_evidence + jnp.where(needed, _log_mean(log_weights), 0.0)
    log_weights = jnp.where(needed, 0.0, log_weights)

    drawn, log_ratio = found.guide.draw(draw_key, state.x.shape)
    info = SMCInfo(ess, needed, (~is_finite).sum(0), acceptance)
    state = state._replace(
        t=state.t - 1,
        x=drawn,
        latents=latents,
        lineage=lineage,
        log_weights=log_weights + log_ratio - found.log_twist,
        log_twist=found.log_twist,
        log_evidence=log_evidence,
        rng_key=rng_key,
    )
    return state, info


def _finite_guide(found: Guided) -> Guided:
    """With steps unguided where any part of them is not finite, and the twist NaN there."""
    fine = jnp.isfinite(found.log_twist) & found.guide.is_finite
    return Guided(jnp.where(fine, found.log_twist, jnp.nan), found.guide.where(fine))


def _after(rates: Any) -> Any:
    """Rates of a step whose earlier state is :math:`x_T`."""
    return rates._replace(t=rates.t + 1)


def _nothing_exact(factors: Factors) -> Exact:
    none = jnp.zeros((factors.num_systems, 0))
    return Exact(none.astype(int), none, none.astype(bool), none.sum(-1))


def _num_chains(sampler: Sampler, state: SMCState) -> int:
    return state.x.shape[1] // sampler.factors.num_systems


def _ess(log_weights: Array) -> Array:
    ess = jnp.exp(2 * jax.nn.logsumexp(log_weights, axis=0) - jax.nn.logsumexp(2 * log_weights, axis=0))
    return jnp.where(_is_dead(log_weights), 0.0, ess)


def _is_dead(log_weights: Array) -> Array:
    """Whether no particle has any weight."""
    return jnp.isneginf(log_weights).all(0)


def _log_mean(log_weights: Array) -> Array:
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def _systematic(rng_key: Array, log_weights: Array) -> Array:
    """Indices of shape ``(P, S)``, each system's by systematic resampling."""
    count, systems = log_weights.shape
    log_weights = jnp.where(_is_dead(log_weights), 0.0, log_weights)  # their evidence says so from here on
    ends = jnp.cumsum(jax.nn.softmax(log_weights, axis=0), axis=0)
    ends = ends / ends[-1]
    points = (jnp.arange(count)[:, None] + jax.random.uniform(rng_key, (systems,))) / count
    index = jax.vmap(partial(jnp.searchsorted, side="right"), in_axes=1, out_axes=1)(ends, points)
    return jnp.minimum(index, count - 1)


def _gather(index: Array, parts: Any) -> Any:
    """The particles of these indices, in each system by itself."""
    if index.shape[1] == 1:
        return jax.tree.map(lambda a: a[index[:, 0]], parts)
    return jax.tree.map(lambda a: jax.vmap(lambda column, i: column[i], in_axes=1, out_axes=1)(a, index), parts)


def _move(
    rng_key: Array,
    factors: Factors,
    latents: Latents,
    log_target: Callable[[Latents], Array],
    log_now: Array,
    num_moves: int,
) -> tuple[Latents, Array]:
    """Metropolis moves of the other latents, of log density ``log_now`` at the start, and how often they were accepted,
    shape ``(S,)``.

    Continuous ones by a random walk with the particles' covariance, at scales between a tenth of the best one for a
    normal target and the whole; discrete ones by new draws of their prior; so many times each.
    """
    continuous = {name: u for name, u in latents.items() if jnp.issubdtype(u.dtype, jnp.floating)}
    some = next(iter(latents.values()))
    batch = some.shape[:2]
    sizes = [math.prod(u.shape[2:]) for u in continuous.values()]
    flat = jnp.concatenate([u.reshape(*batch, -1) for u in continuous.values()], -1) if continuous else None

    def unflatten(moved: Array) -> Latents:
        pieces = jnp.split(moved, np.cumsum(sizes)[:-1].tolist(), axis=-1)
        return {name: piece.reshape(u.shape) for (name, u), piece in zip(continuous.items(), pieces, strict=True)}

    if flat is not None:
        centred = flat - flat.mean(0)
        covariance = einsum("psi,psj->sij", centred, centred) / len(flat)
        trace = jnp.trace(covariance, axis1=-2, axis2=-1)[:, None, None] / flat.shape[-1]
        root = cholesky(covariance + (1e-4 * trace + 1e-8) * jnp.eye(flat.shape[-1]))

    has_discrete = len(continuous) < len(latents)
    num_moves *= 2 if continuous and has_discrete else 1

    def propose(i: Array, key: Array, latents: Latents) -> tuple[Latents, Array]:
        scale_key, normal_key, prior_key = jax.random.split(key, 3)
        proposed, log_ratio = dict(latents), jnp.zeros(batch)
        if flat is not None:
            now = jnp.concatenate([latents[name].reshape(*batch, -1) for name in continuous], -1)
            scale = 10 ** jax.random.uniform(scale_key, (*batch, 1), minval=-1.0, maxval=0.0)
            scale *= 2.38 / math.sqrt(flat.shape[-1])
            direction = einsum("sij,psj->psi", root, jax.random.normal(normal_key, flat.shape))
            proposed |= unflatten(now + scale * direction)
        if has_discrete:
            redrawn, log_ratio = factors.redraw_discrete(prior_key, latents)
            if flat is None:
                return redrawn, log_ratio
            turn = i % 2 == 0  # one kind at a time
            proposed = jax.tree.map(partial(jnp.where, turn), redrawn, proposed)
            log_ratio = jnp.where(turn, log_ratio, 0.0)
        return proposed, log_ratio

    def one(i: Array, carry: Any) -> Any:
        latents, log_now, accepted = carry
        draw_key, accept_key = jax.random.split(jax.random.fold_in(rng_key, i))
        proposed, log_ratio = propose(i, draw_key, latents)
        log_new = log_target(proposed)
        log_accept = jnp.where(jnp.isnan(log_new), -jnp.inf, log_new) - log_now + log_ratio
        accept = jnp.log(jax.random.uniform(accept_key, batch)) < log_accept

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(accept.reshape(*batch, *(1,) * (new.ndim - 2)), new, old)

        latents = jax.tree.map(choose, proposed, latents)
        return latents, jnp.where(accept, log_new, log_now), accepted + accept.mean(0)

    start = (latents, log_now, jnp.zeros(batch[1]))
    latents, _, accepted = jax.lax.fori_loop(0, num_moves, one, start)
    return latents, accepted / num_moves


# --- the façade ----------------------------------------------------------------------------------------------------


class SMC:
    r"""Posterior and evidence of a NumPyro model with one :class:`~pp_diffusion.DiffusionPrior` site.

    Used like :class:`numpyro.infer.MCMC`. What the model says below ``x = numpyro.sample("x", prior)`` (observed sites,
    ``numpyro.factor``, any deterministic code, ``handlers.mask``, ``scale`` and ``obs_mask``) is its likelihood r.

    ``numpyro.sample("y", dist.Delta(x[known], event_dim=1), obs=y)`` observes coordinates exactly; the evidence is then
    the density of what is observed. Other latent sites are drawn from their prior and moved by Metropolis steps. N
    independent x under a plate are N particle systems in one run, if all likelihood sites and latents lie in that
    plate; a site outside couples them, and x is then one joint state. Binary data: r is called on bits only.

    Cost: ``num_particles * num_chains * T`` network calls, with the moment twist a vector-Jacobian product for each
    observed number, and once more where other latents are moved. Memory is that of one step, whatever T.

    :param model: a NumPyro model.
    :param num_particles: particles of each system.
    :param twist: ``"moment"`` (the default), ``"lookahead"``, ``"annealed"``, ``"constant"``, or a function
        ``(prediction, log_r) -> log r_t``, see :mod:`pp_diffusion.twists`. It decides how many particles are needed,
        never what they converge to.
    :param ess_threshold: particles are resampled where the effective sample size is below this share of them.
    :param num_chains: independent systems with ``num_particles`` each; from 8 on, they give ``log_evidence_error``.
    :param num_moves: Metropolis steps for other latents after each resampling, with scales by the particles' spread
        (the evidence is unbiased up to a share of the order of one over ``num_particles`` then).
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
        model: Callable,
        *,
        num_particles: int,
        twist: Any = None,
        ess_threshold: float = 0.5,
        num_chains: int = 1,
        num_moves: int = 5,
        progress_bar: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold must be in [0, 1]; got {ess_threshold}")
        if isinstance(num_moves, bool) or not isinstance(num_moves, int) or num_moves < 0:
            raise ValueError(f"num_moves must be an integer >= 0; got {num_moves!r}")
        self.model = model
        self.num_particles = positive_int("num_particles", num_particles)
        self.num_chains = positive_int("num_chains", num_chains)
        self.twist = as_twist(twist)
        self.ess_threshold, self.num_moves, self.progress_bar = ess_threshold, num_moves, progress_bar
        self._run: _Run | None = None

    def run(self, rng_key: Array, *args: Any, **kwargs: Any) -> None:
        """Runs the particles from T to 0.

        :param rng_key: a JAX random key.
        :param args: the model's arguments. Arrays among them are traced: a new y needs no new compilation.
        :param kwargs: its keyword arguments.
        :raises ValueError: if the model is none that SMC serves (see :func:`pp_diffusion.factors.read_model`), or its
            likelihood is zero at every particle.
        :raises FloatingPointError: if the likelihood is NaN or infinite at an :math:`x_0`.
        """
        self._run = None
        factors = read_model(self.model, args, kwargs)
        sampler = Sampler(factors, self.twist, self.ess_threshold, self.num_moves)
        state = _init(rng_key, sampler, self.num_particles, self.num_chains)
        total = sampler.num_timesteps
        infos = _no_infos(state, total)
        segment = max(1, -(-(total - 1) // 20)) if self.progress_bar else max(1, total - 1)
        with tqdm(total=total, desc="SMC", unit="step", disable=not self.progress_bar) as bar:
            done = 0
            while done < total - 1:
                count = min(segment, total - 1 - done)
                state, infos = _advance(sampler, state, infos, count)
                done += count
                if self.progress_bar:
                    nats = float(np.mean(_evidence_so_far(state)))
                    bar.set_postfix_str(f"log Z {nats:.3f} nats, {nats_to_bits(nats):.3f} bits", refresh=False)
                    bar.update(count)
            state, infos = _finish(sampler, state, infos)
            bar.update(1)
        run = _Run(sampler, state, jax.tree.map(np.asarray, infos), self.num_chains, args, kwargs)
        run.check()
        self._run = run

    @property
    def _done(self) -> _Run:
        if self._run is None:
            raise RuntimeError("SMC has no results yet: call run first")
        return self._run

    @property
    def log_evidence(self) -> Any:
        r""":math:`\log \int p(x)\, r(x)\, dx`, nats: the log of an unbiased estimate. A number; for x in a plate of
        independent systems, an array with one for each of them, whose sum is the whole model's, but for sites outside
        of the plate that depend on no latent."""
        run = self._done
        return _plain(_log_mean_chains(run.log_evidences))

    @property
    def log_evidence_error(self) -> Any:
        """Its standard error, nats, by the spread of the chains; NaN with fewer than 8 of them."""
        evidences = self._done.log_evidences
        if len(evidences) < FEWEST_ISLANDS:
            return _plain(np.full(evidences.shape[1:], np.nan))
        relative = np.exp(evidences - _log_mean_chains(evidences))
        return _plain(relative.std(0, ddof=1) / math.sqrt(len(evidences)))

    @property
    def ess(self) -> np.ndarray:
        """Effective sample size of the weights at t = T…0, shape ``(T + 1, num_chains, *systems)``; the last is that of
        the draws of x."""
        run = self._done
        return np.asarray(run.infos.ess).reshape(-1, *run.log_evidences.shape)[::-1]

    @property
    def twist_rules(self) -> dict[str, str]:
        """Per observed site, the form that the twist gives it."""
        return self._done.rules

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Array]:
        """Draws of the posterior, of equal weights: all latent sites, in data units.

        :param group_by_chain: shape ``(num_chains, num_particles, …)``, each chain's own. Otherwise
            ``(num_chains * num_particles, …)``, with the chains drawn from in proportion to their evidence.
        :raises RuntimeError: for the draws of a chain whose particles all have likelihood zero.
        """
        run = self._done
        state, factors = run.state, run.sampler.factors
        if group_by_chain:
            if dead := run.dead_chains:
                raise RuntimeError(
                    f"chains {dead} have no draws: the likelihood is zero at all of their particles. Take more "
                    "particles, or the draws of the other chains by group_by_chain=False"
                )
            found = _constrain(factors, state.x, state.latents)
            return {name: jnp.moveaxis(value, 0, 1) for name, value in found.items()}
        x, latents = _pooled(factors, state, self.num_chains)
        return {name: value[:, 0] for name, value in _constrain(factors, x, latents).items()}

    def print_summary(self, max_rows: int = 20) -> None:
        """Prints the latents' moments and quantiles (the first ``max_rows`` numbers), the evidence, and how far the
        particles can be trusted."""
        run, samples = self._done, self.get_samples()
        rows = []
        for name, values in samples.items():
            shape = values.shape[1:]
            columns = np.asarray(values, np.float64).reshape(len(values), -1).T
            for i, column in enumerate(columns[: max_rows + 1]):
                label = name + (str(list(map(int, np.unravel_index(i, shape)))).replace(" ", "") if shape else "")
                low, median, high = np.quantile(column, [0.05, 0.5, 0.95])
                rows.append((label, column.mean(), column.std(), median, low, high))
        total = sum(math.prod(values.shape[1:]) for values in samples.values())
        print(f"{'':>16}" + "".join(f"{n:>10}" for n in ("mean", "std", "median", "5.0%", "95.0%")))
        for label, *numbers in rows[:max_rows]:
            print(f"{label:>16}" + "".join(f"{number:>10.3f}" for number in numbers))
        if total > max_rows:
            print(f"{'':>4}(the first {max_rows} of {total} numbers)")
        print(run.in_words(self.num_particles, self.log_evidence, self.log_evidence_error))

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
        return self._done.to_arviz(self.get_samples(group_by_chain=True), dims or {}, coords or {})


class _Run:
    """The outcome of a run."""

    def __init__(
        self,
        sampler: Sampler,
        state: SMCState,
        infos: SMCInfo,
        num_chains: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.sampler, self.state, self.infos, self.args, self.kwargs = sampler, state, infos, args, kwargs
        self.shape = (num_chains, *sampler.factors.systems)
        self.log_evidences = np.asarray(state.log_evidence, np.float64).reshape(self.shape)

    @property
    def rules(self) -> dict[str, str]:
        return self.sampler.twist.rules(self.sampler.factors)

    @property
    def dead_chains(self) -> list[int]:
        """Those with a system whose particles all have likelihood zero."""
        dead = np.isneginf(self.log_evidences).reshape(len(self.log_evidences), -1).any(1)
        return np.flatnonzero(dead).tolist()

    def check(self) -> None:
        """Raises where r itself was unusable."""
        names = ", ".join(repr(site.name) for site in self.sampler.factors.observed)
        if bad := int(self.infos.num_flat[0].sum()):
            raise FloatingPointError(
                f"the model's likelihood is NaN or infinite at {bad} of {self.state.log_weights.size} draws of x; it "
                f"is that of the sites {names}"
            )
        if np.isneginf(self.log_evidences).all(0).any():
            raise ValueError(f"the model's likelihood is zero at every particle; it is that of the sites {names}")

    def in_words(self, num_particles: int, log_evidence: Any, error: Any) -> str:
        infos, lines = self.infos, []
        count, many = num_particles, math.prod(self.shape)
        for label, value in (("log evidence", np.sum(log_evidence)),):
            known = np.sqrt(np.sum(np.square(error)))
            spread = "error unknown: it needs 8 chains" if np.isnan(known) else f"± {known:.4f}"
            whole = f" in all of {np.size(log_evidence)} systems" if np.size(log_evidence) > 1 else ""
            lines.append(f"{label}{whole}: {value:.4f} nats ({nats_to_bits(value):.4f} bits), {spread}")
        final, least = infos.ess[0], infos.ess.min(0)
        lines.append(
            f"{count} particles in {many} system{'s' if many > 1 else ''}; effective at the end: {final.min():.1f} "
            f"(least of all steps: {least.min():.1f}); resampled {infos.resampled[1:].sum(0).mean():.1f} times"
        )
        found = "; ".join(f"{name}: {rule}" for name, rule in self.rules.items())
        lines.append(f"twist {self.sampler.twist.name!r}: {found}")
        ancestors = [len(np.unique(column)) for column in np.asarray(self.state.lineage).T]
        lines.append(f"the draws descend from {min(ancestors)} particles at t = T, in the system with the fewest")
        if flat := int(infos.num_flat[1:].sum()):
            lines.append(f"the likelihood was not finite at {flat} predictions of x, which were left unguided")
        if dead := self.dead_chains:
            lines.append(f"the likelihood is zero at all particles of the chains {dead}")
        if not np.isnan(infos.acceptance).all():
            lines.append(f"moves of other latents accepted: {np.nanmean(infos.acceptance):.2f}")
        if final.min() < 2 or least.min() < max(2.0, 0.005 * count):
            lines.append(
                "COLLAPSED: a handful of particles carries all the weight somewhere along the way. Neither the draws "
                "nor the evidence can be believed; take more particles, or another twist"
            )
        elif least.min() < 0.05 * count:
            lines.append("few particles carried the weight at some step: compare chains, or take more particles")
        return "\n".join(lines)

    def to_arviz(self, samples: Mapping[str, Array], dims: Mapping[str, list[str]], coords: Mapping[str, Any]) -> Any:
        import xarray

        factors = self.sampler.factors
        chains, draws = self.shape[0], len(self.state.x)
        system_dims = [f"system_dim_{i}" for i in range(len(factors.systems))]

        def dataset(variables: Mapping[str, Any], leading: list[str]) -> Any:
            out = {}
            for name, value in variables.items():
                value = np.asarray(value)
                rest = dims.get(name, [f"{name}_dim_{i}" for i in range(value.ndim - len(leading))])
                out[name] = ([*leading, *rest], value)
            found = xarray.Dataset(out)
            index = {d: np.arange(size) for d, size in found.sizes.items()}
            return found.assign_coords(index | {d: c for d, c in coords.items() if d in found.sizes})

        shape = (draws, *self.shape)
        log_weights = np.moveaxis(np.asarray(self.state.log_weights).reshape(shape), 0, 1)
        steps = {
            name: np.moveaxis(getattr(self.infos, name)[::-1].reshape(-1, *self.shape), 0, 1)
            for name in ("ess", "resampled")
        }
        stats = xarray.Dataset(
            {"log_weight": (["chain", "draw", *system_dims], log_weights)}
            | {name: (["chain", "step", *system_dims], value) for name, value in steps.items()}
            | {"log_evidence": (["chain", *system_dims], self.log_evidences)},
            {"chain": np.arange(chains), "draw": np.arange(draws), "step": np.arange(len(self.infos.ess))[::-1]},
        )
        groups = {
            "posterior": dataset(samples, ["chain", "draw"]),
            "sample_stats": stats,
            "observed_data": dataset(factors.observed_values(), []),
        }
        noisy = {site.name for site in factors.observed if site.kind not in (EXACT, FACTOR)}
        if noisy:
            found = log_likelihood(
                self.sampler.factors.model, dict(samples), *self.args, batch_ndims=2, parallel=True, **self.kwargs
            )
            groups["log_likelihood"] = dataset({n: v for n, v in found.items() if n in noisy}, ["chain", "draw"])
        attrs = {"units": "nats", "twist": self.sampler.twist.name, "inference_library": "pp_diffusion"}
        return inference_data.inference_data(groups, attrs)


@partial(jax.jit, static_argnames=("num_particles", "num_chains"))
def _init(rng_key: Array, sampler: Sampler, num_particles: int, num_chains: int) -> SMCState:
    return init(rng_key, sampler, num_particles, num_chains)


def _no_infos(state: SMCState, num_timesteps: int) -> SMCInfo:
    """Room for what happens at t = 0…T."""
    zeros = jnp.zeros((num_timesteps + 1, *state.log_evidence.shape), state.log_evidence.dtype)
    return SMCInfo(zeros, zeros.astype(bool), zeros.astype(int), zeros)


@jax.jit
def _advance(sampler: Sampler, state: SMCState, infos: SMCInfo, num_steps: Array) -> tuple[SMCState, SMCInfo]:
    def one(_: Array, carry: tuple[SMCState, SMCInfo]) -> tuple[SMCState, SMCInfo]:
        state, infos = carry
        new, info = step(sampler, state)
        return new, jax.tree.map(lambda all_, now: all_.at[state.t].set(now), infos, info)

    return jax.lax.fori_loop(0, num_steps, one, (state, infos))


@jax.jit
def _finish(sampler: Sampler, state: SMCState, infos: SMCInfo) -> tuple[SMCState, SMCInfo]:
    state, last, end = finish(sampler, state)
    for t, info in ((1, last), (0, end)):
        infos = jax.tree.map(lambda all_, now, t=t: all_.at[t].set(now), infos, info)
    return state, infos


@jax.jit
def _evidence_so_far(state: SMCState) -> Array:
    return state.log_evidence + _log_mean(state.log_weights + state.log_twist)


@jax.jit
def _constrain(factors: Factors, x: Array, latents: Latents) -> dict[str, Array]:
    return factors.constrain(x, latents)


@partial(jax.jit, static_argnames="num_chains")
def _pooled(factors: Factors, state: SMCState, num_chains: int) -> tuple[Array, Latents]:
    """All chains' particles as one, drawn in proportion to the chains' evidence."""
    if num_chains == 1:
        return state.x, state.latents
    systems = factors.num_systems

    def pool(a: Array) -> Array:
        a = a.reshape(a.shape[0], num_chains, systems, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0).reshape(-1, systems, *a.shape[3:])

    weights = pool(jnp.broadcast_to(state.log_evidence, state.log_weights.shape))
    key = jax.random.fold_in(state.rng_key, 1)
    return _gather(_systematic(key, weights), jax.tree.map(pool, (state.x, state.latents)))


def _log_mean_chains(log_evidences: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(log_evidences, axis=0) - math.log(len(log_evidences))


def _plain(values: np.ndarray) -> Any:
    return values if np.ndim(values) else float(values)
