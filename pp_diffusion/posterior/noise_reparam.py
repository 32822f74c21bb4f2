"""A site in terms of standard normal noise, and of a map from it to x: what all such strategies share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.infer.reparam import Reparam

from pp_diffusion.posterior.substituted import num_plate_axes, substituted


class NoiseReparam(Reparam):
    """Replaces ``numpyro.sample(name, law)`` by the sample site ``f"{name}_noise"`` and a map from there to x.

    Values that are handed in (by ``Predictive``, say) are taken where they can be this strategy's own: noise of the
    shape that it draws, or else x itself. Other noise, such as another strategy's, is never taken for its own.
    """

    #: Of the laws that it takes.
    law_type: ClassVar[Any]

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[dist.Distribution | None, Array | None]:
        """The value of the site, as NumPyro's ``reparam`` handler asks for it."""
        if obs is not None:
            return self.observed(name, fn, obs)
        strategy = type(self).__name__
        law, batch_shape, event_dim = self._unwrap(fn)
        if isinstance(law, dist.MaskedDistribution) or not isinstance(numpyro.get_mask(), bool | None):
            raise ValueError(f"site {name!r} is masked, which {strategy} does not support: mask its likelihood")
        if not isinstance(law, self.law_type):
            raise TypeError(
                f"{strategy} needs a {self.law_type.__name__} at site {name!r}, expanded or with to_event; got a "
                f"{type(law).__name__}{self.instead(law)}"
            )
        self.check(name, law)
        event_shape = self.noise_shape(law)
        own_shape, own_event_dim = (*batch_shape, *event_shape), event_dim + len(event_shape) - len(law.event_shape)
        x, given = substituted(name), substituted(f"{name}_noise")
        if given is not None and not _fits(given, own_shape, own_event_dim):
            if x is None:
                raise ValueError(
                    f"site '{name}_noise' is given values of shape {jnp.shape(given)}, which are not the noise of this "
                    f"{strategy}, of shape {own_shape}: they are another strategy's, or of another length, or of other "
                    f"plates. Give draws of {name!r} with them, or draws of a run of this model"
                )
            given = None
        if x is not None and given is None:  # draws without their noise
            if not _fits(x, fn.shape(), event_dim):
                raise ValueError(f"site {name!r} is given values of shape {jnp.shape(x)}; its own is {fn.shape()}")
            return None, jnp.asarray(x)
        standard_normal = dist.Normal(0.0, 1.0).expand(own_shape).to_event(own_event_dim)
        with handlers.trace() as trace:
            noise = numpyro.sample(f"{name}_noise", standard_normal)
        if any(site.get("scale") is not None for site in trace.values()):
            raise ValueError(
                f"site {name!r} is scaled, by handlers.scale or a subsampled plate, which {strategy} does not support: "
                "a power of the noise's density is not that power of x's"
            )
        return None, self.from_noise(law, noise)

    def observed(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[dist.Distribution, Any]:
        """What becomes of an observed site: it is left as it is."""
        return fn, obs

    def instead(self, law: Any) -> str:
        """What to use for a law of another kind, as the end of a sentence."""
        return ""

    def check(self, name: str, law: Any) -> None:
        """Refuses what the strategy does not serve.

        :raises ValueError: naming the site.
        """

    @abstractmethod
    def noise_shape(self, law: Any) -> tuple[int, ...]:
        """Of the noise of one x."""

    @abstractmethod
    def from_noise(self, law: Any, noise: Array) -> Array:
        """x in data units, of noise of shape ``(*batch, *noise_shape)``; its batch broadcasts against the law's, which
        is larger where a label is enumerated."""


def _fits(value: Any, own_shape: tuple[int, ...], event_dim: int) -> bool:
    """Whether values can be draws of a site of this shape: axes of plates are there, those of an enumerated
    label, which are to the left of them, need not be."""
    shape, missing = jnp.shape(value), len(own_shape) - jnp.ndim(value)
    has_plates = jnp.ndim(value) - event_dim >= min(num_plate_axes(), len(own_shape) - event_dim)
    return has_plates and missing >= 0 and shape == own_shape[missing:]
