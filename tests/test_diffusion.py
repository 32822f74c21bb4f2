"""Diffusion as parts and programs: what it holds, and what each part is asked for (its programs: test_programs)."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd

KERNEL, SCHEDULE = ppd.GaussianKernel((2,)), ppd.FixedSchedule([0.1, 0.4])


def network(x_t, t):
    return 0.2 * x_t, 0.1 * x_t


def test_equal_parts_make_equal_diffusions():
    make = lambda **settings: ppd.Diffusion(KERNEL, ppd.FixedSchedule([0.1, 0.4]), network, **settings)  # noqa: E731
    assert make() == make() and hash(make()) == hash(make())
    assert make() != make(last_step="network") and make() != make(name="other")
    leaves, structure = jax.tree.flatten(make(transform=ppd.standardize(np.array([[0.0, 5.0], [2.0, 9.0]]))))
    assert jax.tree.unflatten(structure, leaves).transform.scale.tolist() == [1.0, 2.0]
    hash(structure)


def test_there_is_one_refusal_of_squared_errors():
    learned = ppd.Diffusion(KERNEL, ppd.LearnedSchedule(4, 0.01), ppd.networks.MLP((3,)))
    one = ppd.Diffusion(KERNEL, ppd.FixedSchedule([0.3]), ppd.networks.MLP((3,)))
    x = np.random.default_rng(0).normal(size=(8, 2))
    for diffusion in (learned, one):
        with pytest.raises(ValueError, match="objective must be 'bound'") as in_fit:
            ppd.fit(jax.random.key(0), diffusion, x, num_steps=1, objective="mse", progress_bar=False)
        with pytest.raises(ValueError, match="objective must be 'bound'") as in_program:
            diffusion.mse_model(x)
        assert str(in_fit.value) == str(in_program.value)


def test_priors_hold_the_process_and_no_recipe():
    prior = ppd.Diffusion(KERNEL, SCHEDULE, network).prior({})
    assert set(inspect.signature(ppd.DiffusionPrior).parameters) == {
        "process",
        "transform",
        "covariates",
        "log_prob",
        "validate_args",
    }
    again = ppd.DiffusionPrior(prior.process, prior.transform)
    assert again == prior and not hasattr(prior, "diffusion")
    np.testing.assert_array_equal(again.sample(jax.random.key(0)), prior.sample(jax.random.key(0)))


def test_parameters_in_a_program_with_a_context():
    import numpyro
    from numpyro import handlers

    diffusion = ppd.Diffusion(KERNEL, SCHEDULE, ppd.networks.MLP((3,)))

    def model(context):
        return numpyro.sample("x", diffusion.prior(context=context))

    trace = handlers.trace(handlers.seed(model, 0)).get_trace(jnp.ones((5, 3)))
    assert trace["x"]["value"].shape == (5, 2) and diffusion.network_site in trace
