"""`stagewise sample`: from a trained run to samples.

The noise of sample i depends on (seed, i) only. Batches are fixed groups of consecutive samples,
and rank r of R makes every R-th of them. So the files do not depend on R, and the noise does not
depend on the batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import Tensor
from tqdm import tqdm

from stagewise.oracle import Oracle
from stagewise.recipes.arguments import device_of, exit_with_message
from stagewise.recipes.checkpoints import find_checkpoint, load_module, run_config
from stagewise.recipes.sample_files import Ranks, SampleFolder, group_of_ranks
from stagewise.recipes.sample_options import Options, parse, parser
from stagewise.recipes.sampler import Sampler, bank_of, finisher, require_alike

__all__ = ["main", "parse", "parser", "run"]


def run(options: Options) -> Path:
    """Makes samples as `stagewise sample --help` says; prints and returns their file.

    Raises:
        ValueError, OSError, ImportError, MemoryError: If something cannot be used; if possible
            before the first sample is made.
    """
    config = run_config(options.run, options.trust)
    checkpoint = find_checkpoint(options.run, options.checkpoint)
    measured, options = options.measured, options.with_measured()
    with group_of_ranks(options.timeout) as ranks:
        data = instantiate(config.data)
        shape = tuple(data.shape)
        classes = int(getattr(data, "num_classes", len(getattr(data, "class_names", ()))))
        given, options = options, options.with_channels(config.get("evaluation") or {}, shape[0])
        options.check(shape, classes)
        module, loaded = load_module(config, checkpoint, options.weights)
        _require_null(module.net, options)
        sampler = Sampler(module.to(device_of(options.device)), options, shape, classes)
        own = options.settings(loaded)
        if options.then is not None:
            other = run_config(options.then, options.trust)
            then, later = load_module(other, find_checkpoint(options.then), options.weights)
            require_alike(config, module, other, then)
            _require_null(then.net, options)
            sampler.then = then.to(module.device)
            own["then"] = later.fingerprint
            ranks.say(f"From t = {options.then_at:g} on: {later} of {options.then}.")
        ranks.say(f"Loaded {loaded}.")
        if options.cfg_channels and given.cfg_channels is None:
            ranks.say(
                f"Guides the first {options.cfg_channels} channels (evaluation.cfg_channels of the "
                "run). To guide all: --cfg-channels all."
            )
        for name in measured:
            ranks.say(f"Measured in this run, used for {name}: {getattr(options, name)}.")

        stored = hasattr(data, "to_stored")
        if options.vae is not None and not stored:
            raise ValueError(
                f"Expected no --vae, got {options.vae}: the data of this run are no latents."
            )
        pictures = options.vae is not None or (not stored and shape[0] == 3)
        kind = "pictures" if pictures else "latents"
        folder = SampleFolder(options.folder(loaded), kind, options.count, options.batch_size)
        ranks.first(lambda: folder.start(own | {"kind": kind}, resume=options.resume))
        if options.oracle_until and not folder.file.exists():
            sampler.oracle = Oracle(bank_of(data, options, sampler), module.objective.path)
        finish = finisher(data, options, shape, module.device, pictures)
        begin = time.perf_counter()
        made = _make(folder, sampler, finish, ranks)
        ranks.wait()
        if ranks.rank == 0:
            folder.join()
            _tell(folder, options, made, time.perf_counter() - begin)
        return folder.file


def _require_null(net: Any, options: Options) -> None:
    if options.cfg_scale != 1 and getattr(net, "class_dropout", None) == 0:
        raise ValueError(
            f"Expected --cfg-scale 1, got {options.cfg_scale:g}: the network was trained with "
            "class_dropout = 0, so it has no null class for guidance."
        )


def _make(
    folder: SampleFolder, sampler: Sampler, finish: Callable[[Tensor], Tensor], ranks: Ranks
) -> int:
    """Makes this rank's missing batches; returns the number of samples."""
    mine = folder.missing(ranks.rank, ranks.count)
    total = sum(len(folder.batches[b]) for b in mine)
    about = "samples" if ranks.count == 1 else f"samples of rank 0 of {ranks.count}"
    with tqdm(total=total, desc=about, unit="sample", disable=ranks.rank > 0) as bar:
        for batch in mine:
            indices = folder.batches[batch]
            labels = sampler.labels(indices) if sampler.classes else None
            samples = finish(sampler(indices))
            try:
                folder.write(batch, samples, labels)
            except OSError as error:
                raise OSError(
                    f"{str(error).rstrip('.')}. The samples in {folder.path} are kept. To "
                    "continue, repeat the command with --resume."
                ) from error
            bar.update(len(indices))
    return total


def _tell(folder: SampleFolder, options: Options, made: int, seconds: float) -> None:
    if folder.kind == "latents":
        print("These are latents: an evaluation suite needs pictures. Decode them with --vae.")
    where: Any = folder.file
    if options.grid:
        picture, about = folder.grid(options.grid)
        where = f"{where}; {picture} shows {about}"
    rate = f" in {seconds:.1f} s" if made else ", all made before"
    print(f"{folder.count} samples{rate}: {where}")


def main() -> None:
    """The entry point of `stagewise sample`."""
    with exit_with_message("sample"):
        options = parse()
        try:
            run(options)
        except HydraException as error:
            runs = [options.run, options.then] if options.then else [options.run]
            files = " or ".join(str(folder / "config.yaml") for folder in runs)
            raise ValueError(f"{files} cannot be used: {error}") from error


if __name__ == "__main__":
    main()
