"""What ``import pp_diffusion`` may not do, in a fresh interpreter."""

import json
import os
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
