import jax
import jax.numpy as jnp
import pytest

from pp_diffusion import compiling
from pp_diffusion.compiling import LIGHT, jit_once

OPTIMIZATIONS = "jax_disable_most_optimizations"


@pytest.fixture
def as_a_user(monkeypatch):
    """Who has not turned optimisations off; sets options."""
    before = jax.config.read(OPTIMIZATIONS)
    jax.config.update(OPTIMIZATIONS, False)
    compiling.is_known.cache_clear()
    yield lambda options: monkeypatch.setattr(compiling, "LIGHT", options)
    jax.config.update(OPTIMIZATIONS, before)
    compiling.is_known.cache_clear()


@pytest.mark.parametrize("options", [LIGHT, {"xla_of_another_version": 1}, {"xla_backend_optimization_level": "high"}])
def test_a_program_is_what_jit_makes(as_a_user, options):
    as_a_user(options)
    assert compiling.is_known() == (options == LIGHT)
    traced = []

    @jit_once
    def function(x):
        traced.append(x)
        return jnp.sin(x) @ x

    x = jnp.arange(3.0)
    for _ in range(2):
        assert jnp.allclose(function(x), jnp.sin(x) @ x)
    assert len(traced) == 1


def test_static_arguments_are_passed_on():
    def tiled(x, number):
        return jnp.tile(x, number)

    assert jit_once(tiled, static_argnames=("number",))(jnp.ones(2), number=3).shape == (6,)
    assert jit_once(tiled).__name__ == "tiled"
