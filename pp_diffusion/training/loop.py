"""A run of training: dispatches of updates, and what happens between them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from pp_diffusion.checks import positive_int, typed_key
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.objectives import check_importance
from pp_diffusion.training.checkpoints import Checkpoint, Checkpoints, terminations
from pp_diffusion.training.sources import Source, fingerprint_of
from pp_diffusion.training.update import (
    MAX_UPDATES_PER_DISPATCH,
    FitState,
    SavedState,
    Settings,
    first_state,
    leaves_of,
    make_svi,
    run,
    with_constraints,
)
from pp_diffusion.training.validation import HeldOut
from pp_diffusion.units import nats_to_bits

#: Updates where none are stated, and how many of an array's rows: so many passes over them.
FEWEST_DEFAULT, MOST_DEFAULT, DEFAULT_PASSES = 4000, 20_000, 200
SECONDS_PER_DISPATCH = 0.5
Callback = Callable[[int, FitState], Any]


class Plan(NamedTuple):
    """How many updates are asked for: in this call, and in all."""

    num_steps: int | None
    total_steps: int | None

    def of(self, done: int, begun: int, earlier: int, default: int = FEWEST_DEFAULT) -> tuple[int, int, int]:
        """After which update this call begins, after which it ends, and how many there are in all.

        :param done: updates done before.
        :param begun: of these, before this call was made for the first time: less where it goes on from a checkpoint.
        :param earlier: the total that was stated then.
        :param default: how many are asked for where nothing is stated.
        :raises ValueError: naming the one that does not fit the other, or what is done.
        """
        num_steps, total = (None if n is None else int(n) for n in self)
        resumed = begun < done
        if resumed and total is not None and num_steps is not None and begun + num_steps <= done < total:
            begun = done  # that piece of the total was whole: this is the next
        if total is None:
            asked = default if num_steps is None else num_steps
            goes_on = begun < earlier and (num_steps is None or begun + num_steps <= earlier)
            total = earlier if goes_on else begun + asked
        end = total if num_steps is None else begun + num_steps
        if resumed:
            end = min(end, total)
        if end > total or (end <= done and not resumed):
            least = max(end, done + 1)
            raise ValueError(f"total_steps must be at least what is done with this call, {least}; got {total}")
        return begun, max(end, done), total

    def checked(self) -> Plan:
        """Itself.

        :raises ValueError: naming a number that is none.
        """
        for name, value in self._asdict().items():
            if value is not None:
                positive_int(name, value)
        return self


def default_updates(source: Source) -> int:
    """Small tables are judged long before; large ones need more than a few passes."""
    if source.num_rows is None:
        return FEWEST_DEFAULT
    return int(np.clip(DEFAULT_PASSES * source.num_rows // source.batch_size, FEWEST_DEFAULT, MOST_DEFAULT))


class NonFiniteUpdates(FloatingPointError):
    """More updates were not finite than may be left out."""


class Run:
    """One run, from its first update or from where it was left.

    :ivar state: of the last dispatch.
    :ivar held_out: the rows that judge; ``None`` without.
    :ivar begun: updates done before this call, as it was made for the first time.
    """

    def __init__(self, diffusion: Diffusion, source: Source, settings: Settings, state: FitState) -> None:
        self.diffusion, self.source, self.settings, self.state = diffusion, source, settings, state
        self.held_out: HeldOut | None = None
        self.losses: list[np.ndarray] = []
        self.history: dict[str, np.ndarray] = {}
        self.start_step = self.begun = int(state.step)
        self.is_resumed = False

    @classmethod
    def start(
        cls,
        diffusion: Diffusion,
        source: Source,
        settings: Settings,
        rng_key: Array,
        state: FitState | SavedState | None,
    ) -> Run:
        """With a first state, or with an earlier one.

        :raises ValueError: naming ``state``, if it is of another diffusion or optimizer.
        """
        begin = source.example, settings, source.covariates
        if isinstance(state, FitState):
            own_key = state.svi.rng_key  # of whatever make: the one given here is not used
            fresh, _ = jax.eval_shape(lambda: first_state(diffusion, begin[0], own_key, *begin[1:]))
            if [a.shape for a in jax.tree.leaves(state)] != [a.shape for a in jax.tree.leaves(fresh)]:
                raise ValueError("state is that of another diffusion or optimizer: its arrays have other shapes")
            first = state
        else:
            init_key, _ = jax.random.split(rng_key)
            first, importance = first_state(diffusion, begin[0], init_key, *begin[1:])
            check_importance(importance)
            first = first if state is None else state.like(first)
        source.skip(int(first.step), anew=False)
        return cls(diffusion, source, settings, settings.layout.whole(first))

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Goes on from ``checkpoint``, where there is one."""
        if checkpoint is None:
            return
        leaves = [a for name, a in sorted(checkpoint.arrays.items()) if name.startswith("state.")]
        self.state = self.settings.layout.whole(SavedState(tuple(leaves)).like(self.state))
        self.losses, self.is_resumed = [checkpoint.arrays["losses"]], True
        self.start_step, self.begun = checkpoint.step - len(self.losses[0]), checkpoint.notes["begun"]
        self.history = {
            name.removeprefix("held_out."): a for name, a in checkpoint.arrays.items() if name.startswith("held_out.")
        }
        own = jax.process_index() if self.settings.layout.hosts > 1 else 0
        if not self.source.seek(checkpoint.notes["positions"][own]):
            self.source.skip(checkpoint.step, anew=True)

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)

    @property
    def all_losses(self) -> np.ndarray:
        """Of this run's updates that are in :attr:`state`."""
        losses = np.concatenate(self.losses) if self.losses else np.zeros(0)
        return losses[: self.step - self.start_step]

    @property
    def current(self) -> Any:
        """The parameters as they are, averaged where averaging is on."""
        if self.settings.average is not None:
            return self.state.average
        svi = with_constraints(make_svi(self.diffusion, self.settings, 1), *self.source.example)
        return svi.get_params(self.state.svi)

    @property
    def params(self) -> Any:
        """Those that the held-out rows liked best; else the current ones."""
        best = self.state.best
        return self.current if best is None or float(best.value) == -np.inf else best.params

    def train(
        self,
        end: int,
        total: int,
        max_skipped: int,
        checkpoints: Checkpoints | None,
        callback: Callback | None,
        progress_bar: bool,
    ) -> None:
        """Trains until ``end`` updates are done, or there is no more to gain.

        :raises NonFiniteUpdates: where more than ``max_skipped`` were not finite.
        """
        layout, before = self.settings.layout, self.step
        self.state = self.state._replace(total=layout.whole(jnp.asarray(total)))
        bar = tqdm(total=end, initial=before, disable=not progress_bar, desc="fit", unit="update")
        with bar, terminations(checkpoints is not None) as ended:
            updates = 1  # the first dispatch compiles: one update, so that a wrong set-up is known early
            saved = before if self.is_resumed else -1
            if self._is_over() and before < end:
                warnings.warn("held-out rows had no more to gain: training has ended before", stacklevel=3)
            try:
                is_ended = 0
                while self.step < end and not is_ended and not self._is_over():
                    updates, seconds = self._dispatch(min(updates, self._until_next(end)), max_skipped)
                    if not updates:
                        done = self.step - before
                        warnings.warn(f"data ran out after {done} of {end - before} updates", stacklevel=3)
                        break
                    self._judge()
                    self._report(bar, updates)
                    if callback is not None:
                        callback(self.step, self.state)
                    if self.step > before + 1:  # not while compiling
                        updates = int(np.clip(updates * SECONDS_PER_DISPATCH / max(seconds, 1e-9), 1, 4 * updates + 8))
                    updates = min(max(updates, 8), MAX_UPDATES_PER_DISPATCH)
                    due = int(checkpoints is not None and checkpoints.is_due())
                    updates, is_ended, due = layout.agree(updates, len(ended), due)
                    if checkpoints is not None and due:
                        saved = self._save(checkpoints)
            except KeyboardInterrupt:
                done = self.step - before
                warnings.warn(
                    f"interrupted: returning the parameters after {done} of {end - before} updates", stacklevel=3
                )
            if checkpoints is not None and saved != self.step:
                self._save(checkpoints)
        if self.held_out is not None:
            self.held_out.warn_of_overfitting(self.diffusion.event_shape)

    def _dispatch(self, updates: int, max_skipped: int) -> tuple[int, float]:
        """At most so many updates: how many, and in how many seconds."""
        feed, updates = self.source.take(updates, self.step)
        if feed is None:
            return 0, 0.0
        started = time.perf_counter()
        next_state, new = run(self.diffusion, self.state, feed, jnp.asarray(updates), self.settings)
        losses = np.asarray(new)[:updates]
        seconds = time.perf_counter() - started
        skipped = sum(np.count_nonzero(np.isnan(a)) for a in self.losses) if max_skipped else 0
        if np.count_nonzero(~np.isfinite(losses)) + skipped > max_skipped:
            raise NonFiniteUpdates(_in_words(losses, self.step, max_skipped))
        self.losses.append(losses)
        self.state = next_state
        return updates, seconds

    def _until_next(self, end: int) -> int:
        """Updates until this call ends or the held-out rows are asked."""
        step = self.step
        return end - step if self.held_out is None else min(end, self.held_out.next_after(step)) - step

    def _judge(self) -> None:
        if self.held_out is not None and self.held_out.is_due(self.step):
            self.state = self.held_out.judge(self.diffusion, self.state, self.current, self.all_losses)

    def _is_over(self) -> bool:
        return self.held_out is not None and self.held_out.is_over(self.state)

    def _save(self, checkpoints: Checkpoints) -> int:
        """Writes one, and says at which update."""
        leaves = jax.jit(leaves_of)(self.state).leaves
        arrays = {f"state.{i:05}": np.asarray(leaf) for i, leaf in enumerate(leaves)} | {"losses": self.all_losses}
        if self.held_out is not None:
            arrays |= {f"held_out.{name}": a for name, a in self.held_out.as_arrays().items()}
        positions = self.settings.layout.of_all(self.source.position())
        checkpoints.save(Checkpoint(self.step, arrays, {"positions": positions, "begun": self.begun}))
        return self.step

    def _report(self, bar: tqdm, updates: int) -> None:
        recent = -float(np.nanmean(np.concatenate(self.losses[-10:])[-1000:]))
        shown = f"squared error = {-recent:.4g}"
        if self.settings.objective.is_bound:
            shown = f"K = {recent:.4g} nats = {nats_to_bits(recent):.4g} bits"
        if self.held_out is not None and self.held_out.steps:
            shown += f", {self.held_out.in_words()}"
        bar.set_postfix_str(shown, refresh=False)
        bar.update(updates)


def identity_of(
    diffusion: Diffusion, source: Source, settings: Settings, rng_key: Array, held_out: tuple[Any, Any] | None
) -> dict[str, Any]:
    """What tells this run from others, for JSON.

    :param held_out: the rows that judge.
    """
    module, optimizer, layout = diffusion.network.module, settings.optimizer, settings.layout
    return {
        "kernel": f"{type(diffusion.kernel).__name__}{diffusion.event_shape}",
        "schedule": f"{type(diffusion.schedule).__name__}, T = {diffusion.num_timesteps}",
        "rates": fingerprint_of(diffusion.schedule.log_snr(diffusion.schedule.init_params())),
        "network": getattr(module, "__name__", type(module).__name__),
        "parameterization": diffusion.parameterization,
        "last_step": diffusion.last_step.name,
        "transform": type(diffusion.transform).__name__,
        "units": fingerprint_of(diffusion.transform),
        "optimizer": "default" if optimizer is None else type(optimizer).__name__,
        "objective": settings.objective.name,
        "num_times": settings.num_times,
        "average": settings.average,
        "context_drop": (source.covariates.drop or None) if source.covariates else None,
        "accumulate": settings.accumulate,
        "batch_size": source.batch_size,
        "data": "; ".join(layout.of_all(source.fingerprint())),
        "held-out rows": layout.of_all(None if held_out is None else fingerprint_of(held_out)),
        "precision": str(jnp.zeros(()).dtype),
        "rng_key": fingerprint_of(jax.random.key_data(typed_key(rng_key))),
    }


def _in_words(losses: np.ndarray, done: int, max_skipped: int) -> str:
    first = int(np.argmin(np.isfinite(losses)))
    allowed = f" (more than the {max_skipped} that may be left out)" if max_skipped else ""
    return (
        f"the loss is {losses[first]} at update {done + first + 1}{allowed}. Usual causes: data far from unit scale "
        "(use transform=ppd.standardize(data)), a learning rate that is too high, or a network that returned NaN or a "
        "variance <= 0. What was trained before is in this error's .result"
    )
