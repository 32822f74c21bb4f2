"""Two moons: a posterior learned from simulations, beside the exact one; and made exact by weights.

The model is in ``models/simulation.py``. For y = 0 its posterior is known: two crescents of equal weight, and an
evidence of 1/2. *Amortised* draws are those of the conditional diffusion as training left it; *exact* ones are weighed
by the model's own density.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pp_diffusion as ppd
from examples.report import arguments, print_table, save_figure, with_error
from models import simulation as script

Y = jnp.zeros(2)
#: E log p(x | y = 0) of exact draws, nats; by quadrature over the radius (the angle is uniform).
RADII = np.linspace(0.03, 0.17, 20_001)


def exact_mean() -> float:
    """Minus the entropy of the exact posterior."""
    density = np.exp(-0.5 * ((RADII - script.RADIUS) / script.WIDTH) ** 2) / (script.WIDTH * np.sqrt(2 * np.pi))
    log_p = np.log(density) - np.log(RADII * np.pi) - np.log(2)
    return float(np.trapezoid(density * log_p, RADII))


def exact_draws(rng_key: Any, num: int) -> Any:
    """Of the posterior for y = 0."""
    key, side_key = jax.random.split(rng_key)
    point = script.Crescent(jnp.zeros(2)).sample(key, (num,))  # y minus the centre
    sign = jax.random.rademacher(side_key, (num,), float)
    along, across = sign * (0.25 + point[:, 0]) * jnp.sqrt(2), -point[:, 1] * jnp.sqrt(2)
    return jnp.stack([along - across, along + across], -1) / 2


def run(
    *, num_steps: int = 8_000, num_draws: int = 4_000, num_particles: int = 2_000, figures: Path, progress: bool = True
) -> dict[str, Any]:
    """Trains, prints the table, writes the figure.

    :return: the amortised posterior, the sampler, and what the table holds.
    """
    started = time.perf_counter()
    amortized = ppd.amortize(
        jax.random.key(1), script.model, observed="y", num_simulations=None, num_steps=num_steps, progress_bar=progress
    )
    seconds = time.perf_counter() - started
    drawn = amortized.sample(jax.random.key(2), num_draws, y=Y)["x"]
    smc = amortized.smc(num_particles=num_particles)
    smc.run(jax.random.key(3), y=Y)
    weighed = smc.get_samples()["x"][:: max(1, 8 * num_particles // num_draws)]
    truth = exact_draws(jax.random.key(4), num_draws)
    outside = {}
    rows = []
    for name, x in (("amortised", drawn), ("exact by weights", weighed), ("exact draws", truth)):
        log_p = script.exact_log_prob(x, Y)
        inside = np.isfinite(log_p) & (log_p > exact_mean() - 12)
        outside[name] = float(1 - inside.mean())
        right = float((x.sum(-1) > 0).mean())
        rows.append((name, with_error(log_p[inside]), f"{100 * outside[name]:.2f} %", f"{right:.3f}"))
    rows.append(("to be", f"{exact_mean():.3f}", "0", ".500"))
    print_table(
        f"Two moons, y = 0; {num_steps} updates of endless simulations in {seconds:.0f} s",
        ("E log p(x | y), nats", "off both moons", "in the upper one"),
        rows,
    )
    print(
        f"log evidence {smc.log_evidence:.4f} ± {smc.log_evidence_error:.4f} (exact: {np.log(0.5):.4f}); "
        f"{100 * smc.effective_share:.0f} % of the particles are effective: {smc.verdict}"
    )
    panels = {"amortised": drawn, "exact by weights": weighed, "exact draws": truth}
    save_figure(_figure(panels), figures, "simulation.png")
    return {"amortized": amortized, "smc": smc, "outside": outside}


def _figure(panels: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, x) in zip(figure.subplots(1, 3, sharex=True, sharey=True), panels.items(), strict=True):
        axes.scatter(*np.asarray(x).T, s=1, alpha=0.4, linewidths=0)
        axes.set(title=title, xlim=(-0.6, 0.6), ylim=(-0.6, 0.6), aspect="equal")
    figure.suptitle("Two moons: the posterior for y = 0")
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size = {"num_steps": 60, "num_draws": 200, "num_particles": 1_000} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
