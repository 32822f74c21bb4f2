"""``python -m pp_diffusion``: the versions and devices that a question or a report of a bug should name."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import jax

from pp_diffusion.version import __version__

PACKAGES = ("numpyro", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "arviz", "numpy")


def report() -> str:
    """One fact to a line."""
    facts = {"pp_diffusion": __version__, "Python": f"{platform.python_version()}, {platform.platform()}"}
    facts |= {name: _version_of(name) for name in PACKAGES}
    facts["devices"] = ", ".join(f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices())
    facts["processes"] = str(jax.process_count())
    facts["64 bits"] = "on" if jax.config.values["jax_enable_x64"] else "off"
    facts["compilation cache"] = jax.config.values["jax_compilation_cache_dir"] or "none"
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
