"""States whose entries take finitely many values, 0…n-1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.tree_util import Partial

from pp_diffusion.schedules import Rates
from pp_diffusion.states.entries import Categorical, Entries
from pp_diffusion.states.space import (
    BATCH_NDIM,
    Guided,
    Likelihood,
    Prediction,
    Size,
    StateSpace,
    Words,
    flattened,
    in_one_axis,
    merged,
    parted,
)

#: Up to so many states, r is averaged over all of them.
MOST_STATES = 2**8
#: Draws of x_0 over which r is averaged where there are more.
NUM_DRAWS = 32
#: By so much at most, the paper's perturbation changes the log odds of two values.
LARGEST_TILT = 10.0
#: Below this log probability, a state counts as one that the law of x_0 does not know.
LEAST_LOG_PROB = -60.0
#: Random states at which it is found out which entries an observed number depends on.
NUM_PROBES = 32
#: States with one entry changed that are in memory together.
CHANGES_AT_ONCE = 64


class FiniteKernel(Protocol):
    """What the space needs of its kernel."""

    @property
    def event_shape(self) -> tuple[int, ...]: ...
    @property
    def event_ndim(self) -> int: ...
    def as_state(self, x: Any) -> Array: ...
    def x_0_given(self, x_t: Array, reverse: dist.Distribution, rates: Rates) -> dist.Distribution: ...
    def reverse_given(self, x_t: Array, x_0: dist.Distribution, rates: Rates) -> dist.Distribution: ...


class FiniteProposal(NamedTuple):
    """A step whose entries are independent, and what they are drawn from.

    :ivar reverse: :math:`p(x_{t-1} | x_t)`.
    :ivar drawn: the law of the draws.
    """

    reverse: Any  # Entries
    drawn: Any

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p - log of the probability that they are drawn with."""
        x = self.drawn.draw(rng_key)
        return x.reshape(shape), self.log_ratio(x)

    def log_ratio(self, x: Array) -> Array:
        """log p - log of the probability of being drawn, at states; shape ``(P, C, S)``."""
        x = flattened(x)
        return in_one_axis(lambda p, m, x: (p.log_prob(x) - m.log_prob(x)).sum(-1), self.reverse, self.drawn, x)

    def where(self, condition: Array) -> FiniteProposal:
        """The step itself where ``condition``, of shape ``(P, C, S)``, does not hold."""
        return self._replace(drawn=self.drawn.where(condition, self.reverse))

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, C, S)``."""
        return self.drawn.is_finite


class Finite(StateSpace):
    """Entries of n values each, independent in each step.

    The kernel's :meth:`~pp_diffusion.Kernel.reverse_given` is given :class:`numpyro.distributions.CategoricalLogits`.

    :param kernel: whose states they are.
    :param num_values: n.
    """

    data_fields = ("kernel",)

    kernel: FiniteKernel
    num_values: int
    entry_name: ClassVar[str] = "entry"

    def __init__(self, kernel: FiniteKernel, num_values: int) -> None:
        if num_values < 2:
            raise ValueError(f"num_values must be at least 2; got {num_values}")
        self._set(kernel=kernel, num_values=num_values)

    # --- distributions as arrays ---

    def parts(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Any:
        base = distribution
        while isinstance(base, (dist.Independent, dist.ExpandedDistribution)):
            base = base.base_dist
        values = [jnp.broadcast_to(base.log_prob(self.kernel.as_state(k)), shape) for k in range(self.num_values)]
        return jnp.stack(values, -1)

    def joined(self, parts: Any) -> dist.Distribution:
        return dist.CategoricalLogits(parts, validate_args=False).to_event(self.kernel.event_ndim)

    def entries(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Entries:
        """The law of the entries ``(P, C, S, D)`` of states of this shape."""
        log_probs = self.parts(distribution, shape)
        return Categorical(log_probs.reshape(*shape[:BATCH_NDIM], -1, self.num_values))

    def distribution(self, entries: Any, shape: tuple[int, ...]) -> dist.Distribution:
        """The inverse of :meth:`entries`."""
        return self.joined(entries.log_probs.reshape(*shape, self.num_values))

    # --- steps ---

    def predict(self, step: Callable[[Array], dist.Distribution], x_t: Array, rates: Rates) -> Prediction:
        reverse = step(x_t)
        return self._prediction(x_t, rates, reverse, self.kernel.x_0_given(x_t, reverse, rates), is_last=False)

    def predict_itself(self, x: Array, rates: Rates, step: dist.Distribution) -> Prediction:
        return self._prediction(x, rates, step, step, is_last=True)

    def _prediction(
        self, x: Array, rates: Rates, reverse: dist.Distribution, law: dist.Distribution, *, is_last: bool
    ) -> Prediction:
        mean, variance = (a.reshape(x.shape) for a in self.entries(law, x.shape).moments())
        return Prediction(
            x, rates, reverse, mean, variance, Partial(jnp.multiply, variance), jnp.ones(()), is_last, law
        )

    def _propose(self, prediction: Prediction, x_0: Entries) -> FiniteProposal:
        """The step in which x_0 has this law."""
        shape = prediction.x_t.shape
        reverse = self.entries(prediction.reverse, shape)
        if prediction.is_last:
            return FiniteProposal(reverse, x_0)
        drawn = self.kernel.reverse_given(prediction.x_t, self.distribution(x_0, shape), prediction.rates)
        return FiniteProposal(reverse, self.entries(drawn, shape))

    # --- what twists ask ---

    def condition(self, prediction: Prediction, r: Likelihood, rng_key: Array, *, most_rows: int) -> Guided:
        """In closed form where each observed number depends on one entry at most; over all states where they are few;
        else over draws."""
        return self.look_ahead(prediction, r, rng_key) if r.owner is None else self._by_entry(prediction, r, r.owner)

    def _by_entry(self, prediction: Prediction, r: Likelihood, owner: Array) -> Guided:
        law = self.entries(prediction.law, prediction.x_t.shape)
        log_r, rest = self._log_r_by_entry(prediction.x_t.shape, r, owner)
        # where latents may decide which entries are seen, no value becomes impossible
        x_0 = law.tilted(log_r, LARGEST_TILT if r.varies else math.inf)
        log_mean = in_one_axis(lambda law, log_r: law.log_mean(log_r).sum(-1), law, log_r)
        return Guided(log_mean + rest, self._propose(prediction, x_0))

    def _log_r_by_entry(self, shape: tuple[int, ...], r: Likelihood, owner: Array) -> tuple[list[Array], Array]:
        """log r of each entry at each value, n arrays ``(P, C, S, D)``, and what depends on no entry."""
        size = math.prod(shape[BATCH_NDIM:])

        def by_entry(elements: Array) -> Array:
            add = jax.vmap(lambda e, at: jnp.zeros(size + 1, e.dtype).at[at].add(e))  # over systems
            return jax.vmap(jax.vmap(lambda e: add(e, owner)))(elements)

        states = (self.kernel.as_state(jnp.full(shape, k)) for k in range(self.num_values))
        values = [by_entry(r.read(x).elements) for x in states]
        return [value[..., :size] for value in values], values[0][..., size]

    def look_ahead(self, prediction: Prediction, r: Likelihood, rng_key: Array) -> Guided:
        """r averaged over x_0, and the step given how often each value comes under r."""
        shape = prediction.x_t.shape
        batch, state_shape = shape[:BATCH_NDIM], shape[BATCH_NDIM:]
        size, law = math.prod(state_shape), self.entries(prediction.law, shape)
        if self.num_values**size <= MOST_STATES:
            states = itertools.product(range(self.num_values), repeat=size)
            x = self.kernel.as_state(np.array(list(states)))
            particles = batch[:2] if r.varies else (1, 1)  # r of a state is the same for all
            of_shape = jnp.broadcast_to(
                x.reshape(-1, *(1,) * BATCH_NDIM, *state_shape), (len(x), *particles, *shape[2:])
            )
            log_prob, trust = merged(law).log_prob_of_states(x).reshape(-1, *batch), 1 - 1e-3
        else:
            uniform = jax.random.uniform(rng_key, (NUM_DRAWS, *(1,) * BATCH_NDIM, size))
            x = self.kernel.as_state(law.quantile(uniform))
            of_shape, log_prob = x.reshape(NUM_DRAWS, *shape), jnp.asarray(-math.log(NUM_DRAWS))
            trust = 1 - 2 / math.sqrt(NUM_DRAWS)  # what few draws do not show has to stay possible
        log_r = jax.vmap(r.log_r)(of_shape)
        log_twist, x_0 = _weighed(log_prob + log_r, law, x, trust)
        # a law under which all that r allows is impossible says nothing: no twist, and not one of 1e-38
        log_twist = jnp.where(log_twist - log_r.max(0) > LEAST_LOG_PROB, log_twist, jnp.nan)
        return Guided(log_twist, self._propose(prediction, x_0))

    def shift(self, prediction: Prediction, log_twist: Callable[[Array], Array]) -> Guided:
        """The step itself: there is no gradient to go along."""
        reverse = self.entries(prediction.reverse, prediction.x_t.shape)
        return Guided(log_twist(prediction.x_0), FiniteProposal(reverse, reverse))

    def perturb(self, prediction: Prediction, r: Likelihood, power: Array, rng_key: Array) -> FiniteProposal:
        """Entry by entry, each with r at its values and a draw of the others; no value becomes impossible by it."""
        shape = prediction.x_t.shape
        reverse, x = self.entries(prediction.reverse, shape), prediction.reverse.sample(rng_key)
        log_r = self.log_r_of_values(self.kernel.as_state(jnp.broadcast_to(x, shape)), lambda x: power * r.log_r(x))
        log_r = [value.reshape(*shape[:BATCH_NDIM], -1) for value in log_r]
        return FiniteProposal(reverse, reverse.tilted(log_r, LARGEST_TILT))

    def log_r_of_values(self, x: Array, log_r: Callable[[Array], Array]) -> list[Array]:
        """log r at each value of each entry of x, the others being as they are: n arrays of x's shape.

        :param log_r: of states; called n - 1 times for each entry.
        """
        here = log_r(x)
        rows, n = x.reshape(*here.shape, -1), self.num_values

        def changed(i: Array) -> list[Array]:
            return [log_r(rows.at[..., i].set((rows[..., i] + by) % n).reshape(x.shape)) for by in range(1, n)]

        found = jax.lax.map(changed, jnp.arange(rows.shape[-1]), batch_size=CHANGES_AT_ONCE)
        others = [jnp.moveaxis(value, 0, -1).reshape(x.shape) for value in found]  # by what is added
        by_added = [jnp.broadcast_to(here.reshape(*here.shape, *(1,) * (x.ndim - here.ndim)), x.shape), *others]
        values = range(n)
        return [jnp.select([(k - x) % n == by for by in values], by_added) for k in values]

    def words(self, size: Size, most_rows: int) -> Words:
        few = self.num_values**size.state <= MOST_STATES
        averaged = f"averaged over {'all words' if few else f'{NUM_DRAWS} draws'}"
        return Words(
            *[f"{self.entry_name} by {self.entry_name}, in closed form" if size.is_by_entry else averaged]
            * len(Words._fields)
        )

    # --- what a reader of models asks ---

    def pair(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Array | float) -> Array:
        x = self._draw(rng_key, batch_shape, spread)
        return self.kernel.as_state(jnp.stack([x, self._another(rng_key, x)]))

    def _draw(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Array | float) -> Array:
        """A state between all entries 0 and all n - 1."""
        shape = (self.num_values - 1, *batch_shape, *self.kernel.event_shape)
        return jax.random.bernoulli(rng_key, spread, shape).astype(int).sum(0)

    def _another(self, rng_key: Array, x: Array) -> Array:
        """Another value in each entry."""
        by = jax.random.randint(jax.random.fold_in(rng_key, 1), x.shape, 1, self.num_values)
        return (x + by) % self.num_values

    def changes(
        self, elements: Callable[[Array], Array], rng_key: Array, spread: Array | float, batch_shape: tuple[int, ...]
    ) -> Array:
        """For each digit of an entry's number, whether an observed number changes with the entries that have a 0 there,
        or a 1: shape ``(2, digits, S, k)``. What depends on two entries changes with both for some digit."""
        x = self._draw(rng_key, batch_shape, spread)
        other, size = self._another(rng_key, x), x.size // batch_shape[0]
        digits = np.arange(size) >> np.arange(max(1, (size - 1).bit_length()))[:, None] & 1
        which = jnp.asarray(np.stack([1 - digits, digits]).astype(bool)).reshape(-1, *x.shape[1:])
        before = elements(self.kernel.as_state(x))
        changed = jax.lax.map(lambda w: elements(self.kernel.as_state(jnp.where(w, other, x))) != before, which)
        return changed.reshape(2, -1, *changed.shape[1:])

    def owners(self, changes: Callable[[Array, Array], Array], size: int) -> Array | None:
        # an entry may matter only where another has one value: from all 0 to all n - 1, as an AND or an OR needs
        keys, spreads = jax.random.split(jax.random.key(0), NUM_PROBES), np.linspace(0, 1, NUM_PROBES)
        found = [np.asarray(changes(key, jnp.asarray(s))) for key, s in zip(keys, spreads, strict=True)]
        by_zero, by_one = np.any(found, axis=0)  # per digit
        if (by_zero & by_one).any():
            return None
        owner = (by_one * 2 ** np.arange(len(by_one))[:, None, None]).sum(0)
        return jnp.asarray(np.where((by_zero | by_one).any(0), owner, size))


def _weighed(log_joint: Array, law: Any, x: Array, trust: float) -> tuple[Array, Any]:
    """The log of the mean of r over K states, and the law of x_0 given r.

    :param log_joint: r times each state's probability, shape ``(K, P, C, S)``.
    :param x: the states, shape ``(K, D)`` or ``(K, P, C, S, D)``.
    """
    number, *batch = log_joint.shape
    log_joint = log_joint.reshape(number, -1)  # as in_one_axis does
    weights = jax.nn.softmax(log_joint, axis=0)
    weights = jnp.where(jnp.isfinite(weights), weights, 1 / number)
    x_0 = merged(law).seen(weights, x if x.ndim == 2 else x.reshape(number, -1, x.shape[-1]), trust)
    log_mean = jax.nn.logsumexp(log_joint, axis=0)
    return parted((log_mean, x_0), tuple(batch))
