"""Rows that are held out of training, and what they say of the parameters."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion import contexts
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.objectives import draw_steps, fixed_terms
from pp_diffusion.sharding import Layout
from pp_diffusion.training.update import Best, FitState, Objective

#: Evaluations in all, and the fewest updates from one to the next.
EVALUATIONS, FEWEST_UPDATES = 50, 50
#: An evaluation calls the network for at least so many rows, and for this share of what the updates before it did.
FEWEST_CALLS, SHARE_OF_CALLS = 1024, 0.05
#: What counts as falling: nats per coordinate, and standard errors.
FALL_PER_COLUMN, FALL_IN_ERRORS = 0.05, 3.0


@dataclass(frozen=True)
class Validation:
    """What the held-out rows said while training went on.

    :ivar steps: the updates done at each evaluation, shape ``(evaluations,)``.
    :ivar values: K of the held-out rows, the mean per datum in nats, by the same draws of times and noise each time;
        minus the squared error with ``objective="mse"``.
    :ivar per_step: what each time step takes from that, shape ``(evaluations, T)``, entry t-1 belonging to step t.
    :ivar train: the mean over the updates before each evaluation of what their own batches had.
    """

    steps: np.ndarray
    values: np.ndarray
    per_step: np.ndarray = field(repr=False)
    train: np.ndarray = field(repr=False)

    @property
    def best_step(self) -> int:
        """The updates done when :attr:`values` was highest; 0 before the first evaluation."""
        return int(self.steps[np.argmax(self.values)]) if len(self.steps) else 0


class Judged(NamedTuple):
    """One evaluation.

    :ivar rows: K of each row, nats.
    :ivar per_step: as in :class:`Validation`, of shape ``(T,)``.
    """

    rows: Array
    per_step: Array


class HeldOut:
    """Rows that judge the parameters every so many updates.

    :ivar every: updates from one evaluation to the next.
    """

    def __init__(
        self,
        rows: tuple[Any, Any],
        total_steps: int,
        calls_per_update: int,
        objective: Objective,
        max_patience: int,
        layout: Layout,
        history: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.every = max(FEWEST_UPDATES, -(-total_steps // EVALUATIONS))
        self.total, self.max_patience, self.objective, self.layout = total_steps, max_patience, objective, layout
        calls = max(FEWEST_CALLS, int(SHARE_OF_CALLS * self.every * calls_per_update))
        x, context = jax.tree.map(lambda a: np.asarray(a)[: -(-calls // layout.hosts)], rows)
        self.rows = layout.gather((x, context))
        self.on_device = layout.whole(jax.tree.map(jnp.asarray, self.rows))
        self.num_times = max(1, calls // len(self.rows[0]))
        self.chunk = -(-min(calls_per_update, self.num_times * len(self.rows[0])) // layout.shards) * layout.shards
        self.history: list[Judged] = []
        self.steps: list[int] = []
        self.train: list[float] = []
        if history:
            self.steps, self.train = list(history["steps"]), list(history["train"])
            self.history = [Judged(*pair) for pair in zip(history["rows"], history["per_step"], strict=True)]

    def next_after(self, step: int) -> int:
        """The update after which they are asked next."""
        return min((step // self.every + 1) * self.every, max(self.total, step + 1))

    def is_due(self, step: int) -> bool:
        """Whether they are asked after this update."""
        return (step % self.every == 0 or step == self.total) and step not in self.steps[-1:]

    def in_words(self) -> str:
        """The last value and the highest, for the bar."""
        values = [float(judged.rows.mean()) for judged in self.history]
        return f"held-out {values[-1]:.4g} (best {max(values):.4g})"

    def judge(self, diffusion: Diffusion, state: FitState, params: Any, losses: np.ndarray) -> FitState:
        """Evaluates ``params``, and keeps them where they are the best so far.

        :param losses: of all updates; those since the last evaluation are kept beside.
        """
        assert state.best is not None
        recent = losses[-(int(state.step) - (self.steps[-1] if self.steps else 0)) :]
        judged: Judged = jax.tree.map(
            np.asarray,
            evaluate(diffusion, params, *self.on_device, self.objective, self.num_times, self.chunk, self.layout),
        )
        self.steps.append(int(state.step))
        self.history.append(judged)
        self.train.append(-float(np.nanmean(recent)) if len(recent) else math.nan)
        best = state.best
        if (value := judged.rows.mean()) > float(best.value):
            found = self.layout.whole((jnp.asarray(value, best.value.dtype), jnp.zeros((), int)))
            return state._replace(best=Best(params, found[0], state.step, found[1]))
        return state._replace(best=best._replace(stale=best.stale + 1))

    def is_over(self, state: FitState) -> bool:
        """Whether so many evaluations came without a gain that no more is to be had."""
        assert state.best is not None
        return int(state.best.stale) >= self.max_patience

    def as_arrays(self) -> dict[str, np.ndarray]:
        """The history, to be kept."""
        return {
            "steps": np.array(self.steps, int),
            "rows": np.array([judged.rows for judged in self.history]),
            "per_step": np.array([judged.per_step for judged in self.history]),
            "train": np.array(self.train),
        }

    def result(self) -> Validation:
        """The history as users get it."""
        per_step = np.array([judged.per_step for judged in self.history])
        values = np.array([judged.rows.mean() for judged in self.history])
        return Validation(np.array(self.steps, int), values, per_step, np.array(self.train))

    def warn_of_overfitting(self, event_shape: tuple[int, ...]) -> None:
        """Warns where the rows' K fell clearly from its highest, while that of the training rows is higher."""
        if len(self.history) < 2:
            return
        history = self.result()
        best = int(np.argmax(history.values))
        fall = self.history[best].rows - self.history[-1].rows
        error = fall.std() / math.sqrt(len(fall))
        size = math.prod(event_shape)
        falls = float(fall.mean()) > max(FALL_PER_COLUMN * size, FALL_IN_ERRORS * float(error))
        if falls and history.train[-1] > history.values[-1]:
            what = "K" if self.objective.is_bound else "minus the squared error"
            warnings.warn(
                f"training and held-out rows part: {what} of the {len(fall)} held-out rows was highest after "
                f"{history.steps[best]} updates, {history.values[best]:.4g}, and fell to {history.values[-1]:.4g} "
                f"after {history.steps[-1]}, where that of training is {history.train[-1]:.4g}. The parameters of the "
                "highest are returned",
                stacklevel=3,
            )


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def evaluate(
    diffusion: Diffusion,
    params: Any,
    x: Array,
    context: Any,
    objective: Objective,
    num_times: int,
    chunk: int,
    layout: Layout,
) -> Judged:
    """K of each row, at ``num_times`` times each; the draws of times and noise are the same at each call.

    :param chunk: rows to a call of the network.
    """
    end_key, time_key, noise_key = jax.random.split(jax.random.key(0), 3)
    process = diffusion.reverse_process(params, context=context, context_batch_ndim=1)
    z, num_rows = diffusion.space.to_model(x), len(x)
    per_step = jnp.zeros(process.num_timesteps)
    rows = jnp.zeros(num_rows)
    if objective.is_bound:
        last, prior_kl = fixed_terms(end_key, process, z)
        rows = rows + last - prior_kl - diffusion.space.log_abs_det(z, x)
        per_step = per_step.at[0].add(-last.mean())
    num_steps = process.num_timesteps - process.first_network_step
    if not num_steps:
        return Judged(rows, per_step)
    index, weight = draw_steps(time_key, process, num_rows, num_times)
    weight = num_steps * jnp.broadcast_to(weight, index.shape) / num_times
    calls = -(-index.size // chunk)
    place = jnp.arange(calls * chunk).reshape(calls, chunk) % index.size  # the last call is filled up; that is cut off

    def call(at: tuple[Array, Array]) -> Array:
        key, place = at
        own = place % num_rows
        part = process.with_context(contexts.take(context, own))
        return objective.cost(key, part, layout.keep_rows(z[own]), index.reshape(-1)[place])

    costs = jax.lax.map(call, (jax.random.split(noise_key, calls), place)).reshape(-1)[: index.size]
    costs = weight * costs.reshape(index.shape)
    per_step = per_step.at[index.reshape(-1)].add(costs.reshape(-1) / num_rows)
    return Judged(rows - costs.sum(0), per_step)
