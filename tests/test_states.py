"""State spaces: a user's three states go through SMC, by enumeration; and bits are their case of two."""

import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from test_kernels import UniformCategorical, all_states, toy_network

import pp_diffusion as ppd
from pp_diffusion.states import Finite
from pp_diffusion.states.entries import Binary, Categorical, normalised

KEY = jax.random.key(0)
NUM_STEPS = 4
NOISE = 1.2
Z = 4.5


def z_score(values, expected):
    """Of the mean over the first axis."""
    values = np.asarray(values, np.float64)
    return (values.mean(0) - expected) / (values.std(0, ddof=1) / math.sqrt(len(values)) + 1e-12)


@cache
def prior(size=2):
    """A chain over three states, and all its states with their log probabilities, by summing over paths."""
    found = ppd.Diffusion(
        UniformCategorical((size,)), ppd.FixedSchedule.constant_erasure(NUM_STEPS), lopsided, last_step="network"
    ).prior({})
    with jax.ensure_compile_time_eval():
        states = all_states(found.kernel, 3)
        return found, np.asarray(states), np.asarray(_enumerated(found, states), np.float64)


def lopsided(x_t, t):
    """One logit per state, which favours the state as it is, and the last."""
    return tuple(logit + 0.4 * k for k, logit in enumerate(toy_network(x_t, t)))


@jax.jit
def _enumerated(prior, states):
    process = prior.process
    log_p = process.kernel.stationary().log_prob(states)
    for i in range(process.num_timesteps - 1, 0, -1):
        log_p = logsumexp(log_p[:, None] + process(states[:, None], process.rates.at(i)).log_prob(states[None]), 0)
    return logsumexp(log_p[:, None] + process.last(states[:, None]).log_prob(states[None]), 0)


def by_entry(y, size):
    x = numpyro.sample("x", prior(size)[0])
    numpyro.sample("y", dist.Normal(jnp.array([-0.5, 0.5, 1.0])[x], NOISE).to_event(1), obs=jnp.full(size, y))


def by_sum(y, size):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", prior(size)[0]).sum(), NOISE), obs=y)


def known(y, size):
    numpyro.sample("y", dist.Delta(numpyro.sample("x", prior(size)[0])[0]), obs=int(y))


def with_latent(y, size):
    x, shift = numpyro.sample("x", prior(size)[0]), numpyro.sample("shift", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(x.sum() + shift, NOISE), obs=y)


def normal(y, mean):
    return np.exp(-0.5 * ((y - mean) / NOISE) ** 2) / (NOISE * math.sqrt(2 * math.pi))


R = {
    by_entry: lambda y, x: normal(y, np.array([-0.5, 0.5, 1.0])[x]).prod(-1),
    by_sum: lambda y, x: normal(y, x.sum(-1)),
    known: lambda y, x: x[:, 0] == y,
    with_latent: lambda y, x: 0.7 * normal(y, x.sum(-1)) + 0.3 * normal(y, x.sum(-1) + 1),
}


def truth(model, y, size):
    """The evidence."""
    _, states, log_p = prior(size)
    return (np.exp(log_p) * R[model](y, states)).sum()


def custom(prediction, log_r):
    return -0.3 * (1.0 - prediction.x_0.sum(-1)) ** 2


@pytest.mark.parametrize(
    ("model", "size", "twist", "rule"),
    [
        (by_sum, 2, "moment", "averaged over all words"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (by_entry, 2, "moment", "entry by entry, in closed form"),
                (by_entry, 2, "annealed", "r itself"),
                (by_sum, 6, "moment", "averaged over 32 draws"),
                (known, 2, "moment", "entry by entry, in closed form"),
                (with_latent, 2, "moment", "averaged over all words"),
                (by_sum, 2, "lookahead", "r itself"),
                (by_sum, 2, custom, "r itself"),
            )
        ),
    ],
)
def test_the_posterior_of_three_states(model, size, twist, rule):
    """Evidence and posterior against enumeration, within their error over chains."""
    y = 2.0
    smc = ppd.SMC(model, num_particles=400, num_chains=50, twist=twist, progress_bar=False)
    smc.run(KEY, y, size)
    _, states, log_p = prior(size)
    joint = np.exp(log_p) * R[model](y, states)
    evidences = np.asarray(smc.to_arviz()["sample_stats"]["log_evidence"], np.float64)
    ratios = np.exp(evidences - math.log(joint.sum()))
    assert abs(z_score(ratios, 1.0)) < Z
    assert smc.twist_rules == {"y": rule}
    x = np.asarray(smc.get_samples(group_by_chain=True)["x"])
    assert x.dtype.kind == "i" and x.min() >= 0 and x.max() <= 2
    if model is by_entry and twist == "moment":
        assert evidences.std() < 0.1
    # how often each entry has each value, weighted as the chains are
    exact = np.array([joint[states[:, i] == k].sum() / joint.sum() for k in range(3) for i in range(size)])
    shares = np.stack([(x[..., i] == k).mean(1) for k in range(3) for i in range(size)], -1)
    often = exact > 0.01  # z-scores of what is seldom seen are none
    assert (np.abs(z_score(ratios[:, None] * (shares - exact), 0.0)) < Z)[often].all()


def test_what_a_step_says_of_x_0_and_back():
    kernel = UniformCategorical((2, 2))
    x_t = jax.random.randint(KEY, (5, 2, 2), 0, 3)
    logits = jax.random.normal(KEY, (5, 2, 2, 3))
    rates = ppd.FixedSchedule.constant_erasure(6).rates().at(2)
    reverse = kernel.reverse_given(x_t, dist.CategoricalLogits(logits).to_event(2), rates)
    found = kernel.x_0_given(x_t, reverse, rates)
    np.testing.assert_allclose(found.base_dist.probs, jax.nn.softmax(logits), rtol=1e-4, atol=1e-5)


def test_a_kernel_without_a_state_space_is_refused():
    class Bare(UniformCategorical):
        state_space = ppd.Kernel.state_space

    bare = ppd.Diffusion(Bare((2,)), ppd.FixedSchedule.constant_erasure(3), toy_network).prior({})

    def model():
        numpyro.factor("r", -1.0 * numpyro.sample("x", bare).sum())

    with pytest.raises(NotImplementedError, match="Bare does not define state_space"):
        ppd.SMC(model, num_particles=8, progress_bar=False).run(KEY)


# --- entries ---------------------------------------------------------------------------------------------------------

LOGITS = jax.random.normal(KEY, (4, 3))
TWO = Binary(LOGITS), normalised(jnp.stack([jnp.zeros_like(LOGITS), LOGITS], -1))
LOG_R = [jnp.where(LOGITS > 1, -jnp.inf, LOGITS), -LOGITS]


def probs(entries):
    return jax.nn.sigmoid(entries.logits) if isinstance(entries, Binary) else jnp.exp(entries.log_probs[..., 1])


@pytest.mark.slow
def test_bits_are_entries_of_two_values():
    x = (jax.random.uniform(KEY, (4, 3)) < 0.5).astype(float)
    uniform, words = jax.random.uniform(KEY, (7, 4, 3)), jnp.array(list(itertools.product((0, 1), repeat=3)))
    weights = jax.nn.softmax(jax.random.normal(KEY, (8, 4)), 0)
    draws = TWO[0].quantile(uniform)
    even = jnp.full((7, 4), 1 / 7)
    questions = {
        "log_prob": lambda e: e.log_prob(x),
        "log_prob_of_states": lambda e: e.log_prob_of_states(words),
        "moments": lambda e: e.moments(),
        "quantile": lambda e: e.quantile(uniform),
        "log_mean": lambda e: e.log_mean(LOG_R),
        "tilted": lambda e: probs(e.tilted(LOG_R)),
        "at most": lambda e: probs(e.tilted(LOG_R, 2.0)),
        "impossible": lambda e: probs(e.tilted([jnp.full_like(LOGITS, -jnp.inf)] * 2)),
        "words": lambda e: probs(e.seen(weights, words, 0.9)),
        "draws": lambda e: probs(e.seen(even, draws, 0.9)),
        "finite": lambda e: e.is_finite,
    }
    for name, question in questions.items():
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6, err_msg=name), *(question(e) for e in TWO)
        )


def test_impossible_values_are_never_drawn():
    law = Categorical(jnp.log(jnp.array([0.0, 0.4, 0.0, 0.6])) * jnp.ones((100_000, 1, 4)))
    values, counts = np.unique(np.asarray(law.draw(KEY)), return_counts=True)
    assert values.tolist() == [1, 3] and law.is_finite.all()
    assert counts[1] / counts.sum() == pytest.approx(0.6, abs=0.01)


def test_the_number_of_values():
    with pytest.raises(ValueError, match="num_values"):
        Finite(UniformCategorical((2,)), 1)
