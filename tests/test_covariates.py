"""A context as users have it: what becomes of numbers, labels and words, and the prior as a function of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pp_diffusion as ppd

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
WORDS = np.array(["oak", "elm", "ash"] * 40)
X = RNG.normal(size=(120, 2)) + 3.0 * (WORDS == "oak")[:, None]
SIZES = RNG.normal(50.0, 10.0, size=(120, 2))


def fit(data=X, network=None, **settings):
    network = ppd.networks.MLP((8,)) if network is None else network
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(6), network, transform=ppd.standardize(X)
    )
    settings = {"num_steps": 3, "batch_size": 16, "progress_bar": False, **settings}
    return ppd.fit(KEY, diffusion, data, **settings)


def same(a, b):
    np.testing.assert_array_equal(a.sample(KEY, (4,)), b.sample(KEY, (4,)))


# --- what is encoded ---------------------------------------------------------------------------------------------


def test_vectors_are_standardised():
    covariates = ppd.Covariates.from_rows(SIZES)
    np.testing.assert_allclose(covariates(SIZES), (SIZES - SIZES.mean(0)) / SIZES.std(0), rtol=2e-5, atol=2e-5)
    assert covariates(SIZES[0]).shape == (2,) and covariates.batch_ndim(SIZES[None, :5]) == 2
    with pytest.raises(ValueError, match=r"context must have shape \(\*batch, 2\), as in training; got \(120, 1\)"):
        covariates(SIZES[:, :1])
    with pytest.raises(ValueError, match="context must be finite"):
        covariates([np.nan, 1.0])


def test_a_column_that_never_changes_stays_finite():
    np.testing.assert_array_equal(ppd.Covariates.from_rows(np.full((9, 1), 7.0))([7.0]), [0.0])


def test_a_number_for_each_row_is_a_vector_of_one():
    covariates = ppd.Covariates.from_rows(SIZES[:, 0])
    assert covariates(SIZES[:, 0]).shape == (120, 1) and covariates.batch_ndim(50.0) == 0
    assert ppd.Covariates.from_rows(np.arange(8).reshape(4, 2))(np.ones((3, 2), int)).dtype == jnp.float32


def test_images_have_one_scale():
    images = RNG.normal(3.0, 2.0, size=(50, 4, 5))
    images[:, 0] = 3.0  # a border
    encoded = ppd.Covariates.from_rows(images, drop=0.5)(images)
    assert encoded.shape == (50, 4, 5)
    np.testing.assert_allclose([encoded.mean(), encoded.std()], [0, 1], atol=1e-4)


@pytest.mark.parametrize(
    "labels", [WORDS, np.arange(120) % 3 + 7, np.arange(120) % 2 == 0], ids=["words", "ints", "bools"]
)
def test_labels_are_categories(labels):
    covariates = ppd.Covariates.from_rows(labels)
    values = np.unique(labels)
    np.testing.assert_array_equal(covariates(labels), labels[:, None] == values)
    assert covariates(labels.tolist()[0]).shape == values.shape and covariates(labels.tolist()).shape[0] == 120


def test_labels_that_training_did_not_see():
    with pytest.raises(
        ValueError, match="context holds the label 'yew', which was not seen in training; there are 'ash'"
    ):
        ppd.Covariates.from_rows(WORDS)(["oak", "yew"])
    covariates = ppd.Covariates.from_rows(np.arange(3))
    with pytest.raises(ValueError, match="label 3"):
        covariates(3)
    encoded = jax.jit(covariates)(jnp.array([2, 3]))  # a traced one cannot be refused, and must not pass in silence
    np.testing.assert_array_equal(encoded[0], [0, 0, 1])
    assert np.isnan(encoded[1]).all()


def test_trees_keep_their_structure_and_batch_axes():
    covariates = ppd.Covariates.from_rows({"kind": WORDS, "size": SIZES})
    encoded = covariates({"kind": WORDS[:4], "size": SIZES[:4]})
    assert {name: a.shape for name, a in encoded.items()} == {"kind": (4, 3), "size": (4, 2)}
    with pytest.raises(ValueError, match="same batch axes"):
        covariates.batch_ndim({"kind": "oak", "size": SIZES})
    with pytest.raises(ValueError, match="context must have the structure"):
        covariates(SIZES)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_prior_is_a_function_of_words():
    result = fit(context=WORDS, num_steps=400, batch_size=120, val_prop=0.0)
    prior = result.prior(["oak", "elm"])
    assert prior.batch_shape == (2,) and result.prior("oak").batch_shape == ()
    means = prior.sample(KEY, (500,)).mean(0)
    for mean, word in zip(means, ("oak", "elm"), strict=True):
        np.testing.assert_allclose(mean, X[word == WORDS].mean(0), atol=0.6)
    same(result.prior("elm"), result.prior("oak").with_context("elm"))
    same(result.prior("elm"), result.diffusion.prior(result.params, context="elm"))
    assert ppd.lower_bound(KEY, result.prior(WORDS), X).value.shape == (120,)


@pytest.mark.slow
def test_functions_iterables_and_files_encode_as_arrays_do(tmp_path):
    def draw(key):
        rows = jax.random.randint(key, (16,), 0, 120)
        return jnp.asarray(X)[rows], jnp.asarray(SIZES)[rows]

    on_disk = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=X.shape)
    on_disk[:] = X
    whole = ppd.Covariates.from_rows(SIZES)(SIZES[:3])
    for data, context, atol in ((draw, None, 0.1), ([(X, SIZES)], None, 1e-5), (on_disk, SIZES, 1e-5)):
        result = fit(data, context=context)
        np.testing.assert_allclose(result.covariates(SIZES[:3]), whole, atol=atol)
    with pytest.raises(ValueError, match="label 'ash', which was not seen"):
        fit([(X[:2], WORDS[:2]), (X, WORDS)])
    assert (
        fit([(X[:2], WORDS[:2]), (X, WORDS)], covariates=ppd.Covariates.from_rows(WORDS)).prior("ash").batch_shape == ()
    )


@pytest.mark.slow
def test_held_out_rows_are_encoded_too():
    """Such as training encoded: the same rows, held out by the user, have the same K."""
    own, given = fit(context=WORDS), fit(X[:100], context=WORDS[:100], validation_data=(X[100:], WORDS[100:]))
    assert np.isfinite(given.validation.values).all() and np.isfinite(own.validation.values).all()
    with pytest.raises(ValueError, match="label 'yew'"):
        fit(context=WORDS, validation_data=(X[:2], np.array(["yew", "oak"])))


@pytest.mark.slow
def test_going_on_keeps_the_scale(tmp_path):
    """Also with other rows, and from a file."""
    first = fit(context=SIZES, num_steps=3, total_steps=6)
    first.save(tmp_path / "a.fit")
    for earlier in (first, ppd.load_fit(tmp_path / "a.fit")):
        on = fit(context=SIZES + 1000.0, state=earlier.state)
        assert on.covariates == first.covariates


@pytest.mark.slow
def test_one_can_be_left_as_it_is():
    def network(x_t, t, context):
        return x_t + jnp.eye(3)[context, :2], 0 * x_t

    labels = np.arange(120) % 3
    result = fit(
        network=network, context=labels, covariates=ppd.Covariates.from_rows(labels, encode=False), num_steps=1
    )
    assert result.prior(labels[:5]).batch_shape == (5,)


class Pooled(nn.Module):
    @nn.compact
    def __call__(self, context):
        return nn.tanh(nn.Dense(6)(context)).mean(-2)


@pytest.mark.slow
def test_sets_go_through_an_embedding_of_their_own():
    sets = RNG.normal(size=(120, 5, 2))
    network = ppd.networks.Embedded(ppd.networks.MLP((8,)), embedding=Pooled())
    result = fit(network=network, context=sets)
    prior = result.prior(sets[:4])
    assert prior.batch_shape == (4,)
    np.testing.assert_allclose(prior.sample(KEY), result.prior(sets[:4, ::-1]).sample(KEY), atol=1e-5)
    before = result.diffusion.init_params(KEY, jnp.zeros((5, 2)))[result.diffusion.network_site]["embedding"]
    again = fit(network=network, context=sets, num_steps=1).params[result.diffusion.network_site]["embedding"]
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), again, result.params[result.diffusion.network_site]["embedding"]
    )
    assert jax.tree.structure(before) == jax.tree.structure(moved) and max(jax.tree.leaves(moved)) > 0


# --- the null value ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropped():
    return fit(context={"kind": WORDS, "size": SIZES}, context_drop=0.3, num_steps=300, batch_size=120, val_prop=0.0)


OAK = {"kind": "oak", "size": np.array([50.0, 50.0])}


@pytest.mark.slow
def test_conditional_and_unconditional_are_one_network(dropped):
    """The unconditional prior is that of all rows."""
    draws = dropped.prior(None).sample(KEY, (1000,))
    np.testing.assert_allclose(draws.mean(0), X.mean(0), atol=0.3)
    assert dropped.prior(OAK).sample(KEY, (1000,)).mean() > 2.0 > draws.mean()


def test_the_null_value_is_no_context():
    """The mean of all numbers is a context; zeros alone would be the same."""
    covariates = ppd.Covariates.from_rows(SIZES, drop=0.1)
    mean = covariates(SIZES.mean(0))
    assert abs(mean[:2]).max() < 1e-4 and mean[2] == 1 and not covariates.null().any()


def test_the_share_that_is_dropped():
    covariates = ppd.Covariates.from_rows(SIZES, drop=0.25)
    encoded = covariates.dropped(KEY, covariates(np.tile(SIZES, (50, 1))))
    assert abs((encoded == 0).all(1).mean() - 0.25) < 0.03
    assert ppd.Covariates.from_rows(SIZES).dropped(KEY, encoded) is encoded


@pytest.mark.slow
def test_guidance(dropped):
    """1 is the prior itself, 0 that without a context; beyond 1, draws lie beyond."""
    prior = dropped.prior(OAK)
    np.testing.assert_allclose(prior.guided(1.0).sample(KEY), prior.sample(KEY), rtol=1e-4)
    np.testing.assert_allclose(prior.guided(0.0).sample(KEY), dropped.prior(None).sample(KEY), rtol=1e-4)
    means = [prior.guided(w).sample(KEY, (400,)).mean() for w in (0.0, 1.0, 2.0)]
    assert means[0] < means[1] < means[2]
    assert np.isfinite(ppd.lower_bound(KEY, prior.guided(2.0), X[:4]).value).all()  # a chain of its own
    with pytest.raises(ValueError, match="guidance needs a prior with a context"):
        fit(context=WORDS).prior("oak").guided(2.0)
    with pytest.raises(ValueError, match="strength must be a finite number"):
        prior.guided(np.inf)


@pytest.mark.slow
def test_guided_bits():
    bits = (RNG.uniform(size=(60, 4)) < 0.5 * (1 + (WORDS[:60] == "oak"))[:, None] * 0.9).astype(int)
    diffusion = ppd.Diffusion(ppd.BinomialKernel((4,)), ppd.FixedSchedule.constant_erasure(5), ppd.networks.MLP((8,)))
    result = ppd.fit(
        KEY, diffusion, bits, context=WORDS[:60], context_drop=0.3, num_steps=2, batch_size=16, progress_bar=False
    )
    prior = result.prior("oak")
    np.testing.assert_array_equal(prior.guided(1.0).sample(KEY, (9,)), prior.sample(KEY, (9,)))
    assert set(np.unique(prior.guided(3.0).sample(KEY, (9,)))) <= {0, 1}


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_know_the_context(tmp_path, dropped):
    """The function of it without an example, a prior given one, and one that is guided."""
    ppd.save(tmp_path / "a.ppd", dropped.prior)
    again = ppd.load(tmp_path / "a.ppd")
    assert again == dropped.prior
    same(again(OAK), dropped.prior(OAK))
    for prior in (dropped.prior(OAK), dropped.prior(OAK).guided(1.5), dropped.prior(None)):
        ppd.save(tmp_path / "b.ppd", prior)
        loaded = ppd.load(tmp_path / "b.ppd")
        assert loaded == prior
        same(loaded.with_context(OAK), prior.with_context(OAK))
    dropped.save(tmp_path / "c.fit")
    assert ppd.load_fit(tmp_path / "c.fit").prior == dropped.prior


@pytest.mark.slow
def test_a_network_with_an_embedding_is_passed_back_in(tmp_path):
    network = ppd.networks.Embedded(ppd.networks.MLP((8,)), embedding=Pooled())
    sets = RNG.normal(size=(120, 5, 2))
    prior = fit(network=network, context=sets, num_steps=1).prior
    ppd.save(tmp_path / "a.ppd", prior)
    with pytest.raises(ValueError, match="network is needed: the file was saved with 'Embedded'"):
        ppd.load(tmp_path / "a.ppd")
    same(ppd.load(tmp_path / "a.ppd", network)(sets[0]), prior(sets[0]))
