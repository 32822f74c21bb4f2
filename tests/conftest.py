"""Compilation is most of what the law tests cost: they do without XLA's optimisations, which save nothing there, and
by its older emitters of loops for CPUs, which compile twice as fast.

Not so the tests of exact answers and of float32 at its ends, which run as a user's program does.
"""

from contextlib import contextmanager, nullcontext
from importlib.metadata import version

import jax
import pytest
from jax._src import compiler  # no public setting reaches every compilation of some modules only

LIGHT = (
    *("bad_input", "bounds", "checkpoint", "fit", "models", "networks", "plotting", "prior", "programs", "readme"),
    *("trajectories", "transforms", "likelihood", "arviz", "entropies", "exact_verdicts", "perturb", "reparam"),
    *("factors", "smc", "smc_models", "benchmarks", "context", "datasets", "precision", "flow", "flow_numpyro"),
)


def pytest_report_header():
    return f"arviz {version('arviz')}"  # of two generations; not imported, which would read its back ends


@pytest.fixture(autouse=True, scope="module")
def _no_leftovers():
    """Each compiled program holds memory maps, of which a process may have so many (65 530 on Linux)."""
    yield
    jax.clear_caches()


@contextmanager
def light_compilation():
    """Programs that compile fast and run slowly."""
    options, before = compiler.get_compile_options, jax.config.read("jax_disable_most_optimizations")

    def with_old_emitters(*args, env_options_overrides=None, **kwargs):
        overrides = {"xla_cpu_use_fusion_emitters": False} | (env_options_overrides or {})
        return options(*args, env_options_overrides=overrides, **kwargs)

    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = with_old_emitters
    try:
        yield
    finally:
        compiler.get_compile_options = options
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def _light_compilation(request):
    with light_compilation() if request.node.path.stem.removeprefix("test_") in LIGHT else nullcontext():
        yield


@pytest.fixture
def lightly():
    """For a test in a module that is compiled as a user's program is."""
    with light_compilation():
        yield
