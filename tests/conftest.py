"""Compilation is most of what the law tests cost: they do without XLA's optimisations, which save nothing there.

Not so the tests of exact answers and of float32 at its ends, which run as a user's program does.
"""

from importlib.metadata import version

import jax
import pytest

LIGHT = (
    *("bad_input", "bounds", "checkpoint", "fit", "models", "networks", "plotting", "prior", "programs", "readme"),
    *("trajectories", "transforms", "likelihood", "arviz", "entropies", "exact_verdicts", "perturb", "reparam"),
    *("factors", "smc"),
)


def pytest_report_header():
    return f"arviz {version('arviz')}"  # of two generations; not imported, which would read its back ends


@pytest.fixture(autouse=True, scope="module")
def _no_leftovers():
    """Each compiled program holds memory maps, of which a process may have so many (65 530 on Linux)."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def _light_compilation(request):
    before = jax.config.read("jax_disable_most_optimizations")
    if request.node.path.stem.removeprefix("test_") in LIGHT:
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
