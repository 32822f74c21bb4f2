"""Particle Gibbs leaves posteriors as they are: joint-distribution tests (Geweke 2004), and a conjugate posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from oracles import Z, z_score

import pp_diffusion as ppd
from pp_diffusion.posterior import held_noise
from pp_diffusion.posterior.conditional import sweep
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.smc import Sampler
from pp_diffusion.twists import as_twist

NUM_REPLICAS, NUM_TIMESTEPS = 2000, 3


def bent(x_t, t):
    """A reverse process that is of no known data."""
    return 0.6 * jnp.sin(x_t) + 0.2 * x_t, 0.3 * jnp.cos(x_t)


GAUSSIAN = ppd.Diffusion(
    ppd.GaussianKernel(()), ppd.FixedSchedule.constant_erasure(NUM_TIMESTEPS), bent, last_step="network"
).prior({})


def model(latents, y):
    """Two rows, coupled but for what is given; a count and a normal number of each."""
    b, s = latents["b"], latents["s"]
    with numpyro.plate("rows", 2):
        x = numpyro.sample("x", GAUSSIAN)
        numpyro.sample("y", dist.Normal(x * b, s), obs=y["y"])
        numpyro.sample("n", dist.Poisson(jnp.exp(0.5 * x)), obs=y["n"])


def replicas(rng_key):
    """Latents, trajectories and data, drawn jointly from the model; and its sampler."""
    keys = jax.random.split(rng_key, 6)
    kernel, process = GAUSSIAN.kernel, GAUSSIAN.process
    shape = (NUM_REPLICAS, 1, 2)
    latents = {
        "b": 0.5 + jax.random.normal(keys[0], (NUM_REPLICAS,)),
        "s": jnp.exp(0.5 * jax.random.normal(keys[1], (NUM_REPLICAS,)) - 1),
    }
    path = [kernel.stationary().sample(keys[2], shape)]
    for t in range(NUM_TIMESTEPS, 1, -1):
        path.append(process(path[-1], process.rates.at(t - 1)).sample(jax.random.fold_in(keys[3], t)))
    path.append(process.last(path[-1]).sample(keys[3]))
    x = path[-1][:, 0]
    noise = jax.random.normal(keys[4], x.shape)
    y = {
        "y": x * latents["b"][:, None] + latents["s"][:, None] * noise,
        "n": jax.random.poisson(keys[5], jnp.exp(0.5 * x)).astype(float),
    }
    return latents, jnp.stack(path[::-1], 1), y


@pytest.mark.slow
@pytest.mark.parametrize(("twist", "ess_threshold"), [("moment", 0.9), ("constant", 1.0), ("lookahead", 0.5)])
def test_sweeps_leave_the_joint_distribution_as_it_is(twist, ess_threshold):
    """Means of functions of (x, path, data, latents) before and after three sweeps: paired differences of zero.

    Twelve functions of each twist: an error rate of 8e-5 each.
    """
    latents, path, y = replicas(jax.random.key(1))
    first = jax.tree.map(lambda a: a[0], (latents, y))
    factors = read_model(model, first, {})
    sampler = Sampler(factors, as_twist(twist), ess_threshold, 0)
    program = factors.reader.program

    def swept(rng_key, path, latents, y):
        arrays = tuple(jax.tree.leaves((latents, y)))
        assert len(arrays) == len(program.arrays)
        now = sampler.replace(
            factors=factors.replace(reader=factors.reader.replace(program=program.replace(arrays=arrays)))
        )
        new = [path]
        for key in jax.random.split(rng_key, 3):
            path, is_new, _ = sweep(key, now, path, 3)
            new.append(is_new)
        return path, jnp.stack(new[1:]).mean()

    keys = jax.random.split(jax.random.key(2), NUM_REPLICAS)
    after, renewed = jax.jit(jax.vmap(swept))(keys, path, latents, y)
    assert 0.3 < renewed.mean() < 0.9  # or nothing is tested

    def functions(path):
        x, x_1, x_T = path[:, 0, 0], path[:, 1, 0], path[:, -1, 0]
        b = latents["b"][:, None]
        found = [x, x**2, x * y["y"], x * b * y["y"], x * y["n"], x_1, x_1**2, x_1 * y["n"], x_T, x_T * x, x_T * x_1]
        return np.stack([np.asarray(f, np.float64).sum(-1) for f in (*found, x[:, :1] * x[:, 1:])], -1)

    assert np.abs(z_score(functions(after) - functions(path), 0.0)).max() < Z


@pytest.mark.slow
def test_moves_at_fixed_noise_leave_the_joint_distribution_as_it_is():
    """The same of latents and path after three moves: an error rate of 8e-5 for each of twelve functions."""
    latents, path, y = replicas(jax.random.key(1))
    first = jax.tree.map(lambda a: a[0], (latents, y))
    factors = read_model(model, first, {})
    sampler = Sampler(factors, as_twist("moment"), 0.5, 0)
    program = factors.reader.program

    def moved(rng_key, path, position, y):
        def sampler_at(position):
            arrays = tuple(jax.tree.leaves(({"b": position[0], "s": jnp.exp(position[1])}, y)))
            reader = factors.reader.replace(program=program.replace(arrays=arrays))
            return sampler.replace(factors=factors.replace(reader=reader))

        def log_density(position, path):
            x, (b, log_s) = path[0, 0], position
            prior = dist.Normal(0.5, 1).log_prob(b) + dist.Normal(-1, 0.5).log_prob(log_s)
            normal = dist.Normal(x * b, jnp.exp(log_s)).log_prob(y["y"])
            return prior + (normal + dist.Poisson(jnp.exp(0.5 * x)).log_prob(y["n"])).sum()

        walk = held_noise.Walk(jnp.zeros(()), jnp.zeros(2), jnp.array([[0.5, 0.1], [0.1, 0.2]]))
        return held_noise.move(rng_key, sampler_at, log_density, position, path, walk, 3)

    position = jnp.stack([latents["b"], jnp.log(latents["s"])], -1)
    keys = jax.random.split(jax.random.key(2), NUM_REPLICAS)
    position_after, path_after, accepted = jax.jit(jax.vmap(moved))(keys, path, position, y)
    assert 0.1 < accepted.mean() < 0.9  # or nothing is tested
    assert np.abs(path_after - path)[:, 0].mean() > 0.03  # x goes along

    def functions(path, position):
        x, x_1, x_T, b, log_s = path[:, 0, 0], path[:, 1, 0], path[:, -1, 0], position[:, :1], position[:, 1:]
        found = [x, x**2, x * y["y"], b * x * y["y"], x * y["n"], x_1 * x, x_T * x, b, b**2, log_s, log_s**2]
        found.append(jnp.exp(-log_s) * jnp.abs(y["y"] - x * b))
        return np.stack([np.asarray(f, np.float64).sum(-1) for f in found], -1)

    difference = functions(path_after, position_after) - functions(path, position)
    assert np.abs(z_score(difference, 0.0)).max() < Z


@pytest.mark.slow
def test_errors_in_variables():
    """x_i ~ N(0, 1) seen as x_i + N(0, 1/4), and y_i ~ N(a + x_i, .09): a and x are jointly normal, in closed form.

    Means within Z standard errors by the effective sample size, standard deviations within 10 % of the truth.
    """
    rows, rng = 6, np.random.default_rng(3)
    prior = ppd.Diffusion(
        ppd.GaussianKernel(()), ppd.FixedSchedule.constant_erasure(6), lambda x_t, t: (0 * x_t, 0 * x_t)
    ).prior({})
    x = rng.normal(size=rows)
    seen, y = x + 0.5 * rng.normal(size=rows), 1 + x + 0.3 * rng.normal(size=rows)

    def errors_in_variables(seen, y):
        a = numpyro.sample("a", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", rows):
            x = numpyro.sample("x", prior)
            numpyro.sample("seen", dist.Normal(x, 0.5), obs=seen)
            z = numpyro.sample("z", dist.Normal(x, 0.05**0.5))  # a latent that depends on x
            numpyro.sample("y", dist.Normal(a + z, 0.2), obs=y)

    gibbs = ppd.ParticleGibbs(errors_in_variables, num_particles=4, num_samples=2000, progress_bar=False)
    gibbs.run(jax.random.key(0), jnp.asarray(seen), jnp.asarray(y))
    draws = gibbs.get_samples(group_by_chain=True)
    found = np.concatenate([np.asarray(draws["a"], np.float64)[..., None], np.asarray(draws["x"])], -1)
    design = np.concatenate([np.c_[np.zeros(rows), np.eye(rows)], np.c_[np.ones(rows), np.eye(rows)]])
    weights = np.r_[np.full(rows, 4.0), np.full(rows, 1 / 0.09)]
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design) + np.diag(np.r_[0.25, np.ones(rows)]))
    mean, sd = covariance @ design.T @ (weights * np.r_[seen, y]), np.sqrt(np.diag(covariance))
    size = effective_sample_size(found)
    assert size.min() > 300
    assert np.abs((found.mean((0, 1)) - mean) / sd * np.sqrt(size)).max() < Z
    np.testing.assert_allclose(found.std((0, 1)), sd, rtol=0.1)
