"""Covariates: which of their axes are batch axes, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd

X = jax.random.normal(jax.random.key(0), (6, 2))


def diffusion(network=None):
    network = ppd.networks.MLP((4,)) if network is None else network
    return ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(4), network)


class Added(nn.Module):
    """Adds its context to its state's features."""

    @nn.compact
    def __call__(self, x_t, t, context):
        out = nn.Dense(4)(x_t) + nn.Dense(4)(context)
        return out[..., :2], out[..., 2:]


@pytest.mark.slow
@pytest.mark.parametrize("num_features", [1, 2, 6])
def test_one_axis_of_features(num_features):
    """N rows of k covariates, for k = 1 and k = N as well, whose axes could be mistaken for each other."""
    context = jax.random.normal(jax.random.key(1), (6, num_features))
    params = diffusion().init_params(jax.random.key(2), context, 1)
    for given, batch_shape in ((context, (6,)), (context[:1], (1,)), (context[0], ()), (context[None], (1, 6))):
        assert diffusion().prior(params, context=given).batch_shape == batch_shape
    bound = ppd.lower_bound(jax.random.key(3), diffusion().prior(params, context=context), X)
    assert bound.value.shape == (6,)


class Pooled(nn.Module):
    """Pools its context, a set of points: a batch of points can be a set as well."""

    @nn.compact
    def __call__(self, x_t, t, context):
        out = nn.Dense(4)(x_t) + nn.Dense(4)(context).sum(-2)
        return out[..., :2], out[..., 2:]


def test_rows_as_many_as_covariates_are_not_ambiguous():
    own = diffusion(Added())
    params = own.init_params(jax.random.key(2), jnp.ones((5, 3)), 1)
    for rows in (3, 5):
        assert own.prior(params, context=jnp.ones((rows, 3))).batch_shape == (rows,)


def test_a_context_has_one_event_axis_unless_told():
    own = diffusion(Pooled())
    params = own.init_params(jax.random.key(2), jnp.ones((4, 5, 3)), 2)
    assert own.prior(params, context=jnp.ones((5, 3))).batch_shape == (5,)
    assert own.prior(params, context=jnp.ones((5, 3)), context_event_dim=2).batch_shape == ()
    assert own.prior(params, context=jnp.ones((7, 5, 3)), context_event_dim=2).batch_shape == (7,)
    with pytest.raises(ValueError, match="context_event_dim must be in 0…2"):
        own.prior(params, context=jnp.ones((5, 3)), context_event_dim=3)


def test_one_vector_of_covariates_with_a_callable():
    """A callable takes anything; its context is a vector all the same."""
    own = diffusion(lambda x_t, t, context: (x_t + context.sum(-1, keepdims=True), 0 * x_t))
    assert own.prior({}, context=jnp.ones(3)).batch_shape == ()
    assert own.prior({}, context=jnp.ones((2, 3))).batch_shape == (2,)


def test_labels_have_no_axis_of_their_own():
    own = diffusion(lambda x_t, t, context: (x_t + jnp.eye(2)[context], 0 * x_t))
    with pytest.raises(ValueError, match=r"context must have an axis of covariates; got shape \(\).*event_dim=0"):
        own.prior({}, context=1)
    assert own.prior({}, context=1, context_event_dim=0).batch_shape == ()
    assert own.prior({}, context=jnp.array([0, 1, 1]), context_event_dim=0).batch_shape == (3,)
    mixed = {"label": jnp.array([0, 1, 1]), "features": jnp.ones((3, 4))}
    own = diffusion(lambda x_t, t, context: (x_t + jnp.eye(2)[context["label"]], 0 * x_t))
    assert own.prior({}, context=mixed, context_event_dim=0).batch_shape == (3,)


def test_context_that_the_network_does_not_name():
    own = diffusion(lambda x_t, t: (0 * x_t, 0 * x_t))
    with pytest.raises(ValueError, match="does not name context"):
        own.prior({}, context=jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="does not name context"):
        ppd.fit(jax.random.key(0), own, X, context=jnp.ones((6, 1)), num_steps=1, batch_size=6, progress_bar=False)


def test_context_that_is_missing_or_of_another_width():
    params = diffusion().init_params(jax.random.key(2), jnp.ones((6, 3)), 1)
    with pytest.raises(ValueError, match=r"params do not fit the network \(no context was given"):
        diffusion().prior(params)
    with pytest.raises(ValueError, match="params do not fit the network"):
        diffusion().prior(params, context=jnp.ones((6, 2)))
    with pytest.raises(ValueError, match=r"context must be floating"):
        diffusion().prior(params, context=np.arange(6)[:, None])


def test_missing_and_other_values_are_refused_by_name():
    own = diffusion()
    good = jnp.ones((6, 3))
    params = own.init_params(jax.random.key(2), good, 1)
    bad = good.at[2, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="context must be finite; 1 of 18 values are NaN or infinite"):
        own.prior(params, context=bad)
    with pytest.raises(ValueError, match="context must be finite"):
        own.prior(params, context=good).with_context(bad)
    masked = np.ma.masked_array(np.ones((6, 3)), np.eye(6, 3))
    for context, error, match in (
        (bad, ValueError, "context must be finite; 1 of 18"),
        (masked, ValueError, "context must be finite; 3 of 18 values are masked"),
        (np.array([["a"]] * 6), TypeError, "context must hold numbers; got dtype <U1"),
    ):
        with pytest.raises(error, match=match):
            ppd.fit(jax.random.key(0), own, X, context=context, num_steps=1, progress_bar=False)


def test_another_context():
    own = diffusion()
    params = own.init_params(jax.random.key(2), jnp.ones((6, 3)), 1)
    prior = own.prior(params, context=jnp.ones((6, 3)))
    other = jax.random.normal(jax.random.key(3), (2, 3))
    assert prior.with_context(other) == own.prior(params, context=other)
