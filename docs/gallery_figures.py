"""The figures of docs/gallery.md and README's, made small; they are part of the repository.

``python docs/gallery_figures.py [NAME ...]`` from the checkout's root, after the documentation has been built: most
figures are those of its pages, which do an example's task in a smaller form. ``front`` is README's.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "figures" / "gallery"
WIDTH = 1000


#: Which figure of which built page stands for an example in the gallery, counted from 0.
PAGES = {
    "swiss_roll": ("tutorials/programs", 0),
    "heartbeat": ("tutorials/binary", 0),
    "digits": ("tutorials/images", 0),
    "posterior_digits": ("tutorials/images", 1),
    "regression": ("tutorials/conditional", 0),
    "missing_values": ("tutorials/missing", 0),
    "likelihood": ("tutorials/table", 1),
    "quasi_static": ("guides/likelihood", 0),
    "schedules": ("guides/symbols", 0),
    "composition_bias": ("guides/posteriors", 0),
    "posterior_swiss_roll": ("numpyro_gallery", 0),
    "simulation": ("tutorials/coming_from", 0),
}
#: Examples that no page does in small: run here, with a figure of theirs and these settings.
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "digits_given_label": ("digits_given_label.png", {"num_steps": 1200, "num_draws": 10, "num_test": 20}),
    "spatial_prior": (
        "spatial_prior.png",
        {"num_steps": 2000, "num_data_sets": 6, "num_particles": 128, "num_samples": 150},
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


def page(name: str, built: Path) -> None:
    """Takes a figure out of a page of the built documentation."""
    source, number = PAGES[name]
    text = (built / f"{source}.html").read_text()
    images = re.findall(r'<img[^>]*src="([^"]*_images/[0-9a-f]{32,}\.png)"', text)  # those of a notebook's outputs
    shrink((built / source).parent / images[number], FOLDER / f"{name}.png")


def example(name: str) -> None:
    """Runs one, and keeps its figure."""
    figure, settings = EXAMPLES[name]
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module(f"examples.{name}").run(**settings, figures=Path(folder), progress=False)
        shrink(Path(folder) / figure, FOLDER / f"{name}.png")


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
    for chosen in sys.argv[1:] or ["front", *EXAMPLES, *PAGES]:
        if chosen in PAGES:
            page(chosen, ROOT / "docs" / "_build")
        else:
            front() if chosen == "front" else example(chosen)
