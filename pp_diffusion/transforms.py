"""From the model's space to the data's units: NumPyro transforms, and the Jacobian that K and log p carry."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpy.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, Transform


def standardize(data: ArrayLike, *, per_coordinate: bool = True) -> AffineTransform:
    """The transform under which ``data`` have mean 0 and standard deviation 1 in the model's space.

    :param data: shape ``(N, *event_shape)``; use the training set.
    :param per_coordinate: ``False`` takes one mean and one scale for all coordinates (as the paper scales its data).
    :return: ``x = loc + scale * z``.
    :raises ValueError: if ``data`` are empty, not finite, or constant in a coordinate.

    .. doctest::

        >>> import numpy as np, pp_diffusion as ppd
        >>> transform = ppd.standardize(np.array([[0.0, 10.0], [2.0, 30.0]]))
        >>> transform.loc.tolist(), transform.scale.tolist()
        ([1.0, 20.0], [1.0, 10.0])
    """
    data = np.asarray(data, dtype=np.float64)
    if data.ndim < 1 or not data.size:
        raise ValueError(f"data must hold at least one datum, shape (N, *event_shape); got shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError(f"data must be finite; {_count(~np.isfinite(data))} of {data.size} values are NaN or infinite")
    axis = 0 if per_coordinate else None
    loc, scale = data.mean(axis), data.std(axis)
    check_not_constant(data)
    return AffineTransform(jnp.asarray(loc, dtype=float), jnp.asarray(scale, dtype=float))


def check_not_constant(data: np.ndarray, name: str = "data") -> None:
    """Refuses data with a coordinate that never changes: its density is unbounded.

    :raises ValueError: naming the coordinates.
    """
    constant = np.ptp(data, axis=0) == 0
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


def log_abs_det(transform: Transform | None, z: Array, x: Array, event_ndim: int) -> Array:
    """log |dx/dz| per datum, for ``z`` of shape ``(*batch, *event)``."""
    if transform is None:
        return jnp.zeros(z.shape[: z.ndim - event_ndim])
    jacobian = transform.log_abs_det_jacobian(z, x)
    extra = jnp.ndim(jacobian) - (z.ndim - event_ndim)
    return jnp.sum(jacobian, axis=tuple(range(-extra, 0))) if extra else jacobian


def data_support(
    support: constraints.Constraint, transform: Transform | None, event_ndim: int
) -> constraints.Constraint:
    """The support in data units of an event whose model-space support is ``support``."""
    if transform is None:
        return support
    codomain = transform.codomain
    return constraints.independent(codomain, event_ndim - codomain.event_dim)


def in_data_units(distribution: dist.Distribution, transform: Transform | None) -> dist.Distribution:
    """The law of ``transform(z)`` for z from ``distribution``."""
    return (
        distribution
        if transform is None
        else dist.TransformedDistribution(distribution, transform, validate_args=False)
    )


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))
