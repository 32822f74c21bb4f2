r"""What a twist asks of a state space.

A kernel hands its space out (:attr:`pp_diffusion.Kernel.state_space`). The space knows how r is averaged over
:math:`x_0` given :math:`x_t`, and what a step is drawn from; a twist says which of these it wants. Nothing here knows
of models: r comes as functions of states.

Arrays of particles have shape ``(P, C, S, …)``: P particles, C chains, S independent systems.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.frozen import Frozen
from pp_diffusion.schedules import Rates

#: Particles, chains, systems: the axes in front of a state.
BATCH_NDIM = 3


class Prediction(NamedTuple):
    r"""What a reverse step knows at :math:`x_t`.

    :ivar x_t: states of the model's space, shape ``(P, C, S, *state_shape)``; without C for a twist of one's own,
        which sees one chain.
    :ivar rates: of step t.
    :ivar reverse: :math:`p(x_{t-1} \mid x_t)`.
    :ivar x_0: :math:`E[x_0 \mid x_t]`; for bits, their probabilities.
    :ivar variance: :math:`\mathrm{Var}(x_0 \mid x_t)` per coordinate, as the reverse step's variance has it.
    :ivar covariance: products of a v of the states' shape with Tweedie's covariance,
        :math:`\mathrm{Cov}(x_0 \mid x_t)\, v = \tfrac{1 - \bar\alpha_t}{\sqrt{\bar\alpha_t}} J^\top v`, J being the
        Jacobian of :math:`E[x_0 \mid x_t]`.
    :ivar slope: of the mean of :math:`x_{t-1}` in :math:`x_0`.
    :ivar is_last: whether :math:`x_{t-1}` is :math:`x_0`.
    :ivar law: of :math:`x_0` given :math:`x_t`, entry by entry.
    """

    x_t: Array
    rates: Rates
    reverse: dist.Distribution
    x_0: Array
    variance: Array
    covariance: Callable[[Array], Array]
    slope: Array
    is_last: bool
    law: dist.Distribution


class Proposal(Protocol):
    """What the particles of a step are drawn from."""

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p(x_{t-1} | x_t) - log of the density that they are drawn from."""

    def log_ratio(self, x: Array) -> Array:
        """The same logarithm at states that were drawn elsewhere, shape ``(P, C, S)``."""

    def where(self, condition: Array) -> Self:
        """The step itself where ``condition``, of shape ``(P, C, S)``, does not hold."""

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, C, S)``."""


class Guided(NamedTuple):
    """A twist at some particles: its log value, shape ``(P, C, S)``, and what their step is drawn from."""

    log_twist: Array
    proposal: Any  # a Proposal


class Reading(Protocol):
    """A model's densities at states, nats; see :class:`pp_diffusion.posterior.factors.Reading`."""

    @property
    def log_r(self) -> Array: ...
    @property
    def log_other(self) -> Array: ...
    @property
    def residual(self) -> Array: ...
    @property
    def noise(self) -> Array: ...
    @property
    def correction(self) -> Array: ...
    @property
    def discrepancy(self) -> Array: ...
    @property
    def elements(self) -> Array: ...
    @property
    def numbers(self) -> Any: ...


class Likelihood(NamedTuple):
    """r, as a function of states.

    :ivar read: the densities at states of shape ``(P, C, S, *state_shape)``.
    :ivar has_other: whether some of them have no normal form.
    :ivar num_numbers: how many numbers have densities that are averaged along lines.
    :ivar owner: the entry that each observed number depends on, shape ``(S, k)``; ``None`` where one depends on two.
    :ivar varies: whether r differs from particle to particle, through other latents.
    :ivar where: coordinates that are known exactly, in a system's flattened state; shape ``(S, n)``.
    :ivar value: theirs.
    :ivar counts: False where masked.
    """

    read: Callable[[Array], Reading]
    has_other: bool
    num_numbers: int
    owner: Array | None
    varies: bool
    where: Array
    value: Array
    counts: Array

    def log_r(self, z: Array) -> Array:
        """log r, shape ``(P, C, S)``."""
        return self.read(z).log_r

    @property
    def num_known(self) -> int:
        """How many coordinates of a system are known exactly."""
        return int(self.where.shape[-1])

    def without_known(self) -> Likelihood:
        """r without the coordinates that are known exactly."""
        return self._replace(where=self.where[:, :0], value=self.value[:, :0], counts=self.counts[:, :0])


class Size(NamedTuple):
    """How much a model observes of a system.

    :ivar state: numbers of its state.
    :ivar rows: numbers observed exactly, or as normal ones.
    :ivar known: those observed exactly.
    :ivar numbers: those whose densities are averaged along lines.
    :ivar is_by_entry: whether each observed number depends on one entry of the state at most.
    """

    state: int
    rows: int
    known: int
    numbers: int
    is_by_entry: bool


class Words(NamedTuple):
    """In words, what the moment twist makes of a site.

    :ivar normal: of one whose density is normal.
    :ivar curved: of single numbers with normal noise, around what is not linear in x.
    :ivar moments: of single numbers that have a mean and a variance.
    :ivar numbers: of other single numbers.
    :ivar exact: of coordinates observed without noise.
    :ivar averaged: of any other density.
    :ivar constant: of one that does not depend on x.
    """

    normal: str
    curved: str
    moments: str
    numbers: str
    exact: str
    averaged: str
    constant: str


class StateSpace(Frozen):
    """Base class of state spaces.

    A subclass defines :meth:`predict`, :meth:`condition`, :meth:`look_ahead`, :meth:`shift`, :meth:`perturb`,
    :meth:`words`, :meth:`pair`, :meth:`parts` and :meth:`joined`.

    :cvar sets_known: whether coordinates that are observed without noise are set by the last step; else such an
        observation is a factor of r like any other.
    """

    sets_known: ClassVar[bool] = False

    # --- steps ---

    @abstractmethod
    def predict(self, step: Callable[[Array], dist.Distribution], x_t: Array, rates: Rates) -> Prediction:
        r"""A step t >= 2, :math:`p(x_{t-1} \mid x_t)` as a function of :math:`x_t`."""
        raise NotImplementedError

    @abstractmethod
    def predict_itself(self, x: Array, rates: Rates, step: dist.Distribution) -> Prediction:
        """A step whose draws are what is predicted: the last one, and the start."""
        raise NotImplementedError

    #: Whether its proposals are made from normal noise, by ``from_noise(noise, shape)``, which ``noise_of(rng_key, x)``
    #: finds again.
    has_noise: ClassVar[bool] = False

    #: Whether predictions have errors that :meth:`calibrated` makes use of.
    has_errors: ClassVar[bool] = False

    def errors(self, prediction: Prediction, x_0: Array, rng_key: Array) -> Any:
        """What a prediction's errors are like, by draws of :math:`x_0` and :math:`x_t` given it."""
        raise NotImplementedError(f"{type(self).__name__} does not judge predictions")

    def calibrated(self, prediction: Prediction, errors: Any) -> Prediction:
        """The prediction, as far as its errors at other draws let it be trusted."""
        return prediction

    # --- what twists ask ---

    @abstractmethod
    def condition(self, prediction: Prediction, r: Likelihood, rng_key: Array, *, most_rows: int) -> Guided:
        """r averaged over x_0 given x_t, and the step given r: in closed form where there is one."""
        raise NotImplementedError

    @abstractmethod
    def look_ahead(self, prediction: Prediction, r: Likelihood, rng_key: Array) -> Guided:
        """r at what is predicted, and the step drawn towards it."""
        raise NotImplementedError

    @abstractmethod
    def shift(self, prediction: Prediction, log_twist: Callable[[Array], Array]) -> Guided:
        """The step that a function of :math:`E[x_0 | x_t]` asks for."""
        raise NotImplementedError

    @abstractmethod
    def perturb(self, prediction: Prediction, r: Likelihood, power: Array, rng_key: Array) -> Any:
        r"""What is drawn from for :math:`p(x_{t-1} \mid x_t)\, r(x_{t-1})^{\mathrm{power}}`, the paper's own way."""
        raise NotImplementedError

    @abstractmethod
    def words(self, size: Size, most_rows: int) -> Words:
        """What :meth:`condition` makes of each kind of site."""
        raise NotImplementedError

    # --- distributions as arrays ---

    @abstractmethod
    def parts(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Any:
        """A step or a law over states of this shape as arrays, whose first axes are the shape's."""
        raise NotImplementedError

    @abstractmethod
    def joined(self, parts: Any) -> dist.Distribution:
        """The inverse of :meth:`parts`, for part of the batch, too."""
        raise NotImplementedError

    # --- what a reader of models asks ---

    @abstractmethod
    def pair(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Array | float) -> Array:
        """Two states that differ everywhere, shape ``(2, *batch_shape, *event_shape)``.

        :param spread: between 0 and 1: how far out they are.
        """
        raise NotImplementedError

    def changes(
        self, elements: Callable[[Array], Array], rng_key: Array, spread: Array | float, batch_shape: tuple[int, ...]
    ) -> Array:
        """Which of the observed numbers change with which entries around a random state: for :meth:`owners`.

        :param elements: from states of shape ``(*batch_shape, *event_shape)``, S systems in all, to the observed
            numbers' log densities, shape ``(S, k)``.
        :param batch_shape: S and the axes in front of an event.
        """
        raise NotImplementedError(f"{type(self).__name__} has no entries that can be told apart")

    def owners(self, changes: Callable[[Array, Array], Array], size: int) -> Array | None:
        """The entry of a system's state that each observed number depends on, shape ``(S, k)``; ``size`` where on none.

        :param changes: :meth:`changes` as a function of ``(rng_key, spread)``.
        :param size: the number of entries.
        :return: ``None`` where r does not come so, or need not be known to.
        """
        return None


def flattened(a: Array) -> Array:
    """States ``(P, C, S, *state_shape)`` as ``(P, C, S, D)``."""
    return a.reshape(*a.shape[:BATCH_NDIM], -1)


def as_rows(a: Array) -> Array:
    """States as rows, ``(P C S, D)``."""
    return flattened(a).reshape(-1, math.prod(a.shape[BATCH_NDIM:]))


def merged(parts: Any) -> Any:
    """Arrays of particles with one axis in place of ``(P, C, S)``."""
    return jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:BATCH_NDIM]), *a.shape[BATCH_NDIM:]), parts)


def parted(parts: Any, batch: tuple[int, ...]) -> Any:
    """The inverse of :func:`merged`."""
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), parts)


def in_one_axis(function: Callable[..., Any], *parts: Any) -> Any:
    """A function of arrays of particles, with one axis in place of ``(P, C, S)`` while it is computed.

    XLA's loops over four axes and more were seen to take up to 20 times as long on a CPU.
    """
    return parted(function(*merged(parts)), jax.tree.leaves(parts)[0].shape[:BATCH_NDIM])


def value_and_gradient(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Of a function of particles, none of which depends on another."""
    value, pull = jax.vjp(function, x)
    (gradient,) = pull(jnp.ones_like(value))
    return value, gradient
