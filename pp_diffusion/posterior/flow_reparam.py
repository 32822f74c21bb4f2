"""A flow's site in terms of its noise: NUTS and guides over the d numbers of N(0, I)."""

from __future__ import annotations

from typing import Any

from jax import Array

from pp_diffusion.flow import DiffusionFlow
from pp_diffusion.posterior.noise_reparam import NoiseReparam
from pp_diffusion.prior import DiffusionPrior


class FlowReparam(NoiseReparam):
    r"""Replaces ``numpyro.sample(name, flow)`` by standard normal noise and the map from it to x.

    The noise is the sample site ``f"{name}_noise"``, of x's shape; x becomes a deterministic site, in data units. The
    geometry that NUTS then meets is that of N(0, I) wherever the data say little, and no divergence is computed: a
    gradient costs what one of a draw does. Modes that are far apart stay apart, though, and R-hat over several chains
    says so.

    Plates, ``expand`` and ``to_event`` are kept; the flow may depend on other sites, through its ``context`` say. An
    observed site is left as it is: a flow has a density.

    :raises ValueError: at the site, if it is masked, scaled, or in a subsampled plate, where noise and x do not have
        the same meaning.
    :raises TypeError: at the site, if its distribution is no :class:`~pp_diffusion.DiffusionFlow`.

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> from numpyro.infer import MCMC, NUTS
        >>> diffusion = ppd.Diffusion(
        ...     ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(20), lambda x_t, t: (x_t * 0, x_t * 0)
        ... )
        >>> flow = diffusion.flow({}, num_steps=4)
        >>> def model(y=None):
        ...     x = numpyro.sample("x", flow)
        ...     numpyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)
        >>> kernel = NUTS(numpyro.handlers.reparam(model, config={"x": ppd.FlowReparam()}))
        >>> mcmc = MCMC(kernel, num_warmup=20, num_samples=30, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), y=3.0)
        >>> {name: draws.shape for name, draws in mcmc.get_samples().items()}
        {'x': (30, 2), 'x_noise': (30, 2)}
    """

    law_type = DiffusionFlow

    def instead(self, law: Any) -> str:
        """A prior has a strategy of its own."""
        return ". For a DiffusionPrior, use pp_diffusion.TrajectoryReparam" if isinstance(law, DiffusionPrior) else ""

    def noise_shape(self, law: DiffusionFlow) -> tuple[int, ...]:
        """That of a state of the model's space."""
        return law.noise_shape

    def from_noise(self, law: DiffusionFlow, noise: Array) -> Array:
        """x, by the flow's map."""
        return law.from_noise(noise)
