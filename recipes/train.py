"""`stagewise train`: put a configuration together, train it, and say what came out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from stagewise.callbacks import PosteriorMonitor
from stagewise.recipes.evaluate import evaluate

__all__ = ["main", "train"]


def train(config: DictConfig) -> dict[str, Any]:
    """Trains a composed configuration and evaluates the result.

    Args:
        config: The configuration; see `train.yaml`.

    Returns:
        What `evaluate` returns, with `seconds`, the time spent in `Trainer.fit`.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    data = instantiate(config.data)
    module = instantiate(
        config.module, net=instantiate(config.net), objective=instantiate(config.objective)
    )
    callbacks = [instantiate(callback) for callback in config.get("callbacks", {}).values()]
    loggers = [instantiate(logger) for logger in config.get("logger", {}).values()]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=config.ckpt_path)
    seconds = time.perf_counter() - start
    if not trainer.is_global_zero:
        return {"seconds": seconds}
    monitor = next((c for c in callbacks if isinstance(c, PosteriorMonitor)), None)
    results = evaluate(
        module, data, monitor, trainer.loggers, trainer.global_step, run_dir, **config.evaluation
    )
    print(
        f"\nTrained {trainer.global_step} steps in {seconds:.0f} s. In {run_dir}:\n"
        + "".join(
            f"  {path.relative_to(run_dir)}\n"
            for path in sorted([*run_dir.rglob("*.png"), *run_dir.rglob("*.jsonl")])
        )
        + f"TensorBoard:  tensorboard --logdir {run_dir}\n"
        + f"One page:     stagewise report {run_dir}"
    )
    return {**results, "seconds": seconds}


@hydra.main(version_base="1.3", config_path="pkg://stagewise.recipes", config_name="train")
def main(config: DictConfig) -> None:
    """The entry point of `stagewise train`."""
    train(config)


if __name__ == "__main__":
    main()
