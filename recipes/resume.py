"""Where a training begins: at the beginning, at a checkpoint of its own, or with given weights."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from omegaconf import DictConfig
from torch import nn

from stagewise.callbacks import StageScheme
from stagewise.files import is_full, joined
from stagewise.latents import Latents
from stagewise.recipes.checkpoints import load_weights, newest_whole, read_config, require_whole
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.overrides import flat
from stagewise.recipes.public_weights import load_public_weights

__all__ = ["begin_with", "checkpoint_of", "require_fit", "require_shards", "says_how_to_go_on"]

_SAME = ("seed", "data", "net", "objective", "module")
# The batch over all ranks must stay as well: the data module looks at it, since ranks may change.
_FREE = tuple(
    f"data.{name}"
    for name in ("latents.path", "held_out_path", "num_workers", "verify", "bank_dir", "batch_size")
)


def checkpoint_of(config: DictConfig, run_dir: Path) -> Path | None:
    """The checkpoint that training continues from; None to begin at the beginning.

    Resumed, it is the newest whole one of the run. A damaged one is named and left out.

    Args:
        config: The configuration, with `resume` and `ckpt_path`.
        run_dir: The folder of the run, in which nothing is overwritten.

    Raises:
        FileExistsError: If the folder holds a run, and `resume` is false.
        FileNotFoundError: If there is no `ckpt_path`.
        ValueError: If the run there is of another model, data or seed, none of its checkpoints is
            whole, or `resume` is true of a folder that has just been made, and named by the time.
    """
    folder, file = run_dir / "checkpoints", run_dir / "config.yaml"
    there = any(folder.glob("*.ckpt"))
    if config.resume and config.ckpt_path is not None:
        raise ValueError("Expected `resume` or `ckpt_path`, got both; resume=true finds its own.")
    if not config.resume:
        # The other processes of this run may come when the first has written.
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if first and (file.exists() or there):
            raise FileExistsError(
                f"{run_dir} holds a run. Go on with it, resume=true, or choose another folder, "
                "run_dir=..."
            )
        if config.ckpt_path is None:
            return None
        if not Path(config.ckpt_path).exists():
            raise FileNotFoundError(f"There is no checkpoint {config.ckpt_path} (ckpt_path).")
        require_whole(Path(config.ckpt_path))
        return Path(config.ckpt_path)
    if not there and _is_named_by_time(run_dir):
        raise ValueError(
            f"resume=true needs the folder to go on in, run_dir=...; {run_dir} is a new one."
        )
    if file.exists():
        before, now = flat(read_config(file)), flat(config)
        changed = [
            f"{key}={now.get(key)} (was {before.get(key)})"
            for key in {**before, **now}
            if key.split(".")[0] in _SAME and key not in _FREE and before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"The run in {run_dir} was begun with another configuration: "
                f"{joined(changed, 10)}. Go on as it was begun, or choose another folder: "
                "run_dir=..."
            )
    if not there:
        rank_zero_info(f"resume=true: no checkpoint in {folder}, so from the beginning")
        return None
    newest, faults = newest_whole(folder)
    if newest is None:
        raise ValueError(
            f"resume=true finds no whole checkpoint in {folder}. {' '.join(faults)} To begin again "
            "choose another folder: run_dir=..."
        )
    for fault in faults:
        rank_zero_warn(f"resume=true leaves out a checkpoint, and goes on before it. {fault}")
    rank_zero_info(f"resume=true: from {newest}")
    return newest


def require_fit(net: nn.Module, data: Any) -> None:
    """Refuses a network for other classes, or another shape, than the data's."""
    classes = getattr(net, "num_classes", None), getattr(data, "num_classes", None)
    if None not in classes and classes[0] != classes[1]:
        raise ValueError(
            f"Expected as many classes in the network as in the data, got {classes[0]} and "
            f"{classes[1]}. Say net.num_classes={classes[1]}."
        )
    wanted, got = getattr(net, "input_shape", None), getattr(data, "shape", None)
    if wanted is not None and got is not None and tuple(wanted) != tuple(got):
        raise ValueError(
            f"Expected samples of shape {tuple(wanted)}, which the network is made for, got "
            f"{tuple(got)}. Choose the network of these latents (net=...), or change "
            "net.in_channels and net.input_size."
        )


def require_shards(callbacks: Iterable[object], data: Any) -> None:
    """Refuses rows counted over shards with an engine that has all rows, and the reverse."""
    sharded = getattr(data, "sharded", False)
    for callback in callbacks:
        engine = getattr(callback, "engine", None)
        if isinstance(callback, StageScheme) and sharded == getattr(engine, "holds_all_rows", True):
            raise ValueError(
                f"Expected data.sharded=true and the engine Sharded() together, got sharded="
                f"{sharded} and {engine!r}. Say engine=sharded, which sets both."
            )


def begin_with(module: FlowMatchingModule, file: Path, data: Any) -> None:
    """Gives a module weights to begin with: a checkpoint of a run, or public ones.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another model, with the entries that differ, or public weights
            were trained on latents of another scale than those of `data`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file of weights {file} (weights).")
    if file.suffix == ".ckpt":
        rank_zero_info(f"begins with {load_weights(file, module)}")
    else:
        load_public_weights(module.net, file)  # type: ignore[arg-type]
        _require_public_scale(file, getattr(data, "latents", None))
        rank_zero_info(f"begins with the public weights of {file}")


@contextmanager
def says_how_to_go_on(run_dir: Path, trainer: L.Trainer, begun: int) -> Iterator[None]:
    """What ends a training early is said with the step, what is kept, and how to go on from there.

    Args:
        run_dir: The folder of the run.
        trainer: Its trainer.
        begun: The step that training begins with.

    Raises:
        KeyboardInterrupt: For Ctrl-C, which Lightning makes an exit of.
        SystemExit: For SIGTERM, with the code that shells have for it; that of Lightning is 0.
    """
    try:
        yield
    except SIGTERMException:
        print(f"stagewise train: ended by SIGTERM {_kept(run_dir, trainer)}", file=sys.stderr)
        sys.exit(143)
    except SystemExit as end:
        if end.code != 1:
            raise
        raise KeyboardInterrupt(_kept(run_dir, trainer)) from end
    except Exception as error:
        if trainer.global_step == begun and isinstance(error, ValueError):
            raise  # what was asked for is wrong, and is as wrong when it is asked for again
        note = f"Training ended {_kept(run_dir, trainer)}"
        if is_full(error):
            note = f"A disk is full. Make room in {run_dir}, and where else this run writes. {note}"
        # Python 3.10 has no notes: there it stands above the traceback.
        getattr(error, "add_note", lambda text: print(text, file=sys.stderr))(note)
        raise


def _kept(run_dir: Path, trainer: L.Trainer) -> str:
    newest = None
    with suppress(ValueError, OSError):
        newest, _ = newest_whole(run_dir / "checkpoints")
    if newest is None:
        return f"at step {trainer.global_step}, before the first checkpoint."
    return (
        f"at step {trainer.global_step}. Go on with it from {newest.name}: "
        f"run_dir={shlex.quote(str(run_dir))} resume=true"
    )


def _require_public_scale(file: Path, latents: Latents | None) -> None:
    """Refuses latents at another scale than that which public weights were trained on.

    With 4 channels that is 0.18215 z (SiT), with 32 the standardised one of VA-VAE (LightningDiT).
    """
    if latents is None or latents.shape[0] not in (4, 32):
        return
    seen, trained_standardised = latents.statistics(), latents.shape[0] == 32
    mean, std = seen.mean, seen.std()
    # 256 rows say both to within a few hundredths.
    if trained_standardised == bool(((mean.abs() < 0.25) & ((std - 1).abs() < 0.1)).all()):
        return
    trained, cure = (
        "0.18215 z of Stable Diffusion's autoencoder",
        "data.latents.autoencoder=sd-vae",
    )
    if trained_standardised:
        trained = "latents with mean 0 and standard deviation 1 in each channel"
        cure = "data.latents.autoencoder=null data.latents.normalize=true"
    listed = ", ".join(f"{m:.2f} +- {s:.2f}" for m, s in zip(mean[:4], std[:4], strict=True))
    raise ValueError(
        f"The public weights of {file} were trained on {trained}; those of {latents.path}, "
        f"x_1 = {latents.scaling}, have {listed} in their first channels. Say {cure}, or begin "
        "without `weights`."
    )


def _is_named_by_time(run_dir: Path) -> bool:
    """Whether nobody chose this folder: another start of the same command gets another."""
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    places = ("hydra.run.dir=", "hydra.sweep.dir=")
    chosen = any(override.startswith(places) for override in hydra.overrides.hydra)
    return not chosen and run_dir.resolve() == Path(hydra.runtime.output_dir).resolve()
