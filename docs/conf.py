"""Sphinx configuration; `make docs` builds with warnings as errors."""

import pkgutil
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path

import polypseg

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
myst_heading_anchors = 3
napoleon_numpy_docstring = False
# The docstrings use `single backquotes` for code, as they are read in an editor far more often.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["gradio"]  # an optional extra that only the web demonstration needs
typehints_defaults = "comma"

html_theme = "furo"
html_title = project


def write_module_pages() -> None:
    """Make api/polypseg/, a page a module, so that no module can be forgotten."""
    folder = Path(__file__).parent / "api" / "polypseg"
    folder.mkdir(exist_ok=True)
    modules = sorted(
        module.name
        for module in pkgutil.walk_packages(polypseg.__path__, "polypseg.")
        if not module.ispkg
    )
    pages = {
        f"{name}.md": f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
        for name in modules
    }
    pages["index.md"] = (
        "# polypseg\n\nOne page a module; the commands are in `polypseg.cli`, and what a script "
        "needs first is `polypseg.predictor.Predictor`.\n\n```{toctree}\n:maxdepth: 1\n\n"
        + "\n".join(modules)
        + "\n```\n"
    )
    for old in folder.iterdir():
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        page = folder / name
        if not page.exists() or page.read_text() != text:  # else Sphinx reads it again
            page.write_text(text)


write_module_pages()
