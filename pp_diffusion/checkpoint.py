"""Trained diffusions on disk: one file, a readable header and the arrays, no pickle.

The file is a zip archive (NumPy's ``.npz``): ``header.json`` names the parts and versions, and each array is a
``.npy`` member. Stock parts are rebuilt from the header; a network of the user's own is passed back in.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import transforms as numpyro_transforms

from pp_diffusion import networks
from pp_diffusion.bounds import Bound
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.frozen import Frozen, is_key
from pp_diffusion.kernels import BinomialKernel, GaussianKernel, Kernel
from pp_diffusion.likelihood import Importance
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.schedules import FixedSchedule, LearnedSchedule, Schedule
from pp_diffusion.transforms import UniformBlocks

FORMAT = "pp_diffusion prior"
FORMAT_VERSION = 1
STOCK: dict[str, type[Frozen]] = {
    c.__name__: c for c in (GaussianKernel, BinomialKernel, FixedSchedule, LearnedSchedule, Bound, Importance)
}
STOCK_NETWORKS = {"MLP": networks.MLP, "RBF": networks.RBF, "Entrywise": networks.Entrywise}
STOCK_TRANSFORMS = {"UniformBlocks": UniformBlocks}


def save(path: str | os.PathLike[str], prior: DiffusionPrior) -> None:
    """Writes a trained diffusion to one file, whole or not at all.

    :param path: the file; an existing one is replaced once the new one is complete.
    :param DiffusionPrior prior: what to save: ``fit.prior`` or ``diffusion.prior(params)``.
    :raises TypeError: for parts that the file cannot describe: a kernel, schedule or transform of the user's own.
        A network of the user's own is noted by name, and :func:`load` asks for it.
    """
    if not isinstance(prior, DiffusionPrior):
        raise TypeError(f"prior must be a DiffusionPrior, such as fit.prior; got {type(prior).__name__}")
    diffusion = prior.diffusion
    arrays: dict[str, np.ndarray] = {}
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {m.__name__: m.__version__ for m in (jax, numpyro, np)} | {"pp_diffusion": _own_version()},
        "diffusion": {
            "name": diffusion.name,
            "parameterization": diffusion.parameterization,
            "last_step": diffusion.last_step,
            "kernel": _pack_part(diffusion.kernel, "kernel", arrays),
            "schedule": _pack_part(diffusion.schedule, "schedule", arrays),
            "transform": _pack_transform(diffusion.transform, "transform", arrays),
            "network": _pack_network(diffusion.network.module),
        },
        "num_timesteps": prior.num_timesteps,
        "params": _pack_tree(prior.params, "params", arrays),
        "context": _pack_tree(prior.context, "context", arrays),
        "context_event_dim": _context_event_dim(prior),
        "log_prob": None if prior.log_prob_rule is None else _pack_part(prior.log_prob_rule, "log_prob", arrays),
    }
    _write_whole(Path(path), header, arrays)


def load(path: str | os.PathLike[str], network: Any = None) -> DiffusionPrior:
    """Reads a file that :func:`save` wrote.

    :param path: the file.
    :param network: the network, where it was not a stock one.
    :return: the prior; its samples, for the same keys, are those of the one that was saved.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file is damaged or foreign, or needs ``network``.
    """
    header, arrays = _read(Path(path))
    try:
        return _unpack(header, arrays, network)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _unpack(header: dict[str, Any], arrays: dict[str, np.ndarray], network: Any) -> DiffusionPrior:
    parts = header["diffusion"]
    described = parts["network"]
    if "fields" in described and network is None:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in described["fields"].items()}
        network = STOCK_NETWORKS[described["type"]](**fields)
    elif network is None:
        raise ValueError(
            f"network is needed: the file was saved with {described['type']!r}, which is not a stock network"
        )
    kernel, schedule = _unpack_part(parts["kernel"], arrays), _unpack_part(parts["schedule"], arrays)
    if not isinstance(kernel, Kernel) or not isinstance(schedule, Schedule):
        raise TypeError("kernel and schedule are not what they should be")
    diffusion = Diffusion(
        kernel,
        schedule,
        network,
        parameterization=parts["parameterization"],
        last_step=parts["last_step"],
        transform=_unpack_transform(parts["transform"], arrays),
        name=parts["name"],
    )
    return diffusion.prior(
        _unpack_tree(header["params"], arrays),
        context=_unpack_tree(header["context"], arrays),
        num_timesteps=header["num_timesteps"],
        log_prob=None if header["log_prob"] is None else _unpack_part(header["log_prob"], arrays),
        context_event_dim=header["context_event_dim"],
    )


def _context_event_dim(prior: DiffusionPrior) -> int | None:
    leaves = jax.tree.leaves(prior.context)
    return min(map(jnp.ndim, leaves)) - prior.context_batch_ndim if leaves else None


# --- parts -------------------------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    """Where an array of a tree is: the keys that lead to it, and its name in the file."""

    keys: list[Any]
    member: str


def _pack_part(part: Frozen, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    kind = type(part).__name__
    if STOCK.get(kind) is not type(part):
        raise TypeError(f"{name} must be a stock one to be saved; got {type(part).__qualname__}")
    static = {k: v for k, v in vars(part).items() if k not in part.data_fields}
    for field in part.data_fields:
        _put(f"{name}.{field}", getattr(part, field), arrays)
    packed = {"type": kind, "static": static, "arrays": {f: f"{name}.{f}" for f in part.data_fields}}
    if isinstance(part, (Bound, Importance)) and is_key(part.rng_key):
        packed["key"] = str(jax.random.key_impl(part.rng_key))
    return packed


def _unpack_part(packed: dict[str, Any], arrays: dict[str, np.ndarray]) -> Frozen:
    cls = STOCK[packed["type"]]
    static = {k: tuple(v) if isinstance(v, list) else v for k, v in packed["static"].items()}
    data = [arrays[packed["arrays"][field]] for field in cls.data_fields]
    if "key" in packed:
        data = [jax.random.wrap_key_data(jnp.asarray(data[0]), impl=packed["key"])]
    return cls._unflatten(tuple(static.items()), tuple(data))


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
    try:
        rebuilt = cls(**numbers)
    except TypeError:
        rebuilt = None
    if rebuilt is None or rebuilt != transform:
        raise TypeError(f"transform of type {cls.__name__} cannot be saved with its settings")
    for key, value in numbers.items():
        _put(f"{name}.{key}", value, arrays)
    return {"type": cls.__name__, "arrays": {key: f"{name}.{key}" for key in numbers}}


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
    return cls(**{key: jnp.asarray(arrays[member]) for key, member in packed["arrays"].items()})


def _pack_network(module: Any) -> dict[str, Any]:
    kind = (
        type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", type(module).__name__)
    )
    if STOCK_NETWORKS.get(kind) is not type(module):
        return {"type": kind}
    fields = {k: getattr(module, k) for k in module.__dataclass_fields__ if k not in ("parent", "name")}
    return {"type": kind, "fields": fields}


def _pack_tree(tree: Any, name: str, arrays: dict[str, np.ndarray]) -> list[_Leaf] | None:
    if tree is None:
        return None
    leaves = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        if not all(isinstance(step, jax.tree_util.DictKey) for step in path):
            raise TypeError(f"{name} must be an array or nested dictionaries of arrays to be saved")
        _put(f"{name}.{i}", leaf, arrays)
        leaves.append(_Leaf([step.key for step in path], f"{name}.{i}"))
    return leaves


def _unpack_tree(leaves: list[Any] | None, arrays: dict[str, np.ndarray]) -> Any:
    if leaves is None:
        return None
    tree: dict[Any, Any] = {}
    for keys, member in leaves:
        value = jnp.asarray(arrays[member])
        if not keys:
            return value
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree


# --- the file ----------------------------------------------------------------------------------------------------


def _put(member: str, value: Any, arrays: dict[str, np.ndarray]) -> None:
    if is_key(value):
        value = jax.random.key_data(value)
    arrays[member] = np.asarray(value)


def _write_whole(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Beside the target first, then in its place: a crash leaves the old file or none, never half of one."""
    header = header | {"arrays": {member: [str(a.dtype), list(a.shape)] for member, a in arrays.items()}}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr("header.json", json.dumps(header, indent=1, default=_plain))
            for member, array in arrays.items():
                buffer = io.BytesIO()
                # dtypes that NumPy lacks (bfloat16) travel as bytes; the header tells what they are
                np.lib.format.write_array(buffer, np.frombuffer(array.tobytes(), np.uint8), allow_pickle=False)
                archive.writestr(f"{member}.npy", buffer.getvalue())
        umask = os.umask(0)  # mkstemp's own mode is for its owner alone
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read("header.json"))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ValueError(f"{path} is no file of ppd.save: its header has another format")
            if header["format_version"] > FORMAT_VERSION:
                raise ValueError(
                    f"{path} was written by pp_diffusion {header['versions']['pp_diffusion']} in format "
                    f"{header['format_version']}; this version reads up to {FORMAT_VERSION}"
                )
            arrays = {}
            for member, (dtype, shape) in header["arrays"].items():
                raw = np.lib.format.read_array(io.BytesIO(archive.read(f"{member}.npy")), allow_pickle=False)
                arrays[member] = np.frombuffer(raw.tobytes(), jnp.dtype(dtype)).reshape(shape)
    except (zipfile.BadZipFile, EOFError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no file of ppd.save: {error}") from error
    return header, arrays


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"network or schedule holds a {type(value).__name__}, {value!r}, which a file cannot describe")


def _own_version() -> str:
    return str(importlib.import_module("pp_diffusion").__version__)
