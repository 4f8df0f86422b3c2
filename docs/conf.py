"""How Sphinx builds the documentation: ``sphinx-build -W docs build/docs``. Nothing is taken from the network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bnguard
from docs import diagrams, pages

pages.write()
diagrams.write()

project = "bnguard"
author = "bnguard developers"
copyright = author  # noqa: A001  # Sphinx calls it so
release = version = bnguard.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "bnguard"
html_static_path = ["_static"]
html_css_files = ["bnguard.css"]
html_copy_source = False
