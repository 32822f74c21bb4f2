r"""The bound K on the log likelihood, with every term of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.checks import check_key, positive_int
from pp_diffusion.frozen import Frozen
from pp_diffusion.kernels import Kernel
from pp_diffusion.objectives import fixed_terms, step_cost, stream_log_ratios
from pp_diffusion.prior import DiffusionPrior, check_prior
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.rows import as_rows, map_rows
from pp_diffusion.units import nats_to_bits

Estimator = Literal["analytic", "log_ratio"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowerBound:
    r"""K per datum, in nats, and its parts: ``value = -kl_per_step.sum(-1) - prior_kl - log_abs_det``.

    :ivar value: K :math:`\le \log p(x)`, in data units; shape ``batch``.
    :ivar std_error: the Monte Carlo standard error of ``value`` (NaN with one sample).
    :ivar null: :math:`\log \pi`, the paper's L_null per datum, in data units.
    :ivar kl_per_step: shape ``(*batch, T)``; entry 0 is :math:`-E \log p(x_0 \mid x_1)`.
    :ivar prior_kl: KL(:math:`q(x_T \mid x_0)` ‖ :math:`\pi`).
    :ivar log_abs_det: the log Jacobian of the transform from the model's space to the data's.
    """

    value: Array
    std_error: Array
    null: Array
    kl_per_step: Array = field(repr=False)
    prior_kl: Array = field(repr=False)
    log_abs_det: Array = field(repr=False)

    @property
    def above_null(self) -> Array:
        """K − L_null per datum, in nats; the same in every unit of the data."""
        return self.value - self.null

    def print_summary(self) -> None:
        """Prints the means over the data, with their standard errors over data and draws, in nats and bits."""
        print(f"{'':>12} {'nats':>10} {'bits':>10} {'std. error (bits)':>18}")
        for label, values in (("K", self.value), ("L_null", self.null), ("K - L_null", self.above_null)):
            data = np.asarray(values, dtype=np.float64).ravel()
            error = float(data.std(ddof=1)) / math.sqrt(data.size) if data.size > 1 else math.nan
            mean = float(data.mean())
            print(f"{label:>12} {mean:>10.4f} {nats_to_bits(mean):>10.4f} {nats_to_bits(error):>18.4f}")


def lower_bound(
    rng_key: Array,
    prior: DiffusionPrior,
    x: Any,
    *,
    estimator: Estimator | None = None,
    num_samples: int = 4,
    chunk_size: int = 4096,
    progress_bar: bool = False,
) -> LowerBound:
    r"""The variational bound K of the paper (eq. 14) per datum, in its general form: unbiased, for data of any scale.

    It costs ``num_samples`` × T network calls per datum.

    :param rng_key: a JAX random key.
    :param prior: ``fit.prior`` or ``diffusion.prior(params)``; one with a context has the data's batch shape.
    :param x: data in data units, shape ``(*batch, *event_shape)``.
    :param estimator: ``"log_ratio"`` averages log p − log q along trajectories, which near the optimum telescopes;
        ``"analytic"`` averages the steps' KL divergences at independent :math:`x_t`. Both are unbiased. ``None`` is
        ``"log_ratio"`` for continuous kernels and ``"analytic"`` for discrete ones, where it is the only one allowed:
        there a log ratio that has missed a rare flip looks the more precise for it.
    :param num_samples: independent estimates per datum.
    :param chunk_size: data handled at a time; bounds the memory.
    :param progress_bar: shows one, over chunks.
    :raises ValueError: for data outside the support, NaN, or of the wrong shape.

    .. doctest::

        >>> import jax, jax.numpy as jnp, pp_diffusion as ppd
        >>> exact = ppd.Diffusion(  # the exact reverse process of standard normal data
        ...     ppd.GaussianKernel((1,)), ppd.FixedSchedule.constant_erasure(10), lambda x_t, t: (0 * x_t, 0 * x_t)
        ... ).prior({})
        >>> bound = ppd.lower_bound(jax.random.key(0), exact, jnp.array([[0.5], [1.0]]))
        >>> bound.value.shape, bound.kl_per_step.shape
        ((2,), (2, 10))
    """
    check_prior(prior)
    check_key(rng_key)
    estimator = _choose_estimator(estimator, prior.kernel)
    num_samples, chunk_size = positive_int("num_samples", num_samples), positive_int("chunk_size", chunk_size)
    fn = partial(_bound_of_rows, estimator=estimator, num_samples=num_samples)
    progress = "lower bound" if progress_bar else None
    return LowerBound(**map_rows(prior, prior.space.check(x), rng_key, fn, chunk_size, progress))


class Bound(Frozen, saved_as="Bound"):
    """``diffusion.prior(params, log_prob=Bound(rng_key))``: log_prob is an estimate of the bound K.

    A deterministic and differentiable function of the array x: the same noise is used at every call, and each row has
    its own. Unbiased for K, so on average below log p(x).

    :param rng_key: a JAX random key, which fixes the noise.
    :param num_samples: independent estimates averaged.
    """

    data_fields = ("rng_key",)

    rng_key: Array
    num_samples: int

    def __init__(self, rng_key: Array, num_samples: int = 1) -> None:
        self._set(rng_key=rng_key, num_samples=positive_int("num_samples", num_samples))

    def log_prob(self, prior: DiffusionPrior, x: Array) -> Array:
        """K of ``x`` under ``prior``, nats."""
        prior.space.check_shape(x, "value")
        prior, rows, batch_shape = as_rows(prior, prior.kernel.as_state(x))
        estimator = _choose_estimator(None, prior.kernel)
        return _bound_of_rows(prior, rows, self.rng_key, estimator, self.num_samples)["value"].reshape(batch_shape)


def _choose_estimator(estimator: Estimator | None, kernel: Kernel) -> Estimator:
    if estimator not in (None, "analytic", "log_ratio"):
        raise ValueError(f"estimator must be 'analytic', 'log_ratio' or None; got {estimator!r}")
    if kernel.is_discrete and estimator == "log_ratio":
        raise ValueError("estimator must be 'analytic' for a discrete kernel: log ratios miss rare flips")
    return estimator or ("analytic" if kernel.is_discrete else "log_ratio")


@partial(jax.jit, static_argnames=("estimator", "num_samples"))
def _bound_of_rows(
    prior: DiffusionPrior, x: Array, rng_key: Array, estimator: Estimator, num_samples: int
) -> dict[str, Array]:
    process, space = prior.process, prior.space
    z = space.to_model(x)
    jacobian = space.log_abs_det(z, x)
    prior_kl = process.kernel.prior_kl(z, process.rates.at(-1).log_snr)
    one = _by_kl if estimator == "analytic" else _by_log_ratio

    def add(totals: tuple[Array, Array, Array], key: Array) -> tuple[tuple[Array, Array, Array], None]:
        value, steps = one(key, process, z)  # steps: (T, rows)
        deviation = value - totals[2]
        return (totals[0] + steps, totals[1] + deviation**2, totals[2]), None

    keys = jax.random.split(rng_key, num_samples)
    first, first_steps = one(keys[0], process, z)
    # squares about the first estimate: no cancellation where the spread is small
    (steps, squares, _), _ = jax.lax.scan(add, (first_steps, jnp.zeros_like(first), first), keys[1:])
    steps = steps / num_samples
    value = -steps.sum(0) - prior_kl
    spread = squares - num_samples * (value - first) ** 2
    error = jnp.sqrt(jnp.maximum(spread, 0) / max(num_samples - 1, 1) / num_samples)
    return {
        "value": value - jacobian,
        "std_error": error if num_samples > 1 else jnp.full_like(error, jnp.nan),
        "null": space.null_log_prob(z) - jacobian,
        "kl_per_step": jnp.moveaxis(steps, 0, -1),
        "prior_kl": prior_kl,
        "log_abs_det": jacobian,
    }


def _by_log_ratio(rng_key: Array, process: ReverseProcess, z: Array) -> tuple[Array, Array]:
    log_w, terms = stream_log_ratios(rng_key, process, z, keep_steps=True)
    assert terms is not None
    return log_w, -terms


def _by_kl(rng_key: Array, process: ReverseProcess, z: Array) -> tuple[Array, Array]:
    end_key, rng_key = jax.random.split(rng_key)
    last, prior_kl = fixed_terms(end_key, process, z)
    steps = jnp.arange(process.first_network_step, process.num_timesteps)

    def step(_: None, at: tuple[Array, Array]) -> tuple[None, Array]:
        key, index = at
        return None, step_cost(key, process, z, index)

    step = jax.checkpoint(step, prevent_cse=False)  # for the gradient in x
    _, costs = jax.lax.scan(step, None, (jax.random.split(rng_key, len(steps)), steps))
    if process.first_network_step == 1:  # step 1 is not among them
        costs = jnp.concatenate([jnp.zeros_like(prior_kl)[None], costs])
    costs = costs.at[0].add(-last)
    return -costs.sum(0) - prior_kl, costs
