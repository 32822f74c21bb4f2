"""Sphinx: ``pip install -e ".[docs]" && sphinx-build -W docs docs/_build``.

The tutorials and guides that are notebooks are executed, and again only where they have changed. ``DOCS_EXECUTE=0``
leaves them as they are, without figures: a check of a minute that all pages and links are whole.
"""

import os

project = "pp_diffusion"
author = "The pp_diffusion developers"
copyright = "The pp_diffusion developers"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
if os.environ.get("DOCS_OFFLINE_MATH"):  # formulas without a network: pip install sphinx-mathjax-offline
    extensions.append("sphinx-mathjax-offline")
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "jupyter_execute"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, where there are no widgets
nb_execution_mode = "off" if os.environ.get("DOCS_EXECUTE") == "0" else "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
suppress_warnings = ["myst-nb.lexer"] if nb_execution_mode == "off" else []  # known only once it has run

autosummary_generate = False  # tables that link to the entries below them on the same page
autodoc_member_order = "bysource"
autodoc_typehints = "none"

html_theme = "furo"
html_title = "pp_diffusion"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
copybutton_exclude = ".linenos, .gp, .go"
linkcheck_timeout = 20
linkcheck_retries = 2
