"""What the end of a training says in sentences: each from the numbers of the table."""

import math

import pytest

from stagewise.recipes.conclusion import conclusion


def row(stage, start, end, train, floor, gap=0.0, gap_se=0.01):
    own = {"stage": stage, "from": start, "to": end, "train": train, "floor": floor}
    return own | {"held_out": train + gap, "gap": gap, "gap_se": gap_se}


def table(**changes):
    rows = [
        row("navigation", 0.0, 0.4, 0.2, 0.1),
        row("transition", 0.4, 0.8, 0.1, 0.0),
        row("refinement", 0.8, 1.0, 0.4, 0.0),
        row("all t", 0.0, 1.0, 0.2, 0.04),
    ]
    for stage, own in changes.items():
        next(entry for entry in rows if entry["stage"] == stage).update(own)
    return rows


def said(rows):
    return " ".join(conclusion(rows).split())


def test_every_number_is_that_of_the_table():
    text = said(table())
    assert text.startswith("What to conclude:")
    assert "Up to t = 0.400 many training samples explain a noisy one" in text
    assert "from t = 0.800 on one does (refinement)" in text
    assert "20% of the training loss (0.0400 of 0.2000) is its floor" in text
    # 0.4 * 0.1, 0.4 * 0.1 and 0.2 * 0.4 are left above the floor.
    assert "The rest, 0.1600, can be learned: 50% of it lies in refinement, which is 20%" in text
    assert "nowhere above training loss by two standard errors" in text


@pytest.mark.parametrize(
    ("gap", "error", "clear"), [(0.03, 0.01, True), (0.03, 0.02, False), (-0.03, 0.01, False)]
)
def test_a_gap_is_named_where_it_is_clear(gap, error, clear):
    text = said(table(navigation={"gap": gap, "gap_se": error}))
    assert ("above training loss in navigation (+15%)" in text) == clear
    assert ("nowhere above" in text) != clear


def test_what_was_not_measured_is_not_concluded_from():
    broken = {key: math.nan for key in ("gap", "gap_se")}
    text = said(table(navigation=broken, transition=broken, refinement=broken))
    assert "Held-out" not in text
    text = said(table(**{"all t": {"train": math.nan}}, refinement={"train": math.nan}))
    assert "nan" not in text
    assert "floor" not in text
    assert conclusion([]) == ""


def test_stages_that_are_not_there_are_not_named():
    rows = [row("navigation", 0.0, 1.0, 0.2, 0.1), row("all t", 0.0, 1.0, 0.2, 0.1)]
    text = said(rows)
    assert "At all t many training samples" in text
    assert "refinement" not in text
    late = [row("refinement", 0.0, 1.0, 0.2, 0.0), row("all t", 0.0, 1.0, 0.2, 0.0)]
    assert "From t = 0.000 on one does" in said(late)


def test_lines_fit_a_terminal():
    assert max(map(len, conclusion(table()).splitlines())) <= 100
