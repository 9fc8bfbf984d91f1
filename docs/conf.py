"""Sphinx configuration; `make docs` builds with warnings as errors."""

import warnings
from importlib.metadata import version as installed_version

# sphinx-autodoc-typehints calls what the next Sphinx removes, and is told so once per annotation.
warnings.filterwarnings("ignore", message=".*_RstSnippetParser")

project = "deqsolvers and polypseg"
author = "the deqsolvers and polypseg authors"
copyright = f"2026, {author}"
version = release = installed_version("deqsolvers")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
napoleon_numpy_docstring = False
# The docstrings use `single backquotes` for code, as they are read in an editor far more often.
default_role = "code"
autodoc_member_order = "bysource"
typehints_defaults = "comma"

html_theme = "furo"
html_title = project
