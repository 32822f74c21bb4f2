r"""Sequential Monte Carlo along the reverse trajectory, as pure functions: :func:`init`, :func:`step`, :func:`finish`.

The particles follow the paper's composed reverse process (§2.5) under a twist, and weights make up for what it drops.
With many particles the posterior is exact. At any number :math:`\hat Z` is unbiased for
:math:`\int p(x)\, r(x)\, dx`, whatever the twist; where other latents are moved, up to a share of the order of one over
the number of particles, to which the moves' scales adapt.

Arrays of particles have shape ``(P, C, S, …)``: P particles, C chains, S systems (the elements of a plate).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.checks import typed_key
from pp_diffusion.frozen import Frozen
from pp_diffusion.posterior import latents as other_latents
from pp_diffusion.posterior.factors import Exact, Factors, Latents
from pp_diffusion.posterior.moves import Position, move, zeros_of
from pp_diffusion.posterior.particles import ess, gather, log_mean, systematic
from pp_diffusion.posterior.prediction import predict, predict_last, predict_start
from pp_diffusion.posterior.twists import Twist
from pp_diffusion.states.space import Guided, Prediction


class SMCState(NamedTuple):
    """Particles at :math:`x_t`; arrays of shape ``(P, C, S, …)``.

    :ivar t: 0…T.
    :ivar x: states of the model's space.
    :ivar latents: the other latents, in unconstrained space.
    :ivar log_weights: since the last resampling, of everything but the twist at ``x``.
    :ivar log_twist: the twist's value one step earlier, for the evidence so far.
    :ivar log_evidence: up to the last resampling, shape ``(C, S)``.
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
    """What happened at a step; arrays of shape ``(C, S)``.

    :ivar ess: effective sample size of the weights, under the twist at this t.
    :ivar resampled: whether it was so small that particles were resampled.
    :ivar num_unguided: particles whose twist was not finite, and counted as the least of the others; at the end, those
        whose likelihood is NaN or infinite.
    :ivar moved: whether other latents were moved.
    :ivar acceptance: the share of these moves that was accepted.
    """

    ess: Array
    resampled: Array
    num_unguided: Array
    moved: Array
    acceptance: Array


class Sampler(Frozen):
    """A model's factors, a twist, and the settings: what :func:`init` and :func:`step` work on.

    :param calibration: of predictions, as :func:`~pp_diffusion.posterior.survey.survey` finds it; ``None`` trusts them.
    """

    data_fields = ("factors", "calibration")

    factors: Factors
    twist: Twist
    ess_threshold: float
    num_moves: int
    calibration: Any

    def __init__(
        self,
        factors: Factors,
        twist: Twist,
        ess_threshold: float = 0.5,
        num_moves: int = 5,
        calibration: Any = None,
    ) -> None:
        twist.check(factors)
        self._set(factors=factors, twist=twist, ess_threshold=float(ess_threshold), num_moves=num_moves)
        self._set(calibration=calibration)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.factors.prior.num_timesteps

    @property
    def moves_latents(self) -> bool:
        """Whether there are latents to be moved."""
        return bool(self.factors.latents and self.num_moves)

    def predict(self, x_t: Array, t: Array) -> Prediction:
        """What step t >= 2 predicts, by one call of the network."""
        process = self.factors.process
        prediction = predict(process, x_t, process.rates.at(t - 1))
        if self.calibration is None:
            return prediction
        return self.factors.space.calibrated(prediction, jax.tree.map(lambda a: a[t - 1], self.calibration))

    def twist_at(self, state: SMCState, prediction: Prediction, latents: Latents) -> Guided:
        """The twist; where any part of it is not finite, steps are unguided and the twist is NaN."""
        found = self.twist(self.factors, state.exact, prediction, latents, state.twist_key)
        fine = jnp.isfinite(found.log_twist) & found.proposal.is_finite
        return Guided(jnp.where(fine, found.log_twist, jnp.nan), found.proposal.where(fine))


def init(rng_key: Array, sampler: Sampler, num_particles: int, num_chains: int = 1) -> SMCState:
    r"""Particles at :math:`x_T`, and other latents from their prior."""
    factors, twist = sampler.factors, sampler.twist
    kernel = factors.prior.kernel
    x_key, draw_key, latent_key, twist_key, rng_key = jax.random.split(typed_key(rng_key), 5)
    batch = (num_particles, num_chains, factors.num_systems)
    events = (num_particles, num_chains, *factors.reader.systems.batch_shape)
    zeros, numbers = jnp.zeros(batch), jnp.arange(num_particles)[:, None, None]
    state = SMCState(
        t=jnp.asarray(sampler.num_timesteps),
        x=kernel.as_state(kernel.stationary().sample(x_key, events)),
        latents=other_latents.draw(factors, latent_key, (num_particles, num_chains)),
        log_weights=zeros,
        log_twist=zeros,
        log_evidence=zeros[0],
        lineage=jnp.broadcast_to(numbers, batch),
        exact=factors.exact(),
        twist_key=twist_key,
        rng_key=rng_key,
    )
    if not twist.starts:
        return state
    start = predict_start(factors.process, events)
    x, log_weights = sampler.twist_at(state, start, state.latents).proposal.draw(draw_key, state.x.shape)
    return state._replace(x=kernel.as_state(x), log_weights=log_weights)


def step(sampler: Sampler, state: SMCState) -> tuple[SMCState, SMCInfo]:
    r"""From :math:`x_t` to :math:`x_{t-1}`, t >= 2: weigh by the twist, resample where needed, move other latents, and
    draw; one network call and, for the moment twist, a vector-Jacobian product per observed number."""
    return _step(sampler, state, lambda x: sampler.predict(x, state.t), moves=sampler.moves_latents)


def finish(sampler: Sampler, state: SMCState) -> tuple[SMCState, SMCInfo, SMCInfo]:
    r"""From :math:`x_1` to draws of :math:`x_0`, weighted by r itself, resampled to equal weights.

    The info of the last step, and of the weights of :math:`x_0`. The other latents are moved under r.
    """
    factors = sampler.factors
    # latents are moved below, under r itself
    state, info = _step(sampler, state, lambda x: predict_last(factors.process, x), moves=False)
    reading = factors.read(state.x, state.latents)
    log_r = reading.log_r
    log_weights = state.log_weights + log_r - state.exact.log_det
    num_bad = (jnp.isnan(log_r) | jnp.isposinf(log_r)).sum(0)  # zero is a likelihood
    key, move_key, rng_key = jax.random.split(state.rng_key, 3)
    index = systematic(key, log_weights)
    x, latents, lineage = gather(index, (state.x, state.latents, state.lineage))
    nothing = jnp.zeros(log_weights.shape[1:])
    end = SMCInfo(ess(log_weights), jnp.ones_like(nothing, bool), num_bad, jnp.zeros_like(nothing, bool), nothing)
    if sampler.moves_latents:

        def target(u: Latents) -> Position:
            reading = factors.read(x, u)
            return Position(u, reading.log_prior + reading.log_r, ())

        (latents, _, _), acceptance = move(move_key, factors, latents, target, 4 * sampler.num_moves)
        end = end._replace(moved=jnp.ones_like(nothing, bool), acceptance=acceptance)
    state = state._replace(
        x=x,
        latents=latents,
        lineage=lineage,
        log_weights=log_weights,
        log_evidence=state.log_evidence + log_mean(log_weights),
        rng_key=rng_key,
    )
    return state, info, end


def _step(
    sampler: Sampler, state: SMCState, predict_at: Callable[[Array], Prediction], *, moves: bool
) -> tuple[SMCState, SMCInfo]:
    resample_key, move_key, draw_key, rng_key = jax.random.split(state.rng_key, 4)
    found_at = partial(_found_at, sampler, state, predict_at)

    def resampled(weighed: Weighed, parts: Any) -> Any:
        """In the systems that need it."""

        def gathered(parts: Any) -> Any:
            kept = jnp.arange(len(state.x))[:, None, None]
            return gather(jnp.where(weighed.needed, systematic(resample_key, weighed.log_weights), kept), parts)

        return jax.lax.cond(weighed.needed.any(), gathered, lambda parts: parts, parts)

    if moves:
        _, _, latents, lineage, found, weighed, acceptance = _moved(sampler, state, move_key, found_at, resampled)
    else:
        found = found_at(state.x)(state.latents).carried
        weighed, acceptance = weigh(sampler, state, found), jnp.zeros(found.log_twist.shape[1:])
        latents, lineage, found = resampled(weighed, (state.latents, state.lineage, found))
    found = with_fallback(found, weighed.least)
    x, log_ratio = found.proposal.draw(draw_key, state.x.shape)
    moved = weighed.needed.any() & moves & jnp.ones_like(weighed.needed)
    info = SMCInfo(weighed.ess, weighed.needed, weighed.num_unguided, moved, acceptance)
    state = state._replace(
        t=state.t - 1,
        x=x,
        latents=latents,
        lineage=lineage,
        log_weights=jnp.where(weighed.needed, 0.0, weighed.log_weights) + log_ratio - found.log_twist,
        log_twist=found.log_twist,
        log_evidence=state.log_evidence + jnp.where(weighed.needed, log_mean(weighed.log_weights), 0.0),
        rng_key=rng_key,
    )
    return state, info


class Weighed(NamedTuple):
    """Particles under the twist at their :math:`x_t`.

    :ivar log_weights: shape ``(P, C, S)``.
    :ivar least: what a twist that is not finite counts as, shape ``(C, S)``: the least of those that are. One number
        for all, which no move of a latent can change.
    :ivar ess: effective sample size.
    :ivar needed: whether it is so small that particles are resampled.
    :ivar num_unguided: how many twists are not finite.
    """

    log_weights: Array
    least: Array
    ess: Array
    needed: Array
    num_unguided: Array


def weigh(sampler: Sampler, state: SMCState, found: Guided) -> Weighed:
    """The particles' weights under the twist, and whether they are even enough."""
    is_finite = jnp.isfinite(found.log_twist)
    least = jnp.min(jnp.where(is_finite, found.log_twist, jnp.inf), axis=0)
    least = jnp.where(jnp.isfinite(least), least, 0.0)
    log_weights = state.log_weights + with_fallback(found, least).log_twist
    size = ess(log_weights)
    needed = size < sampler.ess_threshold * len(log_weights)
    return Weighed(log_weights, least, size, needed, (~is_finite).sum(0))


class Round(NamedTuple):
    """Where the loop of :func:`_moved` is."""

    number: Array
    x: Array
    latents: Latents
    lineage: Array
    found: Guided
    weighed: Weighed
    acceptance: Array


def _moved(
    sampler: Sampler,
    state: SMCState,
    rng_key: Array,
    found_at: Callable[..., Callable[[Latents], Position]],
    resampled: Callable[[Weighed, Any], Any],
) -> Round:
    """Resampled where needed, and then the other latents moved: two rounds of one loop, so that network and twist are
    compiled once. The first finds the twist where the particles are, the second moves latents under it."""

    def one(now: Round) -> Round:
        is_first = now.number == 0
        target, num_moves = found_at(now.x, now.weighed.least), sampler.num_moves
        (latents, _, found), acceptance = move(rng_key, sampler.factors, now.latents, target, num_moves, ~is_first)
        weighed = jax.tree.map(partial(jnp.where, is_first), weigh(sampler, state, found), now.weighed)
        once = weighed._replace(needed=weighed.needed & is_first)
        x, latents, lineage = resampled(once, (now.x, latents, now.lineage))
        return Round(now.number + 1, x, latents, lineage, found, weighed, acceptance)

    def is_left(now: Round) -> Array:
        return (now.number == 0) | ((now.number == 1) & now.weighed.needed.any())

    found = zeros_of(lambda: found_at(state.x)(state.latents).carried)
    weighed = zeros_of(lambda: weigh(sampler, state, found))
    weighed = weighed._replace(least=jnp.full_like(weighed.least, jnp.nan))  # not known in the first round
    start = jnp.zeros((), int), state.x, state.latents, state.lineage, found, weighed, jnp.zeros_like(weighed.ess)
    return jax.lax.while_loop(is_left, one, Round(*start))


def _found_at(
    sampler: Sampler,
    state: SMCState,
    predict_at: Callable[[Array], Prediction],
    x: Array,
    fallback: Array | float = jnp.nan,
) -> Callable[[Latents], Position]:
    """Of latents, the twist times their prior, at the particles x."""
    prediction = predict_at(x)

    def at(latents: Latents) -> Position:
        # tied to each other: nothing of a gradient is computed before a loop over latents and kept for it
        covariance, latents = jax.lax.optimization_barrier((prediction.covariance, latents))
        found = sampler.twist_at(state, prediction._replace(covariance=covariance), latents)
        found = with_fallback(found, fallback)
        log_prior = sampler.factors.read(x, latents).log_prior
        return Position(latents, found.log_twist + log_prior, found)

    return at


def with_fallback(found: Guided, fallback: Array | float) -> Guided:
    """With a number in place of a twist that is not finite."""
    return found._replace(log_twist=jnp.where(jnp.isfinite(found.log_twist), found.log_twist, fallback))
