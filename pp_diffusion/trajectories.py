r"""Trajectories :math:`x_1 … x_T`: three NumPyro distributions over whole paths.

A path has event shape ``(T, *event_shape)``, entry t-1 being :math:`x_t`, in the model's space. Paths are drawn by one
``lax.scan`` and scored for all steps at once. :func:`~pp_diffusion.log_weight` needs no path in memory.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from pp_diffusion.chain import draw_state, start, walk_to_x_1
from pp_diffusion.kernels import Kernel
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.schedules import Rates


class Trajectory(dist.Distribution):
    """Base of the path distributions."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    kernel: Kernel
    rates: Rates

    def __init__(self, kernel: Kernel, rates: Rates, batch_shape: tuple[int, ...], validate_args: bool | None) -> None:
        self.kernel, self.rates = kernel, rates
        super().__init__(batch_shape, (rates.num_timesteps, *kernel.event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.kernel.event_support, self.event_dim)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Paths of shape ``sample_shape + batch_shape + (T, *event_shape)``."""
        return _sample_path(self, key, tuple(sample_shape))

    @abstractmethod
    def _sample(self, key: Array, sample_shape: tuple[int, ...]) -> Array:
        raise NotImplementedError

    @property
    def has_rsample(self) -> bool:
        return not self.kernel.is_discrete

    def _expanded(self, batch_shape: tuple[int, ...], **attributes: Any) -> Self:
        # the same class, not ExpandedDistribution, so that the registered KL is found under a plate
        new = copy.copy(self)
        new.__dict__.update(attributes, _batch_shape=tuple(batch_shape))
        return new

    def _time_first(self, path: Array) -> Array:
        return jnp.moveaxis(path, -self.event_dim, 0)

    def _time_behind_batch(self, path: Array) -> Array:
        return jnp.moveaxis(path, 0, -self.event_dim)

    def _steps(self, steps: slice, path: Array) -> Rates:
        """Rates of a slice of the steps, shaped to go with a path whose time axis is first."""
        return self.rates.at(steps).along_leading_axis(path.ndim - self.event_dim)


@partial(jax.jit, static_argnames="sample_shape")
def _sample_path(trajectory: Trajectory, key: Array, sample_shape: tuple[int, ...]) -> Array:
    return trajectory._sample(key, sample_shape)  # jitted here, so that a call outside jit compiles once


class ForwardTrajectory(Trajectory):
    r""":math:`q(x_{1…T} \mid x_0) = \prod_t q(x_t \mid x_{t-1})`, the forward trajectory (eq. 3).

    :param Kernel kernel: the diffusion kernel.
    :param Rates rates: the T steps, as ``schedule.rates(params)`` returns them.
    :param x_0: data in the model's space, shape ``(*batch, *event_shape)``.

    .. doctest::

        >>> import jax, jax.numpy as jnp, pp_diffusion as ppd
        >>> kernel, rates = ppd.GaussianKernel((2,)), ppd.FixedSchedule.constant_erasure(5).rates()
        >>> ppd.ForwardTrajectory(kernel, rates, jnp.zeros((3, 2))).sample(jax.random.key(0)).shape
        (3, 5, 2)
    """

    pytree_data_fields = ("kernel", "rates", "x_0")

    def __init__(self, kernel: Kernel, rates: Rates, x_0: Array, *, validate_args: bool | None = None) -> None:
        self.x_0 = kernel.as_state(x_0)
        super().__init__(kernel, rates, kernel.batch_shape_of(self.x_0), validate_args)

    def expand(self, batch_shape: tuple[int, ...]) -> Self:
        return self._expanded(batch_shape, x_0=jnp.broadcast_to(self.x_0, (*batch_shape, *self.kernel.event_shape)))

    def _sample(self, key: Array, sample_shape: tuple[int, ...]) -> Array:
        x_0 = jnp.broadcast_to(self.x_0, sample_shape + self.x_0.shape)

        def step(x: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            rng_key, beta = at
            x = self.kernel.as_state(self.kernel.transition(x, beta).sample(rng_key))
            return x, x

        keys = jax.random.split(key, self.rates.num_timesteps)
        return self._time_behind_batch(jax.lax.scan(step, x_0, (keys, self.rates.beta))[1])

    @validate_sample
    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        path = self._time_first(self.kernel.as_state(value))
        x_0 = jnp.broadcast_to(self.x_0, path.shape[1:])
        previous = jnp.concatenate([x_0[None], path[:-1]])
        return self.kernel.transition(previous, self._steps(slice(None), path).beta).log_prob(path).sum(0)


class PosteriorTrajectory(Trajectory):
    r""":math:`q(x_T \mid x_0) \prod_{t=2}^T q(x_{t-1} \mid x_t, x_0)`: the forward trajectory, read backwards.

    The same law as :class:`ForwardTrajectory`, in the order of the reverse trajectory, so that KL divergences step by
    step are those of the bound. With ``rng_key`` its KL to a :class:`ReverseTrajectory` is registered with
    :func:`numpyro.distributions.kl_divergence`: analytic over each :math:`x_{t-1}`, and for the :math:`x_t` averaged
    over the path drawn with that key. That is what :class:`~numpyro.infer.TraceMeanField_ELBO` uses; the forward order
    has no KL, so that no ELBO can apply one to it in silence.

    :param Kernel kernel: the diffusion kernel.
    :param Rates rates: the T steps.
    :param x_0: data in the model's space, shape ``(*batch, *event_shape)``.
    :param rng_key: for the KL only; ``numpyro.prng_key()`` inside a guide.
    """

    pytree_data_fields = ("kernel", "rates", "x_0", "rng_key")

    def __init__(
        self,
        kernel: Kernel,
        rates: Rates,
        x_0: Array,
        *,
        rng_key: Array | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.x_0, self.rng_key = kernel.as_state(x_0), rng_key
        super().__init__(kernel, rates, kernel.batch_shape_of(self.x_0), validate_args)

    def expand(self, batch_shape: tuple[int, ...]) -> Self:
        return self._expanded(batch_shape, x_0=jnp.broadcast_to(self.x_0, (*batch_shape, *self.kernel.event_shape)))

    def _sample(self, key: Array, sample_shape: tuple[int, ...]) -> Array:
        x_0 = jnp.broadcast_to(self.x_0, sample_shape + self.x_0.shape)
        end_key, key = jax.random.split(key)
        x_end = self.kernel.as_state(self.kernel.marginal(x_0, self.rates.at(-1).log_snr).sample(end_key))

        def step(x: Array, at: tuple[Array, Rates]) -> tuple[Array, Array]:
            rng_key, rates = at
            x = self.kernel.as_state(self.kernel.posterior(x, x_0, rates).sample(rng_key))
            return x, x

        later = self.rates.at(slice(1, None))
        keys = jax.random.split(key, later.num_timesteps)
        path = jax.lax.scan(step, x_end, (keys, later), reverse=True)[1]
        return self._time_behind_batch(jnp.concatenate([path, x_end[None]]))

    @validate_sample
    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        path = self._time_first(self.kernel.as_state(value))
        x_0 = jnp.broadcast_to(self.x_0, path.shape[1:])
        end = self.kernel.marginal(x_0, self.rates.at(-1).log_snr).log_prob(path[-1])
        if self.rates.num_timesteps == 1:
            return end
        steps = self._steps(slice(1, None), path)
        return end + self.kernel.posterior(path[1:], x_0[None], steps).log_prob(path[:-1]).sum(0)


class ReverseTrajectory(Trajectory):
    r""":math:`\pi(x_T) \prod_{t=2}^T p(x_{t-1} \mid x_t)`, the generative model's path down to :math:`x_1` (eq. 5).

    The last step :math:`p(x_0 \mid x_1)` is the site below it.

    :param Kernel kernel: the diffusion kernel.
    :param Rates rates: the T steps.
    :param reverse: ``reverse(x_t, rates)`` returns the distribution of :math:`x_{t-1}`; the fields of ``rates``
        broadcast against the batch axes of ``x_t``. A :class:`~pp_diffusion.reverse.ReverseProcess`, or any function
        (a :class:`jax.tree_util.Partial` where the object has to cross ``jit`` or ``vmap``).
    :param tuple batch_shape: independent paths, for a reverse process with a batch of contexts.
    """

    pytree_data_fields = ("kernel", "rates", "reverse")

    def __init__(
        self,
        kernel: Kernel,
        rates: Rates,
        reverse: Callable[[Array, Rates], dist.Distribution],
        *,
        batch_shape: tuple[int, ...] = (),
        validate_args: bool | None = None,
    ) -> None:
        # a pytree, so that its parameters are leaves
        self.reverse = reverse if isinstance(reverse, ReverseProcess) else jax.tree_util.Partial(reverse)
        super().__init__(kernel, rates, batch_shape, validate_args)

    def expand(self, batch_shape: tuple[int, ...]) -> Self:
        return self._expanded(batch_shape)

    def _sample(self, key: Array, sample_shape: tuple[int, ...]) -> Array:
        x_end, keys = start(key, self.kernel, self.rates, sample_shape + self.batch_shape)
        _, path = walk_to_x_1(self.reverse, self.rates, draw_state(self.kernel), x_end, keys, keep_path=True)
        assert path is not None
        return self._time_behind_batch(jnp.concatenate([path, x_end[None]]))

    @validate_sample
    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        path = self._time_first(self.kernel.as_state(value))
        end = self.kernel.stationary().log_prob(path[-1])
        if self.rates.num_timesteps == 1:
            return end
        return end + self.reverse(path[1:], self._steps(slice(1, None), path)).log_prob(path[:-1]).sum(0)


@dist.kl_divergence.register(PosteriorTrajectory, ReverseTrajectory)
def _kl_posterior_reverse(q: PosteriorTrajectory, p: ReverseTrajectory) -> Array:
    if q.rng_key is None:
        raise NotImplementedError("PosteriorTrajectory needs rng_key for its KL")  # ELBOs then use the log ratio
    path = q._time_first(q.sample(q.rng_key))
    kl = q.kernel.prior_kl(q.x_0, q.rates.at(-1).log_snr)
    if q.rates.num_timesteps == 1:
        return kl
    steps = q._steps(slice(1, None), path)
    return kl + q.kernel.kl(q.kernel.posterior(path[1:], q.x_0[None], steps), p.reverse(path[1:], steps)).sum(0)
