"""Wheel and sdist are built, hold what they should and no more, and an environment with the wheel alone reports."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **settings):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(ending)) for ending in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"pp_diffusion"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pp_diffusion").rglob("*.py")}
    assert modules | {"pp_diffusion/py.typed"} <= set(names)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | {"README.md", "LICENSE", "pyproject.toml"} <= held

    # an empty environment; what the package needs is lent by this one, because it is hundreds of megabytes
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin") / "python"
    target = run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    lent = os.pathsep.join([target, str(Path(distribution("numpyro").locate_file("")))])
    report = run(python, "-m", "pp_diffusion", cwd=tmp_path, env=os.environ | {"PYTHONPATH": lent})
    assert re.search(r"^pp_diffusion +0\.", report, re.MULTILINE)
    code = "import pp_diffusion; print(pp_diffusion.__file__)"
    assert target in run(python, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": lent})


def test_versions_agree():
    """In pyproject.toml, in the package and in CITATION.cff."""
    import tomllib

    from pp_diffusion import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert {"examples", "benchmarks", "docs", "gpu", "tutorials"} <= set(project["optional-dependencies"])
