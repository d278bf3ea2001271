"""What the site needs beside Sphinx's own extensions.

Formulas become MathML, which browsers draw without a script and without network. Docstrings and
pages are written in plain Markdown, where a name is `Oracle`: here such names become links to their
page of the reference.
"""

import importlib
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

import stagewise.recipes.conf

PACKAGES = (
    "stagewise",
    "stagewise.callbacks",
    "stagewise.losses",
    "stagewise.engines",
    "stagewise.latents",
    "stagewise.adapters",
    "stagewise.sampling",
    "stagewise.sde",
)


def public_names() -> dict[str, str]:
    """From the names that people write to those of the reference."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            found.setdefault(name, f"{package}.{name}")
    return found


class LinkNames(SphinxTransform):
    """Makes a link of a public name that is written as code."""

    default_priority = 5

    def apply(self, **_: Any) -> None:
        """Looks at every literal that is no heading and no link."""
        known = public_names()
        for literal in list(self.document.findall(nodes.literal)):
            match = re.fullmatch(r"(?:stagewise\.)?(\w+)((?:\.\w+)?)(?:\(.*\))?", literal.astext())
            above = literal.parent
            if match is None or match[1] not in known or isinstance(above, nodes.title):
                continue
            if isinstance(above, nodes.reference | addnodes.pending_xref):
                continue
            if match[1].islower() and "_" not in match[1]:
                continue  # `sample` is a word before it is a function
            full = known[match[1]] + match[2]
            link = addnodes.pending_xref(reftype="obj", refdomain="py", reftarget=full)
            link["refexplicit"] = True
            literal.replace_self(link)
            link += literal


class CommandHelp(SphinxDirective):
    """What `stagewise NAME --help` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Asks the parser of the command."""
        name = self.arguments[0].replace("-", "_")
        text = importlib.import_module(f"stagewise.recipes.{name}").parser().format_help()
        return [nodes.literal_block(text, text, language="text")]


class RecipeGroups(SphinxDirective):
    """Each group of the recipes with its choices, by the comment that opens their files."""

    def run(self) -> list[nodes.Node]:
        """Reads the files of the configuration."""
        made: list[nodes.Node] = []
        conf = Path(stagewise.recipes.conf.__file__).parent
        for group in sorted(folder for folder in conf.iterdir() if any(folder.glob("*.yaml"))):
            choices = nodes.definition_list()
            for file in sorted(group.glob("*.yaml")):
                lines = [line for line in file.read_text().splitlines() if "@package" not in line]
                end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
                about = " ".join(line[2:] for line in lines[:end]).split(". ")[0]
                term = nodes.term("", "", nodes.literal(text=f"{group.name}={file.stem}"))
                about = about.replace("`", "").rstrip(".:")
                text = nodes.definition("", nodes.paragraph(text=about))
                choices += nodes.definition_list_item("", term, text)
            made.append(choices)
        return made


def plain_docstring(_: Sphinx, what: str, name: str, obj: Any, how: Any, lines: list[str]) -> None:
    """Turns the Markdown of a docstring into what Sphinx reads: `x` is code, (B, *) a shape."""
    text = "\n".join(lines)
    if what == "attribute":
        text = f"..\n\n{text}"  # else what stands before a colon is taken for its type
    # So too the first line of what is returned.
    text = re.sub(r"(^Returns:\n +[^\n`]*?): ", r"\1 – ", text, flags=re.MULTILINE)
    text = re.sub(r"(?<![`:\w])`([^`]+)`(?!`)(\w?)", _literal, text)
    text = re.sub(r"(?<![\*\w])\*(?=[),])", r"\*", text)
    lines[:] = text.split("\n")


def _literal(match: re.Match[str]) -> str:
    code = " ".join(match[1].split())
    return f"``{code}``" + (f"\\ {match[2]}" if match[2] else "")


def skip_hooks(_: Sphinx, what: str, name: str, obj: Any, skip: bool, how: Any) -> bool:
    """Leaves out what Lightning or the library calls, and nobody else."""
    return skip or name.startswith("on_")


def draw_inline(self: Any, node: nodes.math) -> None:
    """A formula in a line."""
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def draw_block(self: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (draw_inline, None), (draw_block, None))
    app.config.html_math_renderer = "mathml"
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_transform(LinkNames)
    app.add_directive("command-help", CommandHelp)
    app.add_directive("recipe-groups", RecipeGroups)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_hooks)
    return {"parallel_read_safe": True}
