"""The tasks of sbibm (Lueckmann et al. 2021) as NumPyro models, by the definitions in its appendix; and its files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from models import simulation


class Task(NamedTuple):
    """One of them.

    :ivar model: with the latent site ``x`` and the site ``y``.
    :ivar summary: of y, what a network is given.
    :ivar file: of the observation.
    """

    model: Callable[..., Any]
    summary: Callable[[Any], Any] = lambda y: y
    file: str = "observation"


class Observation(NamedTuple):
    """What was observed, and draws of the reference posterior."""

    y: np.ndarray
    reference: np.ndarray


def gaussian_mixture(y: Any = None) -> None:
    """A wide and a narrow normal about x, in a box."""
    x = numpyro.sample("x", dist.Uniform(-10 * jnp.ones(2), 10.0).to_event(1))
    scales = jnp.array([1.0, 0.1])[:, None] * jnp.ones(2)
    parts = dist.Normal(x, scales).to_event(1)
    numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), parts), obs=y)


def gaussian_linear(y: Any = None) -> None:
    """The mean of a normal, of ten numbers."""
    x = numpyro.sample("x", dist.Normal(jnp.zeros(10), jnp.sqrt(0.1)).to_event(1))
    numpyro.sample("y", dist.Normal(x, jnp.sqrt(0.1)).to_event(1), obs=y)


def slcp(y: Any = None) -> None:
    """Mean and covariance of four points in the plane, by five numbers."""
    x = numpyro.sample("x", dist.Uniform(-3 * jnp.ones(5), 3.0).to_event(1))
    first, second, correlation = x[2] ** 2, x[3] ** 2, jnp.tanh(x[4])
    covariance = jnp.array([[first**2, correlation * first * second], [correlation * first * second, second**2]])
    points = dist.MultivariateNormal(x[:2], covariance + 1e-6 * jnp.eye(2))
    numpyro.sample("y", points.expand([4]).to_event(1), obs=y)


def bernoulli_glm(design: Any, y: Any = None) -> None:
    """Spikes of a neuron under a stimulus, by an offset and a smooth filter."""
    size = design.shape[1] - 1
    differences = np.eye(size) - np.eye(size, k=-1)
    penalty = differences @ differences + np.diag(np.arange(size) / size) ** 0.5
    precision = np.zeros((size + 1, size + 1))
    precision[0, 0], precision[1:, 1:] = 0.5, penalty.T @ penalty
    x = numpyro.sample("x", dist.MultivariateNormal(np.zeros(size + 1), precision_matrix=precision))
    numpyro.sample("y", dist.Bernoulli(logits=design @ x).to_event(1), obs=y)


def tasks(folder: Path) -> dict[str, Task]:
    """By name."""
    design = jnp.asarray(read_array(folder / "bernoulli_glm" / "files" / "design_matrix.pt", 1000).reshape(100, 10))
    spikes = Task(partial(bernoulli_glm, design), lambda y: jnp.asarray(y, float) @ design, "observation_raw")
    four_points = Task(slcp, lambda y: y.reshape(8))
    others = {"two_moons": simulation.model, "gaussian_mixture": gaussian_mixture, "gaussian_linear": gaussian_linear}
    return {name: Task(model) for name, model in others.items()} | {"slcp": four_points, "bernoulli_glm": spikes}


def read_observation(folder: Path, name: str, file: str, number: int) -> Observation:
    """The observation of this number, 1…10, in the shape of the model's site."""
    files = folder / name / "files" / f"num_observation_{number}"
    y = np.loadtxt(files / f"{file}.csv", delimiter=",", skiprows=1, dtype=np.float32)
    reference = np.loadtxt(files / "reference_posterior_samples.csv.bz2", delimiter=",", skiprows=1, dtype=np.float32)
    return Observation(y.reshape(4, 2) if name == "slcp" else y, reference)


def read_array(path: Path, count: int) -> np.ndarray:
    """The numbers in a file of one PyTorch tensor in its old form, which end it, behind their count; no pickle is read.

    :raises ValueError: if it is none.
    """
    content = path.read_bytes()
    if np.frombuffer(content[-4 * count - 8 : -4 * count], np.int64) != count:
        raise ValueError(f"{path} must end with {count} numbers")
    return np.frombuffer(content[-4 * count :], np.float32)
