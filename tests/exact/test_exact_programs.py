"""The two NumPyro routes, whole trajectories and the bound in factors, against K in closed form.

A linear reverse process that is wrong in every step, so that K < log p, and every term of it is known exactly.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from oracles import Chain, GaussianData, Z

import pp_diffusion as ppd

T = 6
DATA = GaussianData(np.array([0.5, -1.0]), np.array([0.6, 1.5]))
CHAIN = Chain(oracles.log_linear(T, 0.05, -2.0))
LOC, SCALE = np.array([2.0, -1.0]), np.array([3.0, 0.2])
MODEL = oracles.wrong_reverse(CHAIN, DATA)
X = DATA.draw(1, 7)
Y = LOC + SCALE * X


def make(last_step):
    """The diffusion in the units of Y, its parameters, and K of every row."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)),
        ppd.FixedSchedule.log_linear(T, 0.05, -2.0),
        oracles.Affine(True),
        parameterization="direct",
        last_step=last_step,
        transform=dist.transforms.AffineTransform(jnp.asarray(LOC), jnp.asarray(SCALE)),
    )
    exact = MODEL.with_kernel_last_step(CHAIN) if last_step == "kernel" else MODEL
    bound = exact.bound(CHAIN, X) - np.log(SCALE).sum()
    return diffusion, {diffusion.network_site: MODEL.params()}, bound


def averages(elbo, params, model, guide, num, *args, seed=0, **kwargs):
    """-loss for ``num`` keys."""

    @oracles.quick_jit
    @jax.vmap
    def loss(key):
        return elbo.loss(key, params, model, guide, *args, **kwargs)

    return -np.asarray(loss(jax.random.split(jax.random.key(seed), num)), dtype=np.float64)


@cache
def trajectory_values(elbo, last_step, order, batch_size):
    diffusion, params, _ = make(last_step)
    guide = partial(diffusion.guide, order=order)
    return averages(elbo(), params, diffusion.model, guide, 4000, Y, batch_size=batch_size)


@cache
def factor_values(elbo, last_step, num_times, batch_size):
    diffusion, params, _ = make(last_step)
    settings = {"num_times": num_times, "batch_size": batch_size}
    return averages(elbo(), params, diffusion.bound_model, diffusion.bound_guide, 6000, Y, **settings)


@pytest.mark.parametrize(
    "elbo, last_step, order, batch_size",
    [
        (Trace_ELBO, "kernel", "forward", None),
        (Trace_ELBO, "network", "posterior", None),
        (TraceMeanField_ELBO, "network", "posterior", None),
        (TraceMeanField_ELBO, "kernel", "posterior", 3),
        (TraceMeanField_ELBO, "network", "forward", 3),  # has no analytic KL, and so is right too
    ],
)
@pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction")
def test_whole_trajectories_average_to_k(elbo, last_step, order, batch_size):
    """|z| < 4.5 over 4000 keys, for the sum of K over the data."""
    bound = make(last_step)[2]
    assert abs(oracles.z_score(trajectory_values(elbo, last_step, order, batch_size), bound.sum())) < Z


def test_analytic_kls_are_in_use():
    """With the same keys the two ELBOs draw the same paths, but score them by other terms."""
    by_log_ratio, by_kl = (
        trajectory_values(elbo, "network", "posterior", None) for elbo in (Trace_ELBO, TraceMeanField_ELBO)
    )
    assert np.abs(by_log_ratio - by_kl).mean() > 0.1


@pytest.mark.parametrize(
    "elbo, last_step, num_times, batch_size",
    [
        (Trace_ELBO, "kernel", 1, None),
        (Trace_ELBO, "network", 1, 3),
        (Trace_ELBO, "network", 3, None),
        (Trace_ELBO, "network", T, 3),
        (TraceMeanField_ELBO, "kernel", T - 1, None),
    ],
)
def test_the_bound_in_factors_averages_to_k(elbo, last_step, num_times, batch_size):
    """|z| < 4.5 over 6000 keys."""
    bound = make(last_step)[2]
    assert abs(oracles.z_score(factor_values(elbo, last_step, num_times, batch_size), bound.sum())) < Z


def test_more_times_make_the_bound_less_noisy():
    assert (
        factor_values(TraceMeanField_ELBO, "kernel", T - 1, None).std()
        < 0.7 * factor_values(Trace_ELBO, "kernel", 1, None).std()
    )


@pytest.mark.slow
@pytest.mark.parametrize("last_step", ["kernel", "network"])
def test_the_importance_weighted_bound_is_between_k_and_log_p(last_step):
    """RenyiELBO(alpha=0) on trajectories is the log of a mean of weights: its value at n particles is that of
    independent weights from log_weight (|z| < 4.5 for the difference), and rises to log p."""
    diffusion, params, bound = make(last_step)
    model = MODEL.with_kernel_last_step(CHAIN) if last_step == "kernel" else MODEL
    log_prob = (model.log_prob(X) - np.log(SCALE).sum()).sum()
    elbo = RenyiELBO(alpha=0.0, num_particles=8)
    values = averages(elbo, params, diffusion.model, diffusion.guide, 2000, Y)
    process, z = diffusion.prior(params).process, jnp.asarray(X, dtype=float)
    weights = oracles.quick_jit(ppd.log_weight)(jax.random.key(3), process, jnp.broadcast_to(z, (8, 4000, *X.shape)))
    same = oracles.log_mean_exp(weights).sum(-1) - len(X) * np.log(SCALE).sum()
    error = np.hypot(values.std() / np.sqrt(len(values)), same.std() / np.sqrt(len(same)))
    assert abs(values.mean() - same.mean()) < Z * error
    assert bound.sum() + 4 * error < values.mean() < log_prob + Z * error
    # closer to log p than to K by far
    assert log_prob - values.mean() < 0.4 * (log_prob - bound.sum())


def test_the_importance_weighted_bound_refuses_the_factors():
    diffusion, params, _ = make("kernel")
    for num_times in (1, T - 1):
        model = partial(diffusion.bound_model, num_times=num_times)
        guide = partial(diffusion.bound_guide, num_times=num_times)
        with pytest.raises(ValueError, match="plate"):
            jax.eval_shape(lambda key: RenyiELBO(alpha=0.0).loss(key, params, model, guide, Y), jax.random.key(0))  # noqa: B023


@pytest.mark.slow
def test_both_routes_have_the_same_gradient():
    """d K / d parameters: whole trajectories and factors, averaged over 3000 keys, |z| < 5 for the difference in each
    of the 36 coefficients (error rate 2e-5)."""
    diffusion, params, _ = make("network")

    def gradients(elbo, model, guide, **kwargs):
        @oracles.quick_jit
        @jax.vmap
        def gradient(key):
            return jax.grad(lambda p: elbo.loss(key, p, model, guide, Y, **kwargs))(params)

        out = gradient(jax.random.split(jax.random.key(4), 3000))
        return np.concatenate([np.asarray(leaf).reshape(3000, -1) for leaf in jax.tree.leaves(out)], -1)

    by_path = gradients(Trace_ELBO(), diffusion.model, diffusion.guide)
    by_factors = gradients(Trace_ELBO(), diffusion.bound_model, diffusion.bound_guide, num_times=2)
    error = np.sqrt((by_path.var(0) + by_factors.var(0)) / 3000)
    assert (np.abs(by_path.mean(0) - by_factors.mean(0)) < 5 * error).all()
    assert np.abs(by_path.mean(0) / error).max() > 20  # and it is no comparison of noise


@pytest.mark.slow
def test_a_single_datum_is_a_batch_of_one():
    diffusion, params, bound = make("network")
    for model, guide in ((diffusion.model, diffusion.guide), (diffusion.bound_model, diffusion.bound_guide)):
        values = averages(Trace_ELBO(), params, model, guide, 4000, Y[2])
        assert abs(oracles.z_score(values, bound[2])) < Z
