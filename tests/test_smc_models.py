"""Models that SMC could take for others: coupled plates, moved latents, masks of rows, data that change unseen.

Each against a closed form; standard normal x throughout, so that the twist is exact where r is normal.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive
from scipy.stats import multivariate_normal, norm

import pp_diffusion as ppd
from pp_diffusion import smc as smc_module
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.smc import Sampler
from pp_diffusion.twists import Moment, as_twist
from tests.compilations import compilations
from tests.exact.oracles import Z, z_score

KEY = jax.random.key(0)


def zeros(x_t, t):
    return 0 * x_t, 0 * x_t


def standard_normal(event_shape=(), num_steps=6):
    """The exact reverse process of N(0, 1)."""
    schedule = ppd.FixedSchedule.constant_erasure(num_steps)
    return ppd.Diffusion(ppd.GaussianKernel(event_shape), schedule, zeros).prior({})


def coin_flips(event_shape, prob=0.3):
    """Independent bits, exactly."""
    kernel, schedule = ppd.BinomialKernel(event_shape, probs=prob), ppd.FixedSchedule.constant_erasure(5)
    return ppd.Diffusion(
        kernel, schedule, lambda x_t, t: 0 * x_t + prob, parameterization="direct", last_step="network"
    ).prior({})


SCALAR, PAIR, TRIPLE, BITS = standard_normal(), standard_normal((2,)), standard_normal((3,)), coin_flips((2,))


def run(model, *args, num_particles=500, num_chains=1, **settings):
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=num_chains, progress_bar=False, **settings)
    smc.run(KEY, *args)
    return smc


def check_evidence(smc, truth):
    """exp(log Z - truth) has mean 1 over chains, within its error."""
    ratios = np.exp(np.asarray(smc.to_arviz()["sample_stats"]["log_evidence"], np.float64) - truth)
    assert abs(z_score(ratios, 1.0)) < Z


@pytest.mark.slow
def test_deterministic_sites():
    """Of x, of a latent, of both and of neither; not those of what is left to Predictive, or of chance."""

    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.deterministic("variance", scale**2)
        numpyro.deterministic("one", 1.0)
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", PAIR)
            numpyro.deterministic("sum", x.sum(-1))
            numpyro.deterministic("scaled", scale * x)
            later = numpyro.sample("later", dist.Normal(x[..., 0], 1.0))
            numpyro.deterministic("of later", 2 * later)
            numpyro.sample("y", dist.Normal(x, 0.5 + scale).to_event(1), obs=y)
        numpyro.deterministic("of chance", jax.random.normal(numpyro.prng_key()))

    smc = run(model, jnp.ones((2, 2)), num_particles=50, num_chains=2, num_moves=0, twist="constant", plain_share=0.0)
    for chains, shape in ((False, (100,)), (True, (2, 50))):
        draws = smc.get_samples(group_by_chain=chains)
        assert set(draws) == {"x", "scale", "variance", "one", "sum", "scaled"}
        assert draws["scaled"].shape == (*shape, 2, 2) and draws["one"].shape == shape
        np.testing.assert_allclose(draws["variance"], draws["scale"] ** 2, rtol=1e-6)
        np.testing.assert_allclose(draws["sum"], draws["x"].sum(-1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(draws["scaled"], draws["scale"][..., None, None] * draws["x"], rtol=1e-6)
    assert smc.to_arviz()["posterior"]["sum"].shape == (2, 50, 2)
    again = Predictive(model, smc.get_samples())(KEY, None)
    assert again["of later"].shape == (100, 2)


# --- plates whose elements are not independent -----------------------------------------------------------------------


@pytest.mark.slow
def test_neighbours_couple_a_plate():
    """y_n ~ N(x_n - x_{n+1}, 1/2): no element can be inferred alone, the first one by anything but y_1 though."""
    y, matrix = np.array([1.0, -2.0, 1.5]), np.eye(3) - np.eye(3, k=1)

    def model(y):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", SCALAR)
            numpyro.sample("y", dist.Normal(x - jnp.append(x[1:], 0.0), 0.5), obs=y)

    smc = run(model, jnp.asarray(y), num_chains=8)
    covariance = matrix @ matrix.T + 0.25 * np.eye(3)
    assert smc.log_evidence == pytest.approx(multivariate_normal(np.zeros(3), covariance).logpdf(y), abs=1e-3)
    np.testing.assert_allclose(smc.get_samples()["x"].mean(0), matrix.T @ np.linalg.solve(covariance, y), atol=0.05)


@pytest.mark.slow
def test_latents_couple_a_plate():
    """Each element's observation has the latent of the other."""

    def model(y):
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", SCALAR)
            b = numpyro.sample("b", dist.Normal(0.0, jnp.array([2.0, 0.1])))
            numpyro.sample("y", dist.Normal(x + b[::-1], 0.5), obs=y)

    smc = run(model, jnp.array([2.0, 2.0]), num_chains=8, num_particles=1000)
    variance = np.array([1.26, 5.25])
    check_evidence(smc, norm(0, np.sqrt(variance)).logpdf(2.0).sum())
    samples = smc.get_samples()
    np.testing.assert_allclose(samples["x"].mean(0), 2 / variance, atol=0.1)  # by one system each: 1.59, 1.59
    np.testing.assert_allclose(samples["b"].mean(0), [8 / 5.25, 0.02 / 1.26], atol=0.15)


@pytest.mark.parametrize(
    "link",
    [
        lambda x: x[::-1],
        lambda x: x * x[::-1],
        lambda x: jnp.maximum(x, x[::-1]),
        lambda x: jnp.stack([x[1], x[1]]),
    ],
)
@pytest.mark.parametrize("prob", [0.02, 0.5])
def test_bits_couple_a_plate(link, prob):
    """Also where the base rate lets it seldom be seen."""
    prior = coin_flips((), prob)

    def model(y):
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(link(x), 0.5), obs=y)

    assert read_model(model, (jnp.ones(2),), {}).systems == ()


@pytest.mark.slow
def test_rare_latents_and_far_states_couple_a_plate():
    def rare(y):
        with numpyro.plate("n", 2):
            x, k = numpyro.sample("x", SCALAR), numpyro.sample("k", dist.Bernoulli(0.01))
            numpyro.sample("y", dist.Normal(x + k[::-1], 0.5), obs=y)

    def far(y):
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", SCALAR)
            numpyro.sample("y", dist.Normal(x + (x[::-1] > 2.5), 0.5), obs=y)

    for model in (rare, far):
        assert read_model(model, (jnp.ones(2),), {}).systems == ()


@pytest.mark.slow
def test_an_exact_observation_of_another_element():
    def model(y):
        with numpyro.plate("n", 2):
            x = numpyro.sample("x", PAIR)
            numpyro.sample("y", dist.Delta(x[::-1, :1], event_dim=1), obs=y)

    smc = run(model, jnp.array([[1.0], [-2.0]]), num_particles=50)
    x = np.asarray(smc.get_samples()["x"])
    np.testing.assert_array_equal(x[..., 0], np.broadcast_to([-2.0, 1.0], (50, 2)))
    assert smc.log_evidence == pytest.approx(norm.logpdf([1.0, -2.0]).sum(), abs=1e-4)


@pytest.mark.parametrize("num", [2, 5])
def test_independent_elements_stay_systems(num):
    def model(y):
        with numpyro.plate("n", num):
            x = numpyro.sample("x", SCALAR)
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(x + b, 1.0), obs=y)

    assert read_model(model, (jnp.zeros(num),), {}).systems == (num,)


# --- masks and exact observations ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind, num_known", [("handler", 3), ("obs_mask", 2)])
def test_rows_masked_of_exact_observations(kind, num_known):
    """The mask is of rows; with three rows of three numbers it could be taken for one of columns."""
    y, mask = 0.3 * jnp.array([[1.0, 2, 3], [4, 5, 6], [-1, -2, -3]]), jnp.array([True, False, False])

    def model(y):
        with numpyro.plate("n", 3):
            x = numpyro.sample("x", TRIPLE)
            seen = dist.Delta(x[..., :num_known], event_dim=1)
            if kind == "obs_mask":
                numpyro.sample("y", seen, obs=y, obs_mask=mask)
            else:
                with handlers.mask(mask=mask):
                    numpyro.sample("y", seen, obs=y)

    smc = run(model, y[:, :num_known], num_particles=200)
    exact = [norm.logpdf(np.asarray(y[0, :num_known])).sum(), 0.0, 0.0]
    np.testing.assert_allclose(smc.log_evidence, exact, atol=1e-4)
    x = np.asarray(smc.get_samples()["x"])
    np.testing.assert_allclose(x[:, 0, :num_known], np.broadcast_to(y[0, :num_known], (200, num_known)), rtol=1e-5)
    assert x[:, 1:].std(0).min() > 0.7


# --- other latents ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("twist", ["moment", "lookahead"])
def test_moves_where_r_is_zero_at_predictions(twist):
    """x + b > 1.5, or r is zero; what stands in for it must not depend on where a latent was before. With
    ``exp(x + b)`` beyond, log Z and the mean of x + b are a truncated normal's."""
    prior = standard_normal(num_steps=20)

    def model(least):
        x, b = numpyro.sample("x", prior), numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.factor("r", jnp.where(x + b > least, x + b, -jnp.inf))

    smc = run(model, jnp.array(1.5), num_particles=1000, num_chains=40, twist=twist, ess_threshold=1.0)
    beyond = norm(2, math.sqrt(2))
    check_evidence(smc, 1 + beyond.logsf(1.5))
    samples = smc.get_samples(group_by_chain=True)
    means = np.asarray(samples["x"] + samples["b"], np.float64).mean(1)
    hazard = beyond.pdf(1.5) / beyond.sf(1.5)
    assert abs(z_score(means, 2 + 2 * hazard)) < Z
    assert (np.asarray(smc.to_arviz()["sample_stats"]["ess"]) < 1000).any()


@pytest.mark.slow
def test_a_latent_that_says_which_bit_is_seen():
    """x[k] = 1 for a fair k: all eight states, by enumeration."""

    def model(y):
        x, k = numpyro.sample("x", BITS), numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Delta(x[k]), obs=y)

    smc = run(model, jnp.array(1.0), num_chains=40)
    check_evidence(smc, math.log(0.3))
    samples = smc.get_samples()
    x, k = np.asarray(samples["x"]), np.asarray(samples["k"])
    for word in itertools.product((0, 1), repeat=3):
        bits, which = word[:2], word[2]
        exact = 0.5 * np.prod([0.3 if bit else 0.7 for bit in bits]) * (bits[which] == 1) / 0.3
        share = ((x == bits).all(1) & (k == which)).mean()
        assert share == pytest.approx(exact, abs=0.03)  # sd .004 for independent draws
    assert smc.twist_rules == {"y": "averaged over all words"}


@pytest.mark.slow
def test_a_fixed_latent_stops_no_moves():
    """A Delta is no latent: it has nowhere to go, and moves of all at once would all be refused."""

    def model(y):
        x, b = numpyro.sample("x", SCALAR), numpyro.sample("b", dist.Normal(0.0, 1.0))
        c = numpyro.sample("c", dist.Delta(1.0))
        numpyro.sample("y", dist.Normal(x + c * b, 0.5), obs=y)

    smc = run(model, jnp.array(2.0), num_chains=8, ess_threshold=1.0)
    check_evidence(smc, norm(0, 1.5).logpdf(2.0))
    assert set(smc.get_samples()) == {"x", "b"}
    assert smc.infos.acceptance.max() > 0.2


@pytest.mark.slow
def test_one_move_is_one_of_each_kind():
    """Discrete and continuous latents are moved in turn."""

    def model(y):
        x, k = numpyro.sample("x", SCALAR), numpyro.sample("k", dist.Bernoulli(0.3))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + 2 * k + b, 0.5), obs=y)

    smc = run(model, jnp.array(3.0), num_chains=8, num_moves=1, ess_threshold=1.0)
    joint = np.array([0.7, 0.3]) * norm(np.array([0.0, 2.0]), 1.5).pdf(3.0)
    check_evidence(smc, np.log(joint.sum()))
    assert smc.get_samples()["k"].mean() == pytest.approx(joint[1] / joint.sum(), abs=0.05)
    assert len(np.unique(smc.get_samples()["b"])) > 1000  # of 4000: moved, not only copied


# --- what changes between runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_model_refers_to_may_change():
    """Globals and what is closed over are read anew by each run, by the same SMC or another; equal ones need no new
    program."""
    seen = {"y": 2.0, "matrix": jnp.ones(2)}

    def model():
        x = numpyro.sample("x", PAIR)
        numpyro.sample("y", dist.Normal(x @ seen["matrix"], 1.0), obs=seen["y"])

    smc = run(model)
    compiled = []
    for y, row in ((-1.0, [1.0, 1.0]), (-1.0, [2.0, 0.0]), (2.0, [1.0, 1.0])):
        seen |= {"y": y, "matrix": jnp.array(row)}
        truth = norm(0, math.sqrt(1 + sum(a * a for a in row))).logpdf(y)
        with compilations() as programs:
            smc.run(KEY)
        compiled.append(bool(programs))
        assert smc.log_evidence == pytest.approx(truth, abs=1e-3)
        with compilations() as programs:
            assert run(model).log_evidence == smc.log_evidence
        assert not programs
    assert compiled == [True, True, False]


@pytest.mark.parametrize("how", ["scale", "jit"])
@pytest.mark.slow
def test_what_is_deep_within_a_model_may_change(how):
    """The scale of a site, and what a function within the model has been compiled with."""
    seen = {"number": jnp.array([1.0])}

    def model():
        x, number = numpyro.sample("x", SCALAR), seen["number"]
        x = jax.jit(lambda v: v + number)(x[None])[0] if how == "jit" else x
        with handlers.scale(scale=1.0 if how == "jit" else number[0]):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=2.0)

    def truth(number):
        if how == "jit":
            return norm(0, math.sqrt(2)).logpdf(2.0 - number)
        rest = 0.5 * (1 - number) * math.log(2 * math.pi) - 0.5 * math.log(number)  # of N^s over N(.; variance 1/s)
        return norm(0, math.sqrt(1 + 1 / number)).logpdf(2.0) + rest

    for number in (1.0, 3.0):
        seen["number"] = jnp.array([number])
        assert run(model).log_evidence == pytest.approx(truth(number), abs=1e-3)


@pytest.mark.slow
def test_a_twist_may_refer_to_what_changes():
    goal = {"at": 0.0}

    def twist(prediction, log_r):
        return -0.5 * (prediction.x_0 - goal["at"]) ** 2

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", SCALAR), 1.0), obs=y)

    first = run(model, jnp.array(1.0), twist=twist)
    goal["at"] = 3.0
    second = run(model, jnp.array(1.0), twist=twist)
    assert first.ess.min() != second.ess.min()


def test_new_data_beside_what_a_program_has_to_know():
    """A boolean mask is an index, and makes programs of its own; counts, and Python's numbers, do not."""
    calls = []

    def model(y, known, rate):
        calls.append(known)
        x = numpyro.sample("x", PAIR)
        numpyro.sample("y", dist.Poisson(rate * jnp.exp(x[known])).to_event(1), obs=y[known])

    known = jnp.array([True, False])
    factors = [read_model(model, (jnp.array(y), known, rate), {}) for y, rate in (([1, 2], 1.0), ([3, 0], 2.5))]
    assert jax.tree.structure(factors[0]) == jax.tree.structure(factors[1])
    other = read_model(model, (jnp.array([1, 2]), ~known, 1.0), {})
    assert jax.tree.structure(other) != jax.tree.structure(factors[0])


@pytest.mark.slow
def test_floats_that_a_model_has_to_know():
    def model(y, which):
        x = numpyro.sample("x", SCALAR)
        numpyro.sample("y", dist.Normal(x, {0.5: 1.0, 0.1: 2.0}[which]), obs=y)

    for which, scale in ((0.5, 1.0), (0.1, 2.0)):
        assert run(model, 2.0, which).log_evidence == pytest.approx(norm(0, math.hypot(1, scale)).logpdf(2.0), abs=1e-3)


@pytest.mark.slow
def test_a_key_among_the_arguments():
    def model(key, y):
        shift = jax.random.normal(key)
        numpyro.sample("y", dist.Normal(numpyro.sample("x", SCALAR) + shift, 1.0), obs=y)

    exact = norm(float(jax.random.normal(jax.random.key(3))), math.sqrt(2)).logpdf(2.0)
    assert run(model, jax.random.key(3), 2.0).log_evidence == pytest.approx(exact, abs=1e-3)


@pytest.mark.slow
def test_a_covariate_with_missing_entries():
    """NumPyro makes a masked latent of what obs_mask leaves out; x, and what is missing, against the joint normal."""

    def model(w, known, y):
        x = numpyro.sample("x", SCALAR)
        with numpyro.plate("n", 2):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0), obs=w, obs_mask=known)
            numpyro.sample("y", dist.Normal(x + w, 0.5), obs=y)

    w, known, y = jnp.array([0.7, 0.0]), jnp.array([True, False]), jnp.array([1.0, 2.0])
    smc = run(model, w, known, y, num_particles=1000, num_chains=8, ess_threshold=1.0)
    covariance = np.array([[1.25, 1.0], [1.0, 2.25]])  # of y given the w that is known
    truth = multivariate_normal([0.7, 0.0], covariance).logpdf(y) + norm.logpdf(0.7)
    check_evidence(smc, truth)
    mean = np.linalg.solve(covariance, np.array([0.3, 2.0])).sum()
    assert smc.get_samples()["x"].mean() == pytest.approx(mean, abs=0.05)


def test_many_bits_know_their_owners():
    prior, order = coin_flips((300,)), np.random.default_rng(0).permutation(300)

    def model(y, order):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Bernoulli(0.1 + 0.8 * x[order]).to_event(1), obs=y)

    np.testing.assert_array_equal(read_model(model, (jnp.zeros(300), jnp.asarray(order)), {}).owner, order[None])


# --- many observations -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_more_observations_than_have_a_covariance(noise):
    """Independent ones, also exact or nearly so, cost no particles."""
    prior, y = standard_normal((70,), 10), jnp.linspace(-2, 2, 66)

    def model(y):
        x = numpyro.sample("x", prior)[:66]
        seen = dist.Normal(x, noise).to_event(1) if noise else dist.Delta(x, event_dim=1)
        numpyro.sample("y", seen, obs=y)

    smc = run(model, y, num_particles=100, num_chains=8)
    assert smc.log_evidence == pytest.approx(norm(0, math.sqrt(1 + noise**2)).logpdf(y).sum(), abs=0.01)
    assert smc.ess.min() > 95
    x = np.asarray(smc.get_samples()["x"], np.float64)
    np.testing.assert_allclose(x[:, :66].mean(0), y / (1 + noise**2), atol=0.2)
    assert x[:, 66:].std() == pytest.approx(1, abs=0.1)
    assert "66 numbers by conjugate gradients" in smc.twist_rules["y"]


@pytest.mark.slow
def test_many_observations_of_all_coordinates():
    """Of a random matrix: by conjugate gradients, beside the whole covariance."""
    matrix, prior = np.random.default_rng(0).standard_normal((12, 16)) / 4, standard_normal((16,), 20)
    y = matrix @ np.random.default_rng(1).standard_normal(16)

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(jnp.asarray(matrix, float) @ x, 0.5).to_event(1), obs=y)

    truth = multivariate_normal(np.zeros(12), matrix @ matrix.T + 0.25 * np.eye(12)).logpdf(y)
    for most_rows, least in ((64, 299), (0, 60)):
        smc = run(model, jnp.asarray(y, float), num_particles=300, num_chains=20, twist=Moment(most_rows))
        check_evidence(smc, truth)
        assert smc.ess.min() > least
    with pytest.raises(ValueError, match="most_rows must be an integer >= 0; got -1"):
        Moment(-1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["collinear", "repeated", "correlated noise"])
def test_many_observations_of_few_coordinates(kind):
    """A regression of 100 numbers, whose x has two: told by two numbers, which is exact for it."""
    rng = np.random.default_rng(0)
    matrix = (
        np.stack([np.ones(100), 3 + 0.3 * rng.standard_normal(100)], 1) if kind != "repeated" else np.ones((100, 2))
    )
    noise = np.eye(100) if kind != "correlated noise" else 0.1 * np.eye(100) + 0.9
    y = matrix @ np.array([0.3, -0.4]) + np.linalg.cholesky(noise) @ rng.standard_normal(100)
    root = jnp.asarray(np.linalg.cholesky(noise), float)

    def model(y):
        mean = jnp.asarray(matrix, float) @ numpyro.sample("x", PAIR)
        if kind == "correlated noise":
            numpyro.sample("y", dist.MultivariateNormal(mean, scale_tril=root), obs=y)
        else:
            numpyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    smc = run(model, jnp.asarray(y, float), num_particles=100, num_chains=8)
    assert smc.log_evidence == pytest.approx(
        multivariate_normal(np.zeros(100), matrix @ matrix.T + noise).logpdf(y), abs=0.02
    )
    assert smc.ess.min() > 95
    assert smc.twist_rules == {"y": "linearised, normal; 100 numbers by 2 that say the same"}


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pp_diffusion.CollapseWarning")
def test_chains_without_any_likelihood_are_named(capsys):
    """Three of eight: their draws are none, and the evidence counts them as zero; its error is unknown."""

    def model(least):
        numpyro.factor("r", jnp.where(numpyro.sample("x", SCALAR) > least, 0.0, -jnp.inf))

    smc = ppd.SMC(model, num_particles=64, num_chains=8, twist="lookahead", progress_bar=False)
    for seed in range(20):
        smc.run(jax.random.key(seed), jnp.array(2.2))
        if dead := np.flatnonzero(np.isneginf(smc.log_evidences)).tolist():
            break
    smc.print_summary()
    text = capsys.readouterr().out
    assert "COLLAPSED" in text and f"zero at all particles of the chains {dead}" in text
    with pytest.raises(RuntimeError, match="have no draws"):
        smc.get_samples(group_by_chain=True)
    assert (np.asarray(smc.get_samples()["x"]) > 2.2).all()
    assert np.isfinite(smc.log_evidence) and np.isnan(smc.log_evidence_error)


@pytest.mark.slow
@pytest.mark.parametrize("event_shape", [(), (2, 2)])
def test_twists_of_ones_own_over_bits(event_shape):
    prior = coin_flips(event_shape)

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior).sum(), 1.0), obs=y)

    def twist(prediction, log_r):
        return -0.5 * (1.0 - prediction.x_0.reshape(*prediction.x_t.shape[:2], -1).sum(-1)) ** 2

    smc = run(model, jnp.array(1.0), num_chains=20, twist=twist)
    counts = np.arange(math.prod(event_shape) + 1)
    shares = [math.comb(counts[-1], n) * 0.3**n * 0.7 ** (counts[-1] - n) for n in counts]
    check_evidence(smc, np.log(shares @ norm(counts, 1).pdf(1.0)))


@pytest.mark.slow
def test_memory_is_that_of_one_step():
    """Working memory of a compiled run, at T = 10 and T = 200."""

    def model(prior, y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0).to_event(1), obs=y)

    sizes = []
    for num_steps in (10, 200):
        factors = read_model(model, (standard_normal((4,), num_steps), jnp.ones(4)), {})
        sampler = Sampler(factors, as_twist("annealed"))
        state = jax.eval_shape(lambda key, s=sampler: smc_module.init(key, s, 1000), KEY)
        steps = jax.jit(
            lambda s, n, sampler=sampler: jax.lax.fori_loop(0, n, lambda _, s: smc_module.step(sampler, s)[0], s)
        )
        compiled = steps.lower(state, 3).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 1.05 * sizes[0]
