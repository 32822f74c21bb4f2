"""Posterior and evidence of any continuous NumPyro model, by particles that go from its prior to its posterior."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax import Array

from pp_diffusion.checks import check_key, positive_int, typed_key
from pp_diffusion.posterior.facade import LatentRun, LatentSampler, plain_estimate
from pp_diffusion.posterior.target import Target, read_target
from pp_diffusion.posterior.tempering import MOST_TEMPERATURES, Moves, TemperedState, start, temper
from pp_diffusion.posterior.verdicts import COLLAPSED, Plain, Verdict
from pp_diffusion.sharding import as_layout


class TemperedRun(LatentRun):
    """The outcome of a run.

    :param state: of all chains, which are the first axis.
    :param samples: all latent and deterministic sites, chain by chain.
    :param observed: what was observed.
    :param model: the user's model with its arguments bound.
    :param plain: a second estimate of the evidence, by the draws of the prior that the particles started from.
    """

    def __init__(
        self,
        state: TemperedState,
        samples: dict[str, Array],
        observed: dict[str, Array],
        model: Callable[[], Any],
        plain: Plain,
    ) -> None:
        self.state = state
        pool_key = jax.random.fold_in(state.rng_key[0], 1)
        found = state.position, state.log_evidence, state.ess, state.least_ess
        super().__init__(*found, samples, observed, model, plain, pool_key)

    @property
    def advice(self) -> str:
        return "take more particles, or more moves at each temperature"

    @cached_property
    def verdicts(self) -> list[Verdict]:
        (found,) = super().verdicts
        cold = int(np.sum(np.asarray(self.state.temperature) < 1))
        if not cold:
            return [found]
        reason = f"{cold} of {self.num_chains} chains did not come to the end in {MOST_TEMPERATURES} temperatures"
        return [Verdict(COLLAPSED, (*found.reasons, reason))]

    def particles_in_words(self) -> str:
        """With the temperatures that they went through."""
        state = self.state
        return (
            f"{self.num_particles} particles in {self.num_chains} chains; {int(state.num_temperatures.max())} "
            f"temperatures, at the last of which {float(state.ess.min()):.0f} were effective and "
            f"{float(state.acceptance.mean()):.2f} of the moves accepted"
        )


class TemperedSMC(LatentSampler):
    r"""Particles from p to p·r by way of :math:`p\, r^\beta`, :math:`\beta` from 0 to 1 by steps that keep the weights
    even; used like :class:`~pp_diffusion.SMC`.

    For a model with a :class:`~pp_diffusion.DiffusionFlow` and whatever other continuous latents, also such that the
    flow depends on. With :class:`~pp_diffusion.FlowReparam` the particles live in the flow's noise, where p is N(0, I)
    and modes are as near to each other as they can be. Particles find modes by the prior's draws, and the share of each
    by their weights, which no chain of NUTS does; at each temperature they are resampled and then moved by Hamiltonian
    steps, scaled to the particles.

    A run is judged as one of :class:`~pp_diffusion.SMC`: by how far its chains agree, and by the plain draws of the
    prior that it starts from.

    :param model: the model, all of whose latents are continuous (enumeration is not supported here).
    :param num_particles: of each chain.
    :param num_chains: independent runs; from 8 on, their spread gives ``log_evidence_error``.
    :param ess_threshold: the share of the particles that one step of the temperature leaves as effective ones.
    :param num_moves: Hamiltonian moves at each temperature.
    :param num_leapfrog: their length, in gradients.
    :param mesh: devices over whose axis ``"data"`` the chains are spread, ``jax.make_mesh((n,), ("data",))``.

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> smc = ppd.TemperedSMC(model, num_particles=500)
        >>> smc.run(jax.random.key(0), 2.0)
        >>> bool(abs(smc.log_evidence - dist.Normal(0, 2**0.5).log_prob(2.0)) < 0.1), smc.verdict
        (True, 'believable')
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_particles: int = 500,
        num_chains: int = 8,
        ess_threshold: float = 0.5,
        num_moves: int = 3,
        num_leapfrog: int = 5,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        if not 0 < ess_threshold < 1:
            raise ValueError(f"ess_threshold must be between 0 and 1; got {ess_threshold}")
        super().__init__(num_particles, num_chains)
        self.model = model
        self.layout = as_layout(mesh)
        self.layout.share("num_chains", self.num_chains)
        self.moves = Moves(
            float(ess_threshold), positive_int("num_moves", num_moves), positive_int("num_leapfrog", num_leapfrog)
        )

    def run(self, rng_key: Array, *args: Any, **kwargs: Any) -> None:
        """Runs all chains on these arguments of the model.

        :param rng_key: a JAX random key.
        :raises TypeError: if it is none.
        :raises ValueError: naming the site, where it does not serve the model; or if the likelihood is zero or NaN at
            every particle.
        """
        self._run = None
        check_key(rng_key)
        target = read_target(self.model, args, kwargs)
        keys = self.layout.rows(jax.random.split(typed_key(rng_key), self.num_chains))
        state, samples, observed, log_likelihoods = run_chains(target, keys, self.num_particles, self.moves)
        plain = plain_estimate(log_likelihoods.reshape(-1, 1))
        self._keep(TemperedRun(state, samples, observed, partial(self.model, *args, **kwargs), plain))

    @property
    def state(self) -> TemperedState:
        """The particles at the end, and what is known of the run; each field with the chains in front."""
        found: TemperedState = self._done.state
        return found


@partial(jax.jit, static_argnames=("num_particles", "moves"))
def run_chains(
    target: Target, keys: Array, num_particles: int, moves: Moves
) -> tuple[TemperedState, dict[str, Array], dict[str, Array], Array]:
    """A chain for each key; the sites at its end, what is observed, and the log likelihoods at its start."""

    def chain(rng_key: Array) -> tuple[TemperedState, dict[str, Array], Array]:
        first = start(rng_key, target, num_particles)
        last = temper(target, first, moves)
        return last, jax.vmap(lambda position: target.measure(position).sites)(last.position), first.log_likelihood

    state, samples, log_likelihoods = jax.vmap(chain)(keys)
    observed = target.measure(state.position[0, 0]).observed
    return state, samples, observed, log_likelihoods
