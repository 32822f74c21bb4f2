r"""The paper's composition and its bias: multiplying every step by r(x) does not give p(x) r(x).

The paper's eqs. 21 and 22 drop the normalisers of the steps; each is nearly one, but there are T of them. Here p is a
normal distribution with its exact reverse process, so that nothing else can be wrong, and the posterior is known. With
r the same at all steps (the paper's choice) the chain goes to p r² where p is the stationary law, and elsewhere to
neither; with the power (T − t)/T of r it goes somewhere else; known entries that are pinned at every step, as for
inpainting, do not tell the others all that they should. ``SMC`` runs the same steps and keeps the normalisers as
weights: posterior and evidence are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pp_diffusion as ppd
from examples.report import arguments, mean_and_error, print_table, save_figure


def exact_prior(covariance: Any, num_timesteps: int) -> ppd.DiffusionPrior:
    """The reverse process of N(0, covariance): exact but that its steps, of equal β as in the paper, are diagonal."""
    covariance = np.asarray(covariance, float)
    schedule = ppd.FixedSchedule.constant_erasure(num_timesteps)
    alpha_bar = np.asarray(schedule.alpha_bars(), np.float64)[:, None, None]
    marginal = alpha_bar * covariance + (1 - alpha_bar) * np.eye(len(covariance))  # of x_t
    regression = jnp.asarray(np.sqrt(alpha_bar) * covariance @ np.linalg.inv(marginal), float)
    spread = jnp.asarray(np.log(np.diagonal(covariance @ np.linalg.inv(marginal), axis1=-2, axis2=-1)), float)

    def moments(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.einsum("...ij,...j->...i", regression[t - 1], x_t), spread[t - 1]

    kernel = ppd.GaussianKernel((len(covariance),))
    return ppd.Diffusion(kernel, schedule, moments, parameterization="x0", last_step="network").prior({})


def pinned(rng_key: jax.Array, prior: ppd.DiffusionPrior, known: int, value: float, num: int) -> jax.Array:
    """Draws by the reverse process with one entry held at its value at every step, as the paper inpaints."""
    process = prior.process

    def step(i: jax.Array, x_t: jax.Array) -> jax.Array:
        index = prior.num_timesteps - 1 - i
        x = process(x_t, process.rates.at(index)).sample(jax.random.fold_in(rng_key, index))
        return x.at[..., known].set(value)

    start = process.kernel.stationary().sample(jax.random.fold_in(rng_key, prior.num_timesteps), (num,))
    return jax.lax.fori_loop(0, prior.num_timesteps, step, start.at[..., known].set(value))


class Case(NamedTuple):
    """A posterior known in closed form; tables and figures are of the last entry of x.

    :ivar model: ``model(prior)``.
    :ivar composed: the paper's ways, by name: ``(rng_key, prior, num) -> draws``.
    """

    name: str
    covariance: Any
    model: Callable[[ppd.DiffusionPrior], None]
    composed: dict[str, Callable[[jax.Array, ppd.DiffusionPrior, int], jax.Array]]
    mean: float
    variance: float
    log_evidence: float


def conjugate(prior: ppd.DiffusionPrior, y: float = 2.0) -> None:
    """x, and y = x + N(0, 1)."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.array([y]))


def inpainting(prior: ppd.DiffusionPrior, y: float = 1.5) -> None:
    """The first of two entries is known."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Delta(x[..., :1], event_dim=1), obs=jnp.array([y]))


def compose(power: str) -> Callable[[jax.Array, ppd.DiffusionPrior, int], jax.Array]:
    """The paper's p̃, with one of its two schedules of r."""

    def draw(rng_key: jax.Array, prior: ppd.DiffusionPrior, num: int) -> jax.Array:
        perturbed = ppd.perturb(prior, lambda x: dist.Normal(x, 1.0).log_prob(2.0).sum(-1), power=power)
        return perturbed.sample(rng_key, (num,))

    return draw


def normal_case(variance: float) -> Case:
    """p = N(0, variance), r = N(2; x, 1)."""
    total = variance + 1
    log_evidence = float(dist.Normal(0.0, np.sqrt(total)).log_prob(2.0))
    composed = {"r at every step": compose("constant"), "r to the (T−t)/T": compose("annealed")}
    name = f"p = N(0, {variance:g}), r = N(2; x, 1)"
    return Case(name, [[variance]], conjugate, composed, 2 * variance / total, variance / total, log_evidence)


CASES = [
    normal_case(1.0),
    normal_case(0.25),
    Case(
        "two entries, correlation .8, first known: 1.5",
        [[1.0, 0.8], [0.8, 1.0]],
        inpainting,
        {"pinned at every step": lambda rng_key, prior, num: pinned(rng_key, prior, 0, 1.5, num)},
        1.2,
        0.36,
        float(dist.Normal().log_prob(1.5)),
    ),
]


def run(
    cases: Sequence[Case] = tuple(CASES),
    *,
    num_timesteps: int = 500,
    num_particles: int = 2_500,
    num_draws: int = 20_000,
    figures: Path,
    progress: bool = True,
) -> dict[str, dict[str, np.ndarray]]:
    """Prints the table, writes the figure; returns the draws of every case by every way."""
    results: dict[str, dict[str, np.ndarray]] = {}
    table = []
    for case in cases:
        prior = exact_prior(case.covariance, num_timesteps)
        smc = ppd.SMC(case.model, num_particles=num_particles, num_chains=8, progress_bar=progress)
        smc.run(jax.random.key(2), prior)
        draws = {name: draw(jax.random.key(1), prior, num_draws) for name, draw in case.composed.items()}
        draws["SMC"] = smc.get_samples()["x"]
        results[case.name] = {name: np.asarray(x)[..., -1] for name, x in draws.items()}
        table.append((case.name, f"{case.mean:.3f}", f"{case.variance:.3f}", f"{case.log_evidence:.4f}"))
        for name, x in results[case.name].items():
            evidence = f"{float(smc.log_evidence):.4f} ± {float(smc.log_evidence_error):.4f}" if name == "SMC" else ""
            moments = (mean_and_error(x), mean_and_error((x - x.mean()) ** 2))
            table.append((f"    {name}", *(f"{value:.3f} ± {error:.3f}" for value, error in moments), evidence))
    title = f"T = {num_timesteps}; {num_draws} draws, SMC: 8 times {num_particles} particles; exact in the first rows"
    print_table(title, ("mean", "variance", "log evidence"), table)
    save_figure(_figure(cases, results), figures, "composition_bias.png")
    return results


def _figure(cases: Sequence[Case], results: dict[str, dict[str, np.ndarray]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(cases), 3.5), layout="constrained", dpi=120)
    grid = np.linspace(-2, 4, 301)
    for axis, case in zip(figure.subplots(1, len(cases)), cases, strict=True):
        for i, (name, x) in enumerate(results[case.name].items()):
            style: dict[str, Any] = {"histtype": "step", "color": f"C{i}"}
            if name == "SMC":
                style = {"histtype": "stepfilled", "color": "0.8"}
            axis.hist(x, bins=np.linspace(-2, 4, 61), density=True, label=name, **style)
        exact = dist.Normal(case.mean, np.sqrt(case.variance))
        axis.plot(grid, np.exp(np.asarray(exact.log_prob(grid))), "k", lw=1, label="exact")
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend
        axis.set(xlabel="x" if len(case.covariance) == 1 else "the unknown entry", yticks=[])
        axis.set_title(case.name, fontsize=9)
        axis.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size: dict[str, Any] = {}
    if args.small:
        size = {"cases": CASES[1:], "num_timesteps": 50, "num_particles": 64, "num_draws": 1_000}
    run(**size, figures=args.figures, progress=args.progress)
