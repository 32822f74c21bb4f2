"""Last steps answer for themselves; integer data through the whole package (their exact answers: tests/exact)."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import pp_diffusion as ppd
from pp_diffusion.last_step import LAST_STEPS, ByKernel, as_last_step

KERNEL, SCHEDULE = ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(4, 0.01)
AFFINE = dist.transforms.AffineTransform(jnp.array([1.0, 2.0]), 1.5)
X = np.array([[0, 3], [1, 2], [3, 0], [2, 2], [0, 1], [3, 3]])


def network(x_t, t):
    return 0.2 * x_t, 0.1 * x_t - 0.1


def diffusion(last_step=ppd.Discretized(4), transform=AFFINE, network=network, **settings):  # noqa: B008
    return ppd.Diffusion(KERNEL, SCHEDULE, network, last_step=last_step, transform=transform, **settings)


def test_by_name():
    assert as_last_step("kernel") == ByKernel() and as_last_step(ppd.Discretized(3)) == ppd.Discretized(3)
    assert as_last_step("discretized") == ppd.Discretized(256) != ppd.Discretized(4)
    assert {name: cls().first_network_step for name, cls in LAST_STEPS.items()} == {
        "kernel": 1,
        "network": 0,
        "discretized": 0,
    }
    for wrong in ("nothing", None, 3):
        with pytest.raises(ValueError, match="last_step must be 'kernel' or 'network', or for integer data"):
            as_last_step(wrong)
    for levels in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="levels must be"):
            ppd.Discretized(levels)


@pytest.mark.parametrize(
    "transform",
    [None, AFFINE, dist.transforms.ComposeTransform([AFFINE, dist.transforms.AffineTransform(1.0, -2.0)])],
)
def test_affine_transforms_are_taken(transform):
    last_step = diffusion(transform=transform).last_step
    levels = last_step.low + jnp.arange(4)[:, None] * last_step.width
    x = levels if transform is None else transform(levels)
    np.testing.assert_allclose(x, np.broadcast_to(np.arange(4)[:, None], (4, 2)), atol=1e-5)


def test_what_it_does_not_go_with_is_named():
    with pytest.raises(ValueError, match=r"transform must be affine, entry by entry, .* got ExpTransform"):
        diffusion(transform=dist.transforms.ExpTransform())
    lower = dist.transforms.LowerCholeskyAffine(jnp.zeros(2), jnp.eye(2))
    with pytest.raises(ValueError, match="transform must be affine, entry by entry"):
        diffusion(transform=lower)
    with pytest.raises(ValueError, match="last_step must be 'kernel' or 'network' for a BinomialKernel"):
        ppd.Diffusion(ppd.BinomialKernel((2,)), SCHEDULE, lambda x_t, t: x_t, last_step="discretized")


@pytest.mark.parametrize("wrong", [-1, 4, 1.5])
def test_data_have_to_be_levels(wrong):
    x = X.astype(float)
    x[2, 1] = wrong
    for call in (
        lambda: ppd.lower_bound(jax.random.key(0), diffusion().prior({}), x),
        lambda: ppd.fit(jax.random.key(0), diffusion(), x, num_steps=1, progress_bar=False),
    ):
        with pytest.raises(ValueError, match=f"must be integers 0…3 for last_step='discretized'; it holds {wrong}"):
            call()


def test_the_prior_is_one_of_integers():
    prior = diffusion().prior({})
    x = prior.sample(jax.random.key(0), (50,))
    assert x.dtype.kind == "i" and x.min() >= 0 and x.max() <= 3
    assert prior.is_discrete and not prior.has_rsample and np.asarray(prior.support(x)).all()
    for law in (prior, diffusion(last_step="network").prior({})):
        assert law.kernel == KERNEL and law.transform is AFFINE


@pytest.mark.slow
def test_the_program_has_probabilities_at_its_site():
    """Site "x" of the whole-trajectory program: sums to one over the levels, given the path."""
    model = handlers.seed(diffusion().model, 0)
    path = handlers.trace(model).get_trace()["path"]["value"]
    every = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2)

    def log_prob(x):
        trace = handlers.trace(handlers.substitute(model, {"path": path})).get_trace(x)
        return trace["x"]["fn"].log_prob(x)

    total = sum(np.exp(float(log_prob(jnp.asarray(x)))) for x in every)
    assert abs(total - 1) < 1e-5
    assert handlers.trace(model).get_trace()["x"]["value"].dtype.kind == "i"


@pytest.mark.slow
def test_training_with_an_entry_that_never_changes():
    data = np.concatenate([X, X])
    data[:, 0] = 1  # no bound on a density, and none on a probability
    fit = ppd.fit(
        jax.random.key(0),
        diffusion(network=ppd.networks.MLP((8,))),
        data,
        num_steps=20,
        batch_size=6,
        progress_bar=False,
    )
    assert np.isfinite(fit.losses).all()
    bound = ppd.lower_bound(jax.random.key(1), fit.prior, data)
    assert (bound.value < 0).all()


def test_entropies_are_of_integers():
    prior = diffusion().prior({})
    bounds, entropy = ppd.entropy_bounds(prior), ppd.reverse_entropy(jax.random.key(0), prior, X)
    assert bounds.lower[0] == 0 and bounds.upper[0] == pytest.approx(2 * np.log(4))
    assert 0 <= entropy.value[0] <= bounds.upper[0]


def test_what_needs_a_density_refuses_it_by_name():
    prior = diffusion().prior({})
    with pytest.raises(ValueError, match="prior must have no last_step='discretized' to be perturbed"):
        ppd.perturb(prior, lambda x: x.sum(-1), power="annealed")

    def model():
        numpyro.sample("x", prior)

    with pytest.raises(ValueError, match="site 'x' has last_step='discretized'"):
        handlers.trace(handlers.seed(handlers.reparam(model, {"x": ppd.TrajectoryReparam()}), 0)).get_trace()
