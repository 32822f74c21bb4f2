"""The paper's composition of a prior with r(x): what it converges to, by exact recursions and by enumeration."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions.transforms import AffineTransform, ExpTransform
from numpyro.infer import Predictive

import pp_diffusion as ppd
from tests.exact.oracles import BinaryChain, Chain, GaussianData, Table, Z, constant_erasure, word_probs, words, z_score

POWERS = {"constant": lambda t, T: 1.0, "annealed": lambda t, T: (T - t) / T}


def log_r(x):
    """N(2; x, 1), with its constant, which is to have no effect."""
    return dist.Normal(x, 1.0).log_prob(2.0).sum(-1)


def exact_prior(num_steps, variance=1.0, transform=None):
    """The exact reverse process of N(0, variance)."""
    chain = Chain(constant_erasure(num_steps))
    reverse = GaussianData(np.zeros(1), np.full(1, np.sqrt(variance))).exact_reverse(chain)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((1,)),
        ppd.FixedSchedule.constant_erasure(num_steps),
        reverse.network(),
        parameterization="direct",
        last_step="network",
        transform=transform,
    )
    return diffusion.prior({}), reverse


def recursion(reverse, power, gradient=lambda x: 2.0 - x, curvature=-1.0):
    """Mean and variance of x_0 by eq. 61, for log r whose gradient is linear: x -> gradient(0) + curvature x."""
    steps = list(zip(*(a[:, 0] for a in reverse), strict=True))
    num_steps, mean, variance = len(steps), 0.0, 0.0
    for t in range(num_steps, -1, -1):
        slope, offset, step = steps[t] if t < num_steps else (-1.0, 0.0, 1.0)  # x_T from nothing
        factor = 1 + step * power(t, num_steps) * curvature
        gain = factor * (1 + slope)
        mean = gain * mean + factor * offset + step * power(t, num_steps) * gradient(0.0)
        variance = gain**2 * variance + step
    return mean, variance


# --- what it converges to ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variance", "power", "at_100", "limit"),
    [
        (1.0, "constant", (1.343, 0.338), (1.333, 0.333)),  # p·r², because p = pi
        (1.0, "annealed", (0.932, 0.435), (0.924, 0.432)),
        (0.25, "constant", (0.697, 0.148), (0.694, 0.145)),
        (0.25, "annealed", (0.527, 0.161), (0.525, 0.158)),
    ],
)
def test_figures_of_the_conjugate_case(variance, power, at_100, limit):
    """The posteriors are N(1, 0.5) and N(0.4, 0.2): it converges, and not to them."""
    prior, reverse = exact_prior(100, variance)
    exact = recursion(reverse, POWERS[power])
    np.testing.assert_allclose(exact, at_100, atol=6e-4)
    np.testing.assert_allclose(recursion(exact_prior(4000, variance)[1], POWERS[power]), limit, atol=1.1e-3)
    x = np.asarray(ppd.perturb(prior, log_r, power=power).sample(jax.random.key(0), (100_000,)), np.float64)[:, 0]
    # standard errors are about 0.002 in both
    assert abs(z_score(x, exact[0])) < Z
    assert abs(z_score((x - exact[0]) ** 2, exact[1])) < Z
    posterior = 2 * variance / (1 + variance), variance / (1 + variance)
    assert abs(x.mean() - posterior[0]) > 0.05 and abs(x.var() - posterior[1]) > 0.03


def test_a_power_of_ones_own():
    """Times are told apart, both ends are there, and 0 leaves the prior."""
    prior, reverse = exact_prior(5)

    def power(t, num_timesteps):
        assert num_timesteps == 5 and 0 <= t <= 5
        return [0.9, 0.2, 0.0, 0.5, 0.1, 0.7][t]

    x = np.asarray(ppd.perturb(prior, log_r, power=power).sample(jax.random.key(1), (100_000,)), np.float64)[:, 0]
    mean, variance = recursion(reverse, power)
    assert abs(z_score(x, mean)) < Z and abs(z_score((x - mean) ** 2, variance)) < Z
    other = recursion(reverse, lambda t, num: power(num - t, num))
    assert abs(other[0] - mean) > 0.05  # a standard error is 0.003
    unchanged = ppd.perturb(prior, log_r, power=lambda t, T: 0).sample(jax.random.key(2), (50_000,))
    assert abs(z_score(unchanged, 0.0)) < Z


def test_the_end_is_perturbed():
    """Where x_T is not forgotten: T = 1 with beta_1 < 1."""
    prior = ppd.Diffusion(ppd.GaussianKernel((1,)), ppd.FixedSchedule([0.19]), lambda x_t, t: (x_t, x_t)).prior({})
    x = np.asarray(ppd.perturb(prior, log_r, power="constant").sample(jax.random.key(0), (50_000,)), np.float64)
    mean, variance = 0.9 * 2.0, 0.81  # x_1 ~ N(2, 1), and the last step is the kernel's
    mean, variance = mean + 0.19 * (2.0 - mean), (1 - 0.19) ** 2 * variance + 0.19
    assert abs(z_score(x, mean)) < Z and abs(z_score((x - mean) ** 2, variance)) < Z


def test_log_r_is_in_data_units():
    """x = 3 + 2z: the gradient by z is twice that by x; and exp, where no affine map would do."""
    prior, reverse = exact_prior(20, transform=AffineTransform(3.0, 2.0))
    x = ppd.perturb(prior, log_r, power="annealed").sample(jax.random.key(0), (50_000,))
    mean, variance = recursion(reverse, POWERS["annealed"], lambda z: 2 * (2 - (3 + 2 * z)), -4.0)
    x = np.asarray(x, np.float64)
    assert abs(z_score(x, 3 + 2 * mean)) < Z and abs(z_score((x - 3 - 2 * mean) ** 2, 4 * variance)) < Z
    prior, reverse = exact_prior(20, transform=ExpTransform())
    x = ppd.perturb(prior, lambda x: log_r(jnp.log(x)), power="annealed").sample(jax.random.key(0), (50_000,))
    mean, _ = recursion(reverse, POWERS["annealed"])
    assert abs(z_score(np.log(np.asarray(x, np.float64)), mean)) < Z


# --- bits ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)
BINARY = BinaryChain(np.array([0.3, 0.6, 0.5]), np.array([0.1, 0.4, 0.5]), RNG.uniform(0.1, 0.9, (3, 8, 3)), "network")
TABLE = RNG.normal(size=8) * 1.5  # log r of each word, with all interactions


def binary_prior():
    diffusion = ppd.Diffusion(
        ppd.BinomialKernel((3,), probs=BINARY.base),
        ppd.FixedSchedule(BINARY.beta),
        Table(),
        parameterization="direct",
        last_step="network",
    )
    return diffusion.prior({diffusion.network_site: {"table": jnp.asarray(BINARY.table)}})


def table_log_r(table, x):
    return jnp.asarray(table, float)[(x.astype(int) * jnp.array([4, 2, 1])).sum(-1)]


def perturbed_step(probs, log_r_of_words):
    """The table's form by enumeration: draw a word, then each bit on with cd / (cd + (1-c)(1-d)); (…, 3) -> (…, 8)."""
    every = words(3)
    out = np.zeros((*probs.shape[:-1], 8))
    for word, weight in zip(every, np.moveaxis(word_probs(probs), -1, 0), strict=True):
        new = np.zeros_like(probs)
        for i in range(3):
            on, off = (
                np.exp(log_r_of_words[int("".join(str(int(b)) for b in _with(word, i, bit)), 2)]) for bit in (1, 0)
            )
            c, d = probs[..., i], on / (on + off) if on + off else 0.5
            new[..., i] = c * d / (c * d + (1 - c) * (1 - d))
        out += weight[..., None] * word_probs(new)
    return out


def _with(word, i, bit):
    return np.where(np.arange(3) == i, bit, word)


@pytest.mark.slow
@pytest.mark.parametrize("power", POWERS)
def test_bits_by_enumeration(power):
    exact = perturbed_step(BINARY.base, POWERS[power](3, 3) * TABLE)
    for t in (3, 2, 1):
        exact = exact @ perturbed_step(BINARY.table[t - 1], POWERS[power](t - 1, 3) * TABLE)
    assert abs(exact.sum() - 1) < 1e-12
    x = ppd.perturb(binary_prior(), partial(table_log_r, TABLE), power=power).sample(jax.random.key(0), (200_000,))
    counts = np.bincount((np.asarray(x) @ [4, 2, 1]).astype(int), minlength=8)
    chi_squared = ((counts - 200_000 * exact) ** 2 / (200_000 * exact)).sum()
    assert chi_squared < 35  # 7 degrees of freedom: 1.1e-5
    wrong = BINARY.probs * np.exp(TABLE)
    assert np.abs(exact - wrong / wrong.sum()).max() > 0.02  # not p·r


def test_one_step_is_exact_for_factors_of_bits():
    """Where r is a product over bits, the table's form is the normalised product f_b r."""
    kernel, effects = ppd.BinomialKernel((3,)), jnp.array([1.0, -2.0, 0.5])
    step = kernel.bernoulli(jnp.array([[0.3, -1.0, 2.0], [0.0, 0.1, -0.4]]))
    perturbed = kernel.perturb(jax.random.key(0), step, lambda x: x @ effects)
    np.testing.assert_allclose(perturbed.base_dist.logits, step.base_dist.logits + effects, rtol=1e-5)


def test_impossible_words():
    """r may be 0: words that it excludes by one bit do not come up, and nor does a NaN."""
    allowed = np.where(words(3)[:, 1] == 1, TABLE, -np.inf)
    for power in POWERS:
        x = ppd.perturb(binary_prior(), partial(table_log_r, allowed), power=power).sample(jax.random.key(0), (2000,))
        assert (np.asarray(x)[:, 1] == 1).all() and set(np.unique(x)) == {0, 1}


def test_log_r_is_called_on_bits_only():
    seen = []

    def log_r_of_bits(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x.sum(-1)

    ppd.perturb(binary_prior(), log_r_of_bits, power="constant").sample(jax.random.key(0), (50,)).block_until_ready()
    jax.effects_barrier()
    assert set(np.unique(np.concatenate([a.reshape(-1) for a in seen]))) == {0, 1}


def test_many_bits_in_pieces():
    """More bits than are flipped at once; a two-dimensional event."""
    kernel = ppd.BinomialKernel((10, 7))
    effects = jnp.linspace(-2.0, 2.0, 70).reshape(10, 7)
    step = kernel.bernoulli(jnp.zeros((3, 10, 7)))
    perturbed = jax.jit(lambda key: kernel.perturb(key, step, lambda x: (x * effects).sum((-2, -1))).mean)
    expected = np.broadcast_to(jax.nn.sigmoid(effects), (3, 10, 7))
    np.testing.assert_allclose(perturbed(jax.random.key(0)), expected, atol=2e-6)


# --- the distribution contract -------------------------------------------------------------------------------------


def perturbed_normal(num_steps=3, event_shape=(2,), **kwargs):
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel(event_shape), ppd.FixedSchedule.constant_erasure(num_steps), lambda x, t: (0 * x, 0 * x)
    )
    return ppd.perturb(diffusion.prior({}), log_r, **{"power": "annealed", **kwargs})


def test_shapes_and_expand():
    law = perturbed_normal()
    assert (law.batch_shape, law.event_shape) == ((), (2,)) and law.support == law.prior.support
    for sample_shape in ((), (4,), (2, 1)):
        for d, shape in ((law, ()), (law.expand((5,)), (5,))):
            x = jax.eval_shape(lambda key, d=d, s=sample_shape: d.sample(key, s), jax.random.key(0))
            assert x.shape == sample_shape + shape + (2,)
    assert law.expand((5, 3)).to_event(1).event_shape == (3, 2)
    assert binary_prior().has_rsample is ppd.perturb(binary_prior(), log_r, power="constant").has_rsample is False


@pytest.mark.slow
def test_jit_vmap_and_pytree():
    law, keys = perturbed_normal(), jax.random.split(jax.random.key(0), 3)
    leaves, structure = jax.tree.flatten(law)
    again = jax.tree.unflatten(structure, leaves)
    hash(structure)
    expected = law.sample(keys[1])
    np.testing.assert_array_equal(again.sample(keys[1]), expected)
    many = jax.jit(jax.vmap(lambda d, key: d.sample(key), (None, 0)))(law, keys)
    np.testing.assert_allclose(many[1], expected, rtol=1e-5)
    centres = jnp.array([0.0, 4.0])  # log r that closes over a traced value
    shifted = jax.jit(
        jax.vmap(lambda c: ppd.perturb(law.prior, lambda x: -((x - c) ** 2).sum(-1), power="constant").sample(keys[0]))
    )(centres)
    assert (shifted[1] > shifted[0]).all()
    partial_log_r = jax.tree_util.Partial(lambda c, x: -((x - c) ** 2).sum(-1), jnp.array(4.0))
    assert any(leaf is partial_log_r.args[0] for leaf in jax.tree.leaves(perturbed_of(law.prior, partial_log_r)))
    np.testing.assert_allclose(perturbed_of(law.prior, partial_log_r).sample(keys[0]), shifted[1], rtol=1e-5)


def perturbed_of(prior, log_r):
    return ppd.perturb(prior, log_r, power="constant")


def test_a_function_of_one_x_by_vmap():
    law = perturbed_normal()
    one = ppd.perturb(law.prior, jax.vmap(lambda x: log_r(x)), power="annealed")
    np.testing.assert_allclose(one.sample(jax.random.key(0), (2, 3)), law.sample(jax.random.key(0), (2, 3)), rtol=1e-5)


def test_in_a_program_with_plates():
    def model():
        with numpyro.plate("rows", 3):
            return numpyro.sample("x", perturbed_normal())

    assert Predictive(model, num_samples=4, parallel=True)(jax.random.key(0))["x"].shape == (4, 3, 2)
    assert handlers.seed(model, 0)().shape == (3, 2)


def test_context():
    def network(x_t, t, context):
        return 0 * x_t + context, 0 * x_t

    diffusion = ppd.Diffusion(ppd.GaussianKernel((1,)), ppd.FixedSchedule.constant_erasure(3), network)
    law = ppd.perturb(diffusion.prior({}, context=jnp.zeros((4, 1))), log_r, power="constant")
    assert law.batch_shape == (4,) and law.sample(jax.random.key(0), (2,)).shape == (2, 4, 1)


def test_log_prob_names_smc():
    for law in (perturbed_normal(), perturbed_normal().expand((3,))):
        with pytest.raises(NotImplementedError, match="SMC"):
            law.log_prob(jnp.zeros((3, 2)))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"prior": dist.Normal(0, 1)}, TypeError, "prior must be a DiffusionPrior.*got Normal"),
        ({"prior": perturbed_normal().prior.expand((3,))}, TypeError, "expand the result.*got ExpandedDistribution"),
        ({"log_r": 1.0}, TypeError, "log_r must be a function of x; got float"),
        ({"log_r": lambda x: x}, ValueError, r"log_r must return shape \(N,\).*\(N, 2\).*returned \(3, 2\)"),
        ({"log_r": lambda x: x.sum()}, ValueError, r"log_r must return shape \(N,\).*returned \(\)"),
        ({"log_r": lambda x: x.sum(0)}, ValueError, r"log_r must return shape \(N,\).*returned \(2,\)"),
        ({"log_r": lambda x: None}, ValueError, "log_r must return.*returned NoneType"),
        ({"power": "linear"}, ValueError, "power must be 'annealed', 'constant' or a function.*'linear'"),
        ({"power": 0.5}, TypeError, "power must be.*got 0.5"),
        ({"power": lambda t, T: np.inf}, ValueError, "power must return a finite number"),
        ({"power": lambda t, T: [1.0, 2.0]}, ValueError, "power must return a finite number"),
    ],
)
def test_refused_by_name(arguments, error, match):
    arguments = {"prior": perturbed_normal().prior, "log_r": log_r, "power": "annealed", **arguments}
    with pytest.raises(error, match=match):
        ppd.perturb(arguments.pop("prior"), arguments.pop("log_r"), **arguments)
