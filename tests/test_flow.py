"""A flow as a NumPyro distribution: shapes, laws, transformations of JAX, what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform

import pp_diffusion as ppd
from pp_diffusion import solvers
from tests.exact.flow_oracles import TWO, Mixture
from tests.exact.oracles import enable_x64

X = jnp.asarray(TWO.sample(0, 5), jnp.float32)
KEY = jax.random.key(0)
BRIEF = {"num_steps": 5, "solver": solvers.RALSTON3}
FLOW = TWO.diffusion().flow({}, **BRIEF)
SHIFTED = Mixture(TWO.weights, TWO.means, TWO.scales, shift=lambda context: context)


@pytest.mark.slow
def test_shapes():
    assert FLOW.batch_shape == () and FLOW.event_shape == (2,)
    assert FLOW.sample(KEY).shape == (2,)
    assert FLOW.sample(KEY, (3, 4)).shape == (3, 4, 2)
    assert FLOW.log_prob(X).shape == (5,)
    assert FLOW.log_prob(X[0]).shape == ()
    expanded = FLOW.expand((5,)).to_event(1)
    assert expanded.sample(KEY, (3,)).shape == (3, 5, 2)
    np.testing.assert_allclose(expanded.log_prob(X), FLOW.log_prob(X).sum(), rtol=1e-5)
    assert FLOW.has_rsample and FLOW.rsample(KEY).shape == (2,)
    assert FLOW.num_calls == 19


@pytest.mark.slow
def test_noise_and_back():
    flow = FLOW.__class__(FLOW.prior, num_steps=24)
    noise = jax.random.normal(KEY, (6, 2))
    x = flow.from_noise(noise)
    np.testing.assert_array_equal(x, flow.sample(KEY, (6,)))
    np.testing.assert_allclose(flow.to_noise(x), noise, atol=1e-4)
    # the density is that of the map, whose Jacobian is known by derivatives through all of it
    jacobian = jax.vmap(jax.jacfwd(flow.from_noise))(noise)
    expected = -jnp.sum(noise**2, -1) / 2 - jnp.log(2 * jnp.pi) - jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(flow.log_prob(x), expected, atol=1e-3)


@pytest.mark.slow
def test_check_measures_the_error_of_the_steps(capsys):
    coarse, fine = (FLOW.__class__(FLOW.prior, num_steps=n, solver=solvers.RK4).check(KEY, num=64) for n in (6, 24))
    assert coarse.error > 30 * fine.error > 0
    assert coarse.halved.shape == coarse.round_trip.shape == coarse.noise.shape == (64,)
    fine.print_summary()
    out = capsys.readouterr().out
    assert "halved steps" in out and "there and back" in out and "found again" in out and "standard deviation" in out
    few = FLOW.__class__(FLOW.prior, num_steps=6, solver=solvers.RK4, sampler=solvers.Multistep(20)).check(KEY, num=64)
    assert 0.1 > few.draws.mean() > 20 * fine.draws.mean() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform",
    [
        AffineTransform(jnp.array([3.0, -2.0]), jnp.array([0.1, 5.0])),
        ComposeTransform([AffineTransform(0.0, 0.5), ExpTransform()]),
    ],
    ids=["affine", "exp"],
)
def test_transforms_carry_their_jacobian(transform):
    flow = TWO.diffusion(transform=transform).flow({}, **BRIEF)
    x = transform(X)
    expected = dist.TransformedDistribution(FLOW, transform).log_prob(x)
    np.testing.assert_allclose(flow.log_prob(x), expected, atol=2e-4)
    np.testing.assert_allclose(flow.sample(KEY, (4,)), transform(FLOW.sample(KEY, (4,))), rtol=1e-5)
    np.testing.assert_allclose(flow.to_noise(x), FLOW.to_noise(X), atol=1e-4)
    assert flow.support == flow.prior.support and bool(flow.support(x).all())


def test_support_is_validated():
    flow = TWO.diffusion(transform=ExpTransform()).flow({}, **BRIEF, validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        flow.log_prob(jnp.array([-1.0, 2.0]))
    assert FLOW.support == constraints.independent(constraints.real, 1)


@pytest.mark.slow
def test_context_is_a_batch():
    shift = jnp.array([[0.0, 0.0], [2.0, -1.0], [0.5, 3.0]])
    flow = SHIFTED.diffusion().flow({}, context=shift, context_event_dim=1, **BRIEF)
    assert flow.batch_shape == (3,)
    x = X[0] + shift
    one_by_one = [
        SHIFTED.diffusion().flow({}, context=s, context_event_dim=1, **BRIEF).log_prob(x_)
        for s, x_ in zip(shift, x, strict=True)
    ]
    np.testing.assert_allclose(flow.log_prob(x), jnp.stack(one_by_one), atol=1e-4)
    assert flow.sample(KEY, (2,)).shape == (2, 3, 2)
    assert flow.log_prob(X[:, None]).shape == (5, 3)
    assert flow.log_prob(X[0]).shape == (3,)  # one datum under each context


@pytest.mark.slow
def test_pytree_jit_vmap_grad():
    leaves, structure = jax.tree.flatten(FLOW)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.log_prob(X), FLOW.log_prob(X))
    assert all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)
    traces = []

    @jax.jit
    def through_jit(flow, x):
        traces.append(1)
        return flow.log_prob(x)

    for flow in (FLOW, TWO.diffusion().flow({}, **BRIEF)):
        np.testing.assert_allclose(through_jit(flow, X), FLOW.log_prob(X), atol=1e-5)
    assert len(traces) == 1  # equal flows trace once
    np.testing.assert_allclose(jax.vmap(FLOW.log_prob)(X), FLOW.log_prob(X), atol=1e-5)
    gradient = jax.grad(FLOW.log_prob)(X[0])
    h = 1e-2
    for i in range(2):
        step = h * jnp.eye(2)[i]
        difference = (FLOW.log_prob(X[0] + step) - FLOW.log_prob(X[0] - step)) / (2 * h)
        np.testing.assert_allclose(gradient[i], difference, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_second_derivatives():
    """Forward over reverse, as AutoLaplaceApproximation takes them."""
    assert np.isfinite(jax.hessian(FLOW.log_prob)(X[0])).all()


@pytest.mark.slow
def test_gradient_by_the_parameters():
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(20), ppd.networks.MLP((8,)))
    params = diffusion.init_params(KEY)
    gradient = jax.grad(lambda p: -diffusion.flow(p, **BRIEF).log_prob(X).mean())(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.slow  # the quick test of float64 is the exact one
def test_x64():
    with enable_x64():
        flow = TWO.diffusion().flow({}, **BRIEF)
        x = jnp.asarray(TWO.sample(0, 5))
        assert flow.log_prob(x).dtype == flow.sample(KEY).dtype == jnp.float64
        np.testing.assert_allclose(flow.log_prob(x), FLOW.log_prob(X), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_events_of_any_number_of_axes(shape):
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel(shape), ppd.FixedSchedule.log_linear(30), lambda x_t, t: (0 * x_t, 0 * x_t)
    )
    for trace in (None, ppd.Hutchinson(KEY, 2))[bool(shape) :]:  # exact for a multiple of the identity
        flow = diffusion.flow({}, trace=trace, **BRIEF)
        x = flow.sample(KEY, (4,))
        normal = dist.Normal().expand(shape).to_event(len(shape))
        np.testing.assert_allclose(flow.log_prob(x), normal.log_prob(x), atol=0.02)


def test_large_events_need_a_trace_that_is_named():
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((150,)), ppd.FixedSchedule.log_linear(10), lambda x_t, t: (0 * x_t, 0 * x_t)
    )
    with pytest.raises(ValueError, match=r"150 numbers.*trace=pp_diffusion\.Hutchinson\(rng_key"):
        diffusion.flow({}).log_prob(jnp.zeros(150))
    with pytest.raises(ValueError, match="Hutchinson"):
        diffusion.flow({}).check(KEY)
    assert diffusion.flow({}, num_steps=2).sample(KEY).shape == (150,)
    assert np.isfinite(diffusion.flow({}, trace=ppd.Hutchinson(KEY), **BRIEF).log_prob(jnp.zeros(150)))


def test_refusals():
    binomial = ppd.Diffusion(ppd.BinomialKernel((2,)), ppd.FixedSchedule.constant_erasure(5), lambda x_t, t: (0 * x_t,))
    with pytest.raises(ValueError, match="BinomialKernel has no flow"):
        binomial.flow({})
    with pytest.raises(TypeError, match="prior must be a DiffusionPrior"):
        ppd.DiffusionFlow(dist.Normal())
    one_step = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.5]), lambda x_t, t: (0 * x_t, 0 * x_t))
    with pytest.raises(ValueError, match="num_timesteps"):
        one_step.flow({})
    with pytest.raises(ValueError, match="num_steps"):
        TWO.diffusion().flow({}, num_steps=0)
    with pytest.raises(TypeError, match="sampler must be a"):
        TWO.diffusion().flow({}, sampler=solvers.EULER)
    for wrong in (solvers.Multistep(1), solvers.Multistep(9, order=3)):
        with pytest.raises(ValueError, match=r"num_calls|order"):
            TWO.diffusion().flow({}, sampler=wrong)
    for moment in ("mean", "variance"):
        with pytest.raises(NotImplementedError, match="sample"):
            getattr(FLOW, moment)


@pytest.mark.slow
def test_networks_between_steps():
    """Whether a network looks at the step's number is read off its program."""
    make = partial(ppd.Diffusion, ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(8))
    for network, between in {
        ppd.networks.MLP((4,)): True,
        ppd.networks.MLP((4,), readout="bumps"): False,
        ppd.networks.Entrywise((4,)): True,
        ppd.networks.RBF(4): False,
    }.items():
        diffusion = make(network)
        assert diffusion.flow(diffusion.init_params(KEY)).ode.between is between
