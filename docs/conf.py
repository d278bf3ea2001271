"""The site: `make docs` writes it to build/docs, without network."""

import sys
from pathlib import Path

import stagewise

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "stagewise"
author = "The stagewise authors"
copyright = author  # noqa: A001 - Sphinx reads this name
version = release = stagewise.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_parts",
]
templates_path = ["_templates"]
highlight_language = "text"
pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = "stagewise"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_search_scorer = str(HERE / "_static/scorer.js")
html_show_sphinx = False
html_copy_source = False

# Links of GitHub's kind: page.md#a-heading.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "colon_fence"]

# Pages with code cells are run, and again only if their code has changed.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build/notebooks")
nb_execution_timeout = 900  # a cell that trains, on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # pages load nothing from the network; progress bars are left out of them

# By name: a page that is new since the last build would else be overlooked.
autosummary_generate = [f"reference/{page.name}" for page in (HERE / "reference").glob("*.md")]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what is overridden is described once, in its base
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
copybutton_exclude = ".linenos, .gp, .go"
