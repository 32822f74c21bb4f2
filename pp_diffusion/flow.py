"""A trained diffusion as a deterministic map from N(0, I) to data, with a density: a NumPyro distribution."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from pp_diffusion.checks import positive_int
from pp_diffusion.divergence import ExactDivergence, Hutchinson
from pp_diffusion.prior import DiffusionPrior
from pp_diffusion.probability_flow import ProbabilityFlow
from pp_diffusion.solvers import TSIT5, Multistep, RungeKutta

#: The largest event whose density is exact unless asked otherwise.
MOST_EXACT = 128


class FlowCheck(NamedTuple):
    """How far a flow's numbers are from those of its ODE, in nats; see :meth:`DiffusionFlow.check`.

    :ivar halved: changes of log p at the flow's own draws when the steps are halved, shape ``(num,)``: the error of
        ``log_prob`` itself, but for a share of one half or less.
    :ivar round_trip: log p as it comes out on the way from the noise, less ``log_prob`` of where it leads.
    :ivar noise: the largest distance of the noise of a draw from that which it was made of.
    :ivar draws: the distance of a draw from that which twice the solver's steps make of the same noise, over the draws'
        standard deviation.
    """

    halved: Array
    round_trip: Array
    noise: Array
    draws: Array

    @property
    def error(self) -> float:
        """The root mean square of the larger of the two errors."""
        return max(float(jnp.sqrt(jnp.mean(e**2))) for e in (self.halved, self.round_trip))

    def print_summary(self) -> None:
        """Both errors, in nats, and the largest."""
        for name, error in (("halved steps", self.halved), ("there and back", self.round_trip)):
            rms, most = jnp.sqrt(jnp.mean(error**2)), jnp.abs(error).max()
            print(f"{name:15s} log p changes by {rms:.2g} nats (root mean square), at most {most:.2g}")
        print(f"{'noise':15s} found again to {jnp.max(self.noise):.2g}")
        rms, most = jnp.sqrt(jnp.mean(self.draws**2)), self.draws.max()
        print(f"{'draws':15s} off by {rms:.2g} of their standard deviation (root mean square), at most {most:.2g}")


class DiffusionFlow(dist.Distribution):
    r"""The probability-flow ODE of a trained diffusion; made by ``diffusion.flow(params)`` or from a prior.

    The same network maps N(0, I) to data, with no noise on the way, and the map carries a density. So ``log_prob`` is a
    number and not a bound, and whatever NumPyro does with a :class:`~numpyro.distributions.MultivariateNormal`, it does
    with this: NUTS on x itself or, by :class:`~pp_diffusion.FlowReparam`, on its noise; SVI and autoguides; mixtures,
    enumeration, plates.

    **A model of its own.** Its density is that of the ODE, neither the chain's of :class:`~pp_diffusion.DiffusionPrior`
    nor its bound; :doc:`flow` says by how much they differ. It is as differentiable as the network, and no
    discretisation is in silence: :meth:`check` measures it.

    **Cost.** A solver's stages, times ``num_steps + 1``, network calls and one more for a draw; for a density also d
    derivatives of each, with d the size of the event (``trace`` makes that less).

    A network that reads the log-SNR, as :class:`~pp_diffusion.networks.MLP` does, is called between the trained levels.
    One that reads the step's number is interpolated between them, with two calls each, as are the parameterizations
    ``"direct"`` and ``"paper"``, whose outputs mean a step of the trained length.

    :param DiffusionPrior prior: whose process, transform and context it takes; Gaussian kernels only.
    :param num_steps: of the solver.
    :param solver: ``None``: Tsitouras' method of order 5, six calls a step. Others of :mod:`pp_diffusion.solvers`, or
        an explicit Runge–Kutta method of diffrax, such as ``diffrax.Heun()``.
    :param sampler: ``None``: draws are by the solver. ``ppd.solvers.Multistep(20)`` makes them of so few network calls;
        they, and with them :class:`~pp_diffusion.FlowReparam`, are then of the sampler's map, while ``log_prob`` stays
        the solver's. :meth:`check` has what that costs.
    :param trace: ``None``: the divergence is exact, for events of up to 128 numbers. ``ppd.Hutchinson(rng_key)``
        estimates it by fixed probes.
    :raises ValueError: for a discrete kernel, or where there is no level between data and noise.

    .. doctest::

        >>> import jax, pp_diffusion as ppd
        >>> diffusion = ppd.Diffusion(  # of N(0, 1): v = 0
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(50), lambda x_t, t: (x_t * 0, x_t * 0)
        ... )
        >>> flow = diffusion.flow({})
        >>> x = flow.sample(jax.random.key(0), (3,))
        >>> normal = jax.scipy.stats.norm.logpdf(x).sum(-1)
        >>> bool(abs(flow.log_prob(x) - normal).max() < 1e-3)
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("prior", "trace")
    pytree_aux_fields = ("num_steps", "solver", "sampler")

    prior: DiffusionPrior
    num_steps: int
    solver: RungeKutta
    sampler: Multistep | None
    trace: Any

    def __init__(
        self,
        prior: DiffusionPrior,
        *,
        num_steps: int = 16,
        solver: Any = None,
        sampler: Multistep | None = None,
        trace: Hutchinson | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(prior, DiffusionPrior):
            raise TypeError(f"prior must be a DiffusionPrior; got {type(prior).__name__}")
        if prior.kernel.is_discrete:
            raise ValueError(
                f"kernel must be continuous: a {type(prior.kernel).__name__} has no flow, because its states are "
                "discrete. Use the prior itself, with pp_diffusion.SMC, lower_bound or estimate_log_prob"
            )
        if prior.space.is_discrete:
            raise ValueError("last_step must not be 'discretized' for a flow: its data have probabilities, no density")
        process = prior.process
        if process.num_timesteps <= process.first_network_step:
            raise ValueError("num_timesteps must be at least 2 where the last step is the kernel's: no network is left")
        self.prior, self.trace = prior, trace
        self.num_steps = positive_int("num_steps", num_steps)
        self.solver = TSIT5 if solver is None else RungeKutta.of(solver)
        if not isinstance(sampler, Multistep | None):
            raise TypeError(f"sampler must be a pp_diffusion.solvers.Multistep or None; got {sampler!r}")
        self.sampler = None if sampler is None else sampler.checked()
        super().__init__(prior.batch_shape, prior.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.prior.support

    @property
    def has_rsample(self) -> bool:
        return True

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise of one x: that of a state of the model's space."""
        return self.prior.kernel.event_shape

    @property
    def transform(self) -> Transform | None:
        """From the model's space to the data's."""
        return self.prior.transform

    @property
    def ode(self) -> ProbabilityFlow:
        """The ODE in the model's space, with the solver's steps."""
        divergence = ExactDivergence() if self.trace is None else self.trace
        return ProbabilityFlow(self.prior.process, self.solver, self.num_steps, divergence, self.sampler)

    @property
    def num_calls(self) -> int:
        """Network calls of a draw, one after another (with a solver, twice as many where they are interpolated)."""
        if self.sampler is not None:
            return self.sampler.num_calls
        return self.solver.num_stages * (self.num_steps + 1) + 1

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of x, of shape ``sample_shape + batch_shape + event_shape``."""
        return self.from_noise(self._noise(key, tuple(sample_shape)))

    def from_noise(self, noise: Array) -> Array:
        """x in data units, of standard normal noise of shape ``(*batch, *noise_shape)``."""
        return _from_noise(self, jnp.asarray(noise, float))

    def to_noise(self, x: Array) -> Array:
        """The noise that x comes from, up to the solver's error."""
        return _to_noise(self, jnp.asarray(x, float))

    @validate_sample
    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """log p(value), in nats, of batch shape: by the change of variables along the ODE.

        :raises ValueError: for events of more than 128 numbers, unless the flow was made with a ``trace``.
        """
        self._check_size()
        return _log_prob(self, jnp.asarray(value, float))

    def check(self, rng_key: Array, num: int = 256) -> FlowCheck:
        """The solver's error at the flow's own draws: by halved steps, and from noise to x and back.

        :param rng_key: a JAX random key.
        :param num: draws for each entry of the batch.
        """
        self._check_size()
        return _check(self, self._noise(rng_key, (positive_int("num", num),)))

    @property
    def mean(self) -> Array:
        """No closed form.

        :raises NotImplementedError: saying how to estimate it.
        """
        raise NotImplementedError("a DiffusionFlow's mean has no closed form: flow.sample(rng_key, (1000,)).mean(0)")

    @property
    def variance(self) -> Array:
        """No closed form.

        :raises NotImplementedError: saying how to estimate it.
        """
        raise NotImplementedError("a DiffusionFlow's variance has no closed form: flow.sample(rng_key, (1000,)).var(0)")

    def _check_size(self) -> None:
        if self.trace is None and (size := prod(self.noise_shape)) > MOST_EXACT:
            raise ValueError(
                f"an exact density of events of {size} numbers takes as many derivatives of each "
                f"network call (the limit is {MOST_EXACT}): make the flow with trace=pp_diffusion.Hutchinson(rng_key, "
                "num_probes), which estimates it, or with trace=pp_diffusion.divergence.ExactDivergence()"
            )

    def _noise(self, rng_key: Array, sample_shape: tuple[int, ...]) -> Array:
        return jax.random.normal(rng_key, sample_shape + self.batch_shape + self.noise_shape)

    def _with_batch(self, x: Array, event_shape: tuple[int, ...]) -> Array:
        batch_shape = x.shape[: x.ndim - len(event_shape)]
        return jnp.broadcast_to(x, jnp.broadcast_shapes(batch_shape, self.batch_shape) + event_shape)


@jax.jit
def _from_noise(flow: DiffusionFlow, noise: Array) -> Array:
    x = flow.ode.from_noise(flow._with_batch(noise, flow.noise_shape))
    return flow.prior.space.to_data(x)


@jax.jit
def _to_noise(flow: DiffusionFlow, x: Array) -> Array:
    x = flow._with_batch(x, flow.event_shape)
    return flow.ode.to_noise(flow.prior.space.to_model(x))


@jax.jit
def _log_prob(flow: DiffusionFlow, x: Array) -> Array:
    x = flow._with_batch(x, flow.event_shape)
    z = flow.prior.space.to_model(x)
    return flow.ode.log_prob(z) - flow.prior.space.log_abs_det(z, x)


@jax.jit
def _check(flow: DiffusionFlow, noise: Array) -> FlowCheck:
    ode = flow.ode
    x, on_the_way = ode.from_noise_with_log_prob(noise)
    log_prob = ode.log_prob(x)
    finer = ode.replace(num_steps=2 * flow.num_steps, sampler=None)
    axes = tuple(range(-len(flow.event_shape), 0)) or None
    distance = jnp.abs(ode.to_noise(x) - noise).max(axes)
    drawn, fine = (flow.prior.space.to_data(o.from_noise(noise)) for o in (ode, finer))
    off = jnp.sqrt(jnp.square((drawn - fine) / fine.std(0)).mean(axes))
    return FlowCheck(finer.log_prob(x) - log_prob, on_the_way - log_prob, distance, off)
