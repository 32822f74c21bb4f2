"""ArviZ in its two generations: 0.x (Python 3.11) and 1.x (Python 3.12 and later). Only this file imports it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

NEARLY_EVEN = 0.95  # of the draws are effective: whatever tail there is carries next to nothing
FEWEST_DRAWS = 25  # with fewer, a tail of a fifth of the draws has less than five of them


def import_arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.0 once a day
        import arviz
    return arviz


def is_first_generation(arviz: ModuleType) -> bool:
    return int(arviz.__version__.split(".")[0]) < 1


def pareto_smooth(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto smoothed log weights, on the scale of the raw ones, and the tails' shapes k-hat.

    ArviZ's PSIS but for tails that it cannot fit. Where the largest weights are all equal there is no tail, and k-hat
    is minus infinity; with fewer than five values above the rest it is so too if all weights are nearly even, and
    infinite if they are not, because nothing can be known of the tail.

    :param log_weights: shape ``(draws, N)``.
    :return: of shapes ``(draws, N)`` and ``(N,)``.
    """
    num_draws = len(log_weights)
    smoothed, pareto_k = np.array(log_weights, np.float64), np.full(log_weights.shape[1], np.inf)
    if num_draws < FEWEST_DRAWS:
        return smoothed, pareto_k
    tail_length = math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))
    fit = _fit_first if is_first_generation(import_arviz()) else _fit_second
    for column, weights in enumerate(smoothed.T):
        *_, cutoff = tail = np.sort(weights)[: -tail_length - 2 : -1]
        if tail[0] == tail[-2] > -np.inf:
            pareto_k[column] = -np.inf
        elif np.count_nonzero(weights > cutoff) >= 5:
            smoothed[:, column], pareto_k[column] = fit(weights)
        elif _effective_share(weights) >= NEARLY_EVEN:
            pareto_k[column] = -np.inf
    return smoothed, pareto_k


def _effective_share(log_weights: np.ndarray) -> float:
    """The effective sample size over the number of draws."""
    if np.isneginf(log_weights).all():
        return 0.0
    relative = np.exp(log_weights - log_weights.max())
    return float(relative.mean() ** 2 / (relative**2).mean())


def _fit_first(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    return import_arviz().psislw(log_weights, normalize=False)


def _fit_second(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    from arviz_stats.base import array_stats

    with np.errstate(all="ignore"):  # ties at the cutoff: k-hat is then NaN
        normalised, pareto_k = array_stats.psislw(-log_weights)  # it takes log likelihoods, not log weights
    median = np.argsort(log_weights)[len(log_weights) // 2]  # below the tail: only shifted
    smoothed = normalised + (log_weights[median] - normalised[median])
    if not np.isfinite(pareto_k) or not np.isfinite(log_weights[median]):
        return log_weights, float(pareto_k) if np.isfinite(pareto_k) else math.inf
    return smoothed, float(pareto_k)


def inference_data(groups: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    """xarray datasets by group as an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x)."""
    arviz = import_arviz()
    if is_first_generation(arviz):
        return arviz.InferenceData(attrs=dict(attrs), **groups)
    import xarray

    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **groups})


def elpd_data(log_prob: Any, pareto_k: Any, good_k: float, num_draws: int) -> Any:
    """Pointwise log densities as the ``ELPDData`` that ArviZ's ``plot_khat`` and ``compare`` take.

    :param log_prob: a DataArray, nats.
    :param pareto_k: a DataArray of the same shape.
    """
    arviz = import_arviz()
    count = log_prob.size
    fields: dict[str, Any] = {
        "elpd": float(log_prob.sum()),
        "se": math.sqrt(count * float(np.var(log_prob.values))),
        "p": math.nan,
        "n_samples": num_draws,
        "n_data_points": count,
        "scale": "log",
        "warning": bool((pareto_k > good_k).any()),
        "good_k": good_k,
        "elpd_i": log_prob,
        "pareto_k": pareto_k,
    }
    if is_first_generation(arviz):
        old = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        index = [old.get(name, name) for name in fields]
        return arviz.stats.stats_utils.ELPDData(data=list(fields.values()), index=index)
    if "kind" in inspect.signature(arviz.ELPDData).parameters:  # until 1.2
        fields["kind"] = "log_prob"
    return arviz.ELPDData(**fields)
