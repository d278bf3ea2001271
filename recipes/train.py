"""`stagewise train`: compose a configuration, train it, and print what came out."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stagewise.callbacks import PosteriorMonitor
from stagewise.files import replace_file
from stagewise.recipes.arguments import exit_with_message
from stagewise.recipes.checkpoints import load_weights, require_same_model
from stagewise.recipes.conclusion import conclusion
from stagewise.recipes.evaluate import evaluate
from stagewise.recipes.loggers import tolerant
from stagewise.recipes.overrides import explained, refuse_unknown, require_numbers
from stagewise.recipes.resume import (
    begin_with,
    checkpoint_of,
    explain_resume,
    require_fit,
    require_shards,
)

__all__ = ["main", "settings", "train"]

_OF_TRAINER = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")


def train(config: DictConfig) -> dict[str, Any]:
    """Trains a configuration composed from `conf/train.yaml`, and evaluates the result.

    A training that had ended, but is resumed, is evaluated again.

    Returns:
        What `evaluate` returns, with `seconds`, the time spent in `Trainer.fit`.

    Raises:
        FileExistsError: If the folder holds a run, and `resume` is false.
        ValueError: If that run has another configuration, or parts do not fit together.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    run_dir = Path(config.run_dir)
    checkpoint = checkpoint_of(config, run_dir)
    for key in sorted(OmegaConf.missing_keys(config.data)):
        raise ValueError(f"Expected {key}=..., which has no default, got none.")
    data = instantiate(config.data)
    net = instantiate(config.net)
    require_fit(net, data)
    module = instantiate(config.module, net=net, objective=instantiate(config.objective))
    begun = 0
    if checkpoint is not None:
        begun = require_same_model(checkpoint, module)
    elif config.weights is not None:
        begin_with(module, Path(config.weights), data)
    if config.compile.enabled:
        for block in getattr(net, "blocks", [net]):
            block.compile(mode=config.compile.mode)
    # An experiment may set options of a callback that was not chosen.
    parts = config.get("callbacks") or {}
    callbacks = [instantiate(part) for part in parts.values() if "_target_" in part]
    loggers = [tolerant(k, instantiate(v)) for k, v in (config.get("logger") or {}).items()]
    require_shards(callbacks, data)
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    logged = settings(config)
    for logger in trainer.loggers:
        logger.log_hyperparams(logged)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(run_dir / "config.yaml", lambda file: OmegaConf.save(config, file, True))
    place = shlex.quote(str(run_dir))
    # Said now, since SIGKILL leaves no time for it, and Lightning ends further processes with it.
    rank_zero_info(f"Writes to {run_dir}. To continue if it stops: run_dir={place} resume=true")
    start = time.perf_counter()
    with explain_resume(run_dir, trainer, begun):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    seconds = time.perf_counter() - start
    finished = checkpoint is not None and trainer.global_step == begun
    if finished:
        rank_zero_info(
            f"Trained nothing: {checkpoint} is at step {begun}, the end of this training. Its "
            "weights are evaluated again. To continue training, raise the limit, such as "
            f"trainer.max_steps={2 * begun}."
        )
    if not trainer.is_global_zero:
        return {"seconds": seconds}
    if isinstance(trainer.strategy, FSDPStrategy):
        print(f"\nTrained {trainer.global_step} steps; sharded weights are not evaluated here.")
        return {"seconds": seconds}
    if finished and checkpoint is not None:
        # The average is loaded only at the end of a training.
        load_weights(checkpoint, module)
    module.to(trainer.strategy.root_device)  # fit has moved it to the CPU
    monitor = next((c for c in callbacks if isinstance(c, PosteriorMonitor)), None)
    step = trainer.global_step
    with explain_resume(run_dir, trainer, begun):
        results = evaluate(
            module, data, monitor, trainer.loggers, step, run_dir, **config.evaluation
        )
    found = {f"evaluation/{key}": results[key] for key in ("train_loss", "held_out_loss")}
    found = {key: value for key, value in found.items() if not math.isnan(value)}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # its table of runs needs both at once
            logger.log_hyperparams(logged, found, step)
    print(
        f"\nTrained {step} steps{'' if finished else f' in {seconds:.0f} s'}. In "
        f"{run_dir}:\n"
        + "".join(
            f"  {path.relative_to(run_dir)}\n"
            for path in sorted([*run_dir.rglob("*.png"), *run_dir.rglob("*.jsonl")])
        )
        + f"TensorBoard:  tensorboard --logdir {place}\n"
        + f"One page:     stagewise report {place}\n" * any(run_dir.rglob("stages.jsonl"))
        + f"Samples:      stagewise sample {place}\n\n"
        + conclusion(results["stages"])
    )
    return {**results, "seconds": seconds}


def settings(config: DictConfig) -> dict[str, Any]:
    """The settings for the loggers: all but monitors and paths."""
    parts = [str(part.get("_target_")) for part in (config.get("callbacks") or {}).values()]
    steered = any(part.endswith("StageScheme") for part in parts)
    kept = ("seed", "module", "net", "objective", "data", *(["scheme"] if steered else []))
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    found = {key: _short(plain[key]) for key in kept}
    return found | {"trainer": {key: plain["trainer"].get(key) for key in _OF_TRAINER}}


def _short(part: Any) -> Any:
    """A part of a configuration with the names of classes without their modules."""
    if isinstance(part, dict):
        return {key: _short(value) for key, value in part.items()}
    named = isinstance(part, str) and part.startswith("stagewise.")
    return part.rsplit(".", 1)[-1] if named else part


@hydra.main(version_base="1.3", config_path="pkg://stagewise.recipes.conf", config_name="train")
def _job(config: DictConfig) -> None:
    # Processes of further ranks must not inherit what `main` sets.
    with _hydra_raises(False):
        choices = HydraConfig.get().runtime.choices
        require_numbers(config, {k: v for k, v in choices.items() if v and "hydra" not in k})
        train(config)


@contextmanager
def _hydra_raises(yes: bool) -> Iterator[None]:
    """Whether Hydra raises errors, or prints them and ends the process."""
    before = os.environ.get("HYDRA_FULL_ERROR", "")
    os.environ["HYDRA_FULL_ERROR"] = "1" if yes else "0"
    try:
        yield
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before


def _places(arguments: list[str]) -> list[str]:
    """Makes Hydra write into a named `run_dir`, not into a folder named after the time."""
    own = ("hydra.run.dir=", "hydra.sweep.dir=", "-m", "--multirun")
    named = any(argument.startswith("run_dir=") for argument in arguments)
    if not named or any(argument.startswith(own) for argument in arguments):
        return []
    return ["hydra.run.dir=${run_dir}", "hydra.output_subdir=null"]


def main() -> None:
    """The entry point of `stagewise train`."""
    with exit_with_message("train"):
        refuse_unknown(sys.argv[1:])
        sys.argv += _places(sys.argv[1:])
        try:
            with _hydra_raises(True):
                _job()
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explained(error, sys.argv[1:])) from error


if __name__ == "__main__":
    main()
