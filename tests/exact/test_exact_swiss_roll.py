"""The swiss roll's density against integrals and against scikit-learn's generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn.datasets import make_swiss_roll

import pp_diffusion as ppd
from pp_diffusion.datasets.swiss_roll import swiss_roll_log_prob


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_the_density_integrates_to_one_with_the_samples_moments(noise):
    """By the midpoint rule; first and second moments of 50 000 draws within 4.5 standard errors of the grid's."""
    axis = np.linspace(-22, 22, 177) + 0.06  # the density is smooth on the scale of the noise
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    density = np.exp(np.asarray(swiss_roll_log_prob(grid, noise), dtype=np.float64)) * (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(density.sum(), 1, atol=1e-4)
    x = np.asarray(ppd.datasets.swiss_roll(jax.random.key(0), 50_000, 10, noise=noise).train, dtype=np.float64)
    for i, j in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2)):  # E x^i y^j
        values = x[:, 0] ** i * x[:, 1] ** j
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - (density * grid[..., 0] ** i * grid[..., 1] ** j).sum()) < 4.5 * error


def test_the_density_against_an_integral_by_other_means():
    """A sum over 200 000 angles, in float64, also away from the roll."""
    u = (np.arange(200_000) + 0.5) / 200_000
    angle = 1.5 * np.pi * (1 + 2 * u)
    spiral = np.stack([angle * np.cos(angle), angle * np.sin(angle)], -1)
    points = np.array([[0.0, 0.0], [9.5, 0.3], [-4.0, 11.0], [0.1, -4.6], [13.9, 1.0], [16.5, 0.0]])
    square = ((points[:, None] - spiral) ** 2).sum(-1)
    expected = np.log(np.mean(np.exp(-0.5 * square / 0.25), -1)) - np.log(2 * np.pi * 0.25)
    np.testing.assert_allclose(swiss_roll_log_prob(points), expected, rtol=2e-5, atol=2e-4)


def test_the_entropy_is_that_of_the_design():
    """E log q = -1.955 bits of the standardised data; .05 is 1.7 standard errors of 1000 points, 5.5 of 10 000."""
    data = ppd.datasets.swiss_roll(jax.random.key(1), 50_000, 10_000)
    scale = np.asarray(data.train, dtype=np.float64).std(0)
    bits = ppd.units.nats_to_bits(np.asarray(data.log_prob(data.test), dtype=np.float64) + np.log(scale).sum())
    assert abs(bits.mean() + 1.955) < 0.05
    # the null in the model's space: -log2(2 pi e) = -4.094 bits, as the paper's table has it
    transform = ppd.standardize(data.train)
    z = transform.inv(data.test)
    null = ppd.GaussianKernel((2,)).null_log_prob(z)
    np.testing.assert_allclose(ppd.units.nats_to_bits(float(jnp.mean(null))), -4.094, atol=0.03)


def test_the_samples_are_those_of_scikit_learn():
    """Two-sample Kolmogorov-Smirnov on radius, on both coordinates and two diagonals; p > 1e-5 each."""
    ours = np.asarray(ppd.datasets.swiss_roll(jax.random.key(2), 20_000, 10).train)
    theirs = make_swiss_roll(20_000, noise=0.5, random_state=0)[0][:, [0, 2]]
    for statistic in (
        lambda a: np.hypot(a[:, 0], a[:, 1]),
        lambda a: np.arctan2(a[:, 1], a[:, 0]),
        lambda a: a[:, 0],
        lambda a: a[:, 1],
        lambda a: a[:, 0] + a[:, 1],
        lambda a: a[:, 0] - a[:, 1],
    ):
        assert ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-5
    # and not by lack of power: the mirror image would not pass
    assert ks_2samp(ours[:, 1], -theirs[:, 1]).pvalue < 1e-5
