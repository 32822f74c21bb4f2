"""Trained diffusions on disk: one file, a readable header and the arrays, no pickle.

The file is a zip archive (NumPy's ``.npz``): ``header.json`` names the parts and versions, and each array is a
``.npy`` member. Stock parts are rebuilt from the header; a network of the user's own is passed back in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import constraints
from numpyro.distributions import transforms as numpyro_transforms

from pp_diffusion import networks
from pp_diffusion.archives import nested, pack_tree, put, read_whole, unpack_tree, write_whole
from pp_diffusion.covariates import Covariates, Encoder
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.frozen import SAVED, Frozen, is_key
from pp_diffusion.kernels import Kernel
from pp_diffusion.last_step import LAST_STEPS, LastStep
from pp_diffusion.prior import ConditionalPrior, DiffusionPrior, check_prior
from pp_diffusion.reverse import Network, ReverseProcess
from pp_diffusion.schedules import Rates, Schedule
from pp_diffusion.transforms import UniformBlocks
from pp_diffusion.version import __version__

FORMAT = "pp_diffusion prior"
#: Version 1 held the schedule and its parameters; version 2 holds the rates of the chain; version 3 what encodes a
#: context.
FORMAT_VERSION = 3
STOCK_NETWORKS: dict[str, type[nn.Module]] = {name: getattr(networks, name) for name in networks.__all__}
STOCK_TRANSFORMS = {"UniformBlocks": UniformBlocks}
DOMAINS = {name: getattr(constraints, name) for name in ("real", "positive", "unit_interval")}


def save(path: str | os.PathLike[str], prior: DiffusionPrior | ConditionalPrior) -> None:
    """Writes a trained diffusion to one file, whole or not at all.

    :param path: the file; an existing one is replaced once the new one is complete. Its mode is kept, and a symbolic
        link to it.
    :param prior: what to save: ``fit.prior`` or ``diffusion.prior(params)``. The prior of a fit with a context is a
        function of it, which is saved without an example.
    :raises TypeError: for parts that the file cannot describe: a kernel, schedule or transform of the user's own.
        A network of the user's own is noted by name, and :func:`load` asks for it.
    :raises OSError: naming ``path``, if it is a folder, or in a folder that is not there.
    """
    given = not isinstance(prior, ConditionalPrior)
    if given:
        check_prior(prior)
    process, rule = prior.process, prior.log_prob_rule if isinstance(prior, DiffusionPrior) else None
    arrays: dict[str, np.ndarray] = {}
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "diffusion": {
            "parameterization": process.parameterization,
            "last_step": process.last_step.name,
            "last_step_settings": _settings_of(process.last_step),
            "kernel": _pack_part(process.kernel, "kernel", arrays),
            "schedule": _pack_rates(process.held_rates, arrays),
            "transform": _pack_transform(prior.transform, "transform", arrays),
            "network": _pack_network(process.network.module),
        },
        "params": pack_tree(process.params, "params", arrays),
        "context": pack_tree(process.context, "context", arrays),
        "context_batch_ndim": process.context_batch_ndim,
        "is_conditional": not given,
        "covariates": pack_covariates(prior.covariates, arrays),
        "guidance": None if process.guidance is None else float(process.guidance),
        "log_prob": None if rule is None else _pack_part(rule, "log_prob", arrays),
    }
    write_whole(Path(path), header, arrays)


def load(path: str | os.PathLike[str], network: Any = None) -> DiffusionPrior | ConditionalPrior:
    """Reads a file that :func:`save` wrote.

    :param path: the file.
    :param network: the network, where it was not a stock one.
    :return: the prior, or the function of a context; its samples, for the same keys, are those of the one that was
        saved.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file is damaged or foreign, or needs ``network``.
    """
    header, arrays = read_whole(Path(path), FORMAT, FORMAT_VERSION, "ppd.save")
    try:
        return _unpack(header, arrays, network)
    except ValueError:
        raise
    except Exception as error:  # whatever a header's wrong words lead to
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _unpack(header: dict[str, Any], arrays: dict[str, np.ndarray], network: Any) -> DiffusionPrior | ConditionalPrior:
    parts = header["diffusion"]
    kernel, transform = _unpack_part(parts["kernel"], arrays), _unpack_transform(parts["transform"], arrays)
    if not isinstance(kernel, Kernel):
        raise TypeError("kernel is not what it should be")
    params, context = (unpack_tree(header[name], arrays) for name in ("params", "context"))
    rule = None if header["log_prob"] is None else _unpack_part(header["log_prob"], arrays)
    network = _unpack_network(parts["network"], network)
    last_step = LAST_STEPS[parts["last_step"]](**parts.get("last_step_settings", {}))
    if header["format_version"] == 1:
        diffusion = unpack_diffusion(parts, arrays, network)
        return diffusion.prior(
            params,
            context=context,
            num_timesteps=header["num_timesteps"],
            log_prob=rule,
            context_event_dim=header["context_event_dim"],
        )
    rates = _unpack_rates(parts["schedule"], arrays)
    outputs = kernel.parameterizations[parts["parameterization"]].outputs
    process = ReverseProcess(
        kernel,
        rates,
        Network(network).configured(num_timesteps=int(rates.t[-1]), outputs=outputs),
        params,
        parameterization=parts["parameterization"],
        last_step=last_step.bound(kernel, transform),
        context=context,
        context_batch_ndim=header["context_batch_ndim"],
        guidance=None if header.get("guidance") is None else jnp.asarray(header["guidance"], float),
    )
    covariates = unpack_covariates(header.get("covariates"), arrays)
    if header.get("is_conditional"):
        assert covariates is not None
        return ConditionalPrior(process, transform, covariates)
    return DiffusionPrior(process, transform, covariates=covariates, log_prob=rule)


def pack_diffusion(diffusion: Diffusion, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A diffusion's parts for a header; their arrays join ``arrays``.

    :raises TypeError: for a part of the user's own, but for a network, which is noted by name.
    """
    return {
        "name": diffusion.name,
        "parameterization": diffusion.parameterization,
        "last_step": diffusion.last_step.name,
        "last_step_settings": _settings_of(diffusion.last_step),
        "kernel": _pack_part(diffusion.kernel, "kernel", arrays),
        "schedule": _pack_part(diffusion.schedule, "schedule", arrays),
        "transform": _pack_transform(diffusion.transform, "transform", arrays),
        "network": _pack_network(diffusion.network.module),
    }


def unpack_diffusion(parts: dict[str, Any], arrays: dict[str, np.ndarray], network: Any = None) -> Diffusion:
    """What :func:`pack_diffusion` packed."""
    kernel, schedule = (_unpack_part(parts[part], arrays) for part in ("kernel", "schedule"))
    if not isinstance(kernel, Kernel) or not isinstance(schedule, Schedule):
        raise TypeError("kernel or schedule is not what it should be")
    return Diffusion(
        kernel,
        schedule,
        _unpack_network(parts["network"], network),
        parameterization=parts["parameterization"],
        last_step=LAST_STEPS[parts["last_step"]](**parts.get("last_step_settings", {})),
        transform=_unpack_transform(parts["transform"], arrays),
        name=parts["name"],
    )


def pack_covariates(covariates: Covariates | None, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """What encodes a context, for a header.

    :raises TypeError: where the context is no array and no nested dictionaries of arrays.
    """
    if covariates is None:
        return None
    packed = []
    found = jax.tree_util.tree_leaves_with_path(covariates.encoders, is_leaf=lambda node: isinstance(node, Encoder))
    for i, (path, encoder) in enumerate(found):
        if not all(isinstance(step, jax.tree_util.DictKey) for step in path):
            raise TypeError("context must be an array or nested dictionaries of arrays to be saved")
        packed.append([[step.key for step in path], _pack_part(encoder, f"covariates.{i}", arrays)])
    return {"drop": covariates.drop, "encoders": packed}


def unpack_covariates(packed: dict[str, Any] | None, arrays: dict[str, np.ndarray]) -> Covariates | None:
    """What :func:`pack_covariates` packed."""
    if packed is None:
        return None
    return Covariates(nested([(keys, _unpack_part(part, arrays)) for keys, part in packed["encoders"]]), packed["drop"])


def versions() -> dict[str, str]:
    """Of what a file was written with."""
    return {m.__name__: m.__version__ for m in (jax, numpyro, np)} | {"pp_diffusion": __version__}


# --- parts -------------------------------------------------------------------------------------------------------


def _settings_of(last_step: LastStep) -> dict[str, Any]:
    if LAST_STEPS.get(last_step.name) is not type(last_step):
        raise TypeError(f"last_step must be a stock one to be saved; got {type(last_step).__qualname__}")
    return {k: v for k, v in vars(last_step).items() if k not in last_step.data_fields}


def _pack_rates(rates: Rates, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    for field, value in rates._asdict().items():
        put(f"schedule.{field}", value, arrays)
    return {"type": "Rates", "arrays": {field: f"schedule.{field}" for field in rates._fields}}


def _unpack_rates(packed: dict[str, Any], arrays: dict[str, np.ndarray]) -> Rates:
    if packed["type"] != "Rates":
        raise TypeError(f"schedule is not what it should be: {packed['type']}")
    fields: list[Any] = [arrays[packed["arrays"][field]] for field in Rates._fields]  # NumPy's, in their precision
    return Rates(*fields)


def _pack_part(part: Frozen, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    kind = next((kind for kind, cls in SAVED.items() if cls is type(part)), None)
    if kind is None:
        raise TypeError(f"{name} must be a stock one to be saved; got {type(part).__qualname__}")
    static = {k: v for k, v in vars(part).items() if k not in part.data_fields}
    for field in part.data_fields:
        put(f"{name}.{field}", getattr(part, field), arrays)
    packed = {"type": kind, "static": static, "arrays": {f: f"{name}.{f}" for f in part.data_fields}}
    key: Any = getattr(part, "rng_key", None)
    if is_key(key):
        packed["key"] = str(jax.random.key_impl(key))
    return packed


def _unpack_part(packed: dict[str, Any], arrays: dict[str, np.ndarray]) -> Frozen:
    cls = SAVED[packed["type"]]
    static = {k: tuple(v) if isinstance(v, list) else v for k, v in packed["static"].items()}
    data = [arrays[packed["arrays"][field]] for field in cls.data_fields]
    if "key" in packed:
        data = [jax.random.wrap_key_data(jnp.asarray(data[0]), impl=packed["key"])]
    return cls.of(**static, **dict(zip(cls.data_fields, data, strict=True)))


def _pack_transform(transform: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if transform is None:
        return None
    cls = type(transform)
    if isinstance(transform, numpyro_transforms.ComposeTransform):
        parts = [_pack_transform(part, f"{name}.{i}", arrays) for i, part in enumerate(transform.parts)]
        return {"type": cls.__name__, "parts": parts}
    if STOCK_TRANSFORMS.get(cls.__name__) is cls:
        return {"type": cls.__name__, "static": transform.settings}
    if getattr(numpyro_transforms, cls.__name__, None) is not cls:
        raise TypeError(f"transform must be a stock one or one of NumPyro's to be saved; got {cls.__qualname__}")
    numbers = {
        k: v
        for k, v in vars(transform).items()
        if not k.startswith("_") and isinstance(v, (jax.Array, np.ndarray, float, int))
    }
    named, given = {}, {}
    if isinstance(transform, numpyro_transforms.AffineTransform):  # behind another one it has a part of the numbers
        given = {"domain": transform.domain}
        named = {key: name for key, domain in given.items() for name in DOMAINS if DOMAINS[name] is domain}
    try:
        rebuilt = cls(**numbers, **given) if len(named) == len(given) else None
    except TypeError:
        rebuilt = None
    if rebuilt is None or rebuilt != transform:
        raise TypeError(f"transform of type {cls.__name__} cannot be saved with its settings")
    for key, value in numbers.items():
        put(f"{name}.{key}", value, arrays)
    return {"type": cls.__name__, "arrays": {key: f"{name}.{key}" for key in numbers}, **named}


def _unpack_transform(packed: Any, arrays: dict[str, np.ndarray]) -> Any:
    if packed is None:
        return None
    if packed["type"] == "ComposeTransform":
        return numpyro_transforms.ComposeTransform([_unpack_transform(part, arrays) for part in packed["parts"]])
    if packed["type"] in STOCK_TRANSFORMS:
        return STOCK_TRANSFORMS[packed["type"]](**packed["static"])
    cls = getattr(numpyro_transforms, packed["type"])
    if not (isinstance(cls, type) and issubclass(cls, numpyro_transforms.Transform)):
        raise TypeError(f"{packed['type']} is no transform")
    named = {"domain": DOMAINS[packed["domain"]]} if "domain" in packed else {}
    return cls(**{key: jnp.asarray(arrays[member]) for key, member in packed["arrays"].items()}, **named)


def _pack_network(module: Any) -> dict[str, Any]:
    kind = (
        type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", type(module).__name__)
    )
    if STOCK_NETWORKS.get(kind) is not type(module):
        return {"type": kind}
    fields = {k: getattr(module, k) for k in module.__dataclass_fields__ if k not in ("parent", "name")}
    if any(isinstance(value, nn.Module) for value in fields.values()):  # it holds one of the user's own
        return {"type": kind}
    return {"type": kind, "fields": fields}


def _unpack_network(described: dict[str, Any], network: Any) -> Any:
    """``network``, or the stock one that the file describes."""
    if network is not None:
        return network
    if "fields" not in described:
        raise ValueError(
            f"network is needed: the file was saved with {described['type']!r}, which is not a stock network"
        )
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in described["fields"].items()}
    return STOCK_NETWORKS[described["type"]](**fields)
