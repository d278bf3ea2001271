"""All monitors in one run: what they ask of it, what they write, what they refuse."""

import json
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from stagewise.callbacks import (
    MemorizationGuard,
    MemorizationMonitor,
    PosteriorMonitor,
    StageTransitions,
    VelocityErrorMonitor,
    writer,
)
from stagewise.callbacks.stage_transitions import NAVIGATION_LEARNED
from stagewise.velocity_probe import STAGES

FEW = {"every_n_steps": 4, "strata": 4, "queries": 6}
KINDS = (PosteriorMonitor, VelocityErrorMonitor, MemorizationMonitor, StageTransitions)


def monitors(**options):
    """One of each."""
    return [
        PosteriorMonitor(**FEW, **options),
        VelocityErrorMonitor(**FEW, **options),
        MemorizationMonitor(every_n_steps=4, samples=4, steps=5, **options),
        StageTransitions(**options),
    ]


@pytest.fixture
def fit(make_trainer, make_loader, make_data, tiny_flow):
    """`fit(*callbacks, ...)`: a run of ten steps with held-out data; gives its model."""

    def fit(*callbacks, **options):
        model = tiny_flow()
        model.validation_step = lambda batch, batch_idx: None
        pl.seed_everything(1, verbose=False)
        trainer = make_trainer(*callbacks, **{"max_steps": 10} | options)
        train, others = make_loader(make_data(80)[0], shuffle=True), make_loader(make_data(16)[0])
        trainer.fit(model, train, others)
        return model

    return fit


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_bit_identical_with_all_of_them(fit, weights, tmp_path, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    plain = weights(fit(**options))
    watched = weights(fit(*monitors(), logger=CSVLogger(tmp_path), **options))
    assert torch.equal(plain, watched)


@pytest.mark.usefixtures("quick_figures")
def test_no_forward_pass_is_added_between_the_probes(fit, tiny_flow):
    calls, by_batch = [], []

    class Count(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.hook = pl_module.net.register_forward_hook(lambda *_: calls.append(1))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            by_batch.append(len(calls))
            calls.clear()

    fit(*monitors(), Count())
    assert len(by_batch) == 10
    assert [n for place, n in enumerate(by_batch) if place not in (0, 3, 7, 9)] == [1] * 6
    assert min(by_batch[place] for place in (0, 3, 7, 9)) > 1, "probes ask"


@pytest.mark.usefixtures("quick_figures")
def test_tensorboard_has_one_page_and_what_happens_once(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="run")
    posterior, errors, copies, events = monitors()
    guard = MemorizationGuard(every_n_steps=4, samples=4, queries=4)
    # A plateau as soon as there are probes enough for one.
    errors.every_n_steps, events.patience, events.tolerance = 1, 1, 0.99
    fit(posterior, errors, copies, events, guard, logger=logger)
    assert [event["kind"] for event in events.events] == [NAVIGATION_LEARNED]

    board = EventAccumulator(logger.log_dir, {"scalars": 0, "tensors": 0}).Reload()
    (step,) = [event["step"] for event in events.events]
    (marked,) = board.Scalars("stagewise_transitions/navigation_learned")
    assert (marked.step, marked.value) == (step - 1, 1.0)
    (text,) = board.Tensors("stagewise_transitions/navigation learned/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert said.startswith(f"step {step}: the oracle error in navigation is flat")
    file = tmp_path / "tb/run/stagewise_transitions/stages.jsonl"
    _, line = file.read_text().splitlines()  # after the header
    assert json.loads(line)["kind"] == NAVIGATION_LEARNED

    page = layout_pb2.Layout.FromString(
        board.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    )
    assert [category.title for category in page.category] == [
        *("stagewise", "stagewise_error", "stagewise_guard", "stagewise_memorization"),
        *("stagewise_transitions", "epoch"),
    ]
    scalars = board.Tags()["scalars"]
    *watched, last = [chart for category in page.category for chart in category.chart]
    for chart in watched:
        shown = {tag for tag in scalars for it in chart.multiline.tag if re.search(it, tag)}
        shown |= {end for one in chart.margin.series for end in (one.value, one.lower, one.upper)}
        assert shown <= set(scalars), chart.title
        assert 1 <= len(shown) <= 4, f"{chart.title} shows {sorted(shown)}"
        if chart.title.endswith("by stage") and "/ floor" not in chart.title:  # it may have none
            assert sorted(tag.rsplit("/")[-1] for tag in shown) == sorted(STAGES), chart.title
    assert last.multiline.tag == ["^epoch$"]
    # All in one step's order, so that no logger that wants ascending steps drops any.
    for tag in ("stagewise_error/pythagoras", "stagewise_memorization/copies/t_switch=0"):
        assert board.Scalars(tag)[0].step == 0, "after the first step"


@pytest.mark.slow
def test_pictures_go_to_tensorboard_and_disk(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="run")
    fit(*monitors(), logger=logger, max_steps=1)
    names = {
        "stagewise": ("concentration", "target_difference", "heatmap"),
        "stagewise_error": (
            *("loss_by_t", "oracle_error", "conditional_error", "oracle_error_heatmap"),
            *("gap_heatmap", "spending", "stages_and_error"),
        ),
        "stagewise_memorization": ("copies",),  # rows of six numbers are no images
    }
    expected = {f"{folder}/{name}" for folder, several in names.items() for name in several}
    board = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    assert set(board.Tags()["images"]) == expected
    for tag in expected:
        file = np.asarray(Image.open(tmp_path / "tb/run" / f"{tag}.png"))
        shown = board.Images(tag)[-1]
        assert file.shape == (shown.height, shown.width, 3)
        assert file.std() > 5, "not an empty picture"


class Answers(nn.Module):
    """Returns its answer as something else than a tensor of the shape of `x_t`."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(6, 6), wrap

    def forward(self, xt, t):
        return self.wrap(self.inner(xt))


@pytest.mark.parametrize("kind", [VelocityErrorMonitor, MemorizationMonitor])
@pytest.mark.parametrize(
    ("wrap", "unwrap", "named"),
    [
        (lambda v: {"v": v[:, None]}, lambda answer: answer["v"][:, 0], "dict"),
        (lambda v: torch.cat([v, v], 1), lambda answer: answer[:, :6], r"\(8, 12\)"),
    ],
    ids=["a dict", "two channels for one"],
)
def test_a_network_that_returns_no_velocity_is_refused_before_the_first_step(
    make_trainer, make_loader, make_data, tiny_flow, weights, kind, wrap, unwrap, named
):
    model = tiny_flow()
    model.net = Answers(wrap)
    model.training_step = lambda batch, batch_idx: model.loss(
        lambda xt, t: unwrap(model.net(xt, t)), batch[0]
    )
    before = weights(model)
    with pytest.raises(ValueError, match=rf"of shape \(8, 6\), got {named}.*velocity=lambda"):
        make_trainer(kind()).fit(model, make_loader(make_data()[0]))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_folder_that_cannot_be_written(fit, tiny_flow, weights, tmp_path, kind):
    blocked = tmp_path / "file"
    blocked.write_text("")
    callbacks = monitors()
    for place, callback in enumerate(callbacks):
        if type(callback) is kind:
            callbacks = [*callbacks[:place], callback]
            callback.dirpath = blocked / "folder"
    seen = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, *_):
            seen.append("an optimizer step")

    with pytest.raises(OSError, match=r"Cannot write .*stages\.jsonl: .*dirpath=\.\.\."):
        fit(*callbacks, Look())
    assert seen == []


@pytest.mark.slow
def test_every_picture_of_a_run_marks_the_same_boundary(fit, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(
        writer.Writer, "pictures", lambda self, figures, step: drawn.update(figures)
    )
    posterior = PosteriorMonitor(**FEW, figures=1)
    errors = VelocityErrorMonitor(**FEW, figures=1)
    fit(posterior, errors, logger=CSVLogger(tmp_path))
    first, last = posterior.history[0]["midpoint"], posterior.history[-1]["midpoint"]
    assert f"{first:.3f}" != f"{last:.3f}", "probes have draws of their own"
    for name in ("concentration", "target_difference", "loss_by_t", "stages_and_error"):
        (legend,) = drawn[name].legends
        (said,) = [text for one in legend.texts if (text := one.get_text()).startswith("midpoint")]
        assert said.startswith(f"midpoint  t = {first:.3f}"), name
