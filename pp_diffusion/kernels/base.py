r"""Markov diffusion kernels :math:`T_\pi(x_t \mid x_{t-1}; \beta_t)` (the paper, §2.1 and table App. 1).

A kernel knows its stationary distribution :math:`\pi`, one step, many steps at once, and the reverse of a step given
the datum; everything else in the package is written in these terms. Densities are in nats.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike
from numpyro.distributions import constraints

from pp_diffusion.frozen import Frozen
from pp_diffusion.rules import Parameterization
from pp_diffusion.schedules import Rates
from pp_diffusion.states import StateSpace


class Kernel(Frozen):
    r"""Base class of diffusion kernels.

    A subclass sets ``event_shape`` (in ``__init__``, by ``self._set``), :attr:`parameterizations` and
    :attr:`event_support`, and defines :meth:`stationary`, :meth:`transition`, :meth:`marginal` and :meth:`posterior`.
    The other methods have general defaults, to be overridden where a closed form is at hand. With
    ``class Own(Kernel, saved_as="Own")`` saved files can name it, where the class has been defined before loading.

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

    def batch_shape_of(self, x: Array) -> tuple[int, ...]:
        """The batch shape of states."""
        return x.shape[: x.ndim - self.event_ndim]

    @property
    def is_discrete(self) -> bool:
        return bool(self.event_support.is_discrete)

    @property
    def state_space(self) -> StateSpace:
        """What :class:`~pp_diffusion.SMC` knows of states: how r is averaged over them, and what steps are drawn from.

        :class:`pp_diffusion.states.Continuous` for normal steps, :class:`pp_diffusion.states.Finite` for entries of
        finitely many values; both need :meth:`x_0_given`, the second :meth:`reverse_given` too.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define state_space")

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
                f"{name} must be {_in_words(self.event_support)} for a {type(self).__name__}; it holds {wrong}"
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
        return self.kl(self.marginal(x_0, log_snr), self.stationary().expand(self.batch_shape_of(x_0)))

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

    def guided(self, given: dist.Distribution, without: dist.Distribution, strength: Array) -> dist.Distribution:
        r"""A step that is led away from the one that knows no context, beyond the one that does.

        About :math:`p(x_{t-1} \mid x_t)^{1-w}\, p(x_{t-1} \mid x_t, c)^w`.

        :param given, without: the steps with the context and with none.
        :param strength: w; 1 is the step with the context, 0 the one with none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define guided")

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


def base_of(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution over single entries under ``to_event`` and ``expand``."""
    while isinstance(distribution, (dist.Independent, dist.ExpandedDistribution)):
        distribution = distribution.base_dist
    return distribution


def _in_words(constraint: constraints.Constraint) -> str:
    if constraint is constraints.real:
        return "finite"
    return "0 or 1" if constraint is constraints.boolean else repr(constraint)


def check_event_shape(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(event_shape, (tuple, list)) or not all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in event_shape
    ):
        raise ValueError(f"event_shape must be a tuple of positive integers, such as (2,); got {event_shape!r}")
    return tuple(int(n) for n in event_shape)
