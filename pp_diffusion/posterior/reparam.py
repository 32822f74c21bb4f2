"""A prior's site in terms of the noise of its whole trajectory, for NUTS and for continuous guides."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from pp_diffusion.chain import walk
from pp_diffusion.flow import DiffusionFlow
from pp_diffusion.posterior.noise_reparam import NoiseReparam
from pp_diffusion.prior import DiffusionPrior


class TrajectoryReparam(NoiseReparam):
    r"""Replaces ``numpyro.sample(name, prior)`` by the standard normal noise of the trajectory behind it.

    .. math::
        x_T = \epsilon_T, \qquad x_{t-1} = f_\mu(x_t, t) + \sqrt{f_\Sigma(x_t, t)}\, \epsilon_{t-1}, \qquad t = T…1

    (eqs. 4–5, the generative model, with its Gaussian steps written out; the last step as the diffusion's
    ``last_step`` says.) The noise is the sample site ``f"{name}_noise"``, of event shape ``(T + 1, *event_shape)``,
    entry t being :math:`\epsilon_t`; x becomes a deterministic site, in data units. As the map from noise to x is
    differentiable and the noise has a density, the model then works with :class:`~numpyro.infer.NUTS` and with
    :class:`~numpyro.infer.SVI` and an autoguide, and NUTS is right up to its own error: nothing about the prior is
    approximated.

    For Gaussian kernels. Plates, ``prior.expand`` and ``prior.to_event`` are kept; the prior may depend on other
    sites, through its ``context`` say.

    **Cost.** T network calls, one after another, for a density; for its gradient T more and their derivatives, because
    networks are run again rather than stored, so that memory grows by a state for each step. NUTS takes up to 1023
    gradients for a draw. ``diffusion.prior(params, num_timesteps=20)`` makes a shorter chain, which is its own model.

    **The noise among the draws.** NumPyro stores what it samples, here T + 1 times as much as x. With
    ``extra_fields=("~z.x_noise",)``, MCMC's own way to leave a site out, ``mcmc.get_samples()`` holds x and the other
    latents only. What comes after takes x from there: ``Predictive``, ``log_likelihood`` and ``az.from_numpyro(mcmc)``,
    with the model or the reparameterised one. ``mcmc.print_summary(exclude_deterministic=False)`` has x.

    :raises ValueError: at the site, if the prior is discrete (use ``pp_diffusion.SMC``), or if the site is observed,
        masked, scaled, or in a subsampled plate, where noise and x do not have the same meaning.
    :raises TypeError: at the site, if its distribution is no :class:`~pp_diffusion.DiffusionPrior`.

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> from numpyro.infer import MCMC, NUTS
        >>> diffusion = ppd.Diffusion(
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule.constant_erasure(5), lambda x_t, t: (x_t * 0, x_t * 0)
        ... )
        >>> def model(y=None):
        ...     x = numpyro.sample("x", diffusion.prior({}))
        ...     numpyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)
        >>> kernel = NUTS(numpyro.handlers.reparam(model, config={"x": ppd.TrajectoryReparam()}))
        >>> mcmc = MCMC(kernel, num_warmup=20, num_samples=30, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), y=3.0, extra_fields=("~z.x_noise",))
        >>> {name: draws.shape for name, draws in mcmc.get_samples().items()}
        {'x': (30, 2)}
    """

    law_type = DiffusionPrior

    def observed(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[dist.Distribution, Any]:
        """Refused: x does not tell its noise."""
        raise ValueError(
            f"site {name!r} is observed, and TrajectoryReparam is for latent sites: x does not tell its noise. For "
            "the density of data, use pp_diffusion.estimate_log_prob"
        )

    def instead(self, law: Any) -> str:
        """A flow has a strategy of its own."""
        return ". For a DiffusionFlow, use pp_diffusion.FlowReparam" if isinstance(law, DiffusionFlow) else ""

    def check(self, name: str, law: DiffusionPrior) -> None:
        """Refuses discrete priors."""
        if law.kernel.support.is_discrete:
            raise ValueError(
                f"site {name!r} has a {type(law.kernel).__name__}, whose draws are discrete: TrajectoryReparam is for "
                "Gaussian kernels. Use pp_diffusion.SMC(model, ...)"
            )
        if law.support.is_discrete:
            raise ValueError(
                f"site {name!r} has last_step='discretized', whose draws are integers: TrajectoryReparam is for "
                "continuous priors"
            )

    def noise_shape(self, law: DiffusionPrior) -> tuple[int, ...]:
        """T + 1 states of the model's space."""
        return (law.num_timesteps + 1, *law.kernel.event_shape)

    def from_noise(self, law: DiffusionPrior, noise: Array) -> Array:
        """x, by the whole trajectory."""
        batch_shape = noise.shape[: noise.ndim - 1 - len(law.event_shape)]
        batch_shape = jnp.broadcast_shapes(batch_shape, law.batch_shape)
        return _from_noise(law, jnp.broadcast_to(noise, batch_shape + self.noise_shape(law)))


@jax.jit
def _from_noise(prior: DiffusionPrior, noise: Array) -> Array:
    """x in data units, of shape ``(*batch, *event_shape)``, from noise of shape ``(*batch, T + 1, *event_shape)``."""
    process, kernel = prior.process, prior.kernel
    noise = jnp.moveaxis(noise, -1 - kernel.event_ndim, 0)
    x_end = kernel.from_noise(kernel.stationary(), noise[-1])
    return prior.space.to_data(walk(process, kernel.from_noise, x_end, noise[:-1]))
