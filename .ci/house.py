"""Draws which part of stagewise imports which, for CONTRIBUTING.md: docs/images/house.png."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import networkx as nx
from imports import ALLOWED, imported, modules

COLOURS = {"callbacks": "#E69F00", "recipes": "#CC79A7", "losses": "#009E73"}  # Okabe and Ito


def part(name: str, known: dict[str, Path]) -> str:
    """The folder or file that a module belongs to; empty if it is not of the library."""
    top = ".".join(name.split(".")[:2])
    if not top.startswith("stagewise."):
        return ""
    folder = known[top].name == "__init__.py" if top in known else True
    return top.split(".")[1] + ("/" if folder else "")


def house() -> tuple[nx.DiGraph, dict[str, int]]:
    """The parts with what they import, and the lines of each."""
    known, graph = modules(), nx.DiGraph()
    lines: dict[str, int] = {}
    for name, file in known.items():
        if not (own := part(name, known)):
            continue
        graph.add_node(own)
        lines[own] = lines.get(own, 0) + len(file.read_text().splitlines())
        for other in imported(file, known, types=False):
            if (name, other) not in ALLOWED and part(other, known) not in ("", own):
                graph.add_edge(own, part(other, known))
    return graph, lines


def levels(graph: nx.DiGraph) -> list[list[str]]:
    """The parts from the ground up: each imports only from below, or from one it stands with."""
    whole = nx.condensation(graph)
    level: dict[int, int] = {}
    for node in reversed(list(nx.topological_sort(whole))):
        level[node] = 1 + max((level[other] for other in whole.successors(node)), default=-1)
    found: list[list[str]] = [[] for _ in range(1 + max(level.values()))]
    for node, at in level.items():
        found[at].append(" + ".join(sorted(whole.nodes[node]["members"])))
    return [sorted(row) for row in found]


def draw(path: str) -> None:
    """Writes the picture."""
    graph, lines = house()
    rows = levels(graph)
    figure, axes = plt.subplots(figsize=(11, 0.52 * len(rows) + 0.6), layout="constrained")
    for y, row in enumerate(rows):
        x = 0.0
        for name in row:
            members = name.split(" + ")
            size = sum(lines[member] for member in members)
            text = f"{name}  {size}"
            width = 1.05 * len(text) + 2.0
            colour = COLOURS.get(members[0].rstrip("/"), "#56B4E9" if "/" in name else "#DCEBF7")
            axes.add_patch(plt.Rectangle((x, y + 0.1), width, 0.8, facecolor=colour, alpha=0.85))
            axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=7.5)
            x += width + 1
    axes.set_xlim(0, axes.dataLim.x1 or 1)
    axes.autoscale_view()
    axes.set_ylim(0, len(rows))
    axes.set_axis_off()
    axes.set_title(
        "Each part imports only from rows below it. Numbers: lines of code. "
        "Pale: files. Other colours: folders.",
        fontsize=10,
        loc="left",
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else "docs/images/house.png")
