"""Compilation is most of what the tests cost. XLA's older emitters of loops for CPUs compile faster than today's, and
most tests do without its optimisations, which save nothing there. What one process has compiled the others take from a
folder that goes with the run.

Tests marked `optimized` run longer than they compile, and have them. With `pytest -m as_users`, or XLA_FLAGS set, to
nothing for instance, all compile as a user's program does.

`--part 1/4` runs a quarter of what is asked for, the same tests each time.
"""

import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from zlib import crc32

import pytest

FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
LIGHT = "JAX_DISABLE_MOST_OPTIMIZATIONS"  # read by JAX, also in programs that tests start
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
COMPILES_MUCH = 0.5  # seconds of a test, after which memory maps are counted
MAPS = Path("/proc/self/maps")
EXACT = Path(__file__).parent / "exact"
LONG_DOCTESTS = {  # they train, or sample a model
    "pp_diffusion.diffusion",
    "pp_diffusion.networks.multi_scale",
    "pp_diffusion.networks.unet",
    "pp_diffusion.posterior.amortized",
    "pp_diffusion.posterior.api",
    "pp_diffusion.posterior.comparison",
    "pp_diffusion.posterior.flow_reparam",
    "pp_diffusion.posterior.particle_gibbs",
    "pp_diffusion.posterior.reparam",
    "pp_diffusion.posterior.tempered",
    "pp_diffusion.training.fit",
}


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="a part of the tests, as 2/4 for the second of four")


def pytest_configure(config):
    if "XLA_FLAGS" in os.environ or config.option.markexpr == "as_users":
        return
    os.environ |= {"XLA_FLAGS": FLAGS, LIGHT: "1"}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="compiled-")
        config.add_cleanup(folder.cleanup)
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder.name, **CACHE_ALL}


def pytest_report_header():
    return f"arviz {version('arviz')}"  # of two generations; not imported, which would read its back ends


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("part").split("/"))
    is_other = {item: crc32(item.nodeid.encode()) % parts != part % parts for item in items}
    config.hook.pytest_deselected(items=[item for item in items if is_other[item]])
    items[:] = [item for item in items if not is_other[item]]
    for item in items:
        if EXACT in item.path.parents:
            item.add_marker("as_users")
        if isinstance(item, pytest.DoctestItem) and item.name.rpartition(".")[0] in LONG_DOCTESTS:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Fixtures of a module are made for the first test that asks for them, with what it is compiled with."""
    if LIGHT not in os.environ or not item.get_closest_marker("optimized"):
        return (yield)
    import jax  # not before the flags are set

    light = os.environ.pop(LIGHT)
    jax.config.update(LIGHT.lower(), False)
    try:
        return (yield)
    finally:
        jax.config.update(LIGHT.lower(), True)
        os.environ[LIGHT] = light


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
