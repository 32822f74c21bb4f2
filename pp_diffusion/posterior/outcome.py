"""What the outcomes of all runs of particles have: evidences, verdicts, and words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.posterior.verdicts import (
    BELIEVABLE,
    COLLAPSED,
    DOUBTFUL,
    FEWEST_CHAINS,
    CollapseWarning,
    Findings,
    Verdict,
    evidence_error,
    judge,
)
from pp_diffusion.units import nats_to_bits


class Outcome:
    """Evidences of chains, and whether they can be believed.

    :param findings: what they are judged by.
    :param systems: the shape of the plates whose elements are independent systems; ``()`` is one system.
    """

    def __init__(self, findings: Findings, systems: tuple[int, ...] = ()) -> None:
        self.findings = findings
        self.num_particles, self.num_chains = findings.num_particles, findings.num_chains
        self.shape = (self.num_chains, *systems)
        self.log_evidences = findings.log_evidences.reshape(self.shape)

    @property
    def advice(self) -> str:
        """What to do where it collapsed."""
        return "take more particles"

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each system."""
        return judge(self.findings)

    @property
    def log_evidence(self) -> np.ndarray:
        """Per system, the log of the mean of the chains' estimates."""
        return np.asarray(np.logaddexp.reduce(self.log_evidences, axis=0) - math.log(self.num_chains))

    @property
    def log_evidence_error(self) -> np.ndarray:
        """Per system; NaN with fewer than eight chains, and where a system collapsed."""
        error = np.where(self.verdict.ravel() == COLLAPSED, np.nan, evidence_error(self.findings))
        return np.asarray(error.reshape(self.shape[1:]))

    @property
    def verdict(self) -> np.ndarray:
        """Per system: ``"believable"``, ``"doubtful"`` or ``"collapsed"``."""
        return np.array([verdict.name for verdict in self.verdicts]).reshape(self.shape[1:])

    @property
    def dead_chains(self) -> list[int]:
        """Those with a system whose particles all have likelihood zero."""
        dead = np.isneginf(self.log_evidences).reshape(self.num_chains, -1).any(1)
        return np.flatnonzero(dead).tolist()

    def warn(self) -> None:
        """Says which systems collapsed, and what to do."""
        if complaint := self._complaint_in_words(COLLAPSED):
            warnings.warn(
                f"SMC collapsed {complaint}. Neither these draws nor their evidence can be believed: {self.advice}",
                CollapseWarning,
                stacklevel=3,
            )

    def evidence_in_words(self) -> str:
        """The evidence of all systems, with its error."""
        value, error = np.sum(self.log_evidence), np.sqrt(np.sum(np.square(self.log_evidence_error)))
        unknown = f"it needs {FEWEST_CHAINS} chains" if self.num_chains < FEWEST_CHAINS else "particles collapsed"
        spread = f"error unknown: {unknown}" if np.isnan(error) else f"± {error:.4f}"
        systems = self.log_evidence.size
        whole = f" in all of {systems} systems" if systems > 1 else ""
        return f"log evidence{whole}: {value:.4f} nats ({nats_to_bits(value):.4f} bits), {spread}"

    def verdict_in_words(self) -> str:
        """The verdicts, with what speaks against believing."""
        complaints = [self._complaint_in_words(name) for name in (COLLAPSED, DOUBTFUL)]
        found = [f"{name} {words}" for name, words in zip(("COLLAPSED", "doubtful"), complaints, strict=True) if words]
        if not found:
            return BELIEVABLE
        rest = int(np.sum(self.verdict == BELIEVABLE))
        others = f"; the other {rest} systems are believable" if rest else ""
        return "; ".join(found) + others

    def _complaint_in_words(self, name: str) -> str:
        """Which systems have this verdict, and why the first one has; empty for none."""
        which = [s for s, verdict in enumerate(self.verdicts) if verdict.name == name]
        if not which:
            return ""
        reasons = ", and ".join(self.verdicts[which[0]].reasons)
        if len(self.verdicts) == 1:
            return f"({reasons})"
        named = ", ".join(str(tuple(map(int, np.unravel_index(s, self.shape[1:])))) for s in which[:8])
        more = f" and {len(which) - 8} more" if len(which) > 8 else ""
        return f"in {len(which)} of {len(self.verdicts)} systems, {named}{more} (of the first: {reasons})"


def print_moments(samples: Mapping[str, Any], max_rows: int) -> None:
    """Prints moments and quantiles of the first ``max_rows`` numbers.

    :param samples: draws of equal weights over the first axis.
    """
    rows = []
    for name, values in samples.items():
        shape = values.shape[1:]
        columns = np.asarray(values, np.float64).reshape(len(values), -1).T
        for i, column in enumerate(columns[: max_rows + 1]):
            label = name + (str(list(map(int, np.unravel_index(i, shape)))).replace(" ", "") if shape else "")
            low, median, high = np.quantile(column, [0.05, 0.5, 0.95])
            rows.append((label, column.mean(), column.std(), median, low, high))
    total = sum(math.prod(values.shape[1:]) for values in samples.values())
    print(f"{'':>16}" + "".join(f"{n:>10}" for n in ("mean", "std", "median", "5.0%", "95.0%")))
    for label, *numbers in rows[:max_rows]:
        print(f"{label:>16}" + "".join(f"{number:>10.3f}" for number in numbers))
    if total > max_rows:
        print(f"{'':>4}(the first {max_rows} of {total} numbers)")


def dataset(
    variables: Mapping[str, Any], leading: list[str], *, dims: Mapping[str, list[str]], coords: Mapping[str, Any]
) -> Any:
    """An xarray dataset of arrays whose first axes are ``leading``.

    :param dims: names of the other axes of a variable.
    :param coords: coordinates by the names of axes.
    """
    import xarray

    out = {}
    for name, value in variables.items():
        value = np.asarray(value)
        rest = dims.get(name, [f"{name}_dim_{i}" for i in range(value.ndim - len(leading))])
        out[name] = ([*leading, *rest], value)
    found = xarray.Dataset(out)
    index = {d: np.arange(size) for d, size in found.sizes.items()}
    return found.assign_coords(index | {d: c for d, c in coords.items() if d in found.sizes})


@jax.jit
def independent_draws(draws: Array) -> Array:
    """Per system, how many independent draws each chain is worth, by the spread of the chains' means.

    :param draws: of shape ``(P, C, S, n)``; C is at least 2.
    """
    between, within = draws.mean(0).var(0, ddof=1), draws.var(0).mean(0)
    total = within + between
    varies = total > (1e-5 * draws.mean((0, 1))) ** 2 + jnp.finfo(total.dtype).tiny  # more than by rounding
    share = jnp.where(varies, between / jnp.where(varies, total, 1.0), 0.0).sum(-1) / jnp.maximum(varies.sum(-1), 1)
    return 1 / jnp.maximum(share, 1e-9)
