"""A Gaussian diffusion of points in the plane in plain JAX and optax: the bound's loss, its training, its sampling.

What a good JAX programmer would write for this one case, and nothing more general: v-prediction with a variance output,
analytic KLs, the last step by the kernel, steps drawn stratified over the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

Weights = list[tuple[Array, Array]]
SIZES = (128, 128, 128)


class Chain(NamedTuple):
    """Constants of each step t = 1…T, as arrays of shape (T,)."""

    log_snr: Array
    signal: Array  # sqrt(alpha_bar)
    noise: Array  # sqrt(1 - alpha_bar)
    shrinkage: Array  # the posterior mean is x_t + shrinkage x_t + from_x_0 x_0
    from_x_0: Array
    variance: Array  # of the posterior
    room: Array  # beta_t minus it
    shares: Array  # of each step among those drawn in training


def log_linear(num_timesteps: int, first_beta: float, final_log_snr: float, uniform_share: float = 0.2) -> Chain:
    """Log-SNR falling linearly from that of the first beta; ``uniform_share`` of the steps is drawn uniformly."""
    start = np.log1p(-first_beta) - np.log(first_beta)
    log_snr = np.linspace(start, final_log_snr, num_timesteps)
    drop = np.append(np.inf, -np.diff(log_snr))
    alpha_bar, erased = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
    previous_alpha_bar, previous_erased = np.append(1, alpha_bar[:-1]), np.append(0, erased[:-1])
    innovation = -np.expm1(-drop)
    shrinkage = np.expm1(-drop - 0.5 * np.log1p(-innovation * erased))
    importance = innovation * previous_alpha_bar
    importance[0] = 0  # the kernel's own step needs no network
    shares = uniform_share / (num_timesteps - 1) + (1 - uniform_share) * importance / importance.sum()
    shares[0] = 0
    from_x_0 = np.sqrt(previous_alpha_bar) * innovation
    variance, room = previous_erased * innovation, from_x_0**2 * erased
    fields = (log_snr, np.sqrt(alpha_bar), np.sqrt(erased), shrinkage, from_x_0, variance, room, shares)
    return Chain(*(jnp.asarray(field, dtype=float) for field in fields))


def init(rng_key: Array) -> Weights:
    """LeCun-normal weights; a readout of zeros."""
    sizes = [2 + 8 + 8 + 1, *SIZES, 4]
    keys = jax.random.split(rng_key, len(sizes))
    normal = jax.nn.initializers.lecun_normal()
    weights = [(normal(k, (m, n)), jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:], strict=False)]
    return [*weights[:-1], (jnp.zeros((sizes[-2], 4)), jnp.zeros(4))]


def network(weights: Weights, x: Array, log_snr: Array) -> tuple[Array, Array]:
    """v and the log of the variance's excess, each of x's shape; one ``log_snr`` for all of x, or one per point."""
    time = jnp.clip(log_snr, -20, 20)[..., None] / 8
    parts = [x, waves(x, 2), jnp.broadcast_to(jnp.concatenate([waves(time, 4), time], -1), (*x.shape[:-1], 9))]
    hidden = jnp.concatenate(parts, -1)
    hidden = hidden.reshape(-1, hidden.shape[-1])  # rows: products over several batch axes are slower
    for matrix, bias in weights[:-1]:
        hidden = jax.nn.gelu(jnp.dot(hidden, matrix, precision="highest") + bias)
    matrix, bias = weights[-1]
    out = (jnp.dot(hidden, matrix, precision="highest") + bias).reshape(*x.shape[:-1], 4)
    return out[..., :2], out[..., 2:]


def waves(x: Array, octaves: int) -> Array:
    """sin and cos of each entry at so many octaves."""
    angles = x[..., None] * 2.0 ** jnp.arange(octaves)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*x.shape[:-1], -1)


def reverse(weights: Weights, x: Array, step: Chain) -> tuple[Array, Array]:
    """Mean and variance of p(x_{t-1} | x_t); one step for all of x, or one per point."""
    v, log_excess = network(weights, x, step.log_snr)
    column = jax.tree.map(lambda a: a[..., None], step)
    x_0 = column.signal * x - column.noise * v
    mean = x + (column.shrinkage * x + column.from_x_0 * x_0)
    return mean, column.variance + column.room * jnp.exp(log_excess)


def loss(weights: Weights, chain: Chain, x_0: Array, index: Array, noise: Array) -> Array:
    """-K per datum, in nats, from steps ``index`` (0…T-1) with standard normal ``noise``, both with x_0's batch shape
    behind a leading axis of draws."""
    step = jax.tree.map(lambda a: a[index], chain)
    column = jax.tree.map(lambda a: a[..., None], step)
    x_t = column.signal * x_0 + column.noise * noise
    mean, variance = reverse(weights, x_t, step)
    target = x_t + (column.shrinkage * x_t + column.from_x_0 * x_0)
    log_ratio = jnp.log(column.variance) - jnp.log(variance)
    kl = 0.5 * jnp.sum(jnp.expm1(log_ratio) - log_ratio + (target - mean) ** 2 / variance, -1)
    beta = chain.noise[0] ** 2
    last = -0.5 * jnp.sum(jnp.log(2 * jnp.pi * beta) + beta * x_0**2 + 1 - beta, -1)
    alpha_bar, erased = chain.signal[-1] ** 2, chain.noise[-1] ** 2
    prior_kl = 0.5 * jnp.sum(alpha_bar * (x_0**2 - 1) - jnp.log(erased), -1)
    return jnp.mean(kl / step.shares, 0).mean() + jnp.mean(prior_kl - last)


def draw(rng_key: Array, chain: Chain, num_times: int, batch_size: int) -> tuple[Array, Array]:
    """Steps, stratified over each row's times and the batch, and noise."""
    turn_key, place_key, noise_key = jax.random.split(rng_key, 3)
    turn = jax.random.randint(turn_key, (), 0, batch_size)
    place = ((jnp.arange(batch_size) + turn) % batch_size + jax.random.uniform(place_key, (batch_size,))) / batch_size
    places = (jnp.arange(num_times)[:, None] + place) / num_times
    index = 1 + jnp.searchsorted(jnp.cumsum(chain.shares[1:])[:-1], places, side="right")
    return index, jax.random.normal(noise_key, (num_times, batch_size, 2))


def optimizer(num_updates: int) -> optax.GradientTransformation:
    """Clipped Adam with warm-up and cosine decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50 * num_updates // 1000, num_updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


@partial(jax.jit, static_argnames=("num_updates", "batch_size", "num_times", "decay_updates"))
def train(
    rng_key: Array,
    carry: Any,
    chain: Chain,
    data: Array,
    *,
    num_updates: int,
    batch_size: int = 512,
    num_times: int = 1,
    decay_updates: int = 1000,
) -> tuple[Any, Array]:
    """Many updates in one dispatch; the carry is ``start(weights)``."""
    rule = optimizer(decay_updates)

    def update(i: Array, carry_losses: Any) -> Any:
        (weights, state, average), losses = carry_losses
        row_key, draw_key = jax.random.split(jax.random.fold_in(rng_key, i))
        x_0 = data[jax.random.randint(row_key, (batch_size,), 0, len(data))]
        index, noise = draw(draw_key, chain, num_times, batch_size)
        value, gradient = jax.value_and_grad(loss)(weights, chain, x_0, index, noise)
        updates, state = rule.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        average = optax.incremental_update(weights, average, jnp.maximum(1e-3, 10.0 / (10.0 + i)))
        return (weights, state, average), losses.at[i].set(value)

    return jax.lax.fori_loop(0, num_updates, update, (carry, jnp.zeros(num_updates)))


def start(weights: Weights, decay_updates: int = 1000) -> Any:
    """What training carries: weights, optimiser state, averaged weights."""
    return weights, optimizer(decay_updates).init(weights), weights


@partial(jax.jit, static_argnames="num")
def sample(rng_key: Array, weights: Weights, chain: Chain, num: int) -> Array:
    """Draws by a scan over the steps T…1."""
    end_key, last_key, rng_key = jax.random.split(rng_key, 3)
    x = jax.random.normal(end_key, (num, 2))

    def step(x: Array, at: tuple[Array, Chain]) -> tuple[Array, None]:
        key, constants = at
        mean, variance = reverse(weights, x, constants)
        return mean + jnp.sqrt(variance) * jax.random.normal(key, (num, 2)), None

    later = jax.tree.map(lambda a: a[1:], chain)
    x, _ = jax.lax.scan(step, x, (jax.random.split(rng_key, len(later.log_snr)), later), reverse=True)
    beta = chain.noise[0] ** 2
    return x * jnp.sqrt(1 - beta) + jnp.sqrt(beta) * jax.random.normal(last_key, (num, 2))


@partial(jax.jit, static_argnames="num")
def log_weights(rng_key: Array, weights: Weights, chain: Chain, x: Array, num: int) -> Array:
    """log p(x_0…x_T) − log q(x_1…x_T | x_0) of ``num`` trajectories drawn backwards for each point, shape (num, N)."""
    x = jnp.broadcast_to(x, (num, *x.shape))
    end_key, rng_key = jax.random.split(rng_key)
    noise = jax.random.normal(end_key, x.shape)
    end = chain.signal[-1] * x + chain.noise[-1] * noise
    start = jnp.sum(jnp.log(chain.noise[-1]) + 0.5 * (noise**2 - end**2), -1)

    def step(carry: tuple[Array, Array], at: tuple[Array, Chain]) -> tuple[tuple[Array, Array], None]:
        (x_t, log_w), (key, now) = carry, at
        mean, variance = reverse(weights, x_t, now)
        noise = jax.random.normal(key, x.shape)
        previous = x_t + (now.shrinkage * x_t + now.from_x_0 * x) + jnp.sqrt(now.variance) * noise
        log_ratio = jnp.log(now.variance / variance) + noise**2 - (previous - mean) ** 2 / variance
        return (previous, log_w + 0.5 * jnp.sum(log_ratio, -1)), None

    later = jax.tree.map(lambda a: a[1:], chain)
    keys = jax.random.split(rng_key, len(later.log_snr))
    (x_1, log_w), _ = jax.lax.scan(step, (end, start), (keys, later), reverse=True)
    residual = (x - chain.signal[0] * x_1) / chain.noise[0]
    return log_w - jnp.sum(0.5 * residual**2 + jnp.log(chain.noise[0]) + 0.5 * jnp.log(2 * jnp.pi), -1)
