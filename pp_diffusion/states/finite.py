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

from pp_diffusion.matrices import einsum
from pp_diffusion.schedules import Rates
from pp_diffusion.states.space import BATCH_NDIM, Guided, Likelihood, Prediction, Size, StateSpace, Words

#: Up to so many states, r is averaged over all of them.
MOST_STATES = 2**8
#: Draws of x_0 over which r is averaged where there are more.
NUM_DRAWS = 32
#: By so much at most, the paper's perturbation changes the log odds of two values.
LARGEST_TILT = 10.0
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

    :ivar reverse: log probabilities of :math:`p(x_{t-1} | x_t)`, shape ``(P, C, S, D, n)``.
    :ivar drawn: those of the draws.
    """

    reverse: Array
    drawn: Array

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p - log of the probability that they are drawn with."""
        x = jax.random.categorical(rng_key, self.drawn)
        is_value = x[..., None] == jnp.arange(self.drawn.shape[-1])
        log_ratio = jnp.where(is_value, self.reverse - self.drawn, 0.0).sum((-2, -1))
        return x.reshape(shape), log_ratio

    def where(self, condition: Array) -> FiniteProposal:
        """The step itself where ``condition``, of shape ``(P, C, S)``, does not hold."""
        return self._replace(drawn=jnp.where(condition[..., None, None], self.drawn, self.reverse))

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, C, S)``."""
        return jnp.isfinite(self.drawn.max(-1)).all(-1)  # a value may be impossible


class Finite(StateSpace):
    """Entries of n values each, independent in each step.

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

    def log_probs(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Array:
        """Of the values of each entry, shape ``(*shape, n)``."""
        base = distribution
        while isinstance(base, (dist.Independent, dist.ExpandedDistribution)):
            base = base.base_dist
        values = [jnp.broadcast_to(base.log_prob(self.kernel.as_state(k)), shape) for k in range(self.num_values)]
        return jnp.stack(values, -1)

    def distribution(self, logits: Array) -> dist.Distribution:
        """Of independent entries with these log probabilities, shape ``(*batch, *event_shape, n)``."""
        return dist.CategoricalLogits(logits, validate_args=False).to_event(self.kernel.event_ndim)

    # --- steps ---

    def predict(self, step: Callable[[Array], dist.Distribution], x_t: Array, rates: Rates) -> Prediction:
        reverse = step(x_t)
        law = self.kernel.x_0_given(x_t, reverse, rates)
        return self._prediction(x_t, rates, reverse, law, is_last=False)

    def predict_itself(self, x: Array, rates: Rates, step: dist.Distribution) -> Prediction:
        return self._prediction(x, rates, step, step, is_last=True)

    def _prediction(
        self, x: Array, rates: Rates, reverse: dist.Distribution, law: dist.Distribution, *, is_last: bool
    ) -> Prediction:
        probs = jnp.exp(self.log_probs(law, x.shape))
        values = jnp.arange(self.num_values, dtype=probs.dtype)
        mean = (probs * values).sum(-1)
        variance = (probs * (values - mean[..., None]) ** 2).sum(-1)
        return Prediction(x, rates, reverse, mean, variance, lambda v: variance * v, jnp.ones(()), is_last, law)

    # --- what twists ask ---

    def condition(self, prediction: Prediction, r: Likelihood, rng_key: Array, *, most_rows: int) -> Guided:
        """In closed form where each observed number depends on one entry at most; over all states where they are few;
        else over draws."""
        return self.look_ahead(prediction, r, rng_key) if r.owner is None else self._by_entry(prediction, r, r.owner)

    def _by_entry(self, prediction: Prediction, r: Likelihood, owner: Array) -> Guided:
        law = self._by_entries(self.log_probs(prediction.law, prediction.x_t.shape))
        log_r, rest = self._entries_log_r(prediction.x_t, r, owner)
        log_twist = jax.nn.logsumexp(law + log_r, axis=-1).sum(-1) + rest
        most = log_r.max(-1, keepdims=True)
        tilt = jnp.where(jnp.isfinite(most), log_r - most, 0.0)
        if r.varies:  # and may decide which entries are seen: no value becomes impossible
            tilt = jnp.maximum(tilt, -LARGEST_TILT)
        return Guided(log_twist, self._propose(prediction, law + tilt))

    def _entries_log_r(self, x_t: Array, r: Likelihood, owner: Array) -> tuple[Array, Array]:
        """log r of each entry at each value, shape ``(P, C, S, D, n)``, and what depends on no entry."""
        size, system = math.prod(x_t.shape[BATCH_NDIM:]), jnp.arange(len(owner))[:, None]

        def at(value: int) -> Array:
            elements = r.read(self.kernel.as_state(jnp.full(x_t.shape, value))).elements
            zeros = jnp.zeros((*elements.shape[:-1], size + 1), elements.dtype)
            return zeros.at[:, :, system, owner].add(elements)

        values = jnp.stack([at(k) for k in range(self.num_values)], -1)
        return values[..., :size, :], values[..., size, 0]

    def look_ahead(self, prediction: Prediction, r: Likelihood, rng_key: Array) -> Guided:
        """r averaged over x_0, and the step given how often each value comes under r."""
        shape = prediction.x_t.shape
        size = math.prod(shape[BATCH_NDIM:])
        law = self._by_entries(self.log_probs(prediction.law, shape))
        if self.num_values**size <= MOST_STATES:
            states, log_prob = self._all_states(law)
            particles = shape[:2] if r.varies else (1, 1)  # r of a state is the same for all
            draws = states.reshape(-1, *(1,) * BATCH_NDIM, *shape[BATCH_NDIM:])
            draws = jnp.broadcast_to(draws, (len(states), *particles, *shape[2:]))
            is_value, trust = self._is_value(states, law.dtype), 1 - 1e-3
        else:
            flat = self._some_states(rng_key, law)
            draws, log_prob = flat.reshape(NUM_DRAWS, *shape), jnp.asarray(-math.log(NUM_DRAWS))
            # what few draws do not show has to stay possible
            is_value, trust = self._is_value(flat, law.dtype), 1 - 2 / math.sqrt(NUM_DRAWS)
        log_r = log_prob + jax.vmap(lambda x: r.log_r(self.kernel.as_state(x)))(draws)
        weights = jax.nn.softmax(log_r, axis=0)
        weights = jnp.where(jnp.isfinite(weights), weights, 1 / len(draws))
        seen = einsum("k...,kdn->...dn" if is_value.ndim == 3 else "k...,k...dn->...dn", weights, is_value)
        mixed = trust * seen + (1 - trust) * jnp.exp(law)
        return Guided(jax.nn.logsumexp(log_r, axis=0), self._propose(prediction, jnp.log(mixed)))

    def _all_states(self, law: Array) -> tuple[Array, Array]:
        """All K of them, shape ``(K, D)``, and their log probabilities, shape ``(K, P, C, S)``."""
        states = jnp.asarray(list(itertools.product(range(self.num_values), repeat=law.shape[-2])), int)
        law = jnp.maximum(law, self._least(law.dtype))  # zero times infinity
        return states, einsum("kdn,...dn->k...", self._is_value(states, law.dtype), law)

    def _some_states(self, rng_key: Array, law: Array) -> Array:
        """Draws by fixed uniform numbers, shape ``(K, P, C, S, D)``."""
        uniform = jax.random.uniform(rng_key, (NUM_DRAWS, *(1,) * BATCH_NDIM, law.shape[-2]), law.dtype)
        above = jnp.cumsum(jnp.exp(law)[..., :0:-1], -1)  # the probability of n-1, of n-2 and more, …
        return (uniform[..., None] < above).sum(-1)

    def shift(self, prediction: Prediction, log_twist: Callable[[Array], Array]) -> Guided:
        """The step itself: there is no gradient to go along."""
        reverse = self._by_entries(self.log_probs(prediction.reverse, prediction.x_t.shape))
        return Guided(log_twist(prediction.x_0), FiniteProposal(reverse, reverse))

    def perturb(self, prediction: Prediction, r: Likelihood, power: Array, rng_key: Array) -> FiniteProposal:
        """Entry by entry, each with r at its values and a draw of the others; no value becomes impossible by it."""
        reverse = self._by_entries(self.log_probs(prediction.reverse, prediction.x_t.shape))
        tilt = self.tilt(rng_key, prediction.reverse, lambda x: power * r.log_r(x), prediction.x_t.shape)
        tilt = jnp.clip(self._by_entries(tilt), -LARGEST_TILT, LARGEST_TILT)
        return FiniteProposal(reverse, jax.nn.log_softmax(reverse + tilt))

    def tilt(
        self,
        rng_key: Array,
        distribution: dist.Distribution,
        log_r: Callable[[Array], Array],
        shape: tuple[int, ...],
    ) -> Array:
        """log r at each value of each entry, less that at the drawn one, the others being drawn; shape ``(*shape, n)``.

        r is called n - 1 times for each entry.
        """
        x = self.kernel.as_state(jnp.broadcast_to(distribution.sample(rng_key), shape))
        here = log_r(x)
        rows = x.reshape(*here.shape, -1)

        def at(i: Array, by: int) -> Array:
            return log_r(rows.at[..., i].set((rows[..., i] + by) % self.num_values).reshape(shape))

        def changed(i: Array) -> Array:
            return jnp.stack([here, *(at(i, by) for by in range(1, self.num_values))], -1)

        found = jax.lax.map(changed, jnp.arange(rows.shape[-1]), batch_size=CHANGES_AT_ONCE)  # by what is added
        found = jnp.moveaxis(found, 0, -2)
        least = jnp.where(jnp.isneginf(found).all(-1, keepdims=True), 0.0, found)  # says nothing about this entry
        added = (jnp.arange(self.num_values) - rows[..., None].astype(int)) % self.num_values
        by_value = jnp.take_along_axis(least, added, -1)
        highest = by_value.max(-1, keepdims=True)
        return (by_value - jnp.where(jnp.isfinite(highest), highest, 0.0)).reshape(*shape, self.num_values)

    def words(self, size: Size, most_rows: int) -> Words:
        few = self.num_values**size.state <= MOST_STATES
        averaged = f"averaged over {'all words' if few else f'{NUM_DRAWS} draws'}"
        return Words(*[f"{self.entry_name} by {self.entry_name}, in closed form" if size.is_by_entry else averaged] * 5)

    def _is_value(self, x: Array, dtype: Any) -> Array:
        return (x[..., None] == jnp.arange(self.num_values)).astype(dtype)

    def _by_entries(self, log_probs: Array) -> Array:
        """``(P, C, S, *state_shape, n)`` as ``(P, C, S, D, n)``."""
        return log_probs.reshape(*log_probs.shape[:BATCH_NDIM], -1, self.num_values)

    def _propose(self, prediction: Prediction, logits: Array) -> FiniteProposal:
        """The step in which x_0 has these log probabilities, up to a constant."""
        shape = prediction.x_t.shape
        logits = jax.nn.log_softmax(jnp.maximum(logits - logits.max(-1, keepdims=True), self._least(logits.dtype)))
        reverse = self._by_entries(self.log_probs(prediction.reverse, shape))
        if prediction.is_last:
            return FiniteProposal(reverse, logits)
        x_0 = self.distribution(logits.reshape(*shape, self.num_values))
        drawn = self.kernel.reverse_given(prediction.x_t, x_0, prediction.rates)
        return FiniteProposal(reverse, self._by_entries(self.log_probs(drawn, shape)))

    def _least(self, dtype: Any) -> float:
        """The log odds below which nothing is told apart."""
        return math.log(np.finfo(dtype).tiny)

    # --- distributions as arrays ---

    def parts(self, distribution: dist.Distribution, shape: tuple[int, ...]) -> Array:
        return self.log_probs(distribution, shape)

    def joined(self, parts: Array) -> dist.Distribution:
        return self.distribution(parts)

    # --- what a reader of models asks ---

    def pair(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Array | float) -> Array:
        x = self._draw(rng_key, batch_shape, spread)
        return self.kernel.as_state(jnp.stack([x, self._another(rng_key, x)]))

    def _draw(self, rng_key: Array, batch_shape: tuple[int, ...], spread: Array | float) -> Array:
        """A state between all entries 0 and all n - 1."""
        shape = (self.num_values - 1, *batch_shape, *self.kernel.event_shape)
        return jax.random.bernoulli(rng_key, spread, shape).sum(0)

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
        other, systems = self._another(rng_key, x), batch_shape[0]
        size = x.size // systems
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
