"""Data that float32 cannot hold, transforms that are none, networks of another diffusion: refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms

import pp_diffusion as ppd
from tests.compilations import compilations

pytestmark = pytest.mark.as_users

X = np.random.default_rng(0).normal(size=(20, 2))


def diffusion(network=None, transform=None):
    network = ppd.networks.MLP((4,)) if network is None else network
    return ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(4), network, transform=transform)


def prior(**settings):
    return diffusion(**settings).prior(diffusion(**settings).init_params(jax.random.key(0)))


@pytest.mark.slow
def test_large_offsets_are_refused():
    """Time stamps: in float32 their spread is gone, and K of what is left would be far above the truth."""
    with pytest.raises(ValueError, match=r"data lose their spread when rounded to float32 in columns 0, 1"):
        ppd.standardize(X + 1.6e9)
    with pytest.raises(ValueError, match="x lose their spread"):
        ppd.lower_bound(jax.random.key(0), prior(), X + 1.6e9)
    with pytest.raises(ValueError, match="x must be finite in float32"):
        ppd.lower_bound(jax.random.key(0), prior(), np.array([[1e39, 0.0]]))
    ppd.standardize(X + 1e3)  # here it is not
    # one datum many times has no spread to lose, whatever its standard deviation rounds to
    ppd.lower_bound(jax.random.key(0), prior(), np.tile(X[3], (1500, 1)))


NO_TRANSFORMS = {
    "not from the reals": transforms.PowerTransform(2.0),
    "another domain": transforms.AffineTransform(0.0, 1.0, domain=dist.constraints.positive),
    "an inverse": transforms.ExpTransform().inv,
    "scale 0": transforms.AffineTransform(0.0, 0.0),
    "not one to one": transforms.AbsTransform(),
    "another shape": transforms.ReshapeTransform((2, 1), (2,)),
    "loc of 3": transforms.AffineTransform(jnp.zeros(3), 1.0),
    "a batch of locs": transforms.AffineTransform(jnp.zeros((4, 2)), 1.0),
    "a matrix of 3": transforms.LowerCholeskyAffine(jnp.zeros(3), jnp.eye(3)),
}


@pytest.mark.parametrize("transform", NO_TRANSFORMS.values(), ids=NO_TRANSFORMS)
def test_what_is_no_transform_of_the_events(transform):
    with pytest.raises(ValueError, match="transform"):
        diffusion(transform=transform)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform",
    [
        transforms.ExpTransform(),
        transforms.SigmoidTransform(),
        transforms.OrderedTransform(),
        transforms.PermuteTransform(jnp.array([1, 0])),
        transforms.LowerCholeskyAffine(jnp.zeros(2), jnp.array([[1.0, 0.0], [0.5, 2.0]])),
        transforms.ComposeTransform([transforms.AffineTransform(1.0, 2.0), transforms.ExpTransform()]),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_what_is_one(transform):
    own = prior(transform=transform)
    x = own.sample(jax.random.key(1), (5,))
    assert bool(jnp.isfinite(ppd.lower_bound(jax.random.key(2), own, x).value).all())


def test_the_edge_of_the_support_is_refused():
    with pytest.raises(ValueError, match="not on its edge"):
        ppd.lower_bound(jax.random.key(0), prior(transform=transforms.SigmoidTransform()), np.array([[0.0, 0.5]]))


def test_a_network_made_for_another_diffusion():
    with pytest.raises(ValueError, match="network has num_timesteps=3; this diffusion needs 4"):
        diffusion(ppd.networks.MLP((4,), num_timesteps=3))
    with pytest.raises(ValueError, match="network has outputs="):
        diffusion(ppd.networks.MLP((4,), outputs=("real", "positive")))


@pytest.mark.parametrize("name", ["v", "paper", "direct"])
def test_a_network_in_bfloat16_leaves_the_densities_in_float32(name):
    for kernel in (ppd.GaussianKernel((2,)), ppd.BinomialKernel((2,))):
        name_here = "x0" if name == "v" and kernel.is_discrete else name
        outputs = len(kernel.parameterizations[name_here].outputs)

        def network(x_t, t, outputs=outputs):
            return (jnp.full_like(x_t, 0.5, jnp.bfloat16),) * outputs

        schedule = ppd.FixedSchedule.constant_erasure(4)
        own = ppd.Diffusion(kernel, schedule, network, parameterization=name_here).prior({})
        value = ppd.lower_bound(jax.random.key(0), own, jnp.ones((3, 2))).value
        assert value.dtype == jnp.float32
        assert bool(jnp.isfinite(value).all())


def test_log_weight_compiles_once():
    own = prior()
    with compilations() as programs:
        for seed in range(3):
            ppd.log_weight(jax.random.key(seed), prior().process, jnp.ones((3, 2)))
    assert programs["log_weight"] == 1
    assert own.process.num_timesteps == 4


@pytest.mark.slow
def test_swapped_and_foreign_arguments():
    own, params = prior(), diffusion().init_params(jax.random.key(0))
    with pytest.raises(TypeError, match="prior must be a DiffusionPrior"):
        ppd.lower_bound(own, jax.random.key(0), X)
    with pytest.raises(TypeError, match="diffusion must be a Diffusion"):
        ppd.fit(jax.random.key(0), own, X, num_steps=1)
    with pytest.raises(TypeError, match="optimizer must be an optax optimizer"):
        ppd.fit(jax.random.key(0), diffusion(), X, num_steps=1, optimizer="adam")
    with pytest.raises(TypeError, match="log_prob must be None"):
        diffusion().prior(params, log_prob=ppd.Bound)
    with pytest.raises(ValueError, match="value must have shape"):
        diffusion().prior(params, log_prob=ppd.Bound(jax.random.key(0))).log_prob(X[:, :1])
    state = ppd.fit(jax.random.key(0), diffusion(), X, num_steps=1, batch_size=5, progress_bar=False).state
    with pytest.raises(ValueError, match="state is that of another diffusion"):
        wider = diffusion(ppd.networks.MLP((5,)))
        ppd.fit(jax.random.key(0), wider, X, num_steps=1, state=state, progress_bar=False)
    for batches in (
        [9.0 + np.random.default_rng(0).normal(size=(8, 2))] * 3,
        lambda key: 1000 * jax.random.normal(key, (8, 2)),
    ):
        with pytest.warns(UserWarning, match="far from unit scale"):
            ppd.fit(jax.random.key(0), diffusion(), batches, num_steps=1, progress_bar=False)
