"""Swiss roll (the paper, appendix D.1.1): T = 40 Gaussian steps, learned rates, a network over both coordinates.

The program is written out below; ``diffusion`` is the same model as one object, for training and for use as a prior.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Trace_ELBO

import pp_diffusion as ppd

T = 40
kernel = ppd.GaussianKernel(event_shape=(2,))
schedule = ppd.LearnedSchedule(num_timesteps=T, first_beta=3e-4)
# f_mu and f_Sigma by v-prediction: the outputs are v and the log of a variance ratio
network = ppd.networks.MLP((128, 128, 128), num_timesteps=T, outputs=("real", "real"))
params = {"network": "diffusion.network$params", "schedule": "diffusion.schedule$params"}


def rates():
    """beta_1 is fixed; the rest of the schedule is learned with the network."""
    return schedule.rates(numpyro.param(params["schedule"], schedule.init_params()))


def reverse_process():
    """p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t))."""
    x, t = jnp.zeros((1, 2)), jnp.ones(1, int)
    weights = numpyro.param(params["network"], lambda key: network.init(key, x, t, jnp.zeros(1))["params"])

    def reverse(x_t, step):
        t, log_snr = (jnp.broadcast_to(a, x_t.shape[:-1]) for a in (step.t, step.log_snr))
        v, log_excess = network.apply({"params": weights}, x_t, t, log_snr=jnp.clip(log_snr, -20, 20))
        return kernel.parameterizations["v"].reverse(kernel, x_t, step, v, log_excess)

    return reverse


def model(x=None, *, loc=0.0, scale=1.0):
    """The reverse trajectory from N(0, 1); its last step is the kernel's own with beta_1."""
    steps, reverse = rates(), reverse_process()
    with numpyro.plate("data", 100 if x is None else len(x)):
        path = numpyro.sample("path", ppd.ReverseTrajectory(kernel, steps, reverse))
        last = kernel.transition(path[..., 0, :], steps.beta[0])
        in_data_units = dist.transforms.AffineTransform(jnp.broadcast_to(loc, 2), jnp.broadcast_to(scale, 2))
        return numpyro.sample("x", dist.TransformedDistribution(last, in_data_units), obs=x)


def guide(x, *, loc=0.0, scale=1.0):
    """The forward trajectory: noise is added until nothing of the datum is left."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("path", ppd.ForwardTrajectory(kernel, rates(), (x - loc) / scale))


def diffusion(transform=None):
    """The same model as an object."""
    return ppd.Diffusion(kernel, schedule, network, transform=transform)


if __name__ == "__main__":
    data = ppd.datasets.swiss_roll(jax.random.key(0), 50_000, 1_000)
    units = ppd.standardize(data.train)
    fit = ppd.fit(jax.random.key(1), diffusion(units), data.train, num_steps=4_000)
    bound = ppd.lower_bound(jax.random.key(2), fit.prior, data.test)
    loss = Trace_ELBO().loss(jax.random.key(3), fit.params, model, guide, data.test, loc=units.loc, scale=units.scale)
    bound.print_summary()
    print(
        f"K by the program above: {-loss / len(data.test):.4f} nats; exact log p: {data.log_prob(data.test).mean():.4f}"
    )
