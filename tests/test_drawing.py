"""The pieces of all pictures: the axis of t, the stages on it and the order of colours."""

import math

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv, to_hex

from stagewise.callbacks import drawing


def logit(t):
    return np.log(np.asarray(t) / (1 - np.asarray(t)))


@pytest.mark.parametrize(
    ("ends", "names"),
    [
        ((0.4, 0.8), ["navigation", "transition", "refinement"]),
        ((0.4, math.nan), ["navigation", "transition"]),
        ((None, None), ["navigation"]),
        ((0.0, 0.5), ["transition", "refinement"]),
        ((0.4, 0.41), ["navigation", "refinement"]),  # no room for the middle one
    ],
)
def test_stages_are_named_in_the_middle_of_what_is_shaded(ends, names):
    axes = drawing.new_figure().add_subplot()
    drawing.time_axis(axes, [0.02, 0.98])
    drawing.shade_stages(axes, ends)
    assert [text.get_text() for text in axes.texts] == names
    spans = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    low, high = axes.get_xlim()
    assert spans[0].x0 == pytest.approx(low)
    assert spans[-1].x1 == pytest.approx(high)
    for one, other in zip(spans, spans[1:], strict=False):
        assert one.x1 == pytest.approx(other.x0)
    if len(spans) == len(names):
        for text, span in zip(axes.texts, spans, strict=True):
            middle = (logit(span.x0) + logit(span.x1)) / 2
            assert logit(text.get_position()[0]) == pytest.approx(middle)


@pytest.mark.parametrize("t", [[0.02, 0.98], [1e-4, 0.9], [0.3, 0.999], [0.45, 0.55]])
def test_the_first_bin_is_seen_around_its_middle_and_ticks_have_room(t):
    axes = drawing.new_figure().add_subplot()
    drawing.time_axis(axes, t)
    low, high = axes.get_xlim()
    assert (low, 1 - high) == pytest.approx((t[0] / 2, (1 - t[-1]) / 2), rel=1e-9)
    ticks = np.sort(axes.get_xticks())
    assert len(ticks)
    assert ((low <= ticks) & (ticks <= high)).all()
    whole = logit(high) - logit(low)
    assert (np.diff(logit(ticks)) > 0.05 * whole).all()


def test_colours_go_from_light_to_dark_and_survive_without_hue():
    def light(colours):
        return [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, *_ in colours]

    steps = drawing.by_step([1, 10, 100, 1000])
    for colours in (
        drawing.in_order(5),
        [drawing.step_colour(steps, step) for step in (10, 30, 100, 300, 1000)],
        [tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in drawing.STAGE_COLOURS],
    ):
        falls = -np.diff(light(colours))
        assert (falls > 0.04).all()
    assert to_hex(drawing.step_colour(steps, 1)) == to_hex(drawing.step_colour(steps, 10)), (
        "two decades at most"
    )
    assert rgb_to_hsv(drawing.in_order(1)[0][:3])[2] < 0.5, "one curve is dark"


def test_how_much_a_picture_rests_on_is_said_as_far_as_it_is_known():
    said = drawing.counted(1281167, 32, 24)
    assert said == "N = 1 281 167 rows, n = 32 noisy samples in each of 24 bins of t"
    assert drawing.counted(None, 32, 24).startswith("n = 32")
    assert drawing.counted(10, None, 24) == "N = 10 rows"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((0.41, 0.93), ["0.5", "0.6", "0.7", "0.8", "0.9"]),
        ((0.9, 7), ["1", "2", "5"]),
        ((0.68, 1.35), ["0.7", "0.8", "0.9", "1", "1.2"]),
        ((1, 1200), ["1", "10", "100", "1 000"]),
        ((0.412, 0.438), None),
        ((1e-9, 1e9), None),
    ],
)
def test_a_logarithmic_axis_of_any_length_has_labels(limits, expected):
    figure = drawing.new_figure()
    axes = figure.add_subplot(yscale="log", xscale="log")
    axes.set(xlim=limits, ylim=limits)
    for axis in (axes.xaxis, axes.yaxis):
        drawing.log_ticks(axis)
    drawing.render(figure)
    for axis in (axes.xaxis, axes.yaxis):
        at = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        shown = [text.get_text() for tick, text in at if limits[0] <= tick <= limits[1]]
        assert shown == (expected or shown)
        assert 3 <= len(set(shown)) == len(shown) <= 9
        assert not any(text.get_text() for text in axis.get_minorticklabels())
