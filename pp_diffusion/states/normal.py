"""Normal proposals."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.matrices import einsum, half_log_det, solve, solve_lower
from pp_diffusion.states.space import flattened, in_one_axis


class NormalProposal(NamedTuple):
    r"""A normal step :math:`p(x_{t-1} \mid x_t)`, given K normal observations of its own standard normal noise n:
    :math:`e = G n + N(0, R)`.

    With :math:`S = G G^\top + R` and the gain :math:`K = G^\top S^{-1}`, n is normal with mean :math:`K e + s` and
    covariance :math:`I - K G`.

    :ivar mean: of p; shape ``(P, C, S, D)``, as all that has D.
    :ivar scale: its standard deviations.
    :ivar G: but for ``share``, shape ``(P, C, S, K, D)``.
    :ivar share: what of it counts, shape ``(P, C, S, 1)``; zero for a step without observations.
    :ivar root_S: the Cholesky factor of S, shape ``(P, C, S, K, K)``.
    :ivar root_R: that of R.
    :ivar e: residuals, shape ``(P, C, S, K)``.
    :ivar shift: s, by the gradient of what is not normal (eq. 61); ``None`` for zero.
    :ivar log_known: log density of coordinates that are set, not drawn; shape ``(P, C, S)``.
    """

    mean: Array
    scale: Array
    G: Array
    share: Array
    root_S: Array
    root_R: Array
    e: Array
    shift: Array | None
    log_known: Array

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p - log of the density that they are drawn from."""
        *batch, size = self.mean.shape
        return self.from_noise(jax.random.normal(rng_key, (*batch, size + self.e.shape[-1]), self.mean.dtype), shape)

    def from_noise(self, noise: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """The same from standard normal noise, of shape ``(P, C, S, D + K)``."""
        size = self.mean.shape[-1]
        x, log_ratio = in_one_axis(NormalProposal._moved, self, noise[..., :size], noise[..., size:])
        return x.reshape(shape), log_ratio

    def noise_of(self, rng_key: Array, x: Array) -> Array:
        """A draw of the noise given what came of it, states: K more numbers than these were drawn."""
        seen = jax.random.normal(rng_key, self.e.shape, self.e.dtype)
        return in_one_axis(NormalProposal._noise_of, self, flattened(x), seen)

    def _noise_of(self, x: Array, seen: Array) -> Array:
        G, share = self.G, self.share
        moved = _noise_of(x, self.mean, self.scale)
        moved = moved if self.shift is None else moved - self.shift
        # e as it was seen from n, N(0, S), is independent of what n was moved to
        seen = einsum("...kl,...l->...k", self.root_S, seen)
        back = solve(self.root_S, seen - self.e)
        n = moved + jnp.where(share > 0, einsum("...kd,...k->...d", G, share * back), 0.0)
        by_n = jnp.where(share > 0, share * einsum("...kd,...d->...k", G, n), 0.0)
        return jnp.concatenate([n, solve_lower(self.root_R, seen - by_n)], -1)

    def _moved(self, n: Array, noise: Array) -> tuple[Array, Array]:
        G, share, root_S, root_R = self.G, self.share, self.root_S, self.root_R
        noise = einsum("...kl,...l->...k", root_R, noise)
        # Matheron's rule: e as it would be seen from n, and n moved by K times what it differs from e
        drawn = jnp.where(share > 0, share * einsum("...kd,...d->...k", G, n), 0.0) + noise
        of_drawn, of_e = solve(root_S, drawn), solve(root_S, self.e)
        moved = jnp.where(share > 0, einsum("...kd,...k->...d", G, share * (of_e - of_drawn)), 0.0)
        log_ratio = self._log_ratio(noise, of_drawn, of_e) + self.log_known
        if self.shift is not None:  # the mean is that much further
            log_ratio -= (self.shift * (n + moved + 0.5 * self.shift)).sum(-1)
            moved += self.shift
        return self.mean + self.scale * (n + moved), log_ratio

    def _log_ratio(self, noise: Array, of_drawn: Array, of_e: Array) -> Array:
        """log p - log of the proposal in terms of K numbers, so that nothing of length D has to be computed again."""
        root_S, root_R = self.root_S, self.root_R
        around = einsum("...kl,...ml,...m->...k", root_R, root_R, of_drawn) - noise  # G (mean of n - n)
        white = solve_lower(root_R, around)
        white_e = solve_lower(root_S, self.e)
        rest = einsum("...ml,...m->...l", root_R, of_e)
        squares = 0.5 * ((white**2).sum(-1) - (white_e**2).sum(-1) + (rest**2).sum(-1))
        return squares - (of_e * around).sum(-1) + half_log_det(root_R) - half_log_det(root_S)

    def log_ratio(self, x: Array) -> Array:
        """log p - log of the proposal's density at states, shape ``(P, C, S)``.

        By Bayes's rule: the proposal is p given e, so that the ratio is N(e; 0, S) over N(e; G n, R).
        """
        return in_one_axis(NormalProposal._log_ratio_at, self, flattened(x))

    def _log_ratio_at(self, x: Array) -> Array:
        n = _noise_of(x, self.mean, self.scale)
        # a shift moves all of the proposal
        before = n if self.shift is None else n - self.shift
        by_noise = jnp.where(self.share > 0, self.share * einsum("...kd,...d->...k", self.G, before), 0.0)
        white, white_e = solve_lower(self.root_R, self.e - by_noise), solve_lower(self.root_S, self.e)
        squares = 0.5 * ((white**2).sum(-1) - (white_e**2).sum(-1) + ((before - n) * (before + n)).sum(-1))
        return squares + half_log_det(self.root_R) - half_log_det(self.root_S) + self.log_known

    def where(self, condition: Array) -> NormalProposal:
        """The step itself where ``condition``, of shape ``(P, C, S)``, does not hold."""
        return in_one_axis(NormalProposal._chosen, self, condition)

    def _chosen(self, condition: Array) -> NormalProposal:
        holds, identity = condition[:, None], jnp.eye(self.root_S.shape[-1], dtype=self.root_S.dtype)
        return self._replace(
            share=jnp.where(holds, self.share, 0.0),
            root_S=jnp.where(holds[..., None], self.root_S, identity),
            root_R=jnp.where(holds[..., None], self.root_R, identity),
            e=jnp.where(holds, self.e, 0.0),
            shift=None if self.shift is None else jnp.where(holds, self.shift, 0.0),
        )

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, C, S)``."""

        def is_finite(*parts: Array) -> Array:
            fine = [jnp.isfinite(part).all(tuple(range(1, part.ndim))) for part in parts]
            return jnp.stack(fine).all(0)

        return in_one_axis(is_finite, *jax.tree.leaves((self.root_S, self.root_R, self.e, self.shift)))


class DiagonalProposal(NamedTuple):
    r"""A normal step :math:`p(x_{t-1} \mid x_t)`, drawn with another mean and smaller standard deviations.

    :ivar mean: of p; shape ``(P, C, S, D)``, as all that has D.
    :ivar scale: its standard deviations.
    :ivar shift: of the draws' mean, in those.
    :ivar spread: of the draws' standard deviations, in those.
    :ivar log_known: log density of coordinates that are set, not drawn; shape ``(P, C, S)``.
    """

    mean: Array
    scale: Array
    shift: Array
    spread: Array
    log_known: Array

    def draw(self, rng_key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """States, of this shape, and log p - log of the density that they are drawn from."""
        return self.from_noise(jax.random.normal(rng_key, self.mean.shape, self.mean.dtype), shape)

    def from_noise(self, noise: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """The same from standard normal noise, of shape ``(P, C, S, D)``."""
        x, log_ratio = in_one_axis(DiagonalProposal._moved, self, noise)
        return x.reshape(shape), log_ratio

    def noise_of(self, rng_key: Array, x: Array) -> Array:
        """The noise that states were drawn from."""
        moved = _noise_of(flattened(x), self.mean, self.scale)
        return jnp.where(self.scale > 0, (moved - self.shift) / self.spread, 0.0)

    def _moved(self, n: Array) -> tuple[Array, Array]:
        moved = self.shift + self.spread * n
        log_ratio = (0.5 * (n - moved) * (n + moved) + jnp.log(self.spread)).sum(-1)
        return self.mean + self.scale * moved, log_ratio + self.log_known

    def log_ratio(self, x: Array) -> Array:
        """log p - log of the proposal's density at states, shape ``(P, C, S)``."""
        return in_one_axis(DiagonalProposal._log_ratio_at, self, flattened(x))

    def _log_ratio_at(self, x: Array) -> Array:
        moved = _noise_of(x, self.mean, self.scale)
        n = (moved - self.shift) / self.spread
        return (0.5 * (n - moved) * (n + moved) + jnp.log(self.spread)).sum(-1) + self.log_known

    def where(self, condition: Array) -> DiagonalProposal:
        """The step itself where ``condition``, of shape ``(P, C, S)``, does not hold."""
        holds = condition[..., None]
        return self._replace(shift=jnp.where(holds, self.shift, 0.0), spread=jnp.where(holds, self.spread, 1.0))

    @property
    def is_finite(self) -> Array:
        """Of shape ``(P, C, S)``."""
        return (jnp.isfinite(self.shift) & jnp.isfinite(self.spread)).all(-1)


def _noise_of(x: Array, mean: Array, scale: Array) -> Array:
    """A step's standard normal noise; that of coordinates that are set is zero."""
    return jnp.where(scale > 0, (x - mean) / jnp.where(scale > 0, scale, 1.0), 0.0)
