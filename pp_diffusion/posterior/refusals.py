"""Models that SMC cannot do exactly, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from pp_diffusion.posterior.messages import (
    Message,
    base_of,
    bijector,
    entry_weights_of,
    in_words,
    is_fixed,
    unwrap,
    value_shape,
)
from pp_diffusion.posterior.program import SEED
from pp_diffusion.posterior.sites import Site
from pp_diffusion.prior import DiffusionPrior

Depends = Mapping[str, frozenset[str]]


def prior_site(messages: Mapping[str, Message]) -> Message:
    """The one site with a diffusion prior, as it must be."""
    for name, message in messages.items():
        if message["type"] == "plate" and message["value"].shape[0] != message["args"][0]:
            raise ValueError(f"plate {name!r} is subsampled: SMC needs the whole likelihood, without subsample_size")
    priors = [m for m in messages.values() if m["type"] == "sample" and isinstance(base_of(m), DiffusionPrior)]
    names = [message["name"] for message in priors]
    if not priors:
        raise ValueError("model must have a site numpyro.sample(name, prior) with a DiffusionPrior; it has none")
    for name in names:
        stem = name.removesuffix("_observed")
        if stem != name and f"{stem}_unobserved" in names:
            raise ValueError(
                f"site {stem!r}: obs_mask on a DiffusionPrior masks whole data, not coordinates. Observe coordinates "
                f"by a site below it: numpyro.sample('y', dist.Delta({stem}[known], event_dim=1), obs=y)"
            )
    if len(priors) > 1:
        raise ValueError(f"model must have one site with a DiffusionPrior; it has {len(priors)}: {in_words(names)}")
    (message,) = priors
    name = message["name"]
    prior = base_of(message)
    if prior.support.is_discrete != prior.kernel.support.is_discrete:
        raise ValueError(
            f"site {name!r}: SMC does not serve last_step='discretized': x is integers, its states are real. "
            "Use the same prior with last_step='network'"
        )
    if message["is_observed"]:
        raise ValueError(f"site {name!r} with the DiffusionPrior is observed; there is nothing to infer about x")
    if unwrap(message["fn"]).mask is not None:
        raise ValueError(f"site {name!r} with the DiffusionPrior is masked; a masked prior is no density")
    if message["scale"] is not None:
        raise ValueError(f"site {name!r} with the DiffusionPrior is scaled; SMC has no power of a path's density")
    return message


def check_fixed(messages: Mapping[str, Message]) -> None:
    """Latents that are a Delta have no density of their own."""
    for site, message in messages.items():
        if not message["is_observed"] and is_fixed(message) and np.any(base_of(message).log_density):
            raise ValueError(f"site {site!r}: a Delta must be one without log_density; write it as numpyro.factor")


def check_dependencies(name: str, telling: Iterable[str], depends: Depends, dropped: Iterable[str]) -> None:
    """The prior depends on no latent, observations on none that depends on x, and one of them on x.

    :param name: of the site of x.
    :param telling: the observed sites that depend on something.
    """
    if latent := depends[name] - {SEED}:
        raise ValueError(
            f"site {name!r}: its prior depends on the latent site {in_words(latent)} (through context, say), and "
            "the path's density with it. Take NUTS over the noise, of the same network as a flow, "
            "diffusion.flow(params, context=...), with pp_diffusion.FlowReparam, or of this prior, with "
            "pp_diffusion.TrajectoryReparam. A discrete latent is summed out there, by "
            "infer={'enumerate': 'parallel'}; or run SMC for each of its values, and weigh them by log_evidence"
        )
    for site in telling:
        if wrong := depends[site] & set(dropped):
            raise ValueError(
                f"latent site {in_words(wrong)} depends on {name!r}, and the observed site {site!r} on it: write it "
                "non-centred, so that its own distribution does not depend on x (numpyro.infer.reparam.LocScaleReparam"
                "(0), say), or sum it out"
            )
    if not any(name in depends[site] for site in telling):
        raise ValueError(f"model must have an observed site (or a factor) that depends on the prior's site {name!r}")


def check_observed(data: Mapping[str, Message]) -> None:
    """Values that are observed have their distribution's shape, or are one for many."""
    for site, m in data.items():
        shape, of_fn, whole = np.shape(m["value"]), m["fn"].shape(), value_shape(m)
        if whole != of_fn and (m["cond_indep_stack"] or whole != shape):
            raise ValueError(
                f"site {site!r}: values of shape {shape} are observed of a distribution of shape {of_fn}, which makes "
                f"{math.prod(whole)} numbers of shape {whole}: give both one shape, or state the plate that is missing"
            )


def check_missing(data: Mapping[str, Message]) -> None:
    """None of them is NaN."""
    for site, m in data.items():
        missing = np.isnan(np.asarray(m["value"], np.float64))
        if missing.any() and (missing & (np.asarray(entry_weights_of(m)) > 0)).any():
            raise ValueError(
                f"site {site!r}: an observed value is NaN; mask what is missing, by obs_mask or handlers.mask, say"
            )


def check_latents(kept: Mapping[str, Message], messages: Mapping[str, Message]) -> None:
    """They are drawn from their prior, and moved in real numbers."""
    for site, m in kept.items():
        is_imputed = f"{site.removesuffix('_unobserved')}_observed" in messages  # by NumPyro, for obs_mask
        if m["scale"] is not None or (unwrap(m["fn"]).mask is not None and not is_imputed):
            raise ValueError(
                f"latent site {site!r} is {'masked' if m['scale'] is None else 'scaled'}; SMC draws it from its prior, "
                "which is then none: write a density of its own for it, and what else is meant as numpyro.factor"
            )
        if not m["fn"].support.is_discrete and bijector(m["fn"]) is None:
            raise ValueError(
                f"latent site {site!r}: NumPyro knows no transform from real numbers to {m['fn'].support}, in which "
                "SMC could move it"
            )


def check_draws(sources: Depends) -> None:
    """Latents are random."""
    for site, of in sources.items():
        if SEED not in of:
            raise ValueError(
                f"latent site {site!r} is drawn the same whatever the seed: give the model without handlers.seed, and "
                "fix latents by handlers.condition, not by substitute"
            )


def check_randomness(sites: Iterable[str], depends: Depends) -> None:
    """Densities are not."""
    for site in sites:
        if SEED in depends[site]:
            raise ValueError(
                f"the density at site {site!r} is random: it depends on random numbers that are no sample site of the "
                "model, such as those of numpyro.prng_key, of a network that was not trained (handlers.substitute puts "
                "parameters in), or of a latent site within numpyro's scan or cond"
            )


def check_exact(observed: Iterable[Site], depends: Depends, name: str) -> None:
    """Exact observations show x alone."""
    for site in observed:
        if site.kind.is_exact and (latent := depends[site.name] - {name}):
            raise ValueError(
                f"site {site.name!r}: an exact observation (Delta) must depend on {name!r} alone; it depends on "
                f"the latent site {in_words(latent)}"
            )
