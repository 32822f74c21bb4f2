r"""Twists: positive functions :math:`r_t(x_t)` that lead particles to where r(x) is large.

Particles follow :math:`\tilde p(x_{t-1} \mid x_t) \propto p(x_{t-1} \mid x_t)\, r_{t-1}(x_{t-1})`, as nearly as it can
be drawn from (the paper, eq. 22). Weights make up for what that leaves out, the normalisers that the paper drops. So a
twist moves the variance, never the target. ``"constant"`` and ``"annealed"`` are the paper's: r of the state itself,
and its power (T - t)/T. ``"lookahead"`` is r at :math:`E[x_0 \mid x_t]`. ``"moment"`` averages r over
:math:`x_0` given :math:`x_t`.

A twist says what it wants; how it is done is known to the kernel's :class:`~pp_diffusion.states.StateSpace`. Arrays of
particles have shape ``(P, C, S, …)``: P particles, C chains, S independent systems.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.frozen import Frozen
from pp_diffusion.posterior.factors import Exact, Factors, Latents
from pp_diffusion.states.continuous import MOST_ROWS
from pp_diffusion.states.space import Guided, Likelihood, Prediction, Size, StateSpace

CHAINS = "chains"


class Twist(Frozen):
    """Base class of twists: a subclass defines :meth:`__call__`.

    :ivar name: as :class:`~pp_diffusion.SMC` takes it.
    :ivar starts: whether the twist guides the start, :math:`x_T`, too.
    """

    name: str = ""
    starts: bool = False

    def check(self, factors: Factors) -> None:
        """Refuses a model that the twist cannot serve. By default one with coordinates that are observed exactly: r of
        a state, or at one prediction, is zero almost everywhere then, and a twist is positive."""
        if factors.is_exact:
            raise ValueError(f"twist must be 'moment' where coordinates are observed exactly; got {self.name!r}")

    def rules(self, factors: Factors) -> dict[str, str]:
        """In words, what the twist makes of each observed site."""
        return {site.name: "r itself" for site in factors.observed}

    @abstractmethod
    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        r"""The value :math:`r_t(x_t)`, and what :math:`x_{t-1}` is drawn from.

        :param rng_key: the same at each call, so that a twist that averages over draws is a function of :math:`x_t`.
        """
        raise NotImplementedError


class Power(Twist):
    """The paper's: r of the state itself, or a power of it that grows as t falls.

    :param name: ``"constant"`` or ``"annealed"``.
    """

    def __init__(self, name: str) -> None:
        self._set(name=name, starts=name == "constant")

    def _power(self, t: Array | int, num_timesteps: int) -> Array:
        return jnp.ones(()) if self.starts else 1 - jnp.asarray(t, dtype=float) / num_timesteps

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        t, total = prediction.rates.t, factors.prior.num_timesteps
        power, r = self._power(t, total), likelihood(factors, exact, latents)
        log_twist = jnp.where(power > 0, power * r.log_r(prediction.x_t), 0.0)
        return Guided(log_twist, factors.space.perturb(prediction, r, self._power(t - 1, total), rng_key))


class Lookahead(Twist):
    r"""r at :math:`E[x_0 \mid x_t]` (Wu et al. 2023), with steps shifted by its gradient; where that is no state, as of
    bits, r averaged over draws."""

    name = "lookahead"

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        return factors.space.look_ahead(prediction, likelihood(factors, exact, latents), rng_key)


class Moment(Twist):
    r"""r averaged over x_0 given :math:`x_t`: a normal distribution with Tweedie's mean and covariance.

    Sites ``Normal`` and ``MultivariateNormal`` are linearised at :math:`E[x_0 \mid x_t]`, which is exact where they are
    affine in x. Single numbers of other densities, and normal ones around what is not linear, are averaged by
    quadrature along the line that each depends on, up to 16 of them; above, those with a mean and a variance are taken
    for normal ones with these. ``numpyro.factor`` and the rest are averaged over draws, with the covariance's diagonal.
    States of finitely many values: exactly, where each observed number depends on one entry at most, or where states
    are few; else over draws.

    :param most_rows: up to so many observed numbers per x, a vector-Jacobian product for each of them gives their whole
        covariance. Above, they are told by as many numbers as x has, if these are no more than that; else means come
        by a few steps of conjugate gradients, and variances number by number.
    """

    name = "moment"
    most_rows: int

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        if isinstance(most_rows, bool) or not isinstance(most_rows, int) or most_rows < 0:
            raise ValueError(f"most_rows must be an integer >= 0; got {most_rows!r}")
        self._set(most_rows=most_rows)

    def check(self, factors: Factors) -> None:
        """Serves all."""

    def rules(self, factors: Factors) -> dict[str, str]:
        state = math.prod(factors.state_shape)
        size = Size(state, factors.num_rows, factors.num_known, factors.num_numbers, factors.owner is not None)
        words = factors.space.words(size, self.most_rows)
        return {site.name: site.kind.rule(words) for site in factors.observed}

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        r = likelihood(factors, exact, latents)
        return factors.space.condition(prediction, r, rng_key, most_rows=self.most_rows)


class _Once:
    """Equal to nothing else."""


class Custom(Twist):
    """A user's: a function of a :class:`~pp_diffusion.states.space.Prediction` and of log r as a function of x.

    :param function: ``(prediction, log_r) -> log r_t``, of shape ``(P, S)``: it sees the particles of one chain.
        ``log_r(z)`` takes states of the model's space, shape ``(P, S, *state_shape)``. It is traced once for each
        :class:`~pp_diffusion.SMC`: what it refers to must not change in between.
    """

    function: Callable[..., Array]
    trace: Any

    def __init__(self, function: Callable[..., Array]) -> None:
        # programs of another one are not taken for this one's, whose globals may have changed
        self._set(name=getattr(function, "__name__", "custom"), function=function, trace=_Once())

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        space, shape = factors.space, prediction.x_t.shape
        steps = space.parts(prediction.reverse, shape), space.parts(prediction.law, shape)

        def of_chain(x_t: Array, x_0: Array, variance: Array, steps: Any, latents: Latents) -> Array:
            seen = _one_chain(space, prediction, x_t, x_0, variance, steps)
            in_chain = jax.tree.map(lambda u: u[:, None], latents)
            log_twist = self.function(seen, lambda z: factors.read(z[:, None], in_chain).log_r[:, 0])
            if jnp.shape(log_twist) != x_t.shape[:2]:
                raise ValueError(
                    f"twist must return an array of shape {x_t.shape[:2]}; got shape {jnp.shape(log_twist)}"
                )
            return log_twist

        def value(x_0: Array) -> Array:
            over_chains = jax.vmap(of_chain, in_axes=1, out_axes=1, axis_name=CHAINS)
            return over_chains(prediction.x_t, x_0, prediction.variance, steps, latents)

        return space.shift(prediction, value)


def _one_chain(
    space: StateSpace, prediction: Prediction, x_t: Array, x_0: Array, variance: Array, steps: Any
) -> Prediction:
    """A chain's own part of a prediction, under ``vmap`` over chains."""
    reverse, law = (space.joined(parts) for parts in steps)

    def covariance(v: Array) -> Array:
        # the network is linearised for all chains at once
        products = prediction.covariance(jax.lax.all_gather(v, CHAINS, axis=1))
        return jax.lax.dynamic_index_in_dim(products, jax.lax.axis_index(CHAINS), axis=1, keepdims=False)

    return prediction._replace(x_t=x_t, x_0=x_0, variance=variance, covariance=covariance, reverse=reverse, law=law)


def likelihood(factors: Factors, exact: Exact, latents: Latents) -> Likelihood:
    """The model's r at these latents, as a state space asks for it."""
    return Likelihood(
        lambda z: factors.read(z, latents),
        factors.has_other,
        factors.num_numbers,
        factors.owner,
        bool(latents),
        exact.where,
        exact.value,
        exact.counts,
    )


TWISTS: dict[str, Twist] = {
    "constant": Power("constant"),
    "annealed": Power("annealed"),
    "lookahead": Lookahead(),
    "moment": Moment(),
}


def as_twist(twist: Any) -> Twist:
    """A twist by name, a function's, or itself; ``None`` is ``"moment"``.

    :raises ValueError: for an unknown name.
    """
    if twist is None:
        return TWISTS["moment"]
    if isinstance(twist, Twist):
        return twist
    if isinstance(twist, str) and twist in TWISTS:
        return TWISTS[twist]
    if callable(twist):
        return Custom(twist)
    raise ValueError(f"twist must be one of {', '.join(map(repr, TWISTS))}, or a function; got {twist!r}")
