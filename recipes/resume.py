"""Where a training begins: anew, behind a checkpoint of its own, or with weights of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from stagewise.latents.files import names
from stagewise.recipes.checkpoints import load_weights
from stagewise.recipes.public_weights import load_public_weights

__all__ = ["begin_with", "checkpoint_of", "require_fit"]

_SAME = ("seed", "data", "net", "objective", "module")
_FREE = ("data.path", "data.held_out_path", "data.num_workers", "data.verify", "data.bank_dir")


def checkpoint_of(config: DictConfig, run_dir: Path) -> Path | None:
    """The checkpoint that training goes on from, and that nothing is written over.

    Args:
        config: The configuration, with `resume` and `ckpt_path`.
        run_dir: The folder of the run.

    Returns:
        The file, None to begin at the beginning.

    Raises:
        FileExistsError: If the folder holds a run, and `resume` is false.
        FileNotFoundError: If there is no `ckpt_path`.
        ValueError: If the run there is of another model, data or seed.
    """
    last, file = run_dir / "checkpoints/last.ckpt", run_dir / "config.yaml"
    if config.resume and config.ckpt_path is not None:
        raise ValueError("Expected `resume` or `ckpt_path`, got both; resume=true finds its own.")
    if not config.resume:
        # The other processes of this run may come when the first has written.
        if file.exists() and rank_zero_only.rank == 0:
            raise FileExistsError(
                f"{run_dir} holds a run. Go on with it, resume=true, or choose another folder, "
                "run_dir=..."
            )
        if config.ckpt_path is not None and not Path(config.ckpt_path).exists():
            raise FileNotFoundError(f"There is no checkpoint {config.ckpt_path} (ckpt_path).")
        return None if config.ckpt_path is None else Path(config.ckpt_path)
    if file.exists():
        before, now = _flat(OmegaConf.load(file)), _flat(config)
        changed = [
            f"{key}={now.get(key)} (was {before.get(key)})"
            for key in {**before, **now}
            if key.split(".")[0] in _SAME and key not in _FREE and before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"The run in {run_dir} was begun with another configuration: {names(changed, 10)}. "
                "Go on as it was begun, or choose another folder, run_dir=..."
            )
    if not last.exists():
        rank_zero_info(f"resume=true: no checkpoint in {last.parent}, so from the beginning")
        return None
    rank_zero_info(f"resume=true: from {last}")
    return last


def require_fit(net: nn.Module, data: Any) -> None:
    """Refuses a network for other classes, or another shape, than the data's.

    Raises:
        ValueError: With both.
    """
    classes = getattr(net, "num_classes", None), getattr(data, "num_classes", None)
    if None not in classes and classes[0] != classes[1]:
        raise ValueError(
            f"Expected as many classes in the network as in the data, got {classes[0]} and "
            f"{classes[1]}. Change data.num_classes; net.num_classes follows it."
        )
    shapes = getattr(net, "input_shape", None), getattr(data, "shape", None)
    if None not in shapes and tuple(shapes[0]) != tuple(shapes[1]):
        raise ValueError(
            f"Expected samples of shape {tuple(shapes[0])}, which the network is made for, got "
            f"{tuple(shapes[1])}. Choose the network of these latents (net=...), or change "
            "net.in_channels and net.input_size."
        )


def begin_with(module: nn.Module, file: Path) -> None:
    """Gives a module weights to begin with: a checkpoint of a run, or public ones.

    Args:
        module: Has the network as `net`.
        file: The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another model, with the entries that differ.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file of weights {file} (weights).")
    if file.suffix == ".ckpt":
        rank_zero_info(f"begins with {load_weights(file, module)}")
    else:
        load_public_weights(module.net, file)  # type: ignore[arg-type]
        rank_zero_info(f"begins with the public weights of {file}")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, interpolations resolved."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
