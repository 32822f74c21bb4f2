"""From the model's space to the data's units: NumPyro transforms, and the Jacobian that K and log p carry."""

from __future__ import annotations

import jax
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
    check_not_constant(data)
    check_precision(data, np.asarray(jnp.asarray(data, dtype=float)), data.ndim - 1, "data")
    axis = 0 if per_coordinate else None
    loc, scale = data.mean(axis), data.std(axis)
    return AffineTransform(jnp.asarray(loc, dtype=float), jnp.asarray(scale, dtype=float))


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


def check_transform(transform: Transform, event_shape: tuple[int, ...]) -> None:
    """Refuses a transform that is not one to one from all real events of this shape to events of this shape.

    :raises ValueError: naming ``transform``.
    """
    name = type(transform).__name__
    try:
        domain = transform.domain
        base = domain
        while isinstance(base, constraints.independent):
            base = base.base_constraint
        keeps_shape = (
            max(domain.event_dim, transform.codomain.event_dim) <= len(event_shape)
            and jax.eval_shape(transform, jax.ShapeDtypeStruct(event_shape, float)).shape == event_shape
        )
    except (NotImplementedError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"transform of type {name} does not take events of shape {event_shape}: {error}") from error
    if not (base is constraints.real or base is constraints.real_vector):
        raise ValueError(f"transform must map from all real numbers; {name} maps from {base}")
    if not keeps_shape:
        raise ValueError(f"transform must map events of shape {event_shape} to that shape; {name} does not")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(transform)):
        return  # its values are not known
    with jax.ensure_compile_time_eval():
        z = jnp.stack([jnp.ones(event_shape), -jnp.ones(event_shape)])
        x = transform(z)
        try:
            jacobian = log_abs_det(transform, z, x, len(event_shape))
            holds = np.isfinite(jacobian).all() and np.allclose(transform._inverse(x), z, atol=1e-2)
        except NotImplementedError:
            holds = False
    if not holds:
        raise ValueError(f"transform must be one to one, with a finite Jacobian; {name} is not")


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
