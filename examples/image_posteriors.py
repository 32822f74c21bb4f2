"""The paper's posteriors of images, by SMC: photographs denoised, digits completed, a hole in bark filled.

    python -m examples.image_posteriors TASK --prior FILE --data DIR [--small]

TASK is ``denoise`` (CIFAR-10 under noise of the data's own variance), ``digits`` (MNIST, the lower halves unseen) or
``hole`` (photographs of bark, 100 × 100 pixels unseen; the prior's network has to be convolutional, and is run on a
larger image than it was trained on). FILE is what ``--prior`` of the example of that name wrote.

What is exact, and what is not: particles and weights are those of SMC, so that more particles lead to the posterior
under the trained prior. With a thousand coordinates and more, few particles stay far from it: the effective sample
size and the verdict say how far. A hole's known pixels are seen through noise of two levels; the prior of the larger
image is another model than that of the patches, and what it says beyond their size is an extrapolation.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pp_diffusion as ppd
from examples.report import interval, save_figure


class Found(NamedTuple):
    """What came of it.

    :ivar draws: of the posterior, shape ``(draws, images, *event_shape)``, in levels.
    :ivar text: the figures, in words.
    :ivar note: how far to believe them.
    :ivar figure: the draws.
    """

    draws: np.ndarray
    text: str
    note: str
    figure: Any


def model(prior: ppd.DiffusionPrior, noise: Any, seen: Any, y: Any) -> None:
    """Pixels through normal noise, where they are seen."""
    with numpyro.plate("images", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).mask(seen).to_event(len(prior.event_shape)), obs=y)


def twist(prior: ppd.DiffusionPrior, noise: float, seen: Any, y: Any) -> Callable[..., jax.Array]:
    """Each pixel given x_t as a normal variable with the mean and the variance that the reverse step gives.

    Tweedie's covariance of all pixels would be better, and cost a product with the Jacobian for each of them.
    """
    scale, axes = float(prior.transform.scale), tuple(range(-len(prior.event_shape), 0))  # type: ignore[union-attr]

    def log_twist(prediction: Any, log_r: Callable[..., jax.Array]) -> jax.Array:
        sd = jnp.sqrt(noise**2 + scale**2 * prediction.variance)
        log_prob = dist.Normal(prior.transform(prediction.x_0), sd).log_prob(y)
        return jnp.where(seen, log_prob, 0.0).sum(axes)

    return log_twist


def infer(
    rng_key: jax.Array,
    prior: ppd.DiffusionPrior,
    x: Any,
    noise: float,
    seen: Any,
    *,
    num_particles: int,
    num_chains: int,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Adds the noise, and infers all images in one run: what was seen, the draws, and how far to believe them."""
    y_key, run_key = jax.random.split(rng_key)
    y = jnp.asarray(x) + noise * jax.random.normal(y_key, np.shape(x))
    seen = jnp.broadcast_to(jnp.asarray(seen), prior.event_shape)
    smc = ppd.SMC(
        model,
        num_particles=num_particles,
        num_chains=num_chains,
        twist=twist(prior, noise, seen, y),
        plain_share=0.0,
        progress_bar=progress,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppd.CollapseWarning)  # the note says it
        smc.run(run_key, prior, noise, seen, y)
    draws = np.asarray(smc.get_samples()["x"], np.float64)
    verdicts = [str(name) for name in np.ravel(smc.verdict)]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts))
    final = np.asarray(smc.ess)[-1]
    note = (
        f"{num_chains} × {num_particles} particles, T = {prior.num_timesteps}; final ESS {final.min():.1f}…"
        f"{final.max():.1f} of {num_particles}; verdicts: {counts}"
    )
    return np.where(np.asarray(seen), np.asarray(y), np.nan), draws, note


def scores(draws: np.ndarray, x: np.ndarray, asked: np.ndarray) -> str:
    """Of the asked pixels: the error of the mean, and how many the 90 % intervals cover."""
    low, high = interval(draws, 0.9)
    covered = ((low <= x) & (x <= high))[:, asked].mean()
    rmse = np.sqrt(((draws.mean(0) - x)[:, asked] ** 2).mean())
    return f"RMSE of the mean {rmse:.1f} levels, {100 * covered:.0f} % covered by 90 % intervals"


# --- the tasks -----------------------------------------------------------------------------------------------------


def denoise(
    rng_key: jax.Array, prior: ppd.DiffusionPrior, levels: Any, *, num_images: int = 6, progress: bool, **sizes: int
) -> Found:
    """Photographs under noise of the variance that the model's space has."""
    x = np.asarray(levels[:num_images], np.float64) + 0.5
    noise, asked = float(prior.transform.scale), np.ones(prior.event_shape, bool)  # type: ignore[union-attr]
    prior = prior.shortened(sizes.pop("num_timesteps"))
    seen, draws, note = infer(rng_key, prior, x, noise, True, **sizes, progress=progress)
    shrunk = (seen + float(prior.transform.loc)) / 2  # the posterior's mean if pixels were independent, N(0, 1)
    rmse = np.sqrt(((shrunk - x) ** 2).mean())
    text = f"{scores(draws, x, asked)}; noise {noise:.0f}, half of what is seen {rmse:.1f}"
    return Found(draws, text, note, _rows(x, seen, draws, "CIFAR-10 under noise of variance 1, by SMC"))


def digits(
    rng_key: jax.Array, prior: ppd.DiffusionPrior, levels: Any, *, num_images: int = 10, progress: bool, **sizes: int
) -> Found:
    """Digits of which the upper half is seen."""
    x = np.asarray(levels[:num_images], np.float64) + 0.5
    upper = (np.arange(28) < 14)[:, None] & np.ones(28, bool)
    prior = prior.shortened(sizes.pop("num_timesteps"))
    seen, draws, note = infer(rng_key, prior, x, 8.0, upper, **sizes, progress=progress)
    return Found(draws, scores(draws, x, ~upper), note, _rows(x, seen, draws, "MNIST, lower halves unseen, by SMC"))


def hole(
    rng_key: jax.Array,
    prior: ppd.DiffusionPrior,
    photographs: Any,
    *,
    size: int = 192,
    hole: int = 100,
    num_images: int = 2,
    progress: bool,
    **sizes: int,
) -> Found:
    """Photographs with a hole, by a prior of patches that is run on the whole."""
    corner = (np.array(photographs.shape[1:3]) - size) // 2
    window = photographs[:num_images, corner[0] : corner[0] + size, corner[1] : corner[1] + size]
    x = np.asarray(window, np.float64) + 0.5
    inside = np.abs(np.arange(size) - (size - 1) / 2) < hole / 2
    known = ~(inside[:, None] & inside)
    whole = resized(prior, (size, size)).shortened(sizes.pop("num_timesteps"))
    draws, seen, notes = [], [], []
    for i in range(len(x)):  # one at a time: memory
        one_seen, one, note = infer(
            jax.random.fold_in(rng_key, i), whole, x[i : i + 1], 2.0, known, **sizes, progress=progress
        )
        draws.append(one)
        seen.append(one_seen)
        notes.append(note)
    draws, seen = np.concatenate(draws, 1), np.concatenate(seen)
    title = f"Bark with a hole of {hole} × {hole} pixels, by SMC"
    return Found(draws, scores(draws, x, ~known), "; ".join(notes), _rows(x, seen, draws, title, cell=2.2))


def resized(prior: ppd.DiffusionPrior, shape: tuple[int, ...]) -> ppd.DiffusionPrior:
    """The same network and weights over images of another size: a model of its own.

    :raises ValueError: if the network is not convolutional.
    """
    process = prior.process.replace(kernel=ppd.GaussianKernel(shape))
    return ppd.DiffusionPrior(process, prior.transform)


def _rows(x: np.ndarray, seen: np.ndarray, draws: np.ndarray, title: str, cell: float = 0.9) -> Any:
    """True images, what is seen of them, the mean of the draws, their standard deviation, and three of them."""
    from matplotlib.figure import Figure

    third = max(len(draws) // 3, 1)
    sd = draws.std(0)
    rows = {
        "true": x,
        "seen": seen,
        "mean": draws.mean(0),
        "sd": sd if sd.ndim == 3 else sd.mean(-1),
        **{f"draw {i + 1}": draws[min(i * third, len(draws) - 1)] for i in range(3)},
    }
    figure = Figure(figsize=(cell * len(x) + 0.5, cell * len(rows) + 0.5), layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), len(x), squeeze=False)
    top = float(np.quantile(rows["sd"], 0.99)) or 1.0
    for (label, images), line in zip(rows.items(), axes, strict=True):
        for axis, image in zip(line, images, strict=True):
            if label == "sd":
                axis.imshow(image, cmap="magma", vmin=0, vmax=top)
            else:
                axis.imshow(np.clip(image / 256, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[], facecolor="lightsteelblue")  # behind what was not seen
        line[0].set_ylabel(label, fontsize=8)
    figure.suptitle(f"{title} (sd from black, 0, to white, {top:.0f} levels)", fontsize=8)
    return figure


class Task(NamedTuple):
    """One of the paper's.

    :ivar title: in words.
    :ivar run: ``(rng_key, prior, data, **sizes, progress=...) -> Found``.
    """

    title: str
    run: Callable[..., Found]


TASKS = {
    "denoise": Task("CIFAR-10 under noise of variance 1", denoise),
    "digits": Task("MNIST, lower halves unseen", digits),
    "hole": Task("bark with a hole of 100 × 100", hole),
}
LARGE: dict[str, dict[str, Any]] = {
    "denoise": {"num_images": 8, "num_particles": 32, "num_chains": 8, "num_timesteps": 250},
    "digits": {"num_images": 10, "num_particles": 64, "num_chains": 8, "num_timesteps": 250},
    "hole": {"num_images": 3, "num_particles": 8, "num_chains": 2, "num_timesteps": 250, "size": 192},
}
ON_CPU: dict[str, dict[str, Any]] = {
    "denoise": {"num_images": 4, "num_particles": 8, "num_chains": 2, "num_timesteps": 100},
    "digits": {"num_images": 6, "num_particles": 16, "num_chains": 2, "num_timesteps": 100},
    "hole": {"num_images": 1, "num_particles": 2, "num_chains": 2, "num_timesteps": 100, "size": 160},
}
SMALL: dict[str, dict[str, Any]] = {
    "denoise": {"num_images": 2, "num_particles": 4, "num_chains": 1, "num_timesteps": 4},
    "digits": {"num_images": 2, "num_particles": 4, "num_chains": 1, "num_timesteps": 4},
    "hole": {"num_images": 1, "num_particles": 2, "num_chains": 1, "num_timesteps": 4, "size": 32, "hole": 10},
}


def load(task: str, folder: Path) -> Any:
    """Test images, levels."""
    if task == "denoise":
        return ppd.datasets.cifar10(folder, num_batches=1).test
    if task == "digits":
        return ppd.datasets.mnist(folder).test
    return ppd.datasets.image_folder(folder, grey=True).test


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--prior", type=Path, required=True, help="the trained diffusion")
    parser.add_argument("--data", type=Path, required=True, help="folder of its data")
    parser.add_argument("--small", action="store_true", help="few particles and steps, to see that it runs")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder for the figure")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    args = parser.parse_args()
    task = TASKS[args.task]
    sizes = SMALL if args.small else ON_CPU if jax.default_backend() == "cpu" else LARGE
    found = task.run(
        jax.random.key(0), ppd.load(args.prior), load(args.task, args.data), **sizes[args.task], progress=args.progress
    )
    print(f"{task.title}: {found.text}\n{found.note}")
    save_figure(found.figure, args.figures, f"posterior_{args.task}.png")


if __name__ == "__main__":
    main()
