"""Tables in Markdown, and their places in the pages of docs/.

Pages are written by hand. What a benchmark measures stands in them between two comments,

    <!-- NAME -->
    | ... |
    <!-- end -->

and `fill` puts new tables there; tables with a new name come at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a table."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Replaces the tables of these names on a page."""
    text = page.read_text() if page.exists() else ""
    for name, new in tables.items():
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->\n"
        if begin not in text:
            text += f"\n{begin}{end}"
        before, after = text.split(begin)
        text = before + begin + new + end + after.split(end.lstrip(), 1)[1]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
