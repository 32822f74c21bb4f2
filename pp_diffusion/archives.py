"""Headers and arrays in one file: a zip archive (NumPy's ``.npz``) with ``header.json`` and a ``.npy`` member for each
array; no pickle."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pp_diffusion.frozen import is_key


class _Leaf(NamedTuple):
    """Where an array of a tree is: the keys that lead to it, and its name in the file."""

    keys: list[Any]
    member: str


def pack_tree(tree: Any, name: str, arrays: dict[str, np.ndarray]) -> list[_Leaf] | None:
    if tree is None:
        return None
    leaves = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        if not all(isinstance(step, jax.tree_util.DictKey) for step in path):
            raise TypeError(f"{name} must be an array or nested dictionaries of arrays to be saved")
        put(f"{name}.{i}", leaf, arrays)
        leaves.append(_Leaf([step.key for step in path], f"{name}.{i}"))
    return leaves


def unpack_tree(leaves: list[Any] | None, arrays: dict[str, np.ndarray]) -> Any:
    if leaves is None:
        return None
    return nested([(keys, jnp.asarray(arrays[member])) for keys, member in leaves])


def nested(leaves: list[tuple[list[Any], Any]]) -> Any:
    """Nested dictionaries of values, each behind the keys that lead to it; the value itself where there are none."""
    tree: dict[Any, Any] = {}
    for keys, value in leaves:
        if not keys:
            return value
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree


def put(member: str, value: Any, arrays: dict[str, np.ndarray]) -> None:
    if is_key(value):
        value = jax.random.key_data(value)
    arrays[member] = np.asarray(value)


def write_whole(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Beside the target first, then in its place: a crash leaves the old file or none, never half of one."""
    path = path.resolve()  # where a link leads, so that it stays one
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file; {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists; {path.parent} does not")
    header = header | {"arrays": {member: [str(a.dtype), list(a.shape)] for member, a in arrays.items()}}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr("header.json", json.dumps(header, indent=1, default=_json_number))
            for member, array in arrays.items():
                buffer = io.BytesIO()
                # dtypes that NumPy lacks (bfloat16) travel as bytes; the header tells what they are
                np.lib.format.write_array(buffer, np.frombuffer(array.tobytes(), np.uint8), allow_pickle=False)
                archive.writestr(f"{member}.npy", buffer.getvalue())
        os.chmod(temporary, _mode_of(path))  # mkstemp's own mode is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _mode_of(path: Path) -> int:
    """The file's mode, or that of a new file."""
    if path.exists():
        return path.stat().st_mode & 0o7777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def read_whole(path: Path, form: str, version: int, writer: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays of a file of this format, of this version or an earlier one.

    :raises ValueError: if the file is damaged, or not one that ``writer`` wrote.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            header = json.loads(archive.read("header.json"))
            if isinstance(header, dict) and header.get("format") == form and header["format_version"] > version:
                raise _OtherFormatError(
                    f"{path} was written by pp_diffusion {header['versions']['pp_diffusion']} in format "
                    f"{header['format_version']}; this version reads up to {version}"
                )
            if not isinstance(header, dict) or header.get("format") != form:
                raise _OtherFormatError(f"{path} is no file of {writer}: its header has another format")
            arrays = {}
            for member, (dtype, shape) in header["arrays"].items():
                raw = np.lib.format.read_array(io.BytesIO(archive.read(f"{member}.npy")), allow_pickle=False)
                arrays[member] = np.frombuffer(raw.tobytes(), jnp.dtype(dtype)).reshape(shape)
    except _OtherFormatError:
        raise
    except Exception as error:  # any bytes may be there, and zip, JSON and NumPy each have their complaints
        raise ValueError(f"{path} is damaged or no file of {writer}: {type(error).__name__}: {error}") from error
    return header, arrays


class _OtherFormatError(ValueError):
    """A whole file of another kind."""


def _json_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"network or kernel holds a {type(value).__name__}, {value!r}, which a file cannot describe")
