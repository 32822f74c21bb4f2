"""Binomial diffusion, for bits."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike
from numpyro.distributions import constraints

from pp_diffusion.kernels.base import Kernel, base_of, check_event_shape
from pp_diffusion.rules import Parameterization
from pp_diffusion.schedules import Rates
from pp_diffusion.states import Bits


def _direct(kernel: BinomialKernel, x_t: Array, rates: Rates, probs: Array) -> dist.Distribution:
    r"""The output is the paper's :math:`f_b`, the probability of a 1 at t-1."""
    tiny, eps = jnp.finfo(probs.dtype).tiny, jnp.finfo(probs.dtype).eps
    probs = jnp.clip(probs, tiny, 1 - eps)
    return kernel.bernoulli(jnp.log(probs) - jnp.log1p(-probs))


def _paper(kernel: BinomialKernel, x_t: Array, rates: Rates, logits: Array) -> dist.Distribution:
    r"""The output is the logit of :math:`f_b` (the paper's sigmoid readout, appendix D.1.2)."""
    return kernel.bernoulli(logits)


def _x0(kernel: BinomialKernel, x_t: Array, rates: Rates, logits: Array) -> dist.Distribution:
    r"""The output is the logit of :math:`P(x_0 = 1 \mid x_t)`, and
    :math:`f_b = \sum_{x_0} P(x_0 \mid x_t)\, q(x_{t-1} = 1 \mid x_t, x_0)`, per bit.

    The best factorised reverse step has this form, so nothing is lost by it.
    """
    if_one = kernel.posterior_logits(x_t, jnp.ones_like(x_t), rates)
    if_zero = kernel.posterior_logits(x_t, jnp.zeros_like(x_t), rates)
    log_one, log_zero = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    log_p = jnp.logaddexp(log_one + jax.nn.log_sigmoid(if_one), log_zero + jax.nn.log_sigmoid(if_zero))
    log_not_p = jnp.logaddexp(log_one + jax.nn.log_sigmoid(-if_one), log_zero + jax.nn.log_sigmoid(-if_zero))
    return kernel.bernoulli(log_p - log_not_p)


RULES = {
    "x0": Parameterization(("real",), _x0, shortens=True),
    "paper": Parameterization(("real",), _paper),
    "direct": Parameterization(("unit",), _direct),
}


class BinomialKernel(Kernel, saved_as="BinomialKernel"):
    r"""Bit flips :math:`B(x_{t-1}(1-\beta_t) + \pi\beta_t)`, bit by bit, to :math:`B(\pi)`.

    All distributions are held by their logits, so that no probability rounds to 0 or above 1.

    :param tuple event_shape: the shape of one datum.
    :param probs: the base rate :math:`\pi` in (0, 1), a number or an array that broadcasts to ``event_shape``. The
        paper's table has 0.5; its heartbeat figures need 0.2.
    :raises ValueError: if ``probs`` is outside (0, 1) or does not broadcast.
    """

    data_fields = ("probs",)
    event_support = constraints.boolean
    parameterizations = RULES

    probs: np.ndarray

    def __init__(self, event_shape: tuple[int, ...], probs: ArrayLike = 0.5) -> None:
        event_shape = check_event_shape(event_shape)
        probs = np.asarray(probs, dtype=np.float64)
        if not ((probs > 0) & (probs < 1)).all():
            raise ValueError(f"probs must be in (0, 1); got {probs}")
        try:
            np.broadcast_to(probs, event_shape)
        except ValueError:
            raise ValueError(f"probs must broadcast to event_shape {event_shape}; got shape {probs.shape}") from None
        self._set(event_shape=event_shape, probs=probs)

    @property
    def state_space(self) -> Bits:
        return Bits(self)

    def bernoulli(self, logits: Array) -> dist.Distribution:
        """Independent bits with these logits, kept where both probabilities are positive in floating point."""
        limit = -np.log(np.finfo(logits.dtype).tiny)
        return dist.BernoulliLogits(jnp.clip(logits, -limit, limit), validate_args=False).to_event(self.event_ndim)

    def stationary(self) -> dist.Distribution:
        probs = self._base_rate()
        return self.bernoulli(jnp.broadcast_to(jnp.log(probs) - jnp.log1p(-probs), self.event_shape))

    def transition(self, x_prev: Array, beta: ArrayLike) -> dist.Distribution:
        return self.bernoulli(self._mixture_logits(x_prev, self.over_events(beta)))

    def marginal(self, x_0: Array, log_snr: ArrayLike) -> dist.Distribution:
        return self.bernoulli(self._mixture_logits(x_0, jax.nn.sigmoid(-self.over_events(log_snr))))

    def posterior(self, x_t: Array, x_0: Array, rates: Rates) -> dist.Distribution:
        return self.bernoulli(self.posterior_logits(x_t, x_0, rates))

    def posterior_logits(self, x_t: Array, x_0: Array, rates: Rates) -> Array:
        r"""Logits of :math:`q(x_{t-1} \mid x_t, x_0)`: prior log odds and the likelihood ratio of :math:`x_t`."""
        probs, beta = self._base_rate(), self.over_events(rates.beta)
        stay_one, stay_zero = jnp.log1p(-(1 - probs) * beta), jnp.log1p(-probs * beta)
        become_one, become_zero = jnp.log(probs * beta), jnp.log((1 - probs) * beta)
        log_likelihood_ratio = jnp.where(x_t == 1, stay_one - become_one, become_zero - stay_zero)
        logits = self._mixture_logits(x_0, self.over_events(rates.previous_erased)) + log_likelihood_ratio
        limit = -np.log(np.finfo(logits.dtype).tiny)
        return jnp.clip(logits, -limit, limit)

    def _base_rate(self) -> Array:
        return jnp.asarray(self.probs, dtype=float)

    def _mixture_logits(self, x: Array, erased: Array) -> Array:
        """Logits of the probability x(1 − erased) + π·erased, for x in {0, 1}; infinite where nothing is erased."""
        probs = self._base_rate()
        to_zero, to_one = (1 - probs) * erased, probs * erased
        return jnp.where(x == 1, jnp.log1p(-to_zero) - jnp.log(to_zero), jnp.log(to_one) - jnp.log1p(-to_one))

    def kl(self, q: dist.Distribution, p: dist.Distribution) -> Array:
        q, p = base_of(q).logits, base_of(p).logits
        one = jax.nn.sigmoid(q) * (jax.nn.log_sigmoid(q) - jax.nn.log_sigmoid(p))
        zero = jax.nn.sigmoid(-q) * (jax.nn.log_sigmoid(-q) - jax.nn.log_sigmoid(-p))
        return self.sum_events(one + zero)

    def x_0_given(self, x_t: Array, reverse: dist.Distribution, rates: Rates) -> dist.Distribution:
        one, zero = (jax.nn.sigmoid(self.posterior_logits(x_t, x, rates)) for x in (jnp.ones(()), jnp.zeros(())))
        probs = (jax.nn.sigmoid(base_of(reverse).logits) - zero) / (one - zero)
        probs = jnp.clip(probs, jnp.finfo(probs.dtype).tiny, 1 - jnp.finfo(probs.dtype).eps)
        return self.bernoulli(jnp.log(probs) - jnp.log1p(-probs))

    def reverse_given(self, x_t: Array, x_0: dist.Distribution, rates: Rates) -> dist.Distribution:
        return _x0(self, x_t, rates, base_of(x_0).logits)

    def perturb(
        self, rng_key: Array, distribution: dist.Distribution, log_r: Callable[[Array], Array]
    ) -> dist.Distribution:
        r"""Per bit :math:`cd / (cd + (1-c)(1-d))` (table App. 1), with c the probability of a 1 and d the share of r
        where the bit is on, among this state and the one where it is off; the other bits are those of a draw."""
        zero, one = self.state_space.log_r_of_values(self.as_state(distribution.sample(rng_key)), log_r)
        both_impossible = jnp.isneginf(zero) & jnp.isneginf(one)  # which says nothing about this bit
        log_odds = jnp.where(both_impossible, 0.0, one - zero)
        return self.bernoulli(base_of(distribution).logits + log_odds)

    def guided(self, given: dist.Distribution, without: dist.Distribution, strength: Array) -> dist.Distribution:
        one, other = base_of(given).logits, base_of(without).logits
        return self.bernoulli(other + strength * (one - other))

    def entropy(self, distribution: dist.Distribution) -> Array:
        return self.sum_events(_bit_entropy(jnp.broadcast_to(base_of(distribution).logits, distribution.shape())))

    def entropy_bounds(self, rates: Rates, x_0: Array | None) -> tuple[Array, Array]:
        if x_0 is None:
            raise ValueError("data are required: the entropies of a BinomialKernel's steps depend on their activity")
        ones, activity = jnp.ones((rates.num_timesteps, *self.event_shape)), x_0.mean(0)
        at_start = self.over_events(rates.previous_alpha_bar) * activity
        before = at_start + self.over_events(rates.previous_erased) * self._base_rate()  # of x_{t-1}

        def mean(probs: Array, of: Callable[[Array], dist.Distribution]) -> Array:
            one, zero = (_bit_entropy(base_of(of(x)).logits) for x in (ones, 0 * ones))
            return self.sum_events(probs * one + (1 - probs) * zero)

        upper = mean(before, lambda x: self.transition(x, rates.beta))  # H(X_t | X_{t-1})
        given_x_0 = mean(activity, lambda x: self.marginal(x, rates.log_snr))  # H(X_t | X_0)
        return upper + jnp.concatenate([jnp.zeros(1), given_x_0[:-1]]) - given_x_0, upper

    def expected_last_step(self, rng_key: Array, x_0: Array, rates: Rates) -> Array:
        one = base_of(self.marginal(x_0, rates.log_snr)).logits
        return self.sum_events(
            jax.nn.sigmoid(one) * base_of(self.transition(jnp.ones_like(x_0), rates.beta)).log_prob(x_0)
            + jax.nn.sigmoid(-one) * base_of(self.transition(jnp.zeros_like(x_0), rates.beta)).log_prob(x_0)
        )


def _bit_entropy(logits: Array) -> Array:
    return -jax.nn.sigmoid(logits) * jax.nn.log_sigmoid(logits) - jax.nn.sigmoid(-logits) * jax.nn.log_sigmoid(-logits)
