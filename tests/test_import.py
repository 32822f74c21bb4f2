"""What ``import pp_diffusion`` may not do, in a fresh interpreter."""

import json
import os
import runpy
import subprocess
import sys

PROBE = """
import json, sys
import jax
before = dict(jax.config.values)
import pp_diffusion
after = dict(jax.config.values)
roots = {name.split(".")[0] for name in sys.modules}
print(json.dumps({
    "unwanted": sorted(roots & {"arviz", "arviz_base", "arviz_stats", "matplotlib", "sklearn", "pandas", "xarray"}
                       | {m for m in sys.modules if m.startswith("orbax.checkpoint")}),
    "changed": sorted(k for k in after if k not in before or before[k] != after[k]),
}))
"""


def test_import_is_light_and_changes_nothing():
    environment = os.environ | {"JAX_PLATFORMS": "none"}  # an array made at import time would start one, and fail
    command = [sys.executable, "-W", "error", "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["unwanted"] == []
    assert found["changed"] == []


def test_dir_shows_the_public_names_only():
    """No module that was imported on the way, no private name; all of them can be had."""
    import pp_diffusion as ppd

    names = dir(ppd)
    assert {"Diffusion", "fit", "SMC", "datasets", "networks", "plotting", "solvers", "units"} <= set(names)
    assert not {"bounds", "posterior", "training", "states", "prior"} & set(names)
    assert all(hasattr(ppd, name) for name in names)
    assert not [name for name in names if name.startswith("_") and name != "__version__"]


def test_the_report_names_versions_and_devices(capsys):
    runpy.run_module("pp_diffusion", run_name="__main__")
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["pp_diffusion"].startswith("0.") and facts["jax"][0].isdigit() and ":0" in facts["devices"]
