"""Regression with a whole density: p(y | c) of one number given covariates, by 100 Gaussian steps.

A mean that bends, noise that grows, and skew: what least squares has no words for. The program is written out below;
``diffusion`` is the same model as one object.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd

T = 100
kernel = ppd.GaussianKernel(event_shape=(1,))
schedule = ppd.FixedSchedule.log_linear(T, first_beta=1e-3, final_log_snr=-7.0)
network = ppd.networks.MLP(hidden_units=(64, 64), num_timesteps=T, outputs=("real", "real"))


def reverse_process(context):
    """p(y_{t-1} | y_t, c) = N(f_mu(y_t, t, c), f_Sigma(y_t, t, c))."""
    one = jnp.zeros((1, 1)), jnp.ones(1, int), jnp.zeros(1), context[:1]
    weights = numpyro.param("diffusion.network$params", lambda key: network.init(key, *one)["params"])

    def reverse(y_t, step):
        t, log_snr = (jnp.broadcast_to(a, y_t.shape[:-1]) for a in (step.t, step.log_snr))
        given = jnp.broadcast_to(context, (*y_t.shape[:-1], context.shape[-1]))
        v, log_excess = network.apply({"params": weights}, y_t, t, log_snr=jnp.clip(log_snr, -20, 20), context=given)
        return kernel.parameterizations["v"].reverse(kernel, y_t, step, v, log_excess)

    return reverse


def model(y=None, *, context, loc=0.0, scale=1.0):
    """The reverse trajectory from N(0, 1), given the covariates; the network describes the last step too."""
    steps, reverse = schedule.rates(), reverse_process(context)
    with numpyro.plate("data", len(context)):
        path = numpyro.sample("path", ppd.ReverseTrajectory(kernel, steps, reverse))
        last = reverse(path[..., 0, :], steps.at(0))
        units = dist.transforms.AffineTransform(loc, scale)
        return numpyro.sample("x", dist.TransformedDistribution(last, units), obs=y)


def guide(y, *, context, loc=0.0, scale=1.0):
    """The forward trajectory, which knows no covariates."""
    with numpyro.plate("data", len(y)):
        numpyro.sample("path", ppd.ForwardTrajectory(kernel, schedule.rates(), (y - loc) / scale))


def diffusion(transform=None):
    """The same model as an object."""
    return ppd.Diffusion(kernel, schedule, network, last_step="network", transform=transform)


def law(context):
    """What the pairs of ``simulate`` come from: a gamma's skew about a wave, wider to the right."""
    wave, width = jnp.sin(3 * context[..., 0]), 0.2 + 0.3 * (context[..., 0] > 0)
    return dist.TransformedDistribution(dist.Gamma(4.0, 2.0), dist.transforms.AffineTransform(wave, width))


def simulate(rng_key, num_rows):
    """Covariates of shape (N, 2), of which only the first tells, and y of shape (N, 1)."""
    first, second = jax.random.split(rng_key)
    context = jax.random.uniform(first, (num_rows, 2), minval=-1.0)
    return context, law(context).sample(second)[:, None]


if __name__ == "__main__":
    context, y = simulate(jax.random.key(0), 10_000)
    fit = ppd.fit(jax.random.key(1), diffusion(units := ppd.standardize(y)), y, context=context, num_steps=2_000)
    context, y = simulate(jax.random.key(2), 1_000)
    bound, exact = ppd.lower_bound(jax.random.key(3), fit.prior(context), y), law(context).log_prob(y[:, 0])
    print(f"K {bound.value.mean():.3f} nats, {(exact - bound.value).mean():.3f} below the truth")
    few = {"context": fit.covariates(context[:100]), "loc": units.loc, "scale": units.scale}
    loss = Trace_ELBO().loss(jax.random.key(4), fit.params, model, guide, y[:100], **few)
    print(f"K by the program above: {-loss / 100:.3f} nats for 100 of the rows")
