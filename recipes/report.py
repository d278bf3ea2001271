"""`stagewise report RUN ...`: one page from the files of a run, or of several side by side."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from stagewise.files import replace_file
from stagewise.recipes.arguments import Parser, ends_in_a_line
from stagewise.recipes.report_compare import compared, refuse_other_data
from stagewise.recipes.report_facts import Facts
from stagewise.recipes.report_head import head
from stagewise.recipes.report_html import document
from stagewise.recipes.report_sections import sections
from stagewise.recipes.run_files import read_run, runs_in

__all__ = ["compare", "main", "parser", "report"]


def report(run: Path, output: Path | None = None, title: str | None = None) -> Path:
    """Writes the page of a run; an older one is replaced only when the new one is whole.

    Args:
        run: Its folder.
        output: The file; default `<run>/report.html`.
        title: Of the page; default the name of the folder.

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
    """Writes the page of several runs of the same data, side by side.

    Args:
        runs: Their folders, two or more.
        output: The file; default `compare.html` in the first.
        title: Of the page; default the names of the folders.

    Raises:
        ValueError: If one is no run, or their data differ.
        OSError: If the file cannot be written.
    """
    found = [Facts(read_run(run)) for run in runs]
    names = [facts.name for facts in found]
    if len(set(names)) < len(names):  # of a sweep the paths tell them apart
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
            f"Cannot write {target}: {error.strerror}. Name a file in a folder that is there and "
            "can be written: --output."
        ) from error
    return target


<<<<<<< HEAD
=======
def page(run: RunFiles, title: str) -> str:
    """The page as text."""
    sections = [_data, _errors, _held_out, _spending, _events, _reading, _config]
    body = "\n".join([_top(run, title), *(section(run) for section in sections)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


# -- parts ------------------------------------------------------------------------------------


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _text(event: dict[str, Any], key: str) -> str:
    return html.escape(str(event.get(key, "?")))


def _tile(name: str, value: str, about: str = "") -> str:
    return (
        f'<div class="tile"><span>{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f"<span>{html.escape(about)}</span></div>"
    )


def _image(data: bytes, alt: str, size: tuple[int, int] | None = None) -> str:
    code = base64.b64encode(data).decode()
    place = "" if size is None else f' width="{size[0]}" height="{size[1]}"'
    alt = html.escape(alt, quote=True)
    return (
        f'<figure><img src="data:image/png;base64,{code}" alt="{alt}"{place}>'
        f"<figcaption>{alt}</figcaption></figure>"
    )


def _drawn(figure: Figure, alt: str) -> str:
    """A figure at twice its size on the page, so that it is sharp on any screen."""
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * figure.dpi)
    return _image(buffer.getvalue(), alt, (width, height))


def _stored(path: Path | None, alt: str) -> str:
    return "" if path is None else _image(path.read_bytes(), alt)


def _row(*parts: str) -> str:
    return f'<div class="row">{"".join(parts)}</div>' if any(parts) else ""


def _missing(what: str, callback: str) -> str:
    return f'<p class="dim">{what}: not in this run. <code>{callback}</code> writes it.</p>'


def _interval(low: Any, high: Any, exact: str = "") -> str:
    """The words for an interval; empty without one."""
    ends = _number(low), _number(high)
    return "" if "–" in ends else f"95 % {exact}interval: {ends[0]} to {ends[1]}"


def _model(
    run: RunFiles, key: str = "train"
) -> tuple[list[float], list[dict[str, Any]], tuple[float, float]]:
    """Edges of the bins, the probes of the model that have these bins, and the boundary."""
    edges = run.first("velocity").get("edges", [])
    probes = [probe for probe in run.of("velocity_probe") if probe.get(key)]
    boundary = run.boundary()
    alike = [probe for probe in probes if len(probe["train"]["oracle"]) == len(edges) - 1]
    return edges, alike, (boundary.midpoint, boundary.collapsed)


def _top(run: RunFiles, title: str) -> str:
    tiles = []
    edges, probes, ends = _model(run)
    b, defined = run.boundary(), ""
    if run.of("probe") or math.isfinite(b.midpoint):
        about = _interval(b.midpoint_low, b.midpoint_high)
        tiles.append(_tile("boundary (midpoint), t", _number(b.midpoint), about))
        about = _interval(b.collapsed_low, b.collapsed_high)
        tiles.append(_tile("collapsed, t", _number(b.collapsed), about))
        defined = f'<p class="dim">{_DEFINED}</p>'
    if probes:
        for stage in STAGES:
            found = probes[-1].get("stages", {}).get("train", {}).get(stage, {})
            about = f"floor {_number(found.get('floor'))}"
            tiles.append(_tile(f"oracle error, {stage}", _number(found.get("oracle")), about))
    samples = run.of("memorization_probe")
    if samples and samples[-1].get("copies"):
        last = samples[-1]
        about = _interval(last["low"][0], last["high"][0], "exact ")
        tiles.append(_tile("copies among samples", _number(last["copies"][0]), about))
    tiles.append(_tile("events", str(len(run.events.get("transition", [])))))
    steps = [event.get("step", 0) for found in run.events.values() for event in found]
    head = (
        f"<h1>{html.escape(title)}</h1>"
        f'<p class="dim">up to step {max(steps, default=0)}; t = 0 is noise, t = 1 is data</p>'
    )
    warnings = "".join(f'<p class="warn">{html.escape(line)}</p>' for line in run.problems)
    alarms = [probe["alarm"] for probe in probes if probe.get("alarm")]
    if alarms:
        alarm = html.escape(str(alarms[-1]))
        warnings += f'<p class="warn">The oracle may not be that of this training: {alarm}.</p>'
    pictures = _stored(run.picture("probe", "concentration"), "Concentration of the posterior by t")
    if probes:
        pictures = _drawn(
            figures.loss_by_time_figure(edges, probes[-1], ends),
            "The model's error by t, against the conditional and the oracle velocity",
        ) + _drawn(
            figures.dynamics_figure(edges, probes, "oracle", ends),
            "Error against the oracle while training",
        )
    return f'{head}{warnings}<div class="tiles">{"".join(tiles)}</div>{defined}{_row(pictures)}'


def _data(run: RunFiles) -> str:
    head = "<h2>The stages of the data</h2>"
    if not run.of("probe"):
        return head + _missing("Where navigation ends", "PosteriorMonitor")
    about = run.first("bank")
    bank = (
        f"<p>{_text(about, 'rows')} rows of shape {_text(about, 'shape')}, standard deviation "
        f"{_number(about.get('std'))}; {_text(about, 'classes')} classes, posterior "
        f"{'over the rows of the class' if about.get('class_wise') else 'over all rows'}; "
        f"{_text(about, 'path')}. The spectrum predicts "
        f"t = {_number(about.get('predicted'))}.</p>"
    )
    last = run.of("probe")[-1]
    when = f"measured at step {_text(last, 'step')}"
    low, high = (last.get(f"midpoint_{end}") for end in ("low", "high"))
    again = (
        f"<p>The last probe, {when} with draws of its own: midpoint "
        f"{_number(last.get('midpoint'))} ({_interval(low, high) or 'no interval'}), collapsed "
        f"{_number(last.get('collapsed'))}. The stages of this page are not cut there.</p>"
    )
    pictures = [
        _stored(run.picture("probe", name), f"{alt}, {when}")
        for name, alt in (
            ("concentration", "Largest posterior weight by t"),
            ("target_difference", "MSE(conditional, oracle velocity) by t: the floor of the loss"),
        )
    ]
    return head + bank + again + _row(*pictures)


def _errors(run: RunFiles) -> str:
    head = "<h2>What the model does at each t</h2>"
    edges, probes, ends = _model(run)
    if not probes:
        return head + _missing("Error by t", "VelocityErrorMonitor")
    rows = []
    for stage in STAGES:
        values = probes[-1].get("stages", {})
        train, other = (values.get(split, {}).get(stage, {}) for split in ("train", "held_out"))
        cells = (
            *(train.get(key) for key in ("conditional", "floor", "oracle", "excess", "cosine")),
            other.get("conditional"),
        )
        rows.append([stage, *(_number(cell) for cell in cells)])
    titles = ["stage", "conditional", "floor", "oracle", "oracle / floor", "cosine", "held out"]
    z = [
        abs(v) for probe in probes for v in probe["train"].get("pythagoras_z", []) if v is not None
    ]
    check = (
        f"<p>Over all probes and bins, conditional error is oracle error + floor within "
        f"{_number(max(z, default=math.nan))} standard errors (up to 4 is usual).</p>"
    )
    pictures = [
        _drawn(
            figures.dynamics_figure(edges, probes, "conditional", ends),
            "Error against the conditional velocity while training",
        ),
        _drawn(figures.error_heatmap(edges, probes), "Oracle error by t and step"),
    ]
    measured = run.of("probe")
    if measured:
        figure = figures.stages_and_error_figure(
            edges, probes[-1], measured[-1]["t"], measured[-1]["top1"], ends
        )
        pictures.append(_drawn(figure, "Concentration of the posterior and the model's error"))
    return head + _table(titles, rows) + check + _row(*pictures)


def _held_out(run: RunFiles) -> str:
    head = "<h2>Training against held-out samples, and copies</h2>"
    edges, probes, _ = _model(run, "gap")
    parts = [head]
    if probes:
        clear = int(figures.gap_is_clear(probes[-1]).sum())
        parts.append(
            f"<p>At step {probes[-1]['step']} the gap is two standard errors or more from zero in "
            f"{clear} of {len(edges) - 1} bins of t; chance alone makes one in 20 of them. Every "
            "probe asks the same samples, so what is chance at one step stays at the next.</p>"
        )
        figure = figures.gap_heatmap(edges, probes)
        parts.append(_row(_drawn(figure, "Held-out minus training error by t and step")))
    else:
        parts.append(_missing("The gap", "VelocityErrorMonitor, with validation data,"))
    if run.of("memorization_probe"):
        names = (
            ("copies", "Share of copies by the time at which the model takes over"),
            ("samples", "Samples, each beside its nearest training row"),
            ("resumed", "Held-out rows, noised and finished by the model"),
        )
        stored = (_stored(run.picture("memorization_probe", name), alt) for name, alt in names)
        parts.append(_row(*stored))
    else:
        parts.append(_missing("Copies among samples", "MemorizationMonitor"))
    return "".join(parts)


def _spending(run: RunFiles) -> str:
    head = "<h2>What training spends on each stage</h2>"
    edges, _, _ = _model(run)
    windows = [each for each in run.of("training_window") if len(each["draws"]) == len(edges) - 1]
    if not windows:
        return head + _missing("Draws, loss and gradients by stage", "VelocityErrorMonitor")
    figure = figures.spending_figure(edges, windows[-1])
    drawn = _drawn(figure, "Shares of draws, loss and gradient norms, and draws of t")
    lacking = windows[-1].get("lacking")
    warning = f'<p class="warn">{html.escape(f"Not all: {lacking}.")}</p>' if lacking else ""
    return f'{head}{warning}<div class="wide">{drawn}</div>'


def _events(run: RunFiles) -> str:
    head = "<h2>Events</h2>"
    found = [*run.events.get("transition", []), *run.events.get("non-finite", [])]
    if not found:
        return f'{head}<p class="dim">None was noticed.</p>'
    rows = []
    for event in sorted(found, key=lambda event: event["step"]):
        if event["event"] == "non-finite":
            kind, message = "not finite", f"rows {event['rows'][:16]} of a batch"
        else:
            kind, message = event.get("kind", "change of phase"), event["message"]
        rows.append([str(event["step"]), kind, message])
    return head + _table(["step", "what", "evidence"], rows, numbers=(0,))


def _reading(run: RunFiles) -> str:
    return "<h2>How to read this page</h2>" + "".join(f"<p>{line}</p>" for line in _READING)


def _config(run: RunFiles) -> str:
    if run.config is None:
        return ""
    text = html.escape(run.config)
    return (
        f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"
    )


def _table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] | None = None
) -> str:
    right = range(1, len(titles)) if numbers is None else numbers

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (f'{tag} class="number"' if i in right else tag for i in range(len(cells)))
        parts = zip(kinds, map(html.escape, cells), strict=True)
        return f"<tr>{''.join(f'<{kind}>{cell}</{tag}>' for kind, cell in parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(titles, 'th')}</thead><tbody>{body}</tbody></table>"


>>>>>>> main
def parser() -> Parser:
    """The arguments of `stagewise report`."""
    made = Parser(
        prog="stagewise report",
        description=(
            "Writes one self-contained HTML page from the files of a run. Of a folder that holds "
            "several runs, a page of each, the newest first. Of two or more runs of the same data, "
            "one page that compares them: stagewise report RUN_A RUN_B."
        ),
    )
    made.add_argument("run", type=Path, nargs="+", help="folder of the run, or of runs")
    made.add_argument("--output", type=Path, help="the page (RUN/report.html, RUN_A/compare.html)")
    made.add_argument("--title", metavar="TEXT", help="its heading (the folder's name)")
    return made


def _tell(page: Path) -> None:
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")


def _one_each(folders: Sequence[Path]) -> None:
    """Refuses folders of several runs where runs are compared."""
    for folder in folders:
        if len(runs := runs_in(folder)) > 1:
            raise ValueError(f"Expected runs to compare; {folder} holds several:{_listed(runs)}")


def _listed(runs: Sequence[Path]) -> str:
    return "".join(f"\n  {shlex.quote(str(run))}" for run in runs)


def main() -> None:
    """The entry point of `stagewise report`."""
    given = parser().parse_args()
    with ends_in_a_line("report"):
        if len(given.run) > 1:
            _one_each(given.run)
            _tell(compare(given.run, given.output, given.title))
            return
        (folder,) = given.run
        runs = runs_in(folder)
        if len(runs) < 2:
            _tell(report(folder, given.output, given.title))
            return
        if given.output or given.title:
            raise ValueError(
                f"Expected one run with --output or --title; there are:{_listed(runs)}"
            )
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
