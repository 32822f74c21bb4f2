r"""Gaussian diffusion, for continuous data.

The true reverse distribution of a Gaussian diffusion has the variance

.. math::
    \tilde\beta_t + c_t^2 \operatorname{Var}(x_0 \mid x_t), \qquad
    c_t = \sqrt{\bar\alpha_{t-1}} (1 - e^{-\Delta_t}),

by the law of total variance, and for data of unit variance it lies between :math:`\tilde\beta_t` and :math:`\beta_t`
(the paper, eq. 24). The rules that predict :math:`x_0` therefore take a second output s and use
:math:`\tilde\beta_t + e^s (\beta_t - \tilde\beta_t)`: s = 0 is exact for standard normal data, any variance that a
reverse step can have is reachable (also where a coordinate's variance exceeds 1), and at t = 1, where
:math:`\tilde\beta_1 = 0`, it is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike
from numpyro.distributions import constraints

from pp_diffusion.kernels.base import Kernel, base_of, check_event_shape
from pp_diffusion.rules import Parameterization
from pp_diffusion.schedules import Rates
from pp_diffusion.states import Continuous

_LOG_2_PI_E = math.log(2 * math.pi * math.e)
_ALMOST_ONE = 1 - 2.0**-24  # ᾱ_T that rounds to 1 would make the prior's KL infinite


def _direct(kernel: GaussianKernel, x_t: Array, rates: Rates, mean: Array, variance: Array) -> dist.Distribution:
    r"""The outputs are the paper's functions :math:`f_\mu` and :math:`f_\Sigma` (a variance)."""
    return kernel.normal(mean, variance)


def _paper(kernel: GaussianKernel, x_t: Array, rates: Rates, z_mu: Array, z_sigma: Array) -> dist.Distribution:
    r"""Eqs. 64–65: :math:`\Sigma = \sigma(z^\Sigma + \sigma^{-1}(\beta_t))` and
    :math:`\mu = (x_t - z^\mu)(1-\Sigma) + z^\mu`.

    It represents variances in (0, 1). With :math:`z^\mu = 0` the mean is :math:`x_t(1-\beta_t)`, not the kernel's
    :math:`x_t\sqrt{1-\beta_t}`.
    """
    logit = z_sigma + kernel.over_events(jnp.log(rates.beta) - jnp.log(rates.retained))
    return kernel.normal((x_t - z_mu) * jax.nn.sigmoid(-logit) + z_mu, jax.nn.sigmoid(logit))


def _x0(kernel: GaussianKernel, x_t: Array, rates: Rates, x_0: Array, log_excess: Array) -> dist.Distribution:
    r"""The first output predicts :math:`x_0`; the second is s (see the file's head)."""
    mean, variance = kernel.posterior_moments(x_t, x_0, rates)
    room = rates.previous_alpha_bar * rates.innovation**2 * rates.erased  # β_t − β̃_t, without cancellation
    return kernel.normal(mean, variance + kernel.over_events(room) * jnp.exp(log_excess))


def _v(kernel: GaussianKernel, x_t: Array, rates: Rates, velocity: Array, log_excess: Array) -> dist.Distribution:
    r"""The first output predicts :math:`v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0`."""
    signal, noise = kernel.over_events(jnp.sqrt(rates.alpha_bar)), kernel.over_events(jnp.sqrt(rates.erased))
    return _x0(kernel, x_t, rates, signal * x_t - noise * velocity, log_excess)


def _noise(kernel: GaussianKernel, x_t: Array, rates: Rates, epsilon: Array, log_excess: Array) -> dist.Distribution:
    r"""The first output predicts the noise :math:`\epsilon` in :math:`x_t`; infinite where :math:`\bar\alpha_t = 0`."""
    signal, sd = kernel.over_events(jnp.sqrt(rates.alpha_bar)), kernel.over_events(jnp.sqrt(rates.erased))
    return _x0(kernel, x_t, rates, (x_t - sd * epsilon) / signal, log_excess)


RULES = {
    "v": Parameterization(("real", "real"), _v, shortens=True),
    "x0": Parameterization(("real", "real"), _x0, shortens=True),
    "noise": Parameterization(("real", "real"), _noise, shortens=True, allows_full_erasure=False),
    "paper": Parameterization(("real", "real"), _paper),
    "direct": Parameterization(("real", "positive"), _direct),
}


class GaussianKernel(Kernel, saved_as="GaussianKernel"):
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
    parameterizations = RULES

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        self._set(event_shape=check_event_shape(event_shape))

    def normal(self, mean: Array, variance: Array) -> dist.Distribution:
        """A diagonal normal distribution over states."""
        return dist.Normal(mean, jnp.sqrt(variance), validate_args=False).to_event(self.event_ndim)

    @property
    def state_space(self) -> Continuous:
        return Continuous(self)

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
        q, p = base_of(q), base_of(p)
        log_ratio = 2 * (jnp.log(q.scale) - jnp.log(p.scale))
        return self.sum_events(0.5 * (jnp.expm1(log_ratio) - log_ratio + ((q.loc - p.loc) / p.scale) ** 2))

    def draw_and_log_ratio(self, rng_key: Array, q: dist.Distribution, p: dist.Distribution) -> tuple[Array, Array]:
        # in terms of the noise, because the log densities themselves cancel where the scales are small
        q, p = base_of(q), base_of(p)
        noise = jax.random.normal(rng_key, jnp.shape(q.loc), jnp.result_type(q.loc))
        residual = (q.loc - p.loc + q.scale * noise) / p.scale
        log_ratio = jnp.log(q.scale) - jnp.log(p.scale) + 0.5 * (noise - residual) * (noise + residual)
        return q.loc + q.scale * noise, self.sum_events(log_ratio)

    def from_noise(self, distribution: dist.Distribution, noise: Array) -> Array:
        base = base_of(distribution)
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
        step = base_of(reverse)
        return self.normal((step.loc - without) / slope, jnp.maximum(step.scale**2 - variance, 0.0) / slope**2)

    def reverse_given(self, x_t: Array, x_0: dist.Distribution, rates: Rates) -> dist.Distribution:
        slope = self.over_events(jnp.sqrt(rates.previous_alpha_bar) * rates.innovation)
        mean, variance = self.posterior_moments(x_t, base_of(x_0).loc, rates)
        return self.normal(mean, variance + slope**2 * base_of(x_0).scale ** 2)

    def guided(self, given: dist.Distribution, without: dist.Distribution, strength: Array) -> dist.Distribution:
        # the product of the powers, where the two variances are equal
        mean, other = base_of(given).loc, base_of(without).loc
        variance, broad = base_of(given).scale ** 2, base_of(without).scale ** 2
        return self.normal(other + strength * (mean - other), broad + jnp.clip(strength, 0, 1) * (variance - broad))

    def entropy(self, distribution: dist.Distribution) -> Array:
        scale = base_of(distribution).scale
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
