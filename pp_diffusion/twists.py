r"""Twists: positive functions :math:`r_t(x_t)` that lead particles to where r(x) is large.

Particles follow :math:`\tilde p(x_{t-1} \mid x_t) \propto p(x_{t-1} \mid x_t)\, r_{t-1}(x_{t-1})`, as nearly as it can
be drawn from (the paper, eq. 22), and are weighted by what that leaves out: the normalisers that the paper drops. A
twist therefore moves the variance, never the target. ``"constant"`` and ``"annealed"`` are the paper's: r of the state
itself, and its power (T - t)/T. ``"lookahead"`` is r at :math:`E[x_0 \mid x_t]`. ``"moment"`` averages r over the
normal distribution with that mean and Tweedie's covariance.

Particles are arrays of shape ``(P, S, …)``, as in :mod:`~pp_diffusion.factors`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.factors import CONSTANT, EXACT, FACTOR, MOMENTS, OTHER, Exact, Factors, Latents, Reading
from pp_diffusion.frozen import Frozen
from pp_diffusion.matrices import cholesky, einsum, half_log_det, solve, solve_lower
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.schedules import Rates

#: Up to so many observed numbers per x, the moment twist keeps their whole covariance; above, products with it.
MOST_ROWS = 64
#: Below this log-SNR, Tweedie's covariance is taken from the variance of the reverse step, not from the Jacobian.
LEAST_LOG_SNR = -12.0
#: The share of the variance that positive matrices have to keep in any direction.
LEAST_VARIANCE = 1e-3
#: By so much at most, the paper's perturbation changes a bit's log odds.
LARGEST_TILT = 10.0
#: Up to so many bits, r is averaged over all words.
MOST_BITS = 8
#: By so many numbers at most, x times observations, many observations are told by fewer.
MOST_ENTRIES = 2**14
#: Random directions along which variances of more observations than that are found.
NUM_PROBES = 16
#: Steps of conjugate gradients for their means.
NUM_GRADIENTS = 6
#: Draws of x_0 over which r is averaged where it has no closed form.
NUM_DRAWS = 32


class Prediction(NamedTuple):
    r"""What a reverse step knows at :math:`x_t`.

    :ivar x_t: states of the model's space, shape ``(P, S, *state_shape)``.
    :ivar rates: of step t.
    :ivar reverse: :math:`p(x_{t-1} \mid x_t)`.
    :ivar x_0: :math:`E[x_0 \mid x_t]`; for bits, their probabilities.
    :ivar variance: :math:`\mathrm{Var}(x_0 \mid x_t)` per coordinate, as the reverse step's variance has it.
    :ivar covariance: products of a v of the states' shape with Tweedie's covariance,
        :math:`\mathrm{Cov}(x_0 \mid x_t)\, v = \tfrac{1 - \bar\alpha_t}{\sqrt{\bar\alpha_t}} J^\top v`, J being the
        Jacobian of :math:`E[x_0 \mid x_t]`.
    :ivar slope: of the mean of :math:`x_{t-1}` in :math:`x_0`.
    :ivar is_last: whether :math:`x_{t-1}` is :math:`x_0`.
    """

    x_t: Array
    rates: Rates
    reverse: dist.Distribution
    x_0: Array
    variance: Array
    covariance: Callable[[Array], Array]
    slope: Array
    is_last: bool


def predict(process: ReverseProcess, x_t: Array, rates: Rates) -> Prediction:
    """The reverse step t >= 2 at these states, by one call of the network."""
    kernel = process.kernel
    if kernel.is_discrete:
        reverse = process(x_t, rates)
        mean = kernel.x_0_given(x_t, reverse, rates).mean
        return Prediction(x_t, rates, reverse, mean, mean * (1 - mean), lambda v: v, jnp.ones(()), False)

    def mean_and_all(x_t: Array) -> tuple[Array, Any]:
        reverse = process(x_t, rates)
        x_0 = kernel.x_0_given(x_t, reverse, rates)
        return x_0.mean, (reverse, x_0.variance)

    mean, pull, (reverse, variance) = jax.vjp(mean_and_all, x_t, has_aux=True)
    by_jacobian = rates.log_snr > LEAST_LOG_SNR
    factor = rates.erased / jnp.sqrt(jnp.where(by_jacobian, rates.alpha_bar, 1.0))

    def covariance(v: Array) -> Array:
        return jnp.where(by_jacobian, factor * pull(v)[0], variance * v)

    slope = jnp.sqrt(rates.previous_alpha_bar) * rates.innovation
    return Prediction(x_t, rates, reverse, mean, variance, covariance, slope, False)


def predict_last(process: ReverseProcess, x_1: Array) -> Prediction:
    r"""The last step, :math:`p(x_0 \mid x_1)`: its own mean and variance are those of :math:`x_0`."""
    return _as_prediction(process, x_1, process.rates.at(0), process.last(x_1))


def predict_start(process: ReverseProcess, batch_shape: tuple[int, ...]) -> Prediction:
    r"""The start, :math:`\pi(x_T)`, as a step from nowhere."""
    stationary = process.kernel.stationary().expand(batch_shape)
    nowhere = process.kernel.as_state(jnp.zeros(stationary.shape()))
    return _as_prediction(process, nowhere, process.rates.at(-1), stationary)


def _as_prediction(process: ReverseProcess, x: Array, rates: Rates, step: dist.Distribution) -> Prediction:
    variance = step.variance
    return Prediction(x, rates, step, step.mean, variance, lambda v: variance * v, jnp.ones(()), True)


class NormalGuide(NamedTuple):
    r"""A normal step :math:`p(x_{t-1} \mid x_t)`, conditioned on K normal observations of its own noise n:
    :math:`e = C n + N(0, E)`. Then n is normal with mean :math:`C^\top S^{-1} e + s`, :math:`S = C C^\top + E`, and
    covariance :math:`I - C^\top S^{-1} C`.

    :ivar mean: of p; shape ``(P, S, D)``, as all that has D.
    :ivar scale: its standard deviations.
    :ivar rows: C but for ``share``, shape ``(P, S, K, D)``.
    :ivar share: what of the rows is C, shape ``(P, S, 1)``; zero for a step without observations.
    :ivar root: the Cholesky factor of S, shape ``(P, S, K, K)``.
    :ivar rest: that of E, which C leaves of S.
    :ivar residual: e, shape ``(P, S, K)``.
    :ivar shift: s, by the gradient of what is not normal (eq. 61); ``None`` for zero.
    :ivar log_known: log density of coordinates that are set, not drawn; shape ``(P, S)``.
    """

    mean: Array
    scale: Array
    rows: Array
    share: Array
    root: Array
    rest: Array
    residual: Array
    shift: Array | None
    log_known: Array

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p - log of the density that they are drawn from."""
        free_key, rest_key = jax.random.split(rng_key)
        free = jax.random.normal(free_key, self.mean.shape, self.mean.dtype)
        rows, share, root, rest = self.rows, self.share, self.root, self.rest
        noise = einsum("pskl,psl->psk", rest, jax.random.normal(rest_key, self.residual.shape, free.dtype))
        seen = jnp.where(share > 0, share * einsum("pskd,psd->psk", rows, free), 0.0)
        along = solve(root, seen + noise)
        weights = solve(root, self.residual)
        moved = jnp.where(share > 0, einsum("pskd,psk->psd", rows, share * (weights - along)), 0.0)
        # of n less its mean: C (n - mean) = E along - noise, so that nothing of length D has to be computed again
        around = einsum("pskl,psml,psm->psk", rest, rest, along) - noise
        of_rest = solve_lower(rest, around)
        of_mean = solve_lower(root, self.residual)
        left = einsum("psml,psm->psl", rest, weights)
        log_ratio = 0.5 * ((of_rest**2).sum(-1) - (of_mean**2).sum(-1) + (left**2).sum(-1)) - (weights * around).sum(-1)
        log_ratio += half_log_det(rest) - half_log_det(root) + self.log_known
        if self.shift is not None:  # the mean is that much further
            log_ratio -= (self.shift * (free + moved + 0.5 * self.shift)).sum(-1)
            moved += self.shift
        return (self.mean + self.scale * (free + moved)).reshape(shape), log_ratio

    def where(self, condition: Array) -> NormalGuide:
        """Unguided where ``condition``, of shape ``(P, S)``, does not hold."""

        def choose(part: Array, otherwise: Any) -> Array:
            return jnp.where(condition.reshape(condition.shape + (1,) * (part.ndim - 2)), part, otherwise)

        identity = jnp.eye(self.root.shape[-1], dtype=self.root.dtype)
        return self._replace(
            share=choose(self.share, 0.0),
            root=choose(self.root, identity),
            rest=choose(self.rest, identity),
            residual=choose(self.residual, 0.0),
            shift=None if self.shift is None else choose(self.shift, 0.0),
        )

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, S)``."""
        fine = jnp.ones(self.mean.shape[:2], bool)
        for part in jax.tree.leaves((self.root, self.rest, self.residual, self.shift)):
            fine &= jnp.isfinite(part).all(tuple(range(2, part.ndim)))
        return fine


class DiagonalGuide(NamedTuple):
    r"""A normal step :math:`p(x_{t-1} \mid x_t)`, drawn with another mean and smaller standard deviations.

    :ivar mean: of p; shape ``(P, S, D)``, as all that has D.
    :ivar scale: its standard deviations.
    :ivar shift: of the draws' mean, in those.
    :ivar spread: of the draws' standard deviations, in those.
    :ivar log_known: log density of coordinates that are set, not drawn; shape ``(P, S)``.
    """

    mean: Array
    scale: Array
    shift: Array
    spread: Array
    log_known: Array

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p - log of the density that they are drawn from."""
        free = jax.random.normal(rng_key, self.mean.shape, self.mean.dtype)
        noise = self.shift + self.spread * free
        log_ratio = (0.5 * (free - noise) * (free + noise) + jnp.log(self.spread)).sum(-1)
        return (self.mean + self.scale * noise).reshape(shape), log_ratio + self.log_known

    def where(self, condition: Array) -> DiagonalGuide:
        """Unguided where ``condition``, of shape ``(P, S)``, does not hold."""
        holds = condition[..., None]
        return self._replace(shift=jnp.where(holds, self.shift, 0.0), spread=jnp.where(holds, self.spread, 1.0))

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, S)``."""
        return (jnp.isfinite(self.shift) & jnp.isfinite(self.spread)).all(-1)


class BitsGuide(NamedTuple):
    """A step over bits, and the one that is drawn from.

    :ivar reverse: logits of :math:`p(x_{t-1} | x_t)`.
    :ivar guided: logits of the draws.
    """

    reverse: Array
    guided: Array

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p - log of the probability that they are drawn with."""
        ones = jax.random.bernoulli(rng_key, jax.nn.sigmoid(self.guided))
        p, m = (jax.nn.log_sigmoid(jnp.where(ones, logits, -logits)) for logits in self)
        return ones.astype(self.guided.dtype).reshape(shape), (p - m).sum(-1)

    def where(self, condition: Array) -> BitsGuide:
        """Unguided where ``condition``, of shape ``(P, S)``, does not hold."""
        return self._replace(guided=jnp.where(condition[..., None], self.guided, self.reverse))

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, S)``."""
        return jnp.isfinite(self.guided).all(-1)


Guide = NormalGuide | DiagonalGuide | BitsGuide


class Guided(NamedTuple):
    """A twist at some particles: its log value, shape ``(P, S)``, and the step that it proposes."""

    log_twist: Array
    guide: Guide


class Twist(Frozen):
    """Base class of twists.

    :ivar name: as :class:`~pp_diffusion.SMC` takes it.
    :ivar starts: whether the twist guides the start, :math:`x_T`, too.
    """

    name: str = ""
    starts: bool = False

    def check(self, factors: Factors) -> None:
        """Refuses a model that the twist cannot serve."""

    def rules(self, factors: Factors) -> dict[str, str]:
        """In words, what the twist makes of each observed site."""
        return {site.name: "r itself" for site in factors.observed}

    @abstractmethod
    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        r"""The value :math:`r_t(x_t)`, and a step to :math:`x_{t-1}`.

        :param rng_key: the same at each call, so that a twist that averages over draws is a function of :math:`x_t`.
        """
        raise NotImplementedError


class Power(Twist):
    """The paper's: r of the state itself, or a power of it that grows as t falls.

    :param name: ``"constant"`` or ``"annealed"``.
    """

    def __init__(self, name: str) -> None:
        self._set(name=name, starts=name == "constant")

    def check(self, factors: Factors) -> None:
        _refuse_exact(self.name, factors)

    def _power(self, t: Array | int, num_timesteps: int) -> Array:
        return jnp.ones(()) if self.name == "constant" else 1 - jnp.asarray(t, dtype=float) / num_timesteps

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        total = factors.prior.num_timesteps
        t = prediction.rates.t
        power, next_power = self._power(t, total), self._power(t - 1, total)
        log_r = factors.read(prediction.x_t, latents).log_r
        log_twist = jnp.where(power > 0, power * log_r, 0.0)
        if factors.is_discrete:
            return Guided(log_twist, _perturbed(factors, prediction, latents, next_power, rng_key))
        return Guided(log_twist, _conditioned(factors, exact, _without_look(prediction), latents, next_power).guide)


class Lookahead(Twist):
    r"""r at :math:`E[x_0 \mid x_t]` (Wu et al. 2023), with steps shifted by its gradient; for bits, r averaged over
    draws of them."""

    name = "lookahead"

    def check(self, factors: Factors) -> None:
        _refuse_exact(self.name, factors)

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        if factors.is_discrete:
            return _averaged_bits(factors, prediction, latents, rng_key)
        log_r, pull = jax.vjp(lambda z: factors.read(z, latents).log_r, prediction.x_0)
        (gradient,) = pull(jnp.ones_like(log_r))
        return Guided(log_r, _shifted(prediction, gradient))


class Moment(Twist):
    r"""r averaged over x_0 given :math:`x_t`: a normal distribution with Tweedie's mean and covariance.

    Sites ``Normal`` and ``MultivariateNormal`` are linearised at :math:`E[x_0 \mid x_t]`, which is exact where they are
    affine in x; other sites that have a mean and a variance are taken for normal ones with these; ``numpyro.factor``
    and the rest are averaged over draws, with the covariance's diagonal. Bits: exactly, where each observed number
    depends on one bit at most, and else over draws.

    :param most_rows: up to so many observed numbers per x, a vector-Jacobian product for each of them gives their whole
        covariance. Above, they are told by as many numbers as x has, if these are no more than that; else means come
        by a few steps of conjugate gradients, and variances number by number.
    """

    name = "moment"
    most_rows: int

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        if isinstance(most_rows, bool) or not isinstance(most_rows, int) or most_rows < 0:
            raise ValueError(f"most_rows must be an integer >= 0; got {most_rows!r}")
        self._set(most_rows=most_rows)

    def rules(self, factors: Factors) -> dict[str, str]:
        if factors.is_discrete:
            over = "all words" if math.prod(factors.state_shape) <= MOST_BITS else f"{NUM_DRAWS} draws"
            rule = f"averaged over {over}" if factors.owner is None else "bit by bit, in closed form"
            return {site.name: rule for site in factors.observed}
        averaged = f"averaged over {NUM_DRAWS} draws"
        words = {OTHER: averaged, FACTOR: averaged, EXACT: "coordinates known exactly"}
        words |= {MOMENTS: "taken for normal, by its mean and variance", CONSTANT: "constant"}
        found = {site.name: words.get(site.kind, "linearised, normal") for site in factors.observed}
        if factors.num_rows <= self.most_rows:
            return found
        unaffected = {site.name for site in factors.observed if site.kind in (OTHER, FACTOR, CONSTANT)}
        size, num_known = math.prod(factors.state_shape), factors.count_rows((EXACT,))
        if _fit_coordinates(factors.num_rows, num_known, size, self.most_rows):
            many = f"; {factors.num_rows - num_known} numbers by {size} that say the same"
        else:
            many = f"; {factors.num_rows} numbers by conjugate gradients"
        return {name: rule if name in unaffected else rule + many for name, rule in found.items()}

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        if factors.is_discrete:
            if factors.owner is None:
                return _averaged_bits(factors, prediction, latents, rng_key)
            return _per_bit(factors, prediction, latents)
        return _conditioned(factors, exact, prediction, latents, jnp.ones(()), rng_key, most_rows=self.most_rows)


class _Once:
    """Equal to nothing else."""


class Custom(Twist):
    """A user's: a function of a :class:`Prediction` and of log r as a function of x.

    :param function: ``(prediction, log_r) -> log r_t``, of shape ``(P, S)``; ``log_r(z)`` takes states of the model's
        space. It is traced once for each :class:`~pp_diffusion.SMC`: what it refers to must not change in between.
    """

    function: Callable
    trace: Any

    def __init__(self, function: Callable) -> None:
        # programs of another one are not taken for this one's, whose globals may have changed
        self._set(name=getattr(function, "__name__", "custom"), function=function, trace=_Once())

    def check(self, factors: Factors) -> None:
        _refuse_exact(self.name, factors)

    def __call__(
        self, factors: Factors, exact: Exact, prediction: Prediction, latents: Latents, rng_key: Array
    ) -> Guided:
        def log_r(z: Array) -> Array:
            return factors.read(z, latents).log_r

        def value(x_0: Array) -> Array:
            log_twist = self.function(prediction._replace(x_0=x_0), log_r)
            if jnp.shape(log_twist) != prediction.x_t.shape[:2]:
                raise ValueError(
                    f"twist must return an array of shape {prediction.x_t.shape[:2]}; got shape {jnp.shape(log_twist)}"
                )
            return log_twist

        if factors.is_discrete:
            logits = _flat_logits(prediction)
            return Guided(value(prediction.x_0), BitsGuide(logits, logits))
        log_twist, pull = jax.vjp(value, prediction.x_0)
        return Guided(log_twist, _shifted(prediction, pull(jnp.ones_like(log_twist))[0]))


TWISTS: dict[str, Twist] = {
    "constant": Power("constant"),
    "annealed": Power("annealed"),
    "lookahead": Lookahead(),
    "moment": Moment(),
}


def as_twist(twist: Any) -> Twist:
    """A twist by name, a function's, or itself; ``None`` is ``"moment"``.

    :raises ValueError: for an unknown name.
    """
    if twist is None:
        return TWISTS["moment"]
    if isinstance(twist, Twist):
        return twist
    if isinstance(twist, str) and twist in TWISTS:
        return TWISTS[twist]
    if callable(twist):
        return Custom(twist)
    raise ValueError(f"twist must be one of {', '.join(map(repr, TWISTS))}, or a function; got {twist!r}")


def _refuse_exact(name: str, factors: Factors) -> None:
    if factors.is_exact:  # r of a state, or at one prediction, is zero almost everywhere, and a twist is positive
        raise ValueError(f"twist must be 'moment' where coordinates are observed exactly; got {name!r}")


# --- continuous states ---------------------------------------------------------------------------------------------


def _without_look(prediction: Prediction) -> Prediction:
    r"""With :math:`x_{t-1}` in the place of :math:`x_0`: for twists of the state itself."""
    variance = prediction.reverse.variance
    return prediction._replace(
        x_0=prediction.reverse.mean,
        variance=variance,
        covariance=lambda v: variance * v,
        slope=jnp.ones(()),
        is_last=True,
    )


def _conditioned(
    factors: Factors,
    exact: Exact,
    prediction: Prediction,
    latents: Latents,
    power: Array,
    rng_key: Array | None = None,
    *,
    most_rows: int = MOST_ROWS,
) -> Guided:
    """The log of the average of r^power over the normal distribution of the prediction, and the step given r."""
    shape = prediction.x_0.shape
    batch, size = shape[:2], math.prod(shape[2:])
    scale = jnp.sqrt(prediction.reverse.variance)
    log_known = jnp.zeros(batch, scale.dtype)
    if prediction.is_last and exact.where.shape[-1]:
        prediction, scale, log_known = _set_known(exact, prediction, scale)
        exact = exact._replace(where=exact.where[:, :0], value=exact.value[:, :0], counts=exact.counts[:, :0])

    chains = batch[1] // len(exact.where)
    where, value, counts = (jnp.tile(a, (chains, 1)) for a in exact[:3])
    num_known = where.shape[-1]

    def seen(z: Array) -> tuple[Array, Reading]:
        reading = factors.read(z, latents)
        at = jnp.broadcast_to(where, (*batch, num_known))
        known = jnp.take_along_axis(z.reshape(*batch, size), at, -1)
        return jnp.concatenate([-reading.residual, jnp.where(counts, known, 0.0)], -1), reading

    at_mean, pull, reading = jax.vjp(seen, prediction.x_0, has_aux=True)
    num_rows = at_mean.shape[-1]
    known_residual = jnp.where(counts, value, 0.0) - at_mean[..., num_rows - num_known :]
    residual = jnp.concatenate([reading.residual, known_residual], -1)
    unused = jnp.broadcast_to(jnp.where(counts, 0.0, 1.0), (*batch, num_known)).astype(scale.dtype)
    noise = jnp.concatenate([reading.noise / jnp.maximum(power, jnp.finfo(scale.dtype).tiny), unused], -1)
    log_value = reading.correction + log_known + 0.5 * math.log(2 * math.pi) * unused.sum(-1)
    gradient = jnp.zeros(shape, scale.dtype)
    has_other = any(site.kind in (OTHER, FACTOR) for site in factors.observed)
    if has_other:
        log_other, of_other = _averaged(factors, prediction, latents, rng_key)
        log_value += log_other
        gradient += power * of_other
    if num_rows == 0:
        return Guided(log_value, _shifted(prediction, gradient, log_known))
    seen_noise, seen_variance = noise, None
    if num_rows > most_rows:
        _, push = jax.linearize(lambda z: seen(z)[0], prediction.x_0)
        many = _Rows(residual, noise, push, lambda v: pull(v)[0])
        if not _fit_coordinates(num_rows, num_known, size, most_rows):
            log_many, seen_variance, guide = _by_many_rows(prediction, many, gradient, log_known)
            return Guided(log_value + log_many + _discrepancy(reading.discrepancy, noise, seen_variance), guide)
        few, log_rest, seen_variance = _in_coordinates(prediction, many, num_known)
        residual, noise, pull_row = few.residual, few.noise, few.pull
        log_value, num_rows = log_value + log_rest, residual.shape[-1]
    else:

        def pull_row(seed: Array) -> Array:
            return pull(seed)[0]

    # the observations' rows: gradients of what is observed, and their products with the covariance of x_0
    def flat(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(num_rows, *batch, size), 0, 2)

    seeds = jnp.eye(num_rows, dtype=scale.dtype)[:, None, None]
    unflat_rows = jax.vmap(pull_row)(jnp.broadcast_to(seeds, (num_rows, *batch, num_rows)))
    noise = noise[..., None] * jnp.eye(num_rows, dtype=noise.dtype)
    # on a CPU, one product after the other was seen to be three times faster
    one_by_one, at_once = partial(jax.lax.map, prediction.covariance), jax.vmap(prediction.covariance)
    products = flat(jax.lax.platform_dependent(unflat_rows, cpu=one_by_one, default=at_once))
    rows, scale = flat(unflat_rows), scale.reshape(*batch, size)
    spread = einsum("pskd,psld->pskl", rows, products)
    if prediction.is_last:
        cross, share = rows * scale[..., None, :], jnp.ones((*batch, 1, 1), scale.dtype)
        root, rest = cholesky(noise + spread), cholesky(noise)
    else:
        # with the variances of x_0 alone, everything is positive; the Jacobian adds to it as much as it can be trusted
        variance = prediction.variance.reshape(*batch, 1, size)
        spread, trust = _trusted(spread, noise, lambda: einsum("pskd,psld->pskl", rows, rows * variance))
        cross = prediction.slope * (trust * products + (1 - trust) * rows * variance) / scale[..., None, :]
        taken = einsum("pskd,psld->pskl", cross, cross)
        share = _largest(lambda t: noise + (1 - LEAST_VARIANCE) * spread - t**2 * taken)
        root, rest = cholesky(noise + spread), cholesky(noise + spread - share**2 * taken)
    white = solve_lower(root, residual)
    log_value += -0.5 * (white**2).sum(-1) - half_log_det(root) - 0.5 * num_rows * math.log(2 * math.pi)
    if seen_variance is None:
        seen_variance = jnp.diagonal(noise + spread, axis1=-2, axis2=-1)
    log_value += _discrepancy(reading.discrepancy, seen_noise, seen_variance)
    shift = _in_noise(prediction, gradient).reshape(*batch, size) if has_other else None
    mean = (prediction.x_0 if prediction.is_last else prediction.reverse.mean).reshape(*batch, size)
    return Guided(log_value, NormalGuide(mean, scale, cross, share[..., 0], root, rest, residual, shift, log_known))


class _Rows(NamedTuple):
    """Numbers observed of x_0, each with noise of its own: their gradients by products only.

    :ivar residual: shape ``(P, S, K)``.
    :ivar noise: variances.
    :ivar push: of a change of x_0, what is observed of it.
    :ivar pull: its transpose.
    """

    residual: Array
    noise: Array
    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]


def _fit_coordinates(num_rows: int, num_known: int, size: int, most_rows: int) -> bool:
    """Whether more rows than that can be told by no more numbers than x has, as the many of a regression."""
    return size + num_known <= most_rows and (num_rows - num_known) * size <= MOST_ENTRIES


def _in_coordinates(prediction: Prediction, rows: _Rows, num_known: int) -> tuple[_Rows, Array, Array]:
    r"""As many noisy observations as there are coordinates, which say all that K do: of :math:`L^\top x_0`, with unit
    noise, for :math:`L L^\top = R^\top E^{-1} R`. What is known exactly follows, as it is.

    Also what is left of the log density, which depends on the residuals alone, and the K variances.
    """
    shape = prediction.x_0.shape
    batch, size = shape[:2], math.prod(shape[2:])
    num_noisy = rows.residual.shape[-1] - num_known
    basis = jnp.eye(size, dtype=rows.noise.dtype).reshape(size, 1, 1, *shape[2:])
    columns = jax.vmap(rows.push)(jnp.broadcast_to(basis, (size, *shape)))
    variance = prediction.variance.reshape(*batch, size)
    seen_variance = rows.noise + einsum("dpsk,psd->psk", columns**2, variance)
    residual, noise, columns = rows.residual[..., :num_noisy], rows.noise[..., :num_noisy], columns[..., :num_noisy]
    information = einsum("dpsk,epsk->psde", columns / noise, columns)
    least = 1e-6 * jnp.trace(information, axis1=-2, axis2=-1)[..., None, None] / size  # of what none of them shows
    root = cholesky(information + (least + jnp.finfo(noise.dtype).tiny) * jnp.eye(size, dtype=noise.dtype))
    told = solve_lower(root, einsum("dpsk,psk->psd", columns, residual / noise))
    log_rest = 0.5 * ((told**2).sum(-1) - (residual**2 / noise + jnp.log(2 * math.pi * noise)).sum(-1))
    log_rest += 0.5 * size * math.log(2 * math.pi)

    def pull(v: Array) -> Array:
        of_known = jnp.concatenate([jnp.zeros((*batch, num_noisy), v.dtype), v[..., size:]], -1)
        return einsum("psde,pse->psd", root, v[..., :size]).reshape(shape) + rows.pull(of_known)

    few = _Rows(
        jnp.concatenate([told, rows.residual[..., num_noisy:]], -1),
        jnp.concatenate([jnp.ones_like(told), rows.noise[..., num_noisy:]], -1),
        rows.push,
        pull,
    )
    return few, log_rest, seen_variance


def _by_many_rows(
    prediction: Prediction, rows: _Rows, gradient: Array, log_known: Array
) -> tuple[Array, Array, DiagonalGuide]:
    """The log density of the observations, their variances, and the step given them.

    The mean by a few steps of conjugate gradients, each with one product with the covariance; variances row by row and
    coordinate by coordinate. That is exact where each coordinate is observed by itself and the covariance is diagonal.
    """
    variance = prediction.variance
    batch, shape = variance.shape[:2], variance.shape[2:]
    keys = jax.random.split(jax.random.key(0))
    signs = jax.random.rademacher(keys[0], (NUM_PROBES, *shape), variance.dtype)[:, None, None]
    total = rows.noise + (jax.vmap(rows.push)(signs * jnp.sqrt(variance)) ** 2).mean(0)
    # of each coordinate's variance, what its rows explain if each of them did so by itself
    signs = jax.random.rademacher(keys[1], (NUM_PROBES, rows.noise.shape[-1]), variance.dtype)[:, None, None]
    explained = jax.vmap(rows.pull)(signs / jnp.sqrt(total)) ** 2 * variance
    low, share, high = explained.min(0), explained.mean(0), explained.max(0)
    # the signs do not matter to a single row; several may say the same, and too narrow a step is worse than a wide one
    kept = jnp.where(high - low <= 1e-3 * high, 1 - share, jnp.maximum(1 / (1 + share), 0.5))

    def product(v: Array) -> Array:
        return rows.noise * v + rows.push(prediction.covariance(rows.pull(v)))

    weights = _conjugate_gradients(product, rows.residual, total)
    log_value = -0.5 * ((rows.residual * weights).sum(-1) + jnp.log(2 * math.pi * total).sum(-1))
    along = _in_noise(prediction, gradient + rows.pull(weights))
    if prediction.is_last:
        spread = jnp.sqrt(jnp.clip(kept, 1e-6, 1.0))
        mean, scale = prediction.x_0, jnp.sqrt(variance)
    else:
        mean, scale = prediction.reverse.mean, jnp.sqrt(prediction.reverse.variance)
        taken = prediction.slope**2 * variance * (1 - kept) / scale**2
        spread = jnp.sqrt(jnp.clip(1 - taken, LEAST_VARIANCE, 1.0))
    mean, scale, along, spread = (a.reshape(*batch, -1) for a in (mean, scale, along, spread))
    return log_value, total, DiagonalGuide(mean, scale, along, spread, log_known)


def _conjugate_gradients(product: Callable[[Array], Array], target: Array, diagonal: Array) -> Array:
    """A few steps towards the solution v of ``product(v) = target``, for many at once; vectors in the last axis."""

    def step(_: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        v, left, direction, square = carry
        turned = product(direction)
        # a network's covariance need not be positive: a step is at most so much longer than the diagonal's
        least = (diagonal * direction**2).sum(-1) / 20
        length = square / jnp.maximum(jnp.maximum((direction * turned).sum(-1), least), jnp.finfo(v.dtype).tiny)
        v, left = v + length[..., None] * direction, left - length[..., None] * turned
        scaled = left / diagonal
        next_square = (left * scaled).sum(-1)
        ratio = jnp.where(square > 0, next_square / jnp.where(square > 0, square, 1.0), 0.0)
        return v, left, scaled + ratio[..., None] * direction, next_square

    start = target / diagonal
    carry = (jnp.zeros_like(target), target, start, (target * start).sum(-1))
    return jax.lax.fori_loop(0, NUM_GRADIENTS, step, carry)[0]


def _discrepancy(discrepancy: Array, noise: Array, variance: Array) -> Array:
    """What a density that was taken for normal differs by at the mean, as far as the noise makes up the spread."""
    count = discrepancy.shape[-1]
    return (noise[..., :count] / variance[..., :count] * jnp.clip(discrepancy, -5.0, 5.0)).sum(-1)


def _set_known(exact: Exact, prediction: Prediction, scale: Array) -> tuple[Prediction, Array, Array]:
    """The last step with the coordinates that are known set to their values, and the density of these."""
    shape = prediction.x_0.shape
    batch, size = shape[:2], math.prod(shape[2:])
    chains = batch[1] // len(exact.where)
    index, value, counts = (jnp.tile(a, (chains, 1)) for a in exact[:3])

    def row(mean: Array, scale: Array, index: Array, value: Array, counts: Array) -> tuple[Array, Array, Array]:
        log_prob = dist.Normal(mean[index], scale[index], validate_args=False).log_prob(value)
        at = jnp.where(counts, index, size)
        return (
            mean.at[at].set(value, mode="drop"),
            scale.at[at].set(0.0, mode="drop"),
            jnp.where(counts, log_prob, 0.0).sum(),
        )

    over_systems = jax.vmap(row)
    mean, known_scale, log_known = jax.vmap(lambda m, s: over_systems(m, s, index, value, counts))(
        prediction.x_0.reshape(*batch, size), scale.reshape(*batch, size)
    )
    known_scale = known_scale.reshape(shape)
    variance = known_scale**2
    prediction = prediction._replace(x_0=mean.reshape(shape), variance=variance, covariance=lambda v: variance * v)
    return prediction, known_scale, log_known


def _shifted(prediction: Prediction, gradient: Array, log_known: Array | None = None) -> DiagonalGuide:
    r"""The step with its mean shifted along a gradient by :math:`x_0` (eq. 61)."""
    batch = prediction.x_t.shape[:2]
    mean = prediction.x_0 if prediction.is_last else prediction.reverse.mean
    scale = jnp.sqrt(prediction.variance if prediction.is_last else prediction.reverse.variance)
    mean, scale, shift = (a.reshape(*batch, -1) for a in (mean, scale, _in_noise(prediction, gradient)))
    log_known = jnp.zeros(batch, mean.dtype) if log_known is None else log_known
    return DiagonalGuide(mean, scale, shift, jnp.ones_like(mean), log_known)


def _in_noise(prediction: Prediction, gradient: Array) -> Array:
    """The shift by a gradient, in units of the step's noise, at most about as long as that noise itself is."""
    if prediction.is_last:
        shift = jnp.sqrt(prediction.variance) * gradient
    else:
        shift = prediction.slope * prediction.covariance(gradient) / jnp.sqrt(prediction.reverse.variance)
    axes = tuple(range(2, shift.ndim))
    length = jnp.sqrt((shift**2).sum(axes, keepdims=True))
    most = 2 * math.sqrt(math.prod(shift.shape[2:])) + 2
    return jnp.where(jnp.isfinite(length), shift * jnp.minimum(1, most / jnp.maximum(length, 1e-9)), 0.0)


def _averaged(factors: Factors, prediction: Prediction, latents: Latents, rng_key: Array | None) -> tuple[Array, Array]:
    """The log of the mean of the sites' densities that have no normal form, over fixed draws, and its gradient."""

    def value(z: Array) -> Array:
        if rng_key is None:  # a twist of the state itself
            return factors.read(z, latents).log_other
        half = jax.random.normal(rng_key, (NUM_DRAWS // 2, *factors.state_shape), z.dtype)
        spread = jnp.sqrt(prediction.variance) * jnp.concatenate([half, -half])[:, None, None]
        log_r = jax.vmap(lambda d: factors.read(z + d, latents).log_other)(spread)
        return jax.nn.logsumexp(jnp.where(jnp.isnan(log_r), -jnp.inf, log_r), axis=0) - math.log(NUM_DRAWS)

    log_other, pull = jax.vjp(value, prediction.x_0)
    (gradient,) = pull(jnp.ones_like(log_other))
    return log_other, jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def _trusted(spread: Array, noise: Array, of_variances: Callable[[], Array]) -> tuple[Array, Array]:
    """The observations' covariance, by the Jacobian as far as it is positive and else by the variances of x_0, and the
    share of the Jacobian, of shape ``(P, S, 1, 1)``. The second costs as much as all the rest, and is seldom needed."""
    spread = 0.5 * (spread + jnp.swapaxes(spread, -1, -2))
    diagonal = jnp.maximum(jnp.diagonal(spread, axis1=-2, axis2=-1), 0.0)
    floor = LEAST_VARIANCE * (noise + diagonal[..., None] * jnp.eye(spread.shape[-1], dtype=spread.dtype))
    whole = ~jnp.isnan(cholesky(noise + spread - floor)).any((-2, -1), keepdims=True)

    def mixed() -> tuple[Array, Array]:
        least = of_variances()
        part = _largest(lambda t: noise + t * spread + (1 - t) * least - LEAST_VARIANCE * (noise + least))
        trust = jnp.where(whole, 1.0, jnp.minimum(part, 0.6))
        return trust * spread + (1 - trust) * least, trust

    return jax.lax.cond(whole.all(), lambda: (spread, whole.astype(spread.dtype)), mixed)


def _largest(matrix: Callable[[Any], Array]) -> Array:
    """The largest t of 1, .6 and 0 for which ``matrix(t)`` is positive, of shape ``(P, S, 1, 1)``."""
    whole, part = (jnp.isnan(cholesky(matrix(t))).any((-2, -1), keepdims=True) for t in (1.0, 0.6))
    return jnp.where(whole, jnp.where(part, 0.0, 0.6), 1.0)


# --- bits ----------------------------------------------------------------------------------------------------------


def _logits(distribution: dist.Distribution) -> Array:
    while not hasattr(distribution, "logits"):
        distribution = distribution.base_dist
    return distribution.logits


def _flat_logits(prediction: Prediction) -> Array:
    return jnp.broadcast_to(_logits(prediction.reverse), prediction.x_t.shape).reshape(*prediction.x_t.shape[:2], -1)


def _bit_factors(factors: Factors, like: Array, latents: Latents) -> tuple[Array, Array, Array]:
    """log r of each bit as 0 and as 1, of shape ``(P, S, D)``, and what depends on no bit, for r that factorises."""
    size = math.prod(like.shape[2:])
    chains = like.shape[1] // factors.num_systems
    owner = jnp.tile(factors.owner, (chains, 1))

    def per_bit(elements: Array) -> Array:
        total = jax.vmap(lambda e: jax.vmap(lambda row, o: jnp.zeros(size + 1).at[o].add(row))(e, owner))(elements)
        return total.astype(like.dtype)

    zero, one = (per_bit(factors.read(x, latents).elements) for x in (jnp.zeros_like(like), jnp.ones_like(like)))
    return zero[..., :size], one[..., :size], zero[..., size]


def _per_bit(factors: Factors, prediction: Prediction, latents: Latents) -> Guided:
    """r that factorises over bits, averaged over each of them, and the step given it: all in closed form."""
    zero, one, rest = _bit_factors(factors, prediction.x_t, latents)
    logits = _flat_logits(prediction)
    if prediction.is_last:
        of_x_0 = logits
    else:
        probs = prediction.x_0.reshape(logits.shape)
        of_x_0 = jnp.log(probs) - jnp.log1p(-probs)
    log_twist = jnp.logaddexp(jax.nn.log_sigmoid(of_x_0) + one, jax.nn.log_sigmoid(-of_x_0) + zero).sum(-1) + rest
    difference = jnp.where(jnp.isnan(one - zero), 0.0, one - zero)
    limit = -jnp.log(jnp.finfo(logits.dtype).tiny)
    if latents:  # whose values decide which bits are seen, may be: none becomes impossible
        difference = jnp.clip(difference, -LARGEST_TILT, LARGEST_TILT)
    tilted = jnp.clip(of_x_0 + difference, -limit, limit)
    return Guided(log_twist, _bits_guide(factors, prediction, logits, tilted))


def _averaged_bits(factors: Factors, prediction: Prediction, latents: Latents, rng_key: Array) -> Guided:
    """r averaged over draws of all bits, and the step given how often each bit is 1 under r."""
    probs = prediction.x_0
    shape, size = probs.shape, math.prod(probs.shape[2:])
    if size <= MOST_BITS:  # all words, instead of draws
        words = jnp.stack(jnp.meshgrid(*[jnp.arange(2.0)] * size, indexing="ij"), -1).reshape(-1, size)
        particles = shape[:2] if latents else (1, shape[1])  # r of a word is the same for all
        draws = jnp.broadcast_to(words.reshape(-1, 1, 1, *shape[2:]), (len(words), *particles, *shape[2:]))
        flat = probs.reshape(*shape[:2], size)
        log_prob = einsum("ki,psi->kps", words, jnp.log(flat)) + einsum("ki,psi->kps", 1 - words, jnp.log1p(-flat))
        trust = 1 - 1e-3
    else:
        uniform = jax.random.uniform(rng_key, (NUM_DRAWS, *factors.state_shape), probs.dtype)
        draws = (uniform[:, None, None] < probs).astype(probs.dtype)
        log_prob = jnp.asarray(-math.log(len(draws)))
        trust = 1 - 2 / math.sqrt(len(draws))  # what few draws do not show has to stay possible
    log_r = log_prob + jax.vmap(lambda x: factors.read(x, latents).log_r)(draws)
    log_twist = jax.nn.logsumexp(log_r, axis=0)
    weights = jax.nn.softmax(log_r, axis=0)
    weights = jnp.where(jnp.isfinite(weights), weights, 1 / len(draws))
    tilted = einsum("kps,kps...->ps...", weights, jnp.broadcast_to(draws, (len(draws), *shape)))
    mixed = (trust * tilted + (1 - trust) * probs).reshape(*shape[:2], size)
    logits = _flat_logits(prediction)
    mixed = jnp.clip(mixed, jnp.finfo(mixed.dtype).tiny, 1 - jnp.finfo(mixed.dtype).eps)
    return Guided(log_twist, _bits_guide(factors, prediction, logits, jnp.log(mixed) - jnp.log1p(-mixed)))


def _perturbed(factors: Factors, prediction: Prediction, latents: Latents, power: Array, rng_key: Array) -> BitsGuide:
    """The paper's perturbed step, with r^power; no bit becomes impossible by it."""
    kernel, logits = factors.prior.kernel, _flat_logits(prediction)

    def log_r(x: Array) -> Array:
        return power * factors.read(x, latents).log_r

    perturbed = _logits(kernel.perturb(rng_key, prediction.reverse, log_r)).reshape(logits.shape)
    return BitsGuide(logits, logits + jnp.clip(perturbed - logits, -LARGEST_TILT, LARGEST_TILT))


def _bits_guide(factors: Factors, prediction: Prediction, logits: Array, tilted: Array) -> BitsGuide:
    if prediction.is_last:
        return BitsGuide(logits, tilted)
    kernel = factors.prior.kernel
    x_0 = kernel.bernoulli(tilted.reshape(prediction.x_t.shape))
    guided = _logits(kernel.reverse_given(prediction.x_t, x_0, prediction.rates))
    return BitsGuide(logits, guided.reshape(logits.shape))
