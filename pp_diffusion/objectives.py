r"""What is averaged: the streaming log weight, the cost of a step, and which steps are drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.kernels import Kernel
from pp_diffusion.last_step import LastStep
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.schedules import Rates, Schedule

#: The share of training's steps that is drawn uniformly; it bounds the others' weights by its inverse.
UNIFORM_SHARE = 0.2


@jax.jit
def log_weight(rng_key: Array, process: ReverseProcess, x_0: Array) -> Array:
    r""":math:`\log p(x_{0…T}) - \log q(x_{1…T} \mid x_0)` of one forward trajectory per datum (eq. 9), in nats.

    Drawn in posterior order, one network call per step; memory does not grow with T. Its mean is K, and the mean of
    its exponential is :math:`p(x_0)`.

    :param rng_key: a JAX random key.
    :param ReverseProcess process: the model.
    :param x_0: states of shape ``(*batch, *event_shape)``, in the model's space.
    :return: shape ``batch``.
    """
    return stream_log_ratios(rng_key, process, x_0)[0]


def stream_log_ratios(
    rng_key: Array, process: ReverseProcess, x_0: Array, *, keep_steps: bool = False
) -> tuple[Array, Array | None]:
    """:func:`log_weight` and, with ``keep_steps``, its terms of shape ``(T, *batch)``: entry 0 the last step's log
    density, entry t-1 the log ratio of :math:`x_{t-1}` given :math:`x_t`. The end, :math:`x_T`, is there by its
    expectation, minus :func:`Kernel.prior_kl`, which is not among the terms; by what its draw differs from that is in
    entry T-1, with which it telescopes."""
    kernel, rates = process.kernel, process.rates
    end_key, rng_key = jax.random.split(rng_key)
    end = rates.at(-1)
    stationary = kernel.stationary().expand(kernel.batch_shape_of(x_0))
    x_end, start = kernel.draw_and_log_ratio(end_key, kernel.marginal(x_0, end.log_snr), stationary)

    def step(carry: tuple[Array, Array], at: tuple[Array, Rates]) -> tuple[tuple[Array, Array], Array | None]:
        (x, log_w), (rng_key, rates) = carry, at
        x_previous, log_ratio = kernel.draw_and_log_ratio(rng_key, kernel.posterior(x, x_0, rates), process(x, rates))
        return (x_previous, log_w + log_ratio), log_ratio if keep_steps else None

    later = rates.at(slice(1, None))
    keys = jax.random.split(rng_key, later.num_timesteps)
    step = jax.checkpoint(step, prevent_cse=False)  # for gradients: a step's network is run again, not stored
    (x_1, log_w), log_ratios = jax.lax.scan(step, (x_end, start), (keys, later), reverse=True)
    last = process.last(x_1).log_prob(x_0)
    if log_ratios is None:
        return log_w + last, None
    terms = jnp.concatenate([last[None], log_ratios])
    return log_w + last, terms.at[-1].add(start + kernel.prior_kl(x_0, end.log_snr))


def step_cost(rng_key: Array, process: ReverseProcess, x_0: Array, index: Array) -> Array:
    r"""What step ``index + 1`` costs the bound, at a fresh :math:`x_t \sim q(x_t \mid x_0)`; one network call for all.

    For t >= 2, KL(:math:`q(x_{t-1} \mid x_t, x_0)` ‖ :math:`p(x_{t-1} \mid x_t)`), analytic. For t = 1, where the
    network describes that step, :math:`-\log p(x_0 \mid x_1)` less what :func:`fixed_terms` has taken into account.

    :param index: integers ``process.first_network_step``…T-1, one per datum or one for all.
    :return: nats, of batch shape.
    """
    kernel, rates = process.kernel, process.rates.at(index)
    x_t = kernel.as_state(kernel.marginal(x_0, rates.log_snr).sample(rng_key))
    reverse = process(x_t, rates)
    if process.num_timesteps > 1:
        inner = process.rates.at(jnp.maximum(index, 1))  # q(x_0 | x_1, x_0) is a point: keep it out of the KL
        kl = kernel.kl(kernel.posterior(x_t, x_0, inner), reverse)
        if process.first_network_step == 1:
            return kl
    else:
        kl = jnp.zeros(())
    last = process.last_step.cost(kernel, process.rates.at(0), reverse, x_t, x_0)
    return jnp.where(index == 0, last, kl)


def step_squared_error(rng_key: Array, process: ReverseProcess, x_0: Array, index: Array) -> Array:
    r""":math:`\lVert E[x_{t-1} \mid x_t, x_0] - f_\mu(x_t, t) \rVert^2` at a fresh :math:`x_t`; arguments as for
    :func:`step_cost`."""
    kernel, rates = process.kernel, process.rates.at(index)
    x_t = kernel.as_state(kernel.marginal(x_0, rates.log_snr).sample(rng_key))
    return kernel.sum_events((kernel.posterior(x_t, x_0, rates).mean - process(x_t, rates).mean) ** 2)


def check_squared_errors(schedule: Schedule, last_step: LastStep) -> None:
    """Refuses squared errors where they train nothing.

    :raises ValueError: where the schedule is learned, or no step is the network's.
    """
    if schedule.init_params() is not None:
        raise ValueError(
            "objective must be 'bound' for a learned schedule (schedule must be fixed for squared errors): they vanish "
            "with the rates"
        )
    if schedule.num_timesteps == last_step.first_network_step:
        raise ValueError(
            "objective must be 'bound' for T = 1 with last_step='kernel', whose step has no f_mu (or last_step must be "
            "'network' for squared errors)"
        )


def fixed_terms(rng_key: Array, process: ReverseProcess, x_0: Array) -> tuple[Array, Array]:
    r"""The bound's ends: :math:`E \log T_\pi(x_0 \mid x_1)` and KL(:math:`q(x_T \mid x_0)` ‖ :math:`\pi`), in nats.

    With them the bound is K = first − second − Σ :func:`step_cost`, for data of any scale (eq. 14 as printed drops
    terms that vanish only at unit mean square). Where the network describes the last step, the first is its baseline.
    """
    kernel = process.kernel
    last = process.last_step.fixed_term(rng_key, kernel, process.rates.at(0), x_0)
    return last, kernel.prior_kl(x_0, process.rates.at(-1).log_snr)


def draw_steps(rng_key: Array, process: ReverseProcess, batch_size: int, num_times: int) -> tuple[Array, Array]:
    r"""Indices of steps that the network describes, of shape ``(num_times, batch_size)``, and their weights.

    Drawn by :meth:`Kernel.step_importance` mixed with the uniform law, so that a step that matters T times more than
    the others (a t = 1 by the network) is not drawn once in T; the weights make every estimate unbiased. Stratified as
    :func:`stratified_places`; uniform if all steps can be drawn for each datum.
    """
    first = process.first_network_step
    num_steps = process.num_timesteps - first
    if num_times >= num_steps:
        return first + stratified_times(rng_key, batch_size, num_times, num_steps), jnp.ones(())
    importance = jax.lax.stop_gradient(step_importance(process.kernel, process.rates.at(slice(first, None))))
    shares = UNIFORM_SHARE / num_steps + (1 - UNIFORM_SHARE) * importance / importance.sum()
    edges = jnp.cumsum(shares)
    edges = jnp.concatenate([jnp.zeros(1), edges / edges[-1]])
    index = jnp.searchsorted(edges[1:-1], stratified_places(rng_key, batch_size, num_times), side="right")
    return first + index, 1 / (num_steps * jnp.diff(edges)[index])  # the law as rounded, not as meant


def step_importance(kernel: Kernel, rates: Rates) -> Array:
    """:meth:`Kernel.step_importance`, checked.

    :raises ValueError: naming it.
    """
    importance = jnp.asarray(kernel.step_importance(rates))
    if importance.shape != rates.t.shape:
        raise ValueError(
            f"kernel.step_importance must have the shape of rates.t, {rates.t.shape}; got {importance.shape}"
        )
    check_importance(importance)
    return importance


def check_importance(importance: Array) -> None:
    """Refuses values, where they are known, that are no law to draw steps by.

    :raises ValueError: naming ``kernel.step_importance``.
    """
    if isinstance(importance, jax.core.Tracer) or not importance.size:
        return
    values = np.asarray(importance)
    if not ((values >= 0) & (values < np.inf)).all() or not values.any():
        raise ValueError(f"kernel.step_importance must be finite, not negative, and not all 0; got {values}")


def stratified_times(rng_key: Array, batch_size: int, num_times: int, num_steps: int) -> Array:
    """Indices 0…num_steps-1 of shape ``(num_times, batch_size)``, each uniform, spread evenly within every column and
    over the batch (with ``num_times == num_steps`` every column holds each step once)."""
    return (stratified_places(rng_key, batch_size, num_times) * num_steps).astype(int)


def stratified_places(rng_key: Array, batch_size: int, num_times: int) -> Array:
    """Numbers in [0, 1) of shape ``(num_times, batch_size)``, each uniform, spread evenly within every column and over
    the batch."""
    turn_key, place_key = jax.random.split(rng_key)
    turn = jax.random.randint(turn_key, (), 0, batch_size)
    place = ((jnp.arange(batch_size) + turn) % batch_size + jax.random.uniform(place_key, (batch_size,))) / batch_size
    place = jnp.minimum(place, 1 - num_times * jnp.finfo(place.dtype).eps)  # sums do not round up to the next stratum
    return (jnp.arange(num_times)[:, None] + place) / num_times
