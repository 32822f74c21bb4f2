r"""The log likelihood itself, by importance sampling over trajectories (the paper, eq. 9), and whether to believe it.

The weights of forward trajectories, :math:`w = p(x_{0…T}) / q(x_{1…T} \mid x_0)`, average to :math:`p(x_0)`. No
resampling along the way: near the optimum a weight telescopes only at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion import inference_data
from pp_diffusion.checks import check_key, positive_int
from pp_diffusion.frozen import is_key
from pp_diffusion.prior import DiffusionPrior, check_prior
from pp_diffusion.rows import as_rows
from pp_diffusion.units import nats_to_bits
from pp_diffusion.weights import BoundOfBits, Trajectories

MAX_PARETO_K = 0.7  # from here on, no error can be stated (Vehtari et al. 2024)
BELIEVABLE_PARETO_K = 0.5  # from here on, the weights' variance is infinite
BELIEVABLE_STD_ERROR = 0.2  # nats
_PER_DATUM = ("value", "psis_value", "std_error", "ess", "pareto_k", "bound", "bound_std_error", "gap", "verdict")
BELIEVABLE, DOUBTFUL, BOUND_ONLY = "believable", "doubtful", "bound only"


@dataclass(frozen=True, eq=False)
class LogProbEstimate:
    r"""Estimates of :math:`\log p(x)` per datum, in nats and data units, with what tells whether to believe them.

    Arrays are NumPy's, in float64, of the data's batch shape.

    :ivar value: the log of the mean weight. Its exponential is unbiased for p(x), at any number of trajectories; the
        log itself is biased low, by about half of ``std_error`` squared where the weights are tame, and by far more
        where they are not.
    :ivar psis_value: the same after Pareto smoothing of the largest weights (ArviZ's PSIS): less variance where the
        weights have a tail, no longer exactly unbiased for p(x).
    :ivar std_error: of ``value``, by the delta method: the standard error of the mean weight over that mean, in whose
        square the weight farthest from the mean is counted once more, because weights have a long tail to the right
        and a sample mostly ends before it does; for discrete kernels it is at least a weight of zero, for the rare
        flip that no trajectory has met. NaN where ``pareto_k`` is 0.7 or more: the sample's own spread then says
        nothing.
    :ivar ess: Kish's effective sample size of the weights, 1…num_trajectories.
    :ivar pareto_k: Pareto k-hat, the shape of the tail of the weights: their moments of order 1/k and above are
        infinite. Minus infinity where the largest weights are all equal, or all weights nearly so but for less than
        five (no tail); infinity where there are too few trajectories, or too few in the tail, to tell.
    :ivar bound: K :math:`\le \log p(x)`. For continuous kernels the mean log weight; for discrete ones, where log
        ratios miss rare flips, :func:`lower_bound` with a sixteenth as many samples (at least four).
    :ivar bound_std_error: its Monte Carlo standard error.
    :ivar log_weights: the log weights, shape ``(num_trajectories, *batch)``.
    """

    value: np.ndarray
    psis_value: np.ndarray
    std_error: np.ndarray
    ess: np.ndarray
    pareto_k: np.ndarray
    bound: np.ndarray
    bound_std_error: np.ndarray
    log_weights: np.ndarray = field(repr=False)
    _bound: BoundOfBits = field(repr=False)
    _source: Trajectories = field(repr=False)
    _keys: tuple[np.ndarray, ...] = field(repr=False)

    @property
    def num_trajectories(self) -> int:
        """Trajectories per datum."""
        return len(self.log_weights)

    @property
    def gap(self) -> np.ndarray:
        """log p − K per datum, nats: what the bound gives away."""
        with np.errstate(invalid="ignore"):  # NaN where no trajectory has any weight
            return self.value - self.bound

    @property
    def good_k(self) -> float:
        """The largest k-hat at which this many trajectories suffice: min(1 − 1/log10(num_trajectories), 0.7)."""
        return _good_k(self.num_trajectories)

    @property
    def verdict(self) -> np.ndarray:
        """``"believable"``, ``"doubtful"`` or ``"bound only"`` per datum.

        Bound only: k-hat is 0.7 or more, or there are less than 25 trajectories. Doubtful: ``std_error`` is above 0.2
        nats, or k-hat is 0.5 or more or above :attr:`good_k` while ``ess`` is less than 95 % of the trajectories. What
        no weight has shown, such as a mode that none of the trajectories met, no rule can see.
        """
        tame = self.pareto_k < min(self.good_k, BELIEVABLE_PARETO_K)
        even = self.ess >= inference_data.NEARLY_EVEN * self.num_trajectories
        believable = (tame | even) & (self.std_error <= BELIEVABLE_STD_ERROR)
        return np.where(self.pareto_k < MAX_PARETO_K, np.where(believable, BELIEVABLE, DOUBTFUL), BOUND_ONLY)

    @property
    def total_verdict(self) -> str:
        """The verdict on the mean over the data.

        Bound only: more than 5 % of the data are. Believable: at least 95 % of the data are, and at most 1 % are bound
        only. Else doubtful.
        """
        share = {verdict: float(np.mean(self.verdict == verdict)) for verdict in (BELIEVABLE, BOUND_ONLY)}
        if share[BOUND_ONLY] > 0.05:
            return BOUND_ONLY
        return BELIEVABLE if share[BELIEVABLE] >= 0.95 and share[BOUND_ONLY] <= 0.01 else DOUBTFUL

    def lower_limit(self, confidence: float = 0.95) -> np.ndarray:
        r"""What log p exceeds with this confidence, per datum, whatever the weights' tail.

        Markov's inequality for the mean weight: :math:`P(\log\hat p \ge \log p + a) \le e^{-a}`. There is no such
        statement in the other direction.

        :param confidence: in (0, 1).
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1); got {confidence}")
        return self.value + math.log1p(-confidence)

    def extend(self, rng_key: Array, num_trajectories: int, *, progress_bar: bool = False) -> LogProbEstimate:
        """The estimate with further trajectories added to these.

        :param rng_key: a JAX random key, another one than before.
        :param num_trajectories: how many to add per datum.
        :raises ValueError: if these trajectories were drawn with that key.
        """
        if any(np.array_equal(_key_data(rng_key), used) for used in self._keys):
            raise ValueError("rng_key must be another one than before: it would draw the same trajectories again")
        log_weights, bound = self._source.draw(rng_key, num_trajectories, progress_bar)
        both = None if bound is None else self._bound.with_more(bound)
        weights, keys = np.concatenate([self.log_weights, log_weights]), (*self._keys, _key_data(rng_key))
        return summarise(weights, both, self._source, keys)

    def print_summary(self, max_rows: int = 10) -> None:
        """Prints a table per datum (the ``max_rows`` with the largest k-hat) and in total, in nats and bits, and says
        in plain words what can be believed."""
        verdict, rows = self.verdict.ravel(), np.arange(self.value.size)
        shown = rows if len(rows) <= max_rows else np.argsort(-self.pareto_k.ravel(), kind="stable")[:max_rows]
        columns = (self.value, self.std_error, nats_to_bits(self.value), self.ess, self.pareto_k, self.bound, self.gap)
        table = np.stack([column.ravel() for column in columns], -1)
        names = ("datum", "log p", "error", "in bits", "ESS", "k-hat", "K", "log p - K")
        print("".join(f"{name:>11}" for name in names) + "  verdict")
        for row in shown:
            cells = "".join(f"{_in_digits(number, '.4g'):>11}" for number in table[row])
            print(f"{row:>11}{cells}  {verdict[row]}")
        if len(shown) < len(rows):
            print(f"{'':>7}(the {len(shown)} of {len(rows)} data with the largest k-hat)")
        of_one = np.hypot(self.std_error, self.bound_std_error)  # one datum has no spread over data
        for label, values, own in (
            ("log p", self.value, self.std_error),
            ("K", self.bound, self.bound_std_error),
            ("log p - K", self.gap, of_one),
        ):
            mean, error = float(values.mean()), _error_over_data(values) if values.size > 1 else float(own.item())
            bits = f"{nats_to_bits(mean):.4f} ± {_in_digits(nats_to_bits(error), '.4f')} bits"
            print(f"mean {label}: {mean:.4f} ± {_in_digits(error, '.4f')} nats, {bits}")
        print(self._in_words())

    def _in_words(self) -> str:
        counts = {verdict: int(np.sum(self.verdict == verdict)) for verdict in (BELIEVABLE, DOUBTFUL, BOUND_ONLY)}
        advice = {
            BELIEVABLE: "log p and its errors can be quoted",
            DOUBTFUL: "quote log p with this warning, or add trajectories (.extend) until it is believable",
            BOUND_ONLY: "quote K; log p is at least as high, but by how much these trajectories cannot tell "
            f"(with 95 % confidence each log p is above its value less {-math.log(0.05):.2f} nats)",
        }[self.total_verdict]
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return f"{self.num_trajectories} trajectories per datum; {found}. In total {self.total_verdict}: {advice}."

    def to_arviz(self, *, dims: Sequence[str] | None = None, coords: Mapping[str, Any] | None = None) -> Any:
        """For ArviZ: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x), in nats.

        The trajectories are independent; they are dealt into four chains (or two, or one, as their number divides).

        ``posterior``
            ``log_prob``: what the trajectories leave open about log p, by the Bayesian bootstrap (Rubin 1981), as many
            draws as trajectories, stretched to the spread ``std_error``. ``az.summary`` gives its mean, that standard
            deviation and an interval; NaN where ``std_error`` is. The draws are independent, so that ``az.rhat`` and
            ``az.ess`` say nothing of the weights, whose own ESS is in ``estimate``.
        ``sample_stats``
            ``log_weight`` of each trajectory. ``az.summary(..., group="sample_stats")`` has their mean, which is K
            for continuous data.
        ``observed_data``
            ``x``, in data units.
        ``estimate``
            ``value``, ``psis_value``, ``std_error``, ``ess``, ``pareto_k``, ``bound``, ``bound_std_error``, ``gap`` and
            ``verdict`` per datum.

        There is no ``log_likelihood`` group: the weights of one datum's trajectories are not its likelihood under draws
        of a parameter, and ``az.loo`` refuses instead of misleading.

        :param dims: names of the data's batch axes; by default ``datum``, or ``datum_dim_0``, ``datum_dim_1``, ….
        :param coords: coordinates by the names of axes, the event's being ``x_dim_0``, ``x_dim_1``, ….
        """
        import xarray

        batch_dims, event_dims = self._dims(dims)
        sizes = dict(zip(batch_dims + event_dims, self._source.x.shape, strict=True))
        coords = {name: np.arange(size) for name, size in sizes.items()} | dict(coords or {})
        if unknown := coords.keys() - sizes.keys():
            raise ValueError(f"coords must be for axes among {list(sizes)}; got {sorted(unknown)}")
        num_chains = next(n for n in (4, 2, 1) if self.num_trajectories % n == 0)
        draws = {"chain": np.arange(num_chains), "draw": np.arange(self.num_trajectories // num_chains)}

        def dataset(axes: Sequence[str], variables: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> Any:
            used = {name: values for name, values in coords.items() if name in axes} | dict(extra or {})
            return xarray.Dataset({name: (axes, values) for name, values in variables.items()}, used)

        per_draw = ["chain", "draw", *batch_dims]
        shape = (num_chains, -1, *self.value.shape)
        groups = {
            "posterior": dataset(per_draw, {"log_prob": self._bootstrap().reshape(shape)}, draws),
            "sample_stats": dataset(per_draw, {"log_weight": self.log_weights.reshape(shape)}, draws),
            "observed_data": dataset(batch_dims + event_dims, {"x": np.asarray(self._source.x)}),
            "estimate": dataset(batch_dims, {name: getattr(self, name) for name in _PER_DATUM}),
        }
        attrs = {"units": "nats", "num_trajectories": self.num_trajectories, "good_k": self.good_k}
        groups["estimate"].attrs |= attrs
        return inference_data.inference_data(groups, {**attrs, "inference_library": "pp_diffusion"})

    def to_elpd(self) -> Any:
        """ArviZ's ``ELPDData`` of the log densities, for ``az.plot_khat`` and, of several models, ``az.compare``.

        ArviZ may call them ``loo``. Nothing is left out here: they are log densities of data that the model has not
        seen, if that is what ``x`` was.
        """
        import xarray

        dims, _ = self._dims(None)
        coords = {name: np.arange(size) for name, size in zip(dims, self.value.shape, strict=True)}
        log_prob, pareto_k = (xarray.DataArray(values, coords, dims) for values in (self.value, self.pareto_k))
        return inference_data.elpd_data(log_prob, pareto_k, self.good_k, self.num_trajectories)

    def _dims(self, dims: Sequence[str] | None) -> tuple[list[str], list[str]]:
        ndim = self.value.ndim
        if dims is None:
            dims = ["datum"] if ndim == 1 else [f"datum_dim_{i}" for i in range(ndim)]
        if isinstance(dims, str) or len(dims) != ndim:
            raise ValueError(f"dims must name the data's {ndim} batch axes; got {dims!r}")
        event_dims = [f"x_dim_{i}" for i in range(self._source.x.ndim - ndim)]
        taken = {"chain", "draw", *event_dims}
        if len(set(dims)) < ndim or taken & set(dims):
            raise ValueError(f"dims must be distinct and none of {sorted(taken)}; got {dims!r}")
        return list(dims), event_dims

    def _bootstrap(self, num_batches: int = 64) -> np.ndarray:
        """Draws of log p by the Bayesian bootstrap over batches of trajectories, shaped like ``log_weights``.

        Their spread is made ``std_error``: few batches, and what the sample has not met, leave it too small.
        """
        count = self.num_trajectories
        with np.errstate(invalid="ignore"):  # NaN, as below, where no trajectory has any weight
            relative = np.exp(self.log_weights.reshape(count, -1) - self.value.ravel())
        starts = np.unique(np.linspace(0, count, num_batches, endpoint=False).astype(int))
        sums, sizes = np.add.reduceat(relative, starts), np.diff([*starts, count])
        generator, draws = np.random.default_rng(0), np.empty((count, sums.shape[1]))
        for datum, value in enumerate(self.value.ravel()):
            shares = generator.standard_exponential((count, len(starts)))
            draws[:, datum] = value + np.log(shares @ sums[:, datum]) - np.log(shares @ sizes)
        spread = draws.std(0) if count > 1 else np.ones(draws.shape[1])
        stretch = np.divide(self.std_error.ravel(), spread, out=np.full_like(spread, np.nan), where=spread > 0)
        draws = draws.mean(0) + (draws - draws.mean(0)) * stretch
        draws[:, ~(self.pareto_k.ravel() < MAX_PARETO_K)] = np.nan
        return draws.reshape(self.log_weights.shape)


def estimate_log_prob(
    rng_key: Array,
    prior: DiffusionPrior,
    x: Any,
    num_trajectories: int = 256,
    *,
    chunk_size: int = 16_384,
    progress_bar: bool = False,
) -> LogProbEstimate:
    r"""The log likelihood :math:`\log p(x)` per datum, by the paper's average over forward trajectories (eq. 9).

    Trajectories are drawn in posterior order and streamed: time is T network calls per trajectory and datum. The
    device's memory is that of one step of ``chunk_size`` trajectories, whatever T and ``num_trajectories``; the host
    keeps the log weights, a number per trajectory and datum, and a few arrays like it while it sums them up.

    :param rng_key: a JAX random key.
    :param prior: ``fit.prior`` or ``diffusion.prior(params)``; one with a context has the data's batch shape.
    :param x: data in data units, shape ``(*batch, *event_shape)``.
    :param num_trajectories: trajectories per datum. With less than 25, k-hat and a standard error cannot be told.
    :param chunk_size: trajectories at a time, of all data together; any number. It also decides which random numbers
        are drawn.
    :param progress_bar: shows one, over chunks.
    :raises ValueError: for data outside the support, NaN, or of the wrong shape, and numbers that are not positive.
    :raises FloatingPointError: if the model gives weights that are not finite.

    .. doctest::

        >>> import jax, jax.numpy as jnp, pp_diffusion as ppd
        >>> exact = ppd.Diffusion(  # the exact reverse process of standard normal data
        ...     ppd.GaussianKernel((1,)),
        ...     ppd.FixedSchedule.constant_erasure(10),
        ...     lambda x_t, t: (jnp.sqrt(1 - 1 / (11 - t))[..., None] * x_t, jnp.ones_like(x_t) / (11 - t)[..., None]),
        ...     parameterization="direct",
        ...     last_step="network",
        ... ).prior({})
        >>> estimate = ppd.estimate_log_prob(jax.random.key(0), exact, jnp.array([[0.0], [1.0]]), 100)
        >>> print(estimate.value.round(4), estimate.verdict)  # every weight is the density itself
        [-0.9189 -1.4189] ['believable' 'believable']
    """
    check_prior(prior)
    check_key(rng_key)
    x = prior.space.check(x)
    *_, batch_shape = as_rows(prior, x)
    x = jnp.broadcast_to(x, batch_shape + prior.event_shape)
    source = Trajectories(prior, x, positive_int("chunk_size", chunk_size))
    return summarise(*source.draw(rng_key, num_trajectories, progress_bar), source, (_key_data(rng_key),))


def summarise(
    log_weights: np.ndarray, bound: BoundOfBits | None, source: Trajectories, keys: tuple[np.ndarray, ...] = ()
) -> LogProbEstimate:
    """The estimate that log weights of shape ``(num_trajectories, *batch)`` tell."""
    count, batch_shape = len(log_weights), log_weights.shape[1:]
    flat = log_weights.reshape(count, -1)
    smoothed, pareto_k = inference_data.pareto_smooth(flat)
    value = _log_mean_exp(flat)
    with np.errstate(divide="ignore", invalid="ignore"):  # one trajectory has no error; no weight at all has no mean
        relative = np.exp(flat - value)
        squares = (relative - 1) ** 2
        farthest = squares.max(0) if bound is None else np.maximum(squares.max(0), 1)  # an unseen weight of zero
        error = np.sqrt(squares.sum(0) / (count - 1) / count + farthest / count**2)
        ess = count / (relative**2).mean(0)
        if bound is None:
            bound = BoundOfBits(log_weights.mean(0), np.sqrt(log_weights.var(0) / (np.asarray(count) - 1)), count)
    return LogProbEstimate(
        value=value.reshape(batch_shape),
        psis_value=_log_mean_exp(smoothed).reshape(batch_shape),
        std_error=np.where(pareto_k < MAX_PARETO_K, error, np.nan).reshape(batch_shape),
        ess=ess.reshape(batch_shape),
        pareto_k=pareto_k.reshape(batch_shape),
        bound=bound.value,
        bound_std_error=bound.std_error,
        log_weights=log_weights,
        _bound=bound,
        _source=source,
        _keys=keys,
    )


def _key_data(rng_key: Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(rng_key) if is_key(rng_key) else rng_key)


def _log_mean_exp(log_weights: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(log_weights, axis=0) - math.log(len(log_weights))


def _good_k(num_draws: int) -> float:
    return min(1 - 1 / math.log10(num_draws), MAX_PARETO_K) if num_draws > 1 else -math.inf


def _in_digits(number: float, digits: str) -> str:
    return "unknown" if math.isnan(number) else format(number, digits)


def _error_over_data(values: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):  # a datum without any weight
        return float(values.std(ddof=1)) / math.sqrt(values.size)
