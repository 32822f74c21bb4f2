r"""Rules that read a network's outputs as :math:`p(x_{t-1} \mid x_t)`, one function per rule.

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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

if TYPE_CHECKING:
    from pp_diffusion.schedules import Rates


class Parameterization(NamedTuple):
    """How a network's outputs become a reverse step.

    :ivar outputs: a link for each output that the network returns, ``"real"``, ``"positive"`` or ``"unit"``; stock
        networks apply it, others are expected to return values of that kind. Each output has ``x_t``'s shape.
    :ivar reverse: ``(kernel, x_t, rates, *outputs) -> Distribution`` over :math:`x_{t-1}`.
    :ivar shortens: whether the outputs keep their meaning on a chain of fewer steps.
    :ivar allows_full_erasure: whether :math:`\\beta_T = 1` is possible.
    """

    outputs: tuple[str, ...]
    reverse: Callable[..., dist.Distribution]
    shortens: bool = False
    allows_full_erasure: bool = True


def gaussian_direct(kernel: Any, x_t: Array, rates: Rates, mean: Array, variance: Array) -> dist.Distribution:
    r"""The outputs are the paper's functions :math:`f_\mu` and :math:`f_\Sigma` (a variance)."""
    return kernel.normal(mean, variance)


def gaussian_paper(kernel: Any, x_t: Array, rates: Rates, z_mu: Array, z_sigma: Array) -> dist.Distribution:
    r"""Eqs. 64–65: :math:`\Sigma = \sigma(z^\Sigma + \sigma^{-1}(\beta_t))` and
    :math:`\mu = (x_t - z^\mu)(1-\Sigma) + z^\mu`.

    It represents variances in (0, 1). With :math:`z^\mu = 0` the mean is :math:`x_t(1-\beta_t)`, not the kernel's
    :math:`x_t\sqrt{1-\beta_t}`.
    """
    logit = z_sigma + kernel.over_events(jnp.log(rates.beta) - jnp.log(rates.retained))
    return kernel.normal((x_t - z_mu) * jax.nn.sigmoid(-logit) + z_mu, jax.nn.sigmoid(logit))


def gaussian_x0(kernel: Any, x_t: Array, rates: Rates, x_0: Array, log_excess: Array) -> dist.Distribution:
    r"""The first output predicts :math:`x_0`; the second is s (see the module's head)."""
    mean, variance = kernel.posterior_moments(x_t, x_0, rates)
    room = rates.previous_alpha_bar * rates.innovation**2 * rates.erased  # β_t − β̃_t, without cancellation
    return kernel.normal(mean, variance + kernel.over_events(room) * jnp.exp(log_excess))


def gaussian_v(kernel: Any, x_t: Array, rates: Rates, v: Array, log_excess: Array) -> dist.Distribution:
    r"""The first output predicts :math:`v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0`."""
    signal, noise = kernel.over_events(jnp.sqrt(rates.alpha_bar)), kernel.over_events(jnp.sqrt(rates.erased))
    return gaussian_x0(kernel, x_t, rates, signal * x_t - noise * v, log_excess)


def gaussian_noise(kernel: Any, x_t: Array, rates: Rates, noise: Array, log_excess: Array) -> dist.Distribution:
    r"""The first output predicts the noise :math:`\epsilon` in :math:`x_t`; infinite where :math:`\bar\alpha_t = 0`."""
    signal, sd = kernel.over_events(jnp.sqrt(rates.alpha_bar)), kernel.over_events(jnp.sqrt(rates.erased))
    return gaussian_x0(kernel, x_t, rates, (x_t - sd * noise) / signal, log_excess)


def binomial_direct(kernel: Any, x_t: Array, rates: Rates, probs: Array) -> dist.Distribution:
    r"""The output is the paper's :math:`f_b`, the probability of a 1 at t-1."""
    tiny, eps = jnp.finfo(probs.dtype).tiny, jnp.finfo(probs.dtype).eps
    probs = jnp.clip(probs, tiny, 1 - eps)
    return kernel.bernoulli(jnp.log(probs) - jnp.log1p(-probs))


def binomial_paper(kernel: Any, x_t: Array, rates: Rates, logits: Array) -> dist.Distribution:
    r"""The output is the logit of :math:`f_b` (the paper's sigmoid readout, appendix D.1.2)."""
    return kernel.bernoulli(logits)


def binomial_x0(kernel: Any, x_t: Array, rates: Rates, logits: Array) -> dist.Distribution:
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


GAUSSIAN = {
    "v": Parameterization(("real", "real"), gaussian_v, shortens=True),
    "x0": Parameterization(("real", "real"), gaussian_x0, shortens=True),
    "noise": Parameterization(("real", "real"), gaussian_noise, shortens=True, allows_full_erasure=False),
    "paper": Parameterization(("real", "real"), gaussian_paper),
    "direct": Parameterization(("real", "positive"), gaussian_direct),
}
BINOMIAL = {
    "x0": Parameterization(("real",), binomial_x0, shortens=True),
    "paper": Parameterization(("real",), binomial_paper),
    "direct": Parameterization(("unit",), binomial_direct),
}
