"""Diffusions whose networks are exact at every log-SNR, and the densities that they come from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import pp_diffusion as ppd


class Mixture:
    """Normal components with diagonal covariances; ``shift`` maps a context to an offset of all means."""

    def __init__(self, weights, means, scales, shift=None):
        self.weights, self.means, self.scales = (np.asarray(a, float) for a in (weights, means, scales))
        self.shift = shift

    def __call__(self, x_t, t, log_snr, context=None):
        """E[x_0 | x_t]: parameterization "x0"."""
        weights, means, scales = (jnp.asarray(a, x_t.dtype) for a in (self.weights, self.means, self.scales))
        if self.shift is not None:
            means = means + self.shift(context)[..., None, :]
        x, log_snr = x_t[..., None, :], log_snr[..., None, None]
        signal, erased = jnp.sqrt(jax.nn.sigmoid(log_snr)), jax.nn.sigmoid(-log_snr)
        variance = signal**2 * scales**2 + erased
        logits = jnp.log(weights) - 0.5 * jnp.sum((x - signal * means) ** 2 / variance + jnp.log(variance), -1)
        means = (means * erased + signal * scales**2 * x) / variance
        return jnp.sum(jax.nn.softmax(logits, -1)[..., None] * means, -2), 0 * x_t

    def diffusion(self, schedule=None, **kwargs):
        schedule = ppd.FixedSchedule.log_linear(200, 1e-6, -20.0) if schedule is None else schedule
        kwargs = {"parameterization": "x0", "last_step": "network", **kwargs}
        return ppd.Diffusion(ppd.GaussianKernel(self.means.shape[1:]), schedule, self, **kwargs)

    def log_prob(self, x, shift=0.0):
        x = np.asarray(x, np.float64)
        parts = [
            np.log(w) + multivariate_normal(m + shift, np.diag(s**2)).logpdf(x)
            for w, m, s in zip(self.weights, self.means, self.scales, strict=True)
        ]
        return logsumexp(parts, 0)

    def sample(self, seed, num):
        rng = np.random.default_rng(seed)
        which = rng.choice(len(self.weights), num, p=self.weights)
        return self.means[which] + self.scales[which] * rng.normal(size=(num, self.means.shape[1]))


NORMAL = Mixture([1.0], [[0.7, -0.4]], [[0.5, 1.3]])
TWO = Mixture([0.3, 0.7], [[-1.2, 0.5], [0.6, -0.3]], [[0.3, 0.5], [0.4, 0.25]])
