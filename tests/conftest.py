"""Compilation is most of what the quick tests cost: they do without XLA's optimisations, which save nothing there, and
by its older emitters of loops for CPUs, which compile twice as fast. What one process has compiled the others take from
a folder that goes with the run.

A run that asks for other tests than the quick ones, `pytest -m slow`, compiles as a user's program does. So does one
with XLA_FLAGS set, to nothing for instance.
"""

import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest

QUICK = "not slow"  # pyproject's
LIGHT = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
COMPILES_MUCH = 0.5  # seconds of a test, after which memory maps are counted
MAPS = Path("/proc/self/maps")
EXACT = Path(__file__).parent / "exact"
LONG_DOCTESTS = {  # they train, or sample a model
    "diffusion",
    "networks.multi_scale",
    "networks.unet",
    "posterior.amortized",
    "posterior.api",
    "posterior.comparison",
    "posterior.flow_reparam",
    "posterior.particle_gibbs",
    "posterior.reparam",
    "posterior.tempered",
    "training.fit",
}


def pytest_configure(config):
    if config.option.markexpr == QUICK and "XLA_FLAGS" not in os.environ:
        os.environ |= {"XLA_FLAGS": LIGHT, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # also for programs that tests start
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            folder = tempfile.TemporaryDirectory(prefix="compiled-")
            config.add_cleanup(folder.cleanup)
            os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder.name, **CACHE_ALL}


def pytest_report_header():
    return f"arviz {version('arviz')}"  # of two generations; not imported, which would read its back ends


def pytest_collection_modifyitems(items):
    for item in items:
        if EXACT in item.path.parents:
            item.add_marker("as_users")
        if isinstance(item, pytest.DoctestItem) and item.name.split(".", 1)[1] in LONG_DOCTESTS:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _no_leftovers():
    """Each compiled program holds memory maps, of which a process may have so many (65 530 on Linux)."""
    start = time.monotonic()
    yield
    if time.monotonic() - start < COMPILES_MUCH:
        return
    if MAPS.exists() and MAPS.read_text().count("\n") > 20_000:
        import jax  # not before the flags are set

        jax.clear_caches()
