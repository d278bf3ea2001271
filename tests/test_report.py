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
from stagewise.recipes import report_compare, report_figures, report_html, report_sections
from stagewise.recipes.report import compare, report
from stagewise.recipes.report_facts import Facts, even
from stagewise.recipes.report_verdict import advice, verdict
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
        "target_difference": t[::-1],
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
def figures_are_drawn():
    """What a test asks for that looks at them."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Figures are made and not drawn, which takes most of the time."""
    if "figures_are_drawn" in request.fixturenames:
        return
    for module in (report_sections, report_compare):
        monkeypatch.setattr(
            module, "drawn", lambda figure, caption: report_html.image(b"", caption, (1, 1))
        )


@pytest.fixture
def run(tmp_path):
    """A run with everything, and the folder it lies in."""
    folder = tmp_path / "a run & more"
    about = {"event": "bank", "rows": 20000, "shape": [3, 16, 16], "std": 0.5, "classes": 7}
    about |= {"class_wise": True, "path": "LinearPath()", "predicted": 0.35}
    write(folder / "stages", about, measured(0), measured(500))
    header = {"event": "velocity", "edges": EDGES, "midpoint": 0.43, "collapsed": 0.8}
    header |= {"network": "net: SiT(x_t, time)", "parameters": 1234567, "queries": 32}
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
    kinds = {"navigation learned": "", "memorization onset": "", "boundary moved": "a bank"}
    write(folder / "transitions", {"event": "transitions", "kinds": kinds}, moved)
    copied = {"event": "memorization_probe", "step": 500, "samples": 64, "t_switch": [0.0, 0.4]}
    copied |= {"copies": [0.25, 0.5], "low": [0.1, 0.3], "high": [0.4, 0.6]}
    write(folder / "memory", {"event": "memorization"}, copied)
    (folder / "config.yaml").write_text(
        "name: <script>alert(1)</script>\ntrainer: {max_steps: 500}\nlr: 0.001\n"
    )
    return folder


def events_of(run, part):
    return list(map(json.loads, (run / part / "stages.jsonl").read_text().splitlines()))


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


@pytest.mark.usefixtures("figures_are_drawn")
@pytest.mark.slow
def test_a_page_says_what_the_run_found(run):
    assert report(run) == run / "report.html"
    found = read(run / "report.html")
    for words in (
        "a run & more",
        "measured up to step 500 of 500 planned",
        "net: SiT(x_t, time); 1\u202f234\u202f567 parameters",
        "0.430",
        "0.123",
        "3 × 16 × 16 numbers",
        "within 2.25 standard errors",
        "navigation learned",
        "flat at <0.1>",
        "321",
        "16 of 64 samples are copies (95 % exact interval 0.100 to 0.400)",
        "Looked for and not found up to step 500: memorization onset.",
        "Could not be found in this run: boundary moved (lacks a bank)",
        "name: <script>alert(1)</script>",
    ):
        assert words in found.text, words
    assert "not in this run" not in found.text.replace("Pictures of samples: not in this run", "")
    assert "cannot be made" not in found.text
    assert len(found.images) == 9
    assert all(image["alt"] and image["src"].startswith("data:image/png") for image in found.images)
    assert not list(run.glob("*.partial"))
    # It is one file that asks for nothing.
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert not re.search(r"url\(|@import|https?://", text)
    assert len(text) < 3e6


def test_it_reads_from_the_verdict_down(run):
    text = report(run).read_text(encoding="utf-8")
    assert text.index("Navigation was learned by step 321") < text.index("<h2>")
    assert re.findall("<h2>(.*?)</h2>", text) == [
        "How to read this page",
        "Samples",
        "The loss against its floor",
        "The stages",
        "Memorization",
        "What training spends on each stage",
        "What to change, and why",
        "Events",
        "Settings",
    ]


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
        assert re.search(rf"not in this run. Add {name}\(.*?\)\.", found.text), name
    assert "cannot be made" not in found.text
    if kept != "transitions":
        assert "These files do not tell whether navigation was learned" in found.text
        assert "not found" not in found.text


# -- what it was trained on ----------------------------------------------------------------------

CONFIG = """
scheme: {target: {_target_: stagewise.Mix, lam: boundary}}
engine: {_target_: stagewise.Auto}
callbacks:
  errors: {_target_: stagewise.callbacks.VelocityErrorMonitor, queries: 32}
  memorization: {samples: 64}
lr: 0.001
"""


def test_older_files_do_not_tell_what_a_run_was_trained_on(run):
    assert "Trained onnot recorded" in read(report(run)).text
    write(run / "scheme", {"event": "scheme"})
    text = read(report(run)).text
    assert "Trained onsteered by StageScheme; how is not recorded" in text
    measured_by = text[text.index("Measured by") : text.index("How to read")]
    assert "MemorizationMonitor" in measured_by
    assert "StageScheme" not in measured_by


@pytest.mark.parametrize("place", ["scheme", "errors"])
def test_what_steers_a_run_is_what_its_files_say(run, place):
    words = "the oracle's target up to t = 0.380, the plain target after it"
    header, *others = events_of(run, "errors")
    if place == "errors":
        write(run / "errors", header | {"trained_on": words, "steered": True}, *others)
    else:
        write(run / "scheme", {"event": "scheme", "trained_on": words})
    facts = Facts(read_run(run))
    assert facts.steered
    assert f"Trained on{words}" in read(report(run)).text
    write(run / "errors", header | {"trained_on": "the plain target", "steered": False}, *others)
    shutil.rmtree(run / "scheme", ignore_errors=True)
    assert not Facts(read_run(run)).steered
    assert "Trained onthe plain target" in read(report(run)).text


@pytest.mark.parametrize("steered", [False, True])
def test_settings_that_no_callback_used_are_left_out(run, steered):
    steer = "  steer: {_target_: stagewise.callbacks.StageScheme}\n" * steered
    (run / "config.yaml").write_text(CONFIG.replace("  memorization", steer + "  memorization"))
    text = read(report(run)).text
    shown = text[text.index("Settings") :]
    assert ("stagewise.Mix" in shown) is steered
    assert ("stagewise.Auto" in shown) is steered
    assert "lr: 0.001" in shown
    assert "VelocityErrorMonitor" in shown
    assert "samples: 64" not in shown  # a callback that was not chosen
    assert ("scheme.target.lam" in Facts(read_run(run)).settings) is steered


# -- numbers of a row and of a picture -----------------------------------------------------------


def test_numbers_of_one_kind_have_the_same_digits():
    assert even([0.999, 1.0, None]) == ["0.999", "1.000", "–"]
    assert even([0.0928, 0.00685, 0.000251]) == ["0.0928", "0.0069", "0.0003"]
    assert even([7.77, 118.0, float("nan")]) == ["7.8", "118.0", "–"]
    assert even([0.0, 0.109]) == ["0.000", "0.109"]
    assert even([0.0, 0.056], 2) == ["0.000", "0.056"]
    assert even([12, 1234]) == ["12", "1\u202f234"]


def test_stages_are_columns_with_even_digits(run):
    header, *others = events_of(run, "errors")
    last = probe(500)
    whole = {"conditional": 0.4, "oracle": 0.1234, "floor": 0.3, "excess": 0.5}
    found = {"navigation": 0.999, "transition": 1.0, "refinement": 0.5}
    last["stages"]["train"] = {name: whole | {"cosine": x} for name, x in found.items()}
    write(run / "errors", header, last)
    text = read(report(run)).text
    assert "navigationtransitionrefinement" in text
    assert "cosine0.9991.0000.500" in text
    assert "t0.000 to 0.4300.430 to 0.8000.800 to 1.000" in text


def test_the_floor_reaches_the_axis_of_its_picture(run):
    axes = report_figures.loss_by_step_figure(Facts(read_run(run))).axes[0]
    floor = next(line for line in axes.get_lines() if "floor" in line.get_label())
    low, high = axes.get_ylim()
    filled = axes.collections[-1].get_datalim(axes.transData)
    assert filled.y0 == pytest.approx(low)
    assert low < floor.get_ydata()[0] < high


def test_an_alarm_is_on_top(run):
    header, *_ = (run / "errors/stages.jsonl").read_text().splitlines()
    alarm = "off by <i>12</i> standard errors"
    write(run / "errors", json.loads(header), probe(1), probe(9, alarm))
    assert alarm in read(report(run)).text


def test_pictures_of_the_run_are_taken_in(run):
    shutil.copy(ROOT / "docs/images/samples.png", run / "samples.png")
    assert len(read(report(run)).images) == 10
    (run / "samples.png").unlink()
    shutil.copy(ROOT / "docs/images/samples.png", run / "memory/samples.png")
    found = read(report(run))
    assert len(found.images) == 11  # beside their nearest rows, twice
    assert "Pictures of samples" not in found.text


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

    def drawn(figure, caption):
        for axes in figure.axes:
            for line in axes.get_lines():
                if str(line.get_label()).startswith(("midpoint", "collapsed")):
                    places.append(round(float(line.get_xdata()[0]), 3))
        return report_html.image(b"", caption, (1, 1))

    monkeypatch.setattr(report_sections, "drawn", drawn)
    return places


@pytest.mark.parametrize("told", ["errors", "stages", "first probe"])
def test_one_boundary_in_all_of_a_page(run, told, monkeypatch):
    """That of the errors' header, or else of the bank's, or else of the first probe."""
    places = lines_of(monkeypatch)
    bank, first, last = events_of(run, "stages")
    header, *others = events_of(run, "errors")
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
    assert "mean largest posterior weight crosses 0.5: t = 0.371 (95 % interval 0.360 to" in text
    assert "mean largest posterior weight crosses 0.99: t = 0.871 (95 % interval 0.860" in text
    # Another measurement is told only because it is elsewhere: latents have changed.
    assert text.count("t = 0.432") == 1
    assert "At step 500 the midpoint was measured at t = 0.432 (0.410 to 0.450)" in text
    assert read_run(run).boundary().midpoint == BOUNDARY["midpoint"]


def test_a_measurement_that_agrees_is_not_told_again(run):
    bank, first, last = events_of(run, "stages")
    header, *others = events_of(run, "errors")
    write(run / "errors", header | BOUNDARY, *others)
    write(run / "stages", bank, first, last | {"midpoint": 0.3777, "midpoint_low": 0.37})
    assert "0.378" not in read(report(run)).text


def test_a_boundary_that_was_not_reached_is_no_number(run):
    bank, first, last = map(json.loads, (run / "stages/stages.jsonl").read_text().splitlines())
    shutil.rmtree(run / "errors")
    none = dict.fromkeys(BOUNDARY)
    write(run / "stages", bank, first | none, last | none)
    text = read(report(run)).text
    assert "navigation ends at t–" in text
    assert "nan" not in text
    assert "crosses 0.5: not reached" in text


def test_the_gap_is_told_with_what_chance_makes(run):
    header, *_ = events_of(run, "errors")
    last = probe(9) | {"gap": [0.03] * BINS, "gap_se": [0.01] * 2 + [0.02] * 3 + [None]}
    write(run / "errors", header, probe(1), last)
    text = read(report(run)).text
    assert "at step 9 it is two standard errors or more from zero in 2 of 6 bins of t" in text


def test_events_of_two_folders_are_not_mixed(run):
    write(run / "again", probe(7), probe(9))
    assert [event["step"] for event in read_run(run).of("velocity_probe")] in ([7, 9], [1, 500])


def test_bad_input_is_one_line(run, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"No stages.jsonl in .*empty"):
        report(empty)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder of a run, got a file"):
        read_run(tmp_path / "file")
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent/stages.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"in .*silent: its stages.jsonl holds no line yet"):
        read_run(tmp_path / "silent")
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


# -- the verdict, and what to change -------------------------------------------------------------


def facts_of(run, *events):
    """Facts of a run whose errors are these, after the header."""
    write(run / "errors", events_of(run, "errors")[0], *events)
    return Facts(read_run(run))


def learning(step, oracle, held_out=0.0, **changes):
    """A probe whose oracle error is `oracle` in all stages; held-out error is above by a part."""
    made = json.loads(json.dumps(probe(step)))
    for split, above in (("train", 0.0), ("held_out", held_out)):
        made[split]["oracle"] = [oracle] * BINS
        made[split]["conditional"] = [oracle + 0.1 + above] * BINS
        made[split]["floor"] = [0.1] * BINS
        for stage in made["stages"][split].values():
            stage |= {"oracle": oracle, "conditional": oracle + 0.1 + above, "floor": 0.1}
            stage |= {"excess": oracle / 0.1}
    made["gap"] = [held_out] * BINS
    return made | changes


def done(facts):
    return " ".join(f"{each.do} {each.why} {each.source}" for each in advice(facts))


def test_navigation_that_still_improves_is_trained_longer(run):
    shutil.rmtree(run / "transitions")
    facts = facts_of(run, learning(1, 1.0), learning(200, 0.2), learning(400, 0.1))
    assert "Navigation still improves (the error above the floor fell by 50 %" in verdict(facts)
    assert "held-out samples are predicted as well as training samples within" in verdict(facts)
    assert "fell by 50 % from step 200 to the end, and held-out error has not risen" in done(facts)


def test_navigation_that_is_level_is_not_trained_longer(run):
    shutil.rmtree(run / "transitions")
    facts = facts_of(run, learning(1, 1.0), learning(200, 0.1), learning(400, 0.099))
    assert "no longer changes much (its error is 99 % above the floor)" in verdict(facts)
    assert "Train longer" not in done(facts)


def test_data_without_navigation_have_none_to_learn(run):
    header, *others = events_of(run, "errors")
    write(run / "errors", header | {"midpoint": 0.0, "collapsed": 0.0}, *others)
    assert verdict(Facts(read_run(run))).startswith("There is no navigation to learn")
    assert "cannot be made" not in read(report(run)).text


def test_few_probes_show_no_trend(run):
    shutil.rmtree(run / "transitions")
    facts = facts_of(run, learning(1, 1.0), learning(400, 0.1))
    assert "with too few probes to see a trend" in verdict(facts)
    assert "Train longer" not in done(facts)


def test_held_out_error_that_has_risen_stops_the_training_earlier(run):
    facts = facts_of(run, learning(1, 1.0), learning(200, 0.1, 0.02), learning(400, 0.02, 0.3))
    assert "held-out error is 250 %" in verdict(facts)
    assert "Use the weights of about step 200." in done(facts)
    assert "second-hand: docs/results.md" in done(facts)
    assert "Train longer" not in done(facts)


def test_an_oracle_that_is_not_that_of_the_training_is_all_the_advice(run):
    facts = facts_of(run, learning(1, 1.0), learning(400, 0.1, alarm="off by 12 standard errors"))
    assert verdict(facts).startswith("Do not act on these numbers yet: at step 400 off by 12")
    (only,) = advice(facts)
    assert only.do.startswith("Repair the oracle first")


def test_floor_that_is_most_of_the_loss_is_advised_at_second_hand(run):
    facts = facts_of(run, learning(1, 1.0), learning(400, 0.05))
    (target,) = (each for each in advice(facts) if "oracle targets" in each.do)
    assert "In navigation 67 % of the loss is the floor" in target.why
    assert target.source.startswith("second-hand")
    write(run / "scheme", {"event": "scheme"})
    assert not any("oracle targets" in each.do for each in advice(Facts(read_run(run))))


def test_a_run_of_the_data_alone_has_no_verdict_on_the_model(run):
    for part in ("errors", "transitions", "memory"):
        shutil.rmtree(run / part)
    said = verdict(Facts(read_run(run)))
    assert (
        said
        == "Navigation ends at t = 0.432 in these data; how well the model learns was not measured."
    )
    assert "VelocityErrorMonitor()" in done(Facts(read_run(run)))


def test_what_a_guard_has_measured_counts(run):
    shutil.rmtree(run / "errors")
    shutil.rmtree(run / "transitions")
    copied = events_of(run, "memory")[-1] | {"event": "guard_probe", "held_out_loss": 0.25}
    later = copied | {"step": 900, "held_out_loss": 0.5}
    write(run / "memory", {"event": "guard"}, copied, later)
    facts = Facts(read_run(run))
    assert "memorization had not begun by step 900" in verdict(facts)
    text = read(report(run)).text
    assert "held-out loss was lowest at step 500, 0.25, and was 0.5 at step 900" in text
    assert "Looked for and not found up to step 900: memorization onset." in text
    onset = {"event": "transition", "kind": "memorization onset", "step": 700, "message": "m"}
    write(run / "memory", {"event": "guard"}, copied, later, onset)
    facts = Facts(read_run(run))
    assert "memorization began at step 700" in verdict(facts)
    assert "Use the weights of about step 700." in done(facts)


def test_samples_that_could_not_be_compared_are_no_copies(run):
    header, last = events_of(run, "memory")
    broken = {"copies": [0.5, None], "low": [0.3, None], "high": [0.7, None], "not_finite": 70}
    write(run / "memory", header, last | broken)
    assert "0.5 of the samples are copies (95 % exact interval 0.300 to" in verdict(
        Facts(read_run(run))
    )
    text = read(report(run)).text
    assert "cannot be made" not in text
    none = {key: [None, None] for key in ("copies", "low", "high")}
    write(run / "memory", header, last | none)
    facts = Facts(read_run(run))
    assert "no sample could be compared with training rows" in verdict(facts)
    assert "copies" not in done(facts)


# -- runs that were killed, are of another version, or of other data -----------------------------


def test_a_run_that_was_killed_says_where(run):
    file = run / "errors/stages.jsonl"
    file.write_text(file.read_text() + '{"event": "velo')
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("500", "1200"))
    text = read(report(run)).text
    assert "cut short, as when a run is killed" in text
    assert "The last measurement is of step 500 of 1200: the run was stopped" in text
    assert f"run_dir='{run}' resume=true" in text
    last = events_of(run, "memory")[-1]
    header, *others = [e for e in read_run(run).of("velocity")]
    lines = file.read_text().splitlines()[:-1]
    ended = json.loads(lines[2]) | {"at_end": True}
    write(run / "errors", *map(json.loads, lines[:2]), ended)
    assert last["step"] == 500
    assert "was stopped" not in read(report(run)).text


def test_a_run_of_the_data_alone_does_not_tell_whether_it_ended(run):
    for part in ("errors", "transitions", "memory"):
        shutil.rmtree(run / part)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("500", "1200"))
    assert "do not tell whether the run reached its end" in read(report(run)).text


def test_a_loss_that_was_not_finite_is_on_top(run):
    broken = {"event": "non-finite", "step": 77, "rows": [3, 5], "t": [0.1, 0.2]}
    write(run / "errors", *events_of(run, "errors"), broken)
    text = read(report(run)).text
    assert text.index("At step 77 the loss or its gradient was not finite") < text.index("How to")
    assert "rows [3, 5] of a batch" in text


def test_events_of_an_older_version_leave_the_rest_of_the_page(run):
    """A part whose events lack what is read says so; the other parts are there."""
    header, first, last, window = events_of(run, "errors")
    for event in (first, last):
        del event["stages"], event["train"]["oracle_se"], event["train"]["pythagoras_z"]
        del event["gap_se"]
    del window["stages"]
    bare = {key: header[key] for key in ("event", "edges")}
    write(run / "errors", bare, first, last)
    text = read(report(run)).text
    assert "This part cannot be made: the events have another shape" in text
    assert "crosses 0.5: t = 0.432" in text
    assert "16 of 64 samples are copies" in text
    assert "navigation learned" in text


# -- several runs side by side -------------------------------------------------------------------


@pytest.fixture
def pair(run, tmp_path):
    """Two runs of the same data: the second is larger and ahead."""
    header = events_of(run, "errors")[0]
    other = tmp_path / "large"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(f"lr: 0.002\nrun_dir: {other}\ndir: {other}/x\n")
    (run / "config.yaml").write_text(f"lr: 0.001\nrun_dir: {run}\ndir: {run}/x\n")
    write(run / "errors", header, learning(1, 1.0), learning(100, 0.4), learning(400, 0.2))
    header |= {"parameters": 12345670}
    write(other / "errors", header, learning(1, 1.0), learning(100, 0.2), learning(600, 0.1))
    return run, other


def test_two_runs_side_by_side(pair):
    run, other = pair
    assert compare(pair) == run / "compare.html"
    found = read(run / "compare.html")
    # The second has no probe at the last step of the first: that before it counts.
    for words in (
        "a run & more against large",
        "At step 400 a run & more and large do not differ beyond noise in held-out loss",
        "1\u202f234\u202f567",
        "12\u202f345\u202f670",
        "20\u202f000 rows of 3 × 16 × 16 numbers",
        "power \u22120.30",  # 0.4 to 0.2 at ten times the parameters, at step 100
        "Two sizes are always on a line",
    ):
        assert words in found.text, words
    settings = found.text[found.text.index("Settings that differ") :]
    assert "0.0010.002" in settings
    assert "dir" not in settings
    assert len(found.images) == 5
    assert (run / "compare.html").stat().st_size < 3e6


def test_the_run_that_is_ahead_is_named_where_all_have_held_out_samples_by_those(pair):
    run, other = pair
    header, *_ = events_of(run, "errors")
    write(run / "errors", header, learning(1, 1.0), learning(400, 0.1, 0.5))
    write(other / "errors", header, learning(1, 1.0), learning(400, 0.2))
    assert "large is ahead of a run & more by 57 % in held-out loss" in read(compare(pair)).text
    without = [event | {"gap": None, "held_out": None} for event in events_of(other, "errors")[1:]]
    write(other / "errors", header, *without)
    text = read(compare(pair)).text
    assert "a run & more is ahead of large by 50 % in loss above the floor" in text
    assert "the sizes are not all different (1\u202f234\u202f567, 1\u202f234\u202f567)" in text


def test_what_was_trained_on_and_which_pictures_lack_is_said_of_each(pair):
    run, other = pair
    header, *others = events_of(other, "errors")
    write(
        other / "errors", header | {"trained_on": "the oracle's target", "steered": True}, *others
    )
    shutil.copy(ROOT / "docs/images/samples.png", other / "samples.png")
    found = read(compare(pair))
    assert "trained on not recorded; measured" in found.text
    assert "trained on the oracle's target; measured" in found.text
    assert "There is no picture of samples in a run & more." in found.text
    shutil.copy(ROOT / "docs/images/samples.png", run / "memory/samples.png")
    text = read(compare(pair)).text
    assert "a run & more: generated samples beside their nearest rows" in text
    assert "no picture" not in text


def test_three_sizes_show_whether_a_line_is_straight():
    sizes = [10, 100, 1000]
    straight = report_compare._straight(report_compare._powers(sizes, [0.4, 0.2, 0.1]))
    assert "It is nearly one line (from size to size \u22120.30, \u22120.30)" in straight
    bent = report_compare._straight(report_compare._powers(sizes, [0.4, 0.11, 0.1]))
    assert "not one line" in bent


@pytest.mark.parametrize(
    ("key", "value"),
    [("rows", 300), ("shape", [4, 8, 8]), ("std", 0.7), ("class_wise", False), ("classes", 10)],
)
def test_runs_of_other_data_are_not_compared(pair, key, value, monkeypatch):
    run, other = pair
    bank, *probes = events_of(other, "stages")
    write(other / "stages", bank | {key: value}, *probes)
    with pytest.raises(ValueError, match=rf"(?s)same data, got {key} .*stagewise report '.*a run"):
        compare(pair)
    assert not (run / "compare.html").exists()
    monkeypatch.setattr(sys, "argv", ["stagewise report", str(run), str(other)])
    with pytest.raises(SystemExit, match="stagewise report: Expected runs of the same data"):
        page.main()


def test_rows_that_differ_in_a_checksum_are_told(pair):
    run, other = pair
    for folder, dtype, checksum, told in (
        (other, "torch.float32", "b", True),
        (other, "torch.bfloat16", "b", False),  # may be the same rows, rounded
        (other, "torch.float32", "a", False),
    ):
        for each, kind, kept in ((run, "torch.float32", "a"), (folder, dtype, checksum)):
            bank, *probes = events_of(each, "stages")
            write(each / "stages", bank | {"dtype": kind, "fingerprint": kept}, *probes)
        text = read(compare(pair)).text
        assert ("The training rows of these runs are not the same" in text) is told


def test_what_two_runs_do_not_tell_is_said(pair):
    run, other = pair
    shutil.rmtree(other / "stages")
    header, *probes = events_of(other, "errors")
    del header["parameters"]
    header["edges"] = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 1]
    write(other / "errors", header, *probes)
    (other / "config.yaml").unlink()
    text = read(compare(pair)).text
    assert "large has no PosteriorMonitor, so its data may be other data" in text
    assert "the files of large do not have the number of parameters" in text
    assert "the bins of t differ" in text
    assert "Not compared: no config.yaml in large" in text
    shutil.rmtree(other / "errors")
    text = read(compare(pair)).text
    assert "fewer than two runs have a VelocityErrorMonitor" in text


@pytest.mark.parametrize("lost", ["train", "stages", "oracle", "step"])
def test_events_of_an_older_version_end_no_comparison(pair, lost):
    run, other = pair
    header, *probes = events_of(other, "errors")
    for event in probes:
        event["train"].pop("oracle") if lost == "oracle" else event.pop(lost)
    write(other / "errors", header, *probes)
    text = read(compare(pair)).text
    assert "Settings that differ" in text
    if lost in ("train", "step"):
        assert "large: errors/stages.jsonl, line 2: no event; left out" in text
    write(run / "errors", *events_of(other, "errors"))
    assert "Settings" in read(report(run)).text


def test_what_cannot_be_compared_is_one_line(pair, tmp_path, monkeypatch):
    run, other = pair
    for given, message in (
        ((run, run), "Expected different runs, got"),
        ((run, tmp_path / "nowhere"), "There is no folder"),
        ((run, tmp_path), r"Expected runs to compare; .* holds several:\n(.*\n)?.*large"),
    ):
        monkeypatch.setattr(sys, "argv", ["stagewise report", *map(str, given)])
        with pytest.raises(SystemExit, match=f"^stagewise report: {message}"):
            page.main()


@pytest.mark.slow
@pytest.mark.usefixtures("figures_are_drawn")
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


def test_a_window_that_does_not_count_all_says_so(run):
    assert "Not all" not in report(run).read_text()
    lines = (run / "errors/stages.jsonl").read_text().splitlines()
    window = json.loads(lines[-1]) | {"lacking": "draws of one process of <2>"}
    (run / "errors/stages.jsonl").write_text("\n".join([*lines[:-1], json.dumps(window)]) + "\n")
    assert "Not all: draws of one process of &lt;2&gt;." in report(run).read_text()
