"""MNIST: 60 000 + 10 000 handwritten digits of 28 × 28 pixels (LeCun, Cortes and Burges), from its IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pp_diffusion.datasets.dataset import Dataset

BYTES = 0x08  # IDX's code for unsigned bytes


def mnist(folder: str | Path) -> Dataset:
    """Reads the four files ``train-images-idx3-ubyte`` and so on, with or without ``.gz``.

    :param folder: the folder that holds them.
    :return: levels 0…255 as unsigned bytes of shape ``(N, 28, 28)``, NumPy arrays, and labels 0…9. To fit a density to
        them add uniform noise afresh to every batch (:func:`dequantize`).
    :raises FileNotFoundError, ValueError: naming the file that is missing, truncated, or no such file.
    """
    folder = Path(folder)
    arrays: dict[str, Any] = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"), 3)
        labels = read_idx(labels_path := _find(folder, f"{prefix}-labels-idx1-ubyte"), 1)
        if len(labels) != len(images):
            raise ValueError(f"{labels_path} holds {len(labels)} labels for {len(images)} images")
        arrays |= {part: images, f"{part}_labels": labels.astype(np.int32)}
    return Dataset(**arrays)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The unsigned bytes of an IDX file, gzipped or not.

    :param path: the file.
    :param ndim: how many axes it must have.
    :raises FileNotFoundError, ValueError: naming the file.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    start = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, BYTES, ndim)) or len(content) < start:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes with {ndim} axes")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} holds {len(content) - start} bytes of data; its head says {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder / name} is missing, with and without .gz; it is one of MNIST's four files")
