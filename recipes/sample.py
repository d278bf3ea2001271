"""`stagewise sample`: from a trained run to samples.

The noise of sample i is drawn from (seed, i) alone, and batches are fixed groups of consecutive
samples, of which rank r of R makes every R-th. So the files do not depend on R, and the noise not
even on the batch size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import Tensor
from tqdm import tqdm

from stagewise.oracle import Oracle
from stagewise.recipes.checkpoints import find_checkpoint, load_module, run_config
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.sample_files import Ranks, SampleFolder, group_of_ranks
from stagewise.recipes.sample_options import Options
from stagewise.recipes.sampler import Sampler, bank_of, finisher
from stagewise.sampling import ADAPTIVE_SOLVERS, FIXED_SOLVERS

__all__ = ["main", "parse", "run"]

_MEASURED = "measured"


def run(options: Options) -> Path:
    """Makes what the options say; prints where it is.

    Args:
        options: See `stagewise sample --help`.

    Returns:
        The file of samples.

    Raises:
        ValueError, OSError, ImportError, MemoryError: If something cannot be used; before any
            sample is made, as far as it can be known by then.
    """
    config, checkpoint = run_config(options.run), find_checkpoint(options.run, options.checkpoint)
    measured, options = options.measured, options.with_measured()
    with group_of_ranks(options.timeout) as ranks:
        say = print if ranks.rank == 0 else _silent
        data = instantiate(config.data)
        shape, classes = tuple(data.shape), _classes(data)
        options.check(shape, classes)
        module, loaded = load_module(config, checkpoint, options.weights)
        _check_null_class(module, options)
        sampler = Sampler(module.to(options.place()), options, shape, classes)
        say(f"Loaded {loaded}.")
        for name in measured:
            say(f"Measured in this run, taken for {name}: {getattr(options, name)}.")

        stored = hasattr(data, "to_stored")
        if options.vae is not None and not stored:
            raise ValueError(
                f"Expected no --vae, got {options.vae}: the data of this run are no latents."
            )
        pictures = options.vae is not None or (not stored and shape[0] == 3)
        folder = SampleFolder(
            options.folder(loaded),
            "pictures" if pictures else "latents",
            options.count,
            options.batch_size,
        )
        settings = options.settings(loaded) | {"kind": folder.kind}
        _start(folder, settings, ranks, options.resume)

        whole = folder.file.exists()
        if options.oracle_until and not whole:
            sampler.oracle = Oracle(bank_of(data, options, sampler), module.objective.path)
        finish = finisher(data, options, shape, module.device, pictures)
        begin = time.perf_counter()
        made = _make(folder, sampler, finish, ranks)
        ranks.wait()
        if ranks.rank == 0:
            folder.join()
            _tell(folder, options, made, time.perf_counter() - begin, say)
        return folder.file


def _silent(*_: object) -> None:
    """Of several ranks the first one speaks."""


def _classes(data: Any) -> int:
    names = getattr(data, "class_names", ())
    return int(getattr(data, "num_classes", len(names)))


def _check_null_class(module: FlowMatchingModule, options: Options) -> None:
    if options.cfg_scale != 1 and getattr(module.net, "class_dropout", None) == 0:
        raise ValueError(
            f"Expected --cfg-scale 1, got {options.cfg_scale:g}: the network was trained with "
            "class_dropout = 0, so it has not learned what guidance compares with."
        )


def _start(folder: SampleFolder, settings: dict[str, Any], ranks: Ranks, resume: bool) -> None:
    error = None
    if ranks.rank == 0:
        try:
            folder.start(settings, resume=resume)
        except (ValueError, OSError) as caught:
            error = str(caught)
    ranks.agree(error)


def _make(
    folder: SampleFolder,
    sampler: Sampler,
    finish: Callable[[Tensor], np.ndarray],
    ranks: Ranks,
) -> int:
    """Makes this rank's missing batches; how many samples they are."""
    mine = [b for b in folder.missing() if b % ranks.count == ranks.rank]
    total = sum(len(folder.batches[b]) for b in mine)
    about = "samples" if ranks.count == 1 else f"samples of rank 0 of {ranks.count}"
    with tqdm(total=total, desc=about, unit="sample", disable=ranks.rank > 0) as bar:
        for batch in mine:
            indices = folder.batches[batch]
            labels = sampler.labels(indices).numpy() if sampler.classes else None
            folder.write(batch, finish(sampler(indices)), labels)
            bar.update(len(indices))
    return total


def _tell(
    folder: SampleFolder,
    options: Options,
    made: int,
    seconds: float,
    say: Callable[[str], object],
) -> None:
    if folder.kind == "latents":
        say("These are latents: an evaluation suite needs pictures. Decode them with --vae.")
    where = str(folder.file)
    if options.grid:
        picture, about = folder.grid(options.grid)
        where += f"; {picture} shows {about}"
    rate = f" in {seconds:.1f} s" if made else ", all made before"
    say(f"{folder.count} samples{rate}: {where}")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options that a command line gives.

    Args:
        arguments: Default those of the process.

    Raises:
        ValueError: If one is out of range, or does not go with another.
    """
    given = vars(_parser().parse_args(arguments))
    interval, measured = given["cfg_interval"], []
    if interval == [_MEASURED]:
        measured.append("cfg_interval")
        interval = None
    elif interval is not None:
        interval = _interval(interval)
    for name in ("oracle_until", "coarse"):
        if given[name] == _MEASURED:
            measured.append(name)
            given[name] = None
    given |= {"cfg_interval": interval, "labels": _labels(given["labels"])}
    if given["steps"] is None and given["method"] in FIXED_SOLVERS:
        given["steps"] = 50
    return Options(**given, measured=tuple(measured))


def _interval(values: Sequence[str]) -> tuple[float, float]:
    try:
        low, high = map(float, values)
    except ValueError:
        raise ValueError(
            f"Expected --cfg-interval LOW HIGH or measured, got {' '.join(values)}."
        ) from None
    return low, high


def _labels(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"Expected --labels all, or numbers such as 0,3,7, got {text!r}."
        ) from None


def _time(text: str) -> float | str:
    try:
        return text if text == _MEASURED else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a time in t or {_MEASURED}, got {text!r}"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(
            "Sample from a trained run. Times are in t: 0 is noise, 1 is data. Under torchrun the "
            "ranks share the batches, and the files are the same for any number of ranks."
        ),
        epilog=(
            "examples: stagewise sample RUN --cfg-scale 2.5 --cfg-interval 0.1 0.6 --shift 0.3 | "
            "stagewise sample RUN --oracle-until measured --method euler | torchrun "
            "--nproc-per-node=8 -m stagewise.recipes.sample RUN --count 50000 --vae "
            "stabilityai/sd-vae-ft-mse"
        ),
    )
    add = parser.add_argument
    add("run", type=Path, help="folder of a run, with config.yaml and checkpoints")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a path, or a name in the run's checkpoints (the newest last*.ckpt)",
    )
    add(
        "--weights",
        choices=["averaged", "current"],
        help="which weights of the checkpoint (averaged, if there are any)",
    )
    add("--count", type=int, default=64, help="how many samples (%(default)s)")
    add("--batch-size", type=int, default=32, help="(%(default)s)")
    add(
        "--labels",
        default="all",
        help="all, for the classes in turn, or such as 0,3,7, in turn (%(default)s)",
    )
    add(
        "--method",
        choices=FIXED_SOLVERS + ADAPTIVE_SOLVERS,
        default="midpoint",
        metavar="SOLVER",
        help=f"with given steps {', '.join(FIXED_SOLVERS)}; which choose their own "
        f"{', '.join(ADAPTIVE_SOLVERS)} (%(default)s)",
    )
    add("--steps", type=int, help="of a solver with given steps (50)")
    add(
        "--shift",
        type=float,
        default=1.0,
        metavar="S",
        help="times t -> S t / (1 + (S - 1) t); below 1 more steps near noise (%(default)s)",
    )
    add(
        "--coarse",
        type=_time,
        metavar="T",
        help="one large step from noise to T, the other steps from there; measured: T is the "
        "midpoint that the run measured",
    )
    add(
        "--cfg-scale",
        type=float,
        default=1.0,
        metavar="W",
        help="classifier-free guidance; 1 is none (%(default)s)",
    )
    add(
        "--cfg-interval",
        nargs="+",
        metavar=("LOW", "HIGH"),
        help="guide between these times only; measured: from where the run measured that targets "
        "have collapsed to 0.6",
    )
    add("--cfg-channels", type=int, metavar="N", help="guide only the first N channels")
    add(
        "--oracle-until",
        type=_time,
        metavar="T",
        help="the oracle of the training data leads to T, the network from there; measured: T is "
        "the midpoint that the run measured",
    )
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--vae", metavar="PATH", help="autoencoder that decodes latents, a folder or a name")
    add("--out", type=Path, metavar="DIR", help="(RUN/samples/ and a name made of the settings)")
    add("--device", help="cpu, cuda, cuda:1, mps (cuda if there is one)")
    add("--precision", choices=["32", "bf16"], default="32", help="of the network (%(default)s)")
    add("--grid", type=int, default=64, help="samples in the PNG; 0 for none (%(default)s)")
    add("--resume", action="store_true", help="go on with the samples that are in the folder")
    add(
        "--timeout",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="how long ranks wait for one another (%(default)s)",
    )
    return parser


def main() -> None:
    """The entry point of `stagewise sample`."""
    try:
        run(parse())
    except (ValueError, OSError, MemoryError, ImportError, HydraException) as error:
        sys.exit(f"stagewise sample: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
