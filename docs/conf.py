"""How Sphinx builds the pages: ``sphinx-build -W docs OUT`` (the extra ``docs``)."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cupycorr  # noqa: E402

project, author = "cupycorr", "The cupycorr developers"
copyright = author
version = release = cupycorr.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"cupycorr {version}"
html_theme_options = {"source_repository": "https://github.com/cupycorr/cupycorr/",
                      "source_branch": "main", "source_directory": "docs/"}  # fmt: skip
html_use_index = html_domain_indices = False
html_static_path = ["pages.css"]
html_css_files = ["pages.css"]
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have shapes and dtypes
napoleon_google_docstring = False
napoleon_use_rtype = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"

SOURCES = "https://github.com/cupycorr/cupycorr/blob/main/"
PAGES = {"kernels/README.md": "kernels.md", "CHANGELOG.md": "changelog.md",
         "CONTRIBUTING.md": "contributing.md"}  # fmt: skip
"""What is a page here, and lies elsewhere in the checkout."""


def read(app, name, text):
    """Take in files of the checkout, and lead links to others to their pages, or to GitHub."""

    def leading(link):
        path, heading = link["path"], link["heading"] or ""
        if path.startswith("docs/"):
            return f"]({path.removeprefix('docs/')}{heading})"
        return f"]({PAGES.get(path, SOURCES + path)}{heading})"

    # The directive itself would leave their links as they are.
    whole = re.sub(
        r":::\{include\} \.\./(\S+)\n:::",
        lambda found: (ROOT / found[1]).read_text("utf-8"),
        text[0],
    )
    outside = (
        r"\]\((?:\.\./)?(?P<path>(?:docs|kernels|examples|CHANGELOG|CONTRIBUTING|README)[\w./-]+)"
    )
    text[0] = re.sub(outside + r"(?P<heading>#[\w-]+)?\)", leading, whole)


def escape(app, what, name, found, options, lines):
    """Keep the shape (N, 2, *P) from being read as emphasis."""
    lines[:] = [line.replace("*P", r"\*P") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape)
    app.connect("source-read", read)
