"""Models compared by their evidences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pp_diffusion.posterior.api import SMC
from pp_diffusion.posterior.facade import LatentSampler
from pp_diffusion.posterior.verdicts import COLLAPSED
from pp_diffusion.units import nats_to_bits


class EvidenceComparison(NamedTuple):
    """Models beside each other; arrays in the order of ``names``, nats.

    :ivar names: of the models.
    :ivar log_evidence: of all that each model observes.
    :ivar log_evidence_error: standard errors; NaN where they are not known.
    :ivar log_bayes_factor: against the best model: zero for it, negative for the others.
    :ivar log_bayes_factor_error: of the difference of the two; zero for the best.
    :ivar probability: of each model, all being as probable before.
    :ivar probability_error: to first order in the evidences' errors.
    """

    names: tuple[str, ...]
    log_evidence: np.ndarray
    log_evidence_error: np.ndarray
    log_bayes_factor: np.ndarray
    log_bayes_factor_error: np.ndarray
    probability: np.ndarray
    probability_error: np.ndarray

    def print_summary(self) -> None:
        """Prints a row for each model, the best first."""
        width = max(map(len, self.names))
        print(
            f"{'':>{width}} {'log Z':>12} {'error':>8} {'log BF':>10} {'error':>8} {'log2 BF':>10} {'probability':>20}"
        )
        for i in np.argsort(-self.log_evidence):
            print(
                f"{self.names[i]:>{width}} {self.log_evidence[i]:>12.4f} {self.log_evidence_error[i]:>8.4f} "
                f"{self.log_bayes_factor[i]:>10.4f} {self.log_bayes_factor_error[i]:>8.4f} "
                f"{nats_to_bits(self.log_bayes_factor[i]):>10.4f} "
                f"{self.probability[i]:>11.4f} ± {self.probability_error[i]:.4f}"
            )


def compare_evidence(runs: Mapping[str, SMC | LatentSampler]) -> EvidenceComparison:
    """Log Bayes factors and probabilities of models of the same data, with errors.

    :param runs: by name, :class:`~pp_diffusion.SMC`, :class:`~pp_diffusion.TemperedSMC` or
        :class:`~pp_diffusion.AmortizedSMC` objects that have been run; from 8 chains on, they have errors.
    :raises TypeError: if ``runs`` is no mapping to SMC objects.
    :raises ValueError: with fewer than two models; where they did not observe the same data; where a run collapsed.

    .. doctest::

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, pp_diffusion as ppd
        >>> prior = ppd.Diffusion(  # the exact reverse process of standard normal data
        ...     ppd.GaussianKernel((1,)),
        ...     ppd.FixedSchedule.constant_erasure(20),
        ...     lambda x_t, t: (jnp.sqrt(1 - 1 / (21 - t))[..., None] * x_t, jnp.ones_like(x_t) / (21 - t)[..., None]),
        ...     parameterization="direct",
        ...     last_step="network",
        ... ).prior({})
        >>> def model(y, scale):
        ...     x = numpyro.sample("x", prior)
        ...     numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)
        >>> runs = {}
        >>> for name, scale in {"narrow": 0.5, "wide": 2.0}.items():
        ...     runs[name] = ppd.SMC(model, num_particles=200, num_chains=8, progress_bar=False)
        ...     runs[name].run(jax.random.key(0), jnp.array([3.0]), scale)
        >>> compared = ppd.compare_evidence(runs)  # exactly log N(3; 0, 1.25) - log N(3; 0, 5) = -2.01
        >>> f"{compared.log_bayes_factor[0]:.1f}", f"{compared.probability[1]:.2f}"
        ('-2.0', '0.88')
    """
    if not isinstance(runs, Mapping) or not all(isinstance(smc, SMC | LatentSampler) for smc in runs.values()):
        raise TypeError(f"runs must be a mapping from names to SMC objects; got {type(runs).__name__}")
    if len(runs) < 2:
        raise ValueError(f"runs must hold at least two models; got {len(runs)}")
    for name, smc in runs.items():
        if np.any(np.asarray(smc.verdict) == COLLAPSED):
            raise ValueError(f"runs[{name!r}] collapsed: its evidence cannot be compared; see its print_summary()")
    _check_same_data(runs)
    names = tuple(runs)
    values = np.array([np.sum(smc.log_evidence) for smc in runs.values()])
    errors = np.array([math.sqrt(np.sum(np.square(smc.log_evidence_error))) for smc in runs.values()])
    best = int(values.argmax())
    factor_errors = np.where(np.arange(len(values)) == best, 0.0, np.hypot(errors, errors[best]))
    probability = np.exp(values - np.logaddexp.reduce(values))
    # d p_i = p_i (d z_i - Σ_j p_j d z_j)
    sensitivity = probability[:, None] * (np.eye(len(values)) - probability)
    probability_error = np.sqrt((sensitivity**2 * errors**2).sum(1))
    return EvidenceComparison(
        names, values, errors, values - values[best], factor_errors, probability, probability_error
    )


def _check_same_data(runs: Mapping[str, SMC | LatentSampler]) -> None:
    """Evidences of different data say nothing about models. Sites may have other names.

    :raises ValueError: naming the two models.
    """
    first, *others = runs
    data = sorted(_fingerprints(runs[first]))
    for name in others:
        if sorted(_fingerprints(runs[name])) != data:
            raise ValueError(
                f"runs[{first!r}] and runs[{name!r}] did not observe the same data: evidences can be compared only for "
                "models of the same observed values"
            )


def _fingerprints(smc: SMC | LatentSampler) -> list[tuple[tuple[int, ...], bytes]]:
    values = [np.asarray(value, np.float64) for value in smc.observed_values.values()]
    return [(value.shape, value.tobytes()) for value in values]
