r"""A diffusion as NumPyro programs: whole trajectories under any ELBO, and the bound K in factors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from flax.errors import FlaxError
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from pp_diffusion.checks import check_precision, positive_int
from pp_diffusion.divergence import Hutchinson
from pp_diffusion.flow import DiffusionFlow
from pp_diffusion.frozen import Frozen
from pp_diffusion.kernels import Kernel
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.reverse import Network, ReverseProcess
from pp_diffusion.schedules import Rates, Schedule
from pp_diffusion.trajectories import (
    ForwardTrajectory,
    PosteriorTrajectory,
    ReverseTrajectory,
    fixed_terms,
    step_cost,
    step_squared_error,
)
from pp_diffusion.transforms import check_transform, data_support, in_data_units, log_abs_det

#: The share of training's steps that is drawn uniformly; it bounds the others' weights by its inverse.
UNIFORM_SHARE = 0.2


class Diffusion(Frozen):
    r"""A kernel, a schedule and a network, joined to a diffusion probabilistic model.

    Immutable, a pytree (its arrays are leaves), and hashable by value.

    :param Kernel kernel: the Markov diffusion kernel.
    :param Schedule schedule: the diffusion rates.
    :param network: a linen module, an nnx module or a callable ``network(x_t, t)``, with ``t`` integers 1…T over the
        batch axes of ``x_t``; it is also given those of ``log_snr`` (clipped to ±20) and ``context`` that its
        signature names. Stock networks learn T and their outputs from here.
    :param parameterization: how the network's outputs become :math:`p(x_{t-1} \mid x_t)`; ``None`` takes the kernel's
        first (``"v"`` for Gaussian, ``"x0"`` for binomial kernels). With ``"direct"`` they *are* the paper's functions.
    :param last_step: ``"kernel"``: :math:`p(x_0 \mid x_1) = T_\pi` as in the paper, and the network is not called at
        t = 1; ``"network"``: it is.
    :param transform: a NumPyro transform from the model's space to the data's, such as
        :func:`~pp_diffusion.standardize`; x is in data units in every public function.
    :param name: prefixes the parameter sites, so that two diffusions live in one program; of equal names, they would
        share their parameters.
    :raises TypeError, ValueError: naming the argument that does not fit.

    .. doctest::

        >>> import jax, numpyro, optax, pp_diffusion as ppd
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> kernel, schedule = ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(20)
        >>> diffusion = ppd.Diffusion(kernel, schedule, ppd.networks.MLP((8,)))
        >>> svi = SVI(diffusion.bound_model, diffusion.bound_guide, optax.adam(1e-3), Trace_ELBO())
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> result = svi.run(jax.random.key(1), 3, x, batch_size=10, progress_bar=False)
        >>> diffusion.prior(result.params).sample(jax.random.key(2), (5,)).shape
        (5, 2)
    """

    data_fields = ("kernel", "schedule", "transform")

    kernel: Kernel
    schedule: Schedule
    network: Network
    parameterization: str
    last_step: str
    transform: Transform | None
    name: str

    def __init__(
        self,
        kernel: Kernel,
        schedule: Schedule,
        network: Any,
        *,
        parameterization: str | None = None,
        last_step: Literal["kernel", "network"] = "kernel",
        transform: Transform | None = None,
        name: str = "diffusion",
    ) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel must be a Kernel; got {type(kernel).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule; got {type(schedule).__name__}")
        if transform is not None and not isinstance(transform, Transform):
            raise TypeError(f"transform must be a numpyro transform or None; got {type(transform).__name__}")
        if parameterization is None:
            parameterization = next(iter(kernel.parameterizations))
        if parameterization not in kernel.parameterizations:
            known = ", ".join(map(repr, kernel.parameterizations))
            raise ValueError(
                f"parameterization must be one of {known} for a {type(kernel).__name__}; got {parameterization!r}"
            )
        if last_step not in ("kernel", "network"):
            raise ValueError(f"last_step must be 'kernel' or 'network'; got {last_step!r}")
        if not name or not isinstance(name, str):
            raise ValueError(f"name must be a non-empty string; got {name!r}")
        if kernel.is_discrete:
            if transform is not None:
                raise ValueError(f"transform must be None for a {type(kernel).__name__}: its data are discrete")
            if schedule.init_params() is not None:
                raise ValueError(
                    f"schedule must be fixed for a {type(kernel).__name__}: the gradient with frozen noise that learns "
                    "one needs a continuous kernel (the paper uses FixedSchedule.constant_erasure)"
                )
        if transform is not None:
            check_transform(transform, kernel.event_shape)
        rule = kernel.parameterizations[parameterization]
        if not rule.allows_full_erasure and not np.isfinite(schedule.log_snr(schedule.init_params())[-1]):
            raise ValueError(
                f"schedule must have beta_T < 1 for parameterization {parameterization!r}, which is infinite there"
            )
        self._set(
            kernel=kernel,
            schedule=schedule,
            network=Network(network).configured(num_timesteps=schedule.num_timesteps, outputs=rule.outputs),
            parameterization=parameterization,
            last_step=last_step,
            transform=transform,
            name=name,
        )

    # --- parts -------------------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.schedule.num_timesteps

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.kernel.event_shape

    @property
    def support(self) -> constraints.Constraint:
        """The support of a datum, in data units."""
        return data_support(self.kernel.support, self.transform, self.kernel.event_ndim)

    @property
    def network_site(self) -> str:
        """The name of the parameter site of the network."""
        return f"{self.name}.network$params"

    @property
    def schedule_site(self) -> str:
        """The name of the parameter site of a learned schedule."""
        return f"{self.name}.schedule$params"

    def init_params(self, rng_key: Array, context: Any = None, context_batch_ndim: int = 0) -> dict[str, Any]:
        """Initial parameters by site name, as SVI would start them.

        :param rng_key: a JAX random key.
        :param context: an example of the covariates, where there are any.
        :param context_batch_ndim: the number of its batch axes.
        """
        params = {self.network_site: self._init_network(rng_key, context, context_batch_ndim)}
        if (schedule := self.schedule.init_params()) is not None:
            params[self.schedule_site] = schedule
        return {site: value for site, value in params.items() if jax.tree.leaves(value)}

    def _init_network(self, rng_key: Array, context: Any, context_batch_ndim: int) -> Any:
        self._check_context(context)
        if rng_key is None:
            raise ValueError("params is needed, or a numpyro.handlers.seed handler that can initialise the network")
        one = jax.tree.map(lambda c: jnp.asarray(c)[(0,) * context_batch_ndim][None], context)
        x_t = self.kernel.as_state(jnp.zeros((1, *self.event_shape)))
        return self.network.init(rng_key, x_t, jnp.ones(1, int), jnp.zeros(1), one)

    def reverse_process(
        self,
        params: dict[str, Any],
        *,
        context: Any = None,
        context_batch_ndim: int = 0,
        num_timesteps: int | None = None,
    ) -> ReverseProcess:
        """The reverse process in the model's space, with everything bound; its outputs' shapes are checked here.

        :raises ValueError: if parameters are missing, or the network's outputs do not fit.
        """
        self._check_context(context)
        rates = self.schedule.rates(params.get(self.schedule_site))
        if num_timesteps is not None and num_timesteps != self.num_timesteps:
            if not self.kernel.parameterizations[self.parameterization].shortens:
                raise ValueError(
                    f"num_timesteps must be {self.num_timesteps} for parameterization {self.parameterization!r}, "
                    "whose outputs describe steps of the trained length"
                )
            rates = rates.shortened(num_timesteps)
        process = ReverseProcess(
            self.kernel,
            rates,
            self.network,
            params.get(self.network_site, {}),
            parameterization=self.parameterization,
            last_step=self.last_step,
            context=context,
            context_batch_ndim=context_batch_ndim,
        )
        if process.num_timesteps > process.first_network_step:
            batch = jnp.broadcast_shapes((1,), *_batch_shapes(context, context_batch_ndim))

            def one_step() -> Array:
                x_t = self.kernel.as_state(jnp.zeros(batch + self.event_shape))
                return process(x_t, process.rates.at(-1)).sample(jax.random.key(0))

            try:
                jax.eval_shape(one_step)
            except FlaxError as error:
                given = "no context was given" if context is None else "context was given"
                raise ValueError(f"params do not fit the network ({given}): {error}") from error
        return process

    def _check_context(self, context: Any) -> None:
        if context is not None and "context" not in self.network.inputs:
            raise ValueError("context was given, but the signature of the network does not name context")

    # --- programs ----------------------------------------------------------------------------------------------

    def model(self, x: Any = None, *, context: Any = None, batch_size: int | None = None) -> Array:
        r"""The generative program, whole trajectories: site ``"path"`` holds :math:`x_1 … x_T` in the model's space,
        site ``"x"`` is :math:`x_0` in data units; plate ``"data"`` over the first axis of ``x``.

        Works with any ELBO. For a binomial kernel, whose path is discrete, use
        :class:`~numpyro.infer.TraceGraph_ELBO` (the others warn), or the bound pair, which has no latent site.

        :param x: data of shape ``(N, *event_shape)`` or one datum; ``None`` generates.
        :param context: covariates, an array (or pytree) with N as its first axis.
        :param batch_size: rows drawn per evaluation, by the plate's subsampling.
        :return: x.
        """
        x = None if x is None else self._check_rows_or_one(x)
        plate, batch_ndim = self._plate(x, context, batch_size)
        process = self._process(context, batch_ndim)
        with plate as rows:
            process = process.with_context(_take(context, rows))
            batch_shape = () if rows is None else (len(rows),)
            trajectory = ReverseTrajectory(self.kernel, process.rates, process, batch_shape=batch_shape)
            path = numpyro.sample("path", trajectory, infer={"event_dims": self._path_dims})
            last = in_data_units(process.last(jnp.take(path, 0, axis=-1 - self.kernel.event_ndim)), self.transform)
            return numpyro.sample("x", last, obs=_take(x, rows), infer={"event_dims": self._path_dims[1:]})

    def guide(
        self,
        x: Any,
        *,
        context: Any = None,
        batch_size: int | None = None,
        order: Literal["forward", "posterior"] = "forward",
    ) -> None:
        r"""The forward trajectory :math:`q(x_{1…T} \mid x_0)` as the guide of :meth:`model`; nothing in it is trained
        but a learned schedule.

        :param order: ``"forward"``: :math:`\prod q(x_t \mid x_{t-1})`; ``"posterior"``:
            :math:`q(x_T \mid x_0) \prod q(x_{t-1} \mid x_t, x_0)`, the same law in the order for which
            :class:`~numpyro.infer.TraceMeanField_ELBO` has analytic KLs.
        """
        if order not in ("forward", "posterior"):
            raise ValueError(f"order must be 'forward' or 'posterior'; got {order!r}")
        x = self._check_rows_or_one(x)
        rates = self.schedule.rates(self._schedule_param())
        plate, _ = self._plate(x, context, batch_size)
        with plate as rows:
            z = self.to_model_space(_take(x, rows))
            trajectory: ForwardTrajectory | PosteriorTrajectory
            if order == "forward":
                trajectory = ForwardTrajectory(self.kernel, rates, z)
            else:
                trajectory = PosteriorTrajectory(self.kernel, rates, z, rng_key=numpyro.prng_key())
            numpyro.sample("path", trajectory, infer={"event_dims": self._path_dims})

    def bound_model(self, x: Any, *, context: Any = None, batch_size: int | None = None, num_times: int = 1) -> None:
        r"""The bound K in factors, with data and time steps subsampled; unbiased for the sum of K over the data.

        For :class:`~numpyro.infer.Trace_ELBO` and :class:`~numpyro.infer.TraceMeanField_ELBO`, which give the same.
        :class:`~numpyro.infer.RenyiELBO` raises: a log of a mean does not separate over the steps. Each datum gets
        times of its own, drawn by their importance and stratified over the batch; KLs are analytic.

        :param x: data of shape ``(N, *event_shape)``, or one datum.
        :param context: covariates, an array (or pytree) with N as its first axis.
        :param batch_size: rows drawn per evaluation, with replacement; ``None`` takes all.
        :param num_times: time steps drawn per row, evaluated in one network call.
        """
        self._subsampled_model(x, context, batch_size, num_times, step_cost, with_ends=True)

    def bound_guide(self, x: Any, *, context: Any = None, batch_size: int | None = None, num_times: int = 1) -> None:
        """The guide of :meth:`bound_model`: empty, for all latents are drawn inside and enter by factors."""

    def mse_model(self, x: Any, *, context: Any = None, batch_size: int | None = None, num_times: int = 1) -> None:
        r"""Squared errors: :math:`-\sum_t E \lVert x_{t-1} - f_\mu(x_t, t) \rVert^2`, in the model's space.

        Data and time steps are subsampled as in :meth:`bound_model`; the guide is :meth:`bound_guide`.

        The objective of later practice; no bound. The irreducible part, the variance of
        :math:`q(x_{t-1} \mid x_t, x_0)`, is left out: its mean stands for :math:`x_{t-1}`. :math:`f_\Sigma` gets no
        gradient and stays at its start: :math:`\beta_t` with the stock networks (but for ``"direct"``). For binomial
        kernels :math:`f_b` stands for :math:`f_\mu`.

        :param x: data of shape ``(N, *event_shape)``, or one datum.
        :param context: covariates, an array (or pytree) with N as its first axis.
        :param batch_size: rows drawn per evaluation, with replacement; ``None`` takes all.
        :param num_times: time steps drawn per row, evaluated in one network call.
        :raises ValueError: where the schedule is learned: the errors vanish with the rates; or where no step is the
            network's.
        """
        if self.schedule.init_params() is not None:
            raise ValueError("schedule must be fixed for squared errors, which vanish with the rates; it is learned")
        if self.num_timesteps == 1 and self.last_step == "kernel":
            raise ValueError("last_step must be 'network' for squared errors of one step: the kernel's has no f_mu")
        self._subsampled_model(x, context, batch_size, num_times, step_squared_error, with_ends=False)

    def prior(
        self,
        params: dict[str, Any] | None = None,
        *,
        context: Any = None,
        num_timesteps: int | None = None,
        log_prob: Any = None,
        context_event_dim: int | None = None,
        validate_args: bool | None = None,
    ) -> DiffusionPrior:
        r"""The trained diffusion as a NumPyro distribution over x, in data units.

        :param params: parameters by site name, such as ``fit.params`` or ``svi_result.params`` (other sites in it are
            ignored). ``None`` inside a NumPyro program declares them as ``numpyro.param`` sites.
        :param context: covariates; leading axes that the network takes as batch axes become the batch shape.
        :param context_event_dim: the number of the context's other axes, where the network would take several.
        :param validate_args: as for any NumPyro distribution.
        :param num_timesteps: a shorter chain through the trained one's steps; a model of its own, with its own K.
        :param log_prob: ``None`` (``log_prob`` raises), or :class:`~pp_diffusion.Bound` or
            :class:`~pp_diffusion.Importance`, which make it a deterministic function of x.
        :raises ValueError: if parameters are missing.
        """
        if params is None:
            try:
                params = self._param_sites(context, 0)
            except AssertionError:  # numpyro.param, without a handler that could seed it
                raise ValueError("params is needed outside a NumPyro program, such as fit.params; got None") from None
        else:
            self._check_params(params, context)
        own = {site: params[site] for site in (self.network_site, self.schedule_site) if site in params}
        return DiffusionPrior(
            self,
            own,
            context=context,
            num_timesteps=num_timesteps,
            log_prob=log_prob,
            context_event_dim=context_event_dim,
            validate_args=validate_args,
        )

    def flow(
        self,
        params: dict[str, Any] | None = None,
        *,
        context: Any = None,
        num_steps: int = 16,
        solver: Any = None,
        trace: Hutchinson | None = None,
        context_event_dim: int | None = None,
        validate_args: bool | None = None,
    ) -> DiffusionFlow:
        """The same network as a deterministic map from N(0, I) with a density, a :class:`~pp_diffusion.DiffusionFlow`.

        ``params``, ``context`` and ``context_event_dim`` are those of :meth:`prior`, the others those of the flow.
        """
        prior = self.prior(params, context=context, context_event_dim=context_event_dim)
        return DiffusionFlow(prior, num_steps=num_steps, solver=solver, trace=trace, validate_args=validate_args)

    # --- data --------------------------------------------------------------------------------------------------

    def check_data(self, x: Any, name: str = "x") -> Array:
        """``x`` as an array of states in data units, refused where it cannot be data.

        Values are checked where they are known, that is outside transformations.

        :raises ValueError: naming the argument, what came and what was expected.
        """
        if x is None:
            raise ValueError(f"{name} must be data of shape (*batch, {_plain_shape(self.event_shape)}); got None")
        self.check_shape(x, name)
        if not isinstance(x, jax.core.Tracer):
            values = np.asarray(x)
            if values.dtype.kind not in "biuf" and values.dtype != jnp.bfloat16:
                raise TypeError(f"{name} must hold numbers; got dtype {values.dtype}")
            bad = ~np.isfinite(values)
            if bad.any():
                raise ValueError(
                    f"{name} must be finite; {np.count_nonzero(bad)} of {bad.size} values are NaN or infinite. A bound "
                    "with masked values is no bound: impute or drop them, or train on complete rows"
                )
            if self.transform is None:
                self.kernel.check_data(values, name)
            elif not np.all(inside := self.support(values)):
                raise ValueError(
                    f"{name} must lie in the transform's codomain; {np.count_nonzero(~np.asarray(inside))} data do not"
                )
            if not self.kernel.is_discrete:
                self._check_in_model_space(values, name)
        return self.kernel.as_state(x)

    def check_shape(self, x: Any, name: str = "x") -> None:
        """Refuses what has not the shape of a batch of data.

        :raises ValueError: naming the argument, what came and what was expected.
        """
        shape = np.shape(x)
        if len(shape) < self.kernel.event_ndim or shape[len(shape) - self.kernel.event_ndim :] != self.event_shape:
            raise ValueError(f"{name} must have shape (*batch, {_plain_shape(self.event_shape)}); got {shape}")
        if 0 in shape:
            raise ValueError(f"{name} must hold at least one datum; got shape {shape}")

    def to_model_space(self, x: Array) -> Array:
        """x in the model's space."""
        return x if self.transform is None else self.transform._inverse(x)

    # --- inner -------------------------------------------------------------------------------------------------

    @property
    def _path_dims(self) -> list[str]:
        return ["step", *(f"x_dim_{i}" for i in range(self.kernel.event_ndim))]

    def _subsampled_model(
        self,
        x: Any,
        context: Any,
        batch_size: int | None,
        num_times: int,
        cost_of: Callable[[Array, ReverseProcess, Array, Array], Array],
        *,
        with_ends: bool,
    ) -> None:
        """Minus the sum of ``cost_of`` over data and steps, both subsampled, as factors."""
        x = self._check_rows_or_one(x)
        num_times = positive_int("num_times", num_times)
        rng_key = numpyro.prng_key()
        if rng_key is None:
            raise ValueError("rows and times are drawn here: run it under numpyro.handlers.seed or in SVI")
        row_key, time_key, noise_key, end_key = jax.random.split(rng_key, 4)
        single = x.ndim == self.kernel.event_ndim
        x, context = (x[None], jax.tree.map(lambda c: jnp.asarray(c)[None], context)) if single else (x, context)
        self._check_rows(len(x), context, batch_size)
        process = self._process(context, 1)
        with self._data_plate(row_key, len(x), batch_size) as rows:
            x, process = x[rows], process.with_context(_take(context, rows))
            z = self.to_model_space(x)
            if with_ends:
                last, prior_kl = fixed_terms(end_key, process, z)
                jacobian = log_abs_det(self.transform, z, x, self.kernel.event_ndim)
                numpyro.factor(f"{self.name}.ends", last - prior_kl - jacobian)
            num_steps = process.num_timesteps - process.first_network_step
            if num_steps:
                index, weight = draw_steps(time_key, process, len(rows), num_times)
                cost = weight * cost_of(noise_key, process, jnp.broadcast_to(z, (num_times, *z.shape)), index)
            else:
                cost = jnp.zeros((num_times, len(rows)))
            # A plate that is always subsampled, also when all steps are drawn: RenyiELBO then refuses this program.
            size = max(num_steps, num_times + 1)
            drawn = {f"{self.name}.time": jnp.arange(num_times)}
            with handlers.substitute(data=drawn), numpyro.plate(f"{self.name}.time", size, num_times, dim=-2):
                numpyro.factor(f"{self.name}.steps", -cost * (num_steps / size))

    def _param_sites(self, context: Any, context_batch_ndim: int) -> dict[str, Any]:
        """The parameters, declared as ``numpyro.param`` sites."""
        params = {self.schedule_site: self._schedule_param()}
        if self._network_has_params(context, context_batch_ndim):
            init = partial(self._init_network, context=context, context_batch_ndim=context_batch_ndim)
            params[self.network_site] = numpyro.param(self.network_site, init)
        return {site: value for site, value in params.items() if value is not None}

    def _network_has_params(self, context: Any, context_batch_ndim: int) -> bool:
        init = partial(self._init_network, context=context, context_batch_ndim=context_batch_ndim)
        return bool(jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))

    def _schedule_param(self) -> Any:
        init = self.schedule.init_params()
        return None if init is None else numpyro.param(self.schedule_site, lambda rng_key: init)

    def _process(self, context: Any, batch_ndim: int) -> ReverseProcess:
        params = self._param_sites(context, batch_ndim)
        return self.reverse_process(params, context=context, context_batch_ndim=batch_ndim)

    def _check_params(self, params: dict[str, Any], context: Any) -> None:
        if not isinstance(params, dict):
            raise TypeError(f"params must be a dict by site name, such as fit.params; got {type(params).__name__}")
        needed = [] if self.schedule.init_params() is None else [self.schedule_site]
        if self.network_site not in params and self._network_has_params(context, 0):
            needed.append(self.network_site)
        missing = [site for site in needed if site not in params]
        if missing:
            raise ValueError(f"params must hold {' and '.join(map(repr, missing))}; it holds {sorted(params)}")

    def _check_in_model_space(self, values: np.ndarray, name: str) -> None:
        # known data may be checked while a program is traced
        with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
            states = self.kernel.as_state(values)
            check_precision(values, np.asarray(states), self.kernel.event_ndim, name)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self.transform)):
                return
            if not np.isfinite(self.to_model_space(states)).all():
                raise ValueError(f"{name} must lie inside the transform's codomain, not on its edge")

    def _check_rows_or_one(self, x: Any) -> Array:
        x = self.check_data(x)
        if x.ndim > self.kernel.event_ndim + 1:
            raise ValueError(f"x must have shape (N, {_plain_shape(self.event_shape)}) or be one datum; got {x.shape}")
        return x

    def _plate(self, x: Array | None, context: Any, batch_size: int | None) -> tuple[Any, int]:
        """The plate ``"data"`` over rows (none for one datum, or for generation), and its number of axes."""
        leaves = jax.tree.leaves(context)
        if x is None:
            num_rows = jnp.shape(leaves[0])[0] if leaves and jnp.ndim(leaves[0]) else None
        else:
            num_rows = len(x) if x.ndim > self.kernel.event_ndim else None
        if num_rows is None:
            if batch_size is not None:
                raise ValueError(f"batch_size must be None without rows to draw from; got {batch_size}")
            return nullcontext(), 0
        self._check_rows(num_rows, context, batch_size)
        return numpyro.plate("data", num_rows, subsample_size=batch_size), 1

    def _data_plate(self, rng_key: Array, num_rows: int, batch_size: int | None) -> Any:
        """The plate ``"data"`` with rows drawn here: its own drawing without replacement loops on a CPU."""
        if batch_size is None or batch_size == num_rows:
            return numpyro.plate("data", num_rows, dim=-1)
        rows = jax.random.randint(rng_key, (batch_size,), 0, num_rows)
        with handlers.substitute(data={"data": rows}):
            return numpyro.plate("data", num_rows, subsample_size=batch_size, dim=-1)

    @staticmethod
    def _check_rows(num_rows: int, context: Any, batch_size: int | None) -> None:
        if batch_size is not None and not 1 <= positive_int("batch_size", batch_size) <= num_rows:
            raise ValueError(f"batch_size must be in 1…{num_rows}, the number of rows; got {batch_size}")
        check_context_rows(context, num_rows)


def draw_steps(rng_key: Array, process: ReverseProcess, batch_size: int, num_times: int) -> tuple[Array, Array]:
    r"""Indices of steps that the network describes, of shape ``(num_times, batch_size)``, and their weights.

    Drawn by :meth:`Kernel.step_importance` mixed with the uniform law, so that a step that matters T times more than
    the others (a t = 1 by the network) is not drawn once in T; the weights make every estimate unbiased. Stratified as
    :func:`stratified_places`; uniform if all steps can be drawn for each datum.
    """
    first = process.first_network_step
    num_steps = process.num_timesteps - first
    if num_times >= num_steps:
        return first + stratified_times(rng_key, batch_size, num_times, num_steps), jnp.ones(())
    importance = jax.lax.stop_gradient(step_importance(process.kernel, process.rates.at(slice(first, None))))
    shares = UNIFORM_SHARE / num_steps + (1 - UNIFORM_SHARE) * importance / importance.sum()
    edges = jnp.cumsum(shares)
    edges = jnp.concatenate([jnp.zeros(1), edges / edges[-1]])
    index = jnp.searchsorted(edges[1:-1], stratified_places(rng_key, batch_size, num_times), side="right")
    return first + index, 1 / (num_steps * jnp.diff(edges)[index])  # the law as rounded, not as meant


def step_importance(kernel: Kernel, rates: Rates) -> Array:
    """:meth:`Kernel.step_importance`, checked.

    :raises ValueError: naming it.
    """
    importance = jnp.asarray(kernel.step_importance(rates))
    if importance.shape != rates.t.shape:
        raise ValueError(
            f"kernel.step_importance must have the shape of rates.t, {rates.t.shape}; got {importance.shape}"
        )
    check_importance(importance)
    return importance


def check_importance(importance: Array) -> None:
    """Refuses values, where they are known, that are no law to draw steps by.

    :raises ValueError: naming ``kernel.step_importance``.
    """
    if isinstance(importance, jax.core.Tracer) or not importance.size:
        return
    values = np.asarray(importance)
    if not ((values >= 0) & (values < np.inf)).all() or not values.any():
        raise ValueError(f"kernel.step_importance must be finite, not negative, and not all 0; got {values}")


def stratified_times(rng_key: Array, batch_size: int, num_times: int, num_steps: int) -> Array:
    """Indices 0…num_steps-1 of shape ``(num_times, batch_size)``, each uniform, spread evenly within every column and
    over the batch (with ``num_times == num_steps`` every column holds each step once)."""
    return (stratified_places(rng_key, batch_size, num_times) * num_steps).astype(int)


def stratified_places(rng_key: Array, batch_size: int, num_times: int) -> Array:
    """Numbers in [0, 1) of shape ``(num_times, batch_size)``, each uniform, spread evenly within every column and over
    the batch."""
    turn_key, place_key = jax.random.split(rng_key)
    turn = jax.random.randint(turn_key, (), 0, batch_size)
    place = ((jnp.arange(batch_size) + turn) % batch_size + jax.random.uniform(place_key, (batch_size,))) / batch_size
    place = jnp.minimum(place, 1 - num_times * jnp.finfo(place.dtype).eps)  # sums do not round up to the next stratum
    return (jnp.arange(num_times)[:, None] + place) / num_times


def check_context_rows(context: Any, num_rows: int) -> None:
    """Refuses covariates that do not have one row per datum.

    :raises ValueError: naming ``context``.
    """
    for leaf in jax.tree.leaves(context):
        if jnp.shape(leaf)[:1] != (num_rows,):
            raise ValueError(f"context must have one row per datum, first axis {num_rows}; got shape {jnp.shape(leaf)}")


def _take(tree: Any, rows: Array | None) -> Any:
    return tree if rows is None or tree is None else jax.tree.map(lambda a: jnp.asarray(a)[rows], tree)


def _batch_shapes(context: Any, batch_ndim: int) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf)[:batch_ndim] for leaf in jax.tree.leaves(context)]


def _plain_shape(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
