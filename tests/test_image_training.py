"""What the examples with images share: units as in the paper's table, bounds, the clock's learning rate, states."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import pp_diffusion as ppd
from examples import images

SHAPE, SCALE = (3, 2), 50.0


def exact(loc, scale):
    """Of pixels that are independent and normal, without a network that learns."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel(SHAPE),
        ppd.FixedSchedule.constant_erasure(20),
        lambda x_t, t: (
            jnp.sqrt(1 - 1 / (21 - t))[:, None, None] * x_t,
            jnp.broadcast_to(1 / (21 - t)[:, None, None], x_t.shape),
        ),
        parameterization="direct",
        last_step="network",
        transform=dist.transforms.AffineTransform(loc, scale),
    )
    units = (images.bits_per_pixel_above_null(6), images.bits_per_pixel(6, scale), images.bits_per_dim(6))
    return images.Experiment("exact", diffusion, ppd.datasets.draw_rows, units, noise=images.keep)


def test_units_are_those_of_the_papers_table():
    """K of normal data by the exact process is L_null, -log2(2 pi e)/2 = -2.047 bits of data over their standard
    deviation, and the code of levels is longer by the log of that."""
    how = exact(100.0, SCALE)
    x = 100 + SCALE * np.random.default_rng(0).normal(size=(400, *SHAPE))
    found = images.bounds(jax.random.key(0), how, {}, x, num_times=20, rows=4)
    assert found.value.shape == found.null.shape == (100,)
    above, table, code = (unit.found(found)[0] for unit in how.units)
    z = (x - 100) / SCALE
    null = np.log2(np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)).mean()
    assert abs(above) < 4.5 * how.units[0].found(found)[1] < 0.1
    np.testing.assert_allclose([table, code], [null + above, np.log2(SCALE) - null - above], atol=1e-3)
    np.testing.assert_allclose(null, -2.047, atol=0.1)
    assert how.units[2].say(found).startswith("at most ") and how.units[0].say(found).endswith(" bits/pixel")
    assert images.nats().of(np.array([-80.0]), None) == 80


def test_the_rate_falls_to_zero_at_the_step_that_the_clock_says():
    how = replace(exact(0.0, 1.0), rate=0.1, warm_up=4, weight_decay=0.0)
    optimizer = how.optimizer()
    state, params = optimizer.init(jnp.zeros(())), jnp.zeros(())
    state = optax.tree_utils.tree_set(state, num_steps=jnp.float32(20))
    moves = []
    for _ in range(21):
        step, state = optimizer.update(jnp.ones(()), state, params)
        moves.append(-float(step))
    expected = 0.1 * np.minimum(np.arange(1, 22) / 4, 1) * (0.5 + 0.5 * np.cos(np.pi * np.arange(21) / 20))
    np.testing.assert_allclose(moves, expected, rtol=1e-3, atol=1e-6)


def test_states_are_written_and_those_of_others_refused(tmp_path):
    state = {"weights": jnp.arange(3.0), "key": jax.random.key(7), "step": jnp.int32(5)}
    images.save_state(tmp_path / "new" / "state.npz", state)
    like = {"weights": jnp.zeros(3), "key": jax.random.key(0), "step": jnp.int32(0)}
    read = images.load_state(tmp_path / "new" / "state.npz", like)
    np.testing.assert_array_equal(read["weights"], [0, 1, 2])
    assert int(read["step"]) == 5
    np.testing.assert_array_equal(jax.random.key_data(read["key"]), jax.random.key_data(state["key"]))
    with pytest.raises(ValueError, match="another network"):
        images.load_state(tmp_path / "new" / "state.npz", {**like, "weights": jnp.zeros(4)})
