"""Training: what it returns, in which forms it takes data, and how it fails."""

import itertools
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import pp_diffusion as ppd
from pp_diffusion import Diffusion, FixedSchedule, GaussianKernel
from pp_diffusion.sharding import Layout
from pp_diffusion.training.loop import default_updates
from pp_diffusion.training.sources import Source
from pp_diffusion.training.update import InParts
from tests.compilations import compilations

DATA = jax.random.normal(jax.random.key(0), (300, 2)) @ jnp.array([[1.0, 0.5], [0.0, 0.8]])


def small(**settings):
    return Diffusion(GaussianKernel((2,)), FixedSchedule.log_linear(8, 1e-2), ppd.networks.MLP((8,)), **settings)


def fit(data=DATA, diffusion=None, num_steps=30, **settings):
    settings = {"progress_bar": False, "batch_size": 32, "val_prop": 0.0, **settings}
    return ppd.fit(
        jax.random.key(1), small() if diffusion is None else diffusion, data, num_steps=num_steps, **settings
    )


@pytest.mark.slow
def test_it_learns_and_the_figure_is_that_of_the_returned_parameters():
    result = fit(num_steps=1500, batch_size=128)
    bound = ppd.lower_bound(jax.random.key(2), result.prior, DATA).value.mean()
    start = ppd.lower_bound(jax.random.key(2), small().prior(small().init_params(jax.random.key(1))), DATA).value.mean()
    assert bound > start + 0.1
    # correlated normal data: the exact entropy is known, and K cannot be above it by more than its noise
    cov = np.array([[1.0, 0.5], [0.0, 0.8]]).T @ np.array([[1.0, 0.5], [0.0, 0.8]])
    exact = -0.5 * np.linalg.slogdet(2 * np.pi * np.e * cov)[1]
    assert exact - 0.25 < bound < exact + 0.15


@pytest.mark.parametrize(
    "data", [DATA, [np.asarray(DATA[i : i + 32]) for i in range(0, 96, 32)]], ids=["array", "batches"]
)
def test_pieces_of_one_total_are_the_whole_bit_for_bit(data):
    """Rate, random numbers and the place in the data go on where the last piece ended, wherever that was."""
    whole, state, losses = fit(data, num_steps=24), None, []
    for num_steps in (1, 9, 14):
        piece = fit(data, num_steps=num_steps, total_steps=24, state=state)
        state = piece.state
        losses.append(piece.losses)
    np.testing.assert_array_equal(np.concatenate(losses), whole.losses)
    jax.tree.map(
        np.testing.assert_array_equal,
        (piece.params, piece.state.svi.optim_state),
        (whole.params, whole.state.svi.optim_state),
    )


def test_updates_by_default():
    """By passes over the rows, within bounds; of what cannot be counted, the fewest."""
    for num_rows, expected in ((124, 4000), (36_000, 14_062), (10_000_000, 20_000), (None, 4000)):
        source = Source()
        source.num_rows, source.batch_size = num_rows, min(num_rows or 512, 512)
        assert default_updates(source) == expected


def test_totals_that_do_not_fit_are_named():
    first = fit(num_steps=10, total_steps=24)
    assert len(fit(num_steps=None, state=first.state).losses) == 14  # what is left of the total
    for settings, least in (
        ({"num_steps": 30, "total_steps": 20}, 30),
        ({"state": first.state, "total_steps": 10, "num_steps": None}, 11),
    ):
        with pytest.raises(ValueError, match=f"total_steps must be at least what is done with this call, {least}"):
            fit(**settings)


@pytest.mark.slow
def test_it_is_svi_on_the_bound_pair():
    """The same updates, written out in plain NumPyro."""
    diffusion, optimizer = small(), optax.adam(1e-3)
    result = fit(diffusion=diffusion, num_steps=12, optimizer=optimizer, average=None, batch_size=300, row_noise=0.0)
    svi = SVI(handlers.scale(diffusion.bound_model, scale=1 / 300), diffusion.bound_guide, optimizer, Trace_ELBO())
    init_key, _ = jax.random.split(jax.random.key(1))
    state = svi.init(init_key, DATA[:1])
    losses = []
    update = jax.jit(svi.update)
    for _ in range(12):
        state, loss = update(state, DATA)
        losses.append(loss)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), result.params, svi.get_params(state))


@pytest.mark.slow
def test_losses_are_minus_the_bound_per_datum():
    diffusion = small()
    params = diffusion.init_params(jax.random.key(0))
    result = fit(diffusion=diffusion, num_steps=400, batch_size=300, optimizer=optax.sgd(0.0), average=None)
    value = ppd.lower_bound(jax.random.key(2), diffusion.prior(params), DATA, num_samples=50).value.mean()
    error = result.losses.std() / np.sqrt(result.losses.size)
    assert abs(-result.losses.mean() - value) < 4.5 * error + 0.01


@pytest.mark.slow
def test_average_of_parameters_forgets_the_first_ones():
    """Short runs: the average is near the end of training, not near the start."""
    optimizer = optax.sgd(1e-2)
    start = small().init_params(jax.random.key(5))
    averaged = fit(num_steps=200, optimizer=optimizer, average=0.999).params
    last = fit(num_steps=200, optimizer=optimizer, average=None).params

    def distance(a, b):
        return float(jnp.linalg.norm(ravel_pytree(jax.tree.map(jnp.subtract, a, b))[0]))

    init = fit(num_steps=1, optimizer=optax.sgd(0.0), average=None).params
    assert distance(averaged, last) < 0.35 * distance(init, last)
    assert jax.tree.structure(start) == jax.tree.structure(averaged)


@pytest.mark.slow
def test_constant_parameters_average_to_themselves():
    init = fit(num_steps=1, optimizer=optax.sgd(0.0), average=None).params
    averaged = fit(num_steps=57, optimizer=optax.sgd(0.0), average=0.999).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), init, averaged)


@pytest.mark.slow
def test_all_forms_of_data_learn_the_same_density():
    def draw(key):
        return jax.random.normal(key, (32, 2)) @ jnp.array([[1.0, 0.5], [0.0, 0.8]])

    batches = [np.asarray(DATA[i : i + 32]) for i in range(0, 288, 32)]
    settings = {"num_steps": 400, "optimizer": optax.adam(3e-3)}
    values = [
        ppd.lower_bound(jax.random.key(2), fit(data, **settings).prior, DATA, num_samples=8).value.mean()
        for data in (DATA, draw, batches)
    ]
    assert max(values) - min(values) < 0.1


def test_iterables():
    batches = [np.asarray(DATA[:32]), np.asarray(DATA[32:64]), np.asarray(DATA[64:80])]  # the last one is short
    assert len(fit(batches, num_steps=20).losses) == 20
    endless = (np.asarray(DATA[:16]) for _ in itertools.count())
    assert len(fit(endless, num_steps=25).losses) == 25
    with pytest.warns(UserWarning, match="data ran out after 3 of 10 updates"):
        assert len(fit(iter(batches), num_steps=10).losses) == 3
    assert len(fit(iter(batches), num_steps=3).losses) == 3
    with pytest.raises(ValueError, match="data must yield at least one batch"):
        fit(iter([]), num_steps=3)
    with pytest.raises(ValueError, match=r"batch 2.*must be finite"):
        fit([batches[0], np.full((4, 2), np.nan)], num_steps=10)


@pytest.mark.slow
def test_context_goes_with_its_rows():
    """Two classes at ±2: only a model that is given the label can tell them apart."""
    labels = jnp.arange(400) % 2
    x = jax.random.normal(jax.random.key(0), (400, 2)) * 0.5 + (2.0 * labels - 1)[:, None] * 2
    context = jax.nn.one_hot(labels, 2)
    diffusion = small(transform=ppd.standardize(x))

    def draw(key):
        rows = jax.random.randint(key, (64,), 0, 400)
        return x[rows], context[rows]

    for data, given in ((x, context), (draw, None)):
        result = fit(data, diffusion=diffusion, num_steps=800, batch_size=64, context=given)
        prior = diffusion.prior(result.params, context=jnp.eye(2))
        assert prior == result.prior(jnp.eye(2))
        means = prior.sample(jax.random.key(3), (400,)).mean(0)
        np.testing.assert_allclose(means, [[-2, -2], [2, 2]], atol=0.35)


@pytest.mark.slow
def test_digits_given_their_label():
    """Real images: with the label as context the bound is higher, and draws look like their own digit."""
    data = ppd.datasets.digits(jax.random.key(0), num_test=300)
    units = ppd.standardize(ppd.datasets.dequantize(jax.random.key(1), data.train))
    schedule, network = FixedSchedule.log_linear(20, 1e-2, -5.0), ppd.networks.MLP((64,))
    diffusion = Diffusion(GaussianKernel((8, 8)), schedule, network, transform=units, last_step="network")
    labels = jax.nn.one_hot(data.train_labels, 10)

    def batch(key, with_label):
        row_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (64,), 0, len(data.train))
        x = ppd.datasets.dequantize(noise_key, data.train[rows])
        return (x, labels[rows]) if with_label else x

    settings = {"diffusion": diffusion, "num_steps": 600, "optimizer": optax.adam(2e-3)}
    with_label, without = (fit(partial(batch, with_label=given), **settings) for given in (True, False))
    test = ppd.datasets.dequantize(jax.random.key(2), data.test)
    given = diffusion.prior(with_label.params, context=jax.nn.one_hot(data.test_labels, 10))
    assert given.batch_shape == (300,)
    gain = (
        ppd.lower_bound(jax.random.key(3), given, test).value
        - ppd.lower_bound(jax.random.key(3), without.prior, test).value
    )
    assert gain.mean() > 4 * gain.std() / np.sqrt(300)
    # nearest mean image, as a classifier of draws
    means = jnp.stack([data.train[data.train_labels == k].mean(0) for k in range(10)])
    x = diffusion.prior(with_label.params, context=jnp.eye(10)).sample(jax.random.key(4), (50,))
    nearest = jnp.argmin(jnp.sum((x[..., None, :, :] - means) ** 2, (-1, -2)), -1)
    assert (nearest == jnp.arange(10)).mean() > 0.6


def test_no_recompilation_per_call():
    optimizer = optax.adam(1e-3)
    fit(num_steps=30, optimizer=optimizer)
    shifted = [DATA + shift for shift in (0.5, -0.5)]
    with compilations() as programs:
        for steps, data in zip((30, 77), shifted, strict=True):  # other data, other lengths, a diffusion built anew
            fit(data, num_steps=steps, optimizer=optimizer)
    assert not programs


@pytest.mark.slow
def test_evaluations_cost_no_recompilation():
    """What they put into the state is of the types that were there."""
    diffusion = Diffusion(GaussianKernel((2,)), FixedSchedule.log_linear(8, 1e-2), ppd.networks.MLP((9,)))
    with compilations() as programs:
        for steps in (130, 160):
            fit(diffusion=diffusion, num_steps=steps, val_prop=0.2)
    assert programs["run"] == programs["evaluate"] == 1


@pytest.mark.slow
def test_non_finite_loss_is_an_error_that_keeps_what_was_trained():
    with pytest.raises(ppd.NonFiniteLossError, match=r"the loss is nan at update 1\b"):
        fit(
            diffusion=Diffusion(
                GaussianKernel((2,)), FixedSchedule.log_linear(5), lambda x_t, t: (x_t, jnp.sqrt(-1 - x_t**2))
            )
        )

    with pytest.raises(ppd.NonFiniteLossError, match="at update") as caught:
        fit(num_steps=400, optimizer=optax.sgd(optax.piecewise_constant_schedule(1e-3, {100: 1e30})))
    result = caught.value.result
    assert 1 <= len(result.losses) <= 102
    assert np.isfinite(result.losses).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


@pytest.mark.slow
def test_updates_that_are_not_finite_are_left_out_and_counted():
    """By choice: the parameters are those that the finite ones made, and more than were allowed are an error."""
    times = []

    def draw(key):  # now and then a batch whose loss overflows
        x = jax.random.normal(key, (32, 2))
        return jnp.where(jax.random.uniform(jax.random.fold_in(key, 1)) < 0.1, 1e30, 1.0) * x

    settings = {"optimizer": optax.adam(1e-3), "num_steps": 60, "callback": lambda step, state: times.append(step)}
    with pytest.raises(ppd.NonFiniteLossError, match="at update"):
        fit(draw, **settings)
    result = fit(draw, max_skipped=30, **settings)
    assert len(result.losses) == 60 and 1 <= result.num_skipped == np.isnan(result.losses).sum() <= 15
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    assert times[-1] == 60 and times == sorted(times)  # between dispatches, to the end
    with pytest.raises(ppd.NonFiniteLossError, match=r"more than the 1 that may be left out") as caught:
        fit(draw, max_skipped=1, **settings)
    assert caught.value.result is None or caught.value.result.num_skipped <= 1


@pytest.mark.slow
def test_batches_in_parts_have_the_gradient_of_their_mean():
    """Loss and gradient are the means over the parts, each with a key of its own."""
    diffusion = small()
    params, x = diffusion.init_params(jax.random.key(0)), DATA[:60]
    programs = handlers.scale(diffusion.bound_model, scale=1 / 20), diffusion.bound_guide

    def whole(params):
        keys = jax.random.split(jax.random.key(3), 3)
        return sum(Trace_ELBO().loss(keys[i], params, *programs, x[i::3]) for i in range(3)) / 3

    def in_parts(params):
        return InParts(3, Layout()).loss(jax.random.key(3), params, *programs, x, context=None)

    (a, b), (slope_a, slope_b) = zip(*(jax.value_and_grad(f)(params) for f in (whole, in_parts)), strict=True)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slope_a, slope_b)
    assert len(fit(num_steps=2, accumulate=3, batch_size=60).losses) == 2
    with pytest.raises(ValueError, match="accumulate must divide a batch of 60 rows evenly; it makes 7 parts"):
        fit(num_steps=1, accumulate=7, batch_size=60)


@pytest.mark.slow
def test_a_mesh_of_one_device_changes_nothing():
    mesh = jax.make_mesh((1,), ("data",))
    settings = {"num_steps": 20, "val_prop": 0.2}
    one, spread = fit(**settings), fit(mesh=mesh, **settings)
    np.testing.assert_allclose(spread.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(spread.validation.values, one.validation.values, rtol=1e-5)
    with pytest.raises(ValueError, match="mesh must have an axis named 'data'"):
        fit(num_steps=1, mesh=jax.make_mesh((1,), ("model",)))


@pytest.mark.slow
def test_far_scales_warn_with_the_columns():
    data = DATA * jnp.array([1.0, 50.0])
    with pytest.warns(UserWarning, match=r"far from unit scale in column 1, and no transform"):
        fit(data, num_steps=1)
    fit(data, diffusion=small(transform=ppd.standardize(data)), num_steps=1)  # no warning: those are errors here


def test_progress_bar_shows_the_bound(capsys):
    fit(num_steps=20, progress_bar=True)
    shown = capsys.readouterr().err
    assert "nats" in shown
    assert "bits" in shown
    assert "update/s" in shown
    fit(num_steps=20)
    assert capsys.readouterr().err == ""


def test_interrupt_returns_what_was_trained():
    """A real SIGINT, as Ctrl-C sends it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def batches():
        for count in itertools.count():
            if count == 60:
                signal.raise_signal(signal.SIGINT)
            yield np.asarray(DATA[:32])

    try:
        with pytest.warns(UserWarning, match="interrupted: returning the parameters after"):
            result = fit(batches(), num_steps=500)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 < len(result.losses) < 60
    assert result.prior.sample(jax.random.key(0)).shape == (2,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_times": 1.5}, "num_times"),
        ({"average": 1.0}, "average"),
        ({"objective": "score"}, "objective"),
        ({"context": jnp.ones(7)}, "context"),
        ({"data": jnp.ones((0, 2))}, "data"),
        ({"data": jnp.ones(2)}, "data must have shape"),
        ({"data": DATA.at[3, 1].set(jnp.nan)}, "data must be finite.*no bound"),
        ({"data": DATA.at[:, 1].set(1.0)}, "constant: column 1"),
        ({"data": lambda key: jnp.ones((3, 5))}, r"data\(rng_key\)"),
        ({"data": (lambda key: DATA), "context": jnp.ones(300)}, "context"),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(settings, message):
    traced = []
    optimizer = optax.stateless(lambda updates, params: traced.append(0) or updates)
    with pytest.raises(ValueError, match=message):
        fit(**{"optimizer": optimizer, **settings})
    assert not traced


def test_data_of_no_known_form():
    with pytest.raises(TypeError, match="data must be an array, an iterable of batches or a function"):
        fit(3.0)


@pytest.mark.slow
def test_squared_errors_train_the_mean_and_leave_the_variance(capsys):
    """objective="mse": the errors fall, K rises, and the variance stays beta_t, where the readout started it."""
    data = jax.random.normal(jax.random.key(0), (500, 2)) * jnp.array([0.3, 0.5]) + jnp.array([1.0, -0.5])
    diffusion = ppd.Diffusion(ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(20, 0.01), ppd.networks.MLP((16,)))
    result = ppd.fit(jax.random.key(1), diffusion, data, num_steps=300, batch_size=100, objective="mse")
    assert "squared error" in capsys.readouterr().err
    assert result.objective == "mse" and result.losses.min() > 0
    assert result.losses[-50:].mean() < 0.7 * result.losses[:50].mean()
    start = diffusion.prior(diffusion.init_params(jax.random.key(1)))
    before, after = (ppd.lower_bound(jax.random.key(2), p, data).value.mean() for p in (start, result.prior))
    assert after > before + 0.1
    process = result.prior.process
    step = process(data, process.rates.at(5))
    np.testing.assert_allclose(step.base_dist.scale**2, process.rates.beta[5], rtol=1e-5)
    assert ppd.plotting.losses(result, window=10).axes[0].get_ylabel() == "squared error"
