"""How far data lie from the middle of what a model predicts, beside data sets that it makes itself.

A prior that is too wide predicts data everywhere, and those that came lie nearer to the middle than nearly all that it
makes; one that is too narrow or elsewhere has them farther out. Evidences of some tens of simulated data sets tell the
latter. Not the former: no density is much above that of the middle. Simulating is cheap, though (Box 1980; two-sided).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

#: The probability that data of the model itself are called surprising, of all sites and both sides together.
LEVEL = 0.01


class Surprise(NamedTuple):
    """Of the observed numbers of a site, taken together.

    :ivar nearer: the share of the simulated data sets that lie nearer to the middle than the data.
    :ivar farther: the share of those that lie farther out. Sites of few values have ties, which are neither.
    """

    nearer: float
    farther: float


def surprise(values: np.ndarray, simulated: np.ndarray) -> Surprise:
    """By the mean square distance from the medians of all numbers, each in terms of its median distance.

    :param values: what is observed.
    :param simulated: data sets, which are the first axis.
    """
    draws = np.asarray(simulated, np.float64).reshape(len(simulated), -1)
    middle = np.median(draws, 0)
    scale = np.median(np.abs(draws - middle), 0)
    scale = np.where(scale > 0, scale, draws.std(0))
    scale = np.where(scale > 0, scale, 1.0)

    def away(y: np.ndarray) -> np.ndarray:
        return np.asarray((((y - middle) / scale) ** 2).mean(-1))

    distances, distance = away(draws), away(np.asarray(values, np.float64).ravel())
    return Surprise(float((distances < distance).mean()), float((distances > distance).mean()))


def conflicts(found: Mapping[str, Surprise]) -> list[str]:
    """In words, what is too near to the middle or too far from it."""
    level = LEVEL / (2 * max(len(found), 1))
    return [
        f"prior and data are in conflict: site {name!r} lies {where} the middle of what the model predicts than "
        f"{100 * share:.1f} % of the data sets that it makes: {why}"
        for name, (nearer, farther) in found.items()
        for where, share, why in (
            ("nearer to", farther, "it is too wide"),
            ("farther from", nearer, "it is too narrow, or elsewhere"),
        )
        if 1 - share < level
    ]
