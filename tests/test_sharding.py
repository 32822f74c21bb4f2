"""Rows spread over devices and processes: the same gradients, the same K, an eighth of the memory."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def start(folder, precision, devices, processes=1, **environment):
    folder.mkdir(exist_ok=True)
    environment = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    } | environment
    arguments = [sys.executable, ROOT / "tests" / "sharded.py", folder, precision, str(processes)]
    return subprocess.Popen(arguments, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def end(process):
    _, complaints = process.communicate(timeout=600)
    assert process.returncode == 0, complaints[-3000:]


def found(folder):
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight devices of this machine's processor, and one, in float64."""
    folder = tmp_path_factory.mktemp("eight")
    end(start(folder, "x64", 8))
    return found(folder)


def relative(a, b):
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)


def test_eight_devices_do_what_one_does(eight):
    """The gradient of one step, from a stratum each, from all rows, in parts; K after 200 steps; held-out rows."""
    for name, gradient in eight["gradients"].items():
        assert relative(gradient, eight["one"]["gradients"][name]) < 1e-5
        assert np.linalg.norm(gradient) > 1e-3
    assert abs(eight["bound"] - eight["one"]["bound"]) < 1e-8  # the stock networks' parameters are float32
    np.testing.assert_allclose(eight["held_out"], eight["one"]["held_out"], rtol=1e-6)
    assert eight["resumed"] == eight["held_out"]


def test_each_holds_its_share(eight):
    """Memory is an eighth, and nothing travels but sums."""
    (spread, sent), (one, _) = eight["memory"]
    assert spread < one / 7
    assert not sent


@pytest.mark.parametrize("name", ["draws", "bound", "likelihood", "chains", "tempered"])
def test_all_else_spreads_too(eight, name):
    """The same numbers, of which each device holds its own."""
    difference, devices = eight["else"][name]
    assert difference < 1e-9
    assert devices == 8


def test_float32(tmp_path):
    end(start(tmp_path, "x32", 8))
    came = found(tmp_path)
    for name, gradient in came["gradients"].items():
        assert relative(gradient, came["one"]["gradients"][name]) < 1e-5
    assert abs(came["bound"] - came["one"]["bound"]) < 1e-4


def test_two_processes_with_their_own_rows_do_what_one_does(tmp_path, eight):
    """Two devices each, on loopback; each gives its half of the rows. Checkpoints too."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [start(tmp_path, "x64", 2, 2, RANK=str(rank), ADDRESS=address) for rank in range(2)]
    for process in both:
        end(process)
    came = found(tmp_path)
    for name, gradient in came["gradients"].items():
        assert relative(gradient, eight["one"]["gradients"][name]) < 1e-5
    np.testing.assert_allclose(came["params"], eight["one"]["params"], atol=1e-6)  # float32
    assert any(path.name.isdigit() for path in (tmp_path / "run").iterdir())
    assert came["resumed"] == came["held_out"]
