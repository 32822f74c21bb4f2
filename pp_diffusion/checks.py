"""What arguments have to be, said before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def positive_int(name: str, value: int) -> int:
    """``value`` as an int.

    :raises ValueError: naming the argument, unless it is an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
    return int(value)


def typed_key(rng_key: Array) -> Array:
    """A random key as one of its own type, for one of the old kind, an array of numbers."""
    is_old = not jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(rng_key) if is_old else rng_key


def check_key(rng_key: Any, name: str = "rng_key") -> None:
    """Refuses what is no single JAX random key.

    :raises TypeError: naming the argument.
    """
    dtype = getattr(rng_key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != np.uint32 or np.ndim(rng_key) != 1):
        came = f"{rng_key!r}" if rng_key is None or isinstance(rng_key, int) else type(rng_key).__name__
        raise TypeError(f"{name} must be a JAX random key, such as jax.random.key(0); got {came}")
    if typed and np.ndim(rng_key):
        raise TypeError(f"{name} must be a single JAX random key; got {np.shape(rng_key)} of them")


def check_numbers(values: np.ndarray, name: str) -> None:
    """Refuses arrays of anything but numbers.

    :raises TypeError: naming the argument.
    """
    if values.dtype.kind not in "biuf" and values.dtype != jnp.bfloat16:
        raise TypeError(f"{name} must hold numbers; got dtype {values.dtype}")


def check_complete(values: Any, name: str, advice: str = "") -> None:
    """Refuses values that are missing: masked ones of ``numpy.ma``, NaN and infinity.

    :raises ValueError: naming the argument.
    """
    array = np.asarray(values)
    for kind, missing in (
        ("masked", np.ma.getmaskarray(values) if np.ma.isMaskedArray(values) else None),
        ("NaN or infinite", ~np.isfinite(array)),
    ):
        if missing is not None and missing.any():
            count = np.count_nonzero(missing)
            text = f"{name} must be finite; {count} of {missing.size} values are {kind}"
            raise ValueError(f"{text}. {advice}" if advice else text)


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


#: From which share of the standard deviation on the step of a grid is one that densities resolve.
COARSE = 0.05


def find_ties(data: np.ndarray, coarse: float = COARSE, most_rows: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Columns whose values occur again and again, and in each column the share of rows whose value another one has.

    An atom is a value that a twentieth of the rows have, and three times as many as have a value on average. Or half of
    the rows share values on a grid that is coarse beside the spread: such steps a density resolves, while those of
    ordinary rounding it does not. Few rows tell nothing.

    :param data: shape ``(N, *event_shape)``.
    :param coarse: from which step on, as a share of the standard deviation.
    :param most_rows: how many are looked at.
    """
    rows = data[np.linspace(0, len(data) - 1, min(len(data), most_rows)).astype(int)]
    count, sd = len(rows), rows.std(0)
    rows = np.sort(rows, axis=0)
    new = np.diff(rows, axis=0, prepend=np.nan) != 0  # where a run of equal values begins
    starts = np.maximum.accumulate(np.where(new, np.arange(count).reshape(-1, *[1] * (data.ndim - 1)), 0), axis=0)
    longest = (np.arange(count).reshape(-1, *[1] * (data.ndim - 1)) - starts).max(0) + 1
    alone = new & np.concatenate([new[1:], np.ones_like(new[:1])])
    shares, distinct = 1 - alone.mean(0), new.sum(0)
    atoms = (longest >= 5) & (longest >= 0.05 * count) & (longest * distinct >= 3 * count)
    gaps = np.diff(rows, axis=0, append=np.inf)
    gaps[gaps == 0] = np.inf
    # the step of the grid: a quarter of the distinct values are no further apart
    place = np.minimum((distinct - 1) // 4, count - 1)
    step = np.take_along_axis(np.sort(gaps, axis=0), place[None], 0)[0]
    return atoms | ((count >= 20) & (shares >= 0.5) & (step >= coarse * sd) & (sd > 0)), shares


def name_columns(mask: np.ndarray, shares: np.ndarray | None = None) -> str:
    """The True coordinates of an event, in words; at most eight of them.

    :param shares: a share of the rows for each, to be told too.
    """
    percent = np.vectorize(lambda share: f" ({100 * share:.0f} % of the rows)")
    told = percent(shares) if shares is not None else np.full(np.shape(mask), "")
    if not np.ndim(mask):
        return f"the only coordinate{told}"
    index = np.argwhere(mask)
    names = [(str(i[0]) if mask.ndim == 1 else str(tuple(map(int, i)))) + str(told[tuple(i)]) for i in index[:8]]
    more = f" and {len(index) - 8} more" if len(index) > 8 else ""
    return f"column{'s' if len(index) > 1 else ''} {', '.join(names)}{more}"
