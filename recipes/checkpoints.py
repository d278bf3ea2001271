"""From the folder of a run to its network with trained weights.

A run holds `config.yaml`, the resolved configuration, and `checkpoints/*.ckpt`. Where a callback
averages weights (Lightning's `WeightAveraging`) a checkpoint's `state_dict` is the average, and
`current_model_state` the weights that are trained; without one `state_dict` is the latter.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from stagewise.files import first_line, joined
from stagewise.recipes.latents import current
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.trusted import require_known

__all__ = [
    "Loaded",
    "Weights",
    "find_checkpoint",
    "load_module",
    "load_weights",
    "newest_whole",
    "read_config",
    "require_same_model",
    "require_whole",
    "run_config",
]

Weights = Literal["averaged", "current"]

_NEEDED = ("data", "net", "objective", "module")
_OTHER = "Copy it again, or take another checkpoint of the run."


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        path: The checkpoint.
        step: Optimizer steps it had been trained for.
        weights: Which of its weights.
        fingerprint: Tells these weights from others.
        note: A remark on them; empty if there is none.
    """

    path: Path
    step: int
    weights: Weights
    fingerprint: str
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.path.name}, step {self.step}, {self.weights} weights{note}"


def run_config(run: Path, trust: Sequence[str] = ()) -> DictConfig:
    """The configuration of a run, from its `config.yaml`.

    Args:
        run: The folder of a run.
        trust: What it may call beside what recipes are made of; see `require_known`.

    Raises:
        ValueError: If there is no such folder or file, a part of the model is missing in it, or it
            calls anything else.
    """
    if not run.is_dir():
        raise ValueError(f"There is no folder {run}. Give the folder of a run.")
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(
            f"Expected config.yaml in {run}, found none: it is no run of `stagewise train`. Give "
            "the folder that holds config.yaml and checkpoints."
        )
    config = read_config(file)
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise ValueError(f"Expected the keys {_NEEDED} in {file}, missing: {', '.join(missing)}.")
    require_known({key: config[key] for key in _NEEDED}, trust, file)
    return config


def read_config(file: Path) -> DictConfig:
    """A `config.yaml` as it would be written today; ValueError if it cannot be read."""
    try:
        config = OmegaConf.load(file)
    except Exception as error:  # of yaml, of OmegaConf, or of the encoding
        raise ValueError(f"{file} cannot be read as a configuration: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{file} cannot be read as a configuration: it has no keys.")
    return current(config)


def find_checkpoint(run: Path, given: Path | None = None) -> Path:
    """The checkpoint of a run to load.

    Args:
        run: The folder of a run.
        given: A file, by its path or by its name in the run's `checkpoints`; default the one of the
            last step. One that cannot be read counts as that, so that nobody takes an older one
            without knowing.

    Raises:
        ValueError: If there is none, or it is a folder, as sharded training writes.
    """
    folder = run / "checkpoints"
    found = _newest_first(folder)
    if given is not None:
        path = next((place for place in (given, folder / given) if place.exists()), None)
        if path is None:
            there = joined([file.name for file in found]) or "none"
            raise ValueError(f"There is no checkpoint {given}. In {folder}: {there}.")
    elif found:
        path = found[0]
    else:
        raise ValueError(
            f"Expected a checkpoint (*.ckpt) in {folder}, found none. Name one: --checkpoint."
        )
    _refuse_folder(path)
    return path


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The whole checkpoint of the last step, and what is wrong with those that come before it.

    A training writes two for a step, and may be killed between them, so that no name tells which
    is the last.

    Args:
        folder: Of checkpoints.

    Returns:
        None if there is no checkpoint, or none is whole.

    Raises:
        ValueError: If the first is a folder, as sharded training writes.
    """
    faults = []
    for path in _newest_first(folder):
        _refuse_folder(path)
        try:
            require_whole(path)
            _read(path)
        except ValueError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, by step; before them those that cannot be read."""

    def age(path: Path) -> tuple[float, float]:
        try:
            step = float(_read(path).get("global_step", 0))
        except ValueError:
            step = math.inf
        return step, path.stat().st_mtime

    return sorted(folder.glob("*.ckpt"), key=age, reverse=True)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise ValueError(
            f"Expected a file, got the folder {path}, as sharded training writes it. Make one file "
            "of it: python -m lightning.pytorch.utilities.consolidate_checkpoint."
        )


def require_whole(path: Path) -> None:
    """Reads a checkpoint to its end, and compares each part with the checksum that torch wrote.

    Loading reads no checksum. Files in the format before torch 1.6 have none.

    Raises:
        ValueError: If a byte has changed, or is missing.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as file:
            changed = file.testzip()
    except Exception as error:  # of the zip: it raises many kinds where its headers are damaged
        raise ValueError(f"{path} is damaged: {first_line(error)}. {_OTHER}") from error
    if changed is not None:
        raise ValueError(f"{path} is damaged: {changed} in it has changed. {_OTHER}")


def load_weights(path: Path, module: nn.Module, weights: Weights | None = None) -> Loaded:
    """Loads the weights of a checkpoint; the keys and shapes have to be those of the module.

    Args:
        path: The checkpoint.
        module: Gets the weights. Left as it is if they do not fit.
        weights: Which, default the averaged ones if there are any.

    Raises:
        ValueError: If the file is no whole checkpoint, is of another model, or has no such weights.
    """
    if weights not in (None, "averaged", "current"):
        raise ValueError(f'Expected `weights` "averaged" or "current", got {weights!r}.')
    require_whole(path)
    checkpoint = _read(path)
    state, note = checkpoint["state_dict"], ""
    both = "current_model_state" in checkpoint
    # Before the first update the average is still the untrained network.
    averaged = both and int(checkpoint.get("averaging_state", {}).get("n_averaged", 1)) > 0
    if weights == "averaged" and not averaged:
        why = "its average had not begun" if both else "no callback averaged weights in that run"
        raise ValueError(f"There are no averaged weights in {path}: {why}. Take --weights current.")
    chosen: Weights = weights or ("averaged" if averaged else "current")
    if chosen == "current" and both:
        state, average = checkpoint["current_model_state"], state
        if not averaged:
            note = "the average had not begun"
        elif all(key in average and torch.equal(state[key], average[key]) for key in state):
            note = "they equal the averaged ones: at the end of training Lightning writes both so"
    _refuse_others(path, state, module.state_dict())
    module.load_state_dict(state, strict=True)
    seen = hashlib.sha256()
    # The first numbers of each tensor: training changes them all, and all would take long.
    for key, value in module.state_dict().items():
        seen.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        seen.update(value.flatten()[:256].double().numpy().tobytes())
    step = int(checkpoint.get("global_step", 0))
    return Loaded(path, step, chosen, seen.hexdigest()[:16], note)


def load_module(
    config: DictConfig, path: Path, weights: Weights | None = None
) -> tuple[FlowMatchingModule, Loaded]:
    """Builds the module of a run, on the CPU and in evaluation mode, and loads a checkpoint.

    Args:
        config: `run_config(run)`.
        path: `find_checkpoint(run)`.
        weights: As in `load_weights`.
    """
    objective = instantiate(config.objective)
    module = instantiate(config.module, net=instantiate(config.net), objective=objective)
    return module.eval(), load_weights(path, module, weights)


def require_same_model(path: Path, module: nn.Module) -> int:
    """The step of a checkpoint; ValueError if its entries are not those of the module."""
    checkpoint = _read(path)
    _refuse_others(path, checkpoint["state_dict"], module.state_dict())
    return int(checkpoint.get("global_step", 0))


def _read(path: Path) -> dict[str, Any]:
    try:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written in the format before torch 1.6, which cannot be mapped
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the zip, of the unpickler, or of the file
        raise ValueError(
            f"{path} is no whole checkpoint that holds tensors and plain values alone: "
            f"{first_line(error)}. {_OTHER}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"Expected a checkpoint of Lightning, with `state_dict`, got {path}.")
    return checkpoint


def _refuse_others(path: Path, state: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    wrong = {
        "only in the network": [key for key in own if key not in state],
        "only in the file": [key for key in state if key not in own],
        "other shapes": [
            f"{key} {tuple(state[key].shape)} in the file, {tuple(value.shape)} here"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {joined(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(
            f"{path} is a checkpoint of another model than the configuration says. {listed}."
        )
