"""Sphinx: `make docs` builds the pages of this folder, with no network."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "rnn_gpu"
copyright = "the rnn_gpu authors"
version = release = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["toc.not_included"]  # a test says which page is in no index

html_theme = "furo"
html_title = f"rnn_gpu {version}"
html_copy_source = False
html_css_files = ["wide.css"]  # wide tables scroll instead of being cut off
html_static_path = ["static"]
highlight_language = "python"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
default_role = "code"
smartquotes = False


def as_rest(app, what, name, obj, options, lines: list[str]) -> None:
    """Our docstrings are plain text: indented blocks are formulas, an asterisk is a product."""
    out: list[str] = []
    literal = False
    for line in lines:
        indented, after_blank = line.startswith("    "), not out or not out[-1].strip()
        if indented and after_blank and not literal:
            out += ["::", ""]
            literal = True
        elif line.strip() and not indented:
            literal = False
        doctest = line.startswith((">>>", "..."))
        out.append(line if literal or doctest else line.replace("*", r"\*"))
    lines[:] = out


def setup(app) -> None:
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", as_rest)
