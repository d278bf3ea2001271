"""All pictures over t: what they show, what they have in common, and gaps in the data."""

import matplotlib.colors
import numpy as np
import pytest
import torch

from stagewise import LatentBank
from stagewise.callbacks import drawing, figures
from stagewise.callbacks import velocity_figures as pictures
from stagewise.callbacks.drawing import render
from stagewise.profile import Profile
from stagewise.recipes import evaluate, profile_figures
from stagewise.stages import STATISTICS, StageBoundary, StageCurve

EVEN = np.linspace(0, 1, 9).tolist()
EARLY = [*np.linspace(0, 0.17, 5).tolist(), 0.4, 0.6, 0.8, 1.0]
BOUNDARY = (0.4, 0.8)


def probe(step, scale=1.0, holes=False):
    """A probe whose oracle error falls with the step."""
    oracle = (scale * np.linspace(0.1, 0.8, 8) / (1 + step / 100)).tolist()
    floor = np.linspace(0.4, 0.0, 8).tolist()
    if holes:
        oracle[3] = None
    total = [None if a is None else a + b for a, b in zip(oracle, floor, strict=True)]
    se = [0.01] * 8
    train = {"oracle": oracle, "conditional": total, "floor": floor}
    train |= {"oracle_se": se, "conditional_se": se}
    gap = [None if value is None else 0.1 * value for value in total]
    return {"step": step, "train": train, "held_out": train, "gap": gap, "gap_se": se}


WINDOW = {
    "step": 20,
    "from_step": 10,
    "draws": [1 / 8] * 8,
    "density": [1 / 8] * 8,
    "stages": {
        "navigation": {"draws": 0.5, "loss": 0.2, "gradient": 0.3},
        "transition": {"draws": 0.3, "loss": 0.3, "gradient": 0.3},
        "refinement": {"draws": 0.2, "loss": 0.5, "gradient": 0.4},
    },
}


def all_pictures(edges, holes=False, boundary=BOUNDARY, probes=None):
    probes = probes or [probe(step, holes=holes) for step in (1, 10, 100)]
    return {
        "loss": pictures.loss_by_time_figure(edges, probes[-1], boundary, "a model"),
        "oracle": pictures.dynamics_figure(edges, probes, "oracle", boundary),
        "conditional": pictures.dynamics_figure(edges, probes, "conditional", boundary),
        "heatmap": pictures.error_heatmap(edges, probes, boundary),
        "gap": pictures.gap_heatmap(edges, probes, boundary),
        "both": pictures.stages_and_error_figure(
            edges, probes[-1], [0.1, 0.9], [0.0, 1.0], boundary
        ),
        "spending": pictures.spending_figure(edges, WINDOW, boundary),
        "sizes": pictures.sizes_figure(edges, {"S": probes[0], "L": probes[-1]}, boundary),
    }


def spread(figure):
    """How much its pixels differ; where its parts lie is asked of `every_figure`."""
    figure.set_layout_engine("none")
    return render(figure).std()


@pytest.mark.slow
def test_all_can_be_drawn_with_holes_and_label_their_axes():
    for name, figure in all_pictures(EARLY, holes=True).items():
        assert spread(figure) > 5, name
        labels = " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)
        assert "0 = noise" in labels, name


def test_one_probe_and_no_boundary_are_enough():
    lonely = all_pictures(EVEN, boundary=(None, float("nan")), probes=[probe(1)])
    assert all(spread(figure) > 5 for figure in lonely.values())


def curves(axes):
    return [line for line in axes.get_lines() if len(line.get_xdata()) == 8]


def test_curves_are_those_of_the_data():
    figure = all_pictures(EVEN)["oracle"]
    axes = figure.axes[0]
    drawn = curves(axes)
    assert len(drawn) == 3
    np.testing.assert_allclose(drawn[-1].get_ydata(), probe(100)["train"]["oracle"])
    np.testing.assert_allclose(drawn[0].get_xdata(), (np.arange(8) + 0.5) / 8)
    assert len({matplotlib.colors.to_hex(line.get_color()) for line in drawn}) == 3


def test_at_most_ten_curves_with_the_first_and_the_last():
    probes = [probe(step) for step in range(1, 300, 7)]
    figure = pictures.dynamics_figure(EVEN, probes, "oracle", BOUNDARY)
    shown = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_xdata()) == 8]
    assert len(shown) == 10
    for curve, entry in ((shown[0], probes[0]), (shown[-1], probes[-1])):
        np.testing.assert_array_equal(curve, entry["train"]["oracle"])


def test_the_gap_is_a_share_around_zero():
    mesh = all_pictures(EVEN)["gap"].axes[0].collections[0]
    np.testing.assert_allclose(np.asarray(mesh.get_array()), 0.1, rtol=1e-9)
    assert mesh.norm.vcenter == 0
    assert mesh.norm.vmin == -mesh.norm.vmax


def meshes(figure):
    """The coloured cells and the grey ones, NaN where there is none."""
    return [
        np.ma.filled(np.ma.asarray(mesh.get_array(), dtype=float), np.nan)
        for mesh in figure.axes[0].collections[:2]
    ]


def test_a_gap_within_two_standard_errors_is_grey_and_does_not_stretch_the_colours():
    probes = [probe(step) for step in (1, 10, 100)]
    share = probes[1]["train"]["conditional"][2]
    probes[1]["gap"][2], probes[1]["gap_se"] = 0.9 * share, [0.01] * 2 + [0.46 * share] + [0.01] * 5
    probes[2]["gap"][5], probes[2]["gap_se"][5] = None, None
    probes[0]["gap_se"] = [0.01] * 7 + [None]  # of a single sample
    figure = pictures.gap_heatmap(EVEN, probes, BOUNDARY)
    colours, grey = meshes(figure)
    assert np.argwhere(np.isfinite(grey)).tolist() == [[2, 1], [7, 0]]
    assert np.argwhere(np.isnan(colours)).tolist() == [[2, 1], [5, 2], [7, 0]]
    np.testing.assert_allclose(colours[np.isfinite(colours)], 0.1)
    assert figure.axes[0].collections[0].norm.vmax == pytest.approx(0.1)
    (legend,) = figure.legends
    assert "less than 2 standard errors" in legend.get_texts()[0].get_text()
    # The same gap, measured better, has its colour.
    probes[1]["gap_se"][2] = 0.44 * share
    colours, grey = meshes(pictures.gap_heatmap(EVEN, probes, BOUNDARY))
    assert colours[2, 1] == pytest.approx(0.9)
    assert np.isnan(grey[2, 1])


def test_a_column_of_a_heat_map_is_around_its_probe_and_ends_with_the_training():
    assert figures.step_columns([0, 30, 60]).tolist() == [0, 15, 45, 60]
    assert figures.step_columns([7]).tolist() == [6.5, 7.5]
    figure = figures.heatmap_figure([0, 30, 60], np.array(EVEN), np.ones((3, 8)), [0.4, 0.5, 0.4])
    axes = figure.axes[0]
    assert axes.get_xlim() == (0, 60)
    assert axes.get_lines()[0].get_xdata().tolist() == [0, 30, 60]
    assert all_pictures(EVEN)["heatmap"].axes[0].get_xlim() == (1, 100)


def test_a_picture_of_noise_alone_is_grey():
    probes = [probe(step) | {"gap_se": [1.0] * 8} for step in (1, 10)]
    figure = pictures.gap_heatmap(EVEN, probes, BOUNDARY)
    colours, grey = meshes(figure)
    assert np.isnan(colours).all()
    assert np.isfinite(grey).all()
    pixels = render(figure)
    height, width, _ = pixels.shape
    assert pixels[height // 2, width // 3].tolist() == [191, 191, 191]
    assert not any(pictures.gap_is_clear(probes[0]))


# -- what all have in common ---------------------------------------------------------------------


def boundary(midpoint=0.4, collapsed=0.8):
    ends = (midpoint, midpoint - 0.02, midpoint + 0.02, collapsed, collapsed - 0.02, 1.0)
    return StageBoundary(*ends, 0.95)


def curve():
    t = torch.linspace(0.02, 0.98, 12, dtype=torch.float64)[:, None].expand(12, 8)
    return StageCurve(t, torch.rand(len(STATISTICS), 12, 8, dtype=torch.float64))


def profile():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    return Profile.measure(LatentBank(x), queries=4, strata=6)


def of_evaluation():
    losses = torch.linspace(0.01, 0.99, 64), torch.rand(64)
    found = curve()
    floor = found.times, found.statistic("target_difference")
    figure = evaluate._loss_figure({"training samples": losses}, floor, 20_000, bins=8)
    drawing.draw_boundary(figure.axes[0], boundary(), 0.35)
    drawing.legend(figure)
    return figure


@pytest.fixture(scope="module")
def every_figure():
    """Every picture with an axis of t, drawn, with its pixels; by what it shows."""
    probes = [probe(step) for step in (1, 10, 100)]
    about = (curve(), boundary(), 0.35, "N = 10 rows")
    found = pictures.of_run(EARLY, probes, WINDOW, curve(), BOUNDARY, "N = 10 rows")
    measured = profile()
    found |= {
        "concentration": figures.concentration_figure(*about),
        "target_difference": figures.target_difference_figure(*about),
        "heatmap": figures.heatmap_figure([1, 2], np.array(EARLY), np.ones((2, 8)), [0.4, 0.4]),
        "sizes": pictures.sizes_figure(EARLY, {"S": probes[0]}, BOUNDARY),
        "profile": profile_figures.profile_figure(measured, "a"),
        "comparison": profile_figures.comparison_figure({"a": measured, "b": measured}),
        "evaluation": of_evaluation(),
    }
    return {name: (figure, drawing.render(figure)) for name, figure in found.items()}


@pytest.mark.slow
def test_every_axis_of_t_has_one_scale_and_says_which_end_is_noise(every_figure):
    for name, (figure, _) in every_figure.items():
        scales = [
            (axis, scale)
            for axes in figure.axes
            for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale()))
            if axis.get_label_text().startswith("t ")
        ]
        assert scales, name
        for axis, scale in scales:
            assert scale == "logit", name
            assert "0 = noise" in axis.get_label_text(), name


@pytest.mark.slow
def test_every_logarithmic_axis_has_three_labels_or_more(every_figure):
    seen = 0
    for name, (figure, _) in every_figure.items():
        for axes in figure.axes:
            for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                if axis.get_scale() == "log":
                    at = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
                    shown = {text.get_text() for tick, text in at if low <= tick <= high}
                    assert len(shown - {""}) >= 3, f"{name}: {shown}"
                    seen += 1
    assert seen > 5


@pytest.mark.slow
def test_no_legend_covers_anything(every_figure):
    for name, (figure, _) in every_figure.items():
        assert not any(axes.get_legend() for axes in figure.axes), name
        for legend in figure.legends:
            box = legend.get_window_extent()
            for axes in figure.axes:
                assert not box.overlaps(axes.get_window_extent()), name


@pytest.mark.slow
def test_nothing_reaches_over_the_edge_of_a_picture(every_figure):
    for name, (_, pixels) in every_figure.items():
        frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (frame == 255).all(), name
