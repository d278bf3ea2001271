"""`stagewise make-latents`: made-up latents in any format, to try things on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from stagewise.latents import make_latents
from stagewise.latents.opening import FORMATS
from stagewise.recipes.arguments import Parser, ends_in_a_line

__all__ = ["main", "parser"]


def parser() -> Parser:
    """The arguments of `stagewise make-latents`."""
    made = Parser(
        prog="stagewise make-latents",
        description=(
            "Make latents with classes and the power spectrum of natural pictures, written as "
            "the public projects write theirs."
        ),
        epilog="example: stagewise make-latents vavae --rows 20000 --shape 32 16 16 --classes 16",
    )
    add, value = made.add_argument, "(%(default)s)"
    shape: Any = {"default": [4, 32, 32], "metavar": ("C", "H", "W"), "help": "(4 32 32)"}
    types = ["float32", "bfloat16", "float16"]
    add("path", type=Path, help="a folder; a file for plain; a .zip for repa, edm2")
    add("--rows", type=int, default=10_000, dest="num_rows", help=value)
    add("--shape", type=int, nargs=3, **shape)
    add("--classes", type=int, default=10, dest="num_classes", help=value)
    add("--format", default="lightningdit", choices=list(FORMATS), help=value)
    add("--seed", type=int, default=0, help=value)
    add("--exponent", type=float, default=2.0, help=f"of the power spectrum {value}")
    add("--duplicates", type=int, default=0, help=f"rows that are copies of others {value}")
    add("--shard-size", type=int, default=10_000, help=value)
    add("--dtype", choices=types, default="float32", help=f"as stored {value}")
    return made


def main() -> None:
    """The entry point of `stagewise make-latents`."""
    options = vars(parser().parse_args())
    options |= {"shape": tuple(options["shape"]), "dtype": getattr(torch, options["dtype"])}
    with ends_in_a_line("make-latents"):
        path = make_latents(**options)
        about = f"{options['num_rows']} rows of {options['shape']}, {options['format']}"
        print(f"{about}: {path}. Next: stagewise profile {shlex.quote(str(path))}")


if __name__ == "__main__":
    main()
