"""From the model's space to the data's units: NumPyro transforms, and the Jacobian that K and log p carry."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import erfc, ndtr
from jax.scipy.stats import norm
from numpy.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IdentityTransform,
    LowerCholeskyAffine,
    Transform,
    biject_to,
)

from pp_diffusion.checks import check_complete, check_not_constant, check_precision, name_columns


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
    data = _checked(data)
    axis = 0 if per_coordinate else None
    loc, scale = data.mean(axis), data.std(axis)
    return AffineTransform(jnp.asarray(loc, dtype=float), jnp.asarray(scale, dtype=float))


def transform_to(constraint: constraints.Constraint, data: ArrayLike | None = None) -> Transform:
    """A transform to data that are bounded: in a box, positive, on a simplex, or whatever has NumPyro's ``biject_to``.

    On a simplex data have one number more than states, so that its kernel is ``GaussianKernel((k - 1,))``.

    A prior has a density up to the edges, and none on them: data that touch an edge of an open set are refused.

    :param constraint: the support, such as ``constraints.interval(low, high)``, whose bounds may be arrays,
        ``constraints.positive`` or ``constraints.simplex``; or that of a distribution, ``dist.Dirichlet(c).support``.
    :param data: shape ``(N, *event_shape)``, the training set: states have mean 0 and standard deviation 1 then;
        ``None`` takes the bijection as it is.
    :raises ValueError: naming ``constraint``, where NumPyro knows no bijection to it from real numbers; naming
        ``data``, where values are outside or on the edge.

    .. doctest::

        >>> import numpy as np, pp_diffusion as ppd
        >>> from numpyro.distributions import constraints
        >>> shares = np.random.default_rng(0).dirichlet([2.0, 3.0, 4.0], size=1000)
        >>> transform = ppd.transform_to(constraints.simplex, shares)
        >>> states = transform.inv(shares)
        >>> states.shape, abs(states.mean()) < 1e-3
        ((1000, 2), Array(True, dtype=bool))
        >>> ppd.transform_to(constraints.interval(0, 1), [[0.5], [1.0]])
        Traceback (most recent call last):
        ...
        ValueError: data must lie inside of Interval(lower_bound=0, upper_bound=1), and not on its edge, where a density
        ends; there are 1 of 2 values in column 0. Move them inside by what they are rounded to, say; or let a mixture
        have the edge as a case of its own
    """
    constraint = base_constraint(constraint)  # axes of the event are what data have
    try:
        transform = biject_to(constraint)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"constraint must be one that NumPyro has a bijection to; got {constraint!r}") from error
    if data is None:
        return transform
    check_complete(data, "data", "Impute them, or use complete rows")
    values = np.asarray(data, np.float64)
    inside = np.asarray(constraint(jnp.asarray(values, float)))
    if not inside.all():
        raise ValueError(f"data must be in {constraint!r}; {np.count_nonzero(~inside)} of {inside.size} are not")
    bad = np.asarray(on_edge(transform, jnp.asarray(values, float)))
    if bad.any():
        raise ValueError(
            f"data must lie inside of {constraint!r}, and not on its edge, where a density ends; there are "
            f"{np.count_nonzero(bad)} of {bad.size} values in {name_columns(np.any(bad, 0, keepdims=True)[0])}. Move "
            "them inside by what they are rounded to, say; or let a mixture have the edge as a case of its own"
        )
    unit = standardize(np.asarray(transform.inv(jnp.asarray(values, float))))
    return unit if isinstance(transform, IdentityTransform) else ComposeTransform([unit, transform])


def on_edge(transform: Transform, x: Array) -> Array:
    """Which values no state is found for, where they are in the codomain; of the shape of x or of its states."""
    if transform.codomain is constraints.simplex:  # whose inverse is clipped
        return x <= jnp.finfo(x.dtype).eps
    return ~jnp.isfinite(transform._inverse(x))


def whiten(data: ArrayLike) -> LowerCholeskyAffine:
    r"""The transform under which the columns of ``data`` have mean 0, standard deviation 1 and no correlation in the
    model's space: for tables whose columns go together.

    A chain resolves what is wider than its first step. Where columns nearly follow each other, the narrow direction is
    lost among standardised columns, and is as wide as any other among these.

    :param data: shape ``(N, d)``, with more rows than columns; use the training set.
    :return: ``x = loc + scale_tril @ z``, of the covariance's Cholesky factor. A column's own part is taken for at
        least a thousandth of its standard deviation, so that one which follows from the others does not turn rounding
        into data.
    :raises ValueError: if ``data`` are not such a table, not finite, or constant in a column.

    .. doctest::

        >>> import numpy as np, pp_diffusion as ppd
        >>> transform = ppd.whiten(np.array([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 4.0]]))
        >>> transform.loc.tolist(), transform.scale_tril.round(2).tolist()
        ([1.0, 2.0], [[1.0, 0.0], [1.0, 1.0]])
    """
    if np.ndim(data) != 2 or len(np.asarray(data)) <= np.shape(data)[1]:
        raise ValueError(f"data must have shape (N, d) with more rows than columns; got {np.shape(data)}")
    data = _checked(data)
    loc, covariance = data.mean(0), np.atleast_2d(np.cov(data, rowvar=False, bias=True))
    scale_tril = np.linalg.cholesky(covariance + 1e-6 * np.diag(np.diag(covariance)))
    return LowerCholeskyAffine(jnp.asarray(loc, dtype=float), jnp.asarray(scale_tril, dtype=float))


def _checked(data: ArrayLike) -> np.ndarray:
    """Data from which units can be taken.

    :raises ValueError: if there are none.
    """
    if np.ndim(data) < 1 or not np.size(data):
        raise ValueError(f"data must hold at least one datum, shape (N, *event_shape); got shape {np.shape(data)}")
    check_complete(data, "data", "Impute them, or use complete rows")
    array = np.asarray(data, dtype=np.float64)
    check_not_constant(array)
    check_precision(array, np.asarray(jnp.asarray(array, dtype=float)), array.ndim - 1, "data")
    return array


class UniformBlocks(Transform):
    r"""From a space where each block of values is a normal bump, to data that are uniform within each block.

    .. math::
        x = \mathrm{low} + \sum_j w_j \Phi\left(\frac{z - c_j}{s_j}\right)

    Where the bumps are apart, x is uniform in block j, an interval of width :math:`w_j`, just when z is normal about
    :math:`c_j` with standard deviation :math:`s_j`: how often a block occurs, however unevenly, is for the model to
    say, and no density has edges. For levels 0…16 with uniform noise of width 1 added, of which the first and the last
    are frequent, the blocks are those two and all between them. It acts on each coordinate alone.

    :param widths: of the blocks in data units, from the lowest up.
    :param centres: of the bumps, increasing; neighbours at most 8 times the sum of their scales apart, because nothing
        between them could be told from rounding.
    :param scales: standard deviations of the bumps.
    :param low: the lower edge of the lowest block. Values on the edges of the support, and so near them that no number
        tells, come from 8 scales beyond the outermost centres.
    :raises ValueError: if these are not such numbers.

    .. doctest::

        >>> import jax.numpy as jnp, pp_diffusion as ppd
        >>> transform = ppd.UniformBlocks(widths=(1, 15, 1), centres=(-1.25, 0, 1.25), scales=(0.25, 0.3, 0.25))
        >>> transform.inv(jnp.array([0.0, 0.5, 8.5, 16.5, 17.0])).round(2).tolist()
        [-3.25, -1.25, 0.0, 1.25, 3.25]
    """

    domain = constraints.real

    def __init__(
        self, widths: Sequence[float], centres: Sequence[float], scales: Sequence[float], low: float = 0.0
    ) -> None:
        blocks = np.array(np.broadcast_arrays(widths, centres, scales), dtype=np.float64)
        if blocks.ndim != 2 or not blocks.size or len({len(widths), len(centres), len(scales)}) > 1:
            raise ValueError("widths, centres and scales must be sequences with one number for each block")
        if not (np.isfinite(blocks).all() and np.isfinite(low)):
            raise ValueError("widths, centres, scales and low must be finite")
        if not (blocks[[0, 2]] > 0).all():
            raise ValueError("widths and scales must be positive")
        gaps, most = np.diff(blocks[1]), REACH * (blocks[2, 1:] + blocks[2, :-1])
        if not ((gaps > 0) & (gaps <= most)).all():
            raise ValueError(f"centres must increase by at most {REACH} times the scales of both neighbours")
        self.widths, self.centres, self.scales = (tuple(row.tolist()) for row in blocks)
        self.low = float(low)

    @property
    def codomain(self) -> constraints.Constraint:
        """The interval that the blocks fill."""
        return constraints.interval(self.low, self.low + sum(self.widths))

    def __call__(self, x: Array) -> Array:
        """The datum of a point of the model's space."""
        y = self.low + jnp.sum(jnp.asarray(self.widths) * ndtr(self._standardized(x)), -1)
        return jnp.clip(y, self.low, self.low + sum(self.widths))  # sums round

    def _inverse(self, y: Array) -> Array:
        return _inverse_of_blocks(self, jnp.asarray(y, dtype=jnp.result_type(float, y)))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """log dy/dx, per coordinate."""
        log_heights = np.log(self.widths) - np.log(self.scales)
        return jax.nn.logsumexp(norm.logpdf(self._standardized(x)) + jnp.asarray(log_heights, float), -1)

    def _standardized(self, z: Array) -> Array:
        return (jnp.asarray(z)[..., None] - jnp.asarray(self.centres)) / jnp.asarray(self.scales)

    def tree_flatten(self) -> Any:
        """No leaves: a handful of settings."""
        return (), ((), self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make it."""
        return {name: getattr(self, name) for name in ("widths", "centres", "scales", "low")}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UniformBlocks) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(tuple(self.settings.values()))


REACH = 8  # scales beyond the outermost centres


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inverse_of_blocks(transform: UniformBlocks, x: Array) -> Array:
    """By a table over the log odds of the share below x, and Newton steps."""
    z_table, odds_table = (jnp.asarray(column, x.dtype) for column in _table_of_blocks(transform))
    high = transform.low + sum(transform.widths)
    odds = jnp.clip(jnp.log(x - transform.low) - jnp.log(high - x), odds_table[0], odds_table[-1])
    z, spacing = jnp.interp(odds, odds_table, z_table), z_table[1] - z_table[0]
    for _ in range(2 if x.dtype == jnp.float64 else 1):
        u, widths = transform._standardized(z), jnp.asarray(transform.widths)
        tail = erfc(jnp.abs(u) / np.sqrt(2)) / 2  # each tail by itself: 1 - Phi would lose it
        below, above = (jnp.sum(widths * jnp.where(side, 1 - tail, tail), -1) for side in (u > 0, u < 0))
        slope = jnp.exp(transform.log_abs_det_jacobian(z, x)) * (1 / below + 1 / above)
        z -= jnp.clip((jnp.log(below) - jnp.log(above) - odds) / slope, -spacing, spacing)
    return z.astype(x.dtype)


@_inverse_of_blocks.defjvp
def _inverse_of_blocks_jvp(transform: UniformBlocks, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    z = _inverse_of_blocks(transform, *primals)
    return z, tangents[0] * jnp.exp(-transform.log_abs_det_jacobian(z, primals[0]))


@cache
def _table_of_blocks(transform: UniformBlocks, size: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """z on an even grid, and the log odds of the share of the support below its x."""
    from scipy import special

    widths, centres, scales = map(np.asarray, (transform.widths, transform.centres, transform.scales))
    z = np.linspace(np.min(centres - REACH * scales), np.max(centres + REACH * scales), size)
    u = (z[:, None] - centres) / scales
    return z, np.log(special.ndtr(u) @ widths) - np.log(special.ndtr(-u) @ widths)


def base_constraint(constraint: constraints.Constraint) -> constraints.Constraint:
    """The constraint on single entries under ``independent``."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def check_transform(transform: Transform, event_shape: tuple[int, ...]) -> None:
    """Refuses a transform that is not one to one from all real events of this shape to events of as many axes.

    :raises ValueError: naming ``transform``.
    """
    name = type(transform).__name__
    try:
        domain = transform.domain
        base = base_constraint(domain)
        keeps_axes = (
            max(domain.event_dim, transform.codomain.event_dim)
            <= len(event_shape)
            == len(shape_in_data_units(transform, event_shape))
        )
    except (NotImplementedError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"transform of type {name} does not take events of shape {event_shape}: {error}") from error
    if not (base is constraints.real or base is constraints.real_vector):
        raise ValueError(f"transform must map from all real numbers; {name} maps from {base}")
    if not keeps_axes:
        raise ValueError(f"transform must map events of shape {event_shape} to as many axes; {name} does not")
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


def shape_in_data_units(transform: Transform | None, event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a datum whose state has this shape: another one where the support has fewer dimensions than numbers, as a
    simplex has."""
    if transform is None:
        return event_shape
    return tuple(jax.eval_shape(transform, jax.ShapeDtypeStruct(event_shape, jnp.result_type(float))).shape)


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
