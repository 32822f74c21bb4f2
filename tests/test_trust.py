"""Trust: nothing is flagged where all is right, and what is broken is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import pp_diffusion as ppd
from pp_diffusion.posterior.surprise import LEVEL, Surprise, conflicts, surprise
from pp_diffusion.posterior.trust import Trust, flags_of
from tests.compilations import compilations

KEY = jax.random.key(0)
PRIOR = ppd.Diffusion(  # the exact reverse process of N(0, 1)
    ppd.GaussianKernel((2,)), ppd.FixedSchedule.constant_erasure(6), lambda x_t, t: (0 * x_t, 0 * x_t)
).prior({})
SETTINGS = {"num_simulations": 40, "num_particles": 200}


def model(y, mean, scale, noise):
    """Data from N(0, 1); what the prior says of them is given."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(mean + scale * x, noise).to_event(1), obs=y)


def arguments(seed, mean=0.0, scale=1.0):
    """What was seen at a draw of N(0, 1) with noise, by a prior of N(mean, scale²)."""
    rng = np.random.default_rng(seed)
    noise = float(np.exp(rng.uniform(-2, 0.5)))
    y = rng.normal(size=2) + noise * rng.normal(size=2)
    return tuple(jnp.asarray(a, jnp.float32) for a in (y, mean, scale, noise))


def sound(**changes):
    """What is right, but for changes."""
    rng = np.random.default_rng(0)
    found = Trust(
        (),
        {"x": rng.integers(0, 20, size=(40, 2))},
        19,
        {"x": 0.9},
        np.zeros(40),
        np.full(40, 0.1),
        ("believable",) * 40,
        rng.normal(size=40),
        0.3,
        "believable",
        {"y": Surprise(0.4, 0.6)},
    )
    return found._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"ranks": {"x": np.arange(80).reshape(40, 2) % 12}}, "to one side"),
        ({"ranks": {"x": np.arange(80).reshape(40, 2) % 6 + 7}}, "draws are too wide"),
        ({"ranks": {"x": np.arange(80).reshape(2, 40).T % 2 * 19}}, "too narrow"),
        ({"pareto_k": np.full(40, 0.8)}, "Pareto k of 0.80"),
        ({"spread": np.full(40, 0.6)}, "between chains"),
        ({"verdicts": ("collapsed",) * 5 + ("believable",) * 35}, "on 5 of 40 simulated"),
        ({"verdict": "collapsed"}, "on the data"),
        ({"log_evidence": -6.0}, "below"),
        ({"log_evidence": 6.0}, "above"),
        ({"surprise": {"y": Surprise(0.003, 0.997)}}, "it is too wide"),
        ({"surprise": {"y": Surprise(0.997, 0.003)}}, "it is too narrow, or"),
    ],
)
def test_flags(changes, word):
    assert flags_of(sound()) == ()
    (flag,) = flags_of(sound(**changes))
    assert word in flag


def test_surprise_at_both_sides():
    """Two normal numbers of other scales: r² is chi-squared with two degrees of freedom, P(r² < 2 · .01²) = 1e-4."""
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 50.0])
    simulated = 3 + scale * rng.normal(size=(1000, 2))
    inside, near, far = (surprise(3 + scale * z, simulated) for z in (1.0, 0.01, 4.0))
    assert abs(inside.nearer - (1 - np.exp(-1.0))) < 0.06 and abs(inside.nearer + inside.farther - 1) < 1e-9
    assert conflicts({"y": inside}) == []
    assert "nearer" in conflicts({"y": near})[0] and "farther" in conflicts({"y": far})[0]
    again = [surprise(3 + scale * rng.normal(size=2), simulated) for _ in range(2000)]
    assert np.mean([bool(conflicts({"y": found})) for found in again]) < LEVEL + 4 * np.sqrt(LEVEL / 2000)
    few = surprise(np.array([1.0]), rng.integers(0, 2, size=(1000, 1)))  # ties are no surprise
    assert conflicts({"y": few}) == []


@pytest.mark.slow
def test_a_right_model_and_a_prior_in_conflict():
    fine = ppd.trust(KEY, model, arguments(1), **SETTINGS)
    assert fine.ok, fine.summary()
    assert fine.ranks["x"].shape == (40, 2) and 0.75 < fine.coverage["x"] <= 1.0
    assert "nothing speaks against" in fine.summary()
    truth = dist.Normal(0.0, jnp.hypot(1.0, arguments(1)[3])).log_prob(arguments(1)[0]).sum()
    assert abs(fine.log_evidence - truth) < 1e-3  # the twist is exact
    with compilations() as programs:
        far = ppd.trust(KEY, model, arguments(1, mean=8.0), **SETTINGS)
    assert programs and not programs["_run_all"]  # it was compiled for the first
    assert not far.ok and "conflict" in far.flags[0] and "FLAG" in far.summary()


def exact_problem(rng, rows, mean=0.0, scale=1.0):
    """What a right SMC finds of rows of N(0, I) in the plane, seen with noise, by a prior N(mean, scale² I)."""
    noise, size = np.exp(rng.uniform(-2, 0.5)), 2 * rows
    y = rng.normal(size=size) + noise * rng.normal(size=size)
    sd = np.hypot(scale, noise)
    simulated = mean + sd * rng.normal(size=(1000, size))
    evidences = norm.logpdf(np.concatenate([y[None], simulated[:40]]), mean, sd).sum(-1)
    return sound(
        ranks={"x": rng.integers(0, 20, size=(40, min(size, 8)))},
        simulated=evidences[1:],
        log_evidence=float(evidences[0]),
        surprise={"y": surprise(y, simulated)},
    )


@pytest.mark.parametrize(
    ("rows", "changes", "least", "most"),
    [(1, {}, 0.0, 0.05), (1, {"scale": 20.0}, 0.45, 1.0), (20, {"scale": 3.0}, 0.9, 1.0), (1, {"mean": 6.0}, 0.9, 1.0)],
)
def test_rates_of_flags(rows, changes, least, most):
    """Of 200 exact problems; more of each kind, and other kinds, were measured once: docs/posteriors.md."""
    rng = np.random.default_rng(1)
    flagged = np.mean([bool(flags_of(exact_problem(rng, rows, **changes))) for _ in range(200)])
    assert least <= flagged <= most


def test_what_cannot_be_simulated():
    def factor(y):
        numpyro.factor("r", -((numpyro.sample("x", PRIOR) - y) ** 2).sum())

    with pytest.raises(ValueError, match=r"site 'r' is a numpyro.factor"):
        ppd.trust(KEY, factor, (1.0,))
    with pytest.raises(ValueError, match="num_simulations must be at least 20"):
        ppd.trust(KEY, model, arguments(0), num_simulations=3)
    with pytest.raises(TypeError, match="rng_key must be a JAX random key"):
        ppd.trust(0, model, arguments(0))
