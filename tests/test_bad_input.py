"""Bad input: the error's type, the argument that it names, and that nothing large was compiled before it."""

import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import pp_diffusion as ppd
from pp_diffusion.networks import MLP

KEY = jax.random.key(0)
X = np.array([[0.5, -1.0], [1.4, 0.3], [0.1, 0.2], [-0.7, 1.5]])
BITS = np.array([[0, 1], [1, 1], [0, 0], [1, 0]])
GAUSS, BINOM = ppd.GaussianKernel((2,)), ppd.BinomialKernel((2,))
SCHEDULE, ERASING = ppd.FixedSchedule([0.1, 0.3, 0.6]), ppd.FixedSchedule.constant_erasure(3)


def two(x_t, t):
    return 0.1 * x_t, 0.0 * x_t


def one(x_t, t):
    return 0.1 * x_t


GAUSSIAN = ppd.Diffusion(GAUSS, SCHEDULE, two)
BINOMIAL = ppd.Diffusion(BINOM, SCHEDULE, one)
TRAINED = ppd.Diffusion(GAUSS, SCHEDULE, MLP((3,)))
LEARNED = ppd.Diffusion(GAUSS, ppd.LearnedSchedule(3, 0.01), MLP((3,)))
POSITIVE = ppd.Diffusion(GAUSS, SCHEDULE, two, transform=dist.transforms.ExpTransform())
LABELS = np.eye(3)[[0, 1, 2, 0]]


def with_nan(value=np.nan):
    x = X.copy()
    x[1, 0] = value
    return x


def fit(data, diffusion=TRAINED, **settings):
    return ppd.fit(KEY, diffusion, data, **{"num_steps": 1, "progress_bar": False, **settings})


def bound(x, diffusion=GAUSSIAN, **settings):
    return ppd.lower_bound(KEY, diffusion.prior({}), x, **settings)


def estimate(x, diffusion=GAUSSIAN, num_trajectories=10, **settings):
    return ppd.estimate_log_prob(KEY, diffusion.prior({}), x, num_trajectories, **settings)


def reverse_entropy(x, **settings):
    return ppd.reverse_entropy(KEY, GAUSSIAN.prior({}), x, **settings)


def entropy_bounds(data=None, diffusion=GAUSSIAN):
    return ppd.entropy_bounds(diffusion.prior({}), data)


def program(name, *args, diffusion=GAUSSIAN, **kwargs):
    with handlers.seed(rng_seed=0):
        return getattr(diffusion, name)(*args, **kwargs)


def diffusion(**changes):
    return ppd.Diffusion(**{"kernel": GAUSS, "schedule": SCHEDULE, "network": two, **changes})


def steered(importance, **changes):
    """A kernel with a step_importance of the user's."""

    class Steered(ppd.GaussianKernel):
        def step_importance(self, rates):
            return importance(rates)

    return diffusion(kernel=Steered((2,)), **changes)


class Bad(NamedTuple):
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    match: str


CASES = [
    # data
    Bad("fit NaN", lambda: fit(with_nan()), ValueError, r"data must be finite; 1 of 8 .* A bound with masked values"),
    Bad("fit infinite", lambda: fit(with_nan(np.inf)), ValueError, "data must be finite"),
    Bad("fit empty", lambda: fit(np.zeros((0, 2))), ValueError, "data must hold at least one datum"),
    Bad(
        "fit event shape",
        lambda: fit(np.ones((4, 3))),
        ValueError,
        r"data must have shape \(\*batch, 2\); got \(4, 3\)",
    ),
    Bad("fit one datum", lambda: fit(X[0]), ValueError, r"data must have shape \(N, 2\)"),
    Bad("fit too many axes", lambda: fit(X[None]), ValueError, r"data must have shape \(N, 2\)"),
    Bad("fit constant column", lambda: fit(X * [1, 0] + 3), ValueError, "data must vary .* column 1"),
    Bad("fit strings", lambda: fit(np.array([["a", "b"]])), TypeError, "data must hold numbers"),
    Bad("fit None", lambda: fit(None), TypeError, "data must be an array, an iterable of batches or a function"),
    Bad("fit number", lambda: fit(3), TypeError, "data must be an array"),
    Bad(
        "fit non-binary",
        lambda: fit(BITS * 2, BINOMIAL),
        ValueError,
        "data must be 0 or 1 for a BinomialKernel; it holds 2",
    ),
    Bad("fit fractions", lambda: fit(BITS * 0.5, BINOMIAL), ValueError, "data must be 0 or 1"),
    Bad("fit no batches", lambda: fit(iter(())), ValueError, "data must yield at least one batch"),
    Bad("fit bad batch", lambda: fit([with_nan(), X]), ValueError, "data: batch 1 must be finite"),
    Bad("fit batch shape", lambda: fit([X[0]]), ValueError, r"data: batch 1 must have shape \(batch, 2\)"),
    Bad(
        "fit function shape", lambda: fit(lambda key: jnp.ones((4, 5))), ValueError, r"data\(rng_key\) must have shape"
    ),
    Bad("bound NaN", lambda: bound(with_nan()), ValueError, "x must be finite"),
    Bad("bound event shape", lambda: bound(np.ones((4, 3))), ValueError, r"x must have shape \(\*batch, 2\)"),
    Bad("bound scalar", lambda: bound(1.0), ValueError, r"x must have shape \(\*batch, 2\)"),
    Bad("bound empty", lambda: bound(np.zeros((0, 2))), ValueError, "x must hold at least one datum"),
    Bad("bound None", lambda: bound(None), ValueError, "x must be data of shape"),
    Bad("bound non-binary", lambda: bound(X, BINOMIAL), ValueError, "x must be 0 or 1 for a BinomialKernel"),
    Bad("estimate NaN", lambda: estimate(with_nan()), ValueError, "x must be finite"),
    Bad("estimate event shape", lambda: estimate(np.ones((4, 3))), ValueError, r"x must have shape \(\*batch, 2\)"),
    Bad("estimate empty", lambda: estimate(np.zeros((0, 2))), ValueError, "x must hold at least one datum"),
    Bad("estimate None", lambda: estimate(None), ValueError, "x must be data of shape"),
    Bad("estimate non-binary", lambda: estimate(X, BINOMIAL), ValueError, "x must be 0 or 1 for a BinomialKernel"),
    Bad(
        "estimate support", lambda: estimate(X, POSITIVE), ValueError, "x must lie in the transform's codomain; 2 data"
    ),
    Bad("entropy NaN", lambda: reverse_entropy(with_nan()), ValueError, "x must be finite"),
    Bad("entropy shape", lambda: reverse_entropy(np.ones((4, 3))), ValueError, r"x must have shape \(\*batch, 2\)"),
    Bad("entropy empty", lambda: reverse_entropy(np.zeros((0, 2))), ValueError, "x must hold at least one datum"),
    Bad("entropy None", lambda: reverse_entropy(None), ValueError, "x must be data of shape"),
    Bad("entropy bounds NaN", lambda: entropy_bounds(with_nan()), ValueError, "data must be finite"),
    Bad(
        "entropy bounds shape",
        lambda: entropy_bounds(np.ones((4, 3))),
        ValueError,
        r"data must have shape \(\*batch, 2",
    ),
    Bad("entropy bounds empty", lambda: entropy_bounds(np.zeros((0, 2))), ValueError, "data must hold at least one"),
    Bad("entropy bounds non-binary", lambda: entropy_bounds(X, BINOMIAL), ValueError, "data must be 0 or 1"),
    Bad(
        "entropy bounds no data",
        lambda: entropy_bounds(None, BINOMIAL),
        ValueError,
        "data are required: .* BinomialKernel",
    ),
    Bad("model NaN", lambda: program("model", with_nan()), ValueError, "x must be finite"),
    Bad("model axes", lambda: program("model", X[None]), ValueError, r"x must have shape \(N, 2\)"),
    Bad("guide shape", lambda: program("guide", np.ones((4, 3))), ValueError, "x must have shape"),
    Bad("guide None", lambda: program("guide", None), ValueError, "x must be data"),
    Bad("bound_model NaN", lambda: program("bound_model", with_nan()), ValueError, "x must be finite"),
    Bad("bound_model None", lambda: program("bound_model", None), ValueError, "x must be data"),
    Bad(
        "bound_model axes",
        lambda: program("bound_model", X[None]),
        ValueError,
        r"x must have shape \(N, 2\) or be one datum",
    ),
    # kernels
    Bad("event_shape int", lambda: ppd.GaussianKernel(2), ValueError, "event_shape must be a tuple"),
    Bad("event_shape zero", lambda: ppd.GaussianKernel((2, 0)), ValueError, "event_shape"),
    Bad("event_shape float", lambda: ppd.BinomialKernel((2.0,)), ValueError, "event_shape"),
    Bad("probs 0", lambda: ppd.BinomialKernel((2,), 0.0), ValueError, r"probs must be in \(0, 1\)"),
    Bad("probs 1", lambda: ppd.BinomialKernel((2,), [0.5, 1.0]), ValueError, "probs"),
    Bad("probs NaN", lambda: ppd.BinomialKernel((2,), np.nan), ValueError, "probs"),
    Bad(
        "probs shape",
        lambda: ppd.BinomialKernel((2,), [0.1, 0.2, 0.3]),
        ValueError,
        "probs must broadcast to event_shape",
    ),
    # schedules
    Bad("beta 0", lambda: ppd.FixedSchedule([0.1, 0.0]), ValueError, r"betas must be in \(0, 1\]; beta_2 is 0"),
    Bad("beta negative", lambda: ppd.FixedSchedule([-0.1, 0.5]), ValueError, "betas .* beta_1 is -0.1"),
    Bad("beta above 1", lambda: ppd.FixedSchedule([0.1, 1.5]), ValueError, "betas .* beta_2 is 1.5"),
    Bad("beta NaN", lambda: ppd.FixedSchedule([0.1, np.nan]), ValueError, "betas .* beta_2 is nan"),
    Bad("beta 1 early", lambda: ppd.FixedSchedule([0.1, 1.0, 0.5]), ValueError, r"betas: beta_t = 1 .* T = 3; beta_2"),
    Bad("betas empty", lambda: ppd.FixedSchedule([]), ValueError, r"betas must have shape \(T,\)"),
    Bad("betas 2d", lambda: ppd.FixedSchedule(np.full((2, 2), 0.1)), ValueError, r"betas must have shape \(T,\)"),
    Bad("betas scalar", lambda: ppd.FixedSchedule(0.1), ValueError, "betas must have shape"),
    Bad(
        "log_snr rising",
        lambda: ppd.FixedSchedule.from_log_snr([0.0, 1.0]),
        ValueError,
        "log_snr must .* fall strictly",
    ),
    Bad("log_snr -inf early", lambda: ppd.FixedSchedule.from_log_snr([-np.inf, -1.0]), ValueError, "log_snr"),
    Bad("log_snr empty", lambda: ppd.FixedSchedule.from_log_snr([]), ValueError, "log_snr must have shape"),
    Bad("T zero", lambda: ppd.FixedSchedule.constant_erasure(0), ValueError, "num_timesteps must be an integer >= 1"),
    Bad("T float", lambda: ppd.FixedSchedule.cosine(2.5), ValueError, "num_timesteps"),
    Bad("T negative", lambda: ppd.FixedSchedule.log_linear(-1), ValueError, "num_timesteps"),
    Bad(
        "first_beta",
        lambda: ppd.FixedSchedule.log_linear(3, first_beta=0.0),
        ValueError,
        r"first_beta must be in \(0, 1\)",
    ),
    Bad(
        "final_log_snr",
        lambda: ppd.FixedSchedule.log_linear(3, final_log_snr=20.0),
        ValueError,
        "final_log_snr must be below",
    ),
    Bad("learned T", lambda: ppd.LearnedSchedule(True, 0.1), ValueError, "num_timesteps"),
    Bad("learned first_beta", lambda: ppd.LearnedSchedule(3, 1.0), ValueError, "first_beta"),
    Bad("learned end", lambda: ppd.LearnedSchedule(3, 0.5, final_log_snr=0.0), ValueError, "final_log_snr"),
    # Diffusion
    Bad("kernel type", lambda: diffusion(kernel="gaussian"), TypeError, "kernel must be a Kernel; got str"),
    Bad("kernel class", lambda: diffusion(kernel=ppd.GaussianKernel), TypeError, "kernel must be a Kernel"),
    Bad("schedule type", lambda: diffusion(schedule=[0.1, 0.2]), TypeError, "schedule must be a Schedule; got list"),
    Bad("transform type", lambda: diffusion(transform=np.log), TypeError, "transform must be a numpyro transform"),
    Bad("network type", lambda: diffusion(network=None), TypeError, "network must be a linen module"),
    Bad("network signature", lambda: diffusion(network=lambda x_t: x_t), TypeError, r"network must take \(x_t, t\)"),
    Bad(
        "parameterization",
        lambda: diffusion(parameterization="score"),
        ValueError,
        "parameterization must be one of 'v'",
    ),
    Bad(
        "parameterization of another kernel",
        lambda: diffusion(kernel=BINOM, network=one, parameterization="v"),
        ValueError,
        "parameterization must be one of .* for a BinomialKernel",
    ),
    Bad(
        "noise and full erasure",
        lambda: diffusion(schedule=ERASING, parameterization="noise"),
        ValueError,
        "beta_T < 1",
    ),
    Bad("last_step", lambda: diffusion(last_step="nothing"), ValueError, "last_step must be 'kernel' or 'network'"),
    Bad("name", lambda: diffusion(name=""), ValueError, "name must be a non-empty string"),
    Bad(
        "learned schedule of bits",
        lambda: diffusion(kernel=BINOM, network=one, schedule=ppd.LearnedSchedule(3, 0.01)),
        ValueError,
        "schedule must be fixed for a BinomialKernel",
    ),
    Bad(
        "transform of bits",
        lambda: diffusion(kernel=BINOM, network=one, transform=ppd.standardize(X)),
        ValueError,
        "transform must be None for a BinomialKernel",
    ),
    # networks
    Bad("network count", lambda: diffusion(network=one).prior({}), ValueError, r"network must return 2 array\(s\)"),
    Bad(
        "network count of bits",
        lambda: diffusion(kernel=BINOM).prior({}),
        ValueError,
        r"network must return 1 array\(s\)",
    ),
    Bad(
        "network shape",
        lambda: diffusion(network=lambda x_t, t: (x_t[..., :1], x_t)).prior({}),
        ValueError,
        r"network must return .* shape \(1, 2\)",
    ),
    Bad("network in fit", lambda: fit(X, diffusion(network=one)), ValueError, "network must return 2"),
    Bad(
        "network in model",
        lambda: program("model", X, diffusion=diffusion(network=one)),
        ValueError,
        "network must return",
    ),
    # parameters
    Bad("params missing", lambda: TRAINED.prior({}), ValueError, "params"),
    Bad("schedule missing", lambda: LEARNED.prior({"other": 1}), ValueError, "params must hold 'diffusion.schedule"),
    Bad("params of another name", lambda: TRAINED.prior({"other.network$params": {}}), ValueError, "params"),
    Bad("params type", lambda: GAUSSIAN.prior([1]), TypeError, "params must be a dict"),
    Bad(
        "num_timesteps 0",
        lambda: GAUSSIAN.prior({}, num_timesteps=0),
        ValueError,
        "num_timesteps must be an integer >= 1",
    ),
    Bad(
        "num_timesteps above T", lambda: GAUSSIAN.prior({}, num_timesteps=4), ValueError, "num_timesteps must be in 1…3"
    ),
    Bad("log_prob rule", lambda: GAUSSIAN.prior({}, log_prob=True), TypeError, "log_prob must be None, ppd.Bound"),
    # settings
    Bad("num_steps", lambda: fit(X, num_steps=0), ValueError, "num_steps must be an integer >= 1"),
    Bad("num_steps float", lambda: fit(X, num_steps=1e3), ValueError, "num_steps must be an integer"),
    Bad("batch_size", lambda: fit(X, batch_size=0), ValueError, "batch_size must be an integer >= 1"),
    Bad("fit num_times", lambda: fit(X, num_times=0), ValueError, "num_times"),
    Bad("average", lambda: fit(X, average=1.0), ValueError, "average must be in"),
    Bad("objective", lambda: fit(X, objective="score"), ValueError, "objective must be 'bound' or 'mse'"),
    Bad(
        "mse without a step of the network's",
        lambda: fit(X, diffusion(schedule=ppd.FixedSchedule([0.3]), network=MLP((3,))), objective="mse"),
        ValueError,
        "objective must be 'bound' for T = 1 with last_step='kernel'",
    ),
    Bad(
        "mse_model without a step of the network's",
        lambda: program("mse_model", X, diffusion=diffusion(schedule=ppd.FixedSchedule([0.3]))),
        ValueError,
        "last_step must be 'network' for squared errors",
    ),
    Bad(
        "importance 0",
        lambda: fit(X, steered(lambda rates: 0 * rates.drop)),
        ValueError,
        r"kernel.step_importance must be finite, not negative, and not all 0; got \[0. 0.\]",
    ),
    Bad("importance negative", lambda: fit(X, steered(lambda rates: 2.5 - rates.t)), ValueError, "step_importance"),
    Bad(
        "importance NaN",
        lambda: fit(X, steered(lambda rates: jnp.log(2 - rates.t), schedule=ppd.LearnedSchedule(3, 0.01))),
        ValueError,
        "step_importance must be finite",
    ),
    Bad(
        "importance shape",
        lambda: fit(X, steered(lambda rates: jnp.ones(()))),
        ValueError,
        r"step_importance must have the shape of rates.t, \(2,\); got \(\)",
    ),
    Bad(
        "importance in bound_model",
        lambda: program("bound_model", X, diffusion=steered(lambda rates: -rates.drop)),
        ValueError,
        "step_importance must be finite",
    ),
    Bad("model batch_size 0", lambda: program("model", X, batch_size=0), ValueError, "batch_size must be an integer"),
    Bad("model batch_size", lambda: program("model", X, batch_size=5), ValueError, "batch_size must be in 1…4"),
    Bad("guide batch_size", lambda: program("guide", X, batch_size=5), ValueError, "batch_size must be in 1…4"),
    Bad(
        "bound batch_size 0",
        lambda: program("bound_model", X, batch_size=0),
        ValueError,
        "batch_size must be an integer",
    ),
    Bad("bound batch_size", lambda: program("bound_model", X, batch_size=5), ValueError, "batch_size must be in 1…4"),
    Bad("num_times", lambda: program("bound_model", X, num_times=0), ValueError, "num_times must be an integer >= 1"),
    Bad("order", lambda: program("guide", X, order="reverse"), ValueError, "order must be 'forward' or 'posterior'"),
    Bad(
        "estimator", lambda: bound(X, estimator="mean"), ValueError, "estimator must be 'analytic', 'log_ratio' or None"
    ),
    Bad(
        "estimator of bits",
        lambda: bound(BITS, BINOMIAL, estimator="log_ratio"),
        ValueError,
        "estimator must be 'analytic'",
    ),
    Bad("num_samples", lambda: bound(X, num_samples=0), ValueError, "num_samples must be an integer >= 1"),
    Bad("chunk_size", lambda: bound(X, chunk_size=0), ValueError, "chunk_size must be an integer >= 1"),
    Bad(
        "trajectories 0",
        lambda: estimate(X, num_trajectories=0),
        ValueError,
        "num_trajectories must be an integer >= 1",
    ),
    Bad(
        "trajectories negative", lambda: estimate(X, num_trajectories=-1), ValueError, "num_trajectories must be an int"
    ),
    Bad(
        "trajectories float",
        lambda: estimate(X, num_trajectories=2.5),
        ValueError,
        "num_trajectories must be an integer",
    ),
    Bad(
        "trajectories bool",
        lambda: estimate(X, num_trajectories=True),
        ValueError,
        "num_trajectories must be an integer",
    ),
    Bad("estimate chunk_size", lambda: estimate(X, chunk_size=0), ValueError, "chunk_size must be an integer >= 1"),
    Bad(
        "entropy chunk_size", lambda: reverse_entropy(X, chunk_size=0), ValueError, "chunk_size must be an integer >= 1"
    ),
    Bad("estimate prior", lambda: ppd.estimate_log_prob(KEY, GAUSSIAN, X), TypeError, "prior must be a DiffusionPrior"),
    Bad("entropy prior", lambda: ppd.reverse_entropy(KEY, GAUSSIAN, X), TypeError, "prior must be a DiffusionPrior"),
    Bad("entropy bounds prior", lambda: ppd.entropy_bounds(GAUSSIAN, X), TypeError, "prior must be a DiffusionPrior"),
    Bad("Bound samples", lambda: ppd.Bound(KEY, num_samples=0), ValueError, "num_samples must be an integer >= 1"),
    Bad(
        "Importance trajectories",
        lambda: ppd.Importance(KEY, 0),
        ValueError,
        "num_trajectories must be an integer >= 1",
    ),
    # context
    Bad("fit context rows", lambda: fit(X, context=LABELS[:3]), ValueError, "context must have one row per datum"),
    Bad("fit context scalar", lambda: fit(X, context=1.0), ValueError, "context must have one row per datum"),
    Bad(
        "fit context and function",
        lambda: fit(lambda key: jnp.ones((4, 2)), context=LABELS),
        ValueError,
        "context must be None",
    ),
    Bad("fit context and iterable", lambda: fit([X], context=LABELS), ValueError, "context must be None"),
    Bad(
        "model context",
        lambda: program("model", X, context=LABELS[:3]),
        ValueError,
        "context must have one row per datum",
    ),
    Bad(
        "bound_model context",
        lambda: program("bound_model", X, context=LABELS[:3]),
        ValueError,
        "context must have one row",
    ),
    Bad(
        "context drop",
        lambda: fit(X, context=LABELS, context_drop=1.0),
        ValueError,
        r"context_drop must be in \[0, 1\)",
    ),
    Bad("covariates", lambda: fit(X, context=LABELS, covariates=LABELS), TypeError, "covariates must be a Covariates"),
    Bad("too many labels", lambda: ppd.Covariates.from_rows(np.arange(2000)), ValueError, "2000 different labels"),
    Bad("objects as context", lambda: fit(X, context=np.array([{}] * 4)), TypeError, "context must hold numbers"),
]

LARGE = {
    "_run",
    "_bound_of_rows",
    "_sample",
    "_log_mean_weight",
    "weights_of_rows",
    "_entropies_of_rows",
    "scan",
    "while",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_named(case, caplog):
    with (
        jax.log_compiles(),
        caplog.at_level(logging.WARNING, logger="jax"),
        pytest.raises(case.error, match=case.match),
    ):
        case.call()
    compiled = set(re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text))
    assert not compiled & LARGE


@pytest.mark.slow
def test_an_importance_of_ones_own_is_taken():
    for schedule in (SCHEDULE, ppd.LearnedSchedule(3, 0.01)):  # a step may be left to the uniform share
        result = fit(X, steered(lambda rates: rates.t - 2, schedule=schedule, network=MLP((3,))), num_steps=2)
        assert np.isfinite(result.losses).all()


def test_the_compile_guard_sees_compilations(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        diffusion(schedule=ppd.FixedSchedule([0.2, 0.4])).prior({}).sample(KEY)  # no other test's
    assert "_sample" in set(re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text))


@pytest.mark.slow
def test_a_later_bad_batch_is_named():
    with pytest.raises(ValueError, match="data: batch 2 must be finite"):
        fit([X, with_nan()], num_steps=3)


@pytest.mark.slow
def test_far_from_unit_scale_warns_with_the_columns():
    wide = np.random.default_rng(0).normal(size=(50, 2)) * [1.0, 100.0]
    with pytest.warns(UserWarning, match=r"unit scale in column 1, .*standardize"):
        fit(wide)


@pytest.mark.slow
def test_fit_with_a_context_needs_it_for_its_prior():
    result = fit(X, context=LABELS, num_steps=1)
    with pytest.raises(AttributeError, match=r"context is needed: .* use prior\(context\)\.sample"):
        _ = result.prior.sample
    with pytest.raises(ValueError, match="context is needed: training never dropped it"):
        result.prior(None)
    with pytest.raises(TypeError, match=r"use fit\.prior\(context\)"):
        ppd.lower_bound(KEY, result.prior, X)
    with pytest.raises(ValueError, match="context_drop"):
        result.prior(LABELS).guided(2.0)
    assert result.diffusion.prior(result.params, context=LABELS).batch_shape == (4,)
