"""A trained diffusion as a NumPyro distribution."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from pp_diffusion.chain import sample_chain
from pp_diffusion.checks import check_key, positive_int
from pp_diffusion.contexts import batch_shape_of, encoded
from pp_diffusion.covariates import Covariates
from pp_diffusion.data_space import DataSpace
from pp_diffusion.frozen import Frozen, value_of
from pp_diffusion.kernels import Kernel
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.uncomputed import uncomputed

_NO_MOMENTS = (
    "a DiffusionPrior's {} is an integral over trajectories, and has no closed form. Estimate it from draws: "
    "prior.sample(rng_key, (10_000,)).{}(0)"
)

_NO_LOG_PROB = (
    "a DiffusionPrior's log density is an integral over trajectories, and is not estimated in silence. The same "
    "network has a density as a flow, diffusion.flow(params), which works with NUTS and SVI. "
    "For a posterior in a model with a site numpyro.sample(name, prior), use pp_diffusion.SMC(model, ...), "
    "or NUTS over the trajectory's noise: "
    "numpyro.handlers.reparam(model, config={name: pp_diffusion.TrajectoryReparam()}). "
    "For a density value, use pp_diffusion.lower_bound, or make the prior with "
    "log_prob=pp_diffusion.Bound(rng_key) (a lower bound) or "
    "log_prob=pp_diffusion.Importance(rng_key, num_trajectories)"
)


class DiffusionPrior(dist.Distribution):
    r"""The density that a trained diffusion defines over x, in data units; made by ``diffusion.prior(params)``.

    For ``numpyro.sample("x", prior)`` in a model, under plates, ``jit`` and ``vmap``; a pytree whose leaves are all
    the arrays it holds. Sampling costs T network calls.

    It holds the reverse process, with its parameters and covariates, and the transform.

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

    :param ReverseProcess process: the reverse process in the model's space.
    :param transform: from the model's space to the data's.
    :param covariates: what encodes a context; ``None`` takes it as it is.
    :param log_prob: ``None``, :class:`~pp_diffusion.Bound` or :class:`~pp_diffusion.Importance`.
    :param validate_args: as for any NumPyro distribution.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("process", "transform", "covariates", "log_prob_rule")

    process: ReverseProcess
    transform: Transform | None
    covariates: Covariates | None
    log_prob_rule: Any

    def __init__(
        self,
        process: ReverseProcess,
        transform: Transform | None = None,
        *,
        covariates: Covariates | None = None,
        log_prob: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        if log_prob is not None and (isinstance(log_prob, type) or not hasattr(log_prob, "log_prob")):
            raise TypeError(
                f"log_prob must be None, ppd.Bound(rng_key) or ppd.Importance(rng_key, n); got {log_prob!r}"
            )
        self.process, self.transform, self.covariates = process.checked(), transform, covariates
        self.log_prob_rule = log_prob
        batch_shape = batch_shape_of(process.context, process.context_batch_ndim)
        super().__init__(batch_shape, self.space.event_shape, validate_args=validate_args)

    @property
    def kernel(self) -> Kernel:
        """The diffusion kernel."""
        return self.process.kernel

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.process.num_timesteps

    @property
    def context(self) -> Any:
        """The covariates, as the network gets them."""
        return self.process.context

    @property
    def space(self) -> DataSpace:
        """Where the data live: the model's space and the data's units."""
        return self.process.last_step.space(self.kernel, self.transform)

    @property
    def support(self) -> constraints.Constraint:
        return self.space.support

    @property
    def has_rsample(self) -> bool:
        return not self.space.is_discrete

    def with_context(self, context: Any, context_event_dim: int | None = None) -> DiffusionPrior:
        """With other covariates; arguments as for :meth:`Diffusion.prior`."""
        process = self.process.with_context(*encoded(self.covariates, context, context_event_dim))
        return self._with(process, self.log_prob_rule)

    def guided(self, strength: float) -> DiffusionPrior:
        r"""With steps led beyond those that the context tells, away from those without one.

        Of strength w, a step is about :math:`p(x_{t-1} \mid x_t)^{1-w}\, p(x_{t-1} \mid x_t, c)^w`: its mean (the
        logits of bits) is w times as far from that without the context, at two network calls. 1 is the prior itself,
        0 the one without a context.

        It is biased by intent. For w > 1 draws are narrower than :math:`p(x \mid c)` and nearer to what tells c from
        others; and they are not those of :math:`p(x)^{1-w}\, p(x \mid c)^w` either, because a product of steps is not
        the step of a product. It is a chain of its own all the same: K, log p and SMC's posteriors are right for it.

        :param strength: w, finite.
        :raises ValueError: where training never dropped the context, by ``fit(..., context_drop=)``; or for the prior
            without one.
        """
        if self.covariates is None or self.context is None or not self.covariates.drop:
            raise ValueError("guidance needs a prior with a context, of fit(..., context_drop=0.1)")
        if not isinstance(strength, jax.core.Tracer) and not np.isfinite(strength):
            raise ValueError(f"strength must be a finite number; got {strength}")
        return self._with(self.process.replace(guidance=jnp.asarray(strength, float)), self.log_prob_rule)

    def with_log_prob(self, log_prob: Any) -> DiffusionPrior:
        """With this rule for its log_prob, as for :meth:`Diffusion.prior`."""
        return self._with(self.process, log_prob)

    def shortened(self, num_timesteps: int) -> DiffusionPrior:
        """A shorter chain through this one's steps: a model of its own, with its own K."""
        return self._with(self.process.shortened(positive_int("num_timesteps", num_timesteps)), self.log_prob_rule)

    def of_rows(self, context: Any) -> DiffusionPrior:
        """With one of these covariates for each row; nothing is checked."""
        batch_ndim = self.process.context_batch_ndim if context is None else 1
        new = copy.copy(self)
        new.process = self.process.with_context(context, batch_ndim)
        new._batch_shape = batch_shape_of(context, batch_ndim)
        return new

    def _with(self, process: ReverseProcess, log_prob: Any) -> DiffusionPrior:
        validate_args = vars(self).get("_validate_args")  # this one's own, not its class's
        return DiffusionPrior(
            process, self.transform, covariates=self.covariates, log_prob=log_prob, validate_args=validate_args
        )

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and value_of(self) == value_of(other))

    def __hash__(self) -> int:
        return hash(value_of(self))

    @property
    def mean(self) -> Array:
        """Not to be had.

        :raises NotImplementedError: always, saying how to estimate it.
        """
        raise NotImplementedError(_NO_MOMENTS.format("mean", "mean"))

    @property
    def variance(self) -> Array:
        """Not to be had.

        :raises NotImplementedError: always, saying how to estimate it.
        """
        raise NotImplementedError(_NO_MOMENTS.format("variance", "var"))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of x by the reverse trajectory, of shape ``sample_shape + batch_shape + event_shape``.

        :raises TypeError: if ``key`` is no JAX random key.
        """
        check_key(key, "key")
        return _sample(self, key, tuple(sample_shape))

    @validate_sample
    def log_prob(self, value: Array, intermediates: None = None) -> Array:
        """The rule's estimate of log p(value), in nats, of batch shape.

        A deterministic function of the array ``value``; each row of it has its own fixed noise.

        :raises NotImplementedError: if the prior was made without such a rule.
        """
        if self.log_prob_rule is None:
            batch = jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
            return uncomputed(_NO_LOG_PROB, jnp.broadcast_shapes(batch, self.batch_shape), (value, self))
        return self.log_prob_rule.log_prob(self, value)


class ConditionalPrior(Frozen):
    """What a diffusion that was trained with a context defines: for each context, a prior.

    :class:`~pp_diffusion.DiffusionPrior` of it by a call. :func:`~pp_diffusion.save` writes it without an example.

    .. doctest::

        >>> import jax, numpy as np, pp_diffusion as ppd
        >>> kind = np.array(["oak", "elm"] * 20)
        >>> diffusion = ppd.Diffusion(
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(10), ppd.networks.MLP((8,))
        ... )
        >>> x = jax.random.normal(jax.random.key(0), (40, 2))
        >>> fit = ppd.fit(jax.random.key(1), diffusion, x, context=kind, num_steps=2, progress_bar=False)
        >>> fit.prior("oak").batch_shape, fit.prior(["oak", "elm", "oak"]).batch_shape
        ((), (3,))

    :param process: the reverse process, without a context.
    :param transform: from the model's space to the data's.
    :param covariates: what encodes a context.
    """

    data_fields = ("process", "transform", "covariates")

    process: ReverseProcess
    transform: Transform | None
    covariates: Covariates

    def __init__(self, process: ReverseProcess, transform: Transform | None, covariates: Covariates) -> None:
        self._set(process=process, transform=transform, covariates=covariates)

    def __call__(self, context: Any, *, log_prob: Any = None, validate_args: bool | None = None) -> DiffusionPrior:
        """The prior given this context.

        :param context: as in training, with any batch axes in front; ``None`` is the prior without one.
        :param log_prob, validate_args: as for :meth:`Diffusion.prior`.
        :raises TypeError, ValueError: naming ``context``, where it is not such as in training was; for ``None``, where
            training never dropped it.
        """
        process = self.process.with_context(*encoded(self.covariates, context))
        return DiffusionPrior(
            process, self.transform, covariates=self.covariates, log_prob=log_prob, validate_args=validate_args
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(DiffusionPrior, name):
            raise AttributeError(f"ConditionalPrior has no {name!r}")
        raise AttributeError(f"context is needed: this is a function of it, so use prior(context).{name}")


@partial(jax.jit, static_argnames="sample_shape")
def _sample(prior: DiffusionPrior, rng_key: Array, sample_shape: tuple[int, ...]) -> Array:
    return prior.space.to_data(sample_chain(rng_key, prior.process, sample_shape + prior.batch_shape))


def check_prior(prior: Any) -> None:
    """Refuses what is no prior.

    :raises TypeError: naming ``prior``.
    """
    if not isinstance(prior, DiffusionPrior):
        advice = ", of which there is one for each context: use fit.prior(context)"
        raise TypeError(
            f"prior must be a DiffusionPrior, such as fit.prior; got {type(prior).__name__}"
            + (advice if isinstance(prior, ConditionalPrior) else "")
        )
