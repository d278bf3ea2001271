"""`stagewise make-latents`: made-up latents in any format, to try things on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from stagewise.latents import make_latents

__all__ = ["main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(
            "Make latents with classes and the power spectrum of natural pictures, written as "
            "the public projects write theirs."
        ),
        epilog="example: stagewise make-latents vavae --rows 20000 --shape 32 16 16 --classes 16",
    )
    parser.add_argument("path", type=Path, help="a folder; a file for plain; a .zip for repa, edm2")
    parser.add_argument("--rows", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[4, 32, 32], metavar=("C", "H", "W"), help="(4 32 32)"
    )
    parser.add_argument("--classes", type=int, default=10, help="(%(default)s)")
    parser.add_argument(
        "--format",
        default="lightningdit",
        choices=["lightningdit", "fast-dit", "repa", "edm2", "mar", "plain"],
        help="(%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--exponent", type=float, default=2.0, help="of the power spectrum (%(default)s)"
    )
    parser.add_argument(
        "--duplicates", type=int, default=0, help="rows that are copies of others (%(default)s)"
    )
    parser.add_argument("--shard-size", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), default="float32", help="as stored (%(default)s)"
    )
    return parser


def main() -> None:
    """The entry point of `stagewise make-latents`."""
    options = _parser().parse_args()
    try:
        path = make_latents(
            options.path,
            options.rows,
            tuple(options.shape),
            options.classes,
            options.format,
            seed=options.seed,
            exponent=options.exponent,
            duplicates=options.duplicates,
            shard_size=options.shard_size,
            dtype=_DTYPES[options.dtype],
        )
    except (ValueError, OSError) as error:
        sys.exit(f"stagewise make-latents: {' '.join(str(error).split())}")
    print(f"{options.rows} rows of {tuple(options.shape)}, {options.format}: {path}")


if __name__ == "__main__":
    main()
