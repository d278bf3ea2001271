"""`stagewise make-latents`: synthetic latents in any format."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from stagewise.latents import make_latents
from stagewise.latents.opening import FORMATS
from stagewise.recipes.arguments import DTYPES, Parser, exit_with_message

__all__ = ["main", "parser"]


def parser() -> Parser:
    """The arguments of `stagewise make-latents`."""
    made = Parser(
        prog="stagewise make-latents",
        description=(
            "Make synthetic latents with classes and the power spectrum of natural pictures, in "
            "the formats of the public projects."
        ),
        epilog="example: stagewise make-latents vavae --rows 20000 --shape 32 16 16 --classes 16",
    )
    add, value = made.add_argument, "(%(default)s)"
    shape: Any = {"default": [4, 32, 32], "metavar": ("C", "H", "W"), "help": "(4 32 32)"}
    add("path", type=Path, help="a new folder; a file for plain; a .zip for repa or edm2")
    add("--rows", type=int, default=10_000, dest="num_rows", help=value)
    add("--shape", type=int, nargs=3, **shape)
    add("--classes", type=int, default=10, dest="num_classes", help=value)
    add("--format", default="lightningdit", choices=list(FORMATS), help=value)
    add("--seed", type=int, default=0, help=value)
    add("--exponent", type=float, default=2.0, help=f"of the power spectrum {value}")
    add("--duplicates", type=int, default=0, help=f"rows that equal other rows {value}")
    add("--shard-size", type=int, default=10_000, help=value)
    add("--dtype", choices=list(DTYPES), default="float32", help=f"of the files {value}")
    return made


def main() -> None:
    """The entry point of `stagewise make-latents`."""
    options = vars(parser().parse_args())
    options |= {"shape": tuple(options["shape"]), "dtype": DTYPES[options["dtype"]]}
    with exit_with_message("make-latents"):
        path = make_latents(**options)
        about = f"{options['num_rows']} rows of {options['shape']}, {options['format']}"
        print(f"{about}: {path}. Next: stagewise profile {shlex.quote(str(path))}")


if __name__ == "__main__":
    main()
