"""Whether SMC can be trusted on a model: the model makes data of its own, and SMC is run on them.

Ranks of the truth among posterior draws are uniform where these are right (simulation-based calibration: Talts et al.
2018). Whether the model can be trusted on the data is another question: their evidence lies among that of the simulated
ones then (Box 1980).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from pp_diffusion.checks import check_key, positive_int, typed_key
from pp_diffusion.compiling import jit_once
from pp_diffusion.inference_data import pareto_smooth
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.posterior.latents import constrain
from pp_diffusion.posterior.messages import Message, base_of
from pp_diffusion.posterior.outcome import Outcome
from pp_diffusion.posterior.program import full_precision, trace_model
from pp_diffusion.posterior.report import independent_of, pooled
from pp_diffusion.posterior.smc import Sampler, finish, init, step
from pp_diffusion.posterior.surprise import Surprise, conflicts, surprise
from pp_diffusion.posterior.survey import Judge, Survey, by_plain_draws, num_plain_draws
from pp_diffusion.posterior.twists import as_twist
from pp_diffusion.posterior.verdicts import BELIEVABLE, COLLAPSED, DOUBTFUL, Findings

#: Of each site, so many numbers at most are ranked, evenly spaced.
MOST_NUMBERS = 8
#: Draws of each run, among which the truth is ranked.
NUM_RANKED = 19
#: The probability that ranks of a right posterior are flagged, of all sites together.
RANKS_LEVEL = 0.01
#: Pareto's k of the last weights, above which their mean is not to be relied on (Vehtari et al. 2024).
LARGEST_K = 0.7
#: The share of the simulated data sets whose runs may collapse.
LARGEST_COLLAPSED = 0.1
#: The standard deviation of log Z between the chains of most runs, nats.
LARGEST_SPREAD = 0.5
#: Beyond all simulated evidences by such a share of their interquartile range, the data's is in conflict.
LEAST_GAP = 0.25
#: Data sets that are simulated to compare the data with; SMC is run on some.
NUM_PREDICTED = 1000


class Trust(NamedTuple):
    """What :func:`trust` found.

    :ivar flags: what speaks against trusting, in words; empty where nothing does.
    :ivar ranks: of the truth among ``num_ranked`` draws, per site, shape ``(num_simulations, numbers)``.
    :ivar num_ranked: how many draws these are.
    :ivar coverage: per site, how often the middle 90 % of the draws hold the truth.
    :ivar pareto_k: of the last weights of each simulated run, the median of chains and systems.
    :ivar spread: of log Z between its chains, nats.
    :ivar verdicts: of each simulated run, the worst of its systems.
    :ivar simulated: the log evidence of each simulated data set, nats.
    :ivar log_evidence: of the data.
    :ivar verdict: of the run on the data, the worst of its systems.
    :ivar surprise: per observed site, the shares of 1000 simulated data sets that lie nearer to the middle of what the
        model predicts, and farther from it, than the data.
    """

    flags: tuple[str, ...]
    ranks: dict[str, np.ndarray]
    num_ranked: int
    coverage: dict[str, float]
    pareto_k: np.ndarray
    spread: np.ndarray
    verdicts: tuple[str, ...]
    simulated: np.ndarray
    log_evidence: float
    verdict: str
    surprise: dict[str, Surprise]

    @property
    def ok(self) -> bool:
        """Whether there are no flags."""
        return not self.flags

    def summary(self) -> str:
        """All of it in words."""
        count, low = len(self.simulated), int((self.simulated < self.log_evidence).sum())
        covered = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.coverage.items())
        runs = ", ".join(f"{self.verdicts.count(n)} {n}" for n in (BELIEVABLE, DOUBTFUL, COLLAPSED))
        lines = [
            f"{count} data sets simulated from the model: {runs}",
            f"90 % intervals hold the truth: {covered}",
            f"Pareto k of the last weights: {np.median(self.pareto_k):.2f} (median); log Z differs between chains with "
            f"a standard deviation of {np.median(self.spread):.3f} nats (median)",
            f"log evidence of the data: {self.log_evidence:.3f} nats, above that of {low} of {count} simulated ones",
            *(
                f"site {name!r} lies farther from the middle of what the model predicts than {100 * near:.1f} % of the "
                f"data sets that it makes, nearer than {100 * far:.1f} %"
                for name, (near, far) in self.surprise.items()
            ),
            *(f"FLAG: {flag}" for flag in self.flags),
        ]
        return "\n".join(lines if self.flags else [*lines, "nothing speaks against trusting it"])


class _Runs(NamedTuple):
    """What is kept of runs, which are the first axis; of the first, on the data, ranks mean nothing.

    :ivar ranks: per site, among few draws.
    :ivar below: per site, the share of all draws below the truth.
    """

    ranks: dict[str, Array]
    below: dict[str, Array]
    log_evidences: Array
    log_weights: Array
    final_ess: Array
    least_ess: Array
    independent_draws: Array
    plain: Survey


def trust(
    rng_key: Array,
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_simulations: int = 40,
    num_particles: int = 500,
    num_chains: int = 4,
    twist: Any = None,
    ess_threshold: float = 0.5,
    num_moves: int = 5,
) -> Trust:
    """Runs SMC on data that the model itself makes, and on the data, and says what speaks against trusting it.

    Flags are: ranks of the truth that are not uniform, by their mean or their spread (an error rate of 1 % over all);
    last weights with a Pareto k above .7 in most runs; log Z that differs between chains by more than .5 nats in most;
    collapsed runs, more than 10 %, or the one on the data; and prior and data in conflict: data whose evidence lies
    below or above that of all simulated ones, by a quarter of their interquartile range, or that lie farther from the
    middle of what the model predicts, or nearer to it, than 99.5 % of 1000 simulated ones (an error rate of 1 %).

    It does not see what the model says wrongly of the world where the evidence does not tell.

    Cost: ``num_simulations + 1`` runs, one after the other, in one program.

    :param rng_key: a JAX random key.
    :param model: as for :class:`~pp_diffusion.SMC`; all that it observes can be simulated.
    :param args: its arguments, the data among them.
    :param kwargs: its keyword arguments.
    :param num_simulations: at least 20.
    :param num_particles, num_chains, twist, ess_threshold, num_moves: as for :class:`~pp_diffusion.SMC`; at least two
        chains.
    :raises TypeError: if ``rng_key`` is no key.
    :raises ValueError: if the model has a ``numpyro.factor``, which cannot be simulated, or SMC does not serve it.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> prior = ppd.Diffusion(  # of standard normal numbers
        ...     ppd.GaussianKernel(()), ppd.FixedSchedule.constant_erasure(4), lambda x_t, t: (x_t * 0, x_t * 0)
        ... ).prior({})
        >>> def model(y):
        ...     x = numpyro.sample("x", prior)
        ...     numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> found = ppd.trust(jax.random.key(0), model, (jnp.array(9.0),), num_simulations=20)  # doctest: +SKIP
        >>> found.ok, found.flags[0][:32]  # doctest: +SKIP
        (False, 'prior and data are in conflict: ')
    """
    check_key(rng_key)
    kwargs = dict(kwargs or {})
    if positive_int("num_simulations", num_simulations) < 20:
        raise ValueError(f"num_simulations must be at least 20; got {num_simulations}")
    if positive_int("num_chains", num_chains) < 2:
        raise ValueError("num_chains must be at least 2; got 1")
    data = _data(trace_model(model, args, kwargs).sites)
    simulate_key, run_key = jax.random.split(typed_key(rng_key))
    truths, made = jax.jit(partial(_simulated, model, args, kwargs, tuple(data)), static_argnums=1)(
        simulate_key, num_simulations
    )
    surprises = {name: surprise(np.asarray(y), np.asarray(made[name])) for name, y in data.items()}
    truths, made = jax.tree.map(lambda a: a[:num_simulations], (truths, made))
    values = {name: jnp.concatenate([jnp.asarray(y, made[name].dtype)[None], made[name]]) for name, y in data.items()}
    first = {name: y[0] for name, y in values.items()}
    factors = read_model(_Observing(model), (first, *args), kwargs)
    sampler = Sampler(factors, as_twist(twist), ess_threshold, num_moves, Judge()(factors))
    ranked = (factors.name, *(site.name for site in factors.latents))
    truth = {n: jnp.concatenate([truths[n][:1], truths[n]]) for n in ranked}
    keys = jax.random.split(run_key, num_simulations + 1)
    plain = num_plain_draws(factors, positive_int("num_particles", num_particles) * num_chains)
    runs = _run_all(sampler, values, truth, keys, num_particles, num_chains, plain)
    return _judged(jax.tree.map(np.asarray, runs), factors.systems, plain, surprises)


def _data(messages: Mapping[str, Message]) -> dict[str, Array]:
    """What is observed.

    :raises ValueError: for a factor.
    """
    observed = {n: m for n, m in messages.items() if m["type"] == "sample" and m["is_observed"]}
    for name, message in observed.items():
        if isinstance(base_of(message), dist.Unit):
            raise ValueError(f"site {name!r} is a numpyro.factor, from which no data can be simulated")
    return {name: jnp.broadcast_to(jnp.asarray(m["value"]), m["fn"].shape()) for name, m in observed.items()}


@dataclass(frozen=True)
class _Observing:
    """The model as a function of what it observes, and of its arguments; equal where the model is, so that a second
    call finds what the first has compiled."""

    model: Callable[..., Any]

    def __call__(self, values: dict[str, Array], *args: Any, **kwargs: Any) -> Any:
        return handlers.condition(handlers.uncondition(self.model), data=values)(*args, **kwargs)


def _simulated(
    model: Callable[..., Any], args: Any, kwargs: Any, names: tuple[str, ...], rng_key: Array, count: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Latents, and what is observed at them; ``count`` data sets or a few more side by side."""

    def one(rng_key: Array) -> dict[str, Array]:
        with full_precision():
            sites = handlers.trace(handlers.seed(handlers.uncondition(model), rng_key)).get_trace(*args, **kwargs)
        return {name: jnp.asarray(m["value"]) for name, m in sites.items() if m["type"] == "sample"}

    found = jax.lax.map(one, jax.random.split(rng_key, max(count, NUM_PREDICTED)), batch_size=count)
    return {n: a for n, a in found.items() if n not in names}, {n: found[n] for n in names}


@partial(jit_once, static_argnames=("num_particles", "num_chains", "num_plain"))
def _run_all(
    sampler: Sampler, values: Any, truths: Any, keys: Array, num_particles: int, num_chains: int, num_plain: int
) -> _Runs:
    """SMC on each of these values."""
    factors = sampler.factors

    def one(at: tuple[Any, Any, Array]) -> _Runs:
        values, truth, key = at
        run_key, few_key, tie_key, plain_key = jax.random.split(key, 4)
        now = factors.with_first(values)
        mine = sampler.replace(factors=now)
        state = init(run_key, mine, num_particles, num_chains)
        state, infos = jax.lax.scan(lambda s, _: step(mine, s), state, length=mine.num_timesteps - 1)
        state, last, end = finish(mine, state)
        sizes = jnp.concatenate([infos.ess, last.ess[None], end.ess[None]])
        whole = constrain(now, *pooled(state))
        draws = {n: _numbers(whole[n][:, 0]) for n in truth}
        below = {n: draws[n] < _numbers(truth[n][None]) for n in truth}
        few = jax.random.permutation(few_key, num_particles * num_chains)[:NUM_RANKED]
        return _Runs(
            {n: b[few].sum(0) + _ties(tie_key, draws[n][few], truth[n]) for n, b in below.items()},
            {n: b.mean(0) for n, b in below.items()},
            state.log_evidence,
            state.log_weights,
            end.ess,
            sizes.min(0),
            independent_of(state),
            by_plain_draws(plain_key, now, max(num_plain, 1)),
        )

    return jax.lax.map(one, (values, truths, keys))


def _numbers(values: Array) -> Array:
    """Some numbers of each of the values over the first axis."""
    flat = values.reshape(len(values), -1)
    return flat[:, np.unique(np.linspace(0, flat.shape[1] - 1, MOST_NUMBERS).round().astype(int))]


def _ties(rng_key: Array, draws: Array, truth: Array) -> Array:
    """Draws that are the truth, as those of bits may be, are below it or not by chance."""
    equal = (draws == _numbers(truth[None])).sum(0)
    return jax.random.randint(rng_key, equal.shape, 0, equal + 1)


def _judged(runs: _Runs, systems: tuple[int, ...], num_plain: int, surprises: dict[str, Surprise]) -> Trust:
    outcomes = [
        _outcome(jax.tree.map(lambda a, i=i: a[i], runs), systems, num_plain) for i in range(len(runs.final_ess))
    ]
    verdicts = [_worst(outcome) for outcome in outcomes]
    evidences = np.array([np.sum(outcome.log_evidence) for outcome in outcomes])
    spread = np.array([np.median(outcome.findings.spread) for outcome in outcomes])
    pareto_k = [np.median(pareto_smooth(w.reshape(len(w), -1))[1]) for w in runs.log_weights]
    found = Trust(
        flags=(),
        ranks={n: np.asarray(r)[1:] for n, r in runs.ranks.items()},
        num_ranked=NUM_RANKED,
        coverage={n: float(((b[1:] >= 0.05) & (b[1:] <= 0.95)).mean()) for n, b in runs.below.items()},
        pareto_k=np.array(pareto_k[1:]),
        spread=spread[1:],
        verdicts=tuple(verdicts[1:]),
        simulated=evidences[1:],
        log_evidence=float(evidences[0]),
        verdict=verdicts[0],
        surprise=surprises,
    )
    return found._replace(flags=flags_of(found))


def _outcome(run: _Runs, systems: tuple[int, ...], num_plain: int) -> Outcome:
    findings = Findings(
        log_evidences=np.asarray(run.log_evidences, np.float64),
        final_ess=np.asarray(run.final_ess, np.float64),
        least_ess=np.asarray(run.least_ess, np.float64),
        independent_draws=np.asarray(run.independent_draws, np.float64),
        num_particles=len(run.log_weights),
        plain=run.plain.plain(num_plain) if num_plain else None,
    )
    return Outcome(findings, systems)


def _worst(outcome: Outcome) -> str:
    found = {verdict.name for verdict in outcome.verdicts}
    return next(name for name in (COLLAPSED, DOUBTFUL, BELIEVABLE) if name in found)


def flags_of(found: Trust) -> tuple[str, ...]:
    """What speaks against trusting it."""
    return tuple(_flags(found))


def _flags(found: Trust) -> Iterator[str]:
    yield from _of_ranks(found)
    if (k := float(np.median(found.pareto_k))) > LARGEST_K:
        yield f"the last weights have a Pareto k of {k:.2f} (median): few particles carry them"
    if (spread := float(np.median(found.spread))) > LARGEST_SPREAD:
        yield f"log Z differs between chains, with a standard deviation of {spread:.2f} nats (median)"
    collapsed = found.verdicts.count(COLLAPSED)
    if collapsed > LARGEST_COLLAPSED * len(found.verdicts):
        yield f"SMC collapsed on {collapsed} of {len(found.verdicts)} simulated data sets"
    if found.verdict == COLLAPSED:
        yield "SMC collapsed on the data"
    yield from _of_evidence(found)
    yield from conflicts(found.surprise)


def _of_ranks(found: Trust) -> Iterator[str]:
    """Uniform on 0…L, they have a known mean, and a known mean square around it."""
    number = found.num_ranked
    values = np.arange(number + 1) - number / 2
    squares = values**2
    tests = 2 * sum(ranks.shape[1] for ranks in found.ranks.values())
    for name, ranks in found.ranks.items():
        away, root = ranks - number / 2, math.sqrt(len(ranks))
        bias = away.mean(0) / values.std() * root
        width = ((away**2).mean(0) - squares.mean()) / squares.std() * root
        words = {
            "draws lie to one side of the truth": np.abs(bias).max(),
            "draws are too narrow": width.max(),
            "draws are too wide": (-width).max(),
        }
        for what, z in words.items():
            if math.erfc(z / math.sqrt(2)) * tests < RANKS_LEVEL:
                yield f"site {name!r}: {what} (ranks of the truth, z = {z:.1f})"


def _of_evidence(found: Trust) -> Iterator[str]:
    finite = found.simulated[np.isfinite(found.simulated)]
    if not len(finite):
        return
    gap = LEAST_GAP * float(np.subtract(*np.quantile(finite, [0.75, 0.25])))
    for side, is_beyond in (
        ("below", found.log_evidence < finite.min() - gap),
        ("above", found.log_evidence > finite.max() + gap),
    ):
        if is_beyond:
            yield (
                f"prior and data are in conflict: the log evidence of the data, {found.log_evidence:.1f} nats, lies "
                f"{side} that of all simulated ones, {finite.min():.1f} to {finite.max():.1f}"
            )
