"""CIFAR-10's Gaussian diffusion with a U-Net in plain JAX and optax: the bound's loss and its training.

What a good JAX programmer would write for this one case on a CPU: convolutions as patches times a matrix, the same
layers as the package's network, weights in nested dictionaries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from benchmarks.reference.handwritten import Chain, waves

FREQUENCIES = (3, 4, 5, 6, 7)
GROUPS = 8
LOC, SCALE = 128.0, 64.0


def steps(num_timesteps: int, first_beta: float, final_log_snr: float, uniform_share: float = 0.2) -> Chain:
    """Log-SNR falling linearly; the network describes t = 1 too, which is drawn most often."""
    start = np.log1p(-first_beta) - np.log(first_beta)
    log_snr = np.linspace(start, final_log_snr, num_timesteps)
    drop = np.append(np.inf, -np.diff(log_snr))
    alpha_bar, erased = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
    previous_alpha_bar, previous_erased = np.append(1, alpha_bar[:-1]), np.append(0, erased[:-1])
    innovation = -np.expm1(-drop)
    shrinkage = np.expm1(-drop - 0.5 * np.log1p(-innovation * erased))
    importance = innovation * previous_alpha_bar
    shares = uniform_share / num_timesteps + (1 - uniform_share) * importance / importance.sum()
    from_x_0 = np.sqrt(previous_alpha_bar) * innovation
    variance, room = previous_erased * innovation, from_x_0**2 * erased
    fields = (log_snr, np.sqrt(alpha_bar), np.sqrt(erased), shrinkage, from_x_0, variance, room, shares)
    return Chain(*(jnp.asarray(field, dtype=float) for field in fields))


# --- layers --------------------------------------------------------------------------------------------------------


def dense(layer: Any, x: Array) -> Array:
    """A matrix product and a bias."""
    return jnp.dot(x, layer["kernel"], precision="highest") + layer["bias"]


def conv(layer: Any, x: Array) -> Array:
    """Of 3 × 3 or 1 × 1 pixels."""
    kernel = layer["kernel"]
    size, _, channels, features = kernel.shape
    height, width = x.shape[1:3]
    if size > 1:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], -1)
    flat = x.reshape(-1, size * size * channels)
    out = jnp.dot(flat, kernel.reshape(-1, features), precision="highest")
    return out.reshape(*x.shape[:3], features) + layer["bias"]


def normalise(layer: Any, x: Array, told: Array | None = None) -> Array:
    """Group normalisation, with a scale and a shift by channel and, where told, by image."""
    channels = x.shape[-1]
    groups = math.gcd(GROUPS, channels)
    mean, square = (a.mean((1, 2)).reshape(len(x), groups, -1).mean(-1) for a in (x, x**2))
    inverse = jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + 1e-5)
    mean, inverse = (jnp.repeat(a, channels // groups, -1) for a in (mean, inverse))
    slope, shift = inverse * layer["scale"], layer["bias"]
    if told is not None:
        scale, more = jnp.split(told, 2, -1)
        slope, shift = slope * (1 + scale), shift + more
    return x * slope[:, None, None] + (shift - mean * slope)[:, None, None]


def block(layer: Any, x: Array, time: Array) -> Array:
    """A residual block."""
    told = dense(layer["Dense_0"], time)
    h = conv(layer["Convolution_0"], jax.nn.silu(normalise(layer["Normalised_0"], x)))
    return x + conv(layer["Convolution_1"], jax.nn.silu(normalise(layer["Normalised_1"], h, told)))


def attend(layer: Any, x: Array) -> Array:
    """Self-attention of one head over all pixels."""
    channels = x.shape[-1]
    qkv = conv(layer["Convolution_0"], normalise(layer["Normalised_0"], x)).reshape(len(x), -1, 3 * channels)
    query, key, value = jnp.split(qkv, 3, -1)
    score = jnp.einsum("bqc,bkc->bqk", query, key, precision="highest") / math.sqrt(channels)
    mixed = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(score), value, precision="highest")
    return x + conv(layer["Convolution_1"], mixed.reshape(x.shape))


def layers(weights: Any, kind: str) -> Iterator[Any]:
    """Those of a kind, in their order."""
    return (weights[f"{kind}_{i}"] for i in itertools.count())


def network(weights: Any, x: Array, log_snr: Array) -> tuple[Array, Array]:
    """v and the log of the variance's excess."""
    level = jnp.clip(log_snr, -20, 20)
    time = jnp.concatenate([level[:, None] / 8, waves(level[:, None] / 8, 4)], -1)
    for name in ("Dense_0", "Dense_1"):
        time = jax.nn.silu(dense(weights[name], time))
    scale, variance = (a[:, None, None, None] for a in (jax.lax.rsqrt(jax.nn.sigmoid(level)), jnp.exp(-level)))
    parts = [x]
    for k in FREQUENCIES:
        omega = math.pi * 2.0**k
        seen = jnp.exp(-0.5 * omega**2 * variance)
        parts += [seen * jnp.sin(omega * scale * x), seen * jnp.cos(omega * scale * x)]
    convs, blocks, attentions = (layers(weights, kind) for kind in ("Convolution", "Block", "Attention"))
    levels = sum(name.startswith("Block") for name in weights) // 2  # each has a block down and one up
    h, skips, lowest = conv(next(convs), jnp.concatenate(parts, -1)), [], levels - 1
    for depth in range(levels):
        if depth:
            rows, height, width, channels = h.shape
            h = h.reshape(rows, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
            h = conv(next(convs), h.reshape(rows, height // 2, width // 2, 4 * channels))
        h = block(next(blocks), h, time)
        h = attend(next(attentions), h) if depth == lowest else h
        skips.append(h)
    skips.pop()
    for depth in reversed(range(levels)):
        if depth < lowest:
            h = jnp.repeat(jnp.repeat(conv(next(convs), h), 2, 1), 2, 2)
            h = conv(next(convs), jnp.concatenate([h, skips[depth]], -1))
        h = block(next(blocks), h, time)
        h = attend(next(attentions), h) if depth == lowest else h
    out = dense(weights["readout"]["Dense_0"], jax.nn.silu(normalise(weights["Normalised_0"], h)))
    return out[..., :3], out[..., 3:]


# --- the bound -------------------------------------------------------------------------------------------------------


def loss(weights: Any, chain: Chain, x_0: Array, index: Array, noise: Array) -> Array:
    """-K per image in the model's space, nats, from one step each: ``index`` (0…T-1) with standard normal noise."""
    now, inner = (jax.tree.map(lambda a, i=i: a[i][:, None, None, None], chain) for i in (index, jnp.maximum(index, 1)))
    x_t = now.signal * x_0 + now.noise * noise
    v, log_excess = network(weights, x_t, chain.log_snr[index])
    mean = x_t + (now.shrinkage * x_t + now.from_x_0 * (now.signal * x_t - now.noise * v))
    variance = now.variance + now.room * jnp.exp(log_excess)
    target = x_t + (inner.shrinkage * x_t + inner.from_x_0 * x_0)
    log_ratio = jnp.log(inner.variance) - jnp.log(variance)
    kl = 0.5 * jnp.sum(jnp.expm1(log_ratio) - log_ratio + (target - mean) ** 2 / variance, (1, 2, 3))
    beta = chain.noise[0] ** 2
    by_network = jnp.sum((x_0 - mean) ** 2 / variance + jnp.log(variance), (1, 2, 3))
    by_kernel = jnp.sum((x_0 - jnp.sqrt(1 - beta) * x_t) ** 2 / beta + jnp.log(beta), (1, 2, 3))
    cost = jnp.where(index == 0, 0.5 * (by_network - by_kernel), kl) / chain.shares[index]
    last = -0.5 * jnp.sum(jnp.log(2 * jnp.pi * beta) + beta * x_0**2 + 1 - beta, (1, 2, 3))
    alpha_bar, erased = chain.signal[-1] ** 2, chain.noise[-1] ** 2
    prior_kl = 0.5 * jnp.sum(alpha_bar * (x_0**2 - 1) - jnp.log(erased), (1, 2, 3))
    return jnp.mean(cost + prior_kl - last)


def draw(rng_key: Array, chain: Chain, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Steps, stratified over the batch, and noise."""
    turn_key, place_key, noise_key = jax.random.split(rng_key, 3)
    num = shape[0]
    turn = jax.random.randint(turn_key, (), 0, num)
    place = ((jnp.arange(num) + turn) % num + jax.random.uniform(place_key, (num,))) / num
    index = jnp.searchsorted(jnp.cumsum(chain.shares)[:-1], place, side="right")
    return index, jax.random.normal(noise_key, shape)


def batch(rng_key: Array, levels: Array, size: int) -> Array:
    """Images with noise on their levels, half of them mirrored, in the model's space."""
    row_key, flip_key, noise_key = jax.random.split(rng_key, 3)
    images = levels[jax.random.randint(row_key, (size,), 0, len(levels))]
    flipped = jax.random.bernoulli(flip_key, shape=(size, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
    return (images + jax.random.uniform(noise_key, images.shape) - LOC) / SCALE


def optimizer(num_updates: int) -> optax.GradientTransformation:
    """Clipped Adam with warm-up and cosine decay."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(10, num_updates // 2), num_updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


@partial(jax.jit, static_argnames=("num_updates", "size"))
def train(rng_key: Array, carry: Any, chain: Chain, levels: Array, *, num_updates: int, size: int) -> tuple[Any, Array]:
    """Many updates in one dispatch; the carry is weights, optimiser state and averaged weights."""
    rule = optimizer(num_updates)

    def update(i: Array, carry_losses: Any) -> Any:
        (weights, state, average), losses = carry_losses
        batch_key, draw_key = jax.random.split(jax.random.fold_in(rng_key, i))
        x_0 = batch(batch_key, levels, size)
        index, noise = draw(draw_key, chain, x_0.shape)
        value, gradient = jax.value_and_grad(loss)(weights, chain, x_0, index, noise)
        updates, state = rule.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        average = optax.incremental_update(weights, average, jnp.maximum(1e-3, 10.0 / (10.0 + i)))
        return (weights, state, average), losses.at[i].set(value)

    return jax.lax.fori_loop(0, num_updates, update, (carry, jnp.zeros(num_updates)))
