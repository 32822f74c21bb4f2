"""Drawing 1000 points: ``prior.sample`` against a hand-written scan over the steps."""

from __future__ import annotations

import jax
from jax import Array

from benchmarks.reference import handwritten
from benchmarks.setting import as_weights, chain, diffusion, swiss_roll
from benchmarks.timing import Row, Sides, memory, not_run, on_gpu, paired

NUM = 1000


def rows(small: bool) -> list[Row]:
    """Rows of the table, in seconds per call."""
    train = swiss_roll(small).train
    table = [against_handwritten(train, t, 1 if small else 15) for t in ((40,) if small else (1000, 40))]
    return table if on_gpu() else [*table, not_run("1000 draws, on a GPU", "no GPU here")]


def against_handwritten(train: Array, num_timesteps: int, num_pairs: int) -> Row:
    """Both with the same weights; ours also returns to data units."""
    program, constants = diffusion(num_timesteps, train), chain(num_timesteps)
    params = program.init_params(jax.random.key(1))
    prior, weights, key = program.prior(params), as_weights(params), jax.random.key(2)
    return Row(
        f"1000 draws, T = {num_timesteps}: prior.sample / hand-written scan",
        **paired(
            lambda: prior.sample(key, (NUM,)),
            lambda: handwritten.sample(key, weights, constants, NUM),
            num_pairs=num_pairs,
        ),
        memory=Sides(
            memory(jax.jit(lambda prior, key: prior.sample(key, (NUM,))), prior, key),
            memory(handwritten.sample, key, weights, constants, NUM),
        ),
    )
