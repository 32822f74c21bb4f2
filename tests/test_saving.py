"""Saved priors come back as they were; damaged and foreign files are refused."""

import json
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import pp_diffusion as ppd

DATA = Path(__file__).parent / "data"


def gaussian(network=None, transform=None, **settings):
    network = ppd.networks.MLP((4,)) if network is None else network
    schedule = ppd.LearnedSchedule(5, 1e-2)
    return ppd.Diffusion(ppd.GaussianKernel((2,)), schedule, network, transform=transform, **settings)


def trained(diffusion, **settings):
    params = jax.tree.map(lambda a: a + 0.1, diffusion.init_params(jax.random.key(0)))
    return diffusion.prior(params, **settings)


def skewed():
    affine = dist.transforms.AffineTransform(jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0]))
    return dist.transforms.ComposeTransform([affine, dist.transforms.ExpTransform()])


PRIORS = {
    "gaussian": lambda: trained(gaussian(transform=ppd.standardize(np.array([[0.0, 5.0], [2.0, 9.0]])))),
    "skewed": lambda: trained(gaussian(transform=skewed(), last_step="network", name="other")),
    "blocks, entrywise": lambda: trained(
        gaussian(ppd.networks.Entrywise((4,)), ppd.UniformBlocks((1, 2), (-1, 1), (0.3, 0.4), low=0.1))
    ),
    "whitened": lambda: trained(gaussian(transform=ppd.whiten(np.array([[0.0, 5.0], [2.0, 9.0], [1.0, 9.0]])))),
    "rbf per step": lambda: trained(gaussian(ppd.networks.RBF(3), parameterization="paper")),
    "binomial": lambda: trained(
        ppd.Diffusion(
            ppd.BinomialKernel((3,), probs=[0.1, 0.2, 0.7]),
            ppd.FixedSchedule.constant_erasure(6),
            ppd.networks.MLP((4,), readout="bumps"),
        ),
        num_timesteps=3,
    ),
    "levels": lambda: trained(
        gaussian(
            last_step=ppd.Discretized(7), transform=dist.transforms.AffineTransform(jnp.array(3.0), jnp.array(2.0))
        )
    ),
    "importance": lambda: trained(gaussian(), log_prob=ppd.Importance(jax.random.key(3), 4)),
    "bound": lambda: trained(gaussian(), log_prob=ppd.Bound(jax.random.key(3))),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())
def test_round_trip(make, tmp_path):
    prior = make()
    ppd.save(tmp_path / "a.ppd", prior)
    loaded = ppd.load(tmp_path / "a.ppd")
    assert loaded == prior
    assert jax.tree.structure(loaded) == jax.tree.structure(prior)  # so that jit compiles once for both
    key = jax.random.key(1)
    x = prior.sample(key, (4,))
    np.testing.assert_array_equal(x, loaded.sample(key, (4,)))
    if prior.log_prob_rule is not None:
        np.testing.assert_array_equal(prior.log_prob(x), loaded.log_prob(x))


def test_own_network_is_passed_back_in(tmp_path):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x_t, t):
            out = nn.Dense(4)(x_t)
            return out[..., :2], out[..., 2:]

    prior = trained(gaussian(Own()))
    ppd.save(tmp_path / "a.ppd", prior)
    with pytest.raises(ValueError, match=r"network is needed.*Own"):
        ppd.load(tmp_path / "a.ppd")
    loaded = ppd.load(tmp_path / "a.ppd", network=Own())
    np.testing.assert_array_equal(prior.sample(jax.random.key(0)), loaded.sample(jax.random.key(0)))


def test_context_is_kept(tmp_path):
    diffusion = gaussian()
    params = diffusion.init_params(jax.random.key(0), jnp.ones((1, 3)), 1)
    prior = diffusion.prior(params, context=jnp.eye(3))
    assert prior.batch_shape == (3,)
    ppd.save(tmp_path / "a.ppd", prior)
    loaded = ppd.load(tmp_path / "a.ppd")
    assert loaded.batch_shape == (3,)
    np.testing.assert_array_equal(prior.sample(jax.random.key(0)), loaded.sample(jax.random.key(0)))


def test_bfloat16_parameters(tmp_path):
    diffusion = gaussian()
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), diffusion.init_params(jax.random.key(0)))
    ppd.save(tmp_path / "a.ppd", diffusion.prior(params))
    loaded = ppd.load(tmp_path / "a.ppd")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.process.params)} == {jnp.dtype(jnp.bfloat16)}


def test_header_is_readable(tmp_path):
    ppd.save(tmp_path / "a.ppd", PRIORS["gaussian"]())
    with zipfile.ZipFile(tmp_path / "a.ppd") as archive:
        header = json.loads(archive.read("header.json"))
    assert header["diffusion"]["kernel"]["type"] == "GaussianKernel"
    assert header["versions"]["pp_diffusion"] == ppd.__version__


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "a.ppd"
    ppd.save(path, PRIORS["gaussian"]())
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged"):
            ppd.load(path)
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        ppd.load(path)
    np.savez(tmp_path / "foreign.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="no file of ppd"):
        ppd.load(tmp_path / "foreign.npz")
    with pytest.raises(FileNotFoundError):
        ppd.load(tmp_path / "missing.ppd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format="something else"), "no file of ppd.save"),
        (lambda h: h.update(format_version=99), "format 99"),
        (lambda h: h["diffusion"].pop("kernel"), "damaged"),
        (lambda h: h["diffusion"]["kernel"].update(type="Cauchy"), "damaged"),
        (lambda h: h["diffusion"]["schedule"].update(type="GaussianKernel"), "damaged"),
    ],
)
def test_changed_header(tmp_path, change, message):
    path = tmp_path / "a.ppd"
    ppd.save(path, PRIORS["gaussian"]())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["header.json"])
    change(header)
    members["header.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=message):
        ppd.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ppd"
    ppd.save(path, PRIORS["gaussian"]())
    before = path.read_bytes()
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ppd.save(path, PRIORS["binomial"]())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_parts_that_cannot_be_described_are_refused(tmp_path):
    class Own(ppd.GaussianKernel):
        pass

    schedule = ppd.FixedSchedule.constant_erasure(3)
    diffusion = ppd.Diffusion(Own((2,)), schedule, ppd.networks.MLP((4,)))
    with pytest.raises(TypeError, match="kernel must be a stock one"):
        ppd.save(tmp_path / "a.ppd", trained(diffusion))
    with pytest.raises(TypeError, match="prior must be a DiffusionPrior"):
        ppd.save(tmp_path / "a.ppd", diffusion)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_files_of_the_first_format_are_read():
    """Written before rates took the place of the schedule, with what they gave then."""
    prior = ppd.load(DATA / "gaussian_format_1.zip")
    assert prior.batch_shape == (2,) and prior.num_timesteps == 4
    expected = [[-2.766732931137085, 5.078793048858643], [1.71063232421875, 4.649510383605957]]
    np.testing.assert_allclose(prior.sample(jax.random.key(1)), expected, rtol=2e-5)
    np.testing.assert_allclose(prior.log_prob(jnp.ones((2, 2))), [-5.926540374755859, -5.859447956085205], rtol=2e-5)
    bits = ppd.load(DATA / "binomial_format_1.zip").sample(jax.random.key(1), (4,))
    np.testing.assert_array_equal(bits, [[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("is_fit", [False, True])
def test_any_damage_is_a_value_error(tmp_path, is_fit):
    """A bit anywhere, or an end anywhere: of priors and of fits."""
    path, prior, load = tmp_path / "a.ppd", PRIORS["binomial"](), ppd.load_fit if is_fit else ppd.load
    if is_fit:
        rows = np.random.default_rng(0).normal(size=(30, 2))
        ppd.fit(jax.random.key(0), gaussian(), rows, num_steps=2, progress_bar=False).save(path)
    else:
        ppd.save(path, prior)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    values = jax.tree.leaves(vars(load(path)) if is_fit else load(path))
    refused = 0
    for place in generator.integers(0, len(whole), 120):
        flipped = bytes([whole[place] ^ (1 << generator.integers(8))])
        path.write_bytes(whole[:place] + (flipped + whole[place + 1 :] if generator.integers(4) else b""))
        try:  # a byte that nothing reads
            found = load(path)
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(vars(found) if is_fit else found), values)
        except ValueError:
            refused += 1
    assert refused > 60


def test_a_link_stays_one_and_a_file_keeps_its_mode(tmp_path):
    target, link = tmp_path / "target.ppd", tmp_path / "link.ppd"
    ppd.save(target, PRIORS["gaussian"]())
    target.chmod(0o640)
    link.symlink_to(target)
    ppd.save(link, PRIORS["binomial"]())
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert ppd.load(target) == PRIORS["binomial"]()
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_path_that_is_no_place_for_a_file(tmp_path):
    prior = PRIORS["gaussian"]()
    with pytest.raises(IsADirectoryError, match=r"path must be that of a file; .* is a folder"):
        ppd.save(tmp_path, prior)
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists; .*nowhere does not"):
        ppd.save(tmp_path / "nowhere" / "a.ppd", prior)
    assert not list(tmp_path.iterdir())


def test_a_kernel_of_ones_own_with_an_entry(tmp_path):
    class Own(ppd.GaussianKernel, saved_as="test_saving.Own"):
        pass

    prior = trained(ppd.Diffusion(Own((2,)), ppd.FixedSchedule.constant_erasure(3), ppd.networks.MLP((4,))))
    ppd.save(tmp_path / "a.ppd", prior)
    assert ppd.load(tmp_path / "a.ppd") == prior


# --- what training came to ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_conditional_fit_is_saved_without_a_context(tmp_path):
    """Parameters, history and the state to go on from; and none but the like is read."""
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(40, 2)), rng.normal(size=(40, 1))
    schedule = ppd.LearnedSchedule(4, 0.01)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), schedule, ppd.networks.MLP((3,)), transform=ppd.standardize(x), name="own"
    )
    settings = {"context": context, "progress_bar": False, "total_steps": 8}
    first = ppd.fit(jax.random.key(0), diffusion, x, num_steps=5, **settings)
    first.save(tmp_path / "a.fit")
    again = ppd.load_fit(tmp_path / "a.fit")
    assert again.diffusion == diffusion and again.needs_context and again.objective == "bound"
    on, from_file = (ppd.fit(jax.random.key(0), f.diffusion, x, state=f.state, **settings) for f in (first, again))
    np.testing.assert_array_equal(on.losses, from_file.losses)
    np.testing.assert_array_equal(on.validation.values, from_file.validation.values)
    jax.tree.map(np.testing.assert_array_equal, on.params, from_file.params)
    ppd.save(tmp_path / "a.ppd", diffusion.prior(first.params, context=context[:1]))
    with pytest.raises(ValueError, match=r"is no file of fit\.save"):
        ppd.load_fit(tmp_path / "a.ppd")
    with pytest.raises(ValueError, match=r"is no file of ppd\.save"):
        ppd.load(tmp_path / "a.fit")
    content = (tmp_path / "a.fit").read_bytes()
    for place in (len(content) // 3, 2 * len(content) // 3):
        (tmp_path / "b.fit").write_bytes(content[:place])
        with pytest.raises(ValueError, match="is damaged or no file"):
            ppd.load_fit(tmp_path / "b.fit")
