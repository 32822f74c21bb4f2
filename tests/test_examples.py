"""Every example runs, in a small form, and writes its figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURES = {
    "swiss_roll": ["swiss_roll_samples.png", "swiss_roll_figure_1.png"],
    "heartbeat": ["heartbeat_samples.png"],
    "digits": ["digits_samples.png"],
}


def run(module, folder, *options):
    # a small run is mostly compilation
    environment = os.environ | ({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if "--small" in options else {})
    command = [sys.executable, "-W", "error", "-m", module, "--figures", str(folder), "--no-progress", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("name", FIGURES)
def test_example(name, tmp_path):
    out = run(f"examples.{name}", tmp_path, "--small")
    assert "L_null" in out
    for figure in FIGURES[name]:
        assert (tmp_path / figure).stat().st_size > 5_000


def test_every_example_is_tested():
    modules = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "__main__", "report"}
    assert modules == set(FIGURES)


@pytest.mark.slow
def test_main_job_reaches_its_figures(tmp_path):
    """The README's first command: the swiss roll within 0.20 bits of the exact density."""
    out = run("examples", tmp_path)
    gap = next(line for line in out.splitlines() if line.startswith("log p - K"))
    assert float(gap.split("paired")[1].split("±")[0]) <= 0.20
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.slow
def test_heartbeat_reaches_its_figure(tmp_path):
    from examples import heartbeat

    result = heartbeat.run(figures=tmp_path, progress=False)
    assert result["bound"] >= -2.385
    assert result["bound"] <= heartbeat.CEILING + 3 * result["bound_error"] + 0.0005
