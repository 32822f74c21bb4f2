"""Likelihoods of every kind under an exact normal prior in two dimensions: log Z and moments by SMC, beside quadrature.

``python -m benchmarks.zoo [name …]`` prints a row for each distribution and datum: ordinary, extreme and impossible
(where there is one). A log Z counts as right within .05 nats of the truth; one that is not has to be flagged.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

import pp_diffusion as ppd

TOLERANCE = 0.05  # nats
DIRECTION = jnp.array([0.8, -0.6])


class Likelihood(NamedTuple):
    """An observed distribution of x, shape (…, 2), and data for it.

    :ivar at: from x to the distribution.
    :ivar data: by name: ordinary, extreme, impossible.
    """

    at: Callable[[Array], dist.Distribution]
    data: dict[str, Any]


class Row(NamedTuple):
    """What came: nats, and the largest error of the means and standard deviations, in posterior sds."""

    name: str
    data: str
    truth: float
    log_evidence: float
    error: float
    flagged: bool
    moments: float
    seconds: float

    @property
    def verdict(self) -> str:
        """Right, flagged, or wrong in silence."""
        if self.truth == -math.inf:
            return "right" if self.flagged else "WRONG"
        if abs(self.log_evidence - self.truth) <= TOLERANCE:
            return "right"
        return "flagged" if self.flagged else "WRONG"


def prior(num_timesteps: int = 100) -> ppd.DiffusionPrior:
    """Exactly N(0, I) in two dimensions."""

    def network(x_t: Array, t: Array) -> tuple[Array, Array]:
        beta = 1.0 / (num_timesteps + 1 - t)[..., None]
        return jnp.sqrt(jnp.maximum(1 - beta, 0)) * x_t, beta * jnp.ones_like(x_t)

    schedule = ppd.FixedSchedule.constant_erasure(num_timesteps)
    kernel = ppd.GaussianKernel((2,))
    return ppd.Diffusion(kernel, schedule, network, parameterization="direct", last_step="network").prior({})


def along(x: Array) -> Array:
    """The number that most likelihoods depend on: one direction of x, again N(0, 1)."""
    return x @ DIRECTION


def _low_rank(x: Array) -> dist.Distribution:
    loc = jnp.stack([x[..., 0], x[..., 1], x.sum(-1)], -1)
    return dist.LowRankMultivariateNormal(loc, jnp.array([[1.0], [0.5], [-0.5]]), 0.2 * jnp.ones(3))


def _mixture(x: Array) -> dist.Distribution:
    locs = along(x)[..., None] + jnp.array([-1.5, 1.5])
    return dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(locs, 0.3))


LIKELIHOODS: dict[str, Likelihood] = {
    "Normal": Likelihood(lambda x: dist.Normal(along(x), 0.5), {"ordinary": 0.7, "extreme": 6.0}),
    "Normal, scale": Likelihood(lambda x: dist.Normal(0.0, jnp.exp(along(x))), {"ordinary": 1.0, "extreme": 30.0}),
    "Normal, squared": Likelihood(lambda x: dist.Normal(along(x) ** 2, 0.5), {"ordinary": 1.0, "extreme": 9.0}),
    "Normal, abs": Likelihood(lambda x: dist.Normal(jnp.abs(along(x)), 0.3), {"ordinary": 1.0, "extreme": 4.0}),
    "Normal, product": Likelihood(
        lambda x: dist.Normal(x[..., 0] * x[..., 1], 0.3), {"ordinary": 0.5, "extreme": -3.0}
    ),
    "Normal, sine": Likelihood(lambda x: dist.Normal(jnp.sin(3 * along(x)), 0.2), {"ordinary": 0.5, "extreme": 1.5}),
    "StudentT": Likelihood(lambda x: dist.StudentT(3.0, along(x), 0.5), {"ordinary": 0.7, "extreme": 20.0}),
    "Cauchy": Likelihood(lambda x: dist.Cauchy(along(x), 0.5), {"ordinary": 0.7, "extreme": 100.0}),
    "Laplace": Likelihood(lambda x: dist.Laplace(along(x), 0.5), {"ordinary": 0.7, "extreme": 10.0}),
    "Logistic": Likelihood(lambda x: dist.Logistic(along(x), 0.3), {"ordinary": 0.7, "extreme": 8.0}),
    "Gumbel": Likelihood(lambda x: dist.Gumbel(along(x), 0.5), {"ordinary": 0.7, "extreme": -4.0}),
    "AsymmetricLaplace": Likelihood(
        lambda x: dist.AsymmetricLaplace(along(x), 2.0, 0.5), {"ordinary": 0.7, "extreme": 6.0}
    ),
    "SoftLaplace": Likelihood(lambda x: dist.SoftLaplace(along(x), 0.5), {"ordinary": 0.7, "extreme": 8.0}),
    "Poisson": Likelihood(
        lambda x: dist.Poisson(jnp.exp(1 + along(x))), {"ordinary": 3, "extreme": 60, "impossible": -1}
    ),
    "Poisson, exp(5x)": Likelihood(lambda x: dist.Poisson(jnp.exp(5 * along(x))), {"ordinary": 2, "extreme": 1000}),
    "NegativeBinomial2": Likelihood(
        lambda x: dist.NegativeBinomial2(jnp.exp(1 + along(x)), 2.0), {"ordinary": 3, "extreme": 200}
    ),
    "NegativeBinomial2, exp(4x)": Likelihood(
        lambda x: dist.NegativeBinomial2(jnp.exp(4 * along(x)), 2.0), {"ordinary": 3, "extreme": 1000}
    ),
    "NegativeBinomialProbs": Likelihood(
        lambda x: dist.NegativeBinomialProbs(4.0, jax.nn.sigmoid(along(x))), {"ordinary": 4, "extreme": 60}
    ),
    "ZeroInflatedPoisson": Likelihood(
        lambda x: dist.ZeroInflatedPoisson(0.3, jnp.exp(1 + along(x))), {"ordinary": 0, "extreme": 40}
    ),
    "ZeroInflatedNegativeBinomial2": Likelihood(
        lambda x: dist.ZeroInflatedNegativeBinomial2(jnp.exp(1 + along(x)), 2.0, gate=0.3),
        {"ordinary": 2, "extreme": 60},
    ),
    "Geometric": Likelihood(
        lambda x: dist.GeometricProbs(jax.nn.sigmoid(2 * along(x))), {"ordinary": 2, "extreme": 30}
    ),
    "Bernoulli": Likelihood(lambda x: dist.Bernoulli(logits=3 * along(x)), {"ordinary": 1, "extreme": 0}),
    "Binomial": Likelihood(
        lambda x: dist.Binomial(50, logits=2 * along(x)), {"ordinary": 30, "extreme": 0, "impossible": 51}
    ),
    "Binomial, 5x": Likelihood(lambda x: dist.Binomial(50, logits=5 * along(x)), {"ordinary": 30, "extreme": 0}),
    "Binomial, a million": Likelihood(
        lambda x: dist.Binomial(1_000_000, logits=along(x)), {"ordinary": 600_000, "extreme": 950_000}
    ),
    "BetaBinomial": Likelihood(lambda x: dist.BetaBinomial(jnp.exp(along(x)), 2.0, 20), {"ordinary": 8, "extreme": 20}),
    "Beta": Likelihood(
        lambda x: dist.BetaProportion(jax.nn.sigmoid(along(x)), 10.0), {"ordinary": 0.6, "extreme": 0.999}
    ),
    "Kumaraswamy": Likelihood(lambda x: dist.Kumaraswamy(jnp.exp(along(x)), 2.0), {"ordinary": 0.4, "extreme": 0.99}),
    "Exponential": Likelihood(
        lambda x: dist.Exponential(jnp.exp(2 * along(x))), {"ordinary": 0.5, "extreme": 5.0, "impossible": -1.0}
    ),
    "Gamma": Likelihood(lambda x: dist.Gamma(5.0, 5.0 * jnp.exp(-2 * along(x))), {"ordinary": 1.0, "extreme": 10.0}),
    "InverseGamma": Likelihood(
        lambda x: dist.InverseGamma(3.0, 2 * jnp.exp(along(x))), {"ordinary": 1.0, "extreme": 30.0}
    ),
    "LogNormal": Likelihood(lambda x: dist.LogNormal(along(x), 0.5), {"ordinary": 1.0, "extreme": 5.0}),
    "LogNormal, 3x": Likelihood(lambda x: dist.LogNormal(3 * along(x), 0.1), {"ordinary": 1.0, "extreme": 50.0}),
    "Weibull": Likelihood(lambda x: dist.Weibull(jnp.exp(along(x)), 2.0), {"ordinary": 1.0, "extreme": 8.0}),
    "Pareto": Likelihood(lambda x: dist.Pareto(1.0, jnp.exp(along(x))), {"ordinary": 2.0, "extreme": 100.0}),
    "HalfNormal": Likelihood(lambda x: dist.HalfNormal(jnp.exp(along(x))), {"ordinary": 1.0, "extreme": 20.0}),
    "HalfCauchy": Likelihood(lambda x: dist.HalfCauchy(jnp.exp(along(x))), {"ordinary": 1.0, "extreme": 200.0}),
    "Levy": Likelihood(lambda x: dist.Levy(along(x), 0.5), {"ordinary": 1.5, "extreme": 50.0}),
    "Gompertz": Likelihood(lambda x: dist.Gompertz(jnp.exp(along(x)), 1.0), {"ordinary": 0.7, "extreme": 4.0}),
    "VonMises": Likelihood(lambda x: dist.VonMises(along(x), 5.0), {"ordinary": 0.5, "extreme": 3.0}),
    "VonMises, x + pi": Likelihood(lambda x: dist.VonMises(along(x) + jnp.pi, 5.0), {"ordinary": 3.0}),
    "VonMises, 3x": Likelihood(lambda x: dist.VonMises(3 * along(x), 8.0), {"ordinary": 1.0, "extreme": 3.1}),
    "Uniform": Likelihood(lambda x: dist.Uniform(along(x) - 1, along(x) + 1), {"ordinary": 0.5, "extreme": 3.5}),
    "TruncatedNormal": Likelihood(
        lambda x: dist.TruncatedNormal(along(x), 0.5, low=0.0), {"ordinary": 0.5, "extreme": 4.0, "impossible": -1.0}
    ),
    "Right-censored": Likelihood(
        lambda x: dist.RightCensoredDistribution(dist.Normal(along(x), 0.5), jnp.array(1)),
        {"ordinary": 1.0, "extreme": 4.0},
    ),
    "Left-censored": Likelihood(
        lambda x: dist.LeftCensoredDistribution(dist.Normal(along(x), 0.5), jnp.array(1)),
        {"ordinary": -1.0, "extreme": -4.0},
    ),
    "Categorical": Likelihood(
        lambda x: dist.Categorical(logits=jnp.stack([x[..., 0], x[..., 1], 0 * x[..., 0]], -1) * 2),
        {"ordinary": 1, "extreme": 2},
    ),
    "OrderedLogistic": Likelihood(
        lambda x: dist.OrderedLogistic(3 * along(x), jnp.array([-1.0, 0.0, 2.0])), {"ordinary": 1, "extreme": 3}
    ),
    "Multinomial": Likelihood(
        lambda x: dist.Multinomial(20, logits=jnp.stack([x[..., 0], x[..., 1], 0 * x[..., 0]], -1)),
        {"ordinary": jnp.array([8, 5, 7]), "extreme": jnp.array([0, 20, 0])},
    ),
    "Dirichlet": Likelihood(
        lambda x: dist.Dirichlet(jnp.exp(jnp.stack([x[..., 0], x[..., 1], 0 * x[..., 0]], -1))),
        {"ordinary": jnp.array([0.3, 0.3, 0.4]), "extreme": jnp.array([0.98, 0.01, 0.01])},
    ),
    "MultivariateNormal": Likelihood(
        lambda x: dist.MultivariateNormal(x, jnp.array([[0.5, 0.3], [0.3, 0.4]])),
        {"ordinary": jnp.array([0.5, -0.2]), "extreme": jnp.array([5.0, -5.0])},
    ),
    "LowRankMultivariateNormal": Likelihood(
        _low_rank, {"ordinary": jnp.array([0.5, -0.2, 0.4]), "extreme": jnp.array([4.0, -4.0, 3.0])}
    ),
    "MultivariateStudentT": Likelihood(
        lambda x: dist.MultivariateStudentT(4.0, x, jnp.array([[0.7, 0.0], [0.3, 0.5]])),
        {"ordinary": jnp.array([0.5, -0.2]), "extreme": jnp.array([8.0, -8.0])},
    ),
    "Mixture": Likelihood(_mixture, {"ordinary": 1.0, "extreme": 5.0}),
    "SkewNormal-like factor": Likelihood(
        lambda x: dist.Unit(jax.nn.log_sigmoid(4 * along(x)) - 0.5 * (along(x) - 0.5) ** 2), {"ordinary": None}
    ),
    "Wall": Likelihood(lambda x: dist.Unit(jnp.where(along(x) > 1, 0.0, -jnp.inf)), {"ordinary": None}),
}


def quadrature(likelihood: Likelihood, value: Any, half_width: float = 9.0, size: int = 2401) -> tuple[float, Any, Any]:
    """log Z, means and standard deviations of x, on a grid of the plane along and across :data:`DIRECTION`."""
    points = jnp.linspace(-half_width, half_width, size)
    step = float(points[1] - points[0])
    across = jnp.array([-DIRECTION[1], DIRECTION[0]])

    @jax.jit
    def line(u: Array) -> tuple[Array, Array, Array]:
        x = u * DIRECTION + points[:, None] * across
        log_density = dist.Normal(0, 1).log_prob(x).sum(-1) + _log_prob(likelihood.at(x), value)
        log_density = jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)  # far out, of a truncated one
        log_mass = jax.nn.logsumexp(log_density)
        weights = jnp.exp(log_density - jnp.where(jnp.isfinite(log_mass), log_mass, 0.0))
        return log_mass, weights @ x, weights @ x**2

    log_masses, first, second = (np.asarray(a, np.float64) for a in jax.lax.map(line, points, batch_size=64))
    largest = log_masses.max()
    if largest == -math.inf:
        return -math.inf, np.zeros(2), np.ones(2)
    weights = np.exp(log_masses - largest)
    mean, square = (weights @ a / weights.sum() for a in (first, second))
    return float(largest + np.log(weights.sum()) + 2 * math.log(step)), mean, np.sqrt(square - mean**2)


def _log_prob(fn: dist.Distribution, value: Any) -> Array:
    if isinstance(fn, dist.Unit):
        return fn.log_factor
    inside = fn.support(jnp.asarray(value))
    return jnp.where(inside, fn.log_prob(jnp.asarray(value)), -jnp.inf)


def run(name: str, data: str, num_particles: int = 2000, num_chains: int = 8, seed: int = 0, **settings: Any) -> Row:
    """One likelihood and datum."""
    likelihood = LIKELIHOODS[name]
    value = likelihood.data[data]
    density = prior()

    def model(y: Any) -> None:
        fn = likelihood.at(numpyro.sample("x", density))
        if isinstance(fn, dist.Unit):
            numpyro.factor("y", fn.log_factor)
        else:
            numpyro.sample("y", fn, obs=y)

    truth, mean, sd = quadrature(likelihood, value)
    smc = ppd.SMC(model, num_particles=num_particles, num_chains=num_chains, progress_bar=False, **settings)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            smc.run(jax.random.key(seed), value)
        except (ValueError, FloatingPointError):  # zero everywhere, said by name
            return Row(name, data, truth, -math.inf, math.nan, True, 0.0, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    x = np.asarray(smc.get_samples()["x"], np.float64)
    moments = max(np.abs((x.mean(0) - mean) / sd).max(), np.abs(x.std(0) / sd - 1).max())
    flagged = bool(caught) or math.isnan(smc.log_evidence_error)
    return Row(name, data, truth, smc.log_evidence, smc.log_evidence_error, flagged, float(moments), seconds)


def rows(names: list[str] | None = None, **settings: Any) -> Iterator[Row]:
    """All of them, one after the other."""
    for name in names or LIKELIHOODS:
        for data in LIKELIHOODS[name].data:
            yield run(name, data, **settings)


def main() -> None:
    """Prints the rows as they come, and how many are right, flagged, wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of distributions; all without")
    parser.add_argument("--num-particles", type=int, default=2000)
    parser.add_argument("--twist", default=None)
    options = parser.parse_args()
    found = []
    for row in rows(options.names, num_particles=options.num_particles, twist=options.twist):
        found.append(row)
        print(
            f"{row.name:32} {row.data:10} {row.truth:9.3f} {row.log_evidence:9.3f} ± {row.error:.3f}  "
            f"moments {row.moments:.3f}  {row.seconds:5.1f} s  {row.verdict}",
            flush=True,
        )
        jax.clear_caches()
    counts = {verdict: sum(row.verdict == verdict for row in found) for verdict in ("right", "flagged", "WRONG")}
    print(counts)


if __name__ == "__main__":
    main()
