"""Sphinx: ``pip install -e ".[docs]" && sphinx-build -W docs docs/_build``."""

project = "pp_diffusion"
author = "The pp_diffusion developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.doctest", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
html_theme = "furo"
exclude_patterns = ["_build"]
