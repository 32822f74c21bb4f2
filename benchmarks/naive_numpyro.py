"""Time to equal gradient variance: ``ppd.fit`` against a scan of sample sites under ``Trace_ELBO``.

An estimate with variance v that takes t seconds reaches any other variance v' by averaging, in t v / v' seconds, so
t v is what there is to compare. Variances are total ones, over draws of rows, times and noise, of the gradient of −K
per datum by the network's parameters, at parameters that were trained a little.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from numpyro.infer import SVI, Trace_ELBO

import pp_diffusion as ppd
from benchmarks.reference import naive_numpyro
from benchmarks.setting import BATCH, as_weights, chain, diffusion, swiss_roll
from benchmarks.timing import Row, Sides, Spread, memory, paired

ROWS = 16  # of a draw of the naive gradient; its rows are independent, so that its variance is 1/batch that of one


def rows(small: bool) -> list[Row]:
    """For each T, a row in seconds per update and one in seconds to the variance of one update of ours."""
    train = swiss_roll(small).train
    if small:
        return compare(train, 5, trained=8, updates=(16, 1), draws=(8, 8), num_pairs=1)
    short = compare(train, 40, trained=2_000, updates=(500, 5), draws=(400, 400), num_pairs=7)
    return short + compare(train, 1000, trained=2_000, updates=(500, 1), draws=(400, 200), num_pairs=7)


def compare(
    train: Array, num_timesteps: int, *, trained: int, updates: tuple[int, int], draws: tuple[int, int], num_pairs: int
) -> list[Row]:
    """Two rows; ``updates`` per timed call and ``draws`` of the gradient, ours and theirs."""
    program, constants = diffusion(num_timesteps, train), chain(num_timesteps)
    optimizer, points = optax.adam(1e-3), program.to_model_space(train)
    fit = partial(ppd.fit, jax.random.key(1), program, train, batch_size=BATCH, optimizer=optimizer, progress_bar=False)
    fit = partial(fit, val_prop=0.0)  # the same updates, and no more
    svi = SVI(naive_numpyro.model, naive_numpyro.guide, optimizer, Trace_ELBO())
    state = svi.init(jax.random.key(2), constants, points[:1])

    @jax.jit
    def update(state: Any, points: Array) -> Any:
        index = jax.random.randint(jax.random.fold_in(state.rng_key, 0), (BATCH,), 0, len(points))
        return svi.update(state, constants, points[index])[0]

    def theirs() -> Any:
        last = state
        for _ in range(updates[1]):
            last = update(last, points)
        return last

    timed = paired(lambda: fit(num_steps=updates[0]).state, theirs, per=updates, num_pairs=num_pairs)
    bound = SVI(program.bound_model, program.bound_guide, optimizer, Trace_ELBO())
    ours_update = jax.jit(partial(bound.update, batch_size=BATCH))
    used = Sides(memory(ours_update, bound.init(jax.random.key(2), train[:1]), train), memory(update, state, points))

    def our_loss(params: Any, key: Array) -> Array:
        model, guide = program.bound_model, program.bound_guide
        return Trace_ELBO().loss(key, params, model, guide, train, batch_size=BATCH) / len(train)

    def their_loss(weights: Any, key: Array) -> Array:
        row_key, key = jax.random.split(key)
        x = points[jax.random.randint(row_key, (ROWS,), 0, len(points))]
        return Trace_ELBO().loss(key, weights, naive_numpyro.model, naive_numpyro.guide, constants, x) / ROWS

    params = fit(num_steps=trained).params
    weights = {"weights": as_weights(params)}
    ours = total_variance(our_loss, params, draws[0])
    naive = total_variance(their_loss, weights, draws[1]) * ROWS / BATCH
    factor = naive / ours
    what = f"T = {num_timesteps}: fit / scan of sample sites under Trace_ELBO"
    seconds = Sides(timed["seconds"].ours, timed["seconds"].theirs * factor)
    ratio = Spread(*(q / factor for q in timed["ratio"]))
    return [
        Row(f"update, {what}", **timed, memory=used, note=f"gradient variance {ours:.3g} / {naive:.3g}"),
        Row(f"time to equal gradient variance, {what}", seconds, ratio, note=f"theirs/ours = {1 / ratio.median:.3g}"),
    ]


def total_variance(loss: Callable[[Any, Array], Array], params: Any, num_draws: int) -> float:
    """The sum over parameters of the variance of the loss's gradient."""
    keys = jax.random.split(jax.random.key(7), num_draws)
    draw = jax.jit(lambda params, keys: jax.lax.map(lambda key: jax.grad(loss)(params, key), keys))
    gradients = jax.tree.leaves(draw(params, keys))
    return float(sum(np.asarray(g, dtype=np.float64).var(0, ddof=1).sum() for g in gradients))
