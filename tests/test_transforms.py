"""Data units outside, the model's space inside: the transform's Jacobian in every figure."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform
from numpyro.infer.util import log_density

import pp_diffusion as ppd
from pp_diffusion.transforms import data_support, in_data_units, log_abs_det


def network(x_t, t):
    return 0.2 * x_t, 0.1 + 0 * x_t


def make(transform, event_shape=(2,)):
    schedule = ppd.FixedSchedule.log_linear(4, first_beta=0.05)
    return ppd.Diffusion(ppd.GaussianKernel(event_shape), schedule, network, transform=transform)


def skewed(key, num=200):
    """Asymmetric, of unlike scales: exp of a correlated normal."""
    z = jax.random.normal(key, (num, 2))
    return jnp.exp(jnp.stack([3.0 + 0.5 * z[:, 0], -1.0 + 0.2 * (z[:, 0] + z[:, 1])], -1))


DATA = skewed(jax.random.key(0))
TRANSFORMS = {
    "none": None,
    "affine": AffineTransform(jnp.array([20.0, 0.4]), jnp.array([9.0, 0.1])),
    "scalar_affine": AffineTransform(1.0, 7.0),
    "exp": ExpTransform(),
    "affine_then_exp": ComposeTransform(
        [AffineTransform(jnp.array([3.0, -1.0]), jnp.array([0.5, 0.3])), ExpTransform()]
    ),
}
over = pytest.mark.parametrize("name", TRANSFORMS)


# --- standardize ---------------------------------------------------------------------------------------------------


def test_standardize():
    transform = ppd.standardize(DATA)
    z = transform._inverse(DATA)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-5)
    one = ppd.standardize(DATA, per_coordinate=False)
    assert one.loc.shape == one.scale.shape == ()
    z = one._inverse(DATA)
    np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=1e-5)
    images = ppd.standardize(np.random.default_rng(0).normal(size=(20, 2, 3)))
    assert images.loc.shape == (2, 3)
    assert ppd.standardize(np.arange(10)).scale.shape == ()
    large = ppd.standardize(1e6 + np.random.default_rng(0).normal(size=(1000, 1)))  # in float64: float32 would lose it
    np.testing.assert_allclose(large.scale, 1, rtol=0.1)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (np.zeros((0, 2)), "data must hold at least one datum"),
        (np.array([[1.0, np.nan], [2.0, 3.0]]), "data must be finite; 1 of 4"),
        (np.array([[1.0, np.inf], [2.0, 3.0]]), "data must be finite"),
        (np.array([[1.0, 5.0], [2.0, 5.0]]), "data must vary in every coordinate; constant: column 1"),
        (np.array([[7.0], [7.0]]), "constant: column 0"),
        (np.full(4, 2.0), "the only coordinate"),
    ],
)
def test_standardize_refuses(data, match):
    with pytest.raises(ValueError, match=match):
        ppd.standardize(data)


# --- helpers -------------------------------------------------------------------------------------------------------


@over
def test_log_abs_det_is_that_of_the_jacobian(name):
    transform = TRANSFORMS[name]
    z = jnp.array([[0.3, -0.2], [1.0, 0.5]])
    x = z if transform is None else transform(z)
    expected = [0.0, 0.0]
    if transform is not None:
        expected = [np.linalg.slogdet(jax.jacobian(transform)(row))[1] for row in z]
    got = log_abs_det(transform, z, x, 1)
    assert got.shape == (2,)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@over
def test_support_is_the_codomain(name):
    support = make(TRANSFORMS[name]).support
    assert support.event_dim == 1
    assert support(jnp.array([0.5, 2.0]))
    assert bool(support(jnp.array([-0.5, 2.0]))) == ("exp" not in name)
    assert jnp.shape(support(jnp.ones((3, 2)))) == (3,)
    real = constraints.independent(constraints.real, 1)
    assert data_support(real, None, 1) is real


def test_in_data_units():
    q = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    assert in_data_units(q, None) is q
    moved = in_data_units(q, AffineTransform(3.0, 2.0))
    np.testing.assert_allclose(
        moved.log_prob(jnp.array([1.0, 4.0])), dist.Normal(3.0, 2.0).log_prob(jnp.array([1.0, 4.0])).sum(), rtol=1e-6
    )


# --- in every figure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["affine", "affine_then_exp"])
def test_every_figure_carries_the_jacobian(name):
    """The figures in data units are those of the model's space, less log |dx/dz|, for skewed data."""
    transform, x = TRANSFORMS[name], DATA[:6]
    outer, inner = make(transform), make(None)
    z = transform._inverse(x)
    jacobian = log_abs_det(transform, z, x, 1)
    assert np.ptp(jacobian) > 1 or name == "affine"

    key = jax.random.key(1)
    in_units, in_model = ppd.lower_bound(key, outer.prior({}), x), ppd.lower_bound(key, inner.prior({}), z)
    np.testing.assert_allclose(in_units.value, in_model.value - jacobian, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(in_units.null, in_model.null - jacobian, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(in_units.log_abs_det, jacobian, rtol=1e-4)
    np.testing.assert_allclose(in_units.above_null, in_model.above_null, rtol=1e-3, atol=1e-3)
    parts = -in_units.kl_per_step.sum(-1) - in_units.prior_kl - in_units.log_abs_det
    np.testing.assert_allclose(in_units.value, parts, rtol=1e-5, atol=1e-4)

    rule = ppd.Importance(key, 3)
    weighted = outer.prior({}, log_prob=rule).log_prob(x)
    np.testing.assert_allclose(weighted, inner.prior({}, log_prob=rule).log_prob(z) - jacobian, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        outer.prior({}).sample(key, (4,)), transform(inner.prior({}).sample(key, (4,))), rtol=1e-5
    )


def test_the_programs_carry_the_jacobian():
    transform, x = TRANSFORMS["affine_then_exp"], DATA[:3]
    z = transform._inverse(x)
    path = jax.random.normal(jax.random.key(0), (3, 4, 2))

    @jax.jit
    def densities():
        in_units, _ = log_density(make(transform).model, (x,), {}, {"path": path})
        in_model, _ = log_density(make(None).model, (z,), {}, {"path": path})
        return in_units, in_model - log_abs_det(transform, z, x, 1).sum()

    np.testing.assert_allclose(*densities(), rtol=1e-5)


def test_data_outside_the_codomain_are_refused():
    prior = make(TRANSFORMS["affine_then_exp"]).prior({})
    with pytest.raises(ValueError, match=r"x must lie in the transform's codomain; 1 .* do not"):
        ppd.lower_bound(jax.random.key(0), prior, jnp.array([[1.0, 2.0], [-1.0, 2.0]]))


def test_transforms_are_values():
    """Two diffusions with equal transforms are equal, and the arrays are leaves."""
    one, two = make(ppd.standardize(DATA)), make(ppd.standardize(DATA))
    assert one == two and hash(one) == hash(two)
    assert one != make(ppd.standardize(DATA[:50])) and one != make(None)
    leaves = jax.tree.leaves(one)
    assert any(leaf is one.transform.loc for leaf in leaves) and any(leaf is one.transform.scale for leaf in leaves)
