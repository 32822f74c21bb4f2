"""A training update: ``ppd.fit`` against the same mathematics by hand, and what many updates per dispatch remove."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax
from jax import Array
from numpyro.infer import SVI, Trace_ELBO

import pp_diffusion as ppd
from benchmarks.reference import handwritten
from benchmarks.setting import BATCH, as_weights, chain, diffusion, swiss_roll
from benchmarks.timing import Row, Sides, memory, not_run, on_gpu, paired


def rows(small: bool) -> list[Row]:
    """Rows of the table, in seconds per update."""
    train = swiss_roll(small).train
    updates, num_pairs = (16, 1) if small else (1000, 9)
    cases = [(40, 2)] if small else [(1000, 1), (1000, 2), (40, 1), (40, 2)]
    table = [against_handwritten(train, *case, updates, num_pairs) for case in cases]
    table.append(against_single_updates(train, cases[0][0], updates, num_pairs))
    if not on_gpu():
        table.append(not_run("training update, on a GPU", "no GPU here"))
    return table


def against_handwritten(train: Array, num_timesteps: int, num_times: int, updates: int, num_pairs: int) -> Row:
    """``fit`` with all that it does (checked data, dispatches of a size that adapts), against one compiled loop."""
    program, optimizer = diffusion(num_timesteps, train), handwritten.optimizer(updates)
    constants, points = chain(num_timesteps), program.to_model_space(train)
    carry = handwritten.start(as_weights(program.init_params(jax.random.key(1))), updates)
    loop = {"batch_size": BATCH, "num_times": num_times, "decay_updates": updates}

    def ours() -> Any:
        return _fit(program, train, optimizer, updates, num_times).state

    def theirs() -> Any:
        return handwritten.train(jax.random.key(2), carry, constants, points, num_updates=updates, **loop)

    svi, state = _svi(program, train, optimizer)
    update = jax.jit(partial(svi.update, batch_size=BATCH, num_times=num_times))
    return Row(
        f"training update, T = {num_timesteps}, {num_times} time{'s' * (num_times > 1)} per row: fit / hand-written",
        **paired(ours, theirs, per=(updates, updates), num_pairs=num_pairs),
        memory=Sides(
            memory(update, state, train),
            memory(handwritten.train, jax.random.key(2), carry, constants, points, num_updates=1, **loop),
        ),
    )


def against_single_updates(train: Array, num_timesteps: int, updates: int, num_pairs: int) -> Row:
    """``fit`` against one dispatch per update, with a network so small that launches are much of the cost."""
    program = diffusion(num_timesteps, train, ppd.networks.MLP((16, 16)))
    optimizer = handwritten.optimizer(updates)
    svi, state = _svi(program, train, optimizer)
    update = jax.jit(partial(svi.update, batch_size=BATCH))

    def theirs() -> Any:
        last = state
        for _ in range(updates):
            last, _ = update(last, train)
        return last

    return Row(
        f"training update, T = {num_timesteps}, MLP 16-16: fit / loop over SVI.update",
        **paired(
            lambda: _fit(program, train, optimizer, updates, 1).state,
            theirs,
            per=(updates, updates),
            num_pairs=num_pairs,
        ),
        note="many updates per dispatch / one",
    )


def _fit(
    program: ppd.Diffusion, train: Array, optimizer: optax.GradientTransformation, updates: int, num_times: int
) -> ppd.FitResult:
    return ppd.fit(
        jax.random.key(1),
        program,
        train,
        num_steps=updates,
        batch_size=BATCH,
        optimizer=optimizer,
        num_times=num_times,
        val_prop=0.0,
        progress_bar=False,
    )


def _svi(program: ppd.Diffusion, train: Array, optimizer: optax.GradientTransformation) -> tuple[SVI, Any]:
    svi = SVI(program.bound_model, program.bound_guide, optimizer, Trace_ELBO())
    return svi, svi.init(jax.random.key(1), train[:1])
