"""How Sphinx builds the site: `make docs`."""

import re

import normjax

project = "normjax"
author = "The normjax authors"
project_copyright = author
version = release = normjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    # MathJax from the site itself, and not from another server.
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "_templates", "normjax.mplstyle"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
# Progress bars and warnings of other libraries are not part of a page.
nb_output_stderr = "remove"

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Guarantees", "params_style"),
    "Edge cases",
]
# A word in single backticks is code.
default_role = "literal"

html_theme = "furo"
html_title = f"normjax {release}"
html_static_path = ["_static"]
html_css_files = ["normjax.css"]


def show_formulas(app, what, name, obj, options, lines):
    """Formulas, which docstrings indent, become literal blocks; `|` is no substitution of reST."""
    shown, in_formula = [], False
    for before, line in zip(["", *lines], lines, strict=False):
        if in_formula and re.match(r"\S", line):
            in_formula = False
        paragraph = next((text for text in reversed(shown) if text.strip()), "")
        follows_text = not before.strip() and re.match(r"[^\s.]", paragraph)
        if not in_formula and follows_text and re.match(r"    \S", line):
            shown += [".. code-block:: text", ""]
            in_formula = True
        shown.append(line if in_formula else line.replace("|", r"\|"))
    lines[:] = shown


def setup(app):
    # Before napoleon, which has the default priority of 500.
    app.connect("autodoc-process-docstring", show_formulas, priority=400)
