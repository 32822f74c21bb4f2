"""Digits given their label: draws of each kind, guided ones, and labels told by Bayes' rule from densities.

The model is in ``models/digits_given_label.py``. Draws are judged by a logistic regression on the training images.
p(label | x) comes from K of the image under each label, which no classifier was trained for; beside it, the logistic
regression's own accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pp_diffusion as ppd
from examples.report import arguments, mean_and_error, print_table, save_figure
from models import digits_given_label as script

STRENGTHS = (1.0, 2.0)


def classifier(data: Any) -> Any:
    """A logistic regression on the training images' levels."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=2_000, C=0.1).fit(_flat(data.train), np.asarray(data.train_labels))


def _flat(images: Any) -> np.ndarray:
    """Levels again, of images with noise."""
    return np.clip(np.floor(np.asarray(images)), 0, 16).reshape(-1, 64) / 16


def run(
    *, num_steps: int = 2_500, num_draws: int = 100, num_test: int = 360, figures: Path, progress: bool = True
) -> dict[str, Any]:
    """Trains, prints the table, writes the figure.

    :return: the shares of right labels.
    """
    data = ppd.datasets.digits(jax.random.key(0))
    fit = script.fit(jax.random.key(1), data, num_steps=num_steps, progress_bar=progress)
    judge, labels = classifier(data), np.arange(10)
    prior = fit.prior(labels)
    found, draws = {}, {}
    rows = []
    for strength in STRENGTHS:
        guided = prior if strength == 1 else prior.guided(strength)
        x = draws[strength] = guided.sample(jax.random.key(2), (num_draws,))
        right = judge.predict(_flat(x)).reshape(num_draws, 10) == labels
        found[f"draws, guided by {strength:g}"] = right.ravel()
    test, truth = data.test[:num_test], np.asarray(data.test_labels[:num_test])
    noisy = ppd.datasets.dequantize(jax.random.key(3), test)
    log_p = script.log_joint(jax.random.key(4), fit.prior, noisy)
    found["test images, by Bayes' rule"] = np.asarray(log_p).argmax(-1) == truth
    found["test images, by the logistic regression"] = judge.predict(_flat(test)) == truth
    for name, right in found.items():
        share, error = mean_and_error(right)
        rows.append((name, f"{100 * share:.1f} ± {100 * error:.1f} %"))
    print_table(f"Digits given their label, {num_steps} updates", ("labels right",), rows)
    without = ppd.lower_bound(jax.random.key(5), fit.prior(None), noisy).value
    given = ppd.lower_bound(jax.random.key(5), fit.prior(truth), noisy).value
    gain, error = mean_and_error(given - without)
    print(f"K is {gain:.2f} ± {error:.2f} nats higher with the label than without (log 10 is {np.log(10):.2f})")
    save_figure(_figure(draws), figures, "digits_given_label.png")
    return {name: float(right.mean()) for name, right in found.items()}


def _figure(draws: dict[float, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, (strength, x) in zip(figure.subplots(1, len(draws)), draws.items(), strict=True):
        rows = jnp.moveaxis(x[:10], 0, 1)  # a row for each label
        axes.imshow(rows.transpose(0, 2, 1, 3).reshape(-1, rows.shape[1] * 8), cmap="gray_r", vmin=0, vmax=17)
        axes.set(title="as learned" if strength == 1 else f"guided by {strength:g}", xticks=[], yticks=[])
    figure.suptitle("Digits drawn given their label, one in each row")
    return figure


if __name__ == "__main__":
    args = arguments(__doc__)
    size = {"num_steps": 5, "num_draws": 10, "num_test": 4} if args.small else {}
    run(**size, figures=args.figures, progress=args.progress)
