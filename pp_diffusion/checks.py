"""What arguments have to be, said before anything is compiled."""

from __future__ import annotations

import numpy as np


def positive_int(name: str, value: int) -> int:
    """``value`` as an int.

    :raises ValueError: naming the argument, unless it is an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
    return int(value)


def check_precision(values: np.ndarray, states: np.ndarray, event_ndim: int, name: str) -> None:
    """Refuses data whose rounding to the state's dtype is visible beside their spread, such as large time stamps.

    :raises ValueError: naming the argument.
    """
    if not np.isfinite(states).all():
        raise ValueError(f"{name} must be finite in {states.dtype}; the largest value is {np.abs(values).max()}")
    if values.dtype == states.dtype or values.ndim == event_ndim:
        return
    values = values.reshape(-1, *values.shape[values.ndim - event_ndim :]).astype(np.float64)
    lost, spread = np.abs(values - states.reshape(values.shape)).max(0), values.std(0)
    bad = (lost > 0.05 * spread) & (np.ptp(values, axis=0) > 0)  # the standard deviation of equal numbers may round
    if bad.any():
        raise ValueError(
            f"{name} lose their spread when rounded to {states.dtype} in {name_columns(bad)}: subtract an "
            "offset first, or turn x64 on"
        )


def check_not_constant(data: np.ndarray, name: str = "data") -> None:
    """Refuses data with a coordinate that never changes: its density is unbounded.

    :raises ValueError: naming the coordinates.
    """
    constant = (data == data[:1]).all(0)
    if constant.any():
        raise ValueError(
            f"{name} must vary in every coordinate; constant: {name_columns(constant)}. "
            "Drop these coordinates, or add noise of a known scale (dequantisation)"
        )


def name_columns(mask: np.ndarray) -> str:
    """The True coordinates of an event, in words; at most eight of them."""
    if not np.ndim(mask):
        return "the only coordinate"
    index = np.argwhere(mask)
    names = [str(i[0]) if mask.ndim == 1 else str(tuple(map(int, i))) for i in index[:8]]
    more = f" and {len(index) - 8} more" if len(index) > 8 else ""
    return f"column{'s' if len(index) > 1 else ''} {', '.join(names)}{more}"
