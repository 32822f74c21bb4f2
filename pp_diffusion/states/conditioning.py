r"""Normal states, given what is observed of them: observe, update, limit, propose.

What is predicted is taken for normal, N(m, C). Of it is observed :math:`y = h(x) + N(0, E)`, linear at m with gradient
H, so that the residual :math:`e = y - h(m)` is normal with covariance :math:`S = H C H^\top + E`; that is the twist's
value. The step to :math:`x_{t-1}` has the covariance G with e, in its own noise's units, and is drawn with the gain
:math:`K = G^\top S^{-1}` (docs/posteriors.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pp_diffusion.matrices import cholesky, einsum, half_log_det, solve_lower
from pp_diffusion.states.lines import along_lines
from pp_diffusion.states.normal import NormalProposal
from pp_diffusion.states.outlook import Outlook
from pp_diffusion.states.rows import Rows, by_gradients, fit_coordinates, in_coordinates
from pp_diffusion.states.space import (
    BATCH_NDIM,
    Guided,
    Likelihood,
    Reading,
    flattened,
    in_one_axis,
    merged,
    parted,
    value_and_gradient,
)

#: The log density of what is impossible at m, less a normal one's.
LEAST_DISCREPANCY = -5.0


class Observed(NamedTuple):
    """What is observed of N(m, C), linearised at m.

    :ivar rows: e, E and H.
    :ivar log_rest: what the log density has besides that of e; shape ``(P, C, S)``.
    :ivar discrepancy: by how much the log density at m differs from a normal one's, per number.
    """

    rows: Rows
    log_rest: Array
    discrepancy: Array


class Update(NamedTuple):
    """What the observations say, and how. With one axis in place of ``(P, C, S)``: see
    :func:`~pp_diffusion.states.space.in_one_axis`.

    :ivar H: gradients of what is observed, shape ``(N, K, D)``.
    :ivar CH: their products with C.
    :ivar E: a matrix, shape ``(N, K, K)``.
    :ivar HCH: of the same shape, E + HCH being positive.
    :ivar root_S: the Cholesky factor of S = E + HCH.
    """

    H: Array
    CH: Array
    E: Array
    HCH: Array
    root_S: Array


def condition(
    outlook: Outlook,
    r: Likelihood,
    log_other: Callable[[Array], Array] | None,
    *,
    most_rows: int,
    power: Array | float = 1.0,
) -> Guided:
    """The log of the average of r^power over N(m, C), and the step given r.

    :param log_other: of what is predicted, the log density that has no normal form.
    """
    observed = observe(outlook, r, power)
    log_value, rows = observed.log_rest, observed.rows
    gradient = None
    if log_other is not None:
        log_of_other, of_other = value_and_gradient(log_other, outlook.m)
        log_value += log_of_other
        gradient = power * jnp.where(jnp.isfinite(of_other), of_other, 0.0)
    if rows.number == 0:
        return Guided(log_value, outlook.shifted(jnp.zeros_like(outlook.m) if gradient is None else gradient))
    S = None
    if rows.number > most_rows:
        if not fit_coordinates(rows.number, r.num_known, flattened(outlook.m).shape[-1], most_rows):
            log_density, S, proposal = by_gradients(outlook, rows, gradient)
            return Guided(log_value + log_density + restored(observed, S), proposal)
        rows, log_left, S = in_coordinates(outlook, rows, r.num_known)
        log_value += log_left
    updated, log_density = update(outlook, rows)
    if S is None:
        S = jnp.diagonal(updated.E + updated.HCH, axis1=-2, axis2=-1).reshape(rows.e.shape)
    shift = None if gradient is None else outlook.shift(gradient)
    return Guided(log_value + log_density + restored(observed, S), propose(outlook, rows, updated, shift))


def observe(outlook: Outlook, r: Likelihood, power: Array | float) -> Observed:
    """e, E and H at m, of what is observed with noise and, behind it, of what is known exactly.

    Of any other density, as a normal observation of where x is on the line that it depends on.
    """
    batch, dtype = outlook.m.shape[:BATCH_NDIM], outlook.m.dtype
    at = jnp.broadcast_to(r.where, (*batch, r.num_known))
    lines = along_lines(outlook, lambda z: r.read(z).numbers, power) if r.num_numbers else None

    def h(z: Array) -> tuple[Array, Reading]:
        reading = r.read(z)
        known = jnp.where(r.counts, jnp.take_along_axis(flattened(z), at, -1), 0.0)
        along = [] if lines is None else [lines.s(z)]
        return jnp.concatenate([-reading.residual, *along, known], -1), reading

    seen, pull, reading = jax.vjp(h, outlook.m, has_aux=True)
    known = seen[..., seen.shape[-1] - r.num_known :]
    known_e = jnp.where(r.counts, r.value, 0.0) - known
    unused = jnp.broadcast_to(jnp.where(r.counts, 0.0, 1.0), known.shape).astype(dtype)
    noise = reading.noise / jnp.maximum(power, jnp.finfo(dtype).tiny)
    log_rest = reading.correction + outlook.log_known + 0.5 * math.log(2 * math.pi) * unused.sum(-1)
    parts = [(reading.residual, noise), (known_e, unused)]
    if lines is not None:
        parts.insert(1, (lines.e, lines.E))
        log_rest += lines.log_rest
    e, E = (jnp.concatenate(part, -1) for part in zip(*parts, strict=True))
    rows = Rows(e, E, lambda z: h(z)[0], lambda v: pull(v)[0])
    return Observed(rows, log_rest, reading.discrepancy)


def update(outlook: Outlook, rows: Rows) -> tuple[Update, Array]:
    """S = H C H' + E, and log N(e; 0, S)."""
    K, batch = rows.number, rows.e.shape[:-1]
    seeds = jnp.eye(K, dtype=outlook.scale.dtype)[(slice(None), *(None,) * BATCH_NDIM)]
    gradients = jax.vmap(rows.pull)(jnp.broadcast_to(seeds, (K, *batch, K)))
    # on a CPU, one product after the other was seen to be three times faster
    one_by_one, at_once = partial(jax.lax.map, outlook.C), jax.vmap(outlook.C)
    products = jax.lax.platform_dependent(gradients, cpu=one_by_one, default=at_once)
    H, CH = (jnp.moveaxis(a.reshape(K, math.prod(batch), -1), 0, 1) for a in (gradients, products))
    e, E = merged((rows.e, rows.E))
    E = E[..., None] * jnp.eye(K, dtype=E.dtype)
    CH, HCH = outlook.trusted(H, CH, einsum("nkd,nld->nkl", H, CH), E)
    root_S, log_density = _log_normal(E + HCH, e)
    return Update(H, CH, E, HCH, root_S), log_density.reshape(batch)


def _log_normal(S: Array, e: Array) -> tuple[Array, Array]:
    """The Cholesky factor of S, and log N(e; 0, S)."""
    root_S = cholesky(S)
    white = solve_lower(root_S, e)
    return root_S, -0.5 * ((white**2).sum(-1) + e.shape[-1] * math.log(2 * math.pi)) - half_log_det(root_S)


def propose(outlook: Outlook, rows: Rows, updated: Update, shift: Array | None) -> NormalProposal:
    """The step given e: with as much of G as leaves its own variance positive."""
    G = outlook.gain(updated.H, updated.CH)
    share, root_R = outlook.limit(G, updated.HCH, updated.E)
    G, share, root_S, root_R = parted((G, share, updated.root_S, root_R), rows.e.shape[:-1])
    mean, scale = flattened(outlook.mean), flattened(outlook.scale)
    return NormalProposal(mean, scale, G, share, root_S, root_R, rows.e, shift, outlook.log_known)


def restored(observed: Observed, S: Array) -> Array:
    """What a density that was taken for normal differs by at m, as far as the noise E makes up the variance S.

    As it is, however large: far out, N(e; 0, S) has the normal tail e²/2S to be undone, which is that share of e²/2E.
    """
    discrepancy, number = observed.discrepancy, observed.discrepancy.shape[-1]
    # an impossible y may be possible near m
    discrepancy = jnp.where(jnp.isneginf(discrepancy), LEAST_DISCREPANCY, discrepancy)
    E, S = observed.rows.E[..., :number], S[..., :number]
    return in_one_axis(lambda E, S, discrepancy: (E / S * discrepancy).sum(-1), E, S, discrepancy)
