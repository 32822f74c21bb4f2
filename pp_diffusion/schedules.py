r"""Diffusion rates :math:`\beta_t`, held as log signal-to-noise ratios.

With :math:`\lambda_t = \log \bar\alpha_t / (1 - \bar\alpha_t)` and the drop
:math:`\Delta_t = \lambda_{t-1} - \lambda_t`, every quantity of a step follows without cancellation:

.. math::
    \bar\alpha_t = \sigma(\lambda_t), \quad 1 - \bar\alpha_t = \sigma(-\lambda_t), \quad
    \beta_t = (1 - e^{-\Delta_t}) (1 - \bar\alpha_t)

(the familiar :math:`1 - \bar\alpha_t / \bar\alpha_{t-1}` in float32 costs 0.09 bits of K on a swiss roll at T=1000).
Time runs 1…T; arrays over time have length T, and entry t-1 belongs to step t.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from pp_diffusion.checks import positive_int
from pp_diffusion.frozen import Frozen


class Rates(NamedTuple):
    r"""What kernels and networks need to know of one step, or of an array of steps.

    All fields have one shape: ``(T,)`` for a whole schedule, the batch shape of the states for steps drawn per datum.

    :ivar t: the step's number, 1…T, as the network is told it.
    :ivar log_snr: :math:`\lambda_t`; :math:`-\infty` where nothing of the datum is left.
    :ivar previous_log_snr: :math:`\lambda_{t-1}`; :math:`+\infty` at the first step.
    :ivar drop: :math:`\Delta_t = \lambda_{t-1} - \lambda_t`.
    """

    t: Array
    log_snr: Array
    previous_log_snr: Array
    drop: Array

    @property
    def num_timesteps(self) -> int:
        return self.t.shape[0]

    @property
    def alpha_bar(self) -> Array:
        r""":math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`."""
        return jax.nn.sigmoid(self.log_snr)

    @property
    def erased(self) -> Array:
        r""":math:`1 - \bar\alpha_t`."""
        return jax.nn.sigmoid(-self.log_snr)

    @property
    def previous_alpha_bar(self) -> Array:
        r""":math:`\bar\alpha_{t-1}`."""
        return jax.nn.sigmoid(self.previous_log_snr)

    @property
    def previous_erased(self) -> Array:
        r""":math:`1 - \bar\alpha_{t-1}`."""
        return jax.nn.sigmoid(-self.previous_log_snr)

    @property
    def innovation(self) -> Array:
        r""":math:`1 - e^{-\Delta_t} = \beta_t / (1 - \bar\alpha_t)`, the new share of the noise in :math:`x_t`."""
        return -jnp.expm1(-self.drop)

    @property
    def beta(self) -> Array:
        r"""The diffusion rate :math:`\beta_t`."""
        return self.innovation * self.erased

    @property
    def retained(self) -> Array:
        r""":math:`1 - \beta_t`."""
        return self.alpha_bar + self.erased * jnp.exp(-self.drop)

    @property
    def shrinkage(self) -> Array:
        r""":math:`\sqrt{1-\beta_t}\,(1-\bar\alpha_{t-1})/(1-\bar\alpha_t) - 1 = e^{-\Delta_t}/\sqrt{1-\beta_t} - 1`.

        The weight of :math:`x_t` in the mean of :math:`q(x_{t-1} \mid x_t, x_0)`, less 1: with small steps it is the
        difference that has to be exact, because the noise to compare it with is small too.
        """
        log_retained = jnp.log1p(-jnp.minimum(self.beta, 1 - jnp.finfo(self.drop.dtype).epsneg))
        return jnp.expm1(-self.drop - 0.5 * log_retained)

    def at(self, index: ArrayLike | slice) -> Rates:
        """The rates of the steps at ``index`` (0…T-1) of a whole schedule.

        :param index: an integer, an integer array or a slice.
        """
        return Rates(*(field[index] for field in self))

    def along_leading_axis(self, batch_ndim: int) -> Rates:
        """The fields with ``batch_ndim`` unit axes behind the time axis, to go with states of shape ``(T, *batch)``."""
        return Rates(*(field.reshape(field.shape + (1,) * batch_ndim) for field in self))

    def shortened(self, num_timesteps: int) -> Rates:
        """A chain of fewer steps through evenly spaced points of this one, the first and the last among them.

        :param num_timesteps: 1…T; the single step of a chain of length 1 is the last one.
        :raises ValueError: if ``num_timesteps`` is outside 1…T.
        """
        total = self.num_timesteps
        if not 1 <= num_timesteps <= total:
            raise ValueError(f"num_timesteps must be in 1…{total}, the trained chain's length; got {num_timesteps}")
        index = np.round(np.linspace(total - 1, 0, num_timesteps)).astype(int)[::-1]
        log_snr = self.log_snr[index]
        # a step's drop is the sum of those it bridges
        if isinstance(self.drop, np.ndarray):
            drop = np.add.reduceat(self.drop, np.append(0, index[:-1] + 1))
        else:
            segments = np.searchsorted(index, np.arange(total))
            drop = jax.ops.segment_sum(self.drop, segments, num_segments=num_timesteps)
        return Rates(self.t[index], log_snr, _previous(log_snr), drop)

    def in_precision(self) -> Rates:
        """In that of the moment: float32, or float64 where x64 is on."""
        return Rates(jnp.asarray(self.t), *map(_float, self[1:]))


class Schedule(Frozen):
    """Base class of schedules.

    A subclass sets ``num_timesteps`` and defines :meth:`log_snr` and, where it is trained, :meth:`init_params`; one
    that knows its drops better than by differences of rounded numbers also overrides :meth:`rates`. Arrays that it
    holds belong in ``data_fields``.
    """

    num_timesteps: int

    @abstractmethod
    def log_snr(self, params: Any = None) -> Array:
        r"""Log signal-to-noise ratios :math:`\lambda_1 > … > \lambda_T`, shape ``(T,)``.

        :param params: the trained parameters, as :meth:`init_params` shapes them.
        """
        raise NotImplementedError

    def init_params(self) -> Any:
        """Initial parameters, a pytree of arrays; ``None`` for a fixed schedule."""
        return None

    def rates(self, params: Any = None) -> Rates:
        """All T steps as :class:`Rates` with fields of shape ``(T,)``."""
        log_snr = _float(self.log_snr(params))
        previous = _previous(log_snr)
        return Rates(jnp.arange(1, self.num_timesteps + 1), log_snr, previous, previous - log_snr)

    def known_rates(self, params: Any = None) -> Rates:
        """:meth:`rates` in the precision in which they are known, to be held; float64 where nothing is trained."""
        return self.rates(params)

    def betas(self, params: Any = None) -> Array:
        r""":math:`\beta_1 … \beta_T`, shape ``(T,)``."""
        return self.rates(params).beta

    def alpha_bars(self, params: Any = None) -> Array:
        r""":math:`\bar\alpha_1 … \bar\alpha_T`, shape ``(T,)``."""
        return self.rates(params).alpha_bar


class FixedSchedule(Schedule, saved_as="FixedSchedule"):
    r"""Diffusion rates that are not trained.

    :param betas: :math:`\beta_1 … \beta_T`, shape ``(T,)``, each in (0, 1); the last one may be 1.
    :raises ValueError: if ``betas`` is empty, not one-dimensional, or outside these limits.

    .. doctest::

        >>> from pp_diffusion import FixedSchedule
        >>> [f"{alpha_bar:.2f}" for alpha_bar in FixedSchedule([0.1, 0.2, 1.0]).alpha_bars()]
        ['0.90', '0.72', '0.00']
    """

    data_fields = ("_log_snr", "_drops")

    _log_snr: np.ndarray
    _drops: np.ndarray

    def __init__(self, betas: ArrayLike) -> None:
        try:
            betas = np.asarray(betas, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"betas must be an array of numbers; got {betas!r}") from None
        if betas.ndim != 1 or not betas.size:
            raise ValueError(f"betas must have shape (T,) with T >= 1; got shape {betas.shape}")
        bad = ~((betas > 0) & (betas <= 1))
        if bad.any():
            step = int(np.argmax(bad)) + 1
            raise ValueError(f"betas must be in (0, 1]; beta_{step} is {betas[step - 1]}")
        if (betas[:-1] == 1).any():
            step = int(np.argmax(betas == 1)) + 1
            raise ValueError(f"betas: beta_t = 1 is allowed only at t = T = {betas.size}; beta_{step} is 1")
        with np.errstate(divide="ignore"):  # β_T = 1: log ᾱ_T = −∞
            log_alpha_bar = np.cumsum(np.log1p(-betas))
            log_erased = np.log(-np.expm1(log_alpha_bar))
            drops = -np.log1p(-np.minimum(betas / np.exp(log_erased), 1))
        drops[0] = np.inf
        self._set(num_timesteps=betas.size, _log_snr=log_alpha_bar - log_erased, _drops=drops)

    @classmethod
    def from_log_snr(cls, log_snr: ArrayLike) -> Self:
        r"""The schedule with given :math:`\lambda_1 > … > \lambda_T`; the last one may be :math:`-\infty`.

        :raises ValueError: if they do not fall strictly, or another one than the last is infinite.
        """
        log_snr = np.asarray(log_snr, dtype=np.float64)
        if log_snr.ndim != 1 or not log_snr.size:
            raise ValueError(f"log_snr must have shape (T,) with T >= 1; got shape {log_snr.shape}")
        drops = -np.diff(log_snr, prepend=np.inf)
        if not (np.isfinite(log_snr[:-1]).all() and log_snr[-1] < np.inf and (drops > 0).all()):
            raise ValueError(f"log_snr must be finite (the last may be -inf) and fall strictly; got {log_snr}")
        return cls.of(num_timesteps=log_snr.size, _log_snr=log_snr, _drops=drops)

    @classmethod
    def constant_erasure(cls, num_timesteps: int) -> Self:
        r""":math:`\beta_t = 1 / (T - t + 1)`: each step erases the same share 1/T of the signal (the paper, §2.4.1)."""
        t = np.arange(1, positive_int("num_timesteps", num_timesteps) + 1)
        with np.errstate(divide="ignore"):
            return cls.from_log_snr(np.log(num_timesteps - t) - np.log(t))

    @classmethod
    def cosine(cls, num_timesteps: int) -> Self:
        r""":math:`\bar\alpha_t = f(t)/f(0)`, :math:`f(t) = \cos^2(\tfrac\pi2 (t/T + s)/(1 + s))`, :math:`s = 0.008`.

        The schedule of Nichol and Dhariwal (2021), with :math:`\beta_T = 1`.
        """
        offset = 0.008
        t = np.arange(positive_int("num_timesteps", num_timesteps) + 1) / num_timesteps
        angle = np.pi / 2 * (t + offset) / (1 + offset)
        start = angle[0]
        # f(0) - f(t) = sin(a + a_0) sin(a - a_0): no cancellation for small t
        erased = np.sin(angle + start) * np.sin(angle - start)
        with np.errstate(divide="ignore"):
            log_snr = 2 * np.log(np.cos(angle[1:])) - np.log(erased[1:])
        log_snr[-1] = -np.inf
        return cls.from_log_snr(log_snr)

    @classmethod
    def log_linear(cls, num_timesteps: int, first_beta: float = 1e-4, final_log_snr: float = -7.0) -> Self:
        r"""Log-SNR falling linearly from that of :math:`\beta_1` to ``final_log_snr``."""
        start = _logit_of_first_beta(first_beta)
        _check_end(start, final_log_snr)
        return cls.from_log_snr(np.linspace(start, final_log_snr, positive_int("num_timesteps", num_timesteps)))

    def log_snr(self, params: Any = None) -> Array:
        return _float(self._log_snr)

    def rates(self, params: Any = None) -> Rates:
        return super().rates(params)._replace(drop=_float(self._drops))

    def known_rates(self, params: Any = None) -> Rates:
        t = np.arange(1, self.num_timesteps + 1)
        return Rates(t, self._log_snr, _previous(self._log_snr), self._drops)  # type: ignore[arg-type]  # NumPy's


class LearnedSchedule(Schedule, saved_as="LearnedSchedule"):
    r"""Diffusion rates learned with the network, by the gradient of K with frozen noise (the paper, §2.4.1).

    :math:`\beta_1` stays fixed, against overfitting. What is trained are the log-SNR's drops, as shares (a softmax)
    of the whole fall from :math:`\lambda_1` to :math:`\lambda_T`, and that end itself. A logit per :math:`\beta_t`
    collapses when few steps are drawn per datum; shares do not.

    :param num_timesteps: T.
    :param first_beta: :math:`\beta_1`, in (0, 1).
    :param final_log_snr: :math:`\lambda_T`; learned if ``None``.
    """

    num_timesteps: int
    first_beta: float
    final_log_snr: float | None

    def __init__(self, num_timesteps: int, first_beta: float, final_log_snr: float | None = None) -> None:
        start = _logit_of_first_beta(first_beta)
        if final_log_snr is not None:
            _check_end(start, final_log_snr)
        self._set(
            num_timesteps=positive_int("num_timesteps", num_timesteps),
            first_beta=float(first_beta),
            final_log_snr=None if final_log_snr is None else float(final_log_snr),
        )

    def init_params(self) -> Any:
        if self.num_timesteps == 1:
            return None
        params = {"shares": jnp.zeros(self.num_timesteps - 1)}
        if self.final_log_snr is None:
            start = _logit_of_first_beta(self.first_beta)
            # short chains want to end early: few steps are better spent where the data's shape is
            end = -2.0 if self.num_timesteps <= 100 else -5.0
            params["fall"] = _float(start - min(end, start - 1.0))
        return params

    def _drops(self, params: Any) -> Array:
        if self.num_timesteps == 1:
            return jnp.zeros(0)
        if params is None:
            raise ValueError("params is needed: this schedule is learned")
        start = _logit_of_first_beta(self.first_beta)
        fall = jax.nn.softplus(params["fall"]) if self.final_log_snr is None else start - self.final_log_snr
        return fall * jax.nn.softmax(params["shares"])

    def log_snr(self, params: Any = None) -> Array:
        fallen = jnp.cumsum(self._drops(params))
        return _logit_of_first_beta(self.first_beta) - jnp.concatenate([jnp.zeros(1), fallen])

    def rates(self, params: Any = None) -> Rates:
        rates = super().rates(params)
        return rates._replace(drop=jnp.concatenate([rates.drop[:1], self._drops(params)]))


def _previous(log_snr: Any) -> Any:
    xp = np if isinstance(log_snr, np.ndarray) else jnp
    return xp.concatenate([xp.full((1,), xp.inf, log_snr.dtype), log_snr[:-1]])


def _float(x: ArrayLike) -> Array:
    return jnp.asarray(x, dtype=float)


def _logit_of_first_beta(first_beta: float) -> float:
    if not 0 < first_beta < 1:
        raise ValueError(f"first_beta must be in (0, 1); got {first_beta}")
    return float(np.log1p(-first_beta) - np.log(first_beta))


def _check_end(start: float, final_log_snr: float) -> None:
    if not final_log_snr < start:
        raise ValueError(f"final_log_snr must be below {start:.4g}, the log-SNR of first_beta; got {final_log_snr}")
