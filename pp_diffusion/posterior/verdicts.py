"""Whether a run can be believed, system by system, judged by what went wrong with the answer and not by one thin step.

What is looked at: the spread of log Z between chains; how far the chains' draws differ, beside their own spread; the
effective sample size of the draws; and a second, unrelated estimate of Z by plain draws of the prior, which sees mass
that guided particles never visited.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

BELIEVABLE, DOUBTFUL, COLLAPSED = "believable", "doubtful", "collapsed"

#: With fewer chains than this, an error of the evidence is not stated.
FEWEST_CHAINS = 8
#: From this number of chains on, they are judged by how far they agree; with fewer, by the thinnest step.
FEWEST_TO_COMPARE = 4
#: A larger standard deviation of log Z between chains, in nats, is a collapse; half of it is doubtful.
LARGEST_SPREAD = 1.0
#: The same where less than a twentieth of the particles carried the weight at some step of most chains.
LARGEST_SPREAD_IF_THIN = 0.3
#: So few independent draws in a chain, by the spread of the chains' means, are a collapse; thrice as many are doubtful.
FEWEST_DRAWS = 3.0
#: So small an effective sample of all chains' draws is a collapse.
FEWEST_EFFECTIVE = 8.0
#: Evidences that differ by so many errors do not agree.
LARGEST_Z = 4.0
#: A plain estimate with so few effective draws is known only up to Markov's inequality.
FEWEST_PLAIN = 10.0
#: The largest factor by which a positive estimate exceeds its mean with a probability of a thousandth (Markov).
LARGEST_EXCESS = math.log(1000.0)


class CollapseWarning(UserWarning):
    """A run of SMC whose evidence and draws cannot be believed; it names the systems and what to do."""


class Plain(NamedTuple):
    """An estimate of the evidence by plain draws of the prior; per system, shape ``(S,)``.

    :ivar log_evidence: nats.
    :ivar error: its relative standard error.
    :ivar ess: the effective sample size of the weights.
    """

    log_evidence: np.ndarray
    error: np.ndarray
    ess: np.ndarray

    @classmethod
    def by_weights(cls, log_evidence: Any, ess: Any, num_draws: int) -> Plain:
        """With the error that this effective sample size of so many draws comes to."""
        size = np.asarray(ess, np.float64)
        error = np.sqrt(np.maximum(1 / np.maximum(size, 1e-12) - 1 / num_draws, 0.0))
        return cls(np.asarray(log_evidence, np.float64), error, size)


class Findings(NamedTuple):
    """What a run is judged by; arrays of shape ``(C, S)`` or, without chains, ``(S,)``.

    :ivar log_evidences: per chain.
    :ivar final_ess: of the draws of x.
    :ivar least_ess: of all steps.
    :ivar independent_draws: in each chain, by the spread of the chains' means; NaN with one chain.
    :ivar num_particles: P.
    :ivar plain: the second estimate; ``None`` where there is none.
    """

    log_evidences: np.ndarray
    final_ess: np.ndarray
    least_ess: np.ndarray
    independent_draws: np.ndarray
    num_particles: int
    plain: Plain | None

    @property
    def num_chains(self) -> int:
        return len(self.log_evidences)

    @property
    def spread(self) -> np.ndarray:
        """The standard deviation of log Z between chains; infinite where a chain is dead, NaN with one chain."""
        if self.num_chains == 1:
            return np.full(self.log_evidences.shape[1:], np.nan)
        dead = ~np.isfinite(self.log_evidences).all(0)
        return np.where(dead, np.inf, np.where(dead, 0.0, self.log_evidences).std(0, ddof=1))


class Verdict(NamedTuple):
    """On one system.

    :ivar name: ``"believable"``, ``"doubtful"`` or ``"collapsed"``.
    :ivar reasons: in words; empty where there is nothing to say.
    """

    name: str
    reasons: tuple[str, ...]


def evidence_error(findings: Findings) -> np.ndarray:
    """The standard error of log Z by the spread of the chains, so scaled that ±2 of it cover 95 % (Student's t)."""
    chains = findings.num_chains
    if chains < FEWEST_CHAINS:
        return np.full(findings.log_evidences.shape[1:], np.nan)
    return findings.spread / math.sqrt(chains) * _student(2.0, chains - 1) / 2


def _student(z: float, degrees: int) -> float:
    """Student's t at the probability of a normal's z, by its expansion in 1/degrees: to .001 from 7."""
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def judge(findings: Findings) -> list[Verdict]:
    """A verdict for each system."""
    return [_verdict(list(_complaints(findings, s))) for s in range(findings.log_evidences.shape[1])]


def _verdict(complaints: list[tuple[bool, str]]) -> Verdict:
    """The verdict that complaints amount to: ``(whether it is a collapse, words)`` each."""
    reasons = tuple(words for _, words in complaints)
    if any(is_collapse for is_collapse, _ in complaints):
        return Verdict(COLLAPSED, reasons)
    return Verdict(DOUBTFUL if complaints else BELIEVABLE, reasons)


def _complaints(found: Findings, s: int) -> Iterator[tuple[bool, str]]:
    broken = np.isnan(found.log_evidences[:, s]) | np.isposinf(found.log_evidences[:, s])
    if broken.any():
        yield True, f"log Z is {found.log_evidences[broken, s][0]} in {broken.sum()} of {found.num_chains} chains"
        return
    draws, total = found.final_ess[:, s], float(found.final_ess[:, s].sum())
    if total < FEWEST_EFFECTIVE:
        yield True, f"the draws of all chains are worth {total:.1f}"
    elif total < 5 * FEWEST_EFFECTIVE:
        yield False, f"the draws of all chains are worth {total:.0f}"
    if found.num_chains >= FEWEST_TO_COMPARE:
        spread, independent = found.spread[s], found.independent_draws[s]
        is_thin = float(np.median(found.least_ess[:, s])) < max(2.0, 0.05 * found.num_particles)
        most = LARGEST_SPREAD_IF_THIN if is_thin else LARGEST_SPREAD
        if spread > min(most, LARGEST_SPREAD / 2):
            yield spread > most, f"log Z differs between chains, with a standard deviation of {spread:.2f}"
        if independent < 3 * FEWEST_DRAWS and independent < draws.mean():
            words = f"the chains' draws differ as if each had {independent:.1f} independent ones"
            yield independent < FEWEST_DRAWS, words
    else:
        least = float(found.least_ess[:, s].min())
        if least < max(2.0, 0.05 * found.num_particles):
            is_collapse = least < max(2.0, 0.005 * found.num_particles)
            yield is_collapse, f"{least:.1f} particles carried the weight at some step"
    if found.plain is not None:
        yield from _missed_mass(found, found.plain, s)


def _missed_mass(found: Findings, plain: Plain, s: int) -> Iterator[tuple[bool, str]]:
    """Whether plain draws of the prior found more than all guided particles did."""
    log_evidence = np.logaddexp.reduce(found.log_evidences[:, s]) - math.log(found.num_chains)
    excess = plain.log_evidence[s] - log_evidence
    if plain.ess[s] < FEWEST_PLAIN:
        is_missed = excess > LARGEST_EXCESS
    else:
        own = 0.0 if found.num_chains == 1 else min(found.spread[s], 1.0) / math.sqrt(found.num_chains)
        is_missed = excess > LARGEST_Z * math.hypot(plain.error[s], own)
    if is_missed:
        yield (
            True,
            (
                f"plain draws of the prior give a log Z of {plain.log_evidence[s]:.2f}, {excess:.2f} more: particles "
                "missed a part of the posterior"
            ),
        )
