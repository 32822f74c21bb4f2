"""Figures of pages that are no notebooks, in small forms of a minute or two.

``python docs/drawn_figures.py [NAME ...]`` from the checkout's root; all by default. The repository holds them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the examples

import jax
import jax.numpy as jnp
import numpy as np
from gallery_figures import DOCS, shrink
from matplotlib.figure import Figure

import pp_diffusion as ppd

KEYS = jax.random.split(jax.random.key(0), 8)


@cache
def roll() -> tuple[Any, ppd.Diffusion, ppd.FitResult]:
    """A swiss roll of 20 000 points, learned in 8000 updates."""
    data = ppd.datasets.swiss_roll(KEYS[0], 20_000, 2_000)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.FixedSchedule.log_linear(100, first_beta=1e-3),
        ppd.networks.MLP(),
        transform=ppd.standardize(data.train),
    )
    return data, diffusion, ppd.fit(KEYS[1], diffusion, data.train, num_steps=8_000, progress_bar=False)


def entropies(path: Path) -> None:
    """Of each step of the swiss roll's chain."""
    data, _, fit = roll()
    bounds = ppd.entropy_bounds(fit.prior, data.train)
    ppd.plotting.entropies(bounds, ppd.reverse_entropy(KEYS[2], fit.prior, data.test)).savefig(path)


def training(path: Path) -> None:
    """Of a table whose rows are soon known by heart."""
    from sklearn.datasets import load_wine

    table = load_wine().data
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((13,)), ppd.FixedSchedule.log_linear(100), ppd.networks.MLP(), transform=ppd.whiten(table)
    )
    fit = ppd.fit(KEYS[0], diffusion, table, num_steps=4_000, val_prop=0.2, progress_bar=False)
    figure = Figure(figsize=(13, 3.8), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3)
    ppd.plotting.losses(fit, ax=axes[0])
    ppd.plotting.loss_by_time(fit, axes=axes[1:]).savefig(path)


@cache
def digit_priors() -> Any:
    """The example's network after a fifth of its updates: a prior for each label, and one without."""
    from examples.digits_given_label import script

    return script.fit(
        jax.random.key(1), ppd.datasets.digits(jax.random.key(0)), num_steps=500, progress_bar=False
    ).prior


def digits(path: Path) -> None:
    """Draws without a label beside test images."""
    test = ppd.datasets.digits(jax.random.key(0)).test
    x = np.clip(np.floor(digit_priors()(None).sample(jax.random.key(2), (100,))), 0, 16)
    ppd.plotting.samples(x, test[:100]).savefig(path)


def digits_given_label(path: Path) -> None:
    """A row for each label, black on white."""
    prior = digit_priors()(np.arange(10))
    figure = Figure(figsize=(8.4, 4.3), layout="constrained", dpi=120)
    for ax, strength in zip(figure.subplots(1, 2), (1.0, 2.0), strict=True):
        x = (prior if strength == 1 else prior.guided(strength)).sample(jax.random.key(2), (10,))
        rows = -jnp.moveaxis(x, 0, 1).reshape(-1, 8, 8)
        title = "as learned" if strength == 1 else f"guided by {strength:g}"
        ppd.plotting.images(rows, value_range=(-17, 0), title=title, ax=ax)
    figure.savefig(path)


FIGURES: dict[str, Callable[[Path], None]] = {
    "entropies": entropies,
    "training": training,
    "gallery/digits": digits,
    "gallery/digits_given_label": digits_given_label,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            drawn = Path(scratch) / "figure.png"
            FIGURES[name](drawn)
            shrink(drawn, DOCS / "figures" / f"{name}.png")
        print(f"{name}: {time.process_time() - started:.0f} CPU seconds")
