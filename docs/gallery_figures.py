"""The figures of docs/gallery.md: each example, of a size that takes a minute or so, its figure made small.

``python docs/gallery_figures.py [NAME ...]`` from the checkout's root; the figures are part of the repository, so that
the documentation's build does not wait for them. ``front`` is README's figure.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "figures" / "gallery"
WIDTH = 1000


class Shown(NamedTuple):
    """An example's settings here, and which of its figures is shown."""

    figure: str
    settings: dict[str, Any]


EXAMPLES = {
    "swiss_roll": Shown("swiss_roll_short_figure_1.png", {"rows": ["short"], "num_test": 1000}),
    "heartbeat": Shown("heartbeat_small_samples.png", {"rows": ["small"], "num_steps": 1500, "num_test": 500}),
    "digits": Shown("digits_samples.png", {"num_steps": 1000, "num_test": 60}),
    "quasi_static": Shown("quasi_static.png", {"lengths": (10, 30, 100, 300), "num_data": 200}),
    "composition_bias": Shown(
        "composition_bias.png", {"num_timesteps": 200, "num_particles": 1000, "num_draws": 10_000}
    ),
    "likelihood": Shown(
        "likelihood_roll-40_entropies.png",
        {"rows": ["roll-40"], "num_steps": 3000, "most_data": 200, "num_trajectories": 256},
    ),
    "posterior_swiss_roll": Shown(
        "posterior_swiss_roll.png", {"lengths": (40,), "num_steps": (4000,), "num_draws": 50_000, "num_nuts": 20}
    ),
    "posterior_heartbeat": Shown(
        "posterior_heartbeat.png", {"num_steps": 1500, "num_timesteps": 100, "num_sequences": 12}
    ),
    "posterior_digits": Shown(
        "posterior_digits_half.png",
        {"num_steps": 1000, "num_timesteps": 40, "num_images": 6, "num_test": 20, "num_particles": 48},
    ),
    "spatial_prior": Shown(
        "spatial_prior.png", {"num_steps": 2000, "num_data_sets": 6, "num_particles": 128, "num_samples": 150}
    ),
    "missing_values": Shown(
        "missing_values.png", {"num_steps": 1500, "num_rows": 12, "num_particles": 32, "num_draws": 10}
    ),
    "simulation": Shown("simulation.png", {"num_steps": 2500, "num_draws": 1000, "num_particles": 1000}),
    "regression": Shown("regression.png", {"num_steps": 1500, "num_splits": 1, "num_draws": 400}),
    "digits_given_label": Shown("digits_given_label.png", {"num_steps": 1200, "num_draws": 10, "num_test": 20}),
    "schedules": Shown(
        "schedules.png",
        {
            "num_steps": 1000,
            "long_steps": 1000,
            "num_seeds": 1,
            "num_test": 300,
            "ends": (-2.0, 0.0),
            "num_long": 0,
            "grid": 60,
        },
    ),
}


def shrink(source: Path, target: Path) -> None:
    """At most ``WIDTH`` pixels wide, 128 colors."""
    from PIL import Image

    image = Image.open(source).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1024:.0f} KiB")


def example(name: str) -> None:
    """Runs one, and keeps its figure."""
    shown = EXAMPLES[name]
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module(f"examples.{name}").run(**shown.settings, figures=Path(folder), progress=False)
        shrink(Path(folder) / shown.figure, FOLDER / f"{name}.png")


def front() -> None:
    """README's: a density learned, judged, and used."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from matplotlib.figure import Figure

    import pp_diffusion as ppd

    data = ppd.datasets.swiss_roll(jax.random.key(0), 50_000, 300)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.LearnedSchedule(num_timesteps=40, first_beta=3e-4),
        ppd.networks.MLP(),
        transform=ppd.standardize(data.train),
    )
    prior = ppd.fit(jax.random.key(1), diffusion, data.train, num_steps=4000, progress_bar=False).prior
    estimate = ppd.estimate_log_prob(jax.random.key(2), prior, data.test, num_trajectories=256, progress_bar=False)
    line, seen = jnp.array([0.6, -0.8]), 4.0

    def model(y: Any) -> None:
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x @ line, 1.0), obs=y)

    smc = ppd.SMC(model, num_particles=512, num_chains=8, progress_bar=False)
    smc.run(jax.random.key(3), jnp.array(seen))

    x = prior.sample(jax.random.key(4), (3000,))
    figure = Figure(figsize=(12, 3.9), layout="constrained", dpi=110)
    learned, judged, used = figure.subplots(1, 3)
    learned.scatter(*data.train[:3000].T, s=2, linewidths=0, color="0.7")
    learned.scatter(*x.T, s=2, linewidths=0, color="C0", alpha=0.7)
    learned.set(title="learn: data (grey), draws of the prior (blue)", aspect="equal")
    truth = np.asarray(data.log_prob(data.test))
    judged.errorbar(truth, estimate.value, 2 * estimate.std_error, fmt=".", ms=4, lw=0.6, label="log p ± 2 errors")
    judged.plot(truth, estimate.bound, ".", ms=2.5, color="C1", label="the bound K")
    judged.plot([truth.min(), truth.max()], [truth.min(), truth.max()], "k", lw=0.8)
    judged.set(title="judge: 300 test points", xlabel="true log density (nats)", ylabel="by the model")
    judged.legend(frameon=False)
    used.scatter(*x.T, s=2, linewidths=0, color="0.8")
    used.scatter(*smc.get_samples()["x"].T, s=3, linewidths=0, color="C3", alpha=0.5)
    along = np.array([-15.0, 15.0])
    for offset, style in ((0.0, "-"), (-2.0, ":"), (2.0, ":")):
        used.plot(along, (seen + offset - 0.6 * along) / -0.8, color="k", lw=0.8, ls=style)
    used.set(title=f"use: seen through a noisy line; log Z {smc.log_evidence:.2f} ± {smc.log_evidence_error:.2f}")
    used.set(aspect="equal", xlim=learned.get_xlim(), ylim=learned.get_ylim())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "front.png"
        figure.savefig(path)
        shrink(path, ROOT / "docs" / "figures" / "front.png")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    others: dict[str, Callable[[], None]] = {"front": front}
    for chosen in sys.argv[1:] or [*others, *EXAMPLES]:
        others[chosen]() if chosen in others else example(chosen)
