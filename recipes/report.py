"""`stagewise report RUN ...`: a page about a run from its files, or about several side by side."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from stagewise.files import replace_file
from stagewise.recipes.arguments import Parser, exit_with_message
from stagewise.recipes.report_compare import compared, refuse_other_data
from stagewise.recipes.report_facts import Facts
from stagewise.recipes.report_head import head
from stagewise.recipes.report_html import document
from stagewise.recipes.report_sections import sections
from stagewise.recipes.run_files import read_run, runs_in

__all__ = ["compare", "main", "parser", "report"]


def report(run: Path, output: Path | None = None, title: str | None = None) -> Path:
    """Writes the page of the run in a folder, by default `report.html` in it.

    Raises:
        ValueError: If there is no run, or no events in it.
        OSError: If the file cannot be written.
    """
    facts = Facts(read_run(run))
    name = title or facts.name
    return _write(
        output or run / "report.html", document(name, [head(facts, name), *sections(facts)])
    )


def compare(runs: Sequence[Path], output: Path | None = None, title: str | None = None) -> Path:
    """Writes the page of two or more runs of the same data, by default `compare.html` in the first.

    Raises:
        ValueError: If one is no run, or their data differ.
        OSError: If the file cannot be written.
    """
    found = [Facts(read_run(run)) for run in runs]
    names = [facts.name for facts in found]
    if len(set(names)) < len(names):  # runs of a sweep differ by their paths
        names = [str(run) for run in runs]
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"Expected different runs, got {', '.join(names)}.")
    by_name = dict(zip(names, found, strict=True))
    refuse_other_data(by_name)
    heading = title or " against ".join(names)
    return _write(output or runs[0] / "compare.html", document(heading, compared(by_name, heading)))


def _write(target: Path, text: str) -> Path:
    try:
        replace_file(target, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OSError(
            f"Cannot write {target}: {error.strerror}. Name a file in an existing folder with "
            "--output."
        ) from error
    return target


def parser() -> Parser:
    """The arguments of `stagewise report`."""
    made = Parser(
        prog="stagewise report",
        description=(
            "Writes one self-contained HTML page from the files of a run. For a folder of several "
            "runs, a page for each, the newest first. For two or more runs of the same data, one "
            "page that compares them: stagewise report RUN_A RUN_B."
        ),
    )
    made.add_argument("run", type=Path, nargs="+", help="folder of the run, or of runs")
    made.add_argument("--output", type=Path, help="the page (RUN/report.html, RUN_A/compare.html)")
    made.add_argument("--title", metavar="TEXT", help="its title (the name of the folder)")
    return made


def _tell(page: Path) -> None:
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")


def _listed(runs: Sequence[Path]) -> str:
    return "".join(f"\n  {shlex.quote(str(run))}" for run in runs)


def main() -> None:
    """The entry point of `stagewise report`."""
    given = parser().parse_args()
    with exit_with_message("report"):
        if len(given.run) > 1:
            for folder in given.run:
                if len(runs := runs_in(folder)) > 1:
                    raise ValueError(
                        f"Expected runs to compare; {folder} holds several:{_listed(runs)}"
                    )
            _tell(compare(given.run, given.output, given.title))
            return
        (folder,) = given.run
        runs = runs_in(folder)
        if len(runs) < 2:
            _tell(report(folder, given.output, given.title))
            return
        if given.output or given.title:
            raise ValueError(f"Expected one run with --output or --title, got:{_listed(runs)}")
        print(f"{folder} holds {len(runs)} runs, the newest first:")
        failed = []
        for run in runs:
            try:
                _tell(report(run))
            except (ValueError, OSError) as error:
                failed.append(f"\n  {run}: {error}")
        if failed:
            raise ValueError(f"{len(failed)} of {len(runs)} have no page:{''.join(failed)}")


if __name__ == "__main__":
    main()
