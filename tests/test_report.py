"""`stagewise report`: a page from the files of a run, whatever it had, and whatever is broken."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stagewise.recipes import report as page
from stagewise.recipes.report import report
from stagewise.recipes.run_files import read_run

ROOT = Path(__file__).parents[1]
BINS = 6
EDGES = np.linspace(0, 1, BINS + 1).tolist()
VOID = {"meta", "img", "link", "br"}


def write(folder, *events, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event) + "\n" for event in events]
    (folder / "stages.jsonl").write_text("".join(lines) + tail)


def measured(step):
    t = [(i + 0.5) / 8 for i in range(8)]
    return {
        "event": "probe",
        "step": step,
        "t": t,
        "top1": t,
        "midpoint": 0.4321,
        "midpoint_low": 0.41,
        "midpoint_high": 0.45,
        "collapsed": None,
    }


def probe(step, alarm=None):
    oracle = [0.1 + 0.5 / step] * BINS
    floor = [0.3, 0.2, 0.1, 0.0, 0.0, None]
    train = {
        "oracle": oracle,
        "floor": floor,
        "conditional": [a + (b or 0) for a, b in zip(oracle, floor, strict=True)],
        "cosine": [0.9] * BINS,
        "excess": [1.0] * 3 + [None] * 3,
        "oracle_se": [0.01] * BINS,
        "conditional_se": [0.01] * BINS,
        "pythagoras_z": [0.5, -2.25, 1.0, 0.0, 0.0, None],
    }
    stage = {"conditional": 0.4, "oracle": 0.1234, "floor": 0.3, "excess": 0.5, "cosine": 0.9}
    stages = {"navigation": stage, "transition": stage, "refinement": stage}
    return {
        "event": "velocity_probe",
        "step": step,
        "train": train,
        "held_out": train,
        "gap": [0.01] * BINS,
        "gap_se": [0.01] * BINS,
        "stages": {"train": stages, "held_out": stages},
        "alarm": alarm,
    }


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, which takes most of the time."""
    monkeypatch.setattr(page, "_drawn", lambda figure, alt: page._image(b"", alt, (1, 1)))


@pytest.fixture
def run(tmp_path):
    """A run with everything, and the folder it lies in."""
    folder = tmp_path / "a run & more"
    about = {"event": "bank", "rows": "20000 <b>", "shape": [3, 16, 16], "std": 0.5, "classes": 7}
    about |= {"class_wise": True, "path": "LinearPath()", "predicted": 0.35}
    write(folder / "stages", about, measured(0), measured(500))
    header = {"event": "velocity", "edges": EDGES, "midpoint": 0.43, "collapsed": 1.0}
    share = {"draws": 0.4, "loss": 0.3, "gradient": 0.3}
    window = {
        "event": "training_window",
        "step": 500,
        "from_step": 1,
        "draws": [1 / BINS] * BINS,
        "density": None,
        "loss": [1.0] * BINS,
        "stages": {"navigation": share, "transition": share, "refinement": share},
    }
    write(folder / "errors", header, probe(1), probe(500), window)
    moved = {
        "event": "transition",
        "kind": "navigation learned",
        "step": 321,
        "message": "flat at <0.1>",
    }
    write(folder / "transitions", moved)
    copied = {"event": "memorization_probe", "step": 500, "copies": [0.25], "low": [0.1]}
    write(folder / "memory", {"event": "memorization"}, copied | {"high": [0.4]})
    (folder / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    return folder


class Checker(HTMLParser):
    """Tags close in order; what is shown is kept."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images = [], "", []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def read(file):
    checker = Checker()
    checker.feed(file.read_text(encoding="utf-8"))
    assert not checker.open
    return checker


def test_a_page_says_what_the_run_found(run):
    assert report(run) == run / "report.html"
    found = read(run / "report.html")
    for words in (
        "a run & more",
        "up to step 500",
        "0.432",
        "0.41 to 0.45",
        "0.123",
        "20000 <b> rows",
        "within 2.25 standard errors",
        "navigation learned",
        "flat at <0.1>",
        "321",
        "copies among samples",
        "0.25",
        "name: <script>alert(1)</script>",
    ):
        assert words in found.text, words
    assert "not in this run" not in found.text
    assert len(found.images) == 7
    assert all(image["alt"] and image["src"].startswith("data:image/png") for image in found.images)
    assert not list(run.glob("*.partial"))


def test_it_is_one_file_that_asks_for_nothing(run):
    text = report(run).read_text(encoding="utf-8")
    assert "<script>" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert not re.search(r"url\(|@import|https?://", text)
    assert len(text) < 5e6


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kept", ["stages", "errors", "transitions", "memory"])
def test_a_run_with_one_monitor_says_what_others_would_give(run, kept):
    for part in ("stages", "errors", "transitions", "memory"):
        if part != kept:
            shutil.rmtree(run / part)
    found = read(report(run))
    missing = {
        "stages": ("VelocityErrorMonitor", "MemorizationMonitor"),
        "errors": ("PosteriorMonitor", "MemorizationMonitor"),
        "transitions": ("PosteriorMonitor", "VelocityErrorMonitor"),
        "memory": ("PosteriorMonitor", "VelocityErrorMonitor"),
    }[kept]
    for name in missing:
        assert name in found.text


@pytest.mark.usefixtures("undrawn")
def test_an_alarm_is_on_top(run):
    header, *_ = (run / "errors/stages.jsonl").read_text().splitlines()
    alarm = "off by <i>12</i> standard errors"
    write(run / "errors", json.loads(header), probe(1), probe(9, alarm))
    assert alarm in read(report(run)).text


@pytest.mark.usefixtures("undrawn")
def test_pictures_of_the_run_are_taken_in(run):
    shutil.copy(ROOT / "docs/images/concentration.png", run / "stages/concentration.png")
    assert len(read(report(run)).images) == 8


@pytest.mark.usefixtures("undrawn")
def test_broken_lines_are_named_and_the_rest_is_used(run):
    file = run / "errors/stages.jsonl"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([first, '{"event": [1]}', *others, '{"event": "velo']))
    found = read(report(run))
    assert "errors/stages.jsonl, line 2: no event" in found.text
    assert "line 6: cut short, as when a run is killed" in found.text
    assert len(read_run(run).of("velocity_probe")) == 2


BOUNDARY = {"midpoint": 0.371, "midpoint_low": 0.36, "midpoint_high": 0.38, "collapsed": 0.871}
BOUNDARY |= {"collapsed_low": 0.86, "collapsed_high": 0.88}


def lines_of(monkeypatch):
    """The places of the boundary in all figures that are drawn from now on."""
    places = []

    def drawn(figure, alt):
        for axes in figure.axes:
            for line in axes.get_lines():
                if str(line.get_label()).startswith(("midpoint", "collapsed")):
                    places.append(round(float(line.get_xdata()[0]), 3))
        return page._image(b"", alt, (1, 1))

    monkeypatch.setattr(page, "_drawn", drawn)
    return places


@pytest.mark.parametrize("told", ["errors", "stages", "first probe"])
def test_one_boundary_in_all_of_a_page(run, told, monkeypatch):
    """That of the errors' header, or else of the bank's, or else of the first probe."""
    places = lines_of(monkeypatch)
    bank, first, last = map(json.loads, (run / "stages/stages.jsonl").read_text().splitlines())
    header, *others = map(json.loads, (run / "errors/stages.jsonl").read_text().splitlines())
    bare = {key: value for key, value in header.items() if key not in BOUNDARY}
    other = {key: value + 0.05 for key, value in BOUNDARY.items()}
    if told == "errors":
        write(run / "errors", bare | BOUNDARY, *others)
        write(run / "stages", bank | other, first, last)
    elif told == "stages":
        write(run / "errors", bare, *others)
        write(run / "stages", bank | BOUNDARY, first, last)
    else:
        write(run / "errors", bare, *others)
        write(run / "stages", bank, first | BOUNDARY, last)
    text = read(report(run)).text
    assert set(places) == {0.371, 0.871}
    assert "95 % interval: 0.36 to 0.38" in text
    assert "95 % interval: 0.86 to 0.88" in text
    assert "t at which the mean largest posterior weight crosses 0.5" in text
    # What was measured later is called so, and is nowhere else.
    assert text.count("0.432") == 1
    assert "last probe, measured at step 500" in text
    assert read_run(run).boundary().midpoint == BOUNDARY["midpoint"]


@pytest.mark.usefixtures("undrawn")
def test_a_boundary_that_was_not_reached_is_no_number(run):
    bank, first, last = map(json.loads, (run / "stages/stages.jsonl").read_text().splitlines())
    shutil.rmtree(run / "errors")
    none = dict.fromkeys(BOUNDARY)
    write(run / "stages", bank, first | none, last | none)
    text = read(report(run)).text
    assert "boundary (midpoint), t–" in text
    assert "nan" not in text
    assert "midpoint – (no interval)" in text


@pytest.mark.usefixtures("undrawn")
def test_the_gap_is_told_with_what_chance_makes(run):
    header, *_ = map(json.loads, (run / "errors/stages.jsonl").read_text().splitlines())
    last = probe(9) | {"gap": [0.03] * BINS, "gap_se": [0.01] * 2 + [0.02] * 3 + [None]}
    write(run / "errors", header, probe(1), last)
    assert "At step 9 the gap is two standard errors or more from zero in 2 of 6 bins" in (
        read(report(run)).text
    )


@pytest.mark.usefixtures("undrawn")
def test_copies_have_the_words_of_their_interval(run):
    assert "95 % exact interval: 0.1 to 0.4" in read(report(run)).text


@pytest.mark.usefixtures("undrawn")
def test_events_of_two_folders_are_not_mixed(run):
    write(run / "again", probe(7), probe(9))
    assert [event["step"] for event in read_run(run).of("velocity_probe")] in ([7, 9], [1, 500])


@pytest.mark.usefixtures("undrawn")
def test_bad_input_is_one_line(run, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"No stages.jsonl in .*empty"):
        report(empty)
    with pytest.raises(ValueError, match="There is no folder"):
        report(tmp_path / "nowhere")
    write(empty, tail="nothing")
    with pytest.raises(ValueError, match="No event could be read"):
        report(empty)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(
        sys, "argv", ["stagewise report", str(run), f"--output={blocked / 'page.html'}"]
    )
    with pytest.raises(SystemExit, match=r"^stagewise report: .*Not a directory[^\n]*$"):
        page.main()
    for target in (tmp_path / "nowhere" / "page.html", empty):
        monkeypatch.setattr(sys, "argv", ["stagewise report", str(run), f"--output={target}"])
        with pytest.raises(SystemExit, match=rf"Cannot write {target}: .*--output"):
            page.main()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_browser_opens_it_without_a_word(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    picture = tmp_path / "page.png"
    call = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    call += ["--window-size=1440,900", f"--screenshot={picture}", report(run).as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert picture.stat().st_size > 20_000
    assert "CONSOLE" not in done.stderr


def test_a_window_that_does_not_count_all_says_so(run, undrawn):
    assert "Not all" not in report(run).read_text()
    lines = (run / "errors/stages.jsonl").read_text().splitlines()
    window = json.loads(lines[-1]) | {"lacking": "draws of one process of <2>"}
    (run / "errors/stages.jsonl").write_text("\n".join([*lines[:-1], json.dumps(window)]) + "\n")
    assert "Not all: draws of one process of &lt;2&gt;." in report(run).read_text()
