"""Data units outside, the model's space inside: the transform's Jacobian in every figure."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
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
    "whitened": ppd.whiten(DATA),
    "blocks": ppd.UniformBlocks((5.0, 45.0, 50.0), (-1.0, 0.0, 1.5), (0.3, 0.4, 0.5)),
    "affine_then_blocks": ComposeTransform(
        [AffineTransform(jnp.array([0.1, -0.1]), jnp.array([1.0, 0.3])), ppd.UniformBlocks((100.0,), (0.0,), (1.0,))]
    ),
}
over = pytest.mark.parametrize("name", TRANSFORMS)


# --- standardize ---------------------------------------------------------------------------------------------------


def test_standardize():
    transform = ppd.standardize(DATA)
    z = transform.inv(DATA)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-5)
    one = ppd.standardize(DATA, per_coordinate=False)
    assert one.loc.shape == one.scale.shape == ()
    z = one.inv(DATA)
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


# --- uniform blocks ------------------------------------------------------------------------------------------------

DIGITS = ppd.UniformBlocks(widths=(1, 15, 1), centres=(-1.25, 0, 1.25), scales=(0.25, 0.3, 0.25))
APART = ppd.UniformBlocks(widths=(1, 2), centres=(-4, 4), scales=(0.5, 0.6), low=-2)


@pytest.mark.parametrize("transform", [DIGITS, APART], ids=["digits", "apart"])
@pytest.mark.parametrize("x64", [False, True])
def test_the_inverse_of_blocks_is_exact(transform, x64):
    with jax.enable_x64(x64):
        eps, high = jnp.finfo(jnp.zeros(1).dtype).eps, transform.low + sum(transform.widths)
        z = transform.centres[0] - 5 * transform.scales[0] + jnp.linspace(0, 4, 500) * transform.scales[0]
        if transform.low == 0:  # tails keep their precision, where x does
            np.testing.assert_allclose(jax.jit(lambda z: transform.inv(transform(z)))(z), z, rtol=20 * eps)
        x = transform.low + (high - transform.low) * jnp.linspace(0, 1, 1_001)
        z = jax.jit(lambda x: transform.inv(x))(x)
        assert z.dtype == x.dtype and np.isfinite(z).all() and (np.diff(z) > 0).all()
        back, log_slope = jax.jit(lambda z, x: (transform(z), transform.log_abs_det_jacobian(z, x)))(z, x)
        np.testing.assert_allclose(back, x, rtol=0, atol=8 * eps * high)
        np.testing.assert_allclose(jax.jit(jax.vmap(transform.inv))(x), z, rtol=20 * eps, atol=20 * eps)
        # the edges
        ends = np.array(transform.centres)[[0, -1]] + np.array([-8, 8]) * np.array(transform.scales)[[0, -1]]
        np.testing.assert_allclose(z[jnp.array([0, -1])], ends, rtol=1e-6)
        assert np.isfinite(log_slope).all()
        assert np.isfinite(jax.jit(jax.vmap(jax.grad(transform.inv)))(x)).all()


def test_the_derivatives_of_blocks():
    with jax.enable_x64(True):
        z = jnp.linspace(-1.9, 1.9, 40)

        @jax.jit
        @jax.vmap
        def derivatives(z):
            x, inverse = DIGITS(z), jax.grad(DIGITS.inv)
            forward = jax.grad(DIGITS)(z), jax.grad(jax.grad(DIGITS))(z), DIGITS.log_abs_det_jacobian(z, x)
            return *forward, inverse(x), jax.grad(inverse)(x)

        slope, curve, log_slope, first, second = (np.asarray(a) for a in derivatives(z))
        np.testing.assert_allclose(log_slope, np.log(slope), rtol=1e-9)
        np.testing.assert_allclose(first, 1 / slope, rtol=1e-6)
        np.testing.assert_allclose(second, -curve / slope**3, rtol=1e-6, atol=1e-9)


def test_blocks_of_normals_are_uniform_within():
    """Whatever the blocks' shares: here nine tenths in the narrow one."""
    block = jax.random.bernoulli(jax.random.key(0), 0.1, (4_000,))
    z = dist.Normal(jnp.array(APART.centres)[block * 1], jnp.array(APART.scales)[block * 1]).sample(jax.random.key(1))
    x = np.asarray(APART(z))
    np.testing.assert_array_equal(x > -1, block)
    share = np.sort(np.where(block, (x + 1) / 2, x + 2))
    assert np.abs(share - (np.arange(4_000) + 0.5) / 4_000).max() < 1.63 / np.sqrt(4_000)  # Kolmogorov, 1 %


@pytest.mark.slow
def test_blocks_are_values_and_data_on_their_edges_are_data():
    same = ppd.UniformBlocks([1.0, 15, 1], np.array([-1.25, 0, 1.25]), jnp.array([0.25, 0.3, 0.25], jnp.float16))
    assert same != DIGITS  # 0.3 in half precision
    same = ppd.UniformBlocks([1.0, 15, 1], np.array([-1.25, 0, 1.25]), (0.25, 0.3, 0.25))
    same.inv(jnp.ones(3))
    assert same == DIGITS and hash(same) == hash(DIGITS) and DIGITS != APART
    assert jax.jit(lambda transform: transform)(DIGITS) == DIGITS and not jax.tree.leaves(DIGITS)
    thirds = ppd.UniformBlocks((0.1, 0.7, 0.1), (-2, 0, 2), (0.3, 0.4, 0.5), low=0.1)  # sums that round
    assert thirds.codomain(thirds(jnp.array([-90.0, 90.0]))).all()
    diffusion = make(DIGITS)
    diffusion.check_data(jnp.array([[0.0, 17.0], [1.0, 16.0]]))
    with pytest.raises(ValueError, match="codomain"):
        diffusion.check_data(jnp.array([[0.0, 17.1]]))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(widths=(1, 2), centres=(0, 1), scales=(1,)), "one number for each block"),
        (dict(widths=(), centres=(), scales=()), "one number for each block"),
        (dict(widths=(1, np.inf), centres=(0, 1), scales=(1, 1)), "finite"),
        (dict(widths=(1, 0), centres=(0, 1), scales=(1, 1)), "positive"),
        (dict(widths=(1, 1), centres=(1, 0), scales=(1, 1)), "centres must increase"),
        (dict(widths=(1, 1), centres=(0, 9), scales=(0.5, 0.5)), "centres must increase by at most 8"),
    ],
)
def test_blocks_refuse(settings, match):
    with pytest.raises(ValueError, match=match):
        ppd.UniformBlocks(**settings)


# --- helpers -------------------------------------------------------------------------------------------------------


@over
def test_log_abs_det_is_that_of_the_jacobian(name):
    transform = TRANSFORMS[name]
    z = jnp.array([[0.3, -0.2], [1.0, 0.5]])

    @jax.jit
    def both(z):
        if transform is None:
            return log_abs_det(transform, z, z, 1), jnp.broadcast_to(jnp.eye(2), (2, 2, 2))
        return log_abs_det(transform, z, transform(z), 1), jax.vmap(jax.jacobian(transform))(z)

    got, jacobians = both(z)
    assert got.shape == (2,)
    expected = np.linalg.slogdet(np.asarray(jacobians))[1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@over
def test_support_is_the_codomain(name):
    support = make(TRANSFORMS[name]).support
    assert support.event_dim == 1
    assert support(jnp.array([0.5, 2.0]))
    assert bool(support(jnp.array([-0.5, 2.0]))) == (name in ("none", "affine", "scalar_affine", "whitened"))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affine_then_exp", "affine", "blocks"])
def test_every_figure_carries_the_jacobian(name):
    """The figures in data units are those of the model's space, less log |dx/dz|, for skewed data."""
    transform, x = TRANSFORMS[name], DATA[:6]
    outer, inner = make(transform), make(None)
    z = transform.inv(x)
    jacobian = log_abs_det(transform, z, x, 1)
    assert np.ptp(jacobian) > 0.4 or name == "affine"

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


@pytest.mark.slow
def test_the_programs_carry_the_jacobian():
    transform, x = TRANSFORMS["affine_then_exp"], DATA[:3]
    z = transform.inv(x)
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


@pytest.mark.slow
def test_whitened_units_are_the_covariance():
    """Columns that go together have covariance I within; SMC's evidence is that of the data's."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(400, 3)) @ np.array([[2.0, 1.9, 0.0], [0.0, 0.1, 0.5], [0.0, 0.0, 3.0]]) + 5.0
    transform = ppd.whiten(data)
    z = np.asarray(transform.inv(jnp.asarray(data, float)))
    np.testing.assert_allclose(z.T @ z / 400, np.eye(3), atol=2e-3)
    T = 20

    def erased(x_t, t):  # exact for N(0, I)
        beta = (1 / (T + 1 - t))[..., None]
        return jnp.sqrt(1 - beta) * x_t, beta + 0 * x_t

    prior = ppd.Diffusion(
        ppd.GaussianKernel((3,)),
        ppd.FixedSchedule.constant_erasure(T),
        erased,
        parameterization="direct",
        last_step="network",
        transform=transform,
    ).prior({})
    y = jnp.array([6.0, 6.5, 4.0])

    def model():
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    smc = ppd.SMC(model, num_particles=500, progress_bar=False)
    smc.run(jax.random.key(0))
    covariance = transform.scale_tril @ transform.scale_tril.T
    exact = dist.MultivariateNormal(transform.loc, covariance + jnp.eye(3)).log_prob(y)
    np.testing.assert_allclose(smc.log_evidence, exact, atol=0.1)
    with pytest.raises(ValueError, match=r"data must have shape \(N, d\) with more rows than columns; got \(3, 3\)"):
        ppd.whiten(data[:3])
