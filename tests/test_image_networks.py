"""Networks over images: one convolution for every platform, the U-Net's shapes, starts, precision and reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd
from pp_diffusion.networks.convolution import Convolution, convolve, convolve_by_lax, convolve_by_patches
from pp_diffusion.networks.images import pad_to_multiple, repeat_pixels, space_to_depth

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
