"""The examples with masks: a watched run is the unwatched one, and targets are those of float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stagewise import Mix, Scheme
from stagewise.callbacks import (
    Forecast,
    MemorizationGuard,
    MemorizationMonitor,
    PosteriorMonitor,
    StageRun,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.losses import FlowMatchingLoss

pytestmark = pytest.mark.usefixtures("quick_figures")

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT: dict[str, Any] = {  # sixteen steps in place of sixty
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _targets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, dict[str, Any], Tensor]]:
    """Calls of a scheme from here on: the conditional target, the arguments and the target."""
    calls: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    plain: Callable[..., Any] = Scheme.__call__

    def call(self: Scheme, y: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        target, weight = plain(self, y, **given)
        calls.append((y, given, target))
        return target, weight

    monkeypatch.setattr(Scheme, "__call__", call)
    return calls


def _exact(x1: Tensor, xt: Tensor, t: float, rows: list[Tensor]) -> Tensor:
    """The oracle's velocity for one sample, over rows of its length, in float64."""
    x, xt = x1.double(), xt.double()
    others = torch.stack([row.double() for row in rows])
    logits = -(xt - t * others).square().flatten(1).sum(1) / (2 * (1 - t) ** 2)
    mean = (logits.softmax(0)[:, None, None] * others).sum(0)
    assert bool((others == x).flatten(1).all(1).any())
    return (mean - xt) / (1 - t)


@pytest.mark.slow
def test_sounds_of_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = _example("audio_lengths")
    plain = example.main(**SHORT).state_dict()
    watched = example.main(*example.WATCHING, **SHORT).state_dict()
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    calls, sounds = _targets(monkeypatch), example.sounds(240)
    example.main(example.RUN, StageScheme(target=Mix()), **SHORT)
    assert len(calls) == 16
    for y, given, target in calls[::6]:
        for i, t in enumerate(given["t"].tolist()):
            x1, xt = given["x1"][i], given["xt"][i]
            length = max(n for n in (16, 24, 32) if n <= len(x1) and x1[n - 1].any())
            own = [sound for sound in sounds if len(sound) == length]
            best = _exact(x1[:length], xt[:length], t, own)
            torch.testing.assert_close(target[i, :length].double(), best, rtol=1e-5, atol=1e-5)
            assert torch.equal(target[i, length:], y[i, length:])


def test_the_action_head_of_a_robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = _example("action_head")
    plain = example.main(**SHORT).state_dict()
    monitor = PosteriorMonitor(strata=4, queries=8)
    watched = example.main(example.RUN, monitor, **SHORT).state_dict()
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    seen, chunks, masks = (value.double() for value in example.episodes(24))
    calls = _targets(monkeypatch)
    example.main(example.RUN, StageScheme(target=Mix()), **SHORT)
    assert len(calls) == 16
    y, given, target = calls[-1]
    for i, t in enumerate(given["t"].double()):
        row = (chunks == given["x1"][i].double()).flatten(1).all(1).nonzero()[0, 0]
        alike, valid = (masks == masks[row]).all(1), masks[row].bool()
        x, xt = chunks[alike][:, valid], given["xt"][i].double()[valid]
        logits = -(xt - t * x).square().flatten(1).sum(1) / (2 * (1 - t) ** 2)
        logits -= (seen[alike] - seen[row]).square().sum(1) / (2 * 0.3**2)
        best = ((logits.softmax(0)[:, None, None] * x).sum(0) - xt) / (1 - t)
        torch.testing.assert_close(target[i][valid].double(), best, rtol=1e-5, atol=1e-5)
        assert torch.equal(target[i][~valid], y[i][~valid])


@pytest.mark.parametrize(
    "kind", [VelocityErrorMonitor, MemorizationMonitor, MemorizationGuard, Forecast]
)
def test_monitors_of_the_model_refuse_the_action_head_before_training(
    kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = _example("action_head")
    monkeypatch.setattr(example.ActionHead, "training_step", lambda *_: pytest.fail("trained"))
    said = rf"^{kind.__name__} asks the model .* without their conditions.*PosteriorMonitor\("
    with pytest.raises(ValueError, match=said):
        example.main(example.RUN, kind(), logger=False, enable_checkpointing=False)


class _Chunks(pl.LightningModule):
    """Flow matching on padded chunks: the network is given labels, padding and lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss_fn = _Net(), FlowMatchingLoss()

    def training_step(self, batch: Any, _: int) -> Tensor:
        x1, y, mask = batch
        return self.loss_fn(self.net, x1, y, ~mask, mask.sum(1), loss_mask=mask)

    def validation_step(self, batch: Any, _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.emb = torch.nn.Linear(3, 2), torch.nn.Embedding(2, 2)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor, padding: Tensor, lengths: Tensor) -> Tensor:
        times = t[:, None, None].expand(-1, xt.shape[1], 1)
        assert torch.equal((~padding).sum(1), lengths)
        h = self.linear(torch.cat([xt, times], 2)) + self.emb(y)[:, None]
        return h.masked_fill(padding[..., None], 0.0) / lengths[:, None, None].sqrt()


def test_all_monitors_of_one_run_know_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(96, 6, 2, generator=torch.Generator().manual_seed(3))
    y, lengths = torch.arange(96) % 2, torch.tensor([3, 4, 6])[torch.arange(96) % 3]
    mask = torch.arange(6) < lengths[:, None]
    mask[90:] = torch.arange(6) < 5  # of held-out rows only
    train, held_out = (TensorDataset(x[at], y[at], mask[at]) for at in (slice(72), slice(72, 96)))

    def run(fill: float, velocity: Any = None) -> tuple[list[Any], dict[str, Tensor]]:
        """All monitors of a run whose padding holds a number, and the weights."""
        torch.manual_seed(0)
        find = lambda batch: (  # noqa: E731
            batch[0].masked_fill(~batch[2][..., None], fill),
            batch[1],
            batch[2],
        )
        monitors = [
            PosteriorMonitor(figures=0, strata=4, queries=8),
            VelocityErrorMonitor(figures=0, strata=4, queries=16),
            MemorizationMonitor(figures=0, samples=8, steps=4, t_switch=(0.0, 0.5)),
            MemorizationGuard(figures=0, samples=8, queries=8),
            Forecast(figures=0, every_n_steps=4),
            StageTransitions(),
        ]
        trainer = pl.Trainer(
            max_steps=6, callbacks=[StageRun(read_batch=find, velocity=velocity), *monitors],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            default_root_dir=tmp_path / str(fill),
        )  # fmt: skip
        module = _Chunks()
        trainer.fit(module, DataLoader(train, 24, shuffle=True), DataLoader(held_out, 24))
        return monitors, module.state_dict()

    monitors, weights = run(0.0)
    others, same = run(1e30, lambda module, xt, t, y, m: module.net(xt, t, y, ~m, m.sum(1)))
    for name, value in weights.items():
        assert torch.equal(value, same[name])
    timed = ("seconds", "probe_seconds", "share_of_step_time")
    for one, two in zip(monitors[:5], others, strict=False):
        assert one.history
        for a, b in zip(one.history, two.history, strict=True):
            kept = ({k: v for k, v in entry.items() if k not in timed} for entry in (a, b))
            left, right = map(repr, kept)
            assert left == right, type(one).__name__
    assert monitors[1].history[-1]["alarm"] is None
