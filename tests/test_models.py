"""The model scripts: short, self-contained, and of the same densities as Diffusion."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import compute_log_probs

import pp_diffusion as ppd
from models import (
    bark,
    binarized_mnist,
    cifar10,
    dead_leaves,
    digits,
    digits_given_label,
    heartbeat,
    mnist,
    regression,
    simulation,
    swiss_roll,
)

SCRIPTS = {"swiss_roll": swiss_roll, "heartbeat": heartbeat, "digits": digits}
IMAGES = {  # with their networks in a small form
    "cifar10": (cifar10, {"channels": (2, 2), "num_blocks": 1}),
    "mnist": (mnist, {"channels": (2, 2), "num_blocks": 1}),
    "binarized_mnist": (binarized_mnist, {"channels": (2, 2), "num_blocks": 1}),
    "bark": (bark, {"features": (2,), "num_scales": 2, "pixel_units": (2,)}),
    "dead_leaves": (dead_leaves, {"features": (2,), "num_scales": 2, "pixel_units": (2,)}),
}
CONDITIONAL = {  # and what they print
    "regression": (regression, "K by the program above"),
    "simulation": (simulation, "log p(x | y = 0) at the draws"),
    "digits_given_label": (digits_given_label, "labels by Bayes' rule"),
}
ALL = SCRIPTS | {name: script for name, (script, _) in (IMAGES | CONDITIONAL).items()}


@pytest.mark.parametrize("name", ALL)
def test_script_is_short_and_imports_little(name):
    source = Path(ALL[name].__file__).read_text()
    assert len(source.splitlines()) < 80
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= {"jax", "numpyro", "flax", "pp_diffusion", "functools", "typing"}
    assert '__name__ == "__main__"' in source


def roll_case():
    roll = ppd.datasets.swiss_roll(jax.random.key(0), 3, 1).train
    units = ppd.standardize(roll)
    return swiss_roll.diffusion(units), roll, {"loc": units.loc, "scale": units.scale}


def heartbeat_case():
    return heartbeat.diffusion(), ppd.datasets.heartbeat(jax.random.key(0), 3, 1).train, {}


def digits_case():
    images = ppd.datasets.dequantize(jax.random.key(1), ppd.datasets.digits(jax.random.key(0)).train[:3])
    return digits.diffusion(), images, {}


CASES = {"swiss_roll": roll_case, "heartbeat": heartbeat_case, "digits": digits_case}


def images_case(name, monkeypatch):
    """The program as it is written, on images of a few pixels and a chain of a few steps."""
    script, sizes = IMAGES[name]
    shape, num_timesteps = (4, 4, *script.SHAPE[2:]), 4
    kernel = script.kernel.replace(event_shape=shape)
    if name == "binarized_mnist":
        schedule = ppd.FixedSchedule.constant_erasure(num_timesteps)
    else:
        schedule = ppd.FixedSchedule.log_linear(num_timesteps, first_beta=0.01, final_log_snr=-4.0)
    network = script.sizes(**sizes, num_timesteps=num_timesteps)
    for part, value in {"SHAPE": shape, "kernel": kernel, "schedule": schedule, "network": network}.items():
        monkeypatch.setattr(script, part, value)
    units = {"loc": 90.0, "scale": 40.0} if name == "bark" else {}
    x = jax.random.uniform(jax.random.key(1), (3, *shape))
    if name == "binarized_mnist":
        x = jnp.round(x)
    elif name != "dead_leaves":
        x = 256 * x
    return script.diffusion(network, **units), x, units


@pytest.mark.parametrize(
    "name", [n if n == "swiss_roll" else pytest.param(n, marks=pytest.mark.slow) for n in (*CASES, *IMAGES)]
)
def test_script_has_the_densities_of_diffusion(name, monkeypatch):
    script = ALL[name]
    diffusion, x, units = images_case(name, monkeypatch) if name in IMAGES else CASES[name]()

    @jax.jit
    def drawn():
        params = jax.tree.map(
            lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape),
            diffusion.init_params(jax.random.key(0)),
        )
        guided = handlers.substitute(handlers.seed(script.guide, jax.random.key(2)), data=params)
        return params, handlers.trace(guided).get_trace(x, **units)["path"]["value"]

    def log_probs(program, **settings):
        def of(params, path):
            values = {"path": path, **params}
            return compute_log_probs(handlers.seed(program, 1), (x,), settings, values, sum_log_prob=False)[0]

        return jax.jit(of)(params, path)

    params, path = drawn()
    for ours, theirs in ((diffusion.model, script.model), (diffusion.guide, script.guide)):
        expected, written_out = log_probs(ours), log_probs(theirs, **units)
        assert expected.keys() == written_out.keys()
        for site in expected:
            assert bool(jnp.isfinite(expected[site]).all())
            np.testing.assert_allclose(written_out[site], expected[site], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swiss_roll", "heartbeat", "digits"])
def test_script_generates(name):
    diffusion, x, units = CASES[name]()
    params = diffusion.init_params(jax.random.key(0))
    drawn = Predictive(SCRIPTS[name].model, params=params, num_samples=1, return_sites=["x"])(
        jax.random.key(1), **units
    )
    assert drawn["x"].shape[2:] == x.shape[1:]


@pytest.mark.slow
def test_regression_has_the_densities_of_diffusion():
    context, y = regression.simulate(jax.random.key(0), 3)
    units = {"loc": y.mean(0), "scale": y.std(0)}
    diffusion = regression.diffusion(ppd.standardize(y))
    params = diffusion.init_params(jax.random.key(1), context, 1)
    params = jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    guided = handlers.substitute(handlers.seed(regression.guide, jax.random.key(2)), data=params)
    path = handlers.trace(guided).get_trace(y, context=context, **units)["path"]["value"]

    def log_probs(program, **settings):
        values, seeded = {"path": path, **params}, handlers.seed(program, 1)
        return compute_log_probs(seeded, (y,), {"context": context, **settings}, values, sum_log_prob=False)[0]

    for ours, theirs in ((diffusion.model, regression.model), (diffusion.guide, regression.guide)):
        expected, written_out = log_probs(ours), log_probs(theirs, **units)
        assert expected.keys() == written_out.keys()
        for site in expected:
            np.testing.assert_allclose(written_out[site], expected[site], rtol=1e-5)


@pytest.mark.slow
def test_two_moons_are_normalised():
    """The crescent's density integrates to one and is that of its draws; so is the posterior for y = 0."""
    grid = jnp.linspace(-0.2, 0.2, 1601)
    points = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), -1)
    density = jnp.exp(simulation.Crescent(jnp.zeros(2)).log_prob(points))
    np.testing.assert_allclose(density.sum() * (grid[1] - grid[0]) ** 2, 1, atol=2e-3)
    draws = simulation.Crescent(jnp.zeros(2)).sample(jax.random.key(0), (20_000,))
    weights = density / density.sum()
    for function in (lambda p: p[..., 0], lambda p: p[..., 1] ** 2, lambda p: p[..., 0] * p[..., 1] > 0.004):
        drawn, exact = function(draws), (weights * function(points)).sum()
        assert abs(drawn.mean() - exact) < 5 * drawn.std() / np.sqrt(20_000)
    grid = jnp.linspace(-0.6, 0.6, 2401)
    points = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), -1)
    posterior = jnp.exp(simulation.exact_log_prob(points, jnp.zeros(2)))
    np.testing.assert_allclose(posterior.sum() * (grid[1] - grid[0]) ** 2, 1, atol=2e-3)
    x, y = simulation.batch(jax.random.key(1), 50)
    assert np.isfinite(simulation.Crescent(simulation.centre(x)).log_prob(y)).all()


@pytest.mark.slow
def test_labelled_digits_keep_their_labels():
    """Noise and shifts of a pixel leave an image nearest to its own level image."""
    data = ppd.datasets.digits(jax.random.key(0))
    levels, labels = data.train[:30], jnp.arange(30)
    x, label = digits_given_label.batch(jax.random.key(1), levels, labels, size=64, shifted=0.0)
    nearest = jnp.argmin(jnp.square(x[:, None] - 0.5 - levels).sum((-1, -2)), -1)
    np.testing.assert_array_equal(nearest, label)
    assert digits_given_label.batch(jax.random.key(1), levels, labels, size=7)[0].shape == (7, 8, 8)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", [*SCRIPTS, *CONDITIONAL])
def test_script_runs_as_a_copy(name, tmp_path):
    """With fewer updates, and where the chain is long fewer rows."""
    copy, source = tmp_path / "mine.py", Path(ALL[name].__file__).read_text()
    brief, found = re.subn(r"num_steps=[\d_]+\)", "num_steps=200)", source)
    assert found == 1
    if name in ("heartbeat", "digits"):
        brief = brief.replace("data.test)", "data.test[:50])")
    copy.write_text(brief)
    done = subprocess.run(
        [sys.executable, copy], capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert CONDITIONAL.get(name, (None, "K by the program above"))[1] in done.stdout
