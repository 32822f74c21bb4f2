"""Handwritten digits given which they are: one network that draws any digit, a digit of a kind, and tells kinds apart.

The diffusion is that of ``digits.py``; a tenth of the labels is dropped in training. By Bayes' rule, p(label | x) is
proportional to p(x | label), of which K is a bound.
"""

from functools import partial

import jax
import jax.numpy as jnp

import pp_diffusion as ppd

SHAPE, T, DROP = (8, 8), 500, 0.1


def diffusion():
    """Over images, given whatever the network is given."""
    return ppd.Diffusion(
        ppd.GaussianKernel(event_shape=SHAPE),
        ppd.FixedSchedule.log_linear(T, first_beta=3e-2, final_log_snr=-6.0),
        ppd.networks.Entrywise(),
        last_step="network",
        transform=ppd.UniformBlocks(widths=(1, 15, 1), centres=(-1.25, 0, 1.25), scales=(0.25, 0.3, 0.25)),
    )


def batch(rng_key, levels, labels, size=256, shifted=0.3):
    """Rows drawn at random, a share of them shifted by up to a pixel, with fresh noise on their levels; and labels."""
    row_key, which_key, shift_key, noise_key = jax.random.split(rng_key, 4)
    rows = jax.random.randint(row_key, (size,), 0, len(levels))
    x = jnp.pad(levels, ((0, 0), (1, 1), (1, 1)))[rows]
    moved = jax.random.bernoulli(which_key, shifted, (size, 1))
    corner = jnp.where(moved, jax.random.randint(shift_key, (size, 2), 0, 3), 1)
    x = jax.vmap(partial(jax.lax.dynamic_slice, slice_sizes=SHAPE))(x, corner)
    return ppd.datasets.dequantize(noise_key, x), labels[rows]


def fit(rng_key, data, **settings):
    """Trains on images and labels; ``fit.prior(label)`` is p(x | label), ``fit.prior(None)`` is p(x)."""
    draw = partial(batch, levels=data.train, labels=data.train_labels)
    covariates = ppd.Covariates.from_rows(data.train_labels, drop=DROP)
    return ppd.fit(rng_key, diffusion(), draw, covariates=covariates, context_drop=DROP, **settings)


def log_joint(rng_key, prior, images, *, num_samples=4):
    """K of each image under each label, shape ``(N, 10)``; with equal priors, log p(x, label) up to a constant.

    All labels see the same noise, so that what they differ by is known better than each.
    """

    def given(label):
        return ppd.lower_bound(rng_key, prior(label), images, estimator="analytic", num_samples=num_samples).value

    return jnp.stack([given(label) for label in range(10)], -1)


if __name__ == "__main__":
    data = ppd.datasets.digits(jax.random.key(0))
    result = fit(jax.random.key(1), data, num_steps=1_500)
    test = ppd.datasets.dequantize(jax.random.key(2), data.test[:50])
    log_p = log_joint(jax.random.key(3), result.prior, test)
    right = (log_p.argmax(-1) == data.test_labels[:50]).mean()
    print(f"K {log_p[jnp.arange(50), data.test_labels[:50]].mean():.2f} nats given the label")
    print(f"labels by Bayes' rule: {100 * right:.0f} % of 50 right")
