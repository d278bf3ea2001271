"""How a training starts: from the beginning, from its own checkpoint, or with given weights."""

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
from stagewise.latents.arrays import check_zip
from stagewise.recipes.checkpoints import load_weights, newest_whole, read_config
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.public_weights import load_public_weights
from stagewise.recipes.run_files import flat

__all__ = ["begin_with", "checkpoint_of", "explain_resume", "require_fit", "require_shards"]

_SAME = ("seed", "data", "net", "objective", "module")
# The data module checks the batch size over all ranks, since their number may change.
_FREE = tuple(
    f"data.{name}"
    for name in ("latents.path", "held_out_path", "num_workers", "verify", "bank_dir", "batch_size")
)


def checkpoint_of(config: DictConfig, run_dir: Path) -> Path | None:
    """The checkpoint that training continues from, or None.

    With `resume`, the newest whole one of the run, with a warning for each damaged one. Refuses a
    folder that holds a run if `resume` is false, and a run of another model, data or seed.
    """
    folder, file = run_dir / "checkpoints", run_dir / "config.yaml"
    there = any(folder.glob("*.ckpt"))
    if config.resume and config.ckpt_path is not None:
        raise ValueError("Expected `resume` or `ckpt_path`, got both; resume=true finds its own.")
    if not config.resume:
        # Other ranks may start after the first has written.
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if first and (file.exists() or there):
            raise FileExistsError(
                f"{run_dir} holds a run. Continue it with resume=true, or choose another folder: "
                "run_dir=..."
            )
        if config.ckpt_path is None:
            return None
        if not Path(config.ckpt_path).exists():
            raise FileNotFoundError(f"There is no checkpoint {config.ckpt_path} (ckpt_path).")
        check_zip(Path(config.ckpt_path))
        return Path(config.ckpt_path)
    if not there and _is_named_by_time(run_dir):
        raise ValueError(
            f"Expected run_dir=FOLDER, the run to continue, with resume=true; {run_dir} is new."
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
                f"Expected the configuration of the run in {run_dir}, got "
                f"{joined(changed, 10)}. Use its settings, or choose another folder: run_dir=..."
            )
    if not there:
        rank_zero_info(f"resume=true: no checkpoint in {folder}, starts from the beginning")
        return None
    newest, faults = newest_whole(folder)
    if newest is None:
        raise ValueError(
            f"resume=true finds no whole checkpoint in {folder}. {' '.join(faults)} To start again "
            "choose another folder: run_dir=..."
        )
    for fault in faults:
        rank_zero_warn(f"resume=true skips a checkpoint and uses an older one. {fault}")
    rank_zero_info(f"resume=true: from {newest}")
    return newest


def require_fit(net: nn.Module, data: Any) -> None:
    """Refuses a network for another number of classes, or another shape, than the data have."""
    classes = getattr(net, "num_classes", None), getattr(data, "num_classes", None)
    if None not in classes and classes[0] != classes[1]:
        raise ValueError(
            f"Expected as many classes in the network as in the data, got {classes[0]} and "
            f"{classes[1]}. Use net.num_classes={classes[1]}."
        )
    wanted, got = getattr(net, "input_shape", None), getattr(data, "shape", None)
    if wanted is not None and got is not None and tuple(wanted) != tuple(got):
        raise ValueError(
            f"Expected samples of shape {tuple(wanted)}, that of the network, got {tuple(got)}. "
            "Choose a network for these latents (net=...), or change net.in_channels and "
            "net.input_size."
        )


def require_shards(callbacks: Iterable[object], data: Any) -> None:
    """Refuses sharded data without a sharded engine, and the reverse."""
    sharded = getattr(data, "sharded", False)
    for callback in callbacks:
        engine = getattr(callback, "engine", None)
        if isinstance(callback, StageScheme) and sharded == getattr(engine, "holds_all_rows", True):
            raise ValueError(
                f"Expected data.sharded=true and the engine Sharded() together, got sharded="
                f"{sharded} and {engine!r}. Use engine=sharded, which sets both."
            )


def begin_with(module: FlowMatchingModule, file: Path, data: Any) -> None:
    """Loads weights to begin with: a checkpoint of a run, or public weights.

    Refuses those of another model, and public ones for latents of another scale than `data`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file of weights {file} (weights).")
    if file.suffix == ".ckpt":
        rank_zero_info(f"Begins with {load_weights(file, module)}")
    else:
        load_public_weights(module.net, file)  # type: ignore[arg-type]
        _require_public_scale(file, getattr(data, "latents", None))
        rank_zero_info(f"Begins with the public weights of {file}")


@contextmanager
def explain_resume(run_dir: Path, trainer: L.Trainer, begun: int) -> Iterator[None]:
    """Says how to resume a training that ends early, after it has begun at step `begun`.

    Ctrl-C, which Lightning turns into an exit, is a KeyboardInterrupt again, and SIGTERM an exit
    with the code of shells, 143; that of Lightning is 0.
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
            raise  # the settings are wrong, so a resume would fail too
        note = f"Training ended {_kept(run_dir, trainer)}"
        if is_full(error):
            note = f"A disk is full. Make room in {run_dir} and wherever this run writes. {note}"
        # Python 3.10 has no notes; there it is printed above the traceback.
        getattr(error, "add_note", lambda text: print(text, file=sys.stderr))(note)
        raise


def _kept(run_dir: Path, trainer: L.Trainer) -> str:
    newest = None
    with suppress(ValueError, OSError):
        newest, _ = newest_whole(run_dir / "checkpoints")
    if newest is None:
        return f"at step {trainer.global_step}, before the first checkpoint."
    return (
        f"at step {trainer.global_step}. To continue from {newest.name}: "
        f"run_dir={shlex.quote(str(run_dir))} resume=true"
    )


def _require_public_scale(file: Path, latents: Latents | None) -> None:
    """Refuses latents in another scale than that of the training of public weights.

    With 4 channels that is 0.18215 z (SiT), with 32 standardised latents of VA-VAE (LightningDiT).
    """
    if latents is None or latents.shape[0] not in (4, 32):
        return
    statistics, trained_standardised = latents.statistics(), latents.shape[0] == 32
    mean, std = statistics.mean, statistics.std()
    # 256 rows give both to a few hundredths.
    if trained_standardised == bool(((mean.abs() < 0.25) & ((std - 1).abs() < 0.1)).all()):
        return
    trained = "0.18215 z of Stable Diffusion's autoencoder"
    cure = "data.latents.autoencoder=sd-vae"
    if trained_standardised:
        trained = "latents with mean 0 and standard deviation 1 in each channel"
        cure = "data.latents.autoencoder=null data.latents.normalize=true"
    listed = ", ".join(f"{m:.2f} +- {s:.2f}" for m, s in zip(mean[:4], std[:4], strict=True))
    raise ValueError(
        f"The public weights of {file} were trained on {trained}; those of {latents.path}, "
        f"x_1 = {latents.scaling}, have {listed} in their first channels. Use {cure}, or begin "
        "without `weights`."
    )


def _is_named_by_time(run_dir: Path) -> bool:
    """Whether Hydra chose this folder, so that each start of the command gets another one."""
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    places = ("hydra.run.dir=", "hydra.sweep.dir=")
    chosen = any(override.startswith(places) for override in hydra.overrides.hydra)
    return not chosen and run_dir.resolve() == Path(hydra.runtime.output_dir).resolve()
