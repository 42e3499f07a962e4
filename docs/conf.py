"""Configuration of Sphinx. To build: ``scripts/docs``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms.post_transforms import SphinxPostTransform

import torchfut_aio
import torchfut_aio.debug
import torchfut_aio.distributed

project = "torchfut-aio"
author = "the authors of torchfut-aio"
copyright = author  # noqa: A001  Sphinx calls it that
version = release = importlib.metadata.version("torchfut-aio")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_results"]
nitpicky = True
# Types that the signatures name and this site does not describe.
nitpick_ignore_regex = [
    ("py:.*", r"(anyio|asyncio|collections|concurrent|contextlib|os|torch|trio|types|typing)\..*"),
    ("py:.*", r"torchfut_aio\..*\._\w+\.[A-Z]|torchfut_aio\._\w+\.[A-Z]|_asyncio\.Future|[A-Z]"),
]

default_role = "py:obj"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 60
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Warns", "params_style")]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

highlight_language = "none"
pygments_dark_style = "a11y-high-contrast-dark"
html_theme = "furo"
html_title = f"torchfut-aio {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"  # prompts and what is printed

linkcheck_timeout = 20
linkcheck_retries = 2

PUBLIC = {}
for module in (torchfut_aio, torchfut_aio.debug, torchfut_aio.distributed):
    for public in module.__all__:
        PUBLIC[public] = f"{module.__name__}.{public}"


class LinkPublicNames(SphinxPostTransform):
    """Link each public name in code quotes to its entry in the reference."""

    default_priority = 5  # before references are resolved

    def run(self, **_: object) -> None:
        """Replace the literals of the page."""
        if self.env.docname.startswith("reference/") and self.env.docname != "reference/index":
            return  # links would lead to where they are
        for literal in [*self.document.findall(nodes.literal)]:
            text = literal.astext().removeprefix("debug.")
            parts = text.removesuffix("()").split(".")
            inside_link = isinstance(literal.parent, (nodes.reference, pending_xref))
            if inside_link or parts[0] not in PUBLIC or not all(map(str.isidentifier, parts)):
                continue
            target = ".".join([PUBLIC[parts[0]], *parts[1:]])
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname
            )
            literal.replace_self(link)
            link += literal


def defining_module(_: Sphinx, module: str, name: str) -> str | None:
    """Return the module whose source defines a public name, for the links to the source.

    The `__module__` of a public object is the module that users import it from.
    """
    first = name.partition(".")[0]
    thing = getattr(sys.modules[module], first, None)
    for private in [name for name in sys.modules if name.startswith("torchfut_aio.")]:
        if getattr(sys.modules[private], first, None) is thing:
            with contextlib.suppress(PycodeError):  # a module in C
                if name in ModuleAnalyzer.for_module(private).find_tags():
                    return private
    return None


def shorten_type_variables(*arguments: Any) -> None:
    """Remove the modules that napoleon writes before type variables."""
    lines = arguments[-1]
    lines[:] = [re.sub(r"torchfut_aio\.[\w.]+\.([A-Z])\b", r"\1", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Register the transform and the search for sources."""
    app.add_post_transform(LinkPublicNames)
    app.connect("viewcode-follow-imported", defining_module)
    app.connect("autodoc-process-docstring", shorten_type_variables, priority=900)  # after napoleon
