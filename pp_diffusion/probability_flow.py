r"""The probability-flow ODE of a reverse process: one map between x and noise, and the density that it carries.

With the signal :math:`\alpha = \sqrt{\bar\alpha}`, and :math:`\lambda` the log-SNR,

.. math::
    \frac{dx}{d\lambda} = \frac\alpha2 \left( E[x_0 \mid x, \lambda] - \alpha x \right), \qquad
    \lambda = 4 \sinh s,

in equal steps of s: most of them lie about log-SNR 0, where the data's shape is decided. The error of a log density at
given calls is a quarter of what it is with equal steps of :math:`\lambda`, and a hundredth of what the exponential
forms (those of DDIM, for :math:`x / \sqrt{1 - \bar\alpha}`) have, because their divergence is a small difference of
large terms.

**The ends.** At the first level that the network describes, of noise variance :math:`v = e^{-\lambda_1}` beside the
data, the score is held as it is there, and v goes to 0 in one step more, :math:`dx/dv = -\tfrac12 \nabla \log p_v`;
log p is then wrong by :math:`v^2` over the fourth power of the data's finest scale. At the last level that is finite
(:math:`\beta_T = 1` has none) :math:`x \sim N(\alpha E[x_0], 1)`, with :math:`E[x_0]` as the network tells it at T;
log p is then wrong by about :math:`\bar\alpha\, |\operatorname{Cov}(x_0) - 1|`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Literal

from pp_diffusion.frozen import Frozen
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.schedules import Rates
from pp_diffusion.solvers import Multistep, RungeKutta

WIDTH = 4.0  # of the log-SNRs about 0 that get most of the steps
SAMPLER_WIDTH = 2.0  # the same for few calls


class ProbabilityFlow(Frozen):
    """The ODE of a process, with a solver's steps.

    :param ReverseProcess process: the process; its kernel is Gaussian.
    :param RungeKutta solver: the method.
    :param num_steps: steps between the first and the last level; one more goes to the data.
    :param divergence: of :math:`E[x_0 | x]`: an object as those of :mod:`pp_diffusion.divergence`.
    :param sampler: of draws; ``None`` is the solver.
    """

    data_fields = ("process", "divergence")

    process: ReverseProcess
    solver: RungeKutta
    num_steps: int
    divergence: Any
    sampler: Multistep | None
    between: bool

    def __init__(
        self,
        process: ReverseProcess,
        solver: RungeKutta,
        num_steps: int,
        divergence: Any,
        sampler: Multistep | None = None,
    ) -> None:
        self._set(
            process=process,
            solver=solver,
            num_steps=num_steps,
            divergence=divergence,
            sampler=sampler,
            between=process.rule.shortens and not _reads_steps(process),
        )

    @property
    def levels(self) -> Rates:
        """The steps that the network describes."""
        return self.process.rates.at(slice(self.process.first_network_step, None))

    def from_noise(self, noise: Array) -> Array:
        """x in the model's space, of noise of shape ``(*batch, *event_shape)``."""
        if self.sampler is not None:
            return self._by_sampler(self.sampler, noise)
        return self.solver.solve(self.slope, self._start(noise), *self._to_data()) / self._first_signal

    def from_noise_with_log_prob(self, noise: Array) -> tuple[Array, Array]:
        """x, and its log density as it comes out on the way from the noise."""
        state = self._start(noise), jnp.zeros(self._batch_shape(noise))
        x, change = self.solver.solve(self.slope_and_divergence, state, *self._to_data())
        return x / self._first_signal, self._log_base(noise) - change + self._log_signal

    def to_noise(self, x: Array) -> Array:
        """The noise that x comes from."""
        x = x * self._first_signal
        end = self.solver.solve(self.slope, x, *self._to_noise())
        return end - self._last_mean(end)

    def log_prob(self, x: Array) -> Array:
        """Log density in the model's space, in nats, of batch shape."""
        state = x * self._first_signal, jnp.zeros(self._batch_shape(x))
        end, change = self.solver.solve(self.slope_and_divergence, state, *self._to_noise())
        return self._log_base(end - self._last_mean(end)) + change + self._log_signal

    # --- the field ----------------------------------------------------------------------------------------------

    def x_0_given(self, x: Array, log_snr: Array) -> Array:
        r""":math:`E[x_0 \mid x]` at a log-SNR: by the network, or, for one that knows the trained steps only, between
        its answers at the two next to it."""
        log_snrs = self._finite_log_snrs()
        if self.between:
            nearest = jnp.argmin(jnp.abs(log_snrs - log_snr))
            return self._x_0_at(x, self.levels.at(nearest)._replace(log_snr=log_snr))
        size = log_snrs.shape[0]
        above = jnp.clip(jnp.searchsorted(-log_snrs, -log_snr, side="right") - 1, 0, max(size - 2, 0))
        pair = jnp.stack([above, jnp.minimum(above + 1, size - 1)])
        # batch axes come first, so that contexts broadcast
        both = jax.vmap(lambda i: self._x_0_at(x, self.levels.at(i)))(pair)
        fall = log_snrs[pair[0]] - log_snrs[pair[1]]
        share = jnp.where(fall > 0, (log_snrs[pair[0]] - log_snr) / jnp.where(fall > 0, fall, 1.0), 0.0)
        return both[0] + jnp.clip(share, 0, 1) * (both[1] - both[0])

    def _x_0_at(self, x: Array, rates: Rates) -> Array:
        if self.process.rule.shortens:  # the mean of one step all the way: no difference of near numbers
            whole = jnp.full_like(rates.log_snr, jnp.inf)
            return self.process(x, rates._replace(previous_log_snr=whole, drop=whole)).mean
        return self.process.kernel.x_0_given(x, self.process(x, rates), rates).mean

    def _coefficients(self, time: Array, is_end: Array) -> tuple[Array, Array, Array]:
        """Log-SNR, and the factors of E[x_0|x] and of x in dx/d time."""
        first = self.levels.log_snr[0]
        log_snr = jnp.where(is_end, first, jnp.clip(WIDTH * jnp.sinh(time), self._last_log_snr, first))
        signal = jnp.sqrt(jax.nn.sigmoid(log_snr))
        speed = jnp.where(is_end, -1.0, signal * WIDTH * jnp.cosh(time))
        return log_snr, 0.5 * speed * jnp.where(is_end, signal, 1.0), -0.5 * speed * jnp.where(is_end, 1.0, signal)

    def slope(self, x: Array, time: Array, is_end: Array) -> Array:
        """dx/ds, or dx/dv in the step between the first level and the data, in units of the level's v."""
        log_snr, of_x_0, of_x = self._coefficients(time, is_end)
        return of_x_0 * self.x_0_given(x, log_snr) + of_x * x

    def slope_and_divergence(self, state: tuple[Array, Array], time: Array, is_end: Array) -> tuple[Array, Array]:
        """:meth:`slope` of x, and its divergence, of a state whose second part is the divergence's integral."""
        x, _ = state
        log_snr, of_x_0, of_x = self._coefficients(time, is_end)
        event_ndim = self.process.kernel.event_ndim
        x_0, divergence = self.divergence(lambda x: self.x_0_given(x, log_snr), x, event_ndim)
        return of_x_0 * x_0 + of_x * x, of_x_0 * divergence + of_x * self._size

    # --- few calls ---------------------------------------------------------------------------------------------

    def _by_sampler(self, sampler: Multistep, noise: Array) -> Array:
        """x by levels in equal steps of an s of its own, or the trained ones next to them, where it knows no more."""
        ends = jnp.arcsinh(jnp.stack([self._last_log_snr, self.levels.log_snr[0]]) / SAMPLER_WIDTH)
        size = sampler.num_calls - 1
        at = ends[0] + (ends[1] - ends[0]) * jnp.arange(size) / max(size - 1, 1)
        wanted, trained = SAMPLER_WIDTH * jnp.sinh(at), self._finite_log_snrs()
        nearest = jnp.abs(trained - wanted[:, None]).argmin(1)
        log_snrs = wanted if self.between else trained[nearest]

        def predict(x: Array, i: Array) -> Array:
            return self._x_0_at(x, self.levels.at(nearest[i])._replace(log_snr=log_snrs[i]))

        return sampler.draw(predict, self._start(noise), log_snrs)

    # --- times and ends -----------------------------------------------------------------------------------------

    def _to_data(self) -> tuple[Array, Array, Array]:
        """Starts, lengths and kinds of the steps from noise to data."""
        ends = jnp.arcsinh(jnp.stack([self._last_log_snr, self.levels.log_snr[0]]) / WIDTH)
        times = ends[0] + (ends[1] - ends[0]) * jnp.arange(self.num_steps + 1) / self.num_steps
        starts, steps = jnp.append(times[:-1], 1.0), jnp.append(jnp.diff(times), -1.0)
        return starts, steps, jnp.arange(self.num_steps + 1) == self.num_steps

    def _to_noise(self) -> tuple[Array, Array, Array]:
        starts, steps, kinds = self._to_data()
        return (starts + steps)[::-1], -steps[::-1], kinds[::-1]

    def _finite_log_snrs(self) -> Array:
        """Those of the levels, with the last one put back where it is infinite."""
        log_snr = self.levels.log_snr
        return log_snr if log_snr.shape[0] == 1 else log_snr.at[-1].set(self._last_log_snr)

    @property
    def _last_log_snr(self) -> Array:
        log_snr = self.levels.log_snr
        return jnp.where(jnp.isfinite(log_snr[-1]), log_snr[-1], log_snr[-2 if log_snr.shape[0] > 1 else -1])

    @property
    def _first_signal(self) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(self.levels.log_snr[0]))

    @property
    def _log_signal(self) -> Array:
        return 0.5 * self._size * jax.nn.log_sigmoid(self.levels.log_snr[0])

    @property
    def _size(self) -> int:
        return prod(self.process.kernel.event_shape)

    def _last_mean(self, like: Array) -> Array:
        mean = self._x_0_at(jnp.zeros_like(like), self.levels.at(-1))
        return jnp.sqrt(jax.nn.sigmoid(self._last_log_snr)) * mean

    def _start(self, noise: Array) -> Array:
        return noise + self._last_mean(noise)

    def _log_base(self, noise: Array) -> Array:
        return self.process.kernel.sum_events(-0.5 * noise**2 - 0.5 * jnp.log(2 * jnp.pi))

    def _batch_shape(self, x: Array) -> tuple[int, ...]:
        return x.shape[: x.ndim - self.process.kernel.event_ndim]


def _reads_steps(process: ReverseProcess) -> bool:
    """Whether the network looks at t, of which only the trained numbers mean something to it, beside the log-SNR."""
    kernel = process.kernel
    batch = jnp.broadcast_shapes(
        (1,), *(jnp.shape(leaf)[: process.context_batch_ndim] for leaf in jax.tree.leaves(process.context))
    )
    x = jnp.zeros(batch + kernel.event_shape)
    rates = process.rates.at(-1)
    traced = jax.make_jaxpr(lambda t: process(x, rates._replace(t=t)).mean)(rates.t)
    used = {v for v in traced.jaxpr.outvars if not isinstance(v, Literal)}
    for equation in reversed(traced.jaxpr.eqns):
        if used & set(equation.outvars):
            used |= {v for v in equation.invars if not isinstance(v, Literal)}
    return traced.jaxpr.invars[0] in used
