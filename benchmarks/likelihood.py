"""What ``estimate_log_prob`` costs as T and the number of trajectories grow, against a hand-written scan."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jax import Array

import pp_diffusion as ppd
from benchmarks.reference import handwritten
from benchmarks.setting import as_weights, chain, diffusion, swiss_roll
from benchmarks.timing import Row, Sides, memory, not_run, on_gpu, paired
from pp_diffusion.weights import weights_of_rows

NUM_DATA, CHUNK = 64, 4096


def rows(small: bool) -> list[Row]:
    """A row per T and number of trajectories, in seconds per call."""
    train = swiss_roll(small).train
    cases = [(20, 64), (20, 100)] if small else [(100, 64), (100, 512), (1000, 64), (1000, 512)]
    table = [against_handwritten(train, *case, 1 if small else 5) for case in cases]
    return table if on_gpu() else [*table, not_run("log p by eq. 9, on a GPU", "no GPU here")]


def against_handwritten(train: Array, num_timesteps: int, num_trajectories: int, num_pairs: int) -> Row:
    """Both with the same weights. Ours goes in chunks, checks the data, and ends in error, k-hat and PSIS; theirs holds
    all trajectories at once and ends in the log weights."""
    program, constants = diffusion(num_timesteps, train), chain(num_timesteps)
    params = program.init_params(jax.random.key(1))
    prior, weights, key = program.prior(params), as_weights(params), jax.random.key(2)
    x = train[:NUM_DATA]
    z = program.to_model_space(x)
    ours = partial(ppd.estimate_log_prob, key, prior, x, num_trajectories, chunk_size=CHUNK)
    timed = paired(
        lambda: ours().value,
        lambda: np.asarray(handwritten.log_weights(key, weights, constants, z, num_trajectories)),
        num_pairs=num_pairs,
    )
    per_call = timed["seconds"].ours / (num_timesteps * num_trajectories * NUM_DATA)
    return Row(
        f"log p of {NUM_DATA} points, T = {num_timesteps}, {num_trajectories} trajectories: ours / hand-written scan",
        **timed,
        memory=Sides(
            memory(weights_of_rows, prior, x, key, min(num_trajectories, CHUNK // NUM_DATA)),
            memory(handwritten.log_weights, key, weights, constants, z, num_trajectories),
        ),
        note=f"{1e6 * per_call:.2f} µs per network call",
    )
