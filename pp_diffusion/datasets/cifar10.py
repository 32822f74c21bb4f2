"""CIFAR-10: 50 000 + 10 000 colour photographs of 32 × 32 pixels (Krizhevsky, 2009), from its python batches."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from pp_diffusion.datasets.dataset import Dataset

FOLDER = "cifar-10-batches-py"
NUM_VALUES = 3 * 32 * 32


def cifar10(folder: str | Path, *, num_batches: int = 5) -> Dataset:
    """Reads the python version, as its archive unpacks.

    The files are pickles; nothing in them is run: only arrays, bytes, numbers, lists and dictionaries are read.

    :param folder: ``cifar-10-batches-py``, or the folder that holds it.
    :param int num_batches: how many of the five training batches to read, of 10 000 images each.
    :return: levels 0…255 as unsigned bytes of shape ``(N, 32, 32, 3)``, NumPy arrays, and labels 0…9. To fit a density
        to them add uniform noise afresh to every batch (:func:`dequantize`).
    :raises FileNotFoundError, ValueError: naming the file that is missing, truncated, or no such batch.
    """
    if not 1 <= num_batches <= 5:
        raise ValueError(f"num_batches must be in 1…5; got {num_batches}")
    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    parts = [read_batch(folder / f"data_batch_{i}") for i in range(1, num_batches + 1)]
    test, test_labels = read_batch(folder / "test_batch")
    train, train_labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Dataset(train=train, test=test, train_labels=train_labels, test_labels=test_labels)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of shape ``(N, 32, 32, 3)`` and labels ``(N,)`` of one file.

    :raises FileNotFoundError, ValueError: naming the file.
    """
    try:
        batch = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; it is part of CIFAR-10's python version") from None
    except Exception as error:  # what a broken pickle raises is of any type
        raise ValueError(f"{path} is not a whole python batch of CIFAR-10: {error}") from error
    data, labels = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (NUM_VALUES,):
        raise ValueError(f"{path} is not a python batch of CIFAR-10: it holds no bytes of shape (N, {NUM_VALUES})")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(label in range(10) for label in labels):
        raise ValueError(f"{path} is not a python batch of CIFAR-10: it does not hold {len(data)} labels in 0…9")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, np.int32)


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays of numbers, and what needs no import; all else is refused before anything of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _number_type
        if (module, name) == ("_codecs", "encode"):  # how bytes are written in protocol 2
            return _latin_bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _empty_array(*_: Any) -> np.ndarray:
    """To be filled by its state, which follows in the file."""
    return np.empty(0, np.uint8)


def _number_type(code: Any, *_: Any) -> np.dtype:
    kind = np.dtype(code.decode("latin1") if isinstance(code, bytes) else code)
    if kind.hasobject:
        raise pickle.UnpicklingError("it asks for an array of objects")
    return np.dtype(kind.str)


def _latin_bytes(text: str | bytes, encoding: str | bytes) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text if isinstance(text, bytes) else text.encode("latin1")
