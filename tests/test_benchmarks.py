"""The comparators compute what we compute; the table holds together. No test asserts a time."""

import re
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal, norm

import pp_diffusion as ppd
from benchmarks import (
    digits,
    fit_overhead,
    flow,
    flow_accuracy,
    flow_density,
    flow_draws,
    flow_posteriors,
    gpu,
    gradient_variance,
    image_baselines,
    imputation,
    likelihood,
    naive_numpyro,
    parzen,
    posterior,
    precision,
    sampling,
    setting,
    simulation,
    simulation_tasks,
    timing,
    training_step,
    unet_step,
)
from benchmarks.__main__ import main
from benchmarks.reference import handwritten
from benchmarks.reference import handwritten_unet as by_hand
from benchmarks.reference import naive_numpyro as naive
from pp_diffusion.objectives import UNIFORM_SHARE, draw_steps, fixed_terms, step_cost


@cache
def at_random(num_timesteps):
    """A diffusion with parameters that do something, the reference's constants and weights, and points."""
    train = ppd.datasets.swiss_roll(jax.random.key(0), 200, 1).train
    program = setting.diffusion(num_timesteps, train)
    params = program.init_params(jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten([a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    return program, params, setting.chain(num_timesteps), setting.as_weights(params), train


@pytest.mark.slow
def test_handwritten_draws_steps_as_ours_and_its_loss_is_ours():
    program, params, chain, weights, train = at_random(7)
    process, z = program.reverse_process(params), program.to_model_space(train)
    key = jax.random.key(3)
    for num_times in (1, 3):
        index, weight = draw_steps(key, process, len(z), num_times)
        np.testing.assert_allclose(weight * 6, 1 / chain.shares[index], rtol=1e-5)
        draw = jax.jit(jax.vmap(lambda k, n=num_times: handwritten.draw(k, chain, n, 50)[0]))
        drawn = draw(jax.random.split(key, 400))
        counts = np.bincount(np.asarray(drawn).ravel(), minlength=7)
        np.testing.assert_allclose(counts / drawn.size, chain.shares, atol=0.01)

        @jax.jit
        def both(index, weight, num_times=num_times):
            noise_key = jax.random.key(4)
            rows = jnp.broadcast_to(z, (num_times, *z.shape))
            x_t = process.kernel.marginal(rows, process.rates.at(index).log_snr).sample(noise_key)
            noise = (x_t - chain.signal[index][..., None] * rows) / chain.noise[index][..., None]  # of our own draw
            last, prior_kl = fixed_terms(noise_key, process, z)
            ours = jnp.mean(6 * weight * step_cost(noise_key, process, rows, index)) + jnp.mean(prior_kl - last)
            return ours, handwritten.loss(weights, chain, z, index, noise)

        ours, theirs = both(index, weight)
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    assert UNIFORM_SHARE == 0.2  # the reference's default


@pytest.mark.slow
def test_a_handwritten_reverse_step_is_ours():
    program, params, chain, weights, _ = at_random(7)
    process, x = program.reverse_process(params), jax.random.normal(jax.random.key(5), (20, 2))
    for t in (2, 5, 7):
        step = jax.tree.map(lambda a, i=t - 1: jnp.full(20, a[i]), chain)
        mean, variance = handwritten.reverse(weights, x, step)
        ours = process(x, process.rates.at(t - 1))
        np.testing.assert_allclose(mean, ours.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance, ours.variance, rtol=1e-4)


@pytest.mark.slow
def test_handwritten_samples_have_the_law_of_ours():
    program, params, chain, weights, _ = at_random(7)
    ours = program.to_model_space(program.prior(params).sample(jax.random.key(6), (20_000,)))
    theirs = handwritten.sample(jax.random.key(7), weights, chain, 20_000)
    np.testing.assert_allclose(theirs.mean(0), ours.mean(0), atol=5 * np.sqrt(2 / 20_000) * float(ours.std()))
    np.testing.assert_allclose(np.cov(theirs.T), np.cov(ours.T), atol=0.05 * float(ours.var()))


def test_handwritten_log_weights_are_ours():
    program, params, chain, weights, train = at_random(7)
    process, z, key = program.reverse_process(params), program.to_model_space(train[:9]), jax.random.key(8)
    ours = jax.jit(ppd.log_weight)(key, process, jnp.broadcast_to(z, (5, *z.shape)))
    np.testing.assert_allclose(handwritten.log_weights(key, weights, chain, z, 5), ours, rtol=1e-4, atol=1e-4)
    assert np.std(ours) > 0.1


def test_the_naive_program_scores_a_path_as_ours():
    program, params, chain, weights, train = at_random(5)
    z, weights = program.to_model_space(train[:1]), {"weights": weights}
    process = program.reverse_process(params)

    @jax.jit
    def scores(key):
        log_q, guide_trace = log_density(handlers.seed(naive.guide, key), (chain, z), {}, weights)
        model = handlers.replay(handlers.seed(naive.model, key), guide_trace)
        log_p, model_trace = log_density(model, (chain, z), {}, weights)
        downwards = jnp.concatenate([guide_trace["x_T"]["value"][None], guide_trace["x"]["value"]])
        path = jnp.moveaxis(downwards[::-1], 0, 1)
        reverse = ppd.ReverseTrajectory(process.kernel, process.rates, process)
        theirs = log_p, log_q, log_q, jnp.sum(model_trace["x"]["value"] != guide_trace["x"]["value"])
        ours = (
            reverse.log_prob(path) + process.last(path[:, 0]).log_prob(z),
            ppd.ForwardTrajectory(process.kernel, process.rates, z).log_prob(path),
            ppd.PosteriorTrajectory(process.kernel, process.rates, z).log_prob(path),
            jnp.zeros(1),
        )
        return jnp.stack(theirs), jnp.concatenate(ours)

    for key in jax.random.split(jax.random.key(8), 3):
        np.testing.assert_allclose(*scores(key), rtol=1e-4)


@pytest.mark.slow
def test_the_naive_elbo_is_k():
    """Within 4 standard errors of both."""
    program, params, chain, weights, train = at_random(5)
    x = train[:64]
    bound = ppd.lower_bound(jax.random.key(9), program.prior(params), x, num_samples=64)
    k = np.asarray(bound.value + bound.log_abs_det, np.float64)

    @jax.jit
    @jax.vmap
    def elbo(key):
        z = program.to_model_space(x)
        return -Trace_ELBO().loss(key, {"weights": weights}, naive.model, naive.guide, chain, z) / len(x)

    draws = np.asarray(elbo(jax.random.split(jax.random.key(10), 256)), np.float64)
    error = np.hypot(draws.std(ddof=1) / 16, np.sqrt(np.mean(np.square(bound.std_error)) / len(x)))
    assert error < 0.05
    assert abs(draws.mean() - k.mean()) < 4 * error


@pytest.mark.slow
def test_rounding_is_that_of_the_format():
    """Full mantissas change nothing; fewer bits change K, fewer of them more."""
    program, params, _, _, train = at_random(7)
    x_t, t = train[:30] / 10, jnp.full(30, 3)
    inputs = {"log_snr": jnp.full(30, -1.0)}

    def output(network):
        network = setting.diffusion(7, train, network).network
        return np.stack(network(params[program.network_site], x_t, t, context=None, **inputs))

    full = output(ppd.networks.MLP())
    off = [np.abs(output(precision.Rounded(mantissa_bits=bits)) - full).max() for bits in (23, 10, 7)]
    assert off[0] < 1e-6 < 1e-5 < off[1] < off[2] < 0.1


@pytest.mark.slow
def test_all_ways_to_draw_the_steps_have_one_mean():
    """The loss's, within 4.5 standard errors of the noisier; one time for the batch has by far the largest variance."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.LearnedSchedule(9, 1e-2), ppd.networks.MLP((4,)), last_step="network"
    )
    params, x = diffusion.init_params(jax.random.key(0)), jax.random.normal(jax.random.key(1), (300, 2)) * 0.3
    ways = ("importance", "uniform", "one for the batch")
    drawn = {times: gradient_variance.draws(diffusion, params, x, times, 300) for times in ways}
    mean = {times: np.asarray(drawn[times]["loss"], np.float64).mean() for times in ways}
    variance = {times: gradient_variance.variances(drawn[times]) for times in ways}
    for times in ways[1:]:
        error = np.sqrt((variance[times]["loss"] + variance["importance"]["loss"]) / 300)
        assert abs(mean[times] - mean["importance"]) < 4.5 * error
    assert variance["one for the batch"]["loss"] > 5 * variance["uniform"]["loss"]
    assert set(variance["uniform"]) == {"loss", diffusion.network_site, diffusion.schedule_site}


FIGURE = r"\d[\d.e+-]*"
NOTES = {  # of rows that time nothing
    gradient_variance: f"importance: {FIGURE}, uniform: {FIGURE}, one for the batch: {FIGURE}",
    precision: ".* bits",
    flow: ".* bits",
    digits: r".* bits/dim, .*( s|% bound only)",
    flow_accuracy: rf".*{FIGURE}( .*)?",
    flow_draws: "distance .*",
    flow_posteriors: "(TV|R-hat|90 % intervals) .*",
    posterior: r"(twist: .*; )?log Z .*, (modes' TV .*, SW|TV on 20 × 20 cells) .*",
}


MODULES = [
    sampling,
    training_step,
    fit_overhead,
    likelihood,
    naive_numpyro,
    gradient_variance,
    precision,
    flow,
    flow_accuracy,
    flow_draws,
    pytest.param(flow_posteriors, marks=pytest.mark.optimized),
    digits,
    pytest.param(posterior, marks=pytest.mark.optimized),
    unet_step,
]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_rows(module, tmp_path):
    if module in (flow, digits):
        pytest.importorskip("flowjax")
    table = module.rows(True, figures=tmp_path) if module is flow else module.rows(True)
    assert table
    for row in table:
        if row.note.startswith("not run"):
            assert "GPU" in row.note
        elif row.seconds is None:
            assert re.fullmatch(NOTES[module], row.note)
        else:
            assert np.isfinite([*row.seconds, *row.ratio]).all() and min(row.ratio) > 0
            assert row.compile is None or min(row.compile) >= 0
        assert "nan" not in " ".join(row.cells())
    text, markdown = timing.as_text(table), timing.as_markdown(table)
    assert len(text.splitlines()) == len(table) + 1 and len(markdown.splitlines()) == len(table) + 2
    if module is flow:
        assert [p.name for p in tmp_path.iterdir()] == ["gap_against_seconds.png"]


@pytest.mark.slow
def test_the_others_densities_of_digits():
    """A normal law's in the transform's space carries the Jacobian; chosen is the shortest code of held-out images."""
    levels = ppd.datasets.digits(jax.random.key(0)).train[:700]
    x, inverse = levels[:5] + 0.4, digits.script.transform.inv
    normal = digits.train_mixture(levels, ("diag", 1, 0.1)).log_prob
    slope = jax.vmap(jax.grad(lambda x: inverse(x)))(x.ravel()).reshape(x.shape)
    copies = jnp.concatenate([ppd.datasets.dequantize(key, levels) for key in jax.random.split(jax.random.key(10), 5)])
    z = inverse(copies)
    density = dist.Normal(z.mean(0), jnp.sqrt(z.var(0) + 0.1)).log_prob(inverse(x)) + jnp.log(slope)
    np.testing.assert_allclose(normal(x), density.sum((1, 2)), rtol=1e-3)
    chosen = digits.best(levels, [("diag", 1, 0.1), ("full", 2, 0.1)], digits.train_mixture)
    assert chosen.what.startswith("2 components, full")


@pytest.mark.slow
def test_the_handwritten_unets_loss_is_ours():
    """On the same steps and noise; and it draws the steps as ours."""
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((8, 8, 3)),
        ppd.FixedSchedule.log_linear(6, 2e-2, -8.0),
        unet_step.script.for_cpu.clone(channels=(4, 6, 6), num_timesteps=None),
        last_step="network",
        transform=unet_step.script.transform,
    )
    chain = by_hand.steps(6, 2e-2, -8.0)
    params = jax.tree.map(
        lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape),
        jax.jit(diffusion.init_params)(jax.random.key(0)),
    )
    (weights,) = params.values()
    x_0 = jax.random.normal(jax.random.key(1), (6, 8, 8, 3))

    @jax.jit
    def both(params, weights, index):
        process, key = diffusion.reverse_process(params), jax.random.key(2)
        x_t = process.kernel.marginal(x_0, process.rates.at(index).log_snr).sample(key)
        noise = (x_t - chain.signal[index][:, None, None, None] * x_0) / chain.noise[index][:, None, None, None]
        last, prior_kl = fixed_terms(key, process, x_0)
        ours = jnp.mean(step_cost(key, process, x_0, index) / chain.shares[index] + prior_kl - last)
        return ours, by_hand.loss(weights, chain, x_0, index, noise)

    for index in (jnp.arange(6), jnp.zeros(6, int)):
        np.testing.assert_allclose(*both(params, weights, index), rtol=1e-4)
    process = diffusion.reverse_process(params)
    draws = jax.vmap(lambda k: draw_steps(k, process, 50, 1))(jax.random.split(jax.random.key(3), 400))
    np.testing.assert_allclose(draws[1] * 6, 1 / chain.shares[draws[0]], rtol=1e-4)


def test_a_gpu_call_measures_what_is_not_there_yet(tmp_path, monkeypatch):
    """Rows that are there are not measured again; those that failed, lacked something or came too late are."""
    calls, numbers = [], []

    def row(name, error=None):
        def measured(run):
            calls.append(name)
            numbers.append(dict(run.numbers))
            if error is not None:
                raise error
            run.numbers[name] = {"found": 1.5}
            return [gpu.Row(name, "1.5 s", "a note")]

        return measured

    def call(deadline, **rows):
        monkeypatch.setattr(gpu, "ROWS", rows)
        calls.clear()
        run = gpu.Run(None, tmp_path, tmp_path / "state.npz", gpu.minutes_of("1"), small=True)
        return gpu.measure(run, list(rows), deadline).as_markdown()

    failed = {"lacking": row("lacking", gpu.NotRun("no data")), "broken": row("broken", ValueError("too\nlong"))}
    table = call(60, good=row("good"), **failed)
    assert calls == ["good", "lacking", "broken"]
    assert "| good | 1.5 s | a note |" in table and "not run: no data" in table and "failed: ValueError: too |" in table
    table = call(60, good=row("good"), lacking=row("lacking"), broken=failed["broken"], other=row("other"))
    assert calls == ["lacking", "broken", "other"]
    assert numbers[-1] == {"good": {"found": 1.5}, "lacking": {"found": 1.5}}  # also those of the earlier call
    assert table.count("1.5 s") == 3
    table = call(-1, good=row("good"), late=row("late"))
    assert calls == [] and "not run: out of time" in table and table.count("1.5 s") == 3
    assert gpu.minutes_of("mnist=0.5,bark=2") == {**gpu.MINUTES, "mnist": 0.5, "bark": 2.0}
    with pytest.raises(ValueError, match="nist"):
        gpu.minutes_of("nist=1")


def test_the_parzen_window_is_the_mean_of_its_bumps():
    rng = np.random.default_rng(0)
    samples, x, bandwidths = rng.uniform(size=(7, 5)), rng.uniform(size=(4, 5)), np.array([0.2, 0.5])
    found = parzen.log_density(*(jnp.asarray(a, dtype=float) for a in (samples, x, bandwidths)), 3)
    for j, width in enumerate(bandwidths):
        bumps = np.exp(dist.Normal(samples, width).log_prob(x[:, None]).sum(-1))
        np.testing.assert_allclose(found[:, j], np.log(bumps.mean(1)), rtol=1e-4)
    chosen = parzen.parzen(samples, samples[:2] + 0.01, x)
    assert chosen.bandwidth == parzen.BANDWIDTHS[0]


def test_baselines_of_images_are_densities():
    rng = np.random.default_rng(0)
    train, x = rng.normal(size=(400, 8, 8)) @ np.triu(np.ones((8, 8))) + 3, rng.normal(size=(3, 8, 8))
    flat = train.reshape(400, -1)
    expected = dist.Normal(train.mean(), train.std()).log_prob(x).sum((1, 2))
    np.testing.assert_allclose(image_baselines.isotropic(train)(x), expected, rtol=1e-5)
    from sklearn.covariance import ledoit_wolf

    law = multivariate_normal(flat.mean(0), ledoit_wolf(flat)[0])
    np.testing.assert_allclose(image_baselines.full(train)(x), law.logpdf(x.reshape(3, -1)), rtol=1e-6)
    patches = image_baselines.as_patches(np.arange(2 * 16 * 8).reshape(2, 16, 8))
    np.testing.assert_array_equal(patches[1, 1], np.arange(192, 256))
    # a mixture of one component is the normal law of its patches
    one = image_baselines.mixture(train, num_components=1)(x)
    law = multivariate_normal(flat.mean(0), np.cov(flat.T, bias=True) + 1e-5 * flat.var() * np.eye(64))
    np.testing.assert_allclose(one, law.logpdf(x.reshape(3, -1)), rtol=1e-5)


@pytest.mark.slow
def test_the_conditional_mixture_reads_in_order_and_is_normalised():
    """A pixel's density knows those before it, in reading order, and integrates to one."""
    radius, x = 2, jax.random.normal(jax.random.key(0), (1, 4, 5))
    size = image_baselines.neighbours(x, radius).shape[-1]
    weights = image_baselines.init(jax.random.key(1), size, 3, 2, 2)
    weights = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), weights)
    density = jax.jit(lambda x: image_baselines.pixel_log_density(weights, x, radius)[0].ravel())
    changed = np.abs(density(x.at[0, 1, 2].add(1.0)) - density(x)) > 1e-6
    # itself, two to its right, and the two rows below within reach
    expected = {7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}
    assert set(np.flatnonzero(changed)) == expected
    grid = jnp.linspace(-40, 40, 4001)
    on_grid = jax.vmap(lambda v: density(x.at[0, 1, 2].set(v))[7])(grid)
    np.testing.assert_allclose(np.exp(np.asarray(on_grid, np.float64)).sum() * 0.02, 1, atol=1e-3)


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_a_missing_requirement_is_said(form, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flowjax", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--small", "--only", "flow", *form])
    main()
    assert "not run: flowjax is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_handwritten_flow_density_is_ours():
    train = at_random(7)[-1]
    program = setting.diffusion(20, train, last_step="network")
    params = flow_density.perturbed(program.init_params(jax.random.key(1)))
    ours = program.flow(params, num_steps=2).log_prob(train[:3])
    np.testing.assert_allclose(flow_density.by_hand(program, params, 2)(train[:3]), ours, atol=1e-4)


# --- posteriors by simulation ------------------------------------------------------------------------------------


def sbi_log_joint(task, x, y):
    """Of a model's sites."""
    data = {"x": jnp.asarray(x, float), "y": jnp.asarray(y)}
    return float(log_density(handlers.condition(task.model, data), (), {}, {})[0])


@pytest.fixture(scope="module")
def sbi_folder(tmp_path_factory):
    """As in the wheel: a design of 100 rows in a file of a tensor, and an observation of each task."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    design = rng.normal(size=(100, 10)).astype(np.float32)
    sizes = {"two_moons": (2, 2), "gaussian_mixture": (2, 2), "gaussian_linear": (10, 10), "slcp": (5, 8)}
    for name, (num_x, num_y) in (sizes | {"bernoulli_glm": (10, 100)}).items():
        files = folder / name / "files" / "num_observation_1"
        files.mkdir(parents=True)
        y, file = rng.normal(size=(1, num_y)) ** 2, "observation"
        if name == "bernoulli_glm":
            y, file = np.round(rng.uniform(size=y.shape)), "observation_raw"
            count = np.array([design.size], np.int64).tobytes()
            (files.parent / "design_matrix.pt").write_bytes(b"what says what it is" + count + design.tobytes())
        np.savetxt(files / f"{file}.csv", y, delimiter=",", header="names", comments="")
        draws = rng.normal(size=(200, num_x)) / 4
        np.savetxt(files / "reference_posterior_samples.csv.bz2", draws, delimiter=",", header="names", comments="")
    return folder, design


@pytest.mark.slow
def test_the_tasks_have_their_densities(sbi_folder):
    """Prior and likelihood at a point, written out anew."""
    folder, design = sbi_folder
    known = simulation_tasks.tasks(folder)
    x, y = np.array([1.0, -2.0]), np.array([1.5, -2.5])
    mixture = 0.5 * np.prod(norm(x, 1).pdf(y)) + 0.5 * np.prod(norm(x, 0.1).pdf(y))
    np.testing.assert_allclose(sbi_log_joint(known["gaussian_mixture"], x, y), np.log(mixture / 400), rtol=1e-5)
    x, y = np.linspace(-1, 1, 10), np.linspace(0, 1, 10)
    linear = norm(0, 0.1**0.5).logpdf(x).sum() + norm(x, 0.1**0.5).logpdf(y).sum()
    np.testing.assert_allclose(sbi_log_joint(known["gaussian_linear"], x, y), linear, rtol=1e-5)
    x, y = np.array([0.5, -1.0, 1.2, -0.8, 0.4]), np.arange(8.0).reshape(4, 2) / 4
    a, b, r = x[2] ** 2, x[3] ** 2, np.tanh(x[4])
    points = multivariate_normal(x[:2], [[a**2 + 1e-6, r * a * b], [r * a * b, b**2 + 1e-6]]).logpdf(y).sum()
    np.testing.assert_allclose(sbi_log_joint(known["slcp"], x, y), points - 5 * np.log(6), rtol=1e-4)
    x, y = np.linspace(-1, 1, 10), (np.arange(100) % 3 == 0).astype(int)
    logits = design @ x
    spikes = (y * logits - np.logaddexp(0, logits)).sum()
    size = 9
    d = np.eye(size) - np.diag(np.ones(size - 1), -1)
    f = d @ d + np.diag(np.sqrt(np.arange(size) / size))
    prior = norm(0, 2**0.5).logpdf(x[0]) + multivariate_normal(np.zeros(size), np.linalg.inv(f.T @ f)).logpdf(x[1:])
    np.testing.assert_allclose(sbi_log_joint(known["bernoulli_glm"], x, y), spikes + prior, rtol=1e-4)
    np.testing.assert_allclose(known["bernoulli_glm"].summary(y), design.T @ y, rtol=1e-4)


def test_a_file_that_is_no_tensor_is_named(tmp_path):
    (tmp_path / "design_matrix.pt").write_bytes(bytes(5000))
    with pytest.raises(ValueError, match="must end with 1000 numbers"):
        simulation_tasks.read_array(tmp_path / "design_matrix.pt", 1000)


@pytest.mark.slow
def test_c2st_of_like_and_unlike_draws():
    rng = np.random.default_rng(0)
    one, other, far = rng.normal(size=(500, 2)), rng.normal(size=(500, 2)), rng.normal(3, 1, size=(500, 2))
    assert abs(simulation.c2st(one, other) - 0.5) < 0.08 and simulation.c2st(one, far) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_moons", "slcp"])
def test_a_row_of_posteriors_by_simulation(name, sbi_folder, monkeypatch, capsys):
    """The command in its small form."""
    folder = str(sbi_folder[0])
    options = ["--simulations", "200", "--observations", "1", "--num-steps", "2", "--particles", "200", "--no-progress"]
    monkeypatch.setattr(sys, "argv", ["simulation", "--data", folder, "--task", name, *options])
    monkeypatch.setattr(simulation, "coverage", partial(simulation.coverage, num_pairs=20, num_draws=40))
    simulation.main()
    assert re.search(r"amortised \.?\d.*exact .* over 1 .*coverage", capsys.readouterr().out)


def test_imputations_are_scored_in_the_tables_units():
    """Errors of a known size; draws around the truth; a scale that is its own inverse."""
    table = imputation.holes(0)
    assert table.true.min() == 0 and table.true.max() == 1 and abs(table.missing.mean() - 0.3) < 0.01
    assert np.isnan(table.seen).sum() == table.missing.sum()
    scale = imputation.Scale.of(table.seen)
    np.testing.assert_allclose(scale.back(scale(table.true)), table.true, atol=1e-12)
    point = imputation.scores(table.true[None] + 0.03, table.true, table.missing, 0.0)
    assert abs(point.rmse - 0.03) < 1e-12 and abs(point.crps.mean() - 0.03) < 1e-12 and np.isnan(point.covered)
    noise = 0.1 * np.random.default_rng(1).normal(size=(40, *table.true.shape))
    drawn = imputation.scores(table.true + noise, table.true, table.missing, 0.0)
    assert abs(drawn.crps.mean() - 0.1 * (np.sqrt(2 / np.pi) - 1 / np.sqrt(np.pi))) < 1e-3 and drawn.covered > 0.99


@pytest.mark.slow
def test_imputation_runs(monkeypatch, capsys):
    """The command in its small form."""
    monkeypatch.setattr(sys, "argv", ["imputation", "--small", "--seeds", "1", "--rows", "2"])
    imputation.main()
    assert re.search(r"mean of 1 masks.*MissForest +RMSE 0\.\d.*diffusion +RMSE 0\.\d", capsys.readouterr().out, re.S)
