"""`stagewise train`: put a configuration together, train it, and say what came out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

from stagewise.callbacks import PosteriorMonitor
from stagewise.files import replace_file
from stagewise.recipes.checkpoints import load_weights, require_same_model
from stagewise.recipes.evaluate import evaluate
from stagewise.recipes.resume import begin_with, checkpoint_of, require_fit, require_shards

__all__ = ["main", "train"]


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
        raise MissingMandatoryValue(f"Missing mandatory value: data.{key}=...")
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
    loggers = [instantiate(logger) for logger in (config.get("logger") or {}).values()]
    require_shards(callbacks, data)
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(run_dir / "config.yaml", lambda file: OmegaConf.save(config, file, True))
    start = time.perf_counter()
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
    results = evaluate(
        module, data, monitor, trainer.loggers, trainer.global_step, run_dir, **config.evaluation
    )
    print(
        f"\nTrained {trainer.global_step} steps{'' if finished else f' in {seconds:.0f} s'}. In "
        f"{run_dir}:\n"
        + "".join(
            f"  {path.relative_to(run_dir)}\n"
            for path in sorted([*run_dir.rglob("*.png"), *run_dir.rglob("*.jsonl")])
        )
        + f"TensorBoard:  tensorboard --logdir {run_dir}\n"
        + f"One page:     stagewise report {run_dir}\n"
        + f"Samples:      stagewise sample {run_dir}"
    )
    return {**results, "seconds": seconds}


@hydra.main(version_base="1.3", config_path="pkg://stagewise.recipes.conf", config_name="train")
def main(config: DictConfig) -> None:
    """The entry point of `stagewise train`."""
    train(config)


if __name__ == "__main__":
    main()
