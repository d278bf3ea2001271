"""Fails on broken links of a built site, and on files that it would load from the network.

    python .ci/links.py build/docs

Links to other sites are not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page has as targets, links to, and loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes the targets and links of an element."""
        have = {key: value for key, value in attrs if value}
        self.ids |= {have[key] for key in ("id", "name") if key in have}
        if tag == "a" and "href" in have:
            self.links.append(have["href"])
        elif tag == "link" and have.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(have["href"])
        elif "src" in have:
            self.loads.append(have["src"])


def broken(root: Path) -> list[str]:
    """One line for each link that leads nowhere."""
    pages = {file: Page(file) for file in sorted(root.rglob("*.html"))}
    wrong = []
    for file, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    wrong.append(f"{file}: loads {link} from the network")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            place = unquote(parts.fragment)
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                wrong.append(f"{file}: {link}: there is no such file")
            elif place and target in pages and place not in pages[target].ids:
                wrong.append(f"{file}: {link}: there is no such place in the page")
    return wrong


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    wrong = broken(root)
    pages = len(list(root.rglob("*.html")))
    print("\n".join(wrong) or f"{pages} pages, every link resolves")
    sys.exit(not pages or bool(wrong))
