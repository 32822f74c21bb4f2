"""Twists: a new one is one class; one of the user's sees one chain."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from test_states import Z, by_sum, truth, z_score

import pp_diffusion as ppd
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.posterior.prediction import predict
from pp_diffusion.twists import Guided, Lookahead, Moment, Power, Twist, as_twist, likelihood

KEY = jax.random.key(0)


def zeros(x_t, t):
    return x_t * 0, x_t * 0


def gaussian(size=2):
    """Of standard normal data: the v-prediction is zero."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((size,)), ppd.FixedSchedule.constant_erasure(10), zeros, last_step="network"
    )
    return diffusion.prior({})


def coins(size=3):
    diffusion = ppd.Diffusion(
        ppd.BinomialKernel((size,), 0.3), ppd.FixedSchedule.constant_erasure(5), lambda x_t, t: x_t * 0 + LOGIT
    )
    return diffusion.prior({})


LOGIT = float(np.log(0.3 / 0.7))


class Hesitant(Twist):
    """The moment twist to a power: a new twist is one class, over states of any space."""

    name = "hesitant"

    def __call__(self, factors, exact, prediction, latents, rng_key):
        r = likelihood(factors, exact, latents)
        found = factors.space.condition(prediction, r, rng_key, most_rows=64)
        return Guided(0.7 * found.log_twist, found.proposal)


def seen_sum(prior, y):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


def of_normal():
    return seen_sum, (gaussian(), 1.0), np.exp(-0.5 / 3) / np.sqrt(2 * np.pi * 3)


def of_bits():
    counts = np.array([0.343, 0.441, 0.189, 0.027])
    return seen_sum, (coins(), 1.0), counts @ np.exp(-0.5 * (1 - np.arange(4)) ** 2) / np.sqrt(2 * np.pi)


def of_three_states():
    return by_sum, (2.0, 2), truth(by_sum, 2.0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", [of_normal, of_bits, of_three_states])
def test_a_new_twist_is_one_class(case):
    model, args, evidence = case()
    smc = ppd.SMC(model, num_particles=300, num_chains=50, twist=Hesitant(), progress_bar=False)
    smc.run(KEY, *args)
    evidences = np.asarray(smc.to_arviz()["sample_stats"]["log_evidence"], np.float64)
    assert abs(z_score(np.exp(evidences - np.log(evidence)), 1.0)) < Z
    assert smc.twist_rules == {"y": "r itself"}


# --- of the user's own ---------------------------------------------------------------------------------------------


def in_plate(prior, y):
    with numpyro.plate("rows", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gaussian, coins])
def test_a_function_sees_one_chain(make):
    """Particles (P, S, …) of each chain, and the same numbers as for all chains at once."""
    prior, y = make(), jnp.array([0.5, -1.0, 2.0, 0.0])
    factors = read_model(in_plate, (prior, y), {})
    batch, size = (6, 5, 4), prior.event_shape
    x = prior.kernel.as_state(prior.kernel.stationary().sample(KEY, batch))
    prediction = predict(factors.process, x, factors.process.rates.at(3))
    weights = jax.random.normal(KEY, (4, *size))

    def function(prediction, log_r):
        for a in (prediction.x_t, prediction.x_0, prediction.variance, prediction.reverse.mean, prediction.law.mean):
            assert a.shape == (6, 4, *size)
        assert prediction.reverse.batch_shape == (6, 4)
        along = prediction.covariance(weights * prediction.x_t)
        rest = prediction.x_0 * prediction.reverse.variance + prediction.law.mean
        return log_r(prediction.x_t) + (weights * (along + rest)).sum(-1) + y

    twist, exact = as_twist(function), factors.exact()
    found = jax.jit(lambda: twist(factors, exact, prediction, {}, KEY).log_twist)()
    whole = prediction.covariance(weights * prediction.x_t)
    whole += prediction.x_0 * prediction.reverse.variance + prediction.law.mean
    expected = factors.read(prediction.x_t, {}).log_r + (weights * whole).sum(-1) + y
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_functions_gradient_shifts_the_step():
    """Through the covariance, too: all chains, each by its own."""
    prior = gaussian()
    factors = read_model(seen_sum, (prior, 1.0), {})
    x = jax.random.normal(KEY, (6, 5, 1, 2))
    prediction = predict(factors.process, x, factors.process.rates.at(3))

    def function(prediction, log_r):
        return -((1 - prediction.covariance(prediction.x_0**2)) ** 2).sum(-1)

    proposal = as_twist(function)(factors, factors.exact(), prediction, {}, KEY).proposal
    gradient = jax.grad(lambda m: -((1 - prediction.covariance(m**2)) ** 2).sum())(prediction.x_0)
    expected = prediction.slope * prediction.covariance(gradient) / jnp.sqrt(prediction.reverse.variance)
    length = jnp.sqrt((expected**2).sum(-1, keepdims=True))
    expected *= jnp.minimum(1, (2 * np.sqrt(2) + 2) / length)
    np.testing.assert_allclose(proposal.shift, expected.reshape(proposal.shift.shape), rtol=1e-4, atol=1e-5)


# --- by name -------------------------------------------------------------------------------------------------------


def test_twists_by_name():
    assert isinstance(as_twist("annealed"), Power) and isinstance(as_twist("lookahead"), Lookahead)
    assert as_twist(None) == as_twist("moment") == Moment() != Moment(3)
    assert as_twist(Hesitant()) == Hesitant()
    assert as_twist(zeros) != as_twist(zeros)  # what it refers to may have changed
    with pytest.raises(ValueError, match="most_rows"):
        Moment(-1)
    with pytest.raises(ValueError, match="twist must be one of"):
        as_twist("moments")
