"""The probability-flow density of an MLP diffusion in plain JAX: one file, nothing of ours, no layers of abstraction.

The same solver, steps, ends and network as ``diffusion.flow(params)``'s, written for events of one axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

WEIGHTS = (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774)
LOWER = (
    (),
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
)


def log_prob(predict_v: Callable[[Array, Array], Array], first: float, last: float, num_steps: int, x: Array) -> Array:
    """Log density in the model's space, per row of ``x``.

    :param predict_v: of states ``(N, d)`` and one log-SNR.
    :param first: the highest log-SNR, where the score is frozen.
    :param last: the lowest, where the mean of x is the network's.
    """
    d = x.shape[-1]
    signal_1 = jnp.sqrt(jax.nn.sigmoid(first))
    ends = np.arcsinh(np.array([first, last]) / 4)
    times = np.linspace(*ends, num_steps + 1)
    starts, steps = np.append(0.0, times[:-1]), np.append(1.0, np.diff(times))
    lower = np.zeros((6, 6))
    for i, row in enumerate(LOWER):
        lower[i, : len(row)] = row

    def predict(x: Array, log_snr: Array) -> Array:
        return jnp.sqrt(jax.nn.sigmoid(log_snr)) * x - jnp.sqrt(jax.nn.sigmoid(-log_snr)) * predict_v(x, log_snr)

    @jax.checkpoint
    def field(state: Any, time: Array, is_end: Array) -> Any:
        x, _ = state
        log_snr = jnp.where(is_end, first, jnp.clip(4 * jnp.sinh(time), last, first))
        signal = jnp.sqrt(jax.nn.sigmoid(log_snr))
        a = jnp.where(is_end, -0.5 * signal, 2 * signal * jnp.cosh(time))
        b = jnp.where(is_end, 0.5, -2 * signal**2 * jnp.cosh(time))
        x_0, along = jax.linearize(lambda x: predict(x, log_snr), x)
        units = jnp.broadcast_to(jnp.eye(d)[:, None], (d, *x.shape))
        return a * x_0 + b * x, a * jnp.einsum("ini->n", jax.vmap(along)(units)) + b * d

    def step(state: Any, at: Any) -> Any:
        start, size, is_end = at

        def stage(slopes: Any, at: Any) -> Any:
            i, row = at
            state_i = jax.tree.map(lambda s, k: s + size * jnp.tensordot(row, k, 1), state, slopes)
            slope = field(state_i, start + jnp.sum(row) * size, is_end)
            return jax.tree.map(lambda all, one: all.at[i].set(one), slopes, slope), None

        none = jax.tree.map(lambda s: jnp.zeros((6, *s.shape)), state)
        slopes, _ = jax.lax.scan(stage, none, (jnp.arange(6), jnp.asarray(lower, jnp.float32)))
        return jax.tree.map(lambda s, k: s + size * jnp.tensordot(jnp.asarray(WEIGHTS), k, 1), state, slopes), None

    at = (jnp.asarray(starts, jnp.float32), jnp.asarray(steps, jnp.float32), jnp.arange(num_steps + 1) == 0)
    (end, change), _ = jax.lax.scan(step, (x * signal_1, jnp.zeros(len(x))), at)
    mean = jnp.sqrt(jax.nn.sigmoid(last)) * predict(jnp.zeros_like(end), jnp.asarray(last))
    normal = jnp.sum(-0.5 * (end - mean) ** 2 - 0.5 * jnp.log(2 * jnp.pi), -1)
    return normal + change + d * jnp.log(signal_1)
