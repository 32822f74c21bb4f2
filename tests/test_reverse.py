"""The reverse process: networks of any make behind one face, other contexts, shorter chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.last_step import ByKernel, ByNetwork

KERNEL, SCHEDULE = ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.4, 0.25, 0.7])


def with_context(x_t, t, context):
    return x_t + context[..., :2], 0 * x_t


def diffusion(network=with_context, **settings):
    return ppd.Diffusion(KERNEL, SCHEDULE, network, **settings)


def test_several_batch_axes_are_rows_to_the_network():
    seen = []

    def network(x_t, t, log_snr, context):
        seen.append((x_t.shape, t.shape, log_snr.shape, context.shape))
        return x_t + context, 0 * x_t

    process = diffusion(network).reverse_process({}, context=jnp.ones((3, 2)), context_batch_ndim=1)
    seen.clear()
    mean = process(jnp.zeros((5, 3, 2)), SCHEDULE.rates().at(1)).mean
    assert mean.shape == (5, 3, 2) and seen == [((15, 2), (15,), (15,), (15, 2))]


def test_with_context_is_that_of_a_new_process():
    contexts = jax.random.normal(jax.random.key(0), (2, 3, 2))
    first = diffusion().reverse_process({}, context=contexts[0], context_batch_ndim=1)
    second = diffusion().reverse_process({}, context=contexts[1], context_batch_ndim=1)
    assert first.with_context(contexts[1]) == second
    x, rates = jnp.ones((2, 3, 2)), SCHEDULE.rates().at(2)
    both = first.with_context(contexts, 2)(x, rates).mean
    np.testing.assert_allclose(both[1], second(x[1], rates).mean, rtol=1e-6)


def test_the_last_step_is_an_object_with_a_name():
    processes = [diffusion(last_step=name).reverse_process({}, context=jnp.ones(2)) for name in ("kernel", "network")]
    assert [process.last_step for process in processes] == [ByKernel(), ByNetwork()]
    assert [process.first_network_step for process in processes] == [1, 0]


def test_shortened():
    process = diffusion().reverse_process({}, context=jnp.ones(2))
    assert process.shortened(4) is process
    assert process.shortened(2).rates.t.tolist() == [1, 4]
    direct = diffusion(parameterization="direct", network=lambda x_t, t: (x_t, 1 + x_t**2)).reverse_process({})
    with pytest.raises(ValueError, match="num_timesteps must be 4 for parameterization 'direct'"):
        direct.shortened(2)


def test_checked_names_what_does_not_fit():
    with pytest.raises(ValueError, match="the signature of the network does not name context"):
        diffusion(lambda x_t, t: (x_t, x_t)).reverse_process({}, context=jnp.ones(2))
    with pytest.raises(ValueError, match=r"network must return 2 array\(s\)"):
        diffusion(lambda x_t, t: x_t).reverse_process({})
