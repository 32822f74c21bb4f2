"""What ``import pp_diffusion`` may not do, in a fresh interpreter."""

import json
import subprocess
import sys

PROBE = """
import json, sys
import jax
from jax._src import config as jax_config
before = dict(jax_config.config.values)
import pp_diffusion
from jax._src import xla_bridge
after = dict(jax_config.config.values)
roots = {name.split(".")[0] for name in sys.modules}
print(json.dumps({
    "unwanted": sorted(roots & {"arviz", "arviz_base", "arviz_stats", "matplotlib", "sklearn", "pandas", "xarray"}
                       | {m for m in sys.modules if m.startswith("orbax.checkpoint")}),
    "backends": sorted(xla_bridge._backends),
    "changed": sorted(k for k in after if k not in before or before[k] != after[k]),
}))
"""


def test_import_is_light_and_changes_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["unwanted"] == []
    assert found["backends"] == []  # an array made at import time would start one
    assert found["changed"] == []
