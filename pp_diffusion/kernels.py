r"""Markov diffusion kernels :math:`T_\pi(x_t \mid x_{t-1}; \beta_t)` (the paper, §2.1 and table App. 1).

A kernel knows its stationary distribution :math:`\pi`, one step, many steps at once, and the reverse of a step given
the datum; everything else in the package is written in these terms. Densities are in nats.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike
from numpyro.distributions import constraints

from pp_diffusion._frozen import Frozen
from pp_diffusion.parameterizations import BINOMIAL, GAUSSIAN, Parameterization

if TYPE_CHECKING:
    from pp_diffusion.schedules import Rates


class Kernel(Frozen):
    r"""Base class of diffusion kernels.

    A subclass sets ``event_shape`` (in ``__init__``, by ``self._set``), :attr:`parameterizations` and
    :attr:`event_support`, and defines :meth:`stationary`, :meth:`transition`, :meth:`marginal` and :meth:`posterior`.
    The other methods have general defaults, to be overridden where a closed form is at hand.

    Shapes: a state has shape ``(*batch, *event_shape)``; rates (``beta``, ``log_snr``, the fields of
    :class:`~pp_diffusion.schedules.Rates`) are scalars or broadcast against ``batch``; distributions have
    ``event_shape`` as theirs.
    """

    event_shape: tuple[int, ...]

    #: The support of one entry of a state.
    event_support: ClassVar[constraints.Constraint]
    #: Rules that the kernel understands, by name; the first is the default.
    parameterizations: ClassVar[Mapping[str, Parameterization]]

    @abstractmethod
    def stationary(self) -> dist.Distribution:
        r"""The distribution :math:`\pi` that the kernel leaves invariant; batch shape ``()``."""
        raise NotImplementedError

    @abstractmethod
    def transition(self, x_prev: Array, beta: ArrayLike) -> dist.Distribution:
        r""":math:`T_\pi(x_t \mid x_{t-1}; \beta_t)`."""
        raise NotImplementedError

    @abstractmethod
    def marginal(self, x_0: Array, log_snr: ArrayLike) -> dist.Distribution:
        r""":math:`q(x_t \mid x_0)`, t steps at once, from :math:`\lambda_t = \log \bar\alpha_t/(1-\bar\alpha_t)`."""
        raise NotImplementedError

    @abstractmethod
    def posterior(self, x_t: Array, x_0: Array, rates: Rates) -> dist.Distribution:
        r""":math:`q(x_{t-1} \mid x_t, x_0)` for the step that ``rates`` describes."""
        raise NotImplementedError

    @property
    def event_ndim(self) -> int:
        return len(self.event_shape)

    @property
    def is_discrete(self) -> bool:
        return bool(self.event_support.is_discrete)

    @property
    def support(self) -> constraints.Constraint:
        """The support of a state."""
        return constraints.independent(self.event_support, self.event_ndim)

    def over_events(self, rate: ArrayLike) -> Array:
        """A rate of batch shape with unit axes for the event, to broadcast against a state."""
        rate = jnp.asarray(rate)
        return rate.reshape(rate.shape + (1,) * self.event_ndim)

    def sum_events(self, x: Array) -> Array:
        """The sum over the event's axes."""
        return jnp.sum(x, axis=tuple(range(-self.event_ndim, 0))) if self.event_ndim else x

    def as_state(self, x: ArrayLike) -> Array:
        """``x`` in the dtype in which trajectories carry states: the default float."""
        return jnp.asarray(x, dtype=float)

    def check_data(self, x: np.ndarray, name: str) -> None:
        """Refuses data that the kernel has no density for.

        :raises ValueError: naming the argument ``name``, what came and what was expected.
        """
        inside = np.asarray(self.event_support(x))
        if not inside.all():
            wrong = x[~inside].flat[0]
            raise ValueError(
                f"{name} must be {_plain(self.event_support)} for a {type(self).__name__}; it holds {wrong}"
            )

    def kl(self, q: dist.Distribution, p: dist.Distribution) -> Array:
        """KL(q ‖ p) of two of the kernel's distributions, in nats, of batch shape."""
        return dist.kl_divergence(q, p)

    def draw_and_log_ratio(self, rng_key: Array, q: dist.Distribution, p: dist.Distribution) -> tuple[Array, Array]:
        """A draw x of q, and log p(x) − log q(x)."""
        x = q.sample(rng_key)
        return self.as_state(x), p.log_prob(x) - q.log_prob(x)

    def from_noise(self, distribution: dist.Distribution, noise: Array) -> Array:
        """The draw of one of the kernel's distributions that standard normal noise of a state's shape gives."""
        raise NotImplementedError(f"{type(self).__name__} does not define from_noise")

    def perturb(
        self, rng_key: Array, distribution: dist.Distribution, log_r: Callable[[Array], Array]
    ) -> dist.Distribution:
        """One of the kernel's distributions p, made into an approximation of one proportional to p·r.

        :param rng_key: for kernels whose form is random, given the distribution.
        :param log_r: from states, shape ``(*batch, *event_shape)``, to log r, shape ``batch``, in nats.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define perturb")

    def prior_kl(self, x_0: Array, log_snr: ArrayLike) -> Array:
        r"""KL(:math:`q(x_T \mid x_0)` ‖ :math:`\pi`), zero where :math:`\beta_T = 1`."""
        return self.kl(self.marginal(x_0, log_snr), self.stationary().expand(x_0.shape[: x_0.ndim - self.event_ndim]))

    def expected_last_step(self, rng_key: Array, x_0: Array, rates: Rates) -> Array:
        r""":math:`E_{q(x_1 \mid x_0)} \log T_\pi(x_0 \mid x_1; \beta_1)`, the fixed last step of the paper (eq. 44).

        :param rng_key: for the default, which draws one :math:`x_1`; a closed form ignores it.
        """
        x_1 = self.as_state(self.marginal(x_0, rates.log_snr).sample(rng_key))
        return self.transition(x_1, rates.beta).log_prob(x_0)

    def x_0_given(self, x_t: Array, reverse: dist.Distribution, rates: Rates) -> dist.Distribution:
        r"""What :math:`p(x_{t-1} \mid x_t)` says of :math:`x_0`, entry by entry, whatever the network's outputs are.

        The distribution of :math:`x_0` for which :math:`\int q(x_{t-1} \mid x_t, x_0)\, p(x_0 \mid x_t)\, dx_0` has
        the moments of ``reverse``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define x_0_given")

    def reverse_given(self, x_t: Array, x_0: dist.Distribution, rates: Rates) -> dist.Distribution:
        """The reverse step in which :math:`x_0` has this distribution: the inverse of :meth:`x_0_given`."""
        raise NotImplementedError(f"{type(self).__name__} does not define reverse_given")

    def entropy(self, distribution: dist.Distribution) -> Array:
        """The entropy of one of the kernel's distributions, in nats, of batch shape."""
        return distribution.entropy()

    def entropy_bounds(self, rates: Rates, x_0: Array | None) -> tuple[Array, Array]:
        r"""Bounds on :math:`H_q(X_{t-1} \mid X_t)` for each step (eq. 24), in nats, of the shape of ``rates.t``.

        :param x_0: data, shape ``(N, *event_shape)``; ``None`` where the bounds do not depend on them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define entropy_bounds")

    def entropy_slack(self, x_0: Array) -> Array:
        r"""By how much the data meet the condition of the upper bound of eq. 24, in nats: it holds if this is >= 0.

        :math:`H(X_t) \ge H(X_{t-1})` is what it needs. As :math:`H(X_t) = -KL(q_t \| \pi) - E \log \pi(X_t)`, and the
        divergence falls with t, it is enough that :math:`E \log \pi(X_0) \ge -H(\pi)`, for a kernel under which
        :math:`E \log \pi(X_t)` moves from there to :math:`-H(\pi)` without turning; the slack is the difference.
        """
        return self.null_log_prob(x_0).mean() + self.entropy(self.stationary())

    def step_importance(self, rates: Rates) -> Array:
        """How often training should draw each step, up to a factor: about the size of its loss's gradient.

        Positive, of the shape of ``rates.t``. It changes the variance of the estimate of K and of its gradient, never
        their mean. The default is uniform.
        """
        return jnp.ones_like(rates.drop)

    def null_log_prob(self, x_0: Array) -> Array:
        r""":math:`\log \pi(x_0)`; its mean over data is the paper's :math:`L_{null}`."""
        return self.stationary().log_prob(x_0)


class GaussianKernel(Kernel):
    r"""Gaussian diffusion :math:`N(x_{t-1}\sqrt{1-\beta_t},\ \beta_t)` to :math:`\pi = N(0, 1)`.

    :param tuple event_shape: the shape of one datum.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from pp_diffusion import GaussianKernel
        >>> step = GaussianKernel(event_shape=(2,)).transition(jnp.array([1.0, -2.0]), beta=0.19)
        >>> [f"{mean:.1f}" for mean in step.mean], step.event_shape
        (['0.9', '-1.8'], (2,))
    """

    event_support = constraints.real
    parameterizations = GAUSSIAN

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        self._set(event_shape=_check_event_shape(event_shape))

    def normal(self, mean: Array, variance: Array) -> dist.Distribution:
        """A diagonal normal distribution over states."""
        return dist.Normal(mean, jnp.sqrt(variance), validate_args=False).to_event(self.event_ndim)

    def stationary(self) -> dist.Distribution:
        return self.normal(jnp.zeros(self.event_shape), jnp.ones(self.event_shape))

    def transition(self, x_prev: Array, beta: ArrayLike) -> dist.Distribution:
        beta = self.over_events(beta)
        return self._normal_like(x_prev, x_prev * jnp.sqrt(1 - beta), beta)

    def marginal(self, x_0: Array, log_snr: ArrayLike) -> dist.Distribution:
        log_snr = self.over_events(log_snr)
        return self._normal_like(x_0, x_0 * jnp.sqrt(jax.nn.sigmoid(log_snr)), jax.nn.sigmoid(-log_snr))

    def posterior(self, x_t: Array, x_0: Array, rates: Rates) -> dist.Distribution:
        mean, variance = self.posterior_moments(x_t, x_0, rates)
        return self._normal_like(mean, mean, variance)

    def posterior_moments(self, x_t: Array, x_0: Array, rates: Rates) -> tuple[Array, Array]:
        r"""Mean of :math:`q(x_{t-1} \mid x_t, x_0)`, and its variance :math:`\tilde\beta_t` with unit event axes."""
        from_x_0 = jnp.sqrt(rates.previous_alpha_bar) * rates.innovation
        mean = x_t + (self.over_events(rates.shrinkage) * x_t + self.over_events(from_x_0) * x_0)
        return mean, self.over_events(rates.previous_erased * rates.innovation)

    def _normal_like(self, x: Array, mean: Array, variance: Array) -> dist.Distribution:
        return self.normal(mean, jnp.broadcast_to(variance, jnp.broadcast_shapes(x.shape, variance.shape)))

    def kl(self, q: dist.Distribution, p: dist.Distribution) -> Array:
        q, p = _base(q), _base(p)
        log_ratio = 2 * (jnp.log(q.scale) - jnp.log(p.scale))
        return self.sum_events(0.5 * (jnp.expm1(log_ratio) - log_ratio + ((q.loc - p.loc) / p.scale) ** 2))

    def draw_and_log_ratio(self, rng_key: Array, q: dist.Distribution, p: dist.Distribution) -> tuple[Array, Array]:
        # in terms of the noise, because the log densities themselves cancel where the scales are small
        q, p = _base(q), _base(p)
        noise = jax.random.normal(rng_key, jnp.shape(q.loc), jnp.result_type(q.loc))
        residual = (q.loc - p.loc + q.scale * noise) / p.scale
        log_ratio = jnp.log(q.scale) - jnp.log(p.scale) + 0.5 * (noise - residual) * (noise + residual)
        return q.loc + q.scale * noise, self.sum_events(log_ratio)

    def from_noise(self, distribution: dist.Distribution, noise: Array) -> Array:
        base = _base(distribution)
        return base.loc + base.scale * noise

    def perturb(
        self, rng_key: Array, distribution: dist.Distribution, log_r: Callable[[Array], Array]
    ) -> dist.Distribution:
        r""":math:`N(\mu + \Sigma \nabla \log r(\mu),\ \Sigma)` (eq. 61)."""
        mean, variance = distribution.mean, distribution.variance
        gradient = jax.grad(lambda x: jnp.sum(log_r(x)))(mean)  # rows do not depend on each other
        return self.normal(mean + variance * gradient, variance)

    def prior_kl(self, x_0: Array, log_snr: ArrayLike) -> Array:
        log_snr = self.over_events(log_snr)
        alpha_bar = jax.nn.sigmoid(log_snr)
        return self.sum_events(0.5 * (alpha_bar * (x_0**2 - 1) - jnp.log1p(-jnp.minimum(alpha_bar, _ALMOST_ONE))))

    def x_0_given(self, x_t: Array, reverse: dist.Distribution, rates: Rates) -> dist.Distribution:
        slope = self.over_events(jnp.sqrt(rates.previous_alpha_bar) * rates.innovation)
        without, variance = self.posterior_moments(x_t, jnp.zeros_like(x_t), rates)
        step = _base(reverse)
        return self.normal((step.loc - without) / slope, jnp.maximum(step.scale**2 - variance, 0.0) / slope**2)

    def reverse_given(self, x_t: Array, x_0: dist.Distribution, rates: Rates) -> dist.Distribution:
        slope = self.over_events(jnp.sqrt(rates.previous_alpha_bar) * rates.innovation)
        mean, variance = self.posterior_moments(x_t, _base(x_0).loc, rates)
        return self.normal(mean, variance + slope**2 * _base(x_0).scale ** 2)

    def entropy(self, distribution: dist.Distribution) -> Array:
        scale = _base(distribution).scale
        return self.sum_events(jnp.log(jnp.broadcast_to(scale, distribution.shape())) + 0.5 * _LOG_2_PI_E)

    def entropy_bounds(self, rates: Rates, x_0: Array | None) -> tuple[Array, Array]:
        size = math.prod(self.event_shape)
        lower = jnp.log(rates.previous_erased * rates.innovation)  # the variance of q(x_{t-1} | x_t, x_0)
        return 0.5 * size * (_LOG_2_PI_E + lower), 0.5 * size * (_LOG_2_PI_E + jnp.log(rates.beta))

    def entropy_slack(self, x_0: Array) -> Array:
        # entropy does not change with the mean: with the Fisher information J, dH/ds = (J - d)/2 along the continuous
        # chain, and J >= d²/tr Cov(X_s), which is at least d if the variances' mean is at most 1
        return 0.5 * jnp.sum(1 - jnp.var(x_0, axis=0))

    def step_importance(self, rates: Rates) -> Array:
        # with variance beta_t, the KL's derivative by v is this times v's error, of order one at all noise levels
        return rates.innovation * rates.previous_alpha_bar

    def expected_last_step(self, rng_key: Array, x_0: Array, rates: Rates) -> Array:
        beta = self.over_events(rates.beta)
        return self.sum_events(-0.5 * (jnp.log(2 * jnp.pi * beta) + beta * x_0**2 + 1 - beta))


class BinomialKernel(Kernel):
    r"""Bit flips :math:`B(x_{t-1}(1-\beta_t) + \pi\beta_t)`, bit by bit, to :math:`B(\pi)`.

    All distributions are held by their logits, so that no probability rounds to 0 or above 1.

    :param tuple event_shape: the shape of one datum.
    :param probs: the base rate :math:`\pi` in (0, 1), a number or an array that broadcasts to ``event_shape``. The
        paper's table has 0.5; its heartbeat figures need 0.2.
    :raises ValueError: if ``probs`` is outside (0, 1) or does not broadcast.
    """

    data_fields = ("probs",)
    event_support = constraints.boolean
    parameterizations = BINOMIAL

    probs: np.ndarray

    def __init__(self, event_shape: tuple[int, ...], probs: ArrayLike = 0.5) -> None:
        event_shape = _check_event_shape(event_shape)
        probs = np.asarray(probs, dtype=np.float64)
        if not ((probs > 0) & (probs < 1)).all():
            raise ValueError(f"probs must be in (0, 1); got {probs}")
        try:
            np.broadcast_to(probs, event_shape)
        except ValueError:
            raise ValueError(f"probs must broadcast to event_shape {event_shape}; got shape {probs.shape}") from None
        self._set(event_shape=event_shape, probs=probs)

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
        q, p = _base(q).logits, _base(p).logits
        one = jax.nn.sigmoid(q) * (jax.nn.log_sigmoid(q) - jax.nn.log_sigmoid(p))
        zero = jax.nn.sigmoid(-q) * (jax.nn.log_sigmoid(-q) - jax.nn.log_sigmoid(-p))
        return self.sum_events(one + zero)

    def x_0_given(self, x_t: Array, reverse: dist.Distribution, rates: Rates) -> dist.Distribution:
        one, zero = (jax.nn.sigmoid(self.posterior_logits(x_t, x, rates)) for x in (jnp.ones(()), jnp.zeros(())))
        probs = (jax.nn.sigmoid(_base(reverse).logits) - zero) / (one - zero)
        probs = jnp.clip(probs, jnp.finfo(probs.dtype).tiny, 1 - jnp.finfo(probs.dtype).eps)
        return self.bernoulli(jnp.log(probs) - jnp.log1p(-probs))

    def reverse_given(self, x_t: Array, x_0: dist.Distribution, rates: Rates) -> dist.Distribution:
        return BINOMIAL["x0"].reverse(self, x_t, rates, _base(x_0).logits)

    def perturb(
        self, rng_key: Array, distribution: dist.Distribution, log_r: Callable[[Array], Array]
    ) -> dist.Distribution:
        r"""Per bit :math:`cd / (cd + (1-c)(1-d))` (table App. 1), with c the probability of a 1 and d the share of r
        where the bit is on, among this state and the one where it is off; the other bits are those of a draw."""
        bits = self.as_state(distribution.sample(rng_key))
        rows = bits.reshape(*distribution.batch_shape, -1)

        def flip(i: Array) -> Array:
            return log_r(rows.at[..., i].set(1 - rows[..., i]).reshape(bits.shape))

        here = self.over_events(log_r(bits))
        flipped = jax.lax.map(flip, jnp.arange(rows.shape[-1]), batch_size=_FLIPS_AT_ONCE)
        flipped = jnp.moveaxis(flipped, 0, -1).reshape(bits.shape)
        both_impossible = jnp.isneginf(here) & jnp.isneginf(flipped)  # which says nothing about this bit
        log_odds = jnp.where(both_impossible, 0.0, jnp.where(bits == 1, here - flipped, flipped - here))
        return self.bernoulli(_base(distribution).logits + log_odds)

    def entropy(self, distribution: dist.Distribution) -> Array:
        return self.sum_events(_bit_entropy(jnp.broadcast_to(_base(distribution).logits, distribution.shape())))

    def entropy_bounds(self, rates: Rates, x_0: Array | None) -> tuple[Array, Array]:
        if x_0 is None:
            raise ValueError("data are required: the entropies of a BinomialKernel's steps depend on their activity")
        ones, activity = jnp.ones((rates.num_timesteps, *self.event_shape)), x_0.mean(0)
        at_start = self.over_events(rates.previous_alpha_bar) * activity
        before = at_start + self.over_events(rates.previous_erased) * self._base_rate()  # of x_{t-1}

        def mean(probs: Array, of: Callable[[Array], dist.Distribution]) -> Array:
            one, zero = (_bit_entropy(_base(of(x)).logits) for x in (ones, 0 * ones))
            return self.sum_events(probs * one + (1 - probs) * zero)

        upper = mean(before, lambda x: self.transition(x, rates.beta))  # H(X_t | X_{t-1})
        given_x_0 = mean(activity, lambda x: self.marginal(x, rates.log_snr))  # H(X_t | X_0)
        return upper + jnp.concatenate([jnp.zeros(1), given_x_0[:-1]]) - given_x_0, upper

    def expected_last_step(self, rng_key: Array, x_0: Array, rates: Rates) -> Array:
        one = _base(self.marginal(x_0, rates.log_snr)).logits
        return self.sum_events(
            jax.nn.sigmoid(one) * _base(self.transition(jnp.ones_like(x_0), rates.beta)).log_prob(x_0)
            + jax.nn.sigmoid(-one) * _base(self.transition(jnp.zeros_like(x_0), rates.beta)).log_prob(x_0)
        )


_LOG_2_PI_E = math.log(2 * math.pi * math.e)
_FLIPS_AT_ONCE = 64  # states with one bit flipped that are in memory together
_ALMOST_ONE = 1 - 2.0**-24  # ᾱ_T that rounds to 1 would make the prior's KL infinite


def _base(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution over single entries under ``to_event`` and ``expand``."""
    while isinstance(distribution, (dist.Independent, dist.ExpandedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _bit_entropy(logits: Array) -> Array:
    return -jax.nn.sigmoid(logits) * jax.nn.log_sigmoid(logits) - jax.nn.sigmoid(-logits) * jax.nn.log_sigmoid(-logits)


def _plain(constraint: constraints.Constraint) -> str:
    if constraint is constraints.real:
        return "finite"
    return "0 or 1" if constraint is constraints.boolean else repr(constraint)


def _check_event_shape(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(event_shape, (tuple, list)) or not all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in event_shape
    ):
        raise ValueError(f"event_shape must be a tuple of positive integers, such as (2,); got {event_shape!r}")
    return tuple(int(n) for n in event_shape)
