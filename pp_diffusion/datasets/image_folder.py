"""Photographs in a folder of the user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pp_diffusion.datasets.dataset import Dataset

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MODES = ("1", "L", "P", "RGB")


def image_folder(
    folder: str | Path,
    *,
    shape: tuple[int, int] | None = None,
    grey: bool = False,
    test_share: float = 0.25,
) -> Dataset:
    """Reads all photographs of a folder, in the order of their names, and keeps the lowest rows of each for the test.

    A patch of the test then shows nothing that a training patch shows. Patches are drawn with
    :func:`random_patches`.

    :param folder: the folder; files of other kinds (by suffix) and folders in it are left alone.
    :param shape: height and width, a window in the middle of each photograph; without it all must have one size.
    :param grey: whether colours are made grey (ITU-R 601: .299 red, .587 green, .114 blue).
    :param test_share: of the rows, in (0, 1).
    :return: levels 0…255 as unsigned bytes, NumPy arrays of shape ``(N, height, width, 3)``, or ``(N, height, width)``
        where grey. To fit a density to them add uniform noise afresh to every batch (:func:`dequantize`).
    :raises FileNotFoundError: if there is no photograph.
    :raises ValueError: naming the file that is truncated, no image of 8 bits to a colour, or of another size.
    """
    folder = Path(folder)
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be in (0, 1); got {test_share}")
    if shape is not None and (len(shape) != 2 or min(shape) < 2):
        raise ValueError(f"shape must be a height and a width of 2 or more; got {shape}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise FileNotFoundError(f"{folder} holds no file that ends in {', '.join(SUFFIXES)}")
    images: list[np.ndarray] = []
    for path in paths:
        image = read_image(path, grey=grey)
        if shape is not None:
            image = _middle(path, image, shape)
        elif images and image.shape != images[0].shape:
            raise ValueError(
                f"{path} has {image.shape[:2]} pixels, {paths[0].name} {images[0].shape[:2]}: give a shape to cut from "
                "the middle of all"
            )
        images.append(image)
    stacked = np.stack(images)
    rows = stacked.shape[1]
    kept = min(max(rows - round(test_share * rows), 1), rows - 1)
    return Dataset(train=stacked[:, :kept], test=stacked[:, kept:])


def read_image(path: Path, *, grey: bool) -> np.ndarray:
    """The levels of one file, ``(height, width, 3)`` or, where grey, ``(height, width)``.

    :raises ValueError: naming the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            levels = np.asarray(image.convert("L" if grey else "RGB")) if mode in MODES else None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a whole image: {error}") from error
    if levels is None:
        raise ValueError(f"{path} must be an image of 8 bits to a colour, grey or RGB; its mode is {mode!r}")
    return levels


def _middle(path: Path, image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    below, right = image.shape[0] - shape[0], image.shape[1] - shape[1]
    if min(below, right) < 0:
        raise ValueError(f"{path} has {image.shape[:2]} pixels, fewer than shape = {shape}")
    return image[below // 2 : below // 2 + shape[0], right // 2 : right // 2 + shape[1]]
