"""The parts of a page: every function returns HTML, and escapes its arguments."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from stagewise.callbacks.drawing import render
from stagewise.recipes.report_style import STYLE

__all__ = [
    "definitions",
    "document",
    "drawn",
    "image",
    "items",
    "missing",
    "paragraph",
    "row",
    "settings",
    "stored",
    "table",
    "tile",
]

_SCALE = 2
"""Pixels of a figure per pixel of the page, for sharp pictures on any screen and in print."""


def document(title: str, body: Sequence[str]) -> str:
    """The whole page, in one file."""
    text = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{text}\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is a class of `STYLE`."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def missing(what: str, callback: str) -> str:
    """Says that something is not in the run, and which callback writes it."""
    return (
        f'<p class="dim">{html.escape(what)}: not in this run. '
        f"Add <code>{html.escape(callback)}</code>.</p>"
    )


def definitions(about: Mapping[str, str]) -> str:
    """Names and values; empty values are left out."""
    lines = (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
        for name, text in about.items()
        if text
    )
    return f"<dl>{''.join(lines)}</dl>"


def items(lines: Iterable[tuple[str, str, str]]) -> str:
    """A list; each item has bold text, plain text and a remark, or empty strings."""
    kinds = ("<b>{}</b>", "{}", '<span class="dim">{}</span>')
    listed = (
        " ".join(kind.format(html.escape(text)) for kind, text in pairs if text)
        for pairs in (zip(kinds, line, strict=True) for line in lines)
    )
    return f"<ul>{''.join(f'<li>{line}</li>' for line in listed)}</ul>"


def tile(name: str, value: str, about: str = "") -> str:
    """A number with its name above and a remark below."""
    return (
        f'<div class="tile"><span>{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f"<span>{html.escape(about)}</span></div>"
    )


def row(*parts: str) -> str:
    """Pictures side by side, if the page is wide enough."""
    return f'<div class="row">{"".join(parts)}</div>' if any(parts) else ""


def image(data: bytes, caption: str, size: tuple[int, int] | None = None) -> str:
    """A PNG with its caption."""
    code = base64.b64encode(data).decode()
    place = "" if size is None else f' width="{size[0]}" height="{size[1]}"'
    text = html.escape(caption, quote=True)
    return (
        f'<figure><img src="data:image/png;base64,{code}" alt="{text}"{place}>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def drawn(figure: Figure, caption: str) -> str:
    """A figure as a picture."""
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    figure.set_dpi(_SCALE * figure.dpi)
    buffer = BytesIO()
    # 256 colours are enough for curves and heat maps, at a third of the bytes.
    Image.fromarray(render(figure)).quantize(256).save(buffer, format="png", optimize=True)
    return image(buffer.getvalue(), caption, (width, height))


def stored(path: Path | None, caption: str) -> str:
    """A picture of the run; empty without one."""
    return "" if path is None else image(path.read_bytes(), caption)


def table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] | None = None
) -> str:
    """A table; columns in `numbers` are aligned to the right, by default all but the first."""
    right = range(1, len(titles)) if numbers is None else numbers

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (f'{tag} class="number"' if i in right else tag for i in range(len(cells)))
        parts = zip(kinds, map(html.escape, cells), strict=True)
        return f"<tr>{''.join(f'<{kind}>{cell}</{tag}>' for kind, cell in parts)}</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    whole = f"<table><thead>{line(titles, 'th')}</thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>'


def settings(config: str) -> str:
    """A whole configuration, not folded, so that it is printed."""
    return f'<pre class="settings">{html.escape(config)}</pre>'
