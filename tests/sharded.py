"""Run by test_sharding.py in processes of their own: ``sharded.py FOLDER [x64] [process count]``.

The same training on one device and on a mesh; what came is written to FOLDER.
"""

import json
import os
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import pp_diffusion as ppd
from pp_diffusion import weights
from pp_diffusion.sharding import as_layout
from pp_diffusion.training.forms import as_source
from pp_diffusion.training.update import OBJECTIVES, Settings, first_state, run

X = np.random.default_rng(0).normal(size=(1024, 3)) @ np.random.default_rng(1).normal(size=(3, 3)) / 2


@cache
def diffusion():
    """Made when processes know each other and the precision is set."""
    return ppd.Diffusion(
        ppd.GaussianKernel((3,)),
        ppd.LearnedSchedule(10, 1e-2),
        ppd.networks.MLP((32, 32)),
        transform=ppd.standardize(X),
    )


WAYS = {"rows": {}, "all": {"batch_size": 1024}, "parts": {"batch_size": 1024, "accumulate": 4}}


def fit(x, mesh, num_steps, **settings):
    settings = {"batch_size": 64, "progress_bar": False, "val_prop": 0.0, **settings}
    return ppd.fit(jax.random.key(1), diffusion(), x, num_steps=num_steps, mesh=mesh, **settings)


def flat(params):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(params)])


def as_numbers(leaf):
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def bound(params):
    params = jax.tree.map(np.asarray, params)
    return float(ppd.lower_bound(jax.random.key(2), diffusion().prior(params), X, num_samples=2).value.mean())


def gradients(x, mesh):
    """Of one step, from what it does to the parameters at a rate of 1."""
    start = fit(x, mesh, 1, optimizer=optax.sgd(0.0), average=None).params
    return {
        name: (flat(start) - flat(fit(x, mesh, 1, optimizer=optax.sgd(1.0), average=None, **how).params)).tolist()
        for name, how in {
            "rows": {},
            "all": {"batch_size": 1024},
            "parts": {"batch_size": 1024, "accumulate": 4},
        }.items()
    }


def memory(mesh):
    """Bytes that a device needs for an update of 4096 rows, beside its data; and what is sent but sums."""
    layout = as_layout(mesh)
    source = as_source(diffusion().space, np.tile(X, (8, 1)), None, 4096, jax.random.key(0), layout, noise=0.0)
    settings = Settings(optax.adam(1e-3), 1, 0.9, OBJECTIVES["bound"], False, 1, False, layout)
    state, _ = first_state(diffusion(), source.example, jax.random.key(0), settings)
    state = layout.whole(state._replace(total=jnp.asarray(1)))
    program = run.lower(diffusion(), state, source.feed, jnp.asarray(1), settings).compile()
    sent = {name for name in ("all-gather", "all-to-all", "collective-permute") if f" {name}(" in program.as_text()}
    return program.memory_analysis().temp_size_in_bytes, sorted(sent)


def everything_else(mesh):
    """Draws, bounds, likelihoods and particles of rows and keys that are spread, beside those that are not."""
    layout = as_layout(mesh)
    prior = diffusion().prior(diffusion().init_params(jax.random.key(0)))
    rows = jnp.asarray(X[:64], float)
    keys = jax.random.split(jax.random.key(3), 8)

    def model(y):
        with numpyro.plate("rows", len(y)):
            x = numpyro.sample("x", prior)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    def latent_scale(y):
        x = numpyro.sample("x", dist.Normal(jnp.zeros(3), 1).to_event(1))
        numpyro.sample("y", dist.Normal(x, numpyro.sample("scale", dist.HalfNormal(1.0))).to_event(1), obs=y)

    def particles(smc, y):
        smc.run(jax.random.key(6), y)
        return smc.log_evidences, smc.get_samples(group_by_chain=True)["x"], jax.tree.leaves(smc.state)

    def of(x, keys, mesh):
        settings = {"num_chains": 8, "mesh": mesh}
        smc = ppd.SMC(model, num_particles=32, progress_bar=False, **settings)
        tempered = ppd.TemperedSMC(latent_scale, num_particles=30, **settings)
        return {
            "draws": jax.jit(jax.vmap(prior.sample))(keys),
            "bound": ppd.lower_bound(jax.random.key(4), prior, x).value,
            "chains": particles(smc, rows[:2]),
            "tempered": particles(tempered, rows[0]),
            "likelihood": ppd.estimate_log_prob(jax.random.key(5), prior, x, 30).value,
        }

    def differ(a, b):
        a, b = ([x for x in map(as_numbers, jax.tree.leaves(tree)) if x.dtype.kind == "f"] for tree in (a, b))
        return max(float(np.abs(x - y).max(initial=0)) for x, y in zip(a, b, strict=True))

    def devices(tree):
        """The most devices that share one of its arrays."""
        arrays = [a for a in jax.tree.leaves(tree) if isinstance(a, jax.Array)]
        return max(len({str(index) for index in a.sharding.devices_indices_map(a.shape).values()}) for a in arrays)

    weighed, weights_of_rows = [], weights.weights_of_rows
    one = of(rows, keys, None)
    weights.weights_of_rows = lambda prior, x, *rest: weighed.append(x) or weights_of_rows(prior, x, *rest)
    spread = of(layout.rows(rows), layout.rows(keys), mesh)
    shared = {name: devices(spread[name]) for name in one if name != "likelihood"} | {"likelihood": devices(weighed)}
    return {name: (differ(one[name], spread[name]), shared[name]) for name in one}


def main():
    folder, processes = Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    jax.config.update("jax_enable_x64", sys.argv[2] == "x64")
    x, found = X, {}
    if processes > 1:
        rank = int(os.environ["RANK"])
        jax.distributed.initialize(os.environ["ADDRESS"], processes, rank)
        x = np.split(X, processes)[rank]
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    found["gradients"] = gradients(x, mesh)
    trained = fit(x, mesh, 200)
    found["params"] = flat(trained.params).tolist()
    found["bound"] = bound(trained.params) if processes == 1 else None
    if sys.argv[2] == "x64":
        found["held_out"] = fit(x, mesh, 60, val_prop=0.25).validation.values.tolist()
        for _ in range(2):  # the second call goes on from the checkpoint of the first
            half = fit(x, mesh, 30, total_steps=60, val_prop=0.25, checkpoint_dir=folder / "run")
        found["resumed"] = half.validation.values.tolist()
    if processes == 1:
        alone = fit(x, None, 200).params
        found["one"] = {"gradients": gradients(x, None), "params": flat(alone).tolist(), "bound": bound(alone)}
    if processes == 1 and sys.argv[2] == "x64":
        found["one"]["held_out"] = fit(x, None, 60, val_prop=0.25).validation.values.tolist()
        found["memory"] = memory(mesh), memory(None)
        found["else"] = everything_else(mesh)
    if jax.process_index() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
