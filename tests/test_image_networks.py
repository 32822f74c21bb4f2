"""Networks over images: one convolution for every platform, the U-Net's shapes, starts, precision and reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.networks.convolution import Convolution, convolve, convolve_by_lax, convolve_by_patches
from pp_diffusion.networks.images import mean_pool, pad_to_multiple, repeat_pixels, space_to_depth
from pp_diffusion.networks.readout import Readout

T = 4
SCHEDULE = ppd.FixedSchedule.log_linear(T, first_beta=0.01)
SMALL = ppd.networks.UNet(channels=(4, 6), num_blocks=1, num_groups=2)


def make(network, event_shape):
    return ppd.Diffusion(ppd.GaussianKernel(event_shape), SCHEDULE, network)


def call(diffusion, params, x_t, t, context=None):
    return diffusion.network(params.get(diffusion.network_site, {}), x_t, t, SCHEDULE.log_snr()[t - 1], context)


def shaken(params):
    """With noise on them: the last layers start at zero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([a + 0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize(("size", "shape"), [(1, (5, 4)), (3, (5, 4)), (5, (7, 3)), (3, (1, 2))])
def test_both_convolutions_are_the_same(size, shape):
    x = jax.random.normal(jax.random.key(0), (2, *shape, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))
    by_patches, by_lax = (
        jax.jit(jax.value_and_grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k, "highest"))), argnums=(0, 1)))(x, kernel)
        for f in (convolve_by_patches, convolve_by_lax)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), by_patches, by_lax)
    np.testing.assert_allclose(
        convolve_by_patches(x, kernel, "highest"), convolve_by_lax(x, kernel, "highest"), rtol=1e-5, atol=1e-5
    )


def test_the_platform_chooses(monkeypatch):
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    for backend, expected in (("cpu", False), ("gpu", True), ("tpu", True)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        program = jax.make_jaxpr(lambda x, kernel: convolve(x, kernel))(x, kernel)  # a new function: traced anew
        assert ("conv_general_dilated" in str(program)) == expected
    with pytest.raises(ValueError, match="size must be odd"):
        Convolution(3, size=2).init(jax.random.key(0), x)


def test_resolutions():
    x = jnp.arange(24.0).reshape(1, 4, 6, 1)
    down = space_to_depth(x)
    assert down.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(down[0, 1, 2], [16, 17, 22, 23])
    np.testing.assert_array_equal(repeat_pixels(x)[0, 2:4, 4:6, 0], np.full((2, 2), 8))
    np.testing.assert_array_equal(mean_pool(x)[0, :, :, 0], [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]])
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (1, 4, 8, 1) and (padded[:, :, 6:] == 0).all()
    assert pad_to_multiple(x, 2) is x


@pytest.mark.parametrize(
    ("event_shape", "batch"), [((6, 4), (3,)), ((5, 7, 3), (2,)), ((4, 4, 2), ()), ((3, 2, 1), (2, 3)), ((1, 1), (2,))]
)
def test_unet_takes_images_of_any_size_and_starts_at_zero(event_shape, batch):
    diffusion = make(SMALL, event_shape)
    params = jax.jit(diffusion.init_params)(jax.random.key(0))
    x_t, t = jnp.ones((*batch, *event_shape)), jnp.full(batch, T)
    outputs = jax.jit(lambda p: call(diffusion, p, x_t, t))(params)
    assert [out.shape for out in outputs] == [x_t.shape] * 2
    for out in outputs:
        np.testing.assert_array_equal(out, 0)


def test_unet_refuses_what_are_no_images():
    for event_shape in ((3,), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="event_shape must be"):
            make(SMALL, event_shape).init_params(jax.random.key(0))
    with pytest.raises(ValueError, match="channels and num_blocks"):
        make(ppd.networks.UNet(channels=(4,), num_blocks=0), (2, 2)).init_params(jax.random.key(0))
    with pytest.raises(ValueError, match=r"context must be floating"):
        make(SMALL, (2, 2)).init_params(jax.random.key(0), jnp.array([0, 1]), 1)


@pytest.mark.slow
def test_time_context_and_far_pixels_reach_every_output_and_rows_do_not_mix():
    diffusion, labels = make(SMALL, (4, 4, 2)), jax.nn.one_hot(jnp.array([0, 2, 1]), 3)
    params = shaken(jax.jit(lambda k: diffusion.init_params(k, labels, 1))(jax.random.key(0)))
    x_t, t = jax.random.normal(jax.random.key(2), (3, 4, 4, 2)), jnp.array([1, 2, T])
    run = jax.jit(lambda x, t, c: call(diffusion, params, x, t, c)[0])
    out = run(x_t, t, labels)
    for other in (
        run(x_t.at[0, 0, 0, 0].add(1.0), t, labels),
        run(x_t, t.at[0].set(3), labels),
        run(x_t, t, labels.at[0].set(0.5)),
    ):
        np.testing.assert_allclose(other[1:], out[1:], rtol=1e-4, atol=1e-5)
        assert (np.abs(other[0] - out[0]) > 1e-6).all()


@pytest.mark.slow
def test_without_attention_a_unet_is_convolutional():
    """Away from the edges, a shift of the image by the coarsest pixel shifts the output."""
    network = ppd.networks.UNet(channels=(3, 4), num_blocks=1, attention_levels=0, num_groups=1)
    diffusion = make(network, (64, 4, 1))
    params = shaken(jax.jit(diffusion.init_params)(jax.random.key(0)))
    x = jnp.zeros((1, 64, 4, 1)).at[:, 30:32, 1:3].set(jax.random.normal(jax.random.key(3), (1, 2, 2, 1)))
    run = jax.jit(lambda x: call(diffusion, params, x, jnp.array([2]))[0])
    np.testing.assert_allclose(run(jnp.roll(x, 2, 1))[0, 20:46], run(x)[0, 18:44], rtol=1e-3, atol=1e-4)


def test_sines_are_the_expected_ones_of_the_data():
    """The input features are E[sin(w x_0) | x_t] under a flat prior."""
    level, x_t = jnp.array([1.5]), jnp.full((1, 1, 1, 1), 0.7)
    seen = ppd.networks.UNet(frequencies=(0, -1)).inputs(x_t, level)[0, 0, 0, 1:]
    noise = np.random.default_rng(0).standard_normal(400_000)
    x_0 = 0.7 / np.sqrt(jax.nn.sigmoid(1.5)) + noise * np.exp(-0.75)
    expected = [f(np.pi * 2.0**k * x_0).mean() for k in (0, -1) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(seen, expected, atol=5e-3)


# --- multi-scale convolutions --------------------------------------------------------------------------------------

SCALES = ppd.networks.MultiScaleConv(features=(3, 2), num_scales=2, pixel_units=(4,), num_bumps=3)


def small_scales(event_shape, network=SCALES, **settings):
    """A diffusion with that network, and parameters that do something."""
    diffusion = ppd.Diffusion(ppd.GaussianKernel(event_shape), SCHEDULE, network, **settings)
    return diffusion, shaken(jax.jit(diffusion.init_params)(jax.random.key(0)))


@pytest.mark.slow
def test_a_multi_scale_layer_is_the_papers():
    """Means of blocks, a convolution for each scale, repetition, the sum, softplus: by loops over pixels."""
    network = ppd.networks.MultiScaleConv(
        features=(1,), num_scales=2, pixel_units=(), num_bumps=1, num_timesteps=T, outputs=("real",)
    )
    x = np.random.default_rng(0).normal(size=(1, 4, 6))
    params = shaken(network.init(jax.random.key(0), jnp.asarray(x), jnp.ones(1, int))["params"])
    readout = params["readout"]["Dense_0"]
    found = network.apply({"params": params}, jnp.asarray(x), jnp.ones(1, int))[0][0]

    def convolve_by_hand(image, kernel, bias):
        padded = np.pad(image, 1)
        out = np.zeros_like(image)
        for i, j in np.ndindex(image.shape):
            out[i, j] = (padded[i : i + 3, j : j + 3] * kernel).sum() + bias
        return out

    pooled = x[0].reshape(2, 2, 3, 2).mean((1, 3))
    low, high = (
        convolve_by_hand(image, np.asarray(layer["kernel"])[:, :, 0, 0], float(layer["bias"][0]))
        for image, layer in ((pooled, params["Convolution_0"]), (x[0], params["Convolution_1"]))
    )
    layer = np.log1p(np.exp(np.repeat(np.repeat(low, 2, 0), 2, 1) + high))
    weights = np.asarray(readout["kernel"])[:, 0]
    expected = x[0] * weights[0] + layer * weights[1] + float(readout["bias"][0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bumps_are_those_of_the_paper():
    """Eqs. 62-63: one coefficient each, weighted by softmax-normalised bumps as wide as they are apart."""
    readout = Readout("bumps", ("real",), 12, "highest", num_bumps=3, bump_width=1.0)
    t = jnp.arange(1, 13)
    dense = {"kernel": jnp.array([[1.0, 10.0, 100.0]]), "bias": jnp.zeros(3)}
    found = readout.apply({"params": {"Dense_0": dense}}, jnp.ones((12, 1)), t, ())[0]
    bumps = np.exp(-((np.arange(1, 13)[:, None] - np.array([2.0, 6.0, 10.0])) ** 2) / (2 * 4.0**2))
    np.testing.assert_allclose(found, bumps @ [1, 10, 100] / bumps.sum(1), rtol=1e-4)


@pytest.mark.slow
def test_multi_scale_convolutions_of_patches_serve_images_of_any_size():
    """Parameters are those of any size; inside, away from edges, a larger image is what its patch is."""
    patch, params = small_scales((16, 14, 2), parameterization="paper")
    whole, others = small_scales((33, 30, 2), parameterization="paper")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, others)
    x = jax.random.normal(jax.random.key(2), (2, 33, 30, 2))
    t = jnp.array([1, 3])
    out = jax.jit(lambda p, x: call(whole, p, x, t))(params, x)
    inner = jax.jit(lambda p, x: call(patch, p, x, t))(params, x[:, 8:24, 12:26])
    for large, small in zip(out, inner, strict=True):
        assert large.shape == x.shape and float(jnp.std(large)) > 0.01
        np.testing.assert_allclose(small[:, 6:10, 6:8], large[:, 14:18, 18:20], rtol=1e-4, atol=1e-5)
    prior = whole.prior(params)
    assert prior.sample(jax.random.key(3), (1,)).shape == (1, 33, 30, 2)


@pytest.mark.slow
def test_time_enters_the_readout_alone_and_the_dense_path_sees_all_pixels():
    near, params = small_scales((8, 6))
    x = jax.random.normal(jax.random.key(2), (T, 8, 6))
    same = jnp.broadcast_to(x[:1], x.shape)
    run = jax.jit(lambda p, x, t: call(near, p, x, t)[0])
    over_time = run(params, same, jnp.arange(1, T + 1)).reshape(T, -1)
    assert np.linalg.matrix_rank(over_time, tol=1e-4) == 3  # one readout per bump
    moved = run(params, same.at[:, 0, 0].add(1.0), jnp.arange(1, T + 1)).reshape(T, 8, 6)
    assert np.abs(moved - over_time.reshape(T, 8, 6))[:, 7, 5].max() == 0
    network = SCALES.clone(features=(), dense_units=(5,), dense_features=2)
    far, params = small_scales((8, 6), network)
    run = jax.jit(lambda p, x: call(far, p, x, jnp.full(T, 2))[0])
    assert (np.abs(run(params, same.at[:, 0, 0].add(1.0)) - run(params, same)) > 1e-6).all()


@pytest.mark.slow
def test_multi_scale_refuses_and_takes_contexts():
    for wrong, said in (
        ({"features": ()}, "features or dense_units"),
        ({"num_scales": 0}, "num_scales"),
        ({"num_bumps": 0}, "num_bumps"),
        ({"features": (0,)}, "widths"),
        ({"bump_width": 0.0}, "bump_width"),
        ({"size": 2}, "size must be odd"),
    ):
        with pytest.raises(ValueError, match=said):
            make(SCALES.clone(**wrong), (4, 4)).init_params(jax.random.key(0))
    with pytest.raises(ValueError, match="event_shape must be"):
        make(SCALES, (3,)).init_params(jax.random.key(0))
    diffusion, labels = make(SCALES, (4, 4)), jax.nn.one_hot(jnp.array([0, 2]), 3)
    params = shaken(jax.jit(lambda k: diffusion.init_params(k, labels, 1))(jax.random.key(0)))
    x, t = jnp.zeros((2, 4, 4)), jnp.ones(2, int)
    assert (np.abs(np.diff(call(diffusion, params, x, t, labels)[0], axis=0)) > 1e-6).all()


@pytest.mark.slow
def test_multi_scale_convolutions_learn_by_the_papers_rule():
    """Stripes that all of a patch's pixels agree on."""
    sign = jnp.where(jax.random.bernoulli(jax.random.key(0), shape=(256, 1, 1)), 1.0, -1.0)
    data = sign + 0.1 * jax.random.normal(jax.random.key(1), (256, 4, 4))
    diffusion, _ = small_scales((4, 4), SCALES.clone(features=(8,), num_scales=3), parameterization="paper")
    fit = ppd.fit(jax.random.key(2), diffusion, data, num_steps=200, batch_size=64, progress_bar=False)
    assert fit.losses[-20:].mean() < fit.losses[:5].mean() - 3


@pytest.mark.slow
def test_bfloat16_inside():
    exact = ppd.networks.UNet(channels=(16, 16), num_blocks=1, frequencies=())
    half = exact.clone(dtype="bfloat16", precision=None)
    full, reduced = make(exact, (8, 8, 3)), make(half, (8, 8, 3))
    params = jax.jit(reduced.init_params)(jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x_t, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 3)), jnp.full(4, 2)
    (layers,) = params.values()
    # the second part of the state is what the first's rounding left
    assert layers["Convolution_0"]["kernel"].shape[2] == 6
    params = shaken(params)
    (layers,) = params.values()
    whole = jax.tree.map(lambda a: a, layers)
    whole["Convolution_0"] = {**layers["Convolution_0"], "kernel": layers["Convolution_0"]["kernel"][:, :, :3]}
    halved = {**layers, "Convolution_0": {**layers["Convolution_0"]}}
    halved["Convolution_0"]["kernel"] = jnp.concatenate([whole["Convolution_0"]["kernel"]] * 2, 2)
    run = jax.jit(lambda d, p: call(d, {d.network_site: p}, x_t, t)[0], static_argnums=0)
    ours, theirs = run(reduced, halved), run(full, whole)
    assert ours.dtype == jnp.float32
    assert 0 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.05


@pytest.mark.slow
def test_a_unet_learns():
    """Stripes that all of an image's pixels agree on."""
    key = jax.random.key(0)
    sign = jnp.where(jax.random.bernoulli(key, shape=(256, 1, 1)), 1.0, -1.0)
    data = sign + 0.05 * jax.random.normal(jax.random.key(1), (256, 4, 4))
    diffusion = make(ppd.networks.UNet(channels=(8,), num_blocks=1, frequencies=()), (4, 4))
    fit = ppd.fit(jax.random.key(2), diffusion, data, num_steps=150, batch_size=64, progress_bar=False)
    assert fit.losses[-20:].mean() < fit.losses[:5].mean() - 5
