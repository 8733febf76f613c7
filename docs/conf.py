"""How Sphinx builds the site: `make docs`."""

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
]
exclude_patterns = ["_build", "normjax.mplstyle"]
# Files that are neither pages nor pictures of pages.
include_patterns = ["**/*.md", "**/*.ipynb", "**/*.rst"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
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
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"normjax {release}"
html_static_path = ["_static"]
html_css_files = ["normjax.css"]
