"""Training: SVI on the bound pair, many updates per dispatch, judged by rows that are held out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from pp_diffusion.checks import check_key, positive_int
from pp_diffusion.covariates import Covariates
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.sharding import as_layout
from pp_diffusion.training.checkpoints import Checkpoints
from pp_diffusion.training.files import read_fit, write_fit
from pp_diffusion.training.forms import as_held_out, as_source
from pp_diffusion.training.loop import NonFiniteUpdates, Plan, Run, default_updates, identity_of
from pp_diffusion.training.sources import Encoding
from pp_diffusion.training.update import FitState, ObjectiveName, SavedState, Settings, as_objective
from pp_diffusion.training.validation import HeldOut, Validation

if TYPE_CHECKING:
    import optax  # where it is used: half of what our import costs beside NumPyro's and Flax's


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    :ivar diffusion: the diffusion that was trained.
    :ivar params: the trained parameters by site name, averaged where averaging is on: those that the held-out rows
        liked best, or the last ones where none were held out; every figure is theirs.
    :ivar losses: −K per datum of each update's batch, in nats, at that update's own parameters; squared errors with
        ``objective="mse"``; NaN for an update that was left out.
    :ivar state: to go on training with, ``fit(..., state=result.state)``.
    :ivar validation: what the held-out rows said, a :class:`Validation`; ``None`` without them.
    """

    diffusion: Diffusion
    params: dict[str, Any] = field(repr=False)
    losses: np.ndarray = field(repr=False)
    state: FitState | SavedState = field(repr=False)
    needs_context: bool = field(default=False, repr=False)
    objective: ObjectiveName = "bound"
    validation: Validation | None = field(default=None, repr=False)

    @property
    def prior(self) -> Any:
        """The trained diffusion as a NumPyro distribution, ``diffusion.prior(params)``; of a fit with a context, a
        function of it, :class:`~pp_diffusion.ConditionalPrior`, which gives that for each: ``fit.prior(context)``."""
        if self.covariates is not None:
            return self.diffusion.conditional_prior(self.params)
        if self.needs_context:  # of a file from before covariates were kept
            raise ValueError("context is needed: it was trained with one; use diffusion.prior(fit.params, context=...)")
        return self.diffusion.prior(self.params)

    @property
    def covariates(self) -> Covariates | None:
        """What encodes the context, in ``params`` too; ``None`` without one."""
        return self.diffusion.covariates_in(self.params)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to one file, for :func:`load_fit`: also one that was trained with a context, of which none need be
        chosen.

        :param path: the file; an existing one is replaced once the new one is complete.
        :raises TypeError: for parts that the file cannot describe; see :func:`save`.
        """
        notes = {"needs_context": self.needs_context, "objective": self.objective}
        write_fit(path, self.diffusion, self.params, self.state, self.losses, self.validation, notes)

    @property
    def num_skipped(self) -> int:
        """How many updates were left out because they were not finite."""
        return int(np.isnan(self.losses).sum())


def load_fit(path: str | os.PathLike[str], network: Any = None) -> FitResult:
    """Reads a file that :meth:`FitResult.save` wrote.

    :param path: the file.
    :param network: the network, where it was not a stock one.
    :return: the result; its ``.state`` goes on with the optimizer that it was trained with.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file is damaged or foreign, or needs ``network``.
    """
    return FitResult(**read_fit(path, network))


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
    context_drop: float = 0.0,
    covariates: Covariates | None = None,
    num_times: int = 1,
    objective: ObjectiveName = "bound",
    average: float | None = 0.999,
    val_prop: float = 0.1,
    validation_data: Any = None,
    max_patience: int = 20,
    row_noise: float | None = None,
    state: FitState | SavedState | None = None,
    checkpoint_dir: Any = None,
    checkpoint_every: float = 60.0,
    mesh: jax.sharding.Mesh | None = None,
    accumulate: int = 1,
    max_skipped: int = 0,
    callback: Callable[[int, FitState], Any] | None = None,
    progress_bar: bool = True,
) -> FitResult:
    r"""Trains a diffusion by stochastic variational inference on the bound K.

    The same as ``SVI(diffusion.bound_model, diffusion.bound_guide, optimizer, Trace_ELBO())``, with many updates per
    dispatch, averaged parameters, checked data and rows that are held out. Ctrl-C returns what was trained so far.
    Calls that differ only in keys, data values and ``num_steps`` (with the same optimizer object) share one
    compilation.

    **Held-out rows.** A tenth of an array's rows is not trained on, but judges: at intervals K of them is evaluated,
    the parameters for which it was highest are returned, and training ends when it has not risen for long. So that it
    can choose how smooth the density is, training rows bear normal noise which shrinks as training goes on. An array
    of fewer than 20 rows is all trained on.

    :param rng_key: a JAX random key.
    :param Diffusion diffusion: what to train.
    :param data: an array of shape ``(N, *event_shape)``, a :class:`numpy.memmap` too, whose rows are read as they are
        drawn; or an iterable of batches, such as a grain dataset; or a function ``rng_key -> batch``, traced into the
        update, for endless simulated data. Large arrays that it draws from are given to it by a
        :class:`jax.tree_util.Partial`, which makes them arguments of the compiled program. A batch is an array, or a
        pair ``(x, context)``.
    :param int num_steps: optimiser updates of this call; ``None`` is what is left of ``total_steps``; where that
        is not given either, 200 passes over an array's rows, at least 4000 and at most 20 000; 4000 for other data.
    :param int total_steps: optimiser updates in all, this call's and others', over which the default optimizer's rate
        rises and decays: a run in pieces with one total is the run in one, bit for bit. ``None`` is the total of
        ``state`` where that is not reached yet, else what is done when this call ends.
    :param int batch_size: rows per update, for an array (at most N).
    :param optimizer: an optax optimiser, or one of NumPyro's; the default is Adam with warm-up, cosine decay to zero,
        and clipped gradients.
    :param context: covariates of an array's rows: floats, which are standardised; or a number or string for each row,
        its label; or a pytree of both. See :class:`~pp_diffusion.Covariates`. ``fit.prior`` is a function of it then.
        Images or sets go through :class:`networks.Embedded <pp_diffusion.networks.Embedded>`.
    :param context_drop: the share of the rows in each batch whose context is dropped, so that one network is the
        unconditional prior too, ``fit.prior(None)``, and draws can be guided, ``fit.prior(context).guided(2.0)``.
    :param covariates: what encodes the context, such as that of an earlier fit, or one that knows labels which the
        first batch does not; ``None`` makes it from the context of all rows, of the first batch or of a function's
        first 4096 rows. The programs ``diffusion.model`` and its like take a context that is encoded,
        ``fit.covariates(context)``.
    :param int num_times: time steps drawn per row and update.
    :param objective: ``"bound"``, the paper's K; or ``"mse"``, the squared error of :math:`f_\mu` summed over steps
        (:meth:`Diffusion.mse_model`), for comparison: it trains no variances, and weights the steps otherwise than K.
    :param average: the decay of the parameters' running average, shorter at the start so that the first parameters
        do not stay in it; ``None`` returns the last parameters.
    :param float val_prop: the share of an array's rows that is held out; 0 trains on all of them.
    :param validation_data: held-out data of your own in their place, an array or a pair ``(x, context)``; for
        iterables and functions the only way.
    :param int max_patience: evaluations without a gain after which training ends; there are about 50 in all.
    :param float row_noise: the standard deviation, in the model's space, of the noise on rows when training starts;
        it has gone at 70 % of all updates. ``None`` is :math:`\min(1/2, 5/\sqrt N)`. Not where nothing is held out.
    :param state: the ``.state`` of an earlier result, to go on from, with its random stream (``rng_key`` is not used).
        It does not hold the objective: training goes on with the one given here.
    :param checkpoint_dir: a folder for checkpoints. Where it holds some, training goes on from the last of them:
        a call that was killed, and made again, gives what it would have given, bit for bit on one device. SIGTERM
        saves one more and then ends the process.
    :param float checkpoint_every: seconds from one checkpoint to the next.
    :param mesh: devices over whose axis ``"data"`` rows are spread, ``jax.make_mesh((n,), ("data",))``. Of several
        processes each gives its own rows (``jax.distributed.initialize`` first), and ``batch_size`` counts all.
    :param int accumulate: parts of a batch, one after the other, to save memory.
    :param int max_skipped: updates whose loss or gradient may be NaN or infinite, and which are then left out, before
        training ends with an error.
    :param callback: called with the updates done and the state, between dispatches.
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
        >>> fit.validation.steps, fit.validation.values.shape
        (array([10]), (1,))
    """
    _check_settings(diffusion, batch_size, num_times, optimizer, average, val_prop, row_noise)
    for name, count in (("accumulate", accumulate), ("max_patience", max_patience)):
        positive_int(name, count)
    plan, chosen, layout = Plan(num_steps, total_steps).checked(), as_objective(objective, diffusion), as_layout(mesh)
    check_key(rng_key)
    share = val_prop if validation_data is None else 0.0
    encoding = _encoding(covariates, state, context_drop)
    source = as_source(diffusion.space, data, context, batch_size, rng_key, layout, share, row_noise, encoding)
    own_rows = None if validation_data is None else as_held_out(diffusion.space, validation_data, source.covariates)
    rows = own_rows or source.held_out
    settings = Settings(
        optimizer, num_times, average, chosen, rows is not None, accumulate, max_skipped > 0, layout
    ).checked(source.batch_size)
    training = Run.start(diffusion, source, settings, rng_key, state)
    checkpoints = None
    if checkpoint_dir is not None:
        identity = identity_of(diffusion, source, settings, rng_key, rows)
        checkpoints = Checkpoints(checkpoint_dir, checkpoint_every, identity)
        training.resume(checkpoints.restore())
    earlier = int(training.state.total)
    training.begun, end, total = plan.of(training.step, training.begun, earlier, default_updates(source))
    if rows is not None:
        calls = source.batch_size * num_times
        training.held_out = HeldOut(rows, total, calls, chosen, max_patience, layout, training.history)

    def result() -> FitResult:
        context_too = source.example[1] is not None
        validation = None if training.held_out is None else training.held_out.result()
        losses, state = training.all_losses, training.state
        own = {} if source.covariates is None else {diffusion.covariates_site: source.covariates}
        return FitResult(diffusion, training.params | own, losses, state, context_too, objective, validation)

    try:
        training.train(end, total, max_skipped, checkpoints, callback, progress_bar)
    except NonFiniteUpdates as error:
        raise NonFiniteLossError(str(error), result() if len(training.all_losses) else None) from None
    return result()


def _encoding(covariates: Any, state: Any, drop: float) -> Encoding:
    covariates = getattr(state, "covariates", None) if covariates is None else covariates
    if covariates is None:
        return partial(Covariates.from_rows, drop=drop)
    if not isinstance(covariates, Covariates):
        raise TypeError(f"covariates must be a Covariates or None; got {type(covariates).__name__}")
    if drop not in (0, covariates.drop):
        raise ValueError(f"context_drop must be that of the covariates, {covariates.drop}; got {drop}")
    return lambda context: covariates


def _check_settings(
    diffusion: Any,
    batch_size: int,
    num_times: int,
    optimizer: Any,
    average: float | None,
    val_prop: float,
    row_noise: float | None,
) -> None:
    import optax

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
    if not 0 <= val_prop < 1:
        raise ValueError(f"val_prop must be in [0, 1), the share of the rows that is held out; got {val_prop}")
    if row_noise is not None and not 0 <= row_noise < np.inf:
        raise ValueError(f"row_noise must be a standard deviation >= 0 or None; got {row_noise}")
