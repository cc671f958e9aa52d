"""Sphinx's settings for `make book` (tools/book.py). The site loads nothing from other sites."""

import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)

facts = ConfigParser(delimiters=["="])
facts.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
project, author, release = (facts["DEFAULT"][key] for key in ("title", "author", "version"))
copyright = facts["DEFAULT"]["copyright"]

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the outputs are those in the notebooks
nb_ipywidgets_js = {}  # a widget needs a kernel; without one its scripts would be useless
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "smartquotes"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a heading may skip a level
html_theme = "sphinx_book_theme"
html_title = project
html_copy_source = html_show_sourcelink = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_math_renderer = "mathml"  # browsers know it: no script and no font is needed
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],
}
html_static_path, html_css_files, html_favicon = ["book.css"], ["book.css"], "favicon.svg"


FENCES = {
    r"\|": "‖",
    r"\Vert": "‖",
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\vert": "|",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\langle": "⟨",
    r"\rangle": "⟩",
}
# as large as book.css says: few machines have a font with a large one
SUM = '<mo class="sum" largeop="false">&#x02211;</mo>'


def mathml(node, display):
    "LaTeX as MathML; the converter would leave unknown commands in the text with their backslash."
    tex = re.sub(r"\\arg(?![a-zA-Z])", r"\\operatorname{arg}", node.astext())
    tex = re.sub(r"(\\[bB]igg?[lr]?)\s*(\\(?:\||[a-zA-Z]+))", lambda m: m[1] + FENCES.get(m[2], m[2]), tex)
    # TeX leaves a little space around a function's name
    tex = re.sub(r"(?<=[\w}])\s*(\\log)(?![a-zA-Z])", r"\\,\1", tex)
    tex = re.sub(r"(\\log|\\mathrm\{\w{2,}\})\s*(?=[^\W_]|\\)(?!\\(?:[bB]igg?|left|[,;:!]))", r"\1\\,", tex)
    tex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", tex)
    try:
        result = convert(tex, display=display)
    except Exception as error:
        result = f"\\{error}"
    result = result.replace("<mi>&#x02032;</mi>", '<mi class="prime">&#x02032;</mi>')
    if display == "block":
        result = result.replace("<mo>&#x02211;</mo>", SUM)
    if "\\" in result:
        logger.warning("cannot be read as LaTeX: %s", tex, location=node)
    return result


def inline(self, node):
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block(self, node):
    self.body.append(f'<div class="equation">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
