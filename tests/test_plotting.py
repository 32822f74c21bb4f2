"""Figures are made, in the right panels, from the right data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd


def trained():
    schedule, network = ppd.FixedSchedule.log_linear(6), ppd.networks.MLP((4,))
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), schedule, network)
    return diffusion.prior(diffusion.init_params(jax.random.key(0)))


def test_points_images_and_sequences():
    key = jax.random.key(0)
    points = jax.random.normal(key, (50, 2))
    figure = ppd.plotting.samples(points, points * 3, title="points")
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim()  # one scale for both
    np.testing.assert_allclose(left.collections[0].get_offsets(), points)
    image = ppd.plotting.samples(jax.random.uniform(key, (30, 4, 6)), num_columns=5).axes[0].images[0]
    assert image.get_array().shape == (5 * (4 + 2), 5 * (6 + 2))  # a pixel of frame around each
    assert ppd.plotting.samples(jnp.ones((7, 20), int)).axes[0].images[0].get_array().shape == (7, 20)
    with pytest.raises(ValueError, match="x must have shape"):
        ppd.plotting.samples(jnp.ones(3))


@pytest.mark.parametrize("shape", [(30, 4, 6), (30, 4, 6, 3)])
def test_image_tiles_are_in_reading_order(shape):
    images = np.zeros(shape)
    images[1] = 1.0  # the second image is the second tile of the first row
    tiled = ppd.plotting.samples(images, num_columns=5).axes[0].images[0].get_array()
    assert tiled[2, 8 + 3].min() == 1.0
    assert tiled[2, 3].max() == 0.0


def test_figure_1():
    figure = ppd.plotting.trajectories(
        jax.random.key(0), trained(), jax.random.normal(jax.random.key(1), (40, 2)), num_points=30
    )
    assert [axis.get_title() for axis in figure.axes] == [
        *(f"forward, t = {t}" for t in (0, 3, 6)),
        *(f"reverse, t = {t}" for t in (0, 3, 6)),
        *(f"drift $f_\\mu - x_t$, t = {t}" for t in (2, 3, 6)),
    ]
    binary = ppd.Diffusion(ppd.BinomialKernel((2,)), ppd.FixedSchedule.constant_erasure(3), lambda x_t, t: x_t)
    with pytest.raises(ValueError, match="event shape"):
        ppd.plotting.trajectories(jax.random.key(0), binary.prior({}), jnp.ones((3, 2)))


def test_losses():
    data = jax.random.normal(jax.random.key(0), (50, 2))
    result = ppd.fit(jax.random.key(1), trained().diffusion, data, num_steps=30, batch_size=10, progress_bar=False)
    lines = ppd.plotting.losses(result, window=10).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), -result.losses)
    np.testing.assert_allclose(lines[1].get_ydata()[0], -result.losses[:10].mean(), rtol=1e-5)
