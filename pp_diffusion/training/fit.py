"""Training: SVI on the bound pair, many updates per dispatch."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from pp_diffusion.checks import check_key, positive_int
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.objectives import check_importance, check_squared_errors, step_importance
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.training.sources import Feed, Source, as_source
from pp_diffusion.units import nats_to_bits

if TYPE_CHECKING:
    import optax  # where it is used: half of what our import costs beside NumPyro's and Flax's

Objective = Literal["bound", "mse"]
DEFAULT_UPDATES = 4000
MAX_UPDATES_PER_DISPATCH = 1000
SECONDS_PER_DISPATCH = 0.5


class FitState(NamedTuple):
    """All that training carries; a pytree.

    :ivar svi: NumPyro's SVI state (optimiser state with the parameters, random key).
    :ivar average: running averages of the parameters; ``None`` without averaging.
    :ivar step: updates done.
    :ivar total: updates over which the default optimizer's rate runs.
    """

    svi: SVIState
    average: Any
    step: Array
    total: Array


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    :ivar diffusion: the diffusion that was trained.
    :ivar params: the trained parameters by site name, averaged where averaging is on; every figure is theirs.
    :ivar losses: −K per datum of each update's batch, in nats, at that update's own parameters; squared errors with
        ``objective="mse"``.
    :ivar state: to go on training with, ``fit(..., state=result.state)``.
    """

    diffusion: Diffusion
    params: dict[str, Any] = field(repr=False)
    losses: np.ndarray = field(repr=False)
    state: FitState = field(repr=False)
    needs_context: bool = field(default=False, repr=False)
    objective: Objective = "bound"

    @property
    def prior(self) -> DiffusionPrior:
        """The trained diffusion as a NumPyro distribution, ``diffusion.prior(params)``."""
        if self.needs_context:
            raise ValueError("context is needed: it was trained with one; use diffusion.prior(fit.params, context=...)")
        return self.diffusion.prior(self.params)


class NonFiniteLossError(FloatingPointError):
    """Training met a loss that is NaN or infinite.

    :ivar result: the :class:`FitResult` of the last dispatch whose losses were all finite; ``None`` if there was none.
    """

    def __init__(self, message: str, result: FitResult | None) -> None:
        super().__init__(message)
        self.result = result


def fit(
    rng_key: Array,
    diffusion: Diffusion,
    data: Any,
    *,
    num_steps: int | None = None,
    total_steps: int | None = None,
    batch_size: int = 512,
    optimizer: optax.GradientTransformation | Any = None,
    context: Any = None,
    num_times: int = 1,
    objective: Objective = "bound",
    average: float | None = 0.999,
    state: FitState | None = None,
    progress_bar: bool = True,
) -> FitResult:
    r"""Trains a diffusion by stochastic variational inference on the bound K.

    The same as ``SVI(diffusion.bound_model, diffusion.bound_guide, optimizer, Trace_ELBO())``, with many updates per
    dispatch, averaged parameters and checked data. Ctrl-C returns what was trained so far. Calls that differ only in
    keys, data values and ``num_steps`` (with the same optimizer object) share one compilation.

    :param rng_key: a JAX random key.
    :param Diffusion diffusion: what to train.
    :param data: an array of shape ``(N, *event_shape)``; or an iterable of batches; or a function
        ``rng_key -> batch``, traced into the update, for endless simulated data. Large arrays that it draws from are
        given to it by a :class:`jax.tree_util.Partial`, which makes them arguments of the compiled program. A batch is
        an array, or a pair ``(x, context)``.
    :param int num_steps: optimiser updates of this call; ``None`` is what is left of ``total_steps``, and
        4000 where that is not given either.
    :param int total_steps: optimiser updates in all, this call's and others', over which the default optimizer's rate
        rises and decays: a run in pieces with one total is the run in one, bit for bit. ``None`` is the total of
        ``state`` where that is not reached yet, else what is done when this call ends.
    :param int batch_size: rows per update, for an array (at most N).
    :param optimizer: an optax optimiser, or one of NumPyro's; the default is Adam with warm-up, cosine decay to zero,
        and clipped gradients.
    :param context: covariates of an array's rows.
    :param int num_times: time steps drawn per row and update.
    :param objective: ``"bound"``, the paper's K; or ``"mse"``, the squared error of :math:`f_\mu` summed over steps
        (:meth:`Diffusion.mse_model`), for comparison: it trains no variances, and weights the steps otherwise than K.
    :param average: the decay of the parameters' running average, shorter at the start so that the first parameters
        do not stay in it; ``None`` returns the last parameters.
    :param state: the ``.state`` of an earlier result, to go on from, with its random stream (``rng_key`` is not used).
        It does not hold the objective: training goes on with the one given here.
    :param progress_bar: shows rate, time left and the bound (a running mean over batches) in nats and bits.
    :raises ValueError: for data that are empty, not finite, of the wrong shape, outside the kernel's support, or
        constant in a coordinate.
    :raises NonFiniteLossError: where a loss is NaN or infinite; it carries what was trained before.

    .. doctest::

        >>> import jax, pp_diffusion as ppd
        >>> data = ppd.datasets.swiss_roll(jax.random.key(0), 1000)
        >>> diffusion = ppd.Diffusion(
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(20), ppd.networks.MLP((16,)),
        ...     transform=ppd.standardize(data.train),
        ... )
        >>> fit = ppd.fit(jax.random.key(1), diffusion, data.train, num_steps=10, batch_size=32, progress_bar=False)
        >>> fit.losses.shape, fit.prior.sample(jax.random.key(2), (3,)).shape
        ((10,), (3, 2))
    """
    _check_settings(diffusion, batch_size, num_times, optimizer, objective, average)
    num_steps, total_steps = plan_steps(num_steps, total_steps, state)
    check_key(rng_key)
    source = as_source(diffusion.space, data, context, batch_size, rng_key, 0 if state is None else int(state.step))
    settings = _Settings(optimizer, source.batch_size, num_times, average, objective)
    init_key, _ = jax.random.split(rng_key)
    if state is None:
        state, importance = _init(diffusion, source.example, init_key, settings)
        check_importance(importance)
    else:
        own_key = state.svi.rng_key  # of whatever make: the one given here is not used
        fresh, _ = jax.eval_shape(lambda: _init(diffusion, source.example, own_key, settings))
        if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, fresh):
            raise ValueError("state is that of another diffusion or optimizer: its arrays have other shapes")

    state = state._replace(total=jnp.asarray(total_steps))
    losses: list[np.ndarray] = []
    with tqdm(total=num_steps, disable=not progress_bar, desc="fit", unit="update") as bar:
        done, updates = 0, 1  # the first dispatch compiles: one update, so that a wrong set-up is known early
        try:
            while done < num_steps:
                feed, updates = source.take(min(updates, num_steps - done))
                if feed is None:
                    warnings.warn(f"data ran out after {done} of {num_steps} updates", stacklevel=2)
                    break
                started = time.perf_counter()
                next_state, new = _run(diffusion, state, feed, jnp.asarray(updates), settings)
                new_losses = np.asarray(new)[:updates]
                seconds = time.perf_counter() - started
                if not np.isfinite(new_losses).all():
                    trained = _result(diffusion, state, losses, settings, source) if done else None
                    raise _non_finite(new_losses, done, trained)
                state, done = next_state, done + updates
                losses.append(new_losses)
                _report(bar, updates, losses, objective)
                if done > 1:  # not while compiling
                    updates = int(np.clip(updates * SECONDS_PER_DISPATCH / max(seconds, 1e-9), 1, 4 * updates + 8))
                updates = min(max(updates, 8), MAX_UPDATES_PER_DISPATCH)
        except KeyboardInterrupt:
            warnings.warn(f"interrupted: returning the parameters after {done} of {num_steps} updates", stacklevel=2)
    return _result(diffusion, state, losses, settings, source)


def plan_steps(num_steps: int | None, total_steps: int | None, state: FitState | None) -> tuple[int, int]:
    """The updates of this call, and those of all calls.

    :raises ValueError: naming the one that does not fit the other, or the state.
    """
    done, earlier = (0, 0) if state is None else (int(state.step), int(state.total))
    if total_steps is None and num_steps is None:
        total_steps = earlier if earlier > done else done + DEFAULT_UPDATES
    if num_steps is not None:
        num_steps = positive_int("num_steps", num_steps)
    if total_steps is None:
        assert num_steps is not None
        total_steps = earlier if done + num_steps <= earlier else done + num_steps
    total_steps = positive_int("total_steps", total_steps)
    num_steps = total_steps - done if num_steps is None else num_steps
    if done + num_steps > total_steps or num_steps < 1:
        raise ValueError(
            f"total_steps must be at least what is done with this call, {done + max(num_steps, 1)}; got {total_steps}"
        )
    return num_steps, total_steps


class _Settings(NamedTuple):
    """The static part of training; one compilation for each."""

    optimizer: Any
    batch_size: int | None
    num_times: int
    average: float | None
    objective: Objective


def _check_settings(
    diffusion: Any, batch_size: int, num_times: int, optimizer: Any, objective: str, average: Any
) -> None:
    import optax

    if objective not in ("bound", "mse"):
        raise ValueError(f"objective must be 'bound' or 'mse'; got {objective!r}")
    if not isinstance(diffusion, Diffusion):
        raise TypeError(f"diffusion must be a Diffusion; got {type(diffusion).__name__}")
    for name, value in (("batch_size", batch_size), ("num_times", num_times)):
        positive_int(name, value)
    is_numpyros = all(hasattr(optimizer, name) for name in ("init", "update", "get_params"))
    if not (optimizer is None or is_numpyros or isinstance(optimizer, optax.GradientTransformation)):
        raise TypeError(
            f"optimizer must be an optax optimizer, one of NumPyro's or None; got {type(optimizer).__name__}"
        )
    if average is not None and not 0 <= average < 1:
        raise ValueError(f"average must be in [0, 1) or None; got {average}")
    if objective == "mse":
        check_squared_errors(diffusion.schedule, diffusion.last_step)


def _default_optimizer(num_steps: Array | int) -> optax.GradientTransformation:
    """Adam with warm-up and cosine decay over ``num_steps``, which may be traced."""
    import optax

    shape = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=50, decay_steps=1000)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda step: shape(step * 1000 / num_steps)))


def _svi(diffusion: Diffusion, settings: _Settings, num_rows: int, num_steps: Array | int = 1) -> SVI:
    # per datum, so that losses, clipping and learning rates mean the same for any N
    program = diffusion.bound_model if settings.objective == "bound" else diffusion.mse_model
    model = handlers.scale(program, scale=1 / num_rows)
    optimizer = settings.optimizer or _default_optimizer(num_steps)
    return SVI(model, diffusion.bound_guide, optimizer, Trace_ELBO())


def _with_constraints(svi: SVI, x: Array, context: Any) -> SVI:
    """``svi`` with the constraints of its parameters, which it learns when it starts; here abstractly, so that nothing
    of a start gets into a compiled program."""
    x, context = jax.tree.map(lambda a: a[:1], (x, context))
    jax.eval_shape(lambda: svi.init(jax.random.key(0), x, context=context))
    return svi


@partial(jax.jit, static_argnums=3)
def _init(
    diffusion: Diffusion, example: tuple[Any, Any], rng_key: Array, settings: _Settings
) -> tuple[FitState, Array]:
    """The first state, and how often each step of the network's is to be drawn, whose values the caller can check."""
    x, context = example
    svi = _svi(diffusion, settings, len(x))
    svi_state = svi.init(rng_key, x, context=context, num_times=settings.num_times)
    first = diffusion.last_step.first_network_step
    rates = diffusion.schedule.rates(diffusion.schedule.init_params()).at(slice(first, None))
    state = FitState(svi_state, svi.get_params(svi_state), jnp.zeros((), int), jnp.zeros((), int))
    return state, step_importance(diffusion.kernel, rates)


@partial(jax.jit, static_argnums=4)
def _run(
    diffusion: Diffusion, state: FitState, feed: Feed, updates: Array, settings: _Settings
) -> tuple[FitState, Array]:
    """``updates`` updates (a traced number, so that one compilation serves all) and their losses."""
    import optax

    def update(i: Array, carry: tuple[FitState, Array]) -> tuple[FitState, Array]:
        (svi_state, average, step, total), losses = carry
        x, context, rng_key = feed.batch(svi_state.rng_key, i)
        svi_state = svi_state._replace(rng_key=rng_key)
        svi = _with_constraints(_svi(diffusion, settings, len(x), total), x, context)
        svi_state, loss = svi.update(
            svi_state, x, context=context, batch_size=settings.batch_size, num_times=settings.num_times
        )
        if settings.average is not None:
            rate = jnp.maximum(1 - settings.average, 10.0 / (10.0 + step))
            average = optax.incremental_update(svi.get_params(svi_state), average, rate)
        return FitState(svi_state, average, step + 1, total), losses.at[i].set(loss)

    return jax.lax.fori_loop(0, updates, update, (state, jnp.zeros(MAX_UPDATES_PER_DISPATCH)))


def _non_finite(losses: np.ndarray, done: int, trained: FitResult | None) -> NonFiniteLossError:
    first = int(np.argmin(np.isfinite(losses)))
    return NonFiniteLossError(
        f"the loss is {losses[first]} at update {done + first + 1}. Usual causes: data far from unit scale "
        "(use transform=ppd.standardize(data)), a learning rate that is too high, or a network that returned NaN or a "
        "variance <= 0. What was trained before is in this error's .result",
        trained,
    )


def _result(
    diffusion: Diffusion, state: FitState, losses: list[np.ndarray], settings: _Settings, source: Source
) -> FitResult:
    if settings.average is None:
        params = _with_constraints(_svi(diffusion, settings, 1), *source.example).get_params(state.svi)
    else:
        params = state.average
    all_losses = np.concatenate(losses) if losses else np.zeros(0)
    return FitResult(diffusion, params, all_losses, state, source.example[1] is not None, settings.objective)


def _report(bar: tqdm, updates: int, losses: list[np.ndarray], objective: Objective) -> None:
    recent = -float(np.mean(np.concatenate(losses[-10:])[-1000:]))
    reached = f"K = {recent:.4g} nats = {nats_to_bits(recent):.4g} bits"
    bar.set_postfix_str(reached if objective == "bound" else f"squared error = {-recent:.4g}", refresh=False)
    bar.update(updates)
