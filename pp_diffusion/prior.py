"""A trained diffusion as a NumPyro distribution."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from pp_diffusion.checks import positive_int
from pp_diffusion.kernels import Kernel
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.trajectories import sample_chain

if TYPE_CHECKING:
    from pp_diffusion.diffusion import Diffusion


class DiffusionPrior(dist.Distribution):
    r"""The density that a trained diffusion defines over x, in data units; made by ``diffusion.prior(params)``.

    For ``numpyro.sample("x", prior)`` in a model, under plates, ``jit`` and ``vmap``; a pytree whose leaves are all
    the arrays it holds. Sampling costs T network calls.

    The density itself is an integral over trajectories. :meth:`log_prob` therefore raises, unless the prior was made
    with ``log_prob=ppd.Bound(rng_key)`` or ``ppd.Importance(rng_key, num_trajectories)``.

    .. doctest::

        >>> import jax, pp_diffusion as ppd
        >>> diffusion = ppd.Diffusion(
        ...     ppd.GaussianKernel((3,)), ppd.FixedSchedule.constant_erasure(10), lambda x_t, t: (x_t * 0, x_t * 0)
        ... )
        >>> prior = diffusion.prior({})
        >>> prior.sample(jax.random.key(0), (4,)).shape, prior.event_shape
        ((4, 3), (3,))
    """

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("diffusion", "params", "context", "log_prob_rule")
    pytree_aux_fields = ("num_timesteps", "context_batch_ndim")

    diffusion: Diffusion
    params: dict[str, Any]
    context: Any
    log_prob_rule: Any
    num_timesteps: int
    context_batch_ndim: int

    def __init__(
        self,
        diffusion: Diffusion,
        params: dict[str, Any],
        *,
        context: Any = None,
        num_timesteps: int | None = None,
        log_prob: Any = None,
        context_event_dim: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if log_prob is not None and (isinstance(log_prob, type) or not hasattr(log_prob, "log_prob")):
            raise TypeError(
                f"log_prob must be None, ppd.Bound(rng_key) or ppd.Importance(rng_key, n); got {log_prob!r}"
            )
        self.diffusion, self.params = diffusion, params
        self.context, self.log_prob_rule = context, log_prob
        self.num_timesteps = (
            diffusion.num_timesteps if num_timesteps is None else positive_int("num_timesteps", num_timesteps)
        )
        self.context_batch_ndim = _context_batch_ndim(diffusion, params, context, num_timesteps, context_event_dim)
        batch_shapes = [jnp.shape(leaf)[: self.context_batch_ndim] for leaf in jax.tree.leaves(context)]
        super().__init__(jnp.broadcast_shapes((), *batch_shapes), diffusion.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.diffusion.support

    @property
    def has_rsample(self) -> bool:
        return not self.diffusion.kernel.is_discrete

    @property
    def kernel(self) -> Kernel:
        """The diffusion kernel."""
        return self.diffusion.kernel

    @property
    def transform(self) -> Transform | None:
        """From the model's space to the data's."""
        return self.diffusion.transform

    @property
    def process(self) -> ReverseProcess:
        """The reverse process in the model's space."""
        return self.diffusion.reverse_process(
            self.params,
            context=self.context,
            context_batch_ndim=self.context_batch_ndim,
            num_timesteps=self.num_timesteps,
        )

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of x by the reverse trajectory, of shape ``sample_shape + batch_shape + event_shape``."""
        return _sample(self, key, tuple(sample_shape))

    @validate_sample
    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """The rule's estimate of log p(value), in nats, of batch shape.

        A deterministic function of the array ``value``; each row of it has its own fixed noise.

        :raises NotImplementedError: if the prior was made without such a rule.
        """
        if self.log_prob_rule is None:
            raise NotImplementedError(
                "a DiffusionPrior's log density is an integral over trajectories, and is not estimated in silence. "
                "For a posterior in a model with a site numpyro.sample(name, prior), use pp_diffusion.SMC(model, ...), "
                "or NUTS over the trajectory's noise: "
                "numpyro.handlers.reparam(model, config={name: pp_diffusion.TrajectoryReparam()}). "
                "For a density value, use pp_diffusion.lower_bound, or make the prior with "
                "log_prob=pp_diffusion.Bound(rng_key) (a lower bound) or "
                "log_prob=pp_diffusion.Importance(rng_key, num_trajectories)"
            )
        return self.log_prob_rule.log_prob(self, value)


@partial(jax.jit, static_argnames="sample_shape")
def _sample(prior: DiffusionPrior, rng_key: Array, sample_shape: tuple[int, ...]) -> Array:
    x = sample_chain(rng_key, prior.process, sample_shape + prior.batch_shape)
    transform = prior.diffusion.transform
    return x if transform is None else transform(x)


def as_rows(prior: DiffusionPrior, x: Array) -> tuple[Array, Any, tuple[int, ...]]:
    """Data and contexts as rows of one leading axis, and the batch shape that they came in.

    :raises ValueError: if the data's batch shape does not broadcast with the prior's.
    """
    event_ndim, context_ndim = prior.diffusion.kernel.event_ndim, prior.context_batch_ndim
    batch_shape = x.shape[: x.ndim - event_ndim]
    try:
        batch_shape = jnp.broadcast_shapes(batch_shape, prior.batch_shape)
    except ValueError:
        raise ValueError(
            f"x has batch shape {batch_shape}, which does not broadcast with the prior's, {prior.batch_shape}"
        ) from None

    def rows(a: Array, trailing: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(a, batch_shape + trailing).reshape(-1, *trailing)

    contexts = jax.tree.map(lambda c: rows(jnp.asarray(c), jnp.shape(c)[context_ndim:]), prior.context)
    return rows(x, prior.event_shape), contexts, batch_shape


def _context_batch_ndim(
    diffusion: Diffusion, params: Any, context: Any, num_timesteps: int | None, event_dim: int | None
) -> int:
    """How many leading axes of ``context`` are batch axes: all but ``event_dim``, or what the network can take.

    :raises ValueError: if the network takes the context in more than one way, or in none.
    """
    most = min((jnp.ndim(leaf) for leaf in jax.tree.leaves(context)), default=0)
    if event_dim is not None and not 0 <= event_dim <= most:
        raise ValueError(f"context_event_dim must be in 0…{most}; got {event_dim}")
    fits: list[int] = []
    complaint: Exception | None = None
    for batch_ndim in range(most + 1) if event_dim is None else [most - event_dim]:
        try:
            diffusion.reverse_process(
                params, context=context, context_batch_ndim=batch_ndim, num_timesteps=num_timesteps
            )
            fits.append(batch_ndim)
        except Exception as error:  # the network's own complaint about shapes, of whatever type
            if complaint is None or error.__cause__ is not None:  # parameters that do not fit say most
                complaint = error
    if complaint is not None and not fits:
        raise complaint
    if len(fits) > 1:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(context)]
        raise ValueError(
            f"context of shape {', '.join(map(str, shapes))} is ambiguous: the network takes its first "
            f"{' or '.join(map(str, fits))} axes as batch axes; give context_event_dim, the number of the others"
        )
    return fits[0]
