"""Binary heartbeat (the paper, appendix D.1.2): 20 bits, a 1 in every fifth bin, T = 2000 binomial steps to B(0.2).

The program is written out below; ``diffusion`` is the same model as one object, for training and for use as a prior.
"""

import jax
import jax.numpy as jnp
import numpyro
from numpyro.infer import TraceGraph_ELBO

import pp_diffusion as ppd

LENGTH, T = 20, 2000
kernel = ppd.BinomialKernel(event_shape=(LENGTH,), probs=0.2)
schedule = ppd.FixedSchedule.constant_erasure(T)  # beta_t = 1 / (T - t + 1)
# f_b through x_0: the output is the logit of P(x_0 = 1 | x_t), bit by bit
network = ppd.networks.MLP((50, 50, 50), num_timesteps=T, outputs=("real",))


def reverse_process():
    """p(x_{t-1} | x_t) = B(f_b(x_t, t))."""
    x, t = jnp.zeros((1, LENGTH)), jnp.ones(1, int)
    weights = numpyro.param("diffusion.network$params", lambda key: network.init(key, x, t, jnp.zeros(1))["params"])

    def reverse(x_t, step):
        t, log_snr = (jnp.broadcast_to(a, x_t.shape[:-1]) for a in (step.t, step.log_snr))
        (logits,) = network.apply({"params": weights}, x_t, t, log_snr=jnp.clip(log_snr, -20, 20))
        return kernel.parameterizations["x0"].reverse(kernel, x_t, step, logits)

    return reverse


def model(x=None):
    """The reverse trajectory from B(0.2); its last step is the kernel's own with beta_1."""
    steps, reverse = schedule.rates(), reverse_process()
    with numpyro.plate("data", 100 if x is None else len(x)):
        path = numpyro.sample("path", ppd.ReverseTrajectory(kernel, steps, reverse))
        return numpyro.sample("x", kernel.transition(path[..., 0, :], steps.beta[0]), obs=x)


def guide(x):
    """The forward trajectory: bits are redrawn from B(0.2) until nothing of the datum is left."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("path", ppd.ForwardTrajectory(kernel, schedule.rates(), x))


def diffusion():
    """The same model as an object."""
    return ppd.Diffusion(kernel, schedule, network)


if __name__ == "__main__":
    data = ppd.datasets.heartbeat(jax.random.key(0))
    fit = ppd.fit(jax.random.key(1), diffusion(), data.train, num_steps=4_000)
    ppd.lower_bound(jax.random.key(2), fit.prior, data.test).print_summary()
    loss = TraceGraph_ELBO().loss(jax.random.key(3), fit.params, model, guide, data.test)
    print(f"K by the program above (noisier): {-loss / len(data.test):.4f} nats; exact log p: {-jnp.log(5):.4f}")
