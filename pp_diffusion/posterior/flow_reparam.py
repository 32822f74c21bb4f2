"""A flow's site in terms of its noise: NUTS and guides over the d numbers of N(0, I)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.infer.reparam import Reparam

from pp_diffusion.flow import DiffusionFlow
from pp_diffusion.posterior.substituted import substituted


class FlowReparam(Reparam):
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

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[dist.Distribution | None, Array | None]:
        """The value of the site, as NumPyro's ``reparam`` handler asks for it."""
        if obs is not None:
            return fn, obs
        flow, batch_shape, event_dim = self._unwrap(fn)
        if isinstance(flow, dist.MaskedDistribution) or not isinstance(numpyro.get_mask(), bool | None):
            raise ValueError(f"site {name!r} is masked, which FlowReparam does not support: mask its likelihood")
        if not isinstance(flow, DiffusionFlow):
            raise TypeError(
                f"FlowReparam needs a DiffusionFlow at site {name!r}, expanded or with to_event; got a "
                f"{type(flow).__name__}. For a DiffusionPrior, use pp_diffusion.TrajectoryReparam"
            )
        if (x := substituted(name)) is not None and substituted(f"{name}_noise") is None:
            return None, jnp.asarray(x)  # draws from which the noise was left out
        standard_normal = dist.Normal(0.0, 1.0).expand((*batch_shape, *flow.event_shape)).to_event(event_dim)
        with handlers.trace() as trace:
            noise = numpyro.sample(f"{name}_noise", standard_normal)
        if any(site.get("scale") is not None for site in trace.values()):
            raise ValueError(
                f"site {name!r} is scaled (handlers.scale, a subsampled plate), which FlowReparam does not support: "
                "a power of the noise's density is not that power of x's. Leave the site as it is"
            )
        return None, flow.from_noise(noise)
