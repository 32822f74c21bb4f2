"""Swiss roll: bits of gap to the exact density against seconds, ours and flowjax's masked autoregressive spline flow.

Same data, same test points, same run. Ours is the gap of a bound K, the flow's that of its exact log p.
Run alone: ``python -m benchmarks --only flow [--fresh] [--figures DIR]``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import pp_diffusion as ppd
from benchmarks.setting import BATCH, diffusion, swiss_roll
from benchmarks.timing import Row, Sides, Spread, not_run, seconds
from examples import gap
from examples.swiss_roll import fresh_points
from pp_diffusion.datasets.swiss_roll import sample_swiss_roll


class Trained(NamedTuple):
    """A density that was trained.

    :ivar gap: bits below the exact log density, the mean over test points; ``error`` is its standard error.
    :ivar seconds: of training, without ``compile``.
    """

    what: str
    seconds: float
    compile: float
    gap: float
    error: float


def rows(small: bool, *, fresh: bool = False, figures: Path | None = None) -> list[Row]:
    """The flow's rows, and one per length of our training, each against the flow that came closest.

    :param fresh: both learn from endless fresh points instead of the same 50 000 over and over.
    """
    try:
        import flowjax  # noqa: F401
    except ImportError:
        return [not_run("swiss roll: ours / masked autoregressive spline flow", "flowjax is not installed")]
    data, num_timesteps = swiss_roll(small), 20 if small else 1000
    lengths_of_flow = (1,) if small else (3, 10, 30)
    theirs = [
        train_flow(data, epochs, small, fresh, decay=decay) for decay in (False, True) for epochs in lengths_of_flow
    ]
    lengths = (20,) if small else (3_000, 10_000, 40_000)
    last_steps: tuple[Literal["kernel", "network"], ...] = ("network",) if small else ("kernel", "network")
    ours = {
        last_step: [train_ours(data, num_timesteps, last_step, updates, fresh) for updates in lengths]
        for last_step in last_steps
    }
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        curves = {f"ours, last step by the {step}: K": curve for step, curve in ours.items()}
        half = len(theirs) // 2
        curves |= {
            "spline flow, constant rate: log p": theirs[:half],
            "spline flow, decaying rate: log p": theirs[half:],
        }
        draw(curves).savefig(figures / "gap_against_seconds.png")
    points = "fresh points" if fresh else f"{len(data.train)} points"
    flow = min(theirs, key=lambda one: one.gap)
    flows = [
        Row(f"swiss roll, {points}: {one.what}", note=f"{one.seconds:.3g} s, gap {one.gap:.4f} ± {one.error:.4f} bits")
        for one in theirs
    ]
    return flows + [
        Row(
            f"swiss roll, {points}: {one.what} / {flow.what}",
            Sides(one.seconds, flow.seconds),
            Spread(*(one.seconds / flow.seconds,) * 3),
            Sides(one.compile, flow.compile),
            note=f"gap {one.gap:.4f} ± {one.error:.4f} / {flow.gap:.4f} ± {flow.error:.4f} bits",
        )
        for curve in ours.values()
        for one in curve
    ]


def train_ours(
    data: ppd.datasets.Dataset, num_timesteps: int, last_step: Literal["kernel", "network"], updates: int, fresh: bool
) -> Trained:
    """Ours, after so many updates."""
    program = diffusion(num_timesteps, data.train, last_step=last_step)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(500, updates // 2), updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    source = fresh_points if fresh else data.train
    fit = partial(ppd.fit, jax.random.key(1), program, source, batch_size=BATCH, num_times=2, optimizer=optimizer)
    fit = partial(fit, val_prop=0.0)
    compiling = seconds(lambda: fit(num_steps=1, progress_bar=False).state)
    results: list[ppd.FitResult] = []
    training = seconds(lambda: results.append(fit(num_steps=updates, progress_bar=False)))
    bound = ppd.lower_bound(jax.random.key(2), results[0].prior, data.test, num_samples=2)
    what = f"T = {num_timesteps}, last step by the {last_step}, {updates} updates"
    return Trained(what, training, compiling, *gap.paired(data, bound.value))


def train_flow(data: ppd.datasets.Dataset, epochs: int, small: bool, fresh: bool, *, decay: bool) -> Trained:
    """The flow, after so many passes over the data; with fresh points, one pass over as many times more.

    :param decay: a learning rate with warm-up and cosine decay, as ours has, in place of a constant one.
    """
    import equinox as eqx
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data
    from flowjax.train.losses import MaximumLikelihoodLoss

    units = ppd.standardize(data.train)
    num_train = len(data.train)
    z = units._inverse(sample_swiss_roll(jax.random.key(5), num_train * epochs) if fresh else data.train)
    flow = masked_autoregressive_flow(
        jax.random.key(3),
        base_dist=Normal(jnp.zeros(2)),
        transformer=RationalQuadraticSpline(knots=8, interval=4),
        flow_layers=2 if small else 8,
        nn_width=64,
        nn_depth=2,
    )
    # one optimiser and one loss, so that the first pass compiles for all
    updates = max(num_train * epochs // BATCH, 4)
    rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, updates // 20, updates) if decay else 2e-3
    settings: dict[str, Any] = {"optimizer": optax.adam(rate), "loss_fn": MaximumLikelihoodLoss()}
    settings |= {"batch_size": BATCH, "max_patience": 100, "val_prop": 0.02, "show_progress": False}
    fit = partial(fit_to_data, jax.random.key(4), flow, **settings)
    first = seconds(lambda: fit(z[:num_train], max_epochs=1)[1]["train"])
    results: list[Any] = []
    training = seconds(lambda: results.append(fit(z, max_epochs=1 if fresh else epochs)[0]))
    log_prob = eqx.filter_jit(results[0].log_prob)(units._inverse(data.test)) - jnp.sum(jnp.log(units.scale))
    what = f"spline flow, {num_train * epochs} points" if fresh else f"spline flow, {epochs} epoch{'s' * (epochs > 1)}"
    what += ", decaying rate" if decay else ""
    return Trained(what, training, max(first - training / epochs, 0), *gap.paired(data, log_prob))


def draw(curves: dict[str, list[Trained]]) -> Figure:
    """Bits of gap against seconds of training."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        gaps, errors = [one.gap for one in curve], [one.error for one in curve]
        axes.errorbar([one.seconds for one in curve], gaps, errors, marker="o", capsize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="seconds of training", ylabel="bits below the exact log density")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    return figure
