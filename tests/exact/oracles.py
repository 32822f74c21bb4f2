"""Exact answers in NumPy float64, written from the paper's definitions; nothing here is taken from the package.

Time runs 1…T; arrays over time have length T, and entry t-1 belongs to step t.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, logsumexp

Z = 4.5  # two-sided Gaussian tail 6.8e-6: the error rate of one statistical assertion, on fixed keys


# for functions that run once and briefly: compiling them costs more than running them
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def enable_x64() -> Any:
    """A context in which JAX computes in float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64 as context

    return context()


def z_score(samples: Any, truth: Any) -> np.ndarray:
    """How many standard errors the mean over axis 0 is from the truth, elementwise."""
    samples = np.asarray(samples, dtype=np.float64)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    # a term that is exactly constant has no error but rounding
    return (samples.mean(0) - truth) / np.maximum(error, 2e-6 * (1 + np.abs(truth)))


# --- schedules -------------------------------------------------------------------------------------------------------


def log_linear(num_timesteps: int, first_beta: float = 1e-4, final_log_snr: float = -20.0) -> np.ndarray:
    return np.linspace(np.log((1 - first_beta) / first_beta), final_log_snr, num_timesteps)


def constant_erasure(num_timesteps: int) -> np.ndarray:
    """beta_t = 1/(T-t+1), of which alpha_bar_t = 1 - t/T."""
    t = np.arange(1, num_timesteps + 1)
    with np.errstate(divide="ignore"):
        return np.log((num_timesteps - t) / t)


def cosine(num_timesteps: int, offset: float = 0.008) -> np.ndarray:
    t = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos(0.5 * np.pi * (t + offset) / (1 + offset)) ** 2
    alpha_bar = (f / f[0])[1:]
    alpha_bar[-1] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(alpha_bar) - np.log1p(-alpha_bar)


def from_betas(betas: Any) -> np.ndarray:
    alpha_bar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    with np.errstate(divide="ignore"):
        return np.log(alpha_bar) - np.log1p(-alpha_bar)


@dataclass(frozen=True)
class Chain:
    """The forward chain of a schedule given by its log-SNR."""

    log_snr: np.ndarray

    @property
    def num_timesteps(self) -> int:
        return len(self.log_snr)

    @property
    def alpha_bar(self) -> np.ndarray:
        return expit(self.log_snr)

    @property
    def erased(self) -> np.ndarray:
        return expit(-self.log_snr)

    @property
    def previous_alpha_bar(self) -> np.ndarray:
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @property
    def previous_erased(self) -> np.ndarray:
        return np.concatenate([[0.0], self.erased[:-1]])

    @property
    def beta(self) -> np.ndarray:
        previous = np.concatenate([[np.inf], self.log_snr[:-1]])
        return -np.expm1(self.log_snr - previous) * self.erased


# --- Gaussian chains with linear reverse steps -----------------------------------------------------------------------


class Affine(nn.Module):
    """A network of outputs a_t x_t + b_t (plus x_t, if ``residual``) and c_t, with its coefficients as parameters: two
    processes of one length then share their compilation."""

    residual: bool
    num_timesteps: int | None = None  # Diffusion sets it

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (self.num_timesteps, x_t.shape[-1])
        a, b, c = (self.param(name, nn.initializers.zeros, shape)[t - 1] for name in "abc")
        return x_t * int(self.residual) + (a * x_t + b), c


@dataclass(frozen=True)
class LinearReverse:
    """x_{t-1} ~ N(x_t + slope_t x_t + offset_t, variance_t), coordinate by coordinate; fields of shape (T, d).

    ``slope`` is the gain less 1, so that single precision costs nothing where steps are small.
    """

    slope: np.ndarray
    offset: np.ndarray
    variance: np.ndarray

    def network(self) -> Callable[..., Any]:
        """The same as a plain callable for ``parameterization="direct"``."""

        def network(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            slope, offset, variance = (jnp.asarray(a, x_t.dtype)[t - 1] for a in self)
            return x_t + (slope * x_t + offset), variance

        return network

    def params(self) -> dict[str, jax.Array]:
        """The same as parameters of ``Affine(residual=True)``."""
        return {"a": jnp.asarray(self.slope), "b": jnp.asarray(self.offset), "c": jnp.asarray(self.variance)}

    def __iter__(self) -> Any:
        return iter((self.slope, self.offset, self.variance))

    def with_kernel_last_step(self, chain: Chain) -> LinearReverse:
        """Step 1 by the forward kernel (the paper's eq. 44)."""
        slope, offset, variance = (a.copy() for a in self)
        slope[0], offset[0], variance[0] = np.sqrt(1 - chain.beta[0]) - 1, 0.0, chain.beta[0]
        return LinearReverse(slope, offset, variance)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of x_0 under the model."""
        mean, variance = np.zeros(self.slope.shape[1]), np.ones(self.slope.shape[1])
        for slope, offset, step in reversed(list(zip(*self, strict=True))):
            mean = (1 + slope) * mean + offset
            variance = (1 + slope) ** 2 * variance + step
        return mean, variance

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log p(x_0) of the model."""
        return normal_log_prob(x, *self.moments()).sum(-1)

    def bound_terms(self, chain: Chain, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-E log p(x_0 | x_1) and the expected KLs of steps 2…T, shape (*batch, T); and KL(q(x_T | x_0) ‖ pi)."""
        x = np.asarray(x, dtype=np.float64)[..., None, :]  # (*batch, T, d)
        alpha_bar, erased, beta = (a[:, None] for a in (chain.alpha_bar, chain.erased, chain.beta))
        before, erased_before = chain.previous_alpha_bar[:, None], chain.previous_erased[:, None]
        # q(x_{t-1} | x_t, x_0), the usual formulas
        from_x_t, from_x_0 = np.sqrt(1 - beta) * erased_before / erased, np.sqrt(before) * beta / erased
        posterior_variance = erased_before * beta / erased
        gap = from_x_t - (1 + self.slope)
        mean_gap = gap * np.sqrt(alpha_bar) * x + from_x_0 * x - self.offset
        square = mean_gap**2 + gap**2 * erased
        ratio = posterior_variance / self.variance
        kl = 0.5 * (ratio[1:] - 1 - np.log(ratio[1:]) + square[..., 1:, :] / self.variance[1:])
        first = 0.5 * (np.log(2 * np.pi * self.variance[:1]) + square[..., :1, :] / self.variance[:1])
        end = alpha_bar[-1]
        prior_kl = 0.5 * (end * (x[..., 0, :] ** 2 - 1) - np.log1p(-end))
        return np.concatenate([first, kl], -2).sum(-1), prior_kl.sum(-1)

    def bound(self, chain: Chain, x: np.ndarray) -> np.ndarray:
        """K of every datum."""
        steps, prior_kl = self.bound_terms(chain, x)
        return -steps.sum(-1) - prior_kl


@dataclass(frozen=True)
class GaussianData:
    """Data N(mean, scale²), coordinate by coordinate."""

    mean: np.ndarray
    scale: np.ndarray

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        return normal_log_prob(x, self.mean, self.scale**2).sum(-1)

    def draw(self, seed: int, num: int) -> np.ndarray:
        return self.mean + self.scale * np.random.default_rng(seed).standard_normal((num, len(self.mean)))

    def marginal_variance(self, alpha_bar: np.ndarray, erased: np.ndarray) -> np.ndarray:
        """Var x_t, shape (T, d)."""
        return alpha_bar[:, None] * self.scale**2 + erased[:, None]

    def exact_reverse(self, chain: Chain) -> LinearReverse:
        """p(x_{t-1} | x_t), by Bayes."""
        variance = self.marginal_variance(chain.alpha_bar, chain.erased)
        before = self.marginal_variance(chain.previous_alpha_bar, chain.previous_erased)
        beta = chain.beta[:, None]
        gain = np.sqrt(1 - beta) * before / variance
        mean, mean_before = (np.sqrt(a)[:, None] * self.mean for a in (chain.alpha_bar, chain.previous_alpha_bar))
        return LinearReverse(gain - 1, mean_before - gain * mean, beta * before / variance)

    def network(self, chain: Chain, parameterization: str) -> tuple[Affine, dict[str, jax.Array]]:
        """The exact reverse process as a network of this parameterization, and its parameters."""
        slope, offset, variance = self.exact_reverse(chain)
        if parameterization == "direct":
            return Affine(True), {"a": jnp.asarray(slope), "b": jnp.asarray(offset), "c": jnp.asarray(variance)}
        if parameterization == "paper":  # mu = (x - z)(1 - S) + z = x + S (z - x)
            assert variance.max() < 1
            logit = np.log(variance) - np.log1p(-variance) - (np.log(chain.beta) - np.log1p(-chain.beta))[:, None]
            coefficients = slope / variance, offset / variance, logit
            return Affine(True), dict(zip("abc", map(jnp.asarray, coefficients), strict=True))
        signal, noise = np.sqrt(chain.alpha_bar)[:, None], np.sqrt(chain.erased)[:, None]
        variance = self.marginal_variance(chain.alpha_bar, chain.erased)
        gain, offset = {
            "x0": (signal * self.scale**2 / variance, noise**2 * self.mean / variance),  # E(x_0 | x_t)
            "noise": (noise / variance, -signal * noise * self.mean / variance),
            "v": (signal * noise * (1 - self.scale**2) / variance, -noise * self.mean / variance),
        }[parameterization]
        log_excess = np.log(self.scale**2 / variance)  # Var(x_0 | x_t) = erased_t · e^s
        return Affine(False), {"a": jnp.asarray(gain), "b": jnp.asarray(offset), "c": jnp.asarray(log_excess)}


def wrong_reverse(chain: Chain, data: GaussianData) -> LinearReverse:
    """A model that is off in every step and coordinate, so that K < log p and every index matters."""
    slope, offset, variance = data.exact_reverse(chain)
    num_timesteps, dim = slope.shape
    t, i, sd = np.arange(num_timesteps)[:, None] / num_timesteps, np.arange(dim), np.sqrt(variance)
    return LinearReverse(
        slope - 0.06 * sd * (1 + t) / (1 + i),
        offset + 0.12 * sd * np.sin(1 + 3 * t + i),
        variance * (1.15 + 0.3 * t - 0.1 * i),
    )


@dataclass(frozen=True)
class CorrelatedData:
    """Data N(mean, covariance); the model is the best one with diagonal reverse steps, itself normal."""

    mean: np.ndarray
    covariance: np.ndarray

    def reverse(self, chain: Chain) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gain matrices (T, d, d), offsets and variances (T, d) of p(x_{t-1} | x_t), by Bayes."""
        identity = np.eye(len(self.mean))
        gains, offsets, variances = [], [], []
        for alpha_bar, before, beta in zip(chain.alpha_bar, chain.previous_alpha_bar, chain.beta, strict=True):
            now = alpha_bar * self.covariance + (1 - alpha_bar) * identity
            earlier = before * self.covariance + (1 - before) * identity
            gain = np.sqrt(1 - beta) * earlier @ np.linalg.inv(now)
            gains.append(gain)
            offsets.append(np.sqrt(before) * self.mean - gain @ (np.sqrt(alpha_bar) * self.mean))
            variances.append(np.diag(earlier - np.sqrt(1 - beta) * gain @ earlier))
        return np.stack(gains), np.stack(offsets), np.stack(variances)


def moments_of(gains: np.ndarray, offsets: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x_0 under linear reverse steps."""
    mean, covariance = np.zeros(offsets.shape[1]), np.eye(offsets.shape[1])
    for gain, offset, variance in reversed(list(zip(gains, offsets, variances, strict=True))):
        mean, covariance = gain @ mean + offset, gain @ covariance @ gain.T + np.diag(variance)
    return mean, covariance


def linear_network(gains: np.ndarray, offsets: np.ndarray, variances: np.ndarray) -> Callable[..., Any]:
    """The same steps, for ``parameterization="direct"``."""

    def network(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        gain, offset, variance = (jnp.asarray(a, x_t.dtype)[t - 1] for a in (gains, offsets, variances))
        return jnp.einsum("...ij,...j->...i", gain, x_t) + offset, variance

    return network


def condition(
    mean: np.ndarray, covariance: np.ndarray, matrix: np.ndarray, noise: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of x ~ N(mean, covariance) given y = matrix x + N(0, noise), and log p(y)."""
    total = matrix @ covariance @ matrix.T + noise
    gain = covariance @ matrix.T @ np.linalg.inv(total)
    gap = y - matrix @ mean
    log_evidence = -0.5 * (gap @ np.linalg.solve(total, gap) + np.linalg.slogdet(2 * np.pi * total)[1])
    return mean + gain @ gap, covariance - gain @ matrix @ covariance, float(log_evidence)


def normal_log_prob(x: Any, mean: Any, variance: Any) -> np.ndarray:
    return -0.5 * (np.log(2 * np.pi * variance) + (np.asarray(x, dtype=np.float64) - mean) ** 2 / variance)


# --- binary words by enumeration -------------------------------------------------------------------------------------


def words(num_bits: int) -> np.ndarray:
    """All states, shape (2^d, d); word i has the bits of i, the first bit the most significant."""
    return np.array(list(itertools.product([0, 1], repeat=num_bits)), dtype=np.float64)


def word_probs(probs: np.ndarray) -> np.ndarray:
    """Probabilities of all words under independent bits, (..., d) -> (..., 2^d)."""
    w = words(probs.shape[-1])
    return np.where(w == 1, probs[..., None, :], 1 - probs[..., None, :]).prod(-1)


class Table(nn.Module):
    """A network for ``parameterization="direct"`` that looks its answer up in its parameter, a table (T, 2^d, d)."""

    num_timesteps: int | None = None  # Diffusion sets it

    @nn.compact
    def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        num_bits = x_t.shape[-1]
        table = self.param("table", nn.initializers.zeros, (self.num_timesteps, 2**num_bits, num_bits))
        return jnp.asarray(table)[t - 1, (x_t.astype(int) * 2 ** np.arange(num_bits)[::-1]).sum(-1)]


@dataclass(frozen=True)
class BinaryChain:
    """A forward chain of bit flips and a table of reverse probabilities f_b, shape (T, 2^d, d)."""

    base: np.ndarray
    beta: np.ndarray
    table: np.ndarray
    last_step: str

    @property
    def num_timesteps(self) -> int:
        return len(self.beta)

    @property
    def num_bits(self) -> int:
        return len(self.base)

    @property
    def stationary(self) -> np.ndarray:
        return word_probs(self.base)

    def forward(self, t: int) -> np.ndarray:
        """q(x_t | x_{t-1}), rows x_{t-1}."""
        beta = self.beta[t - 1]
        return word_probs(words(self.num_bits) * (1 - beta) + self.base * beta)

    def marginal(self, t: int) -> np.ndarray:
        """q(x_t | x_0), rows x_0."""
        out = np.eye(2**self.num_bits)
        for s in range(1, t + 1):
            out = out @ self.forward(s)
        return out

    def posterior(self, t: int) -> np.ndarray:
        """q(x_{t-1} | x_t, x_0) by Bayes, indices (x_0, x_t, x_{t-1})."""
        joint = self.marginal(t - 1)[:, :, None] * self.forward(t)[None]  # (x_0, x_{t-1}, x_t)
        return np.swapaxes(joint / joint.sum(1, keepdims=True), 1, 2)

    def reverse(self, t: int) -> np.ndarray:
        """p(x_{t-1} | x_t), rows x_t."""
        if t == 1 and self.last_step == "kernel":
            return self.forward(1)
        return word_probs(self.table[t - 1])

    @property
    def probs(self) -> np.ndarray:
        """p(x_0)."""
        out = self.stationary
        for t in range(self.num_timesteps, 0, -1):
            out = out @ self.reverse(t)
        return out

    @property
    def second_moment(self) -> np.ndarray:
        """E_q w² of the weights w = p(path, x_0) / q(path | x_0), per x_0."""
        out = self.stationary**2
        for t in range(self.num_timesteps, 0, -1):
            out = out @ (self.reverse(t) ** 2 / self.forward(t).T)
        return out

    @property
    def steps(self) -> np.ndarray:
        """-E log p(x_0 | x_1) and the expected KLs, shape (2^d, T)."""
        first = -(self.marginal(1) * np.log(self.reverse(1)).T).sum(1)
        out = [first]
        for t in range(2, self.num_timesteps + 1):
            q, p = self.posterior(t), self.reverse(t)[None]
            out.append((self.marginal(t) * (q * (np.log(q) - np.log(p))).sum(-1)).sum(-1))
        return np.stack(out, -1)

    @property
    def prior_kl(self) -> np.ndarray:
        q = self.marginal(self.num_timesteps)
        return (q * (np.log(q) - np.log(self.stationary))).sum(-1)

    @property
    def bound(self) -> np.ndarray:
        """K of every word."""
        return -self.steps.sum(-1) - self.prior_kl


def best_table(law: np.ndarray, base: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """P(x_{t-1, i} = 1 | x_t) for words of this law: the best factorised reverse steps, shape (T, 2^d, d)."""
    chain = BinaryChain(base, beta, np.zeros((len(beta), len(law), len(base))), "network")
    table = []
    for t in range(1, len(beta) + 1):
        joint = (law @ chain.marginal(t - 1))[:, None] * chain.forward(t)  # (x_{t-1}, x_t)
        table.append((joint / joint.sum(0)).T @ words(len(base)))
    return np.stack(table)


# --- heartbeat -------------------------------------------------------------------------------------------------------


def heartbeat_sequences(length: int = 20, period: int = 5) -> np.ndarray:
    return np.array([[float(i % period == phase) for i in range(length)] for phase in range(period)])


def heartbeat_network(num_timesteps: int, base: float = 0.2) -> Callable[..., Any]:
    """Logits of P(x_0 = 1 | x_t) per bit: the posterior over the five sequences, for beta_t = 1/(T-t+1)."""
    sequences = heartbeat_sequences()
    erased = np.arange(1, num_timesteps + 1) / num_timesteps
    stay_one, become_one = 1 - erased * (1 - base), erased * base  # P(x_t = 1 | x_0 = 1), P(x_t = 1 | x_0 = 0)
    one_likelihood = np.log(stay_one) - np.log(become_one)
    zero_likelihood = np.log1p(-stay_one) - np.log1p(-become_one)
    others = np.array([[j for j in range(len(sequences)) if j != i] for i in range(len(sequences))])
    phase = np.arange(sequences.shape[1]) % len(sequences)

    def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
        one, zero = (jnp.asarray(a, x_t.dtype)[t - 1] for a in (one_likelihood, zero_likelihood))
        ratio = jnp.where(x_t == 1, one[..., None], zero[..., None])
        score = ratio @ jnp.asarray(sequences.T, x_t.dtype)  # log likelihood of each sequence, up to a constant
        logits = score - jax.nn.logsumexp(score[..., others], axis=-1)
        return logits[..., phase]

    return network


def log_mean_exp(log_weights: np.ndarray) -> np.ndarray:
    return logsumexp(np.asarray(log_weights, dtype=np.float64), axis=0) - np.log(len(log_weights))
