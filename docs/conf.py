"""The documentation site: `make docs` builds docs/_build/html, and a warning is an error."""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import latent_egc

ROOT = Path(__file__).resolve().parents[1]

project = "latent-egc"
author = "the authors of latent-egc"
release = latent_egc.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "latent-egc"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "text"  # of blocks that name no language: formulas and trees of files

# A page that the list names and a checkout has not is left out; one that it does not name is a warning.
suppress_warnings = ["toc.excluded", "toc.not_readable"]
exclude_patterns = ["_build"]
exclude_patterns += [f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING") if not (ROOT / f"{name}.md").exists()]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def markdown_to_rst(app, what, name, obj, options, lines):
    """Our docstrings are plain text: `code`, formulas with | and *, and indented blocks that are formulas or commands.

    The first are made literals, the second are escaped, the third become literal blocks.
    """
    if what == "property":  # napoleon would take what stands before a colon for the type
        lines[0] = lines[0].replace(": ", " -- ", 1)
    found, text, margin = [], "", None  # the last line of text; the margin of the text before a literal block inside it
    for line in lines:
        indent = _indent(line)
        if margin is not None and line.strip() and indent <= margin:
            margin = None
        if margin is None and line.strip() and text and not found[-1].strip() and indent > _indent(text):
            margin = _indent(text)
            found += [" " * margin + "::", ""]
        found.append(line if margin is not None else _escaped(line))
        text = line if line.strip() and margin is None else text
    lines[:] = found
    for i in [i for i, line in enumerate(lines) if line.strip() == "Returns:"]:
        # As a field, for napoleon would take what stands before a colon for the type.
        lines[i], lines[i + 1] = "", lines[i].replace("Returns:", ":returns: ") + lines[i + 1].strip()


def _indent(line):
    return len(line) - len(line.lstrip())


def _escaped(line):
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        f"`{part}`" if part.startswith("`") else re.sub(r"([*|\\]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts
    )


def mathml(self, node):
    """Formulas as MathML, which browsers draw by themselves: the site loads nothing from elsewhere."""
    is_block = isinstance(node, nodes.math_block)
    self.body.append(tex2mathml(node.astext(), as_block=is_block))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)  # before napoleon's
