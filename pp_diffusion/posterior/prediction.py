r"""What each reverse step predicts, as twists see it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.schedules import Rates
from pp_diffusion.states.space import Prediction


def predict(process: ReverseProcess, x_t: Array, rates: Rates) -> Prediction:
    """The reverse step t >= 2 at these states, by one call of the network."""
    return process.kernel.state_space.predict(lambda x: process(x, rates), x_t, rates)


def predict_last(process: ReverseProcess, x_1: Array) -> Prediction:
    r"""The last step, :math:`p(x_0 \mid x_1)`: its own mean and variance are those of :math:`x_0`."""
    return process.kernel.state_space.predict_itself(x_1, process.rates.at(0), process.last(x_1))


def predict_start(process: ReverseProcess, batch_shape: tuple[int, ...]) -> Prediction:
    r"""The start, :math:`\pi(x_T)`, as a step T + 1 from nowhere."""
    kernel, rates = process.kernel, process.rates.at(-1)
    start = kernel.stationary().expand(batch_shape)
    nowhere = kernel.as_state(jnp.zeros(start.shape()))
    return kernel.state_space.predict_itself(nowhere, rates._replace(t=rates.t + 1), start)
