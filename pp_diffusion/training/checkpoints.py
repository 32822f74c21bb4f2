"""Checkpoints of a training run, by orbax: whole or not at all, checked when they are read, the last good one used."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pp_diffusion.version import __version__

FORMAT = "pp_diffusion training"
FORMAT_VERSION = 1
KEPT = 2


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    :ivar step: updates done.
    :ivar arrays: by name.
    :ivar notes: what JSON can say.
    """

    step: int
    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


class Checkpoints:
    """A folder of them.

    :param folder: it is made where there is none; one that holds other things is refused.
    :param float every: seconds from one to the next.
    :param identity: what run they are of; those of another are refused.
    """

    def __init__(self, folder: Any, every: float, identity: dict[str, Any]) -> None:
        self.folder = Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"checkpoint_dir must be a folder; {self.folder} is a file")
        others = [path.name for path in self._entries() if not _is_ours(path)]
        if others:
            raise ValueError(f"checkpoint_dir must be a folder of its own; {self.folder} holds {others[0]!r}")
        self.every, self.identity, self.last = every, identity, time.monotonic()

    def is_due(self) -> bool:
        """Whether the last one is so long ago."""
        return time.monotonic() - self.last >= self.every

    def save(self, checkpoint: Checkpoint) -> bool:
        """Writes one beside the others, and then deletes all but the last two; whether it could.

        Where it cannot, such as on a full disk, it warns, and the last one stays.
        """
        import orbax.checkpoint as ocp

        arrays = {name: np.asarray(a) for name, a in checkpoint.arrays.items()}
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": __version__,
            "identity": self.identity,
            "arrays": {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()},
            "notes": checkpoint.notes,
        }
        header["digest"] = _digest(header, arrays)
        full = {name: a for name, a in arrays.items() if a.size}
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(full), header=ocp.args.JsonSave(header))
        self.last = time.monotonic()
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(self.folder / str(checkpoint.step), args=items, force=True)
            if jax.process_index() == 0:
                for path in self._steps()[:-KEPT]:
                    shutil.rmtree(path, ignore_errors=True)  # what was written is there all the same
        except Exception as error:  # the file system's and tensorstore's complaints
            warnings.warn(
                f"no checkpoint could be written at update {checkpoint.step} in {self.folder}: "
                f"{type(error).__name__}: {_first_line(error)}. Training goes on; the last one is kept",
                stacklevel=3,
            )
            return False
        return True

    def restore(self) -> Checkpoint | None:
        """The last good one; ``None`` where there is none at all. Damaged ones are told and put aside.

        :raises ValueError: where they are of another run, or all are damaged.
        """
        damaged: dict[Path, str] = {}
        found = None
        for path in reversed(self._steps()):
            try:
                found = self._read(path)
                break
            except _OtherRunError:
                raise
            except Exception as error:  # any bytes may be there, and each library has its complaints
                damaged[path] = f"{type(error).__name__}: {_first_line(error)}"
        if damaged and found is None:
            path, reason = next(iter(damaged.items()))
            raise ValueError(
                f"checkpoint_dir holds no checkpoint that can be read: {path} is damaged or foreign ({reason}). Give "
                "another folder, or remove this one to begin anew"
            )
        for path, reason in damaged.items():
            assert found is not None
            aside = _aside(path)
            if jax.process_index() == 0:
                path.rename(aside)
            warnings.warn(
                f"checkpoint {path} is damaged ({reason}); it is now {aside.name}, and update {found.step} is where "
                "training goes on",
                stacklevel=3,
            )
        return found

    def _read(self, path: Path) -> Checkpoint:
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), header=ocp.args.JsonRestore())
        with _checkpointer() as checkpointer:
            read = checkpointer.restore(path, args=items)
        header, full = read["header"], read["arrays"]
        if header.get("format") != FORMAT:
            raise ValueError("it is of another program")
        if header["format_version"] > FORMAT_VERSION:
            raise _OtherRunError(
                f"{path} was written by pp_diffusion {header['version']} in format {header['format_version']}; this "
                f"version reads up to {FORMAT_VERSION}"
            )
        arrays = {
            name: np.asarray(full[name]) if name in full else np.zeros(shape, dtype)
            for name, (dtype, shape) in header["arrays"].items()
        }
        digest = header.pop("digest")
        if digest != _digest(header, arrays):
            raise ValueError("its values are not those that were written")
        for name, own in self.identity.items():
            if (came := header["identity"].get(name)) != own:
                raise _OtherRunError(
                    f"checkpoint_dir holds the checkpoints of another run: in {path}, {name} is {came!r}, here "
                    f"{own!r}. Give another folder"
                )
        return Checkpoint(int(path.name), arrays, header["notes"])

    def _entries(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.exists() else []

    def _steps(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted((path for path in self._entries() if path.name.isdigit()), key=lambda path: int(path.name))


class _OtherRunError(ValueError):
    """A whole checkpoint that is not this run's."""


@contextmanager
def terminations(wanted: bool = True) -> Iterator[list[int]]:
    """Collects SIGTERM while training, so that it can end at its next checkpoint; what came is sent again at the end.

    Only the main thread can: elsewhere none is collected, nor where it is not ``wanted``.
    """
    came: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        if came:
            signal.raise_signal(signal.SIGTERM)


def _checkpointer() -> Any:
    """Of one folder each: orbax's manager reads all of them first, and one that is damaged would hide the others."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _is_ours(path: Path) -> bool:
    name = path.name
    return path.is_dir() and (name.isdigit() or "orbax-checkpoint-tmp" in name or ".damaged" in name)


def _aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged{number}")).exists():
        number += 1
    return aside


def _digest(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
