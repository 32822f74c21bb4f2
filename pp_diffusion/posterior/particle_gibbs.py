"""Particle Gibbs: used like :class:`numpyro.infer.MCMC`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import diagnostics, handlers
from numpyro.infer import log_likelihood
from numpyro.infer.reparam import Reparam
from tqdm.auto import tqdm

from pp_diffusion import inference_data
from pp_diffusion.checks import check_key, positive_int, typed_key
from pp_diffusion.compiling import jit_once
from pp_diffusion.posterior import refusals
from pp_diffusion.posterior.factors import read_model
from pp_diffusion.posterior.gibbs import Gibbs, GibbsState, advance, begin
from pp_diffusion.posterior.messages import Message, base_of, in_words, is_fixed
from pp_diffusion.posterior.outcome import dataset
from pp_diffusion.posterior.program import Latents, Traced, trace_model
from pp_diffusion.posterior.smc import Sampler
from pp_diffusion.posterior.survey import Judge
from pp_diffusion.posterior.target import Target, read_target
from pp_diffusion.posterior.twists import as_twist


class Sweeps(NamedTuple):
    """What is kept of a run; arrays of shape ``(num_chains, num_samples, …)``.

    :ivar sites: all latent and deterministic sites.
    :ivar diverging: whether NUTS's step diverged.
    :ivar accept_prob: of that step.
    :ivar num_steps: its leapfrog steps.
    :ivar renewed: the share of the systems whose x a sweep changed.
    :ivar least_ess: of the particles, in the system and at the step with the least.
    :ivar moves_accepted: the share of the moves at fixed noise that was accepted.
    """

    sites: dict[str, Array]
    diverging: Array
    accept_prob: Array
    num_steps: Array
    renewed: Array
    least_ess: Array
    moves_accepted: Array


class ParticleGibbs:
    r"""The posterior of a model with one :class:`~pp_diffusion.DiffusionPrior` site whose rows share latents.

    Used like :class:`numpyro.infer.MCMC`. A sweep draws each row's x by conditional SMC, given the other latents, and
    then these by a step of NumPyro's NUTS, given x. Given the other latents the rows of a plate are independent, each
    with a few particles of its own, so that cost grows with their number and no faster; :class:`~pp_diffusion.SMC`'s
    particles are of all rows at once. It is exact at any number of particles, in the sense of a Markov chain: look at
    R-hat and at the effective sample size, of several chains.

    The other latents are continuous ones, of any distribution, and may depend on x (a measurement of it, say); x's
    prior depends on none. No density of the prior is computed. There is no evidence.

    By turns alone, x and a noise scale hold each other fast. With ``num_moves`` the other latents also move by a random
    walk in which x is made anew of the noise of its guided steps, which is held fixed. With an exact twist that is a
    walk under their own posterior, x being summed out. It adapts itself in the warm-up. There are none where
    coordinates of x are observed exactly, or states are discrete.

    Cost: ``num_particles * T`` network calls for each row in each sweep of each chain, with moves
    ``(num_moves + 2) * T`` more; with the moment twist a vector-Jacobian product for each number observed of a row.
    Memory: all T steps of the particles of all rows.

    :param model: a NumPyro model.
    :param num_particles: of each row; more make x less dependent on what it was.
    :param num_warmup: sweeps in which NUTS adapts itself, and that are dropped.
    :param num_samples: sweeps that are kept, of each chain.
    :param num_chains: run side by side.
    :param twist: as for :class:`~pp_diffusion.SMC`.
    :param ess_threshold: as there.
    :param target_accept_prob: of NUTS.
    :param num_moves: of x and the other latents together, in a sweep: for few latents, where the twist is nearly exact.
    :param progress_bar: shows one, over sweeps.
    :raises TypeError, ValueError: naming the argument that does not fit.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> prior = ppd.Diffusion(  # of standard normal numbers
        ...     ppd.GaussianKernel(()), ppd.FixedSchedule.constant_erasure(4), lambda x_t, t: (x_t * 0, x_t * 0)
        ... ).prior({})
        >>> def model(y):
        ...     b = numpyro.sample("b", dist.Normal(0, 1))
        ...     with numpyro.plate("rows", len(y)):
        ...         x = numpyro.sample("x", prior)
        ...         numpyro.sample("y", dist.Normal(x + b, 1.0), obs=y)
        >>> gibbs = ppd.ParticleGibbs(model, num_particles=4, num_warmup=20, num_samples=30, progress_bar=False)
        >>> gibbs.run(jax.random.key(0), jnp.array([1.0, 2.0, 0.5]))
        >>> {name: draws.shape for name, draws in gibbs.get_samples(group_by_chain=True).items()}
        {'b': (4, 30), 'x': (4, 30, 3)}
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int = 8,
        num_warmup: int = 300,
        num_samples: int = 500,
        num_chains: int = 4,
        twist: Any = None,
        ess_threshold: float = 0.5,
        target_accept_prob: float = 0.8,
        num_moves: int = 0,
        progress_bar: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        self.num_particles = positive_int("num_particles", num_particles)
        if self.num_particles < 2:
            raise ValueError("num_particles must be at least 2, the kept one and another; got 1")
        for name, share in (("ess_threshold", ess_threshold), ("target_accept_prob", target_accept_prob)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {share}")
        self.model, self.twist, self.progress_bar = model, as_twist(twist), progress_bar
        self.num_warmup = positive_int("num_warmup", num_warmup)
        self.num_samples = positive_int("num_samples", num_samples)
        self.num_chains = positive_int("num_chains", num_chains)
        self.num_moves = 0 if num_moves == 0 else positive_int("num_moves", num_moves)
        self.ess_threshold, self.target_accept_prob = float(ess_threshold), float(target_accept_prob)
        self._judge = Judge()
        self._sweeps: Sweeps | None = None
        self._observed: dict[str, Array] = {}
        self._bound: Any = None

    def run(self, rng_key: Array, *args: Any, **kwargs: Any) -> None:
        """Runs all chains on these arguments of the model.

        :param rng_key: a JAX random key.
        :param args: the model's arguments. Arrays among them are traced: a new y needs no new compilation.
        :param kwargs: its keyword arguments.
        :raises TypeError: if ``rng_key`` is no key.
        :raises ValueError: naming the site, where it does not serve the model; or if the likelihood is zero or NaN at
            the start.
        """
        self._sweeps = None
        check_key(rng_key)
        gibbs = self._read(args, kwargs)
        keys = jax.random.split(typed_key(rng_key), self.num_chains)
        states = _begin(gibbs, keys)
        if not np.isfinite(states.hmc.potential_energy).all():
            raise ValueError("the model's likelihood is zero or NaN where the chains start: at draws of its prior")
        sweeps = _room(gibbs, states, self.num_samples)
        total = self.num_warmup + self.num_samples
        segment = max(1, -(-total // 20)) if self.progress_bar else total
        with tqdm(total=total, desc="ParticleGibbs", unit="sweep", disable=not self.progress_bar) as bar:
            for done in range(0, total, segment):
                count = min(segment, total - done)
                states, sweeps = _advance(gibbs, states, sweeps, done, count)
                jax.block_until_ready(states.path)
                bar.update(count)
        self._sweeps = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), sweeps)
        self._observed = gibbs.target.observed()
        self._bound = partial(self.model, *args, **kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Gibbs:
        """The model, given x and given the rest.

        :raises ValueError: naming the site, where that cannot be.
        """
        messages = trace_model(self.model, args, kwargs).sites
        message = refusals.prior_site(messages)
        target = read_target(_given_x(self.model, messages), (message["value"], *args), kwargs, sampler="ParticleGibbs")
        names = tuple(name for name, _, _ in target.shapes)
        latents = {name: messages[name]["value"] for name in names}
        given = _given_latents(self.model)
        _refuse_entangled(given, message["name"], latents, args, kwargs)
        _refuse_moving(target, message, names)
        factors = read_model(given, (latents, *args), kwargs)
        sampler = Sampler(factors, self.twist, self.ess_threshold, 0, self._judge(factors))
        return Gibbs(
            sampler,
            target,
            names,
            num_particles=self.num_particles,
            num_warmup=self.num_warmup,
            target_accept_prob=self.target_accept_prob,
            num_moves=self.num_moves if factors.space.has_noise and not factors.is_exact else 0,
        )

    @property
    def sweeps(self) -> Sweeps:
        """All that is kept of the run, with chains and sweeps in front."""
        if self._sweeps is None:
            raise RuntimeError("ParticleGibbs has no results yet: call run first")
        return self._sweeps

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Array]:
        """Draws of all latent sites, in data units, and of the deterministic ones.

        :param group_by_chain: shape ``(num_chains, num_samples, …)``; otherwise ``(num_chains * num_samples, …)``.
        """
        sites = self.sweeps.sites
        return dict(sites) if group_by_chain else {n: a.reshape(-1, *a.shape[2:]) for n, a in sites.items()}

    def print_summary(self, prob: float = 0.9) -> None:
        """Prints NumPyro's summary, with effective sample sizes and R-hat, and how the sweeps went.

        :param prob: of the intervals.
        """
        sweeps = self.sweeps
        diagnostics.print_summary(sweeps.sites, prob=prob)
        moves = f"; moves together with x: {float(sweeps.moves_accepted.mean()):.2f}" if self.num_moves else ""
        print(
            f"{self.num_particles} particles of each row, in {self.num_chains} chains; the least effective ones of a "
            f"sweep: {float(np.median(sweeps.least_ess)):.1f} (median); a sweep renews x in "
            f"{100 * float(sweeps.renewed.mean()):.0f} % of the rows\n"
            f"NUTS: {int(sweeps.diverging.sum())} divergences, acceptance {float(sweeps.accept_prob.mean()):.2f}{moves}"
        )

    def to_arviz(self, *, dims: Mapping[str, list[str]] | None = None, coords: Mapping[str, Any] | None = None) -> Any:
        """For ArviZ: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x), in nats, with the groups ``posterior``,
        ``sample_stats``, ``log_likelihood`` and ``observed_data``.

        :param dims: names of the axes of a variable.
        :param coords: coordinates by the names of axes.
        """
        grouped = partial(dataset, dims=dims or {}, coords=coords or {})
        sweeps = self.sweeps
        stats = {"n_steps" if n == "num_steps" else n: getattr(sweeps, n) for n in Sweeps._fields[1:]}
        groups = {
            "posterior": grouped(sweeps.sites, ["chain", "draw"]),
            "sample_stats": grouped(stats, ["chain", "draw"]),
            "observed_data": grouped(self._observed, []),
        }
        if self._observed:
            seeded = handlers.seed(self._bound, jax.random.key(0))
            found = log_likelihood(seeded, dict(sweeps.sites), batch_ndims=2, parallel=True)
            groups["log_likelihood"] = grouped({n: found[n] for n in self._observed}, ["chain", "draw"])
        return inference_data.inference_data(groups, {"units": "nats", "inference_library": "pp_diffusion"})


class _Put(Reparam):
    """A site with a value of its own, and no density."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Any]:
        return None, self.value


def _given_x(model: Callable[..., Any], messages: Mapping[str, Message]) -> Callable[..., Any]:
    """The model as a function of x and its arguments; what ``obs_mask`` leaves out has no part in it."""
    name = refusals.prior_site(messages)["name"]
    left_out = {
        n for n in messages if n.endswith("_unobserved") and f"{n.removesuffix('_unobserved')}_observed" in messages
    }

    def given_x(x: Array, *args: Any, **kwargs: Any) -> Any:
        def put(site: Message) -> Reparam | None:
            if site["name"] == name:
                return _Put(x)
            if site["name"] in left_out:
                return _Put(messages[site["name"]]["value"])
            is_latent = not site["is_observed"] and site["value"] is None
            return _Put(base_of(site).v) if is_latent and is_fixed(site) else None

        return handlers.reparam(model, config=put)(*args, **kwargs)

    return given_x


def _given_latents(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model as a function of its other latents and its arguments."""

    def given_latents(latents: Latents, *args: Any, **kwargs: Any) -> Any:
        return handlers.condition(model, data=latents)(*args, **kwargs)

    return given_latents


def _refuse_entangled(
    given: Callable[..., Any], name: str, latents: Latents, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """The prior depends on none of the latents.

    :raises ValueError: naming those that it depends on.
    """

    def parts(latents: Latents) -> list[Any]:
        return jax.tree.leaves(trace_model(given, (latents, *args), kwargs).sites[name]["fn"])

    sources = Traced(parts, latents).sources({n: frozenset({n}) for n in latents})
    if found := frozenset().union(*sources):
        raise ValueError(
            f"site {name!r}: its prior depends on the latent site {in_words(found)} (through context, say), and x's "
            "density with it, which ParticleGibbs does not compute. Take NUTS over the noise, of the same network as a "
            "flow, diffusion.flow(params, context=...), with pp_diffusion.FlowReparam, or of this prior, with "
            "pp_diffusion.TrajectoryReparam"
        )


def _refuse_moving(target: Target, message: Message, names: tuple[str, ...]) -> None:
    """Supports of latents are the same at any x, so that they stay where they are while x is drawn.

    :raises ValueError: naming the one whose is not.
    """

    def values(x: Array) -> dict[str, Array]:
        sites = target.replace(program=target.program.with_first(x)).measure(jnp.zeros(target.size)).sites
        return {name: sites[name] for name in names}

    sources = Traced(values, message["value"]).sources(frozenset({message["name"]}))
    if moving := [name for name, found in sources.items() if found]:
        raise ValueError(
            f"latent site {in_words(moving)}: its support depends on {message['name']!r}, which ParticleGibbs does not "
            "serve: write it as a function of a latent whose support does not"
        )


@jit_once
def _begin(gibbs: Gibbs, keys: Array) -> GibbsState:
    return jax.lax.map(partial(begin, gibbs), keys)


def _kept(gibbs: Gibbs, states: GibbsState) -> Sweeps:
    """Of all chains, at a sweep."""
    hmc = states.hmc
    return Sweeps(
        jax.vmap(gibbs.sites)(states),
        hmc.diverging,
        hmc.accept_prob,
        hmc.num_steps,
        states.is_new.mean(1),
        states.least_ess.min(1),
        states.accepted,
    )


@partial(jit_once, static_argnames=("num_samples",))
def _room(gibbs: Gibbs, states: GibbsState, num_samples: int) -> Sweeps:
    """For all that will be kept."""
    shapes = jax.eval_shape(_kept, gibbs, states)
    return jax.tree.map(lambda a: jnp.zeros((num_samples, *a.shape), a.dtype), shapes)


@jit_once
def _advance(gibbs: Gibbs, states: GibbsState, sweeps: Sweeps, done: Array, count: Array) -> tuple[GibbsState, Sweeps]:
    """So many sweeps more; those of the warm-up are overwritten by the first that is kept."""

    def one(i: Array, carry: tuple[GibbsState, Sweeps]) -> tuple[GibbsState, Sweeps]:
        states, sweeps = carry
        # one chain after the other: as a batch, all branches of all steps would be taken
        states = jax.lax.map(partial(advance, gibbs), states)
        at = jnp.maximum(i - gibbs.num_warmup, 0)
        return states, jax.tree.map(lambda all_, now: all_.at[at].set(now), sweeps, _kept(gibbs, states))

    return jax.lax.fori_loop(done, done + count, one, (states, sweeps))
