"""What ``fit`` adds to a bare scan of its own update: checked data, held-out rows, average, bar and checkpoints."""

from __future__ import annotations

import tempfile
from typing import Any

import jax
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import pp_diffusion as ppd
from benchmarks.reference import handwritten
from benchmarks.setting import BATCH, diffusion, swiss_roll
from benchmarks.timing import Row, paired

CHECKPOINT_SECONDS = 20.0


def rows(small: bool) -> list[Row]:
    """One row, in seconds per update. A checkpoint every twenty seconds and at the end: the default is every minute."""
    updates = 16 if small else 20_000
    train = swiss_roll(small).train
    program, optimizer = diffusion(40, train), handwritten.optimizer(updates)
    svi = SVI(handlers.scale(program.bound_model, 1 / BATCH), program.bound_guide, optimizer, Trace_ELBO())
    state = svi.init(jax.random.key(1), train[:1])

    @jax.jit
    def scan(state: Any, x: Array) -> Any:
        def update(state: Any, key: Array) -> Any:
            return svi.update(state, x[jax.random.randint(key, (BATCH,), 0, len(x))])

        return jax.lax.scan(update, state, jax.random.split(jax.random.key(2), updates))

    def ours() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return ppd.fit(
                jax.random.key(1),
                program,
                train,
                num_steps=updates,
                batch_size=BATCH,
                optimizer=optimizer,
                progress_bar=True,
                checkpoint_dir=folder,
                checkpoint_every=CHECKPOINT_SECONDS,
                max_patience=1000,
            ).state

    return [
        Row(
            "training update, T = 40: fit with all of it / a bare scan of SVI.update",
            **paired(ours, lambda: scan(state, train), per=(updates, updates), num_pairs=1 if small else 3),
            note=f"a checkpoint every {CHECKPOINT_SECONDS:.0f} s, 50 evaluations of held-out rows",
        )
    ]
