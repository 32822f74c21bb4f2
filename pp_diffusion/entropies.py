r"""Entropies of the reverse trajectory's steps, and the bounds that the forward trajectory puts on them (eq. 24).

All in nats and in the model's space, in which the trajectory lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.checks import check_key, positive_int
from pp_diffusion.prior import DiffusionPrior, check_prior
from pp_diffusion.rows import as_rows, each_chunk
from pp_diffusion.schedules import Rates


@dataclass(frozen=True, eq=False)
class ReverseEntropy:
    r"""The model's entropy of each step, :math:`E_{q(x_t)} H[p(X_{t-1} \mid x_t)]`, in nats.

    :ivar value: shape ``(T,)``, entry t-1 belonging to step t.
    :ivar std_error: its standard error over data and draws.
    """

    value: np.ndarray
    std_error: np.ndarray

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype)


@dataclass(frozen=True, eq=False)
class EntropyBounds:
    r"""Bounds on :math:`H_q(X_{t-1} \mid X_t)`, the entropy of the step that the reverse trajectory has to undo.

    :ivar lower: :math:`H(X_t \mid X_{t-1}) + H(X_{t-1} \mid X_0) - H(X_t \mid X_0)`, shape ``(T,)``; entry 0 is minus
        infinity for continuous data.
    :ivar upper: :math:`H(X_t \mid X_{t-1})`, shape ``(T,)``.
    :ivar slack: by how much the data meet the upper bound's condition, nats (NaN if no data were given). The lower
        bound holds for all data. The upper one needs :math:`H(X_t) \ge H(X_{t-1})`. For Gaussian kernels that is so
        if the variances of the data's coordinates, in the model's space, are at most 1 in the mean; for binomial ones
        if :math:`E \log \pi(X_0) \ge -H(\pi)`, that is for a base rate below one half, if the data are at most as
        active as it.
    """

    lower: np.ndarray
    upper: np.ndarray
    slack: float

    @property
    def upper_holds(self) -> bool | None:
        """Whether the data meet the condition of the upper bound, to one part in a million; None without data."""
        return None if math.isnan(self.slack) else self.slack >= -1e-6 * (1 + abs(float(self.upper.max())))

    def outside(self, entropy: ReverseEntropy, num_errors: float = 4.5) -> np.ndarray:
        """The steps t at which the model's entropy is outside the bounds by more than ``num_errors`` standard errors.

        A step below has a reverse kernel that is too sure of itself; one above has learned less than the forward
        trajectory alone tells.
        """
        if np.shape(entropy.value) != self.upper.shape:
            raise ValueError(f"entropy must have shape {self.upper.shape}; got {np.shape(entropy.value)}")
        # of one datum no error is known; what is not a number is outside
        error = num_errors * np.nan_to_num(entropy.std_error) + 1e-5 * (1 + np.abs(self.upper))
        inside = (entropy.value >= self.lower - error) & (entropy.value <= self.upper + error)
        return np.flatnonzero(~inside) + 1

    def print_summary(self, entropy: ReverseEntropy) -> None:
        """Prints the sums over the steps, whether the upper bound holds, and the steps that are outside."""
        outside, steps = self.outside(entropy), len(self.upper)
        print(f"{'t':>6} {'lower':>10} {'model':>10} {'upper':>10}  (nats)")
        shown = sorted({1, 2, max(1, steps // 2), steps} & set(range(1, steps + 1)) | set(outside[:5].tolist()))
        for t in shown:
            row = (self.lower[t - 1], entropy.value[t - 1], self.upper[t - 1])
            print(f"{t:>6} " + " ".join(f"{number:>10.4f}" for number in row) + ("  outside" if t in outside else ""))
        condition = {True: "holds for these data", False: "need not hold for these data", None: "was not checked"}
        print(f"The upper bound {condition[self.upper_holds]} (slack {self.slack:.4g} nats).")
        print(f"Outside the bounds: {'no step' if not len(outside) else f'{len(outside)} of {steps} steps'}.")


def entropy_bounds(prior: DiffusionPrior, data: Any = None) -> EntropyBounds:
    r"""Bounds on the entropy of each reverse step from the forward trajectory alone (eq. 24), in nats.

    :param prior: ``fit.prior`` or ``diffusion.prior(params)``.
    :param data: in data units, shape ``(N, *event_shape)``. Required for binomial kernels, whose entropies depend on
        the data's activity; for Gaussian ones they serve to check the upper bound's condition.
    :raises ValueError: for data outside the support, NaN, of the wrong shape, or missing where they are required.

    .. doctest::

        >>> import pp_diffusion as ppd
        >>> prior = ppd.Diffusion(
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.2, 0.5]), lambda x_t, t: (0 * x_t, 0 * x_t)
        ... ).prior({})
        >>> bounds = ppd.entropy_bounds(prior)
        >>> print(bounds.lower.round(3), bounds.upper.round(3))
        [ -inf 0.199 1.318] [0.535 1.228 2.145]
    """
    check_prior(prior)
    process = prior.process
    if data is None:
        lower, upper, slack = *process.kernel.entropy_bounds(process.rates, None), math.nan
    else:
        _, rows, _ = as_rows(prior, prior.space.check(data, "data"))
        lower, upper, slack = _bounds_of(prior, rows)
    lower, upper = process.last_step.entropy_bounds(process.kernel, lower, upper)
    return EntropyBounds(np.asarray(lower), np.asarray(upper), float(slack))


def reverse_entropy(
    rng_key: Array,
    prior: DiffusionPrior,
    x: Any,
    *,
    chunk_size: int = 4096,
    progress_bar: bool = False,
) -> ReverseEntropy:
    r"""The model's own entropy of each step, averaged over the data and one :math:`x_t \sim q(x_t \mid x_0)` for each.

    It costs T network calls per datum. :func:`entropy_bounds` says between what it should lie.

    :param rng_key: a JAX random key.
    :param prior: ``fit.prior`` or ``diffusion.prior(params)``.
    :param x: data in data units, shape ``(*batch, *event_shape)``.
    :param chunk_size: data handled at a time; bounds the memory.
    :param progress_bar: shows one, over chunks.
    :raises ValueError: for data outside the support, NaN, or of the wrong shape.

    .. doctest::

        >>> import jax, jax.numpy as jnp, pp_diffusion as ppd
        >>> prior = ppd.Diffusion(
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.2, 0.5]), lambda x_t, t: (0 * x_t, 0 * x_t)
        ... ).prior({})
        >>> ppd.reverse_entropy(jax.random.key(0), prior, jnp.zeros((10, 2))).value.shape
        (3,)
    """
    check_prior(prior)
    check_key(rng_key)
    chunk_size = positive_int("chunk_size", chunk_size)
    prior, rows, _ = as_rows(prior, prior.space.check(x))
    total = np.zeros((2, prior.num_timesteps))
    origin = None  # the first chunk's means: squares about them do not cancel
    for part in each_chunk(prior, rows, rng_key, _entropies_of_rows, chunk_size, "entropies" if progress_bar else None):
        part = np.asarray(part, np.float64)
        origin = part.mean(0) if origin is None else origin
        total += [(part - origin).sum(0), ((part - origin) ** 2).sum(0)]
    assert origin is not None
    count, shift = len(rows), total[0] / len(rows)
    spread = np.maximum(total[1] - count * shift**2, 0) / (count - 1) if count > 1 else np.full_like(shift, np.nan)
    return ReverseEntropy(origin + shift, np.sqrt(spread / count))


@jax.jit
def _bounds_of(prior: DiffusionPrior, rows: Array) -> tuple[Array, Array, Array]:
    z = prior.space.to_model(rows)
    lower, upper = prior.kernel.entropy_bounds(prior.process.rates, z)
    return lower, upper, prior.kernel.entropy_slack(z)


@jax.jit
def _entropies_of_rows(prior: DiffusionPrior, x: Array, rng_key: Array) -> Array:
    """Of each step, shape ``(N, T)``."""
    process, kernel, z = prior.process, prior.kernel, prior.space.to_model(x)

    def draw(key: Array, rates: Rates) -> Array:
        return kernel.as_state(kernel.marginal(z, rates.log_snr).sample(key))

    def step(_: None, at: tuple[Array, Rates]) -> tuple[None, Array]:
        key, rates = at
        return None, kernel.entropy(process(draw(key, rates), rates))

    keys = jax.random.split(rng_key, process.num_timesteps)
    last = process.last_step.entropy(kernel, process.last(draw(keys[0], process.rates.at(0))))
    _, others = jax.lax.scan(step, None, (keys[1:], process.rates.at(slice(1, None))))
    return jnp.concatenate([last[None], others]).T
