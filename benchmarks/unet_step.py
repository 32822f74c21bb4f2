"""A training update of CIFAR-10's U-Net: ``ppd.fit`` against the same layers and the same loss by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import pp_diffusion as ppd
from benchmarks.reference import handwritten_unet as by_hand
from benchmarks.timing import Row, not_run, on_gpu, paired
from models import cifar10 as script

SIZE = 32  # images per update


def rows(small: bool) -> list[Row]:
    """Rows of the table, in seconds per update. The images are noise: what they show takes no time."""
    if on_gpu():
        return [not_run("training update of CIFAR-10's U-Net", "the reference's convolutions are made for a CPU")]
    updates, num_pairs, size = (2, 1, 2) if small else (12, 7, SIZE)
    levels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (256, *script.SHAPE), dtype=np.uint8))
    network = script.sizes(channels=(2, 2), num_blocks=1) if small else script.for_cpu
    diffusion, optimizer = script.diffusion(network), by_hand.optimizer(updates)
    batches = Partial(jax.jit(partial(_batch, size)), levels)
    chain = by_hand.steps(script.T, 2e-5, -8.0)
    (weights,) = diffusion.init_params(jax.random.key(1)).values()
    carry = weights, optimizer.init(weights), weights

    def ours() -> Any:
        fit = partial(ppd.fit, jax.random.key(1), diffusion, batches, optimizer=optimizer, progress_bar=False)
        return fit(num_steps=updates).state

    def theirs() -> Any:
        return by_hand.train(jax.random.key(2), carry, chain, levels, num_updates=updates, size=size)

    what = f"training update of CIFAR-10's U-Net, batches of {size}: fit / hand-written"
    return [Row(what, **paired(ours, theirs, per=(updates, updates), num_pairs=num_pairs))]


def _batch(size: int, levels: Any, rng_key: Any) -> Any:
    return script.batch(rng_key, levels, size)
