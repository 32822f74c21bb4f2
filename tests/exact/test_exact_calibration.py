"""Simulation-based calibration: ranks of the truth among posterior draws are uniform (Talts et al. 2018)."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import chi2

import pp_diffusion as ppd

NUM_TRIALS, NUM_DRAWS, NUM_BINS = 240, 9, 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pp_diffusion.CollapseWarning")  # two of 240 may, and count as the others do
@pytest.mark.optimized
def test_ranks_of_digits_seen_through_random_matrices():
    """A prior trained on 8×8 digits; x from it, y = A x + noise with a new A of 3 rows for each; all in one plate.

    Ranks of three functions of x (what was seen, one pixel, all ink) by nine draws of 300 particles; chi-square at 1 %
    over the three.
    """
    digits = ppd.datasets.digits(jax.random.key(0)).train.reshape(-1, 64)
    digits = digits + np.random.default_rng(1).uniform(size=digits.shape)
    scale = ppd.standardize(digits)
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((64,)),
        ppd.FixedSchedule.log_linear(60, first_beta=1e-2, final_log_snr=-6.0),
        ppd.networks.MLP((128, 128)),
        transform=scale,
    )
    prior = ppd.fit(jax.random.key(1), diffusion, digits, num_steps=3000, batch_size=128, progress_bar=False).prior
    keys = jax.random.split(jax.random.key(2), 4)
    matrices = jax.random.normal(keys[0], (NUM_TRIALS, 3, 64)) / 8 / jnp.asarray(scale.scale)

    def model(y):
        with numpyro.plate("digits", NUM_TRIALS):
            x = numpyro.sample("x", prior)
            seen = jnp.einsum("nkd,nd->nk", matrices, x)
            numpyro.sample("y", dist.Normal(seen, 0.3).to_event(1), obs=y)

    truth = prior.sample(keys[1], (NUM_TRIALS,))
    clean = jnp.einsum("nkd,nd->nk", matrices, truth)
    smc = ppd.SMC(model, num_particles=300, progress_bar=False)
    smc.run(keys[2], clean + 0.3 * jax.random.normal(keys[3], clean.shape))
    assert np.median(smc.ess.min(0)) > 20  # or there is nothing to calibrate
    assert (smc.verdict == "collapsed").sum() <= 2
    draws = np.asarray(smc.get_samples()["x"], np.float64)
    draws = np.random.default_rng(0).permutation(draws)[:NUM_DRAWS]  # a few, so that copies are rare
    functions = {
        "seen": lambda x: np.einsum("nd,...nd->...n", np.asarray(matrices[:, 0]), x),
        "pixel": lambda x: x[..., 27],
        "ink": lambda x: x.sum(-1),
    }
    for name, function in functions.items():
        ranks = (function(draws) < function(np.asarray(truth))).sum(0)
        counts = np.bincount(ranks, minlength=NUM_BINS)
        statistic = ((counts - NUM_TRIALS / NUM_BINS) ** 2).sum() / (NUM_TRIALS / NUM_BINS)
        assert statistic < chi2.isf(0.01 / len(functions), NUM_BINS - 1), (name, counts)
