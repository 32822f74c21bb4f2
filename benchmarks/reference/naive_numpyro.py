"""What a NumPyro user writes first: a sample site per step, in a ``scan``, under ``Trace_ELBO``.

Both programs run down from t = T: values are handed from guide to model in the order in which they were drawn, and
``scan(reverse=True)`` would hand them over shuffled. In that order the forward trajectory's steps are
q(x_{t-1} | x_t, x_0), the same law as the product of q(x_t | x_{t-1}).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.contrib.control_flow import scan

from benchmarks.reference.handwritten import Chain, init, reverse


def model(chain: Chain, x_0: Array) -> None:
    """The generative program, for a batch of standardised points."""
    weights = numpyro.param("weights", init)

    def step(x: Array, constants: Chain) -> tuple[Array, None]:
        mean, variance = reverse(weights, x, constants)
        return numpyro.sample("x", dist.Normal(mean, jnp.sqrt(variance)).to_event(2)), None

    end = numpyro.sample("x_T", dist.Normal(jnp.zeros_like(x_0), 1.0).to_event(2))
    x_1, _ = scan(step, end, downwards(chain))
    beta = chain.noise[0] ** 2
    numpyro.sample("x_0", dist.Normal(x_1 * jnp.sqrt(1 - beta), jnp.sqrt(beta)).to_event(2), obs=x_0)


def guide(chain: Chain, x_0: Array) -> None:
    """The forward trajectory."""

    def step(x: Array, at: Chain) -> tuple[Array, None]:
        mean = x + (at.shrinkage * x + at.from_x_0 * x_0)
        return numpyro.sample("x", dist.Normal(mean, jnp.sqrt(at.variance)).to_event(2)), None

    end = numpyro.sample("x_T", dist.Normal(chain.signal[-1] * x_0, chain.noise[-1]).to_event(2))
    scan(step, end, downwards(chain))


def downwards(chain: Chain) -> Chain:
    """The steps T…2."""
    return jax.tree.map(lambda a: a[:0:-1], chain)
