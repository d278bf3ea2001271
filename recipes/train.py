"""`stagewise train`: put a configuration together, train it, and say what came out."""

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
    require_fit,
    require_shards,
    says_how_to_go_on,
)

__all__ = ["main", "settings", "train"]

_OF_TRAINER = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision")


def train(config: DictConfig) -> dict[str, Any]:
    """Trains a composed configuration and evaluates the result.

    Resumed when it has ended already, as after a kill in its evaluation, it is evaluated again.

    Args:
        config: That of `conf/train.yaml`.

    Returns:
        What `evaluate` returns, with `seconds`, the time spent in `Trainer.fit`.

    Raises:
        FileExistsError: If the folder holds a run, and `resume` is false.
        ValueError: If the run there is of another configuration, or parts do not fit one another.
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
    # An experiment may set options of a callback that is not there.
    parts = config.get("callbacks") or {}
    callbacks = [instantiate(part) for part in parts.values() if "_target_" in part]
    loggers = [tolerant(k, instantiate(v)) for k, v in (config.get("logger") or {}).items()]
    require_shards(callbacks, data)
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    told = settings(config)
    for logger in trainer.loggers:
        logger.log_hyperparams(told)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(run_dir / "config.yaml", lambda file: OmegaConf.save(config, file, True))
    place = shlex.quote(str(run_dir))
    # For what leaves no time for a word: SIGKILL, which Lightning also ends all processes with.
    rank_zero_info(f"Writes to {run_dir}. If it is stopped, go on: run_dir={place} resume=true")
    start = time.perf_counter()
    with says_how_to_go_on(run_dir, trainer, begun):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    seconds = time.perf_counter() - start
    finished = checkpoint is not None and trainer.global_step == begun
    if finished:
        rank_zero_info(
            f"{checkpoint} is at step {begun}, where this training ends: nothing was trained. Its "
            "weights are evaluated again. To train on, raise what ended it, such as "
            f"trainer.max_steps={2 * begun}."
        )
    if not trainer.is_global_zero:
        return {"seconds": seconds}
    if isinstance(trainer.strategy, FSDPStrategy):
        print(f"\nTrained {trainer.global_step} steps; sharded weights are not evaluated here.")
        return {"seconds": seconds}
    if finished and checkpoint is not None:
        # The end of a training, which puts the average in, was not reached.
        load_weights(checkpoint, module)
    module.to(trainer.strategy.root_device)  # fit has moved it to the CPU
    monitor = next((c for c in callbacks if isinstance(c, PosteriorMonitor)), None)
    step = trainer.global_step
    with says_how_to_go_on(run_dir, trainer, begun):
        results = evaluate(
            module, data, monitor, trainer.loggers, step, run_dir, **config.evaluation
        )
    found = {f"evaluation/{key}": results[key] for key in ("train_loss", "held_out_loss")}
    found = {key: value for key, value in found.items() if not math.isnan(value)}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # whose table of runs wants both at once
            logger.log_hyperparams(told, found, step)
    print(
        f"\nTrained {step} steps{'' if finished else f' in {seconds:.0f} s'}. In "
        f"{run_dir}:\n"
        + "".join(
            f"  {path.relative_to(run_dir)}\n"
            for path in sorted([*run_dir.rglob("*.png"), *run_dir.rglob("*.jsonl")])
        )
        + f"TensorBoard:  tensorboard --logdir {place}\n"
        + f"One page:     stagewise report {place}\n"
        + f"Samples:      stagewise sample {place}\n\n"
        + conclusion(results["stages"])
    )
    return {**results, "seconds": seconds}


def settings(config: DictConfig) -> dict[str, Any]:
    """What runs are compared by, for the loggers: not how they are watched and where they write."""
    parts = [str(part.get("_target_")) for part in (config.get("callbacks") or {}).values()]
    steered = any(part.endswith("StageScheme") for part in parts)
    kept = ("seed", "module", "net", "objective", "data", *(["scheme"] if steered else []))
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    found = {key: _short(plain[key]) for key in kept}
    return found | {"trainer": {key: plain["trainer"].get(key) for key in _OF_TRAINER}}


def _short(part: Any) -> Any:
    """A part of a configuration with classes by their names alone: a column is narrow."""
    if isinstance(part, dict):
        return {key: _short(value) for key, value in part.items()}
    named = isinstance(part, str) and part.startswith("stagewise.")
    return part.rsplit(".", 1)[-1] if named else part


@hydra.main(version_base="1.3", config_path="pkg://stagewise.recipes.conf", config_name="train")
def _job(config: DictConfig) -> None:
    # The variable that `main` sets is not for the processes of further ranks.
    with _hydra_hands_errors_on(False):
        choices = HydraConfig.get().runtime.choices
        require_numbers(config, {k: v for k, v in choices.items() if v and "hydra" not in k})
        train(config)


@contextmanager
def _hydra_hands_errors_on(yes: bool) -> Iterator[None]:
    """Whether Hydra raises what goes wrong, or prints it and ends the process."""
    before = os.environ.get("HYDRA_FULL_ERROR", "")
    os.environ["HYDRA_FULL_ERROR"] = "1" if yes else "0"
    try:
        yield
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before


def _places(arguments: list[str]) -> list[str]:
    """Where Hydra is to write, if a folder was named: it would make one by the time beside it."""
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
            with _hydra_hands_errors_on(True):
                _job()
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explained(error, sys.argv[1:])) from error


if __name__ == "__main__":
    main()
