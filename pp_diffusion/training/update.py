"""The compiled part of training: its state, the first one, and many updates of it in one dispatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.svi import SVIState

from pp_diffusion.covariates import Covariates
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.objectives import check_squared_errors, step_cost, step_importance, step_squared_error
from pp_diffusion.sharding import Layout
from pp_diffusion.training.sources import Feed

if TYPE_CHECKING:
    import optax  # where it is used: half of what our import costs beside NumPyro's and Flax's

ObjectiveName = Literal["bound", "mse"]
MAX_UPDATES_PER_DISPATCH = 1000


class Best(NamedTuple):
    """The parameters that the held-out rows liked best.

    :ivar params: they, by site name.
    :ivar value: the held-out rows' mean at them; −∞ before the first evaluation.
    :ivar step: the updates that they had.
    :ivar stale: evaluations since.
    """

    params: Any
    value: Array
    step: Array
    stale: Array


class FitState(NamedTuple):
    """All that training carries; a pytree.

    :ivar svi: NumPyro's SVI state (optimiser state with the parameters, random key).
    :ivar average: running averages of the parameters; ``None`` without averaging.
    :ivar step: updates done.
    :ivar total: updates over which the default optimizer's rate runs.
    :ivar best: what the held-out rows liked best; ``None`` without them.
    :ivar covariates: what encodes the context; ``None`` without one.
    """

    svi: SVIState
    average: Any
    step: Array
    total: Array
    best: Best | None
    covariates: Covariates | None = None


class SavedState(NamedTuple):
    """The arrays of a state as a file or another process holds them, without its structure.

    :ivar leaves: in the order of the state's own, keys as their data.
    :ivar covariates: what encodes the context, where it is known.
    """

    leaves: tuple[Any, ...]
    covariates: Covariates | None = None

    def like(self, fresh: FitState) -> FitState:
        """The state with the structure of ``fresh``.

        :raises ValueError: where it does not fit.
        """
        own, structure = jax.tree.flatten(fresh)
        if list(map(_description, self.leaves)) != list(map(_description, leaves_of(fresh).leaves)):
            raise ValueError("state is that of another diffusion or optimizer: its arrays have other shapes")
        pairs = zip(own, self.leaves, strict=True)
        return jax.tree.unflatten(structure, [_of_data(leaf, value) for leaf, value in pairs])


def leaves_of(state: FitState) -> SavedState:
    """The arrays of a state, keys as their data."""
    return SavedState(tuple(jax.random.key_data(a) if _is_key(a) else a for a in jax.tree.leaves(state)))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _description(leaf: Any) -> tuple[tuple[int, ...], str]:
    return jnp.shape(leaf), str(jnp.asarray(leaf).dtype)


def _of_data(leaf: Any, value: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
    return jnp.asarray(value)


class Objective(NamedTuple):
    """What training minimises, per datum.

    :ivar program: of a diffusion, the NumPyro model whose factors are minus that.
    :ivar cost: of one step at one datum.
    :ivar is_bound: whether it is −K, so that the bound's ends belong to it.
    """

    name: ObjectiveName
    program: Callable[[Diffusion], Any]
    cost: Callable[..., Array]
    is_bound: bool


OBJECTIVES: dict[str, Objective] = {
    "bound": Objective("bound", lambda diffusion: diffusion.bound_model, step_cost, True),
    "mse": Objective("mse", lambda diffusion: diffusion.mse_model, step_squared_error, False),
}


def as_objective(name: Any, diffusion: Diffusion) -> Objective:
    """The objective of this name.

    :raises ValueError: naming it, or what it cannot train.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be 'bound' or 'mse'; got {name!r}")
    if not OBJECTIVES[name].is_bound:
        check_squared_errors(diffusion.schedule, diffusion.last_step)
    return OBJECTIVES[name]


class Settings(NamedTuple):
    """The static part of training; one compilation for each.

    :ivar held_out: whether there are rows that judge the parameters.
    :ivar accumulate: parts of a batch, one after the other.
    :ivar skips: whether an update that is not finite is left out.
    """

    optimizer: Any
    num_times: int
    average: float | None
    objective: Objective
    held_out: bool
    accumulate: int = 1
    skips: bool = False
    layout: Layout = Layout()

    def checked(self, batch_size: int) -> Settings:
        """Itself.

        :raises ValueError: naming what does not divide the batch.
        """
        for name, parts in (("accumulate", self.accumulate), ("mesh", self.accumulate * self.layout.shards)):
            if batch_size % parts:
                raise ValueError(
                    f"{name} must divide a batch of {batch_size} rows evenly; it makes {parts} parts of it"
                )
        return self


class InParts(Trace_ELBO):
    """Of a batch in parts, one after the other: the memory is that of one part, the gradient that of the mean."""

    def __init__(self, parts: int, layout: Layout) -> None:
        super().__init__()
        self.parts, self.layout = parts, layout

    def loss(self, rng_key: Array, param_map: Any, model: Any, guide: Any, x: Array, **kwargs: Any) -> Array:
        """The mean of the parts' losses."""
        if self.parts == 1:
            return super().loss(rng_key, param_map, model, guide, x, **kwargs)
        context = kwargs.pop("context")

        def split(a: Array) -> Array:  # each part spread over all devices
            return self.layout.keep_rows(jnp.swapaxes(a.reshape(-1, self.parts, *a.shape[1:]), 0, 1), axis=1)

        @jax.checkpoint
        def one(part: tuple[Array, tuple[Array, Any]]) -> Array:
            key, (x, context) = part
            return super(InParts, self).loss(key, param_map, model, guide, x, context=context, **kwargs)

        keys = jax.random.split(rng_key, self.parts)
        return jnp.mean(jax.lax.map(one, (keys, jax.tree.map(split, (x, context)))))


def default_optimizer(num_steps: Array | int) -> optax.GradientTransformation:
    """Adam with warm-up and cosine decay over ``num_steps``, which may be traced."""
    import optax

    shape = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=50, decay_steps=1000)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda step: shape(step * 1000 / num_steps)))


def make_svi(diffusion: Diffusion, settings: Settings, num_rows: int, num_steps: Array | int = 1) -> SVI:
    """SVI per datum, so that losses, clipping and learning rates mean the same for any number of rows."""
    model = handlers.scale(settings.objective.program(diffusion), scale=settings.accumulate / num_rows)
    optimizer = settings.optimizer or default_optimizer(num_steps)
    return SVI(model, diffusion.bound_guide, optimizer, InParts(settings.accumulate, settings.layout))


def with_constraints(svi: SVI, x: Array, context: Any) -> SVI:
    """``svi`` with the constraints of its parameters, which it learns when it starts; here abstractly, so that nothing
    of a start gets into a compiled program."""
    x, context = jax.tree.map(lambda a: a[:1], (x, context))
    jax.eval_shape(lambda: svi.init(jax.random.key(0), x, context=context))
    return svi


@partial(jax.jit, static_argnums=3)
def first_state(
    diffusion: Diffusion,
    example: tuple[Any, Any],
    rng_key: Array,
    settings: Settings,
    covariates: Covariates | None = None,
) -> tuple[FitState, Array]:
    """The first state, and how often each step of the network's is to be drawn, whose values the caller can check."""
    x, context = example
    svi = make_svi(diffusion, settings, len(x))
    svi_state = svi.init(rng_key, x, context=context, num_times=settings.num_times)
    first = diffusion.last_step.first_network_step
    rates = diffusion.schedule.rates(diffusion.schedule.init_params()).at(slice(first, None))
    none = jnp.zeros((), int)
    params = svi.get_params(svi_state)
    best = Best(params, jnp.full((), -jnp.inf, float), none, none) if settings.held_out else None
    return FitState(svi_state, params, none, none, best, covariates), step_importance(diffusion.kernel, rates)


@partial(jax.jit, static_argnums=4)
def run(
    diffusion: Diffusion, state: FitState, feed: Feed, updates: Array, settings: Settings
) -> tuple[FitState, Array]:
    """``updates`` updates (a traced number, so that one compilation serves all) and their losses."""

    def update(i: Array, carry: tuple[FitState, Array]) -> tuple[FitState, Array]:
        state, losses = carry
        x, context, rng_key = feed.batch(state.svi.rng_key, i, (state.step + 1) / state.total)
        if state.covariates is not None and state.covariates.drop:
            rng_key, drop_key = jax.random.split(rng_key)
            context = state.covariates.dropped(drop_key, context)
        x, context = settings.layout.keep_rows((x, context))
        svi = with_constraints(make_svi(diffusion, settings, len(x), state.total), x, context)
        svi_state = state.svi._replace(rng_key=rng_key)
        svi_state, loss = svi.update(svi_state, x, context=context, num_times=settings.num_times)
        if settings.skips:
            svi_state, loss = _finite_or(state.svi, svi_state, loss)
        average = _averaged(state, svi.get_params(svi_state), settings.average)
        state = state._replace(svi=svi_state, average=average, step=state.step + 1)
        return settings.layout.keep_whole((state, losses.at[i].set(loss)))

    return jax.lax.fori_loop(0, updates, update, (state, jnp.zeros(MAX_UPDATES_PER_DISPATCH)))


def _finite_or(before: SVIState, after: SVIState, loss: Array) -> tuple[SVIState, Array]:
    """The state after an update where all of it is finite, else the one before with the random key of the later; and
    the loss, NaN where it was left out."""
    numbers = [a for a in jax.tree.leaves((after.optim_state, loss)) if jnp.issubdtype(a.dtype, jnp.inexact)]
    finite = jnp.all(jnp.stack([jnp.isfinite(a).all() for a in numbers]))
    optim_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after.optim_state, before.optim_state)
    return after._replace(optim_state=optim_state), jnp.where(finite, loss, jnp.nan)


def _averaged(state: FitState, params: Any, decay: float | None) -> Any:
    if decay is None:
        return state.average
    import optax

    rate = jnp.maximum(1 - decay, 10.0 / (10.0 + state.step))
    return optax.incremental_update(params, state.average, rate)
