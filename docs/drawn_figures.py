"""Figures of pages that are no notebooks, and of examples that no page does, in small forms of seconds to two minutes.

``python docs/drawn_figures.py [NAME ...]`` from the checkout's root; all by default. The repository holds them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the examples

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
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


def flow(path: Path) -> None:
    """The density of the flow beside the data's own, and what the solver's steps cost."""
    data, diffusion, fit = roll()
    x, y = np.linspace(-13, 15.5, 150), np.linspace(-15, 17.5, 170)
    grid = jnp.stack(jnp.meshgrid(x, y), -1).reshape(-1, 2)
    learned = diffusion.flow(fit.params, num_steps=20)
    densities = {"the data's own density": data.log_prob(grid), "the flow's, exact": learned.log_prob(grid)}
    figure = Figure(figsize=(10.5, 3.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3)
    top = float(np.exp(densities["the data's own density"]).max())
    for ax, (title, log_prob) in zip(axes, densities.items(), strict=False):
        ax.pcolormesh(x, y, np.exp(log_prob).reshape(len(y), len(x)), cmap="magma", vmin=0, vmax=top, rasterized=True)
        ax.set(title=title, aspect="equal", xticks=[], yticks=[])
    few = data.test[:500]
    steps, best = [3, 5, 10, 20, 40], diffusion.flow(fit.params, num_steps=80).log_prob(few)
    for name, solver in {"midpoint": ppd.solvers.MIDPOINT, "RK4": ppd.solvers.RK4, "Tsit5": ppd.solvers.TSIT5}.items():
        flows = [diffusion.flow(fit.params, num_steps=n, solver=solver) for n in steps]
        change = [float(jnp.sqrt(jnp.mean((each.log_prob(few) - best) ** 2))) for each in flows]
        axes[2].loglog([each.num_calls for each in flows], change, marker="o", label=name)
    axes[2].set(title="what the steps cost", xlabel="network calls", ylabel="RMS change of log p (nats)")
    axes[2].legend(frameon=False)
    figure.savefig(path)


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
    """The example's network after a third of its updates: a prior for each label, and one without."""
    from examples.digits_given_label import script

    return script.fit(
        jax.random.key(1), ppd.datasets.digits(jax.random.key(0)), num_steps=800, progress_bar=False
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


def spatial_prior(path: Path) -> None:
    """The example with a third of its updates, and three data sets."""
    from examples import spatial_prior as example

    sizes = {"num_steps": 2_000, "num_data_sets": 3, "num_samples": 500, "num_particles": 256}
    example.run(**sizes, figures=path.parent, progress=False)
    (path.parent / "spatial_prior.png").rename(path)


def image_posteriors(path: Path) -> None:
    """The example's task of noise on a small prior of dead leaves, which are drawn here."""
    from examples import image_posteriors as example

    shape, num_timesteps = (24, 24), 200
    levels = 255 * ppd.datasets.dead_leaves(KEYS[0], 3_000, 6).train
    network = ppd.networks.MultiScaleConv(
        num_scales=3, num_timesteps=num_timesteps, outputs=("real", "real"), features=(16,) * 3, pixel_units=(32, 32)
    )
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel(shape),
        ppd.FixedSchedule.log_linear(num_timesteps, first_beta=1e-3, final_log_snr=-8.0),
        network,
        last_step="network",
        transform=dist.transforms.AffineTransform(128.0, 75.0),
    )
    batches = jax.tree_util.Partial(partial(_crops, shape=shape), levels=levels)
    fit = ppd.fit(KEYS[1], diffusion, batches, num_steps=2_500, progress_bar=False)
    unseen = _crops(KEYS[2], 255 * ppd.datasets.dead_leaves(KEYS[3], 8, 8).test, shape=shape, size=6)
    sizes = {"num_images": 6, "num_particles": 32, "num_chains": 4, "num_timesteps": 100}
    found = example.denoise(KEYS[4], fit.prior, unseen, progress=False, **sizes)
    print(f"{found.text}\n{found.note}")
    found.figure.suptitle("dead leaves under noise of variance 1, by SMC", fontsize=9)
    found.figure.savefig(path)


def _crops(rng_key: jax.Array, levels: Any, *, shape: tuple[int, int], size: int = 64) -> jax.Array:
    row_key, crop_key = jax.random.split(rng_key)
    return ppd.datasets.random_crops(crop_key, ppd.datasets.draw_rows(row_key, levels, size), *shape)


FIGURES: dict[str, Callable[[Path], None]] = {
    "flow": flow,
    "entropies": entropies,
    "training": training,
    "gallery/digits": digits,
    "gallery/digits_given_label": digits_given_label,
    "gallery/spatial_prior": spatial_prior,
    "gallery/image_posteriors": image_posteriors,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            drawn = Path(scratch) / "figure.png"
            FIGURES[name](drawn)
            shrink(drawn, DOCS / "figures" / f"{name}.png")
        print(f"{name}: {time.process_time() - started:.0f} CPU seconds")
