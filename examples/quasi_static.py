r"""The quasi-static limit: with the exact f_μ and f_Σ, more and smaller steps make the bound meet the likelihood.

The paper's claim under eq. 9: where forward and reverse trajectories are the same process, one trajectory is enough for
the exact log likelihood. The data are a mixture of two normal distributions, of which the mean and the variance of
:math:`x_{t-1}` given :math:`x_t` are known in closed form. The reverse steps are normal distributions with these
moments; the true ones are mixtures, and become normal as the steps become small. Then the variance of the log weight
and the gap of K fall, in the end as 1/T².
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import pp_diffusion as ppd
from examples.report import arguments, print_table, save_figure, with_error

WEIGHTS, MEANS, SCALES = np.array([0.3, 0.7]), np.array([-1.4, 0.6]), np.array([0.5, 0.2])
KERNEL = ppd.GaussianKernel((1,))
data = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(MEANS, SCALES)).expand((1,)).to_event(1)


def exact_prior(num_timesteps: int) -> ppd.DiffusionPrior:
    """The best reverse process of normal steps. Both ends are those of a chain of any length: β_1 and ᾱ_T are fixed."""
    schedule = ppd.FixedSchedule.log_linear(num_timesteps, first_beta=1e-4, final_log_snr=-12.0)
    rates = schedule.rates()

    def moments(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        step = rates.at(t - 1)
        alpha_bar, erased = step.alpha_bar[..., None], step.erased[..., None]
        variance = alpha_bar * SCALES**2 + erased  # of x_t, in each component
        misfit = x_t - jnp.sqrt(alpha_bar) * MEANS
        share = jax.nn.softmax(jnp.log(WEIGHTS) - 0.5 * misfit**2 / variance - 0.5 * jnp.log(variance))
        means = MEANS + jnp.sqrt(alpha_bar) * SCALES**2 / variance * misfit  # of x_0 given x_t
        mean = (share * means).sum(-1, keepdims=True)
        spread = (share * (SCALES**2 * erased / variance + (means - mean) ** 2)).sum(-1, keepdims=True)
        f_mu, of_posterior = KERNEL.posterior_moments(x_t, mean, step)
        of_x_0 = (step.previous_alpha_bar * step.innovation**2)[..., None]
        return f_mu, of_posterior + of_x_0 * spread  # total variance

    diffusion = ppd.Diffusion(KERNEL, schedule, moments, parameterization="direct", last_step="network")
    return diffusion.prior({})


class Row(NamedTuple):
    """Results for one T, in nats.

    :ivar variance: of the log weight, over trajectories, mean over the data.
    :ivar gap: log p(x) − K, mean over the data; ``gap_error`` its standard error.
    :ivar error: of the estimate of log p from all trajectories, root mean square over the data.
    """

    num_timesteps: int
    variance: float
    gap: float
    gap_error: float
    error: float


def run(
    lengths: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000),
    *,
    num_data: int = 500,
    num_trajectories: int = 256,
    figures: Path,
    progress: bool = True,
) -> list[Row]:
    """Prints the table, writes the figure; returns the table's rows."""
    x = data.sample(jax.random.key(0), (num_data,))
    exact = np.asarray(data.log_prob(x), np.float64)
    results, table = [], []
    for length in lengths:
        prior = exact_prior(length)
        estimate = ppd.estimate_log_prob(jax.random.key(1), prior, x, num_trajectories, progress_bar=progress)
        gap, misses = exact - estimate.bound, estimate.value - exact
        gap_error = float(gap.std(ddof=1)) / math.sqrt(num_data)
        row = Row(
            length,
            float(estimate.log_weights.var(0).mean()),
            float(gap.mean()),
            gap_error,
            float(np.sqrt((misses**2).mean())),
        )
        results.append(row)
        khat = f"{np.median(estimate.pareto_k):.2f}"
        cells = (f"{row.variance:.2e}", with_error(gap, 5), with_error(misses, 5), f"{row.error:.1e}", khat)
        table.append((f"T = {length}", *cells))
    columns = ("variance of log w", "log p - K", "estimate - log p", "its root mean square", "median k-hat")
    print_table(f"Two components, exact f_μ and f_Σ; {num_trajectories} trajectories per datum; nats", columns, table)
    slope = np.polyfit(np.log([row.num_timesteps for row in results]), np.log([row.variance for row in results]), 1)[0]
    print(f"the variance of the log weight falls as T to the power {slope:.2f}")
    save_figure(_figure(results), figures, "quasi_static.png")
    return results


def _figure(results: list[Row]) -> Any:
    from matplotlib.figure import Figure

    lengths = np.array([row.num_timesteps for row in results])
    figure = Figure(figsize=(5, 4), layout="constrained", dpi=120)
    axis = figure.subplots()
    axis.plot(lengths, [row.variance for row in results], "o-", label="variance of log w")
    errors = [row.gap_error for row in results]
    axis.errorbar(lengths, [row.gap for row in results], errors, fmt="s-", label="log p − K")
    axis.plot(lengths, [row.error for row in results], "^-", label="error of log p, eq. 9")
    axis.plot(lengths, results[-1].variance * (lengths[-1] / lengths) ** 2, "k:", lw=0.8, label="1/T²")
    axis.set(xscale="log", yscale="log", xlabel="T", ylabel="nats")
    axis.legend()
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {"lengths": (5, 50), "num_data": 50, "num_trajectories": 64} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
