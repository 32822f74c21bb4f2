"""What a diffusion is made of: its parts, their parameters, and the reverse process and the prior that they make."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from pp_diffusion import contexts
from pp_diffusion.checks import positive_int
from pp_diffusion.covariates import Covariates
from pp_diffusion.data_space import DataSpace
from pp_diffusion.divergence import Hutchinson
from pp_diffusion.flow import DiffusionFlow
from pp_diffusion.frozen import Frozen
from pp_diffusion.kernels import Kernel
from pp_diffusion.last_step import LastStep, as_last_step
from pp_diffusion.prior import ConditionalPrior, DiffusionPrior
from pp_diffusion.reverse import Network, ReverseProcess, check_context_is_named
from pp_diffusion.schedules import Schedule
from pp_diffusion.solvers import Multistep
from pp_diffusion.transforms import check_transform


class Recipe(Frozen):
    """The parts of a :class:`~pp_diffusion.Diffusion`, which says what they are; and what they make."""

    data_fields = ("kernel", "schedule", "last_step", "transform")

    kernel: Kernel
    schedule: Schedule
    network: Network
    parameterization: str
    last_step: LastStep
    transform: Transform | None
    name: str

    def __init__(
        self,
        kernel: Kernel,
        schedule: Schedule,
        network: Any,
        *,
        parameterization: str | None = None,
        last_step: str | LastStep = "kernel",
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
        last_step = as_last_step(last_step)
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
            last_step=last_step.bound(kernel, transform),
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
        return self.space.event_shape

    @property
    def support(self) -> constraints.Constraint:
        """The support of a datum, in data units."""
        return self.space.support

    @property
    def space(self) -> DataSpace:
        """Where the data live: the model's space and the data's units."""
        return self.last_step.space(self.kernel, self.transform)

    @property
    def network_site(self) -> str:
        """The name of the parameter site of the network."""
        return f"{self.name}.network$params"

    @property
    def covariates_site(self) -> str:
        """The name under which parameters hold the :class:`~pp_diffusion.Covariates` that they were trained with."""
        return f"{self.name}.covariates"

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
        check_context_is_named(self.network, context)
        contexts.check_context(context)
        if rng_key is None:
            raise ValueError("params is needed, or a numpyro.handlers.seed handler that can initialise the network")
        one = jax.tree.map(lambda c: jnp.asarray(c)[(0,) * context_batch_ndim][None], context)
        x_t = self.kernel.as_state(jnp.zeros((1, *self.kernel.event_shape)))
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
        process = self.bound_process(params).with_context(context, context_batch_ndim)
        return (process if num_timesteps is None else process.shortened(num_timesteps)).checked()

    def bound_process(self, params: dict[str, Any]) -> ReverseProcess:
        """The reverse process without a context; nothing is checked."""
        return ReverseProcess(
            self.kernel,
            self.schedule.known_rates(params.get(self.schedule_site)),
            self.network,
            params.get(self.network_site, {}),
            parameterization=self.parameterization,
            last_step=self.last_step,
        )

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
        :param context: covariates; their batch axes become the batch shape. Parameters of :func:`~pp_diffusion.fit`
            know one datum's from training, and encode them as there. Others take an array whose last axis is one
            datum's; of a pytree, all arrays have the same batch axes in front.
        :param context_event_dim: for such other parameters, the number of axes of one datum's covariates, where it is
            not 1: 0 for a number, such as an integer label; 2 for an image or a set of points. Of a pytree, in the
            array that has fewest.
        :param validate_args: as for any NumPyro distribution.
        :param num_timesteps: a shorter chain through the trained one's steps; a model of its own, with its own K.
        :param log_prob: ``None`` (``log_prob`` raises), or :class:`~pp_diffusion.Bound` or
            :class:`~pp_diffusion.Importance`, which make it a deterministic function of x.
        :raises ValueError: if parameters are missing.
        """
        covariates = None if params is None else self.covariates_in(params)
        context, batch_ndim = contexts.encoded(covariates, context, context_event_dim)
        if params is None:
            try:
                params = self._param_sites(context, batch_ndim)
            except AssertionError:  # numpyro.param, without a handler that could seed it
                raise ValueError("params is needed outside a NumPyro program, such as fit.params; got None") from None
        else:
            self._check_params(params, context, batch_ndim)
        process = self.reverse_process(
            params,
            context=context,
            context_batch_ndim=batch_ndim,
            num_timesteps=None if num_timesteps is None else positive_int("num_timesteps", num_timesteps),
        )
        return DiffusionPrior(
            process, self.transform, covariates=covariates, log_prob=log_prob, validate_args=validate_args
        )

    def conditional_prior(self, params: dict[str, Any]) -> ConditionalPrior:
        """The prior as a function of the context, for parameters that :func:`~pp_diffusion.fit` trained with one.

        :raises ValueError: for others.
        """
        covariates = self.covariates_in(params)
        if covariates is None:
            raise ValueError(f"params must hold {self.covariates_site!r}, those of a fit with a context")
        return ConditionalPrior(self.bound_process(params), self.transform, covariates)

    def covariates_in(self, params: dict[str, Any]) -> Covariates | None:
        """What these parameters were trained with."""
        return params.get(self.covariates_site) if isinstance(params, dict) else None

    def flow(
        self,
        params: dict[str, Any] | None = None,
        *,
        context: Any = None,
        num_steps: int = 16,
        solver: Any = None,
        sampler: Multistep | None = None,
        trace: Hutchinson | None = None,
        context_event_dim: int | None = None,
        validate_args: bool | None = None,
    ) -> DiffusionFlow:
        """The same network as a deterministic map from N(0, I) with a density, a :class:`~pp_diffusion.DiffusionFlow`.

        ``params``, ``context`` and ``context_event_dim`` are those of :meth:`prior`, the others those of the flow.
        """
        prior = self.prior(params, context=context, context_event_dim=context_event_dim)
        return DiffusionFlow(
            prior, num_steps=num_steps, solver=solver, sampler=sampler, trace=trace, validate_args=validate_args
        )

    # --- parameters ---------------------------------------------------------------------------------------------

    def _param_sites(self, context: Any, context_batch_ndim: int) -> dict[str, Any]:
        """The parameters, declared as ``numpyro.param`` sites."""
        params = {self.schedule_site: self.schedule_param()}
        if self._network_has_params(context, context_batch_ndim):
            init = partial(self._init_network, context=context, context_batch_ndim=context_batch_ndim)
            params[self.network_site] = numpyro.param(self.network_site, init)
        return {site: value for site, value in params.items() if value is not None}

    def _network_has_params(self, context: Any, context_batch_ndim: int) -> bool:
        init = partial(self._init_network, context=context, context_batch_ndim=context_batch_ndim)
        return bool(jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))

    def schedule_param(self) -> Any:
        init = self.schedule.init_params()
        return None if init is None else numpyro.param(self.schedule_site, lambda rng_key: init)

    def bind(self, context: Any, batch_ndim: int) -> ReverseProcess:
        params = self._param_sites(context, batch_ndim)
        return self.reverse_process(params, context=context, context_batch_ndim=batch_ndim)

    def _check_params(self, params: dict[str, Any], context: Any, context_batch_ndim: int) -> None:
        if not isinstance(params, dict):
            raise TypeError(f"params must be a dict by site name, such as fit.params; got {type(params).__name__}")
        needed = [] if self.schedule.init_params() is None else [self.schedule_site]
        if self.network_site not in params and self._network_has_params(context, context_batch_ndim):
            needed.append(self.network_site)
        missing = [site for site in needed if site not in params]
        if missing:
            raise ValueError(f"params must hold {' and '.join(map(repr, missing))}; it holds {sorted(params)}")
