"""From the folder of a run to its network with trained weights.

A run holds `config.yaml`, the resolved configuration, and `checkpoints/*.ckpt`. If a callback
averages weights (Lightning's `WeightAveraging`), the `state_dict` of a checkpoint is the average,
and `current_model_state` the trained weights. Otherwise `state_dict` is the trained weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from stagewise.files import joined
from stagewise.latents.arrays import check_zip
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.trusted import require_known
from stagewise.recipes.weight_files import read_weights, require_entries

__all__ = [
    "Loaded",
    "Weights",
    "current",
    "find_checkpoint",
    "load_module",
    "load_weights",
    "newest_whole",
    "read_config",
    "require_same_model",
    "run_config",
]

Weights = Literal["averaged", "current"]

_NEEDED = ("data", "net", "objective", "module")


@dataclass(frozen=True)
class Loaded:
    """What was loaded: a checkpoint after a number of optimizer steps."""

    path: Path
    step: int
    weights: Weights
    fingerprint: str  # differs between weights
    note: str = ""  # a remark on them

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.path.name}, step {self.step}, {self.weights} weights{note}"


def run_config(run: Path, trust: Sequence[str] = ()) -> DictConfig:
    """The configuration of the run in a folder, which may also call what is in `trust`.

    Raises:
        ValueError: If there is no such folder or file, a part of the model is missing in it, or it
            calls what `require_known` refuses.
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
    """A `config.yaml` in today's form; ValueError if it cannot be read."""
    try:
        config = OmegaConf.load(file)
    except Exception as error:  # from yaml, OmegaConf, or the decoder
        raise ValueError(f"{file} cannot be read as a configuration: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{file} cannot be read as a configuration: it has no keys.")
    return current(config)


def current(config: DictConfig) -> DictConfig:
    """The same configuration in today's form; in version 0.1 `data` held what opens the latents."""
    data = config.get("data")
    old = isinstance(data, DictConfig) and "path" in data
    if old and str(data.get("_target_")).endswith("LatentsData"):
        given = ("path", "format", "flips", "moments", "normalize", "multiplier", "expected_std")
        opens = {name: data.pop(name) for name in given if name in data}
        target = {"_target_": "stagewise.latents.open_latents", "_partial_": True}
        data.latents = {**target, **opens, "seed": data.get("seed", 0)}
    objective = config.get("objective")
    if isinstance(objective, DictConfig) and "cosine" not in objective:
        objective.cosine = False
    return config


def find_checkpoint(run: Path, given: Path | None = None) -> Path:
    """The checkpoint of the last step of a run, or `given`, a path or a name in `checkpoints`.

    An unreadable one counts as the last, so that nobody uses an older one by mistake.

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
    """The newest whole checkpoint of a folder, or None, and the faults of those that are newer.

    A training writes two for a step, and may be killed between them, so names do not tell which
    is the last.

    Raises:
        ValueError: If the first is a folder, as sharded training writes.
    """
    faults = []
    for path in _newest_first(folder):
        _refuse_folder(path)
        try:
            check_zip(path)
            _read(path)
        except ValueError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder from the last step to the first; unreadable ones come first."""

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


def load_weights(path: Path, module: nn.Module, weights: Weights | None = None) -> Loaded:
    """Loads the weights of a checkpoint, by default the averaged ones if there are any.

    Raises:
        ValueError: If the file is no whole checkpoint, is of another model, or has no such weights;
            `module` is then unchanged.
    """
    if weights not in (None, "averaged", "current"):
        raise ValueError(f'Expected `weights` "averaged" or "current", got {weights!r}.')
    check_zip(path)  # loading does not read checksums
    checkpoint = _read(path)
    state, note = checkpoint["state_dict"], ""
    both = "current_model_state" in checkpoint
    # Before the first update the average is still the untrained network.
    averaged = both and int(checkpoint.get("averaging_state", {}).get("n_averaged", 1)) > 0
    if weights == "averaged" and not averaged:
        why = "its average had not begun" if both else "no callback averaged weights in that run"
        raise ValueError(f"There are no averaged weights in {path}: {why}. Use --weights current.")
    chosen: Weights = weights or ("averaged" if averaged else "current")
    if chosen == "current" and both:
        state, average = checkpoint["current_model_state"], state
        if not averaged:
            note = "the average had not begun"
        elif all(key in average and torch.equal(state[key], average[key]) for key in state):
            note = "they equal the averaged ones, since Lightning wrote this at the end of training"
    require_entries(path, state, module.state_dict())
    module.load_state_dict(state)
    digest = hashlib.sha256()
    # The first numbers of each tensor suffice: training changes all of them.
    for key, value in module.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten()[:256].double().numpy().tobytes())
    step = int(checkpoint.get("global_step", 0))
    return Loaded(path, step, chosen, digest.hexdigest()[:16], note)


def load_module(
    config: DictConfig, path: Path, weights: Weights | None = None
) -> tuple[FlowMatchingModule, Loaded]:
    """Builds the module of a run, on the CPU and in evaluation mode, and loads a checkpoint."""
    objective = instantiate(config.objective)
    module = instantiate(config.module, net=instantiate(config.net), objective=objective)
    return module.eval(), load_weights(path, module, weights)


def require_same_model(path: Path, module: nn.Module) -> int:
    """The step of a checkpoint; ValueError if its entries are not those of the module."""
    checkpoint = _read(path)
    require_entries(path, checkpoint["state_dict"], module.state_dict())
    return int(checkpoint.get("global_step", 0))


def _read(path: Path) -> dict[str, Any]:
    checkpoint = read_weights(path, "use another checkpoint of the run")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"Expected a checkpoint of Lightning, with `state_dict`, got {path}.")
    return checkpoint
