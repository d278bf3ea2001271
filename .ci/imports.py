"""Fails on import circles, imports from a higher floor, and docstrings that say "See X".

`make lint` runs it.

A folder may import from those before it in `FLOORS`. Imports inside functions count too. Imports
for types only (`if TYPE_CHECKING:`) never run: they may be part of a circle.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FLOORS = {
    "stagewise": "stagewise",
    "losses": "stagewise.losses",
    "callbacks": "stagewise.callbacks",
    "recipes": "stagewise.recipes",
    "benchmarks": "",
}
"""From a folder to the package that it is installed as; benchmarks import each other bare."""

ALLOWED = {
    # `Smoothing.fit` stands where people look for it, and what it does in a file of its own.
    ("stagewise.smoothing", "stagewise.smoothing_fit"),
    # A name that pickles know by the place where it was.
    ("stagewise.paths", "stagewise.conventions"),
    # The first callback of a trainer makes its run, which is a callback itself.
    ("stagewise.callbacks.stage_callback", "stagewise.callbacks.run"),
}
"""Imports inside of functions that close a circle, and why."""


def modules() -> dict[str, Path]:
    """All modules by their installed name."""
    found = {}
    for folder, package in FLOORS.items():
        for file in sorted(Path(folder).rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).strip(".")
            found[name.removesuffix(".__init__")] = file
    return found


def imported(file: Path, known: dict[str, Path], *, types: bool) -> set[str]:
    """What a module imports of `known`: the module of a name, or the package that holds it."""
    found, tree = set(), ast.parse(file.read_text())
    for node in () if types else ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def main() -> int:
    """Prints what is wrong; 1 if anything is."""
    known = modules()
    every = {name: imported(file, known, types=True) - {name} for name, file in known.items()}
    order = list(FLOORS)
    seen = [
        f'{file}:{number} says "See": say what it does, or nothing beside `@override`.'
        for file in known.values()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line.strip().startswith('"""See ')
    ]

    def floor(name: str) -> int:
        return order.index(known[name].parts[0])

    wrong = seen + [
        f"{known[name]} imports {other}, which is on a higher floor."
        for name, others in every.items()
        for other in sorted(others)
        if floor(other) > floor(name)
    ]
    graph = {
        name: {
            other
            for other in imported(file, known, types=False) - {name}
            if (name, other) not in ALLOWED
        }
        for name, file in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append("Import circle: " + " <- ".join(error.args[1]))
    print("\n".join(wrong) or f"{len(graph)} modules, no import circle, no upward import")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
