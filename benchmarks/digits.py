"""Digits: bits/dim of code length on the test images, of ours (as a chain and as a flow), a spline flow and a mixture.

All model the same space, in which each block of levels is a bump, and all see fresh or repeated noise on the levels.
What theirs leave open is chosen on the last 240 training images; then they are fitted to all. Differences are paired:
over the same test images with the same noise. Run alone: ``python -m benchmarks --only digits``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import pp_diffusion as ppd
from benchmarks.timing import Row, Sides, Spread, not_run, seconds
from examples import digits
from examples.report import with_error
from models import digits as script
from pp_diffusion.likelihood import BELIEVABLE, BOUND_ONLY, DOUBTFUL
from pp_diffusion.transforms import log_abs_det

NUM_VALIDATION = 240
Density = Callable[[Array], Any]  # log densities of images, in data units


class Trained(NamedTuple):
    """A density that was trained; ``seconds`` without choosing its settings."""

    what: str
    seconds: float
    log_prob: Density


def rows(small: bool) -> list[Row]:
    """K and log p of ours, then one row for each of the others."""
    data = ppd.datasets.digits(jax.random.key(0), num_test=360)
    test = ppd.datasets.dequantize(jax.random.key(1), data.test)[: 6 if small else None]
    train = data.train[: 2 * NUM_VALIDATION if small else None]
    updates, num_trajectories = (5, 25) if small else (2_500, 128)
    fit, ours = digits.train(data, updates, progress=False)
    bound = code_length(ppd.lower_bound(jax.random.key(4), fit.prior, test, num_samples=1 if small else 4).value)
    estimate = ppd.estimate_log_prob(jax.random.key(5), fit.prior, test, num_trajectories)
    exact = code_length(estimate.value)
    verdicts = ", ".join(f"{np.mean(estimate.verdict == v):.0%} {v}" for v in (BELIEVABLE, DOUBTFUL, BOUND_ONLY))
    table = [
        Row(f"digits: ours by K, {updates} updates", note=f"{with_error(bound, 4)} bits/dim, {ours:.3g} s"),
        Row(
            f"digits: ours by log p, {num_trajectories} trajectories",
            note=f"{with_error(exact, 4)} bits/dim, by K {with_error(bound - exact, 4)} more; {verdicts}",
        ),
    ]
    table.append(of_flow(fit, test, bound))
    for name, train_best in (("masked autoregressive spline flow", best_flow), ("mixture of Gaussians", best_mixture)):
        try:
            theirs = train_best(train, small)
        except ImportError:
            table.append(not_run(f"digits: ours / {name}", "flowjax is not installed"))
            continue
        length = code_length(theirs.log_prob(test))
        table.append(
            Row(
                f"digits: ours / {name}, {theirs.what}",
                Sides(ours, theirs.seconds),
                Spread(*(ours / theirs.seconds,) * 3),
                note=f"{with_error(length, 4)} bits/dim, more than ours by {with_error(length - bound, 4)} (K), "
                f"{with_error(length - exact, 4)} (log p)",
            )
        )
    return table


def of_flow(fit: ppd.FitResult, test: Array, bound: np.ndarray) -> Row:
    """The same network as a flow, with the exact trace over 64 pixels."""
    flow = fit.diffusion.flow(fit.params)
    values: list[np.ndarray] = []
    took = seconds(lambda: values.extend(np.asarray(flow.log_prob(x)) for x in jnp.array_split(test, len(test) // 6)))
    length, error = code_length(np.concatenate(values)), flow.check(jax.random.key(11), num=6).error
    note = f"{with_error(length, 4)} bits/dim, by K {with_error(bound - length, 4)} more; "
    return Row(
        "digits: ours as a flow", note=f"{note}solver's error {error / 64 / np.log(2):.1g} bits/dim; {took:.3g} s"
    )


def code_length(log_prob: Any) -> np.ndarray:
    """Bits/dim per image."""
    return np.asarray(ppd.units.bits_per_dim(np.asarray(log_prob, np.float64), num_dims=64))


def best(levels: Array, candidates: list[Any], train: Callable[[Array, Any], Trained]) -> Trained:
    """The candidate of the shortest code on the held-out training images, trained anew on all."""
    held_out = ppd.datasets.dequantize(jax.random.key(6), levels[-NUM_VALIDATION:])
    lengths = [float(code_length(train(levels[:-NUM_VALIDATION], c).log_prob(held_out)).mean()) for c in candidates]
    return train(levels, candidates[int(np.argmin(lengths))])


# --- a flow ------------------------------------------------------------------------------------------------------


def best_flow(levels: Array, small: bool) -> Trained:
    """By the number of updates, each with a learning rate that decays to its end."""
    import flowjax  # noqa: F401

    return best(levels, [2] if small else [2_000, 4_000], partial(train_flow, small=small))


def train_flow(levels: Array, updates: int, *, small: bool) -> Trained:
    """Three layers of width 64; weight decay and shifts are stronger than ours, as it needs."""
    import equinox as eqx
    import paramax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    z = script.transform.inv(ppd.datasets.dequantize(jax.random.key(7), levels))
    loc, scale = z.mean(0), jnp.sqrt(z.var(0) + 0.25)  # some pixels hardly vary

    def standardized(x: Array) -> Array:
        return ((script.transform.inv(x) - loc) / scale).reshape(len(x), -1)

    flow = masked_autoregressive_flow(
        jax.random.key(8),
        base_dist=Normal(jnp.zeros(loc.size)),
        transformer=RationalQuadraticSpline(knots=8, interval=5),
        flow_layers=1 if small else 3,
        nn_width=64,
        nn_depth=1,
    )
    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable))
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, updates // 20, updates)
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(rate, weight_decay=1.0))

    def log_density(params: Any, x: Array) -> Array:
        return paramax.unwrap(eqx.combine(params, static)).log_prob(standardized(x))

    def update(state: Any, key: Array) -> tuple[Any, None]:
        params, moments = state
        x = script.batch(key, levels, shifted=0.5)
        gradient = jax.grad(lambda p: -log_density(p, x).mean())(params)
        change, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, change), moments), None

    state, keys = (params, optimizer.init(params)), jax.random.split(jax.random.key(9), (updates // 2, 2))
    pair = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0])
    pair(state, keys[0])  # compiles

    def train() -> Any:
        nonlocal state
        for two in keys:
            state = pair(state, two)
        return state

    took, trained = seconds(train), jax.jit(partial(log_density, state[0]))
    return Trained(f"{updates} updates", took, lambda x: trained(x) - jnp.log(scale).sum() - jacobian(x))


# --- a mixture ---------------------------------------------------------------------------------------------------


def best_mixture(levels: Array, small: bool) -> Trained:
    """By the kind of covariance, the number of components and what is added to the variances."""
    candidates = [(kind, k, extra) for kind in ("full", "diag") for k in (5, 10, 20, 50) for extra in (0.01, 0.03, 0.1)]
    candidates += [("tied", k, 1e-3) for k in (20, 60, 100)]
    return best(levels, [("diag", 5, 0.1)] if small else candidates, train_mixture)


def train_mixture(levels: Array, candidate: tuple[str, int, float]) -> Trained:
    """scikit-learn's, by EM on five copies of the images with noise of their own."""
    from sklearn.mixture import GaussianMixture

    kind, components, extra = candidate
    copies = [ppd.datasets.dequantize(key, levels) for key in jax.random.split(jax.random.key(10), 5)]

    def rows(x: Array) -> np.ndarray:
        return np.asarray(script.transform.inv(x), np.float64).reshape(len(x), -1)

    mixture = GaussianMixture(components, covariance_type=kind, reg_covar=extra, max_iter=60, tol=1e-2, random_state=0)
    z = rows(jnp.concatenate(copies))
    took = seconds(lambda: mixture.fit(z).means_)
    what = f"{components} components, {kind}, variances + {extra}"
    return Trained(what, took, lambda x: mixture.score_samples(rows(x)) - jacobian(x))


def jacobian(x: Array) -> np.ndarray:
    """log |dx/dz| per image."""
    return np.asarray(log_abs_det(script.transform, script.transform.inv(x), x, 2))
