"""The documentation is built without a warning, and the blocks of its pages that are no notebooks run.

Notebooks run when the documentation is built (``sphinx-build -W docs docs/_build``); README and the tour in
``test_readme.py``.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import pp_diffusion as ppd

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = (
    "likelihood",
    "posteriors",
    "flow",
    "training",
    "conditional",
)  # of plain blocks
RUN_ELSEWHERE = {
    "tour": "tests/test_readme.py",
    "tutorials/coming_from": "two blocks of other packages, as their documentation has them",
    "guides/compile_times": "two settings of JAX, which would hold for all other tests",
}
#: What a block may take for granted, and the sizes that are made small; each is to be found on the page.
SMALL = {
    "likelihood": {"num_trajectories=256": "num_trajectories=32", "another_key, 768": "another_key, 32"},
    "posteriors": {
        "num_particles=1024, num_chains=8": "num_particles=16, num_chains=8, progress_bar=False",
        "ParticleGibbs(model, num_particles=4, num_chains=4)": "ParticleGibbs(regression, num_warmup=2, num_samples=4)",
        "rng_key, seen, y)": "rng_key, x[:3], x[:3, 0])",
    },
    "flow": {"num_particles=1000": "num_particles=16", "(1000,)": "(10,)"},
    "training": {
        "table)  # 200": "table, num_steps=20)  # 200",
        "num_steps=1_000_000": "num_steps=20",
        "num_steps=500, total_steps=4_000": "num_steps=5, total_steps=20",
        "batch_size=4096": "batch_size=16, num_steps=10",
        "num_steps=200_000, batch_size=32_768": "num_steps=10, batch_size=16",
        "jax.distributed.initialize()\n": "",
        "/shared/": "shared-",
        'f"rows-{jax.process_index()}-of-{jax.process_count()}.npy", mmap_mode': '"rows.npy", mmap_mode',
    },
    "conditional": {
        "context_drop=0.1)": "context_drop=0.1, num_steps=20)",
        "num_simulations=10_000": "num_simulations=200, num_steps=20",
        "num_particles=1000": "num_particles=20",
    },
}


def given(folder):
    """The names that the pages' blocks take for granted."""
    import arviz as az
    import numpy

    x = np.asarray(jax.random.normal(jax.random.key(0), (60, 2)))
    diffusion = ppd.Diffusion(
        ppd.GaussianKernel((2,)), ppd.FixedSchedule.log_linear(6), ppd.networks.MLP((8,)), transform=ppd.standardize(x)
    )
    fit = ppd.fit(jax.random.key(1), diffusion, x, num_steps=5, progress_bar=False)
    numpy.save(folder / "rows.npy", x)
    keys = {name: jax.random.key(i) for i, name in enumerate(("rng_key", "another_key", "key"))}
    few = {"x": x, "data": x, "table": x, "y": jnp.ones((1,)), "A": jnp.array([[1.0, -0.5]]), "d": 2}
    estimates = {
        name: ppd.estimate_log_prob(jax.random.key(2), fit.prior, x[:5], num, progress_bar=False)
        for name, num in (("short", 30), ("long", 40))
    }

    def regression(seen, y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(y)):
            row = numpyro.sample("x", fit.prior)
            numpyro.sample("seen", dist.Normal(row, 0.5).to_event(1), obs=seen)
            numpyro.sample("y", dist.Normal(slope * row[..., 0], 1.0), obs=y)

    return {
        "regression": regression,
        **{"jax": jax, "jnp": jnp, "np": np, "numpy": numpy, "numpyro": numpyro, "dist": dist, "ppd": ppd, "az": az},
        **{"MCMC": MCMC, "NUTS": NUTS, "constraints": constraints, "diffusion": diffusion, "fit": fit},
        **{"prior": fit.prior, "schedule": ppd.FixedSchedule.log_linear(6), "network": ppd.networks.MLP((8,))},
        **{"names": np.array(["oak", "elm"] * 30), "sizes": x, "low": -9.0, "high": 9.0, "centre": lambda x: x},
        **{"y_observed": jnp.ones(2), "Crescent": lambda centre: dist.Normal(centre, 1.0).to_event(1)},
        **keys,
        **few,
        **estimates,
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore")  # sizes at which nothing converges are said not to have
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    """One after the other, with what comes before them on the page; each as it stands but for its sizes."""
    monkeypatch.chdir(tmp_path)
    blocks = PYTHON.findall((DOCS / f"{page}.md").read_text())
    assert blocks
    text = "\n".join(blocks)
    missing = [old for old in SMALL[page] if old not in text]
    assert not missing
    scope = given(tmp_path)
    for number, block in enumerate(blocks):
        for old, new in SMALL[page].items():
            block = block.replace(old, new)
        exec(compile(block, f"{page}.md, block {number + 1}", "exec"), scope)


def test_no_page_has_blocks_that_nothing_runs():
    for path in DOCS.rglob("*.md"):
        page = str(path.relative_to(DOCS).with_suffix(""))
        if PYTHON.search(path.read_text()):
            assert page in PAGES or page in RUN_ELSEWHERE, page


def test_tutorials_and_guides_have_a_figure_and_are_notebooks():
    for path in [*(DOCS / "tutorials").glob("*.md"), *(DOCS / "guides").glob("*.md")]:
        text = path.read_text()
        assert text.startswith("---\nfile_format: mystnb\n"), path.name
        assert re.search(r"plt\.subplots|ppd\.plotting\.", text), path.name


@pytest.mark.parametrize("page", [*PAGES, "images", "tour", "how_close_how_fast", "index", "gallery"])
def test_pages_of_plain_blocks_have_a_figure_that_is_there(page):
    figures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", (DOCS / f"{page}.md").read_text())
    assert figures
    for words, path in figures:
        assert words and (DOCS / path).exists(), path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("myst_nb") is None, reason="needs the extra docs")
def test_the_documentation_is_built_without_a_warning(tmp_path):
    """All pages and links; notebooks are not executed."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", tmp_path / "trees", DOCS, tmp_path / "html"]
    environment = os.environ | {"DOCS_EXECUTE": "0"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "tutorials" / "table.html").exists()
