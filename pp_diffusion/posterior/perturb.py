r"""The paper's own composition of a prior with r(x): its chain with perturbed steps (§2.5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from pp_diffusion.chain import walk
from pp_diffusion.prior import DiffusionPrior

_POWERS: dict[str, Callable[[int, int], float]] = {
    "annealed": lambda t, num_timesteps: (num_timesteps - t) / num_timesteps,
    "constant": lambda t, num_timesteps: 1.0,
}


def perturb(
    prior: DiffusionPrior, log_r: Callable[[Array], Array], *, power: str | Callable[[int, int], float]
) -> PerturbedPrior:
    r"""The paper's approximation of :math:`\tilde p(x) \propto p(x)\, r(x)`: each reverse step perturbed by r (§2.5).

    .. math::
        \tilde p(x_{t-1} \mid x_t) \approx \frac{1}{\tilde Z_t(x_t)}\, p(x_{t-1} \mid x_t)\, r_{t-1}(x_{t-1})
        \qquad \text{(eqs. 21–22)}

    and likewise at the end, :math:`x_T \sim \pi`. For a Gaussian kernel the step is
    :math:`N(f_\mu + f_\Sigma \nabla \log r_{t-1}(f_\mu),\ f_\Sigma)` (eq. 61), also where log r is quadratic and the
    product could be had exactly; the gradient is in the model's space, through the transform. For a binomial kernel it
    is, bit by bit, :math:`cd / (cd + (1-c)(1-d))` with :math:`c = f_b` and d the share of r with that bit on (table
    App. 1). There, bits are drawn from :math:`f_b` first and flipped one at a time, so that ``log_r`` is called on bits
    only, never on probabilities: D + 1 times a step for D bits.

    **It does not converge to p·r**, however many steps: it leaves out :math:`\tilde Z_t(x_t)`, of which each differs
    little from :math:`r_t(x_t)` and all T together do not. With p = π = N(0, 1) and r(x) = N(2; x, 1) the
    posterior is N(1, 0.5). As T grows, ``"constant"`` goes to mean 1.333 and variance 0.333, which is p·r² (by p = π:
    no rule in general), and ``"annealed"`` with :math:`\beta_t = 1/(T-t+1)` to 0.924 and 0.432. At T = 100 they are at
    1.343 and 0.338, and at 0.932 and 0.435. With p = N(0, 0.25) ``"constant"`` goes to 0.694 and 0.145, for a posterior
    of 0.400 and 0.200. ``SMC`` keeps these factors as weights, and is right.

    :param DiffusionPrior prior: the prior, without ``expand``: expand the result.
    :param log_r: log r in nats, a JAX function of x in data units, from shape ``(N, *event_shape)`` to ``(N,)``; rows
        do not depend on each other (for a function of one x, :func:`jax.vmap` of it). For a Gaussian kernel it is
        differentiable; for a binomial one it may be −∞.
    :param power: the power of r at each time: :math:`r_t = r^{\mathrm{power}(t, T)}` for t = 0…T. ``"annealed"``,
        :math:`(T-t)/T`; ``"constant"``, 1 (the paper's choice in its experiments); or a function of (t, T). Powers
        other than 1 at t = 0 compose another r.
    :return: a NumPyro distribution over x in data units, to be sampled; ``log_prob`` raises NotImplementedError.
    :raises TypeError: if ``prior`` is no DiffusionPrior, or ``log_r`` or ``power`` are not of these kinds.
    :raises ValueError: if ``log_r`` does not return shape ``(N,)``, or powers are not finite.

    .. doctest::

        >>> import jax, pp_diffusion as ppd
        >>> diffusion = ppd.Diffusion(
        ...     ppd.GaussianKernel((1,)), ppd.FixedSchedule.constant_erasure(100), lambda x_t, t: (x_t * 0, x_t * 0)
        ... )
        >>> perturbed = ppd.perturb(diffusion.prior({}), lambda x: -0.5 * ((x - 2) ** 2).sum(-1), power="annealed")
        >>> x = perturbed.sample(jax.random.key(0), (50_000,))
        >>> f"mean {x.mean():.1f}, where the posterior's is 1.0"
        "mean 0.9, where the posterior's is 1.0"
    """
    if not isinstance(prior, DiffusionPrior):
        raise TypeError(f"prior must be a DiffusionPrior (expand the result, not it); got {type(prior).__name__}")
    if prior.support.is_discrete != prior.kernel.support.is_discrete:
        raise ValueError("prior must have no last_step='discretized' to be perturbed: its last step is over levels")
    if not callable(log_r):
        raise TypeError(f"log_r must be a function of x; got {type(log_r).__name__}")
    _check_log_r(log_r, prior.event_shape)
    return PerturbedPrior(prior, log_r, _powers(power, prior.num_timesteps))


class PerturbedPrior(dist.Distribution):
    """The law of x under the perturbed chain; made by :func:`perturb`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("prior", "log_r", "powers")

    prior: DiffusionPrior
    log_r: jax.tree_util.Partial
    powers: np.ndarray

    def __init__(
        self,
        prior: DiffusionPrior,
        log_r: Callable[[Array], Array],
        powers: np.ndarray,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.prior, self.powers = prior, powers
        self.log_r = log_r if isinstance(log_r, jax.tree_util.Partial) else jax.tree_util.Partial(log_r)
        super().__init__(prior.batch_shape, prior.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.prior.support

    @property
    def has_rsample(self) -> bool:
        return self.prior.has_rsample

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of x, of shape ``sample_shape + batch_shape + event_shape``."""
        return _sample(self, key, tuple(sample_shape))

    def log_prob(self, value: Array, intermediates: None = None) -> NoReturn:
        """Not to be had.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(
            "a perturbed prior has no log density, and is not proportional to p·r. For the posterior and its evidence, "
            "use pp_diffusion.SMC on a model with the prior and log r as a numpyro.factor"
        )


@partial(jax.jit, static_argnames="sample_shape")
def _sample(perturbed: PerturbedPrior, rng_key: Array, sample_shape: tuple[int, ...]) -> Array:
    process, space = perturbed.prior.process, perturbed.prior.space
    kernel, powers = process.kernel, jnp.asarray(perturbed.powers, dtype=float)

    def log_r(z: Array) -> Array:
        rows = perturbed.log_r(space.to_data(z).reshape(-1, *perturbed.event_shape))
        return rows.reshape(kernel.batch_shape_of(z))

    def draw(distribution: dist.Distribution, at: tuple[Array, Array]) -> Array:
        rng_key, power = at
        perturb_key, rng_key = jax.random.split(rng_key)
        # r to the power 0 is 1 also where r is 0
        step = kernel.perturb(perturb_key, distribution, lambda z: jnp.where(power == 0, 0.0, power * log_r(z)))
        return kernel.as_state(step.sample(rng_key))

    keys = jax.random.split(rng_key, process.num_timesteps + 1)  # entry t draws x_t
    x_end = draw(kernel.stationary().expand(sample_shape + perturbed.batch_shape), (keys[-1], powers[-1]))
    return space.to_data(walk(process, draw, x_end, (keys[:-1], powers[:-1])))


def _powers(power: Any, num_timesteps: int) -> np.ndarray:
    """The power at t = 0…T."""
    if isinstance(power, str):
        if power not in _POWERS:
            raise ValueError(f"power must be 'annealed', 'constant' or a function of (t, T); got {power!r}")
        power = _POWERS[power]
    if not callable(power):
        raise TypeError(f"power must be 'annealed', 'constant' or a function of (t, T); got {power!r}")
    values = np.asarray([power(t, num_timesteps) for t in range(num_timesteps + 1)], dtype=np.float64)
    if values.shape != (num_timesteps + 1,) or not np.isfinite(values).all():
        raise ValueError(f"power must return a finite number for each t = 0…{num_timesteps}; got {values}")
    return values


def _check_log_r(log_r: Callable[[Array], Array], event_shape: tuple[int, ...]) -> None:
    num_rows = 1 + max(event_shape, default=1)  # none of the event's own sizes
    out = jax.eval_shape(log_r, jax.ShapeDtypeStruct((num_rows, *event_shape), jnp.result_type(float)))
    if getattr(out, "shape", None) != (num_rows,):
        sizes = "".join(f", {size}" for size in event_shape)
        raise ValueError(
            f"log_r must return shape (N,), one number for each x of (N{sizes}); for N = {num_rows} it returned "
            f"{getattr(out, 'shape', type(out).__name__)}"
        )
