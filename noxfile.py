"""Tests on each Python, and with the oldest releases that pyproject.toml allows: `nox`."""

import re

import nox

nox.options.default_venv_backend = "venv"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
EXTRAS = ("watch", "lightning", "recipes", "vae")
OLD = "3.10"  # for which those releases have wheels


def floors() -> list[str]:
    """Each dependency with a floor, at it: "torch>=2.6" is "torch==2.6.*"."""
    groups = (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][key] for key in EXTRAS))
    found = {}
    for line in (line for group in groups for line in group):
        if match := re.match(r"([\w-]+)>=([\d.]+)", line):
            found[match[1]] = match[2]  # that of the last group, which is the highest
    return [f"{name}=={floor}.*" for name, floor in found.items()]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The tests with the newest releases."""
    session.install("-e", ".[dev]")
    session.run("pytest", "--numprocesses", "auto", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=OLD)
def oldest(session: nox.Session) -> None:
    """The tests with the oldest releases."""
    session.install("-e", ".[dev]", *floors())
    session.run("pytest", "--numprocesses", "auto", *session.posargs, env={"OMP_NUM_THREADS": "1"})
