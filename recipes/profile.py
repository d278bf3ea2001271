"""`stagewise profile`: the stages of a set of latents, before training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stagewise.callbacks.drawing import render
from stagewise.files import replace_file
from stagewise.latents import Latents, open_latents
from stagewise.latents.opening import FORMATS
from stagewise.profile import Profile
from stagewise.recipes.arguments import DTYPES, Parser, exit_with_message
from stagewise.recipes.profile_figures import comparison_figure, profile_figure
from stagewise.recipes.profile_report import Profiled, comparison, report

__all__ = ["main", "parser", "rows_within", "run"]


def _profiled(latents: Latents, name: str, options: argparse.Namespace) -> Profiled:
    """Reads latents into a bank and profiles it."""
    fixed, class_wise, limit = latents.fixed(), options.class_wise, options.limit
    labels = fixed.labels
    if class_wise and labels is None:
        raise ValueError(
            f"A class-wise profile needs labels, but {latents.path} has none. Use --no-class-wise."
        )
    class_wise = labels is not None if class_wise is None else class_wise
    chosen = None
    if limit is not None and limit < len(fixed):
        chosen = rows_within(limit, len(fixed), labels if class_wise else None)
    bank = fixed.bank(dtype=DTYPES[options.dtype], indices=chosen)
    found = Profile.measure(bank, class_wise=class_wise, queries=options.queries, seed=options.seed)
    note = ""
    if chosen is not None:
        note = f"{len(chosen)} of {len(fixed)} rows, evenly spaced: with all rows the boundary is "
        note += "later, since log N is larger."
        if class_wise:
            note = f"{len(chosen)} of {len(fixed)} rows: whole classes, evenly spaced. If classes "
            note += "are alike, the class-wise boundary is that of all rows."
    return Profiled(name, latents, found, len(fixed), note)


def rows_within(limit: int, total: int, labels: Tensor | None) -> Tensor:
    """At most `limit` rows, ascending: whole classes, or without labels evenly spaced rows."""
    if labels is None:
        return torch.arange(limit) * total // limit
    names, counts = labels.unique(return_counts=True)
    # First as many classes as fit if all have the mean size, then fewer until they fit.
    for count in range(max(1, min(len(names), limit * len(names) // total)), 0, -1):
        taken = torch.arange(count) * len(names) // count
        if int(counts[taken].sum()) <= limit or count == 1:
            return torch.isin(labels, names[taken]).nonzero()[:, 0]
    raise AssertionError("one class is always taken")


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names for files, all different."""
    names = [path.resolve().name or "latents" for path in paths]
    if len(set(names)) < len(names):
        parents = [path.resolve().parent.name for path in paths]
        names = [f"{parent}_{name}" for parent, name in zip(parents, names, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{at}_{name}" for at, name in enumerate(names, 1)]
    return names


def parser() -> Parser:
    """The arguments of `stagewise profile`."""
    made = Parser(
        prog="stagewise profile",
        description=(
            "Profile latents before training: size, scale, duplicates, spectrum, stage boundary "
            "(predicted and measured), engine and memory. Two sets are compared."
        ),
        epilog=(
            "examples: stagewise profile imagenet_vavae --limit 20000 | stagewise profile vavae "
            "sdvae --scale stats 0.18215 | stagewise profile latents.npy --no-class-wise"
        ),
    )
    add, formats = made.add_argument, ["auto", *FORMATS]
    # fmt: off
    add("latents", nargs="+", type=Path, help="one or two folders or files: LightningDiT, "
        "fast-DiT, REPA, EDM2, MAR, or one plain .safetensors, .npy, .npz or .pt file")
    add("--output", type=Path, default=Path("profile"), help="folder for PNG and JSON "
        "(%(default)s)")
    add("--limit", type=int, help="read at most so many rows: whole classes if class-wise, else "
        "evenly spaced rows")
    add("--format", nargs="+", default=["auto"], choices=formats, metavar="FORMAT", help="one for "
        "both sets or one for each: %(choices)s; repa and edm2 must be given, since their files "
        "have the same names (auto)")
    add("--scale", nargs="+", default=["auto"], metavar="SCALE", help="scale of the rows, one for "
        "both sets or one for each: auto (that of the format), stats (LightningDiT's "
        "latents_stats.pt), or a factor, such as 0.18215 for LightningDiT shards of Stable "
        "Diffusion's autoencoder")
    add("--expected-std", type=float, help="expected standard deviation of the scaled latents; "
        "others are refused (1, and 0.5 for edm2)")
    add("--queries", type=int, default=64, help="queries in each of 24 strata of t (%(default)s)")
    add("--seed", type=int, default=0, help="of the queries (%(default)s)")
    add("--dtype", default="float32", choices=list(DTYPES), help="of the bank (%(default)s)")
    add("--class-wise", action=argparse.BooleanOptionalAction, help="class-wise posterior "
        "(default: if there are labels)")
    add("--flips", action="store_true", help="use stored flips as further rows")
    # fmt: on
    return made


def _each(values: Sequence[str], count: int, name: str) -> list[str]:
    if len(values) not in (1, count):
        raise ValueError(f"Expected one {name} or one for each of {count} sets, got {values}.")
    return list(values) * (count // len(values))


def _open(path: Path, kind: str, scale: str, options: argparse.Namespace) -> Latents:
    chosen: dict[str, Any] = {}
    if scale not in ("auto", "stats"):
        try:
            chosen["multiplier"] = float(scale)
        except ValueError:
            raise ValueError(f"Expected --scale auto, stats or a number, got {scale!r}.") from None
        shards = kind == "auto" and path.is_dir() and any(path.glob("*.safetensors"))
        if shards or kind == "lightningdit":
            chosen["normalize"] = False
    latents_format: Any = None if kind == "auto" else kind
    chosen |= {"expected_std": options.expected_std, "on_error": "skip", "moments": "mean"}
    latents = open_latents(path, latents_format, **chosen)
    return latents.with_options(flips="both") if options.flips else latents


def run(options: argparse.Namespace) -> None:
    """Profiles the named latents; prints and writes the results."""
    paths = options.latents
    if len(paths) > 2:
        raise ValueError(f"Expected one or two sets of latents, got {len(paths)}.")
    for name in ("limit", "queries"):
        if (value := getattr(options, name)) is not None and value < 2:
            raise ValueError(f"Expected --{name} of at least 2, got {value}.")
    formats = _each(options.format, len(paths), "--format")
    scales = _each(options.scale, len(paths), "--scale")
    # All are opened before the first is read, so that an error in the second comes at once.
    sets = [_open(*each, options) for each in zip(paths, formats, scales, strict=True)]
    found = []
    for latents, name in zip(sets, _names(paths), strict=True):
        found.append(_profiled(latents, name, options))
        print(report(found[-1]), end="\n\n")
    figures = {one.name: profile_figure(one.profile, one.name) for one in found}
    if len(found) == 2:
        print(comparison(*found), end="\n\n")
        figures["comparison"] = comparison_figure({one.name: one.profile for one in found})
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([one.as_dict() for one in found], indent=1, allow_nan=False)
    replace_file(folder / "profile.json", lambda file: file.write_text(text + "\n"))
    print(f"Written: {folder / 'profile.json'}")
    for name, figure in figures.items():
        file = folder / f"{name}.png"
        image = Image.fromarray(render(figure))
        replace_file(file, partial(image.save, format="png"))
        print(f"         {file}")


def main() -> None:
    """The entry point of `stagewise profile`."""
    with exit_with_message("profile"):
        run(parser().parse_args())


if __name__ == "__main__":
    main()
