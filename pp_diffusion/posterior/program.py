"""A user's model with its arguments, and functions traced once: what is read off a model is evaluated, not called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import jaxpr_as_fun
from numpyro import handlers
from numpyro.distributions import ImproperUniform
from numpyro.ops.provenance import track_deps_jaxpr
from numpyro.primitives import Messenger

from pp_diffusion.frozen import Frozen, is_key
from pp_diffusion.posterior.messages import Message, base_of, bijector
from pp_diffusion.prior import DiffusionPrior

Latents = dict[str, Array]

#: Among the names of sites that something depends on.
SEED = "the seed"


class Trace(NamedTuple):
    """A model's sites.

    :ivar sites: messages by name.
    :ivar log_det: of the latents that were put in, the log Jacobian of their transform.
    """

    sites: dict[str, Message]
    log_det: dict[str, Array]


class Program(Frozen):
    """A model with its arguments.

    A pytree: arrays and floats among the arguments are leaves, all others are static.

    :param model: the user's.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param known: numbers of those leaves whose values the model needs, for a shape, a condition or an index.
    """

    data_fields = ("arrays",)

    model: Callable[..., Any]
    arrays: tuple[Any, ...]
    static: tuple[Any, ...]
    structure: Any

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        known: frozenset[int] = frozenset(),
    ) -> None:
        leaves, structure = jax.tree.flatten((args, dict(kwargs)))
        given = {i for i, leaf in enumerate(leaves) if _is_array(leaf)} - known
        arrays = [leaves[i] for i in sorted(given)]
        self._set(
            model=model,
            structure=structure,
            static=tuple(None if i in given else _Constant(leaf) for i, leaf in enumerate(leaves)),
            arrays=tuple(jnp.asarray(leaf) if isinstance(leaf, float) else leaf for leaf in arrays),
        )

    def with_first(self, argument: Any) -> Program:
        """With another first argument, of the same structure.

        :raises ValueError: if the model needs the values of its arrays while it is traced.
        """
        leaves = jax.tree.leaves(argument)
        if any(constant is not None for constant in self.static[: len(leaves)]):
            raise ValueError(
                "the model needs the values of its latents while it is traced, for a shape, a condition or an index: "
                "write it in jax.numpy, with jnp.where or jax.lax.cond"
            )
        return self.replace(arrays=(*leaves, *self.arrays[len(leaves) :]))

    def trace(self, x: Array | None, latents: Latents, rng_key: Array) -> Trace:
        """The sites with x (of the site's shape, data units; ``None`` for the origin) and latents (as
        :func:`unconstrained`) put in; others are drawn."""
        return trace_model(*self.call, x, latents, rng_key)

    @property
    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The model, its arguments, its keyword arguments."""
        arrays = iter(self.arrays)
        leaves = [next(arrays) if leaf is None else leaf.value for leaf in self.static]
        args, kwargs = jax.tree.unflatten(self.structure, leaves)
        return self.model, args, kwargs


def trace_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    x: Array | None = None,
    latents: Latents | None = None,
    rng_key: Array | None = None,
) -> Trace:
    """A model's sites, at the origin of x and with other latents drawn, unless these are given."""
    fill = _Fill(model, x, latents or {})
    with full_precision():
        key = jax.random.key(0) if rng_key is None else rng_key
        sites = handlers.trace(handlers.seed(fill, key)).get_trace(*args, **kwargs)
    return Trace(sites, fill.log_det)


def trace_with_arrays(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: Callable[[Program], Traced]
) -> tuple[Program, Traced]:
    """The program with as many of its arguments as leaves as the model lets be, and a function of it.

    :param traced: makes that function; it fails where the model needs an array's values, or is in error.
    """
    leaves = jax.tree.leaves((args, dict(kwargs)))
    arrays = {i: getattr(leaf, "dtype", None) for i, leaf in enumerate(leaves) if _is_array(leaf)}
    whole = {i for i, dtype in arrays.items() if getattr(dtype, "kind", "") in tuple("biu")}

    def attempt(known: set[int]) -> tuple[Program, Traced]:
        program = Program(model, args, kwargs, frozenset(known))
        return program, traced(program)

    known: set[int] = set()
    for known in (set(), whole, set(arrays)):
        try:
            found = attempt(known)
        except Exception:
            if known == set(arrays):
                raise
        else:
            break
    for argument in _of_arguments(args, kwargs) if known else []:  # of which of them?
        if not argument & known:
            continue
        try:
            found = attempt(known - argument)
        except Exception:
            continue
        known = known - argument
    return found


def _of_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[set[int]]:
    """For each argument, the numbers of its leaves."""
    numbers = iter(range(len(jax.tree.leaves((args, dict(kwargs))))))
    in_order = [*args, *(kwargs[name] for name in sorted(kwargs))]  # as they are flattened
    return [{next(numbers) for _ in jax.tree.leaves(argument)} for argument in in_order]


class Traced(Frozen):
    """A function of arrays, traced once. Calls evaluate what was traced, and not the function.

    Two of them are equal if all that they do and refer to is, so that compiled programs can be keyed by one.

    :param function: of pytrees of arrays.
    :param args: of the shapes that it will be given.
    """

    jaxpr: _Jaxpr
    in_tree: Any
    out_tree: Any

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        self._set(jaxpr=_Jaxpr(jaxpr), in_tree=jax.tree.structure(args), out_tree=jax.tree.structure(shapes))

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        if structure != self.in_tree:
            raise TypeError(f"a traced function of {self.in_tree} was given {structure}")
        return jax.tree.unflatten(self.out_tree, jaxpr_as_fun(self.jaxpr.closed)(*leaves))

    @property
    def shapes(self) -> Any:
        """The outcome's shapes and dtypes."""
        return jax.tree.unflatten(self.out_tree, self.jaxpr.closed.out_avals)

    def sources(self, *labels: frozenset[str] | dict[str, frozenset[str]]) -> Any:
        """For each array of the outcome, the labels of the arguments that enter it.

        :param labels: one for each argument, or for each entry of a dictionary.
        """
        args = jax.tree.unflatten(self.in_tree, range(self.in_tree.num_leaves))
        found = []
        for label, arg in zip(labels, args, strict=True):
            parts = [(label[n], arg[n]) for n in sorted(arg)] if isinstance(label, dict) else [(label, arg)]
            found += [name for name, part in parts for _ in jax.tree.leaves(part)]
        # not by NumPyro's eval_provenance, whose versions up to 0.21 fail under jax 0.11
        return jax.tree.unflatten(self.out_tree, track_deps_jaxpr(self.jaxpr.closed.jaxpr, found))


class _Jaxpr:
    """A traced program, equal to others by what it does and refers to."""

    def __init__(self, closed: Any) -> None:
        self.closed = closed
        digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(closed.jaxpr)).encode())
        for constant in _constants(closed):
            value = np.asarray(jax.random.key_data(constant) if is_key(constant) else constant)
            digest.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
        self.fingerprint = digest.hexdigest()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Jaxpr) and self.fingerprint == other.fingerprint


def _constants(program: Any) -> Iterator[Any]:
    """All that a traced program refers to, in the programs within it too."""
    if hasattr(program, "consts"):
        yield from program.consts
        program = program.jaxpr
    for equation in program.eqns:
        yield from (v.val for v in equation.invars if np.ndim(getattr(v, "val", 0)))
        for part in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield from _constants(part)


def full_precision() -> Any:
    """For the user's matrix products, unless the user has chosen: a GPU's default is in error by .05 %, and so would be
    residuals, which are divided by the noise."""
    chosen = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]  # it has all flags
    return nullcontext() if chosen else jax.default_matmul_precision("highest")


def origin(fn: Any) -> Array:
    """A state that a prior's site can have, in data units."""
    prior = base_of({"fn": fn})
    z = prior.kernel.as_state(jnp.zeros(state_shape(fn)))
    return z if prior.transform is None else prior.transform(z)


def state_shape(fn: Any) -> tuple[int, ...]:
    """Of the states of a prior's site, in the model's space."""
    event_shape = base_of({"fn": fn}).kernel.event_shape
    return (*fn.shape()[: len(fn.shape()) - len(event_shape)], *event_shape)


def unconstrained(message: Message) -> Array:
    """A latent's value as :meth:`Program.trace` takes it: real numbers, where there is a transform from them."""
    transform = bijector(message["fn"])
    return message["value"] if transform is None else transform.inv(message["value"])


class _Fill(Messenger):
    """Puts x at the prior's site and values at the latent sites."""

    def __init__(self, fn: Callable[..., Any], x: Array | None, latents: Latents) -> None:
        self.x, self.latents = x, latents
        self.log_det: dict[str, Array] = {}
        self.names: set[str] = set()
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            if msg["name"] in self.names:  # NumPyro's own check is an assertion
                raise ValueError(f"model has two sites of the name {msg['name']!r}: give each its own")
            self.names.add(msg["name"])
        if msg["type"] != "sample" or msg["is_observed"] or msg["value"] is not None:
            return
        name, fn, base = msg["name"], msg["fn"], base_of(msg)
        if isinstance(base, DiffusionPrior):
            msg["value"] = origin(fn) if self.x is None else self.x
        elif name in self.latents:
            value, transform = self.latents[name], bijector(fn)
            if transform is not None:
                real, value = value, transform(value)
                log_det = transform.log_abs_det_jacobian(real, value)
                extra = jnp.ndim(log_det) - len(fn.batch_shape)
                self.log_det[name] = log_det.sum(tuple(range(-extra, 0))) if extra > 0 else log_det
            msg["value"] = value
        elif isinstance(base, ImproperUniform):
            raise ValueError(
                f"latent site {name!r} is ImproperUniform, which cannot be drawn from: SMC draws latents from their "
                "prior; give it a proper one"
            )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, float, np.floating))


class _Constant:
    """An argument that a compiled program may depend on, with equality by value (by identity where it has none)."""

    def __init__(self, value: Any) -> None:
        self.value = value = np.asarray(value) if isinstance(value, jax.Array) and not is_key(value) else value
        if isinstance(value, np.ndarray):
            self.key: Any = (value.shape, value.dtype.str, value.tobytes())
        else:
            try:
                hash(value)
                self.key = (type(value), value)
            except TypeError:
                self.key = id(value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self.key == other.key
