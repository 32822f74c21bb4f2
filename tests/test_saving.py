"""Saved priors come back as they were; damaged and foreign files are refused."""

import json
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import pp_diffusion as ppd


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
    "rbf per step": lambda: trained(gaussian(ppd.networks.RBF(3), parameterization="paper")),
    "binomial": lambda: trained(
        ppd.Diffusion(
            ppd.BinomialKernel((3,), probs=[0.1, 0.2, 0.7]),
            ppd.FixedSchedule.constant_erasure(6),
            ppd.networks.MLP((4,), readout="bumps"),
        ),
        num_timesteps=3,
    ),
    "importance": lambda: trained(gaussian(), log_prob=ppd.Importance(jax.random.key(3), 4)),
    "bound": lambda: trained(gaussian(), log_prob=ppd.Bound(jax.random.key(3))),
}


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
