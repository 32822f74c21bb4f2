"""Draws of a trained swiss roll by few network calls: shorter chains, and the flow by samplers and solvers.

Quality is the sliced Wasserstein distance to the exact law; its noise is that of as many exact draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

import pp_diffusion as ppd
from benchmarks.setting import trained_swiss_roll
from benchmarks.timing import Row, Sides, Spread, seconds
from pp_diffusion import solvers
from pp_diffusion.datasets.swiss_roll import sample_swiss_roll

NUM, REPEATS = 1000, 20
DIRECTIONS = 64

Draw = Callable[[Array, tuple[int, ...]], Array]


def ways(prior: ppd.DiffusionPrior, small: bool) -> Iterator[tuple[str, int, Draw]]:
    """Name, network calls and draws of each."""
    lengths = (10,) if small else (100, 40, 20, 10)
    for length in lengths:
        yield f"the chain, num_timesteps={length}", length, prior.shortened(length).sample
    samplers = [solvers.Multistep(calls, order) for order in (1, 2) for calls in ((8,) if small else (40, 20, 15, 10))]
    steps = [("MIDPOINT", 9), ("RALSTON3", 5), ("RALSTON3", 4)]
    flows: list[tuple[str, dict[str, Any]]] = [
        (f"flow, Multistep({s.num_calls}, {s.order})", {"sampler": s}) for s in samplers
    ]
    flows += [
        (f"flow, solvers.{n}, {k} steps", {"solver": getattr(solvers, n), "num_steps": k})
        for n, k in steps[: 1 if small else 3]
    ]
    for name, settings in [*flows, ("flow, default", {})]:
        flow = ppd.DiffusionFlow(prior, **settings)
        yield name, flow.num_calls, flow.sample


def rows(small: bool) -> list[Row]:
    """A row for each way, against the whole chain."""
    prior = trained_swiss_roll(small)
    num, repeats = (50, 2) if small else (NUM, REPEATS)
    measure = Distance(400 if small else 400_000)
    whole = measure.of(prior.sample, num, repeats)
    exact = measure.of(lambda key, shape: sample_swiss_roll(key, *shape), num, repeats)
    slowest = fastest(prior.sample, num)
    table = [
        Row(f"exact draws, {repeats} × {num}", note=in_words(exact)),
        Row(f"the chain, T = {prior.num_timesteps}", Sides(slowest, slowest), Spread(1, 1, 1), note=in_words(whole)),
    ]
    for name, calls, draw in ways(prior, small):
        took, found = fastest(draw, num), measure.of(draw, num, repeats)
        more = found[0] - whole[0]
        error = more.std(ddof=1) / repeats**0.5
        note = (
            f"{calls} calls; {in_words(found)}; more than T = {prior.num_timesteps} by {more.mean():.3f} ± {error:.3f}"
        )
        table.append(
            Row(f"{num} draws by {name} / the chain", Sides(took, slowest), Spread(*(took / slowest,) * 3), note=note)
        )
    return table


def in_words(found: tuple[np.ndarray, float]) -> str:
    each, all_ = found
    return f"distance {each.mean():.3f} ± {each.std(ddof=1) / len(each) ** 0.5:.3f}, of all draws together {all_:.3f}"


def fastest(draw: Draw, num: int) -> float:
    """Seconds of a call after compilation, the least of three."""
    draw(jax.random.key(0), (num,))
    return min(seconds(lambda i=i: draw(jax.random.key(i), (num,))) for i in range(3))


class Distance:
    """The sliced Wasserstein distance of order 2 to the exact law, known by very many draws of it."""

    def __init__(self, num: int) -> None:
        angles = (np.arange(DIRECTIONS) + 0.5) * np.pi / DIRECTIONS
        self.directions = np.stack([np.cos(angles), np.sin(angles)])
        exact = np.asarray(sample_swiss_roll(jax.random.key(1_000), num), np.float64)
        self.sorted = np.sort(exact @ self.directions, 0)

    def __call__(self, x: Any) -> float:
        mine = np.sort(np.asarray(x, np.float64) @ self.directions, 0)
        middle = ((np.arange(len(mine)) + 0.5) * (len(self.sorted) / len(mine))).astype(int)
        return float(np.sqrt(np.mean((mine - self.sorted[middle]) ** 2)))

    def of(self, draw: Draw, num: int, repeats: int) -> tuple[np.ndarray, float]:
        """Of each of so many sets of draws, and of all together; the keys are the same for all."""
        x = np.stack([np.asarray(draw(jax.random.key(100 + i), (num,))) for i in range(repeats)])
        return np.array([self(one) for one in x]), self(x.reshape(-1, 2))
