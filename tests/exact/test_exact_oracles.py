"""The oracles themselves, against independent arithmetic."""

import numpy as np
import oracles
import pytest


@pytest.mark.parametrize("schedule", [oracles.log_linear, oracles.constant_erasure, oracles.cosine])
def test_the_exact_reverse_process_has_the_data_as_its_law(schedule):
    chain = oracles.Chain(schedule(30))
    data = oracles.GaussianData(np.array([0.8, -1.5]), np.array([0.4, 1.6]))
    mean, variance = data.exact_reverse(chain).moments()
    # pi is N(0, 1), q(x_T) is not quite: e^-10 at log-SNR -20
    np.testing.assert_allclose(mean, data.mean, atol=1e-3)
    np.testing.assert_allclose(variance, data.scale**2, atol=1e-3)
    x = data.draw(0, 5)
    np.testing.assert_allclose(data.exact_reverse(chain).bound(chain, x), data.log_prob(x), atol=1e-3)


def test_constant_erasure_has_the_papers_rates():
    np.testing.assert_allclose(oracles.Chain(oracles.constant_erasure(7)).beta, 1 / np.arange(7, 0, -1), rtol=1e-13)


def test_the_wrong_reverse_process_is_below_its_own_log_likelihood():
    chain = oracles.Chain(oracles.log_linear(20, 1e-2, -3.0))
    data = oracles.GaussianData(np.array([0.8, -1.5]), np.array([0.4, 1.6]))
    model = oracles.wrong_reverse(chain, data)
    x = data.draw(1, 50)
    gap = model.log_prob(x) - model.bound(chain, x)
    assert gap.min() > 0 and gap.max() > 0.1


def test_the_bound_of_words_is_below_their_log_likelihood():
    table = np.random.default_rng(0).uniform(0.2, 0.8, (4, 8, 3))
    chain = oracles.BinaryChain(np.array([0.2, 0.5, 0.7]), np.array([0.2, 0.3, 0.5, 0.9]), table, "network")
    np.testing.assert_allclose(chain.probs.sum(), 1)
    assert (chain.bound < np.log(chain.probs)).all()
    assert (chain.second_moment > chain.probs**2).all()
