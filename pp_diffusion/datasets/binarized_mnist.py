"""Static binarized MNIST (Larochelle and Murray, 2011): 50 000 + 10 000 + 10 000 images of 28 × 28 bits."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from pp_diffusion.datasets.dataset import Dataset

PACKED = "binarized_mnist_packed.npz"
NUM_BITS = 28 * 28


def binarized_mnist(folder: str | Path, *, with_validation: bool = False) -> Dataset:
    """Reads ``binarized_mnist_train.amat`` and so on, lines of 784 zeros and ones; or ``binarized_mnist_packed.npz``,
    whose arrays ``train``, ``valid`` and ``test`` are such lines by :func:`numpy.packbits`.

    :param folder: the folder that holds them.
    :param bool with_validation: whether the training images have the 10 000 of validation behind them.
    :return: bits as unsigned bytes of shape ``(N, 28, 28)``, NumPy arrays. There are no labels.
    :raises FileNotFoundError, ValueError: naming the file that is missing, truncated, or no such file.
    """
    folder = Path(folder)
    read = _read_packed if (folder / PACKED).is_file() else _read_lines
    train, valid, test = (read(folder, part) for part in ("train", "valid", "test"))
    return Dataset(train=np.concatenate([train, valid]) if with_validation else train, test=test)


def _read_packed(folder: Path, part: str) -> np.ndarray:
    path = folder / PACKED
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            packed = arrays[part]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole file of packed bits with an array {part!r}: {error}") from error
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != NUM_BITS // 8:
        raise ValueError(f"{path}: {part!r} must be bytes of shape (N, {NUM_BITS // 8}); it is {packed.shape}")
    return np.unpackbits(packed, axis=1).reshape(-1, 28, 28)


def _read_lines(folder: Path, part: str) -> np.ndarray:
    path = folder / f"binarized_mnist_{part}.amat"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, and so is {folder / PACKED}")
    content = np.frombuffer(path.read_bytes(), np.uint8)
    bits = content[(content != ord(" ")) & (content != ord("\n")) & (content != ord("\r"))]
    if not bits.size or bits.size % NUM_BITS or not np.isin(bits, (ord("0"), ord("1"))).all():
        raise ValueError(f"{path} does not consist of whole lines of {NUM_BITS} zeros and ones")
    return (bits - ord("0")).reshape(-1, 28, 28)
