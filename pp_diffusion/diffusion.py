r"""A diffusion as NumPyro programs: whole trajectories under any ELBO, and the bound K in factors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro import handlers

from pp_diffusion import contexts
from pp_diffusion.checks import positive_int
from pp_diffusion.objectives import check_squared_errors, draw_steps, fixed_terms, step_cost, step_squared_error
from pp_diffusion.recipe import Recipe
from pp_diffusion.reverse import ReverseProcess
from pp_diffusion.trajectories import ForwardTrajectory, PosteriorTrajectory, ReverseTrajectory


class Diffusion(Recipe):
    r"""A kernel, a schedule and a network, joined to a diffusion probabilistic model.

    Immutable, a pytree (its arrays are leaves), and hashable by value.

    :param Kernel kernel: the Markov diffusion kernel.
    :param Schedule schedule: the diffusion rates.
    :param network: a linen module, an nnx module or a callable ``network(x_t, t)``, with ``t`` integers 1…T over the
        batch axes of ``x_t``; it is also given those of ``log_snr`` (clipped to ±20) and ``context`` that its
        signature names. Stock networks learn T and their outputs from here.
    :param parameterization: how the network's outputs become :math:`p(x_{t-1} \mid x_t)`; ``None`` takes the kernel's
        first (``"v"`` for Gaussian, ``"x0"`` for binomial kernels). With ``"direct"`` they *are* the paper's functions.
    :param last_step: ``"kernel"``: :math:`p(x_0 \mid x_1) = T_\pi` as in the paper, and the network is not called at
        t = 1; ``"network"``: it is; ``"discretized"``: integers 0…255, or :class:`~pp_diffusion.Discretized` for
        another number of levels, have the probabilities that the network's normal gives them.
    :param transform: a NumPyro transform from the model's space to the data's, such as
        :func:`~pp_diffusion.standardize`; x is in data units in every public function.
    :param name: prefixes the parameter sites, so that two diffusions live in one program; of equal names, they would
        share their parameters.
    :raises TypeError, ValueError: naming the argument that does not fit.

    .. doctest::

        >>> import jax, numpyro, optax, pp_diffusion as ppd
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> kernel, schedule = ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(20)
        >>> diffusion = ppd.Diffusion(kernel, schedule, ppd.networks.MLP((8,)))
        >>> svi = SVI(diffusion.bound_model, diffusion.bound_guide, optax.adam(1e-3), Trace_ELBO())
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> result = svi.run(jax.random.key(1), 3, x, batch_size=10, progress_bar=False)
        >>> diffusion.prior(result.params).sample(jax.random.key(2), (5,)).shape
        (5, 2)
    """

    def model(self, x: Any = None, *, context: Any = None, batch_size: int | None = None) -> Array:
        r"""The generative program, whole trajectories: site ``"path"`` holds :math:`x_1 … x_T` in the model's space,
        site ``"x"`` is :math:`x_0` in data units; plate ``"data"`` over the first axis of ``x``.

        Works with any ELBO. For a binomial kernel, whose path is discrete, use
        :class:`~numpyro.infer.TraceGraph_ELBO` (the others warn), or the bound pair, which has no latent site.

        :param x: data of shape ``(N, *event_shape)`` or one datum; ``None`` generates.
        :param context: covariates, an array (or pytree) with N as its first axis.
        :param batch_size: rows drawn per evaluation, by the plate's subsampling.
        :return: x.
        """
        x = None if x is None else self._rows_or_one(x)
        plate, batch_ndim = self._plate(x, context, batch_size)
        process = self.bind(context, batch_ndim)
        with plate as rows:
            process = process.with_context(contexts.take(context, rows))
            batch_shape = () if rows is None else (len(rows),)
            trajectory = ReverseTrajectory(self.kernel, process.rates, process, batch_shape=batch_shape)
            path = numpyro.sample("path", trajectory, infer={"event_dims": self._path_dims})
            last = self.space.law(process.last(jnp.take(path, 0, axis=-1 - self.kernel.event_ndim)))
            return numpyro.sample("x", last, obs=contexts.take(x, rows), infer={"event_dims": self._path_dims[1:]})

    def guide(
        self,
        x: Any,
        *,
        context: Any = None,
        batch_size: int | None = None,
        order: Literal["forward", "posterior"] = "forward",
    ) -> None:
        r"""The forward trajectory :math:`q(x_{1…T} \mid x_0)` as the guide of :meth:`model`; nothing in it is trained
        but a learned schedule.

        :param order: ``"forward"``: :math:`\prod q(x_t \mid x_{t-1})`; ``"posterior"``:
            :math:`q(x_T \mid x_0) \prod q(x_{t-1} \mid x_t, x_0)`, the same law in the order for which
            :class:`~numpyro.infer.TraceMeanField_ELBO` has analytic KLs.
        """
        if order not in ("forward", "posterior"):
            raise ValueError(f"order must be 'forward' or 'posterior'; got {order!r}")
        x = self._rows_or_one(x)
        rates = self.schedule.rates(self.schedule_param())
        plate, _ = self._plate(x, context, batch_size)
        with plate as rows:
            z = self.space.to_model(contexts.take(x, rows))
            trajectory: ForwardTrajectory | PosteriorTrajectory
            if order == "forward":
                trajectory = ForwardTrajectory(self.kernel, rates, z)
            else:
                trajectory = PosteriorTrajectory(self.kernel, rates, z, rng_key=numpyro.prng_key())
            numpyro.sample("path", trajectory, infer={"event_dims": self._path_dims})

    def bound_model(self, x: Any, *, context: Any = None, batch_size: int | None = None, num_times: int = 1) -> None:
        r"""The bound K in factors, with data and time steps subsampled; unbiased for the sum of K over the data.

        For :class:`~numpyro.infer.Trace_ELBO` and :class:`~numpyro.infer.TraceMeanField_ELBO`, which give the same.
        :class:`~numpyro.infer.RenyiELBO` raises: a log of a mean does not separate over the steps. Each datum gets
        times of its own, drawn by their importance and stratified over the batch; KLs are analytic.

        :param x: data of shape ``(N, *event_shape)``, or one datum.
        :param context: covariates, an array (or pytree) with N as its first axis.
        :param batch_size: rows drawn per evaluation, with replacement; ``None`` takes all.
        :param num_times: time steps drawn per row, evaluated in one network call.
        """
        self._subsampled_model(x, context, batch_size, num_times, step_cost, with_ends=True)

    def bound_guide(self, x: Any, *, context: Any = None, batch_size: int | None = None, num_times: int = 1) -> None:
        """The guide of :meth:`bound_model`: empty, for all latents are drawn inside and enter by factors."""

    def mse_model(self, x: Any, *, context: Any = None, batch_size: int | None = None, num_times: int = 1) -> None:
        r"""Squared errors: :math:`-\sum_t E \lVert x_{t-1} - f_\mu(x_t, t) \rVert^2`, in the model's space.

        Data and time steps are subsampled as in :meth:`bound_model`; the guide is :meth:`bound_guide`.

        The objective of later practice; no bound. The irreducible part, the variance of
        :math:`q(x_{t-1} \mid x_t, x_0)`, is left out: its mean stands for :math:`x_{t-1}`. :math:`f_\Sigma` gets no
        gradient and stays at its start: :math:`\beta_t` with the stock networks (but for ``"direct"``). For binomial
        kernels :math:`f_b` stands for :math:`f_\mu`.

        :param x: data of shape ``(N, *event_shape)``, or one datum.
        :param context: covariates, an array (or pytree) with N as its first axis.
        :param batch_size: rows drawn per evaluation, with replacement; ``None`` takes all.
        :param num_times: time steps drawn per row, evaluated in one network call.
        :raises ValueError: where the schedule is learned: the errors vanish with the rates; or where no step is the
            network's.
        """
        check_squared_errors(self.schedule, self.last_step)
        self._subsampled_model(x, context, batch_size, num_times, step_squared_error, with_ends=False)

    def check_data(self, x: Any, name: str = "x") -> Array:
        """``x`` as an array of data, refused where it cannot be one; see :meth:`DataSpace.check`."""
        return self.space.check(x, name)

    def to_model_space(self, x: Array) -> Array:
        """x in the model's space."""
        return self.space.to_model(x)

    # --- inner -------------------------------------------------------------------------------------------------

    @property
    def _path_dims(self) -> list[str]:
        return ["step", *(f"x_dim_{i}" for i in range(self.kernel.event_ndim))]

    def _subsampled_model(
        self,
        x: Any,
        context: Any,
        batch_size: int | None,
        num_times: int,
        cost_of: Callable[[Array, ReverseProcess, Array, Array], Array],
        *,
        with_ends: bool,
    ) -> None:
        """Minus the sum of ``cost_of`` over data and steps, both subsampled, as factors."""
        x = self._rows_or_one(x)
        num_times = positive_int("num_times", num_times)
        rng_key = numpyro.prng_key()
        if rng_key is None:
            raise ValueError("rows and times are drawn here: run it under numpyro.handlers.seed or in SVI")
        row_key, time_key, noise_key, end_key = jax.random.split(rng_key, 4)
        single = x.ndim == self.kernel.event_ndim
        x, context = (x[None], jax.tree.map(lambda c: jnp.asarray(c)[None], context)) if single else (x, context)
        _check_batch_size(len(x), context, batch_size)
        process = self.bind(context, 1)
        with self._data_plate(row_key, len(x), batch_size) as rows:
            if len(rows) < len(x):  # else they stay where they are, on whatever devices
                x, process = x[rows], process.with_context(contexts.take(context, rows))
            z = self.space.to_model(x)
            if with_ends:
                last, prior_kl = fixed_terms(end_key, process, z)
                numpyro.factor(f"{self.name}.ends", last - prior_kl - self.space.log_abs_det(z, x))
            num_steps = process.num_timesteps - process.first_network_step
            if num_steps:
                index, weight = draw_steps(time_key, process, len(rows), num_times)
                cost = weight * cost_of(noise_key, process, jnp.broadcast_to(z, (num_times, *z.shape)), index)
            else:
                cost = jnp.zeros((num_times, len(rows)))
            # A plate that is always subsampled, also when all steps are drawn: RenyiELBO then refuses this program.
            size = max(num_steps, num_times + 1)
            drawn = {f"{self.name}.time": jnp.arange(num_times)}
            with handlers.substitute(data=drawn), numpyro.plate(f"{self.name}.time", size, num_times, dim=-2):
                numpyro.factor(f"{self.name}.steps", -cost * (num_steps / size))

    def _rows_or_one(self, x: Any) -> Array:
        x = self.space.check(x)
        if x.ndim > self.kernel.event_ndim + 1:
            raise ValueError(f"x must have shape (N, {self.space.event_in_words}) or be one datum; got {x.shape}")
        return x

    def _plate(self, x: Array | None, context: Any, batch_size: int | None) -> tuple[Any, int]:
        """The plate ``"data"`` over rows (none for one datum, or for generation), and its number of axes."""
        leaves = jax.tree.leaves(context)
        if x is None:
            num_rows = jnp.shape(leaves[0])[0] if leaves and jnp.ndim(leaves[0]) else None
        else:
            num_rows = len(x) if x.ndim > self.kernel.event_ndim else None
        if num_rows is None:
            if batch_size is not None:
                raise ValueError(f"batch_size must be None without rows to draw from; got {batch_size}")
            return nullcontext(), 0
        _check_batch_size(num_rows, context, batch_size)
        return numpyro.plate("data", num_rows, subsample_size=batch_size), 1

    def _data_plate(self, rng_key: Array, num_rows: int, batch_size: int | None) -> Any:
        """The plate ``"data"`` with rows drawn here: its own drawing without replacement loops on a CPU."""
        if batch_size is None or batch_size == num_rows:
            return numpyro.plate("data", num_rows, dim=-1)
        rows = jax.random.randint(rng_key, (batch_size,), 0, num_rows)
        with handlers.substitute(data={"data": rows}):
            return numpyro.plate("data", num_rows, subsample_size=batch_size, dim=-1)


def _check_batch_size(num_rows: int, context: Any, batch_size: int | None) -> None:
    if batch_size is not None and not 1 <= positive_int("batch_size", batch_size) <= num_rows:
        raise ValueError(f"batch_size must be in 1…{num_rows}, the number of rows; got {batch_size}")
    contexts.check_rows(context, num_rows)
