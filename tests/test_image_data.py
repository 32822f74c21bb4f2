"""Loaders of image files: what they read, and that they refuse broken and foreign files by name, running nothing."""

import gzip
import pickle
import re
import runpy
import struct
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pp_diffusion as ppd

RNG = np.random.default_rng(0)


# --- CIFAR-10 ------------------------------------------------------------------------------------------------------


def write_cifar(folder, num=4, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = RNG.integers(0, 256, (num, 3072), dtype=np.uint8)
        labels = RNG.integers(0, 10, num).tolist()
        content[name] = (data, labels)
        batch = {b"batch_label": b"of the tests", b"labels": labels, b"data": data, b"filenames": [b"a.png"] * num}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return content


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_reads_the_standard_files(tmp_path, protocol):
    content = write_cifar(tmp_path / "cifar-10-batches-py", protocol=protocol)
    data = ppd.datasets.cifar10(tmp_path)
    assert data.train.shape == (20, 32, 32, 3) and data.test.shape == (4, 32, 32, 3) and data.train.dtype == np.uint8
    first, labels = content["data_batch_1"]
    # a row holds the red plane, then the green and the blue one
    np.testing.assert_array_equal(data.train[2, 5, 7], first[2][[5 * 32 + 7 + 1024 * c for c in range(3)]])
    np.testing.assert_array_equal(data.train_labels[:4], labels)
    np.testing.assert_array_equal(data.test_labels, content["test_batch"][1])
    assert len(ppd.datasets.cifar10(tmp_path / "cifar-10-batches-py", num_batches=2).train) == 8
    with pytest.raises(ValueError, match="num_batches"):
        ppd.datasets.cifar10(tmp_path, num_batches=6)


def test_cifar10_reads_what_python_2_wrote(tmp_path):
    """A pickle of Python 2: strings are bytes there, and NumPy's module has its old name."""
    write_cifar(tmp_path)
    data, labels = RNG.integers(0, 256, (1, 3072), dtype=np.uint8), [3]
    raw = data.tobytes()

    def short(text):
        return b"U" + bytes([len(text)]) + text

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + short(b"b") + b"tR"
        b"(K\x01(K\x01M\x00\x0ctcnumpy\ndtype\n(" + short(b"u1") + b"K\x00K\x01tR(K\x03"
        + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    )  # fmt: skip
    whole = b"\x80\x02}(" + short(b"data") + array + short(b"labels") + b"]K\x03au."
    (tmp_path / "test_batch").write_bytes(whole)
    read = ppd.datasets.cifar10(tmp_path)
    np.testing.assert_array_equal(read.test, data.reshape(1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert read.test_labels.tolist() == labels


class Planted:
    ran = False

    def __reduce__(self):
        return (exec, ("import tests.test_image_data as t; t.Planted.ran = True",))


def test_cifar10_runs_nothing_and_refuses_by_name(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3"
    whole = path.read_bytes()
    objects = np.array([Planted()], dtype=object)
    for content, said in (
        (whole[: len(whole) // 2], "whole python batch"),
        (b"", "whole python batch"),
        (b"\x89PNG", "whole python batch"),
        (pickle.dumps(Planted(), protocol=2), "asks for"),
        (pickle.dumps({b"data": objects, b"labels": [1]}, protocol=2), "whole python batch"),
        (pickle.dumps([1, 2]), "no bytes of shape"),
        (pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [1, 2]}, protocol=2), "no bytes of shape"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, protocol=2), "no bytes of shape"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 12]}, protocol=2), "labels"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 2]}, protocol=2), "labels"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data_batch_3 is not.*{said}"):
            ppd.datasets.cifar10(tmp_path)
    assert not Planted.ran
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3 is missing"):
        ppd.datasets.cifar10(tmp_path)


# --- MNIST ---------------------------------------------------------------------------------------------------------


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, zipped=True, num=5):
    arrays = {}
    for prefix, count in (("train", num), ("t10k", num - 2)):
        arrays[f"{prefix}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = RNG.integers(0, 10, count).astype(np.uint8)
    for name, array in arrays.items():
        content = idx(array)
        (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    return arrays


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_reads_the_four_files(tmp_path, zipped):
    arrays = write_mnist(tmp_path, zipped)
    data = ppd.datasets.mnist(tmp_path)
    np.testing.assert_array_equal(data.train, arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test, arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.train_labels, arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])


def test_mnist_refuses_by_name(tmp_path):
    arrays = write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole, content = path.read_bytes(), idx(arrays["train-images-idx3-ubyte"])
    for broken, said in (
        (whole[:-20], "whole gzip file"),
        (gzip.compress(content[:-1]), "bytes of data"),
        (gzip.compress(content + b"0"), "bytes of data"),
        (content[:9], "IDX file"),
        (gzip.compress(idx(arrays["train-labels-idx1-ubyte"])), "IDX file"),
        (b"", "IDX file"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte.gz.*{said}"):
            ppd.datasets.mnist(tmp_path)
    path.write_bytes(gzip.compress(idx(arrays["train-images-idx3-ubyte"][1:])))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz holds 5 labels for 4"):
        ppd.datasets.mnist(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte is missing"):
        ppd.datasets.mnist(tmp_path)


def test_binarized_mnist(tmp_path):
    bits = {
        part: RNG.integers(0, 2, (num, 784), dtype=np.uint8) for part, num in (("train", 3), ("valid", 2), ("test", 1))
    }
    for part, array in bits.items():
        np.savetxt(tmp_path / f"binarized_mnist_{part}.amat", array, fmt="%d")
    np.savez(tmp_path / "packed.npz", **{part: np.packbits(array, axis=1) for part, array in bits.items()})
    read = [ppd.datasets.binarized_mnist(tmp_path)]
    (tmp_path / "packed.npz").rename(tmp_path / "binarized_mnist_packed.npz")
    read.append(ppd.datasets.binarized_mnist(tmp_path))
    for data in read:
        np.testing.assert_array_equal(data.train, bits["train"].reshape(-1, 28, 28))
        np.testing.assert_array_equal(data.test, bits["test"].reshape(-1, 28, 28))
    both = ppd.datasets.binarized_mnist(tmp_path, with_validation=True).train
    np.testing.assert_array_equal(both[3:], bits["valid"].reshape(-1, 28, 28))


def test_binarized_mnist_refuses_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"binarized_mnist_train.amat is missing"):
        ppd.datasets.binarized_mnist(tmp_path)
    for content in ("0 1 1\n", "0 1 2 " * 784, ""):
        (tmp_path / "binarized_mnist_train.amat").write_text(content)
        with pytest.raises(ValueError, match=r"train.amat does not consist of whole lines"):
            ppd.datasets.binarized_mnist(tmp_path)
    packed = tmp_path / "binarized_mnist_packed.npz"
    np.savez(packed, train=np.zeros((2, 97), np.uint8), valid=np.zeros((2, 98), np.uint8))
    with pytest.raises(ValueError, match=r"'train' must be bytes of shape \(N, 98\)"):
        ppd.datasets.binarized_mnist(tmp_path)
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(ValueError, match="packed bits"):
        ppd.datasets.binarized_mnist(tmp_path)


# --- batches -------------------------------------------------------------------------------------------------------


def test_batches_are_drawn_flipped_and_cropped():
    images = jnp.arange(6 * 4 * 5 * 2).reshape(6, 4, 5, 2).astype(jnp.uint8)
    drawn = jax.jit(ppd.datasets.draw_rows, static_argnums=2)(jax.random.key(0), images, 200)
    assert drawn.shape == (200, 4, 5, 2) and set(np.asarray(drawn[:, 0, 0, 0])) == {40 * i % 256 for i in range(6)}
    flipped = jax.jit(ppd.datasets.random_flips)(jax.random.key(1), drawn)
    same, other = ((flipped == a).all((1, 2, 3)) for a in (drawn, drawn[:, :, ::-1]))
    assert (same ^ other).all() and 70 < same.sum() < 130
    cropped = jax.jit(ppd.datasets.random_crops, static_argnums=(2, 3))(jax.random.key(2), drawn, 3, 3)
    windows = [drawn[:, i : i + 3, j : j + 3] for i in range(2) for j in range(3)]
    found = np.stack([(cropped == window).all((1, 2, 3)) for window in windows])
    assert (found.sum(0) == 1).all() and (found.sum(1) > 10).all()
    with pytest.raises(ValueError, match="height and width"):
        ppd.datasets.random_crops(jax.random.key(2), drawn, 5, 3)


def test_arrays_of_a_partial_are_arguments_of_the_program():
    """They are neither text of the compiled program nor part of what it is known by: others need no new one."""
    from jax.tree_util import Partial

    from pp_diffusion.training.sources import DrawFeed

    images, draw = jnp.arange(64.0).reshape(16, 2, 2), lambda key, images: ppd.datasets.draw_rows(key, images, 3)
    traced = []

    @jax.jit
    def run(feed, key):
        traced.append(1)
        return feed.batch(key, jnp.zeros((), int), jnp.ones(()))[0]

    key = jax.random.key(0)
    first, second = (run(DrawFeed(Partial(draw, images=a)), key) for a in (images, images + 1))
    np.testing.assert_array_equal(first + 1, second)
    assert len(traced) == 1
    np.testing.assert_array_equal(run(DrawFeed(lambda key: draw(key, images)), key), first)


# --- photographs ---------------------------------------------------------------------------------------------------


def write_photographs(folder, shape=(16, 12, 3), names=("b.png", "a.PNG")):
    folder.mkdir(exist_ok=True)
    written = {}
    for name in names:
        written[name] = RNG.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(written[name]).save(folder / name)
    return written


def test_image_folder(tmp_path):
    written = write_photographs(tmp_path)
    (tmp_path / "README.txt").write_text("no photograph")
    (tmp_path / "more.png").mkdir()
    data = ppd.datasets.image_folder(tmp_path)
    in_order = np.stack([written["a.PNG"], written["b.png"]])
    np.testing.assert_array_equal(data.train, in_order[:, :12])
    np.testing.assert_array_equal(data.test, in_order[:, 12:])
    grey = ppd.datasets.image_folder(tmp_path, grey=True, shape=(8, 6), test_share=0.5)
    assert grey.train.shape == grey.test.shape == (2, 4, 6) and grey.train.dtype == np.uint8
    luma = in_order[:, 4:12, 3:9] @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(np.concatenate([grey.train, grey.test], 1), luma, atol=1)


def test_image_folder_refuses_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        ppd.datasets.image_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no file that ends in"):
        ppd.datasets.image_folder(tmp_path)
    write_photographs(tmp_path, (64, 64, 3), ("a.jpg", "b.jpg"))
    for wrong, said in (
        ({"test_share": 1.0}, "test_share"),
        ({"shape": (0, 4)}, "shape"),
        ({"shape": (65, 4)}, "a.jpg"),
    ):
        with pytest.raises(ValueError, match=said):
            ppd.datasets.image_folder(tmp_path, **wrong)
    path, whole = tmp_path / "b.jpg", (tmp_path / "b.jpg").read_bytes()
    deep = tmp_path / "deep.png"
    Image.fromarray(RNG.integers(0, 60_000, (64, 64), dtype=np.uint16)).save(deep)
    sixteen_bits = deep.read_bytes()
    deep.unlink()
    write_photographs(tmp_path / "other", (32, 64, 3), ("c.png",))
    for content, said in (
        (whole[: len(whole) // 2], "not a whole image"),
        (b"GIF", "not a whole image"),
        (b"", "not a whole image"),
        (sixteen_bits, "8 bits to a colour"),
        ((tmp_path / "other" / "c.png").read_bytes(), r"has \(32, 64\) pixels, a.jpg \(64, 64\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"b\.jpg .*{said}"):
            ppd.datasets.image_folder(tmp_path)


# --- dead leaves ---------------------------------------------------------------------------------------------------


def same_leaf(distance, low, high, exponent):
    """The probability that two pixels show one leaf: E[area that a disc and itself, moved, share] over that of both."""
    r = np.linspace(low, high, 20_001)
    law = r**-exponent / np.sum(r**-exponent)
    half = np.minimum(distance / (2 * r), 1)
    shared = np.sum(law * 2 * r**2 * (np.arccos(half) - half * np.sqrt(1 - half**2)))
    return shared / (2 * np.sum(law * np.pi * r**2) - shared)


@pytest.mark.slow
def test_dead_leaves_have_the_correlations_of_their_law():
    """Grey values are independent from leaf to leaf, so that their correlation is the probability of one leaf. Errors
    are those over images, which are independent; within 4.5 of them."""
    low, high, exponent, noise = 1.5, 6.0, 3.0, 0.05
    settings = {"size": 10, "min_radius": low, "max_radius": high, "exponent": exponent, "noise": noise}
    data = ppd.datasets.dead_leaves(jax.random.key(0), 600, 1, **settings)
    images = np.asarray(data.train, np.float64) - 0.5
    assert images.shape == (600, 10, 10)

    def close(per_image, expected):
        error = per_image.std(ddof=1) / np.sqrt(len(per_image))
        assert abs(per_image.mean() - expected) < 4.5 * error < 0.025

    close(images.mean((1, 2)), 0.0)
    close((images**2).mean((1, 2)), 1 / 12 + noise**2)
    for distance in (1, 3, 8):
        for one, other in (
            (images[:, distance:], images[:, :-distance]),
            (images[:, :, distance:], images[:, :, :-distance]),
        ):
            close((one * other).mean((1, 2)), same_leaf(distance, low, high, exponent) / 12)


def test_dead_leaves_are_seeded_and_refuse():
    draw = partial(ppd.datasets.dead_leaves, num_train=3, num_test=2, size=4)
    first, again, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train, again.train)
    assert (np.asarray(first.train) != np.asarray(other.train)).all()
    assert np.unique(np.concatenate([first.train, first.test])).size == 5 * 16
    for wrong, said in (
        ({"num_train": 0}, "num_train"),
        ({"min_radius": 20.0}, "min_radius and max_radius"),
        ({"exponent": 1.0}, "exponent"),
        ({"noise": 0.0}, "noise"),
    ):
        with pytest.raises(ValueError, match=said):
            draw(jax.random.key(0), **wrong)
    with pytest.raises(TypeError, match="rng_key"):
        draw(0)


def test_patches_are_drawn_anywhere():
    images = jnp.arange(2 * 5 * 4 * 3).reshape(2, 5, 4, 3)
    drawn = jax.jit(ppd.datasets.random_patches, static_argnums=(2, 3, 4))(jax.random.key(0), images, 300, 4, 2)
    windows = [images[n, i : i + 4, j : j + 2] for n in range(2) for i in range(2) for j in range(3)]
    found = np.stack([(drawn == window).all((1, 2, 3)) for window in windows])
    assert (found.sum(0) == 1).all() and (found.sum(1) > 8).all()
    with pytest.raises(ValueError, match="height and width"):
        ppd.datasets.random_patches(jax.random.key(0), images, 3, 6, 2)


# --- the examples --------------------------------------------------------------------------------------------------


def write_binarized(folder):
    bits = RNG.integers(0, 2, (40, 784), dtype=np.uint8)
    packed = {part: np.packbits(bits, axis=1) for part in ("train", "valid", "test")}
    np.savez(folder / "binarized_mnist_packed.npz", **packed)


EXAMPLES = {
    "cifar10": lambda folder: write_cifar(folder, num=40),
    "mnist": lambda folder: write_mnist(folder, num=40),
    "binarized_mnist": write_binarized,
    "bark": lambda folder: write_photographs(folder, (300, 70, 3)),
    "dead_leaves": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_trains_on_a_users_folder(name, tmp_path, monkeypatch, capfd):
    """And, called again, goes on from where it was; what it wrote is a prior."""
    options = ["--figures", str(tmp_path / "figures"), "--state", str(tmp_path / "state.npz"), "--no-progress"]
    options += ["--small", "--prior", str(tmp_path / "x.ppd")]
    if EXAMPLES[name] is not None:
        EXAMPLES[name](tmp_path)
        options += ["--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    updates = []
    for _ in range(2 if name == "dead_leaves" else 1):
        runpy.run_path(str(Path(__file__).parent.parent / "examples" / f"{name}.py"), run_name="__main__")
        out = capfd.readouterr().out
        assert re.search(r"^K( - L_null)?: at (most|least) \S+ ± \S+ (bits/dim|nats|bits/pixel)$", out, re.MULTILINE)
        updates.append(int(re.search(r"(\d+) updates", out)[1]))
    assert updates == sorted(set(updates)) and updates[0] > 70  # how many fit in its seconds is the machine's
    assert (tmp_path / "figures" / f"{name}_samples.png").stat().st_size > 5_000
    assert ppd.load(tmp_path / "x.ppd").num_timesteps in (500, 1000)
