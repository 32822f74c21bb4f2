r"""Explicit Runge–Kutta methods with fixed steps, run by two scans: over the steps, and over their stages; and
multistep methods for draws by few network calls.

Why not :func:`diffrax.diffeqsolve`, whose methods :meth:`RungeKutta.of` takes over by their tableau: under a scan the
map has derivatives of every kind and order (:class:`~numpyro.infer.autoguide.AutoLaplaceApproximation` takes forward
ones of reverse ones, which diffrax's default adjoint refuses), the network is compiled once however many stages there
are, and nothing is loaded beyond JAX. ``benchmarks/flow_density.py`` measures both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pp_diffusion.checks import positive_int


class RungeKutta(NamedTuple):
    """A method by its Butcher tableau.

    :ivar weights: of the stages in a step.
    :ivar stages: for each stage, the weights of those before it.

    .. doctest::

        >>> from pp_diffusion.solvers import MIDPOINT
        >>> end = MIDPOINT.solve(lambda x, time, kind: -x, 1.0, starts=[0.0, 0.5], steps=[0.5, 0.5], kinds=[0, 0])
        >>> f"{end:.4f}"
        '0.3906'
    """

    weights: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, solver: Any) -> Self:
        """``solver`` itself, or an explicit Runge–Kutta method of diffrax, such as ``diffrax.Heun()``.

        :raises TypeError: for anything else.
        """
        if isinstance(solver, cls):
            return solver
        tableau: Any = getattr(solver, "tableau", None)
        if not hasattr(tableau, "b_sol") or getattr(tableau, "a_diagonal", None) is not None:
            raise TypeError(
                "solver must be a pp_diffusion.solvers.RungeKutta or an explicit Runge-Kutta method of diffrax, such "
                f"as diffrax.Heun(); got {solver!r}"
            )
        weights = [float(b) for b in tableau.b_sol]
        stages: list[tuple[float, ...]] = [(), *(tuple(float(a) for a in row) for row in tableau.a_lower)]
        while not weights[-1]:  # a stage that only the next step uses
            weights, stages = weights[:-1], stages[:-1]
        return cls(tuple(weights), tuple(stages))

    @property
    def num_stages(self) -> int:
        """Calls of the field in a step."""
        return len(self.weights)

    def solve(self, field: Callable[[Any, Array, Array], Any], state: Any, starts: Any, steps: Any, kinds: Any) -> Any:
        """The state after all steps.

        :param field: ``(state, time, kind) -> its derivative by time``, a pytree like the state.
        :param starts: the time at which each step begins.
        :param steps: their lengths, of either sign.
        :param kinds: what the field is told with each step besides the time.
        """
        num = self.num_stages
        lower = np.zeros((num, num))
        for i, row in enumerate(self.stages):
            lower[i, : len(row)] = row
        field = jax.checkpoint(field, prevent_cse=False)  # for gradients, it is run again rather than stored
        dtype = jnp.result_type(float)
        rows, places = jnp.asarray(lower, dtype), jnp.asarray(lower.sum(1), dtype)
        weights = jnp.asarray(self.weights, dtype)

        def add(state: Any, step: Array, weights: Array, slopes: Any) -> Any:
            return jax.tree.map(lambda s, k: s + step * jnp.tensordot(weights, k, 1), state, slopes)

        def one_step(state: Any, at: tuple[Array, Array, Array]) -> tuple[Any, None]:
            start, step, kind = at

            def one_stage(slopes: Any, at: tuple[Array, Array, Array]) -> tuple[Any, None]:
                i, row, place = at
                slope = field(add(state, step, row, slopes), start + place * step, kind)
                return jax.tree.map(lambda all, one: all.at[i].set(one), slopes, slope), None

            none = jax.tree.map(lambda s: jnp.zeros((num, *jnp.shape(s)), jnp.result_type(s)), state)
            slopes, _ = jax.lax.scan(one_stage, none, (jnp.arange(num), rows, places))
            return add(state, step, weights, slopes), None

        state = jax.tree.map(lambda s: jnp.asarray(s, dtype), state)
        return jax.lax.scan(one_step, state, (jnp.asarray(starts), jnp.asarray(steps), jnp.asarray(kinds)))[0]


class Multistep(NamedTuple):
    r"""Draws by few calls of the network: one for each step, which the steps before it help.

    An exponential integrator, which follows the linear part of the ODE exactly. With :math:`\lambda` the log-SNR,
    :math:`\alpha, \sigma` signal and noise, and :math:`h = (\lambda' - \lambda)/2` a step,

    .. math::
        x' = \frac{\sigma'}{\sigma}\, x + \alpha' (1 - e^{-h})\, D, \qquad
        D = E[x_0 \mid x, \lambda] + \frac{h}{2 h_{\text{before}}} \left( E[x_0 \mid x, \lambda] -
        E[x_0 \mid x, \lambda]_{\text{before}} \right),

    which is DPM-Solver++(2M) (Lu et al. 2022); of order 1, :math:`D = E[x_0 \mid x, \lambda]`, it is DDIM (Song et al.
    2021). The last call is at the first level, where the score is held, as a flow's solver holds it:
    :math:`x_0 = \tfrac12 (x / \alpha + E[x_0 \mid x, \lambda])`. It has no density of its own: a flow with this sampler
    has that of its solver.

    :ivar num_calls: network calls, one after another; at least 2, of which one finds where to start from.
    :ivar order: 1 or 2.

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from pp_diffusion.solvers import Multistep
        >>> log_snrs = jnp.linspace(-9, 9, 19)
        >>> signal = jnp.sqrt(jax.nn.sigmoid(log_snrs))
        >>> end = Multistep(20).draw(lambda x, i: signal[i] * x, 1.5, log_snrs)  # N(0, 1): the map leaves x as it is
        >>> f"{end:.1f}"
        '1.5'
    """

    num_calls: int = 20
    order: int = 2

    def checked(self) -> Self:
        """Itself.

        :raises ValueError: naming what cannot be.
        """
        if positive_int("num_calls", self.num_calls) < 2:
            raise ValueError("num_calls must be at least 2: one finds where to start from")
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2; got {self.order!r}")
        return self

    def draw(self, predict: Callable[[Array, Array], Array], x: Any, log_snrs: Any) -> Array:
        """x at the data.

        :param predict: ``(x, i)`` -> E[x_0 | x] at the i-th of the levels.
        :param x: at the first of the levels.
        :param log_snrs: of the levels, from noise to data; equal ones stand still.
        """
        x, log_snrs = jnp.asarray(x, jnp.result_type(float)), jnp.asarray(log_snrs, jnp.result_type(float))
        predict = jax.checkpoint(predict, prevent_cse=False)
        steps = 0.5 * jnp.diff(log_snrs)
        before = jnp.append(0.0, steps[:-1])
        share = jnp.where(before > 0, 0.5 * (self.order - 1) * steps / jnp.where(before > 0, before, 1.0), 0.0)
        log_noise, signal = 0.5 * jax.nn.log_sigmoid(-log_snrs), jnp.sqrt(jax.nn.sigmoid(log_snrs))
        of_x, of_x_0 = jnp.exp(jnp.diff(log_noise)), -signal[1:] * jnp.expm1(-steps)

        def step(carry: tuple[Array, Array], at: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            x, last = carry
            i, share, of_x, of_x_0 = at
            x_0 = predict(x, i)
            return (of_x * x + of_x_0 * (x_0 + share * (x_0 - last)), x_0), None

        at = (jnp.arange(len(steps)), share, of_x, of_x_0)
        (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), at)
        return 0.5 * (x / signal[-1] + predict(x, jnp.asarray(len(steps))))


#: Order 1: DDIM's, with steps in another time.
EULER = RungeKutta((1.0,), ((),))
#: Order 2.
MIDPOINT = RungeKutta((0.0, 1.0), ((), (0.5,)))
#: Order 3 (Ralston).
RALSTON3 = RungeKutta((2 / 9, 1 / 3, 4 / 9), ((), (0.5,), (0.0, 0.75)))
#: Order 4 (Kutta's 3/8 rule).
RK4 = RungeKutta((1 / 8, 3 / 8, 3 / 8, 1 / 8), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)))
#: Order 5 (Tsitouras 2011).
TSIT5 = RungeKutta(
    (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
    ),
    (
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    ),
)
