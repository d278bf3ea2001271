"""The examples with masks: a watched run is the unwatched one, and targets are those of float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from stagewise import Mix, Scheme
from stagewise.callbacks import PosteriorMonitor, StageScheme

EXAMPLES = Path(__file__).parent.parent / "examples"


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


def test_sounds_of_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = _example("audio_lengths")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain = example.main(**quiet).state_dict()
    watched = example.main(*example.WATCHING, **quiet).state_dict()
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    calls, sounds = _targets(monkeypatch), example.sounds(240)
    example.main(example.RUN, StageScheme(target=Mix()), **quiet)
    assert len(calls) == 60
    for y, given, target in calls[::20]:
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
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain = example.main(**quiet).state_dict()
    watched = example.main(example.RUN, PosteriorMonitor(), **quiet).state_dict()
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    seen, chunks, masks = (value.double() for value in example.episodes(24))
    calls = _targets(monkeypatch)
    example.main(example.RUN, StageScheme(target=Mix()), **quiet)
    assert len(calls) == 60
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
