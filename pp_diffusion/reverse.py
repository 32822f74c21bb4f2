r"""The learned reverse process: networks of any make, and :math:`p(x_{t-1} \mid x_t)` built from their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax.errors import FlaxError
from jax import Array

from pp_diffusion import contexts
from pp_diffusion.frozen import Frozen
from pp_diffusion.kernels import Kernel
from pp_diffusion.last_step import LastStep, as_last_step
from pp_diffusion.rules import Parameterization
from pp_diffusion.schedules import Rates

LOG_SNR_LIMIT = 20.0


class _Calls(NamedTuple):
    """What a make of network needs: its initial parameters, and a call."""

    init: Callable[..., Any]
    apply: Callable[..., Any]
    function: Callable[..., Any]  # whose signature names the inputs


class Network(Frozen):
    """One face for linen modules, nnx modules and plain callables ``network(x_t, t)``.

    The signature is read once: of ``log_snr`` and ``context`` a network is given what it names.

    :param module: a linen module, an initialised nnx module, or a callable.
    :raises TypeError: if it is none of these, or takes fewer than two positional arguments.
    """

    module: Any
    inputs: tuple[str, ...]

    def __init__(self, module: Any) -> None:
        if not callable(module):
            raise TypeError(f"network must be a linen module, an nnx module or a callable; got {type(module).__name__}")
        parameters = inspect.signature(_calls(module).function).parameters.values()
        kinds = inspect.Parameter
        positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 2 and not any(p.kind == kinds.VAR_POSITIONAL for p in parameters):
            raise TypeError(
                f"network must take (x_t, t); its signature is {inspect.signature(_calls(module).function)}"
            )
        takes_any = any(p.kind == kinds.VAR_KEYWORD for p in parameters)
        named = {p.name for p in parameters}
        self._set(module=module, inputs=tuple(n for n in ("log_snr", "context") if takes_any or n in named))

    def configured(self, **settings: Any) -> Network:
        """With those of the settings that the module has as a field (the stock networks do).

        :raises ValueError: if the module has another value there.
        """
        if not isinstance(self.module, nn.Module):
            return self
        settings = {name: value for name, value in settings.items() if hasattr(self.module, name)}
        for name, value in settings.items():
            if getattr(self.module, name) not in (None, value):
                raise ValueError(f"network has {name}={getattr(self.module, name)}; this diffusion needs {value}")
        return Network(self.module.clone(**settings)) if settings else self

    def init(self, rng_key: Array, x_t: Array, t: Array, log_snr: Array, context: Any) -> Any:
        """Initial parameters, a nested dictionary; empty for a plain callable."""
        return _calls(self.module).init(rng_key, x_t, t, **self._extra(log_snr, context))

    def __call__(self, params: Any, x_t: Array, t: Array, log_snr: Array, context: Any) -> tuple[Any, ...]:
        out = _calls(self.module).apply(params, x_t, t, **self._extra(log_snr, context))
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def _extra(self, log_snr: Array, context: Any) -> dict[str, Any]:
        given = {"log_snr": jnp.clip(log_snr, -LOG_SNR_LIMIT, LOG_SNR_LIMIT), "context": context}
        return {name: given[name] for name in self.inputs}


def _calls(module: Any) -> _Calls:
    if isinstance(module, nn.Module):
        return _linen_calls(module)
    nnx = _nnx_if_imported()
    if nnx is not None and isinstance(module, nnx.Module):
        return _nnx_calls(nnx, module)
    return _Calls(lambda rng_key, *args, **kwargs: {}, lambda params, *args, **kwargs: module(*args, **kwargs), module)


def _linen_calls(module: nn.Module) -> _Calls:
    def init(rng_key: Array, *args: Any, **kwargs: Any) -> Any:
        variables = module.init(rng_key, *args, **kwargs)
        if set(variables) - {"params"}:
            raise ValueError(
                f"network must be stateless; {type(module).__name__} has collections {sorted(variables)} "
                "(use LayerNorm or GroupNorm instead of BatchNorm)"
            )
        return variables.get("params", {})

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        return module.apply({"params": params}, *args, **kwargs)

    return _Calls(init, apply, module.__call__)


def _nnx_calls(nnx: Any, module: Any) -> _Calls:
    structure, params, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise ValueError(
            f"network must be stateless; {type(module).__name__} holds state that is no nnx.Param "
            "(dropout, batch norm and random streams are not supported)"
        )

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        state = nnx.split(module, nnx.Param)[1]
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(structure, state, rest)(*args, **kwargs)

    return _Calls(lambda rng_key, *args, **kwargs: nnx.to_pure_dict(params), apply, module.__call__)


def _nnx_if_imported() -> Any:
    """flax.nnx, if the user has it: a module of theirs can only be one of its after they imported it."""
    import sys

    return sys.modules.get("flax.nnx")


class ReverseProcess(Frozen):
    r"""A reverse trajectory in the model's space: :math:`\pi(x_T) \prod_t p(x_{t-1} \mid x_t)`, with everything bound.

    Called as ``reverse(x_t, rates)`` it returns the distribution of :math:`x_{t-1}`.

    :param Kernel kernel: the diffusion kernel.
    :param Rates rates: all T steps.
    :param Network network: the network.
    :param params: its parameters.
    :param parameterization: the name of the kernel's rule that reads the network's outputs.
    :param last_step: ``"kernel"`` (the paper: :math:`p(x_0 \mid x_1) = T_\pi`), ``"network"`` or ``"discretized"``, or
        such a :class:`~pp_diffusion.last_step.LastStep`.
    :param context: covariates, a pytree of arrays whose first ``context_batch_ndim`` axes are batch axes.
    :param guidance: the strength with which steps are led away from those whose context is null, zeros;
        ``None`` leads none.
    """

    data_fields = ("kernel", "held_rates", "params", "last_step", "context", "guidance")

    kernel: Kernel
    held_rates: Rates
    network: Network
    params: Any
    parameterization: str
    last_step: LastStep
    context: Any
    context_batch_ndim: int
    guidance: Array | None

    def __init__(
        self,
        kernel: Kernel,
        rates: Rates,
        network: Network,
        params: Any,
        *,
        parameterization: str,
        last_step: str | LastStep = "kernel",
        context: Any = None,
        context_batch_ndim: int = 0,
        guidance: Array | None = None,
    ) -> None:
        self._set(
            kernel=kernel,
            held_rates=rates,
            network=network,
            params=params,
            parameterization=parameterization,
            last_step=as_last_step(last_step),
            context=context,
            context_batch_ndim=context_batch_ndim,
            guidance=guidance,
        )

    @property
    def rule(self) -> Parameterization:
        return self.kernel.parameterizations[self.parameterization]

    @property
    def num_timesteps(self) -> int:
        return self.held_rates.num_timesteps

    @property
    def rates(self) -> Rates:
        """All T steps, in the precision of the moment; they are held in that in which they are known."""
        return self.held_rates.in_precision()

    @property
    def first_network_step(self) -> int:
        """Index of the first step that the network describes: 1 where the last step is the kernel's, else 0."""
        return self.last_step.first_network_step

    def __call__(self, x_t: Array, rates: Rates) -> dist.Distribution:
        given = self._step(x_t, rates, self.context)
        if self.guidance is None:
            return given
        null = jax.tree.map(jnp.zeros_like, self.context)
        return self.kernel.guided(given, self._step(x_t, rates, null), self.guidance)

    def _step(self, x_t: Array, rates: Rates, context: Any) -> dist.Distribution:
        batch_shape = x_t.shape[: x_t.ndim - self.kernel.event_ndim]
        t = jnp.broadcast_to(rates.t, batch_shape)
        log_snr = jnp.broadcast_to(rates.log_snr, batch_shape)
        context = contexts.over_batch(context, self.context_batch_ndim, batch_shape)
        if len(batch_shape) > 1:  # networks are fastest on rows
            x_rows, t, log_snr = (a.reshape(-1, *a.shape[len(batch_shape) :]) for a in (x_t, t, log_snr))
            context = contexts.as_rows(context, len(batch_shape))
            outputs = self.network(self.params, x_rows, t, log_snr, context)
            check_outputs(outputs, self.rule, x_rows.shape)
            outputs = tuple(out.reshape(x_t.shape) for out in outputs)
        else:
            outputs = self.network(self.params, x_t, t, log_snr, context)
            check_outputs(outputs, self.rule, x_t.shape)
        outputs = tuple(jnp.asarray(out, dtype=float) for out in outputs)  # networks may compute in less
        return self.rule.reverse(self.kernel, x_t, rates, *outputs)

    def last(self, x_1: Array) -> dist.Distribution:
        r""":math:`p(x_0 \mid x_1)`."""
        return self.last_step.law(self.kernel, self.rates.at(0), self, x_1)

    def with_context(self, context: Any, context_batch_ndim: int | None = None) -> ReverseProcess:
        """With another context, of as many batch axes unless ``context_batch_ndim`` says otherwise."""
        batch_ndim = self.context_batch_ndim if context_batch_ndim is None else context_batch_ndim
        return self.replace(context=context, context_batch_ndim=batch_ndim)

    def shortened(self, num_timesteps: int) -> ReverseProcess:
        """A chain of fewer steps through this one's.

        :raises ValueError: naming ``num_timesteps``, if the network's outputs describe steps of this length only.
        """
        if num_timesteps == self.num_timesteps:
            return self
        if not self.rule.shortens:
            raise ValueError(
                f"num_timesteps must be {self.num_timesteps} for parameterization {self.parameterization!r}, "
                "whose outputs describe steps of the trained length"
            )
        return self.replace(held_rates=self.held_rates.shortened(num_timesteps))

    def checked(self) -> Self:
        """The process itself, once a step of it has gone through abstractly.

        :raises ValueError: if the context does not fit the network, parameters are missing, or its outputs are not
            what they should be.
        """
        check_context_is_named(self.network, self.context)
        contexts.check_context(self.context)
        if self.num_timesteps > self.first_network_step:
            batch = jnp.broadcast_shapes((1,), contexts.batch_shape_of(self.context, self.context_batch_ndim))

            def one_step() -> Array:
                x_t = self.kernel.as_state(jnp.zeros(batch + self.kernel.event_shape))
                return self(x_t, self.rates.at(-1)).sample(jax.random.key(0))

            try:
                jax.eval_shape(one_step)
            except FlaxError as error:
                given = "no context was given" if self.context is None else "context was given"
                raise ValueError(f"params do not fit the network ({given}): {error}") from error
        return self


def check_context_is_named(network: Network, context: Any) -> None:
    """Refuses a context that the network is not given.

    :raises ValueError: naming ``context``.
    """
    if context is not None and "context" not in network.inputs:
        raise ValueError("context was given, but the signature of the network does not name context")


def check_outputs(outputs: tuple[Any, ...], rule: Parameterization, shape: tuple[int, ...]) -> None:
    """Refuses a network whose outputs are not ``len(rule.outputs)`` arrays of the state's shape.

    :raises ValueError: naming ``network``.
    """
    shapes = [jnp.shape(out) for out in outputs]
    if shapes != [shape] * len(rule.outputs):
        kinds = ", ".join(rule.outputs)
        raise ValueError(
            f"network must return {len(rule.outputs)} array(s) ({kinds}) of x_t's shape {shape}; "
            f"it returned {len(shapes)} of shape {', '.join(map(str, shapes))}"
        )
