"""Real states, whose steps are normal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.tree_util import Partial

from pp_diffusion.schedules import Rates
from pp_diffusion.states.conditioning import condition
from pp_diffusion.states.errors import Errors, calibrated, errors
from pp_diffusion.states.outlook import Arrival, Onward, Outlook
from pp_diffusion.states.rows import fit_coordinates
from pp_diffusion.states.space import (
    BATCH_NDIM,
    Guided,
    Likelihood,
    Prediction,
    Size,
    StateSpace,
    Words,
    value_and_gradient,
)

#: Below this log-SNR, Tweedie's covariance is taken from the variance of the reverse step, not from the Jacobian.
LEAST_LOG_SNR = -12.0
#: Draws of x_0 over which r is averaged where it has no normal form.
NUM_DRAWS = 32
#: Up to so many observed numbers per x, their whole covariance is kept; above, products with it.
MOST_ROWS = 64


class NormalKernel(Protocol):
    """What the space needs of its kernel."""

    @property
    def event_ndim(self) -> int: ...
    def as_state(self, x: Any) -> Array: ...
    def stationary(self) -> dist.Distribution: ...
    def x_0_given(self, x_t: Array, reverse: dist.Distribution, rates: Rates) -> dist.Distribution: ...


class Continuous(StateSpace):
    """Real numbers, with normal steps and a normal law of x_0 given x_t.

    :param kernel: whose states they are.
    """

    data_fields = ("kernel",)
    sets_known = True
    has_errors = True
    has_noise = True

    kernel: NormalKernel

    def __init__(self, kernel: NormalKernel) -> None:
        self._set(kernel=kernel)

    def predict(self, step: Callable[[Array], dist.Distribution], x_t: Array, rates: Rates) -> Prediction:
        def mean_and_all(x_t: Array) -> tuple[Array, tuple[dist.Distribution, dist.Distribution]]:
            reverse = step(x_t)
            law = self.kernel.x_0_given(x_t, reverse, rates)
            return law.mean, (reverse, law)

        # of a gradient the products alone are kept: in a loop over latents all else is as cheap to compute as to read
        kept = jax.checkpoint(mean_and_all, policy=_is_product, prevent_cse=False)
        mean, pull, (reverse, law) = jax.vjp(kept, x_t, has_aux=True)
        variance, by_jacobian = law.variance, rates.log_snr > LEAST_LOG_SNR
        factor = rates.erased / jnp.sqrt(jnp.where(by_jacobian, rates.alpha_bar, 1.0))
        covariance = Partial(_tweedie, by_jacobian, factor, pull, variance)
        slope = jnp.sqrt(rates.previous_alpha_bar) * rates.innovation
        return Prediction(x_t, rates, reverse, mean, variance, covariance, slope, False, law)

    def predict_itself(self, x: Array, rates: Rates, step: dist.Distribution) -> Prediction:
        variance = step.variance
        return Prediction(
            x, rates, step, step.mean, variance, Partial(jnp.multiply, variance), jnp.ones(()), True, step
        )

    def errors(self, prediction: Prediction, x_0: Array, rng_key: Array) -> Errors:
        return errors(prediction, x_0, rng_key)

    def calibrated(self, prediction: Prediction, errors: Errors) -> Prediction:
        return calibrated(prediction, errors)

    def condition(self, prediction: Prediction, r: Likelihood, rng_key: Array, *, most_rows: int) -> Guided:
        """As if x_0 were normal with Tweedie's mean and covariance, and what is observed linear in it; densities
        without a normal form are averaged over draws."""
        outlook, r = _outlook(prediction).knowing(r)
        log_other = _averaged(r, outlook, rng_key) if r.has_other else None
        return condition(outlook, r, log_other, most_rows=most_rows)

    def look_ahead(self, prediction: Prediction, r: Likelihood, rng_key: Array) -> Guided:
        """r at E[x_0 | x_t]."""
        return self.shift(prediction, r.log_r)

    def shift(self, prediction: Prediction, log_twist: Callable[[Array], Array]) -> Guided:
        """The step with its mean moved along the gradient (eq. 61)."""
        value, gradient = value_and_gradient(log_twist, prediction.x_0)
        return Guided(value, _outlook(prediction).shifted(gradient))

    def perturb(self, prediction: Prediction, r: Likelihood, power: Array, rng_key: Array) -> Any:
        """In closed form where r is normal and linear; else linearised at the step's mean, or shifted (eq. 61)."""

        def log_other(z: Array) -> Array:
            return r.read(z).log_other

        outlook, other = Arrival.of(prediction.reverse), log_other if r.has_other else None
        return condition(outlook, r, other, most_rows=MOST_ROWS, power=power).proposal

    def words(self, size: Size, most_rows: int) -> Words:
        many = ""
        if size.rows > most_rows:
            if fit_coordinates(size.rows, size.known, size.state, most_rows):
                many = f"; {size.rows - size.known} numbers by {size.state} that say the same"
            else:
                many = f"; {size.rows} numbers by conjugate gradients"
        averaged = f"averaged over {NUM_DRAWS} draws"
        along = "averaged by quadrature along the line it depends on"
        return Words(
            normal="linearised, normal" + many,
            curved=along if size.numbers else "linearised, normal" + many,
            moments=along if size.numbers else "taken for normal, by its mean and variance" + many,
            numbers=along if size.numbers else averaged,
            exact="coordinates known exactly" + many,
            averaged=averaged,
            constant="constant",
        )

    def parts(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> tuple[Array, Array]:
        return jnp.broadcast_to(distribution.mean, shape), jnp.broadcast_to(distribution.variance, shape)

    def joined(self, parts: tuple[Array, Array]) -> dist.Distribution:
        mean, variance = parts
        return dist.Normal(mean, jnp.sqrt(variance), validate_args=False).to_event(self.kernel.event_ndim)

    def pair(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Array | float) -> Array:
        draws = self.kernel.stationary().sample(rng_key, (2, *batch_shape))
        return self.kernel.as_state((0.5 + 3 * spread) * draws)


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive in (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)


def _tweedie(
    by_jacobian: Array, factor: Array, pull: Callable[[Array], tuple[Array]], variance: Array, v: Array
) -> Array:
    return jnp.where(by_jacobian, factor * pull(v)[0], variance * v)


def _outlook(prediction: Prediction) -> Outlook:
    return Arrival.of(prediction.reverse) if prediction.is_last else Onward.of(prediction)


def _averaged(r: Likelihood, outlook: Outlook, rng_key: Array) -> Callable[[Array], Array]:
    """The log of the mean, over fixed draws around m, of the densities that have no normal form."""
    half = jax.random.normal(rng_key, (NUM_DRAWS // 2, *outlook.m.shape[BATCH_NDIM:]), outlook.m.dtype)
    draws = jnp.concatenate([half, -half])[(slice(None), *(None,) * BATCH_NDIM)]
    spread = jnp.sqrt(outlook.variance) * draws

    def log_other(z: Array) -> Array:
        log_r = jax.vmap(lambda d: r.read(z + d).log_other)(spread)
        return jax.nn.logsumexp(jnp.where(jnp.isnan(log_r), -jnp.inf, log_r), axis=0) - math.log(NUM_DRAWS)

    return log_other
