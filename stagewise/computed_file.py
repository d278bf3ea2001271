"""What was computed for a bank once and is kept in a file: written whole, read if it still fits."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["is_computed", "read_header", "write_tensors"]


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, str]
) -> None:
    """Writes a safetensors file, in one step: there is never half a file at `path`."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        save_file(tensors, partial, metadata=header)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_header(path: str | os.PathLike[str], kind: str, name: str) -> dict[str, str]:
    """What a file says about itself.

    Args:
        path: The file.
        kind: The "format" that its header must have.
        name: What it should be, for the message: "certificate".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError:
        header = {}
    if header.get("format") != kind:
        raise ValueError(
            f"Expected a {name} in {os.fspath(path)}, got another file. Choose another path."
        )
    return header


def is_computed(path: str | os.PathLike[str], wanted: dict[str, str], name: str) -> bool:
    """Whether the file at `path` is the one asked for; warns if it is another of its kind.

    Args:
        path: The file, which need not exist.
        wanted: The header asked for; "fingerprint" is that of the bank.
        name: What it should be: "certificate".

    Raises:
        ValueError: If there is a file of another kind.
    """
    if not os.path.exists(path):
        return False
    found = read_header(path, wanted["format"], name)
    if found == wanted:
        return True
    kind = "other settings" if found["fingerprint"] == wanted["fingerprint"] else "other latents"
    other = [f"{key} {found.get(key)}" for key in wanted if found.get(key) != wanted[key]]
    warnings.warn(
        f"The {name} in {os.fspath(path)} belongs to {kind} ({', '.join(other)}): it is computed "
        "again and replaced.",
        stacklevel=3,
    )
    return False
