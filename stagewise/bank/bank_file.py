"""A bank as one safetensors file; opening it reads everything except the rows.

    8 bytes        length of the header
    header         JSON: where each tensor is; what the bank is, as strings; checksums
    offset, centre (D,); sq_norms, keys, index (N,); classes, starts, stops (C,)   64-bit each
    masks, labels  (C, M) of bools and (C,): what each class stands for, of a bank with masks
    conditions     (N, C), as stored, of a bank with conditions
    rows           (N, D), as stored, from a page boundary to the end

The header is padded with spaces, as the format allows, so that the rows begin at a page boundary:
their mapping is aligned for every instruction, and the header can be written after the rows. If the
file of an open bank is replaced, the bank keeps the older file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stagewise.bank.building import measure
from stagewise.bank.rows import RowStore
from stagewise.bank.streaming import MappedFile
from stagewise.files import Damaged, FilePath, replace_file
from stagewise.masks import MaskedLabels
from stagewise.memory import format_bytes
from stagewise.tensor_files import lay_out, pack_header, read_header

__all__ = ["open_bank", "read_rows", "write_bank"]

Bank = TypeVar("Bank", bound=RowStore)

_VERSION = 2
"""For banks with masks or conditions; others have version 1, for older readers."""

_PAGE = 4096


def _layout(
    num_rows: int,
    dim: int,
    dtype: torch.dtype,
    num_classes: int,
    mask_size: int,
    labelled: bool,
    conditions: tuple[torch.dtype, tuple[int, ...]] | None,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor in the file of a bank, in order."""
    n, d, c = (num_rows,), (dim,), (num_classes,)
    wide, whole = torch.float64, torch.int64
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    layout = {"offset": (wide, d), "centre": (wide, d), "sq_norms": (wide, n), "keys": (whole, n)}
    if num_classes:
        layout |= {"index": (whole, n), "classes": (whole, c)}
        layout |= {"starts": (whole, c), "stops": (whole, c)}
    if mask_size:
        layout["masks"] = torch.bool, (num_classes, mask_size)
        layout |= {"labels": (whole, c)} if labelled else {}
    layout |= {"conditions": conditions} if conditions else {}
    return {**layout, "rows": (dtype, n + d)}


def write_bank(path: FilePath, bank: Any, fill: Callable[[Tensor], object]) -> None:
    """Writes the file of a bank, which gets its name when it is complete and on the disk.

    Refuses a folder that does not exist, and a disk without room for it. `fill` fills the rows,
    (N, D), which are mapped to the file; those of the bank need not be known before.
    """
    pairs, c = bank.pairs, bank.conditions
    size = 0 if pairs is None else pairs.mask[0].numel()
    labelled = pairs is not None and pairs.labels is not None
    given = None if c is None else (c.dtype, tuple(c.shape))
    header, end = lay_out(
        _layout(len(bank), bank.dim, bank.dtype, len(bank.classes), size, labelled, given)
    )
    begin = header["rows"]["data_offsets"][0]
    # At least a page for the header, which takes about a quarter of it.
    data = _PAGE + -begin % _PAGE
    _require_disk(Path(path).parent, data + end)

    def write(partial: Path) -> None:
        with open(partial, "w+b") as file:
            if hasattr(os, "posix_fallocate"):
                # Writing to a mapped hole on a full disk would end the process.
                os.posix_fallocate(file.fileno(), 0, data + end)
            else:
                file.truncate(data + end)
            pages = mmap.mmap(file.fileno(), data + end)
            flat = torch.frombuffer(pages, dtype=bank.dtype, offset=data + begin)
            fill(flat.view(len(bank), bank.dim))
            tensors, about = _contents(bank)
            sums = {}
            for name, entry in header.items():
                first, last = (data + place for place in entry["data_offsets"])
                if name != "rows":
                    part = tensors[name].cpu().contiguous().view(torch.uint8).numpy()
                    pages[first:last] = part.tobytes()
                with memoryview(pages) as every, every[first:last] as written:
                    sums[name] = zlib.crc32(written)
            text = pack_header(header, about, sums)
            assert len(text) <= data - 8
            pages[:data] = (data - 8).to_bytes(8, "little") + text.ljust(data - 8)
            pages.flush()

    replace_file(path, write)


def _contents(bank: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a bank except its rows, and its metadata."""
    tensors = {name: getattr(bank, name) for name in ("offset", "centre", "sq_norms")}
    tensors["keys"] = bank.row_keys()
    if bank.classes:
        columns = zip(("classes", "starts", "stops"), torch.tensor(bank.class_ends).T, strict=True)
        own = torch.arange(len(bank)) if bank.index is None else bank.index
        tensors |= {"index": own, **dict(columns)}
    about = {"format": "pt", "stagewise_bank": "1", "shape": json.dumps(bank.shape)}
    if bank.pairs is not None:
        mask, labels = bank.pairs.mask, bank.pairs.labels
        tensors |= {"masks": mask.flatten(1)} | ({} if labels is None else {"labels": labels})
        about |= {"stagewise_bank": str(_VERSION), "mask_shape": json.dumps(mask.shape[1:])}
    if bank.conditions is not None:
        tensors["conditions"] = bank.conditions
        about["stagewise_bank"] = str(_VERSION)
    about |= {"fingerprint": bank.fingerprint, "radius": repr(bank.radius)}
    return tensors, {**about, "max_norm": repr(bank.max_norm), "std": repr(bank.std)}


def _require_disk(folder: Path, need: int) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder for the bank, got {folder}: no such folder.")
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"The bank needs {format_bytes(need)} on disk, and {format_bytes(free)} are free in "
            f"{folder}. Make room, choose another folder, or store it as dtype=torch.bfloat16."
        )


def open_bank(path: FilePath, make: Callable[..., Bank]) -> Bank:
    """Opens a file; its rows are mapped, not read. `make` takes the arguments of `RowStore`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the file of a bank, got {path}: no such file. "
            "LatentBank.save(path) and LatentBank.write(path, ...) make one."
        )
    entries, about = read_header(path)
    needed = ("rows", "offset", "centre", "sq_norms", "keys")
    missing = [name for name in needed if name not in entries]
    if missing or "stagewise_bank" not in about:
        raise ValueError(
            f"Expected the file of a bank, got {path}, a safetensors file with {sorted(entries)} "
            f"and without {missing or 'the metadata of a bank'}. To make a bank of its tensors: "
            "LatentBank(x, labels).save(path)."
        )
    version = about["stagewise_bank"][:20]
    if version not in ("1", str(_VERSION)):
        raise ValueError(
            f"{path} was written by a later version of stagewise (file version {version}, this one "
            f"reads up to {_VERSION}). Update stagewise."
        )
    stored = entries["rows"]
    num_classes = math.prod(entries["classes"].shape) if "classes" in entries else 0
    size = math.prod(entries["masks"].shape[1:]) if "masks" in entries else 0
    held = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if (given := held.get("conditions")) is not None:
        given = given[0], (*stored.shape[:1], *given[1][1:])
    more = stored.dtype, num_classes, size, "labels" in entries, given
    right = len(stored.shape) == 2 and stored.dtype.is_floating_point
    if not right or held != _layout(stored.shape[0], stored.shape[1], *more):
        raise Damaged.of(path, f"expected the tensors of a bank, got {held}")
    has = {name: entry.read() for name, entry in entries.items() if name != "rows"}
    index = has.get("index", torch.arange(1))
    if not (has["sq_norms"] >= 0).all() or index.amin() < 0 or index.amax() >= stored.shape[0]:
        raise Damaged.of(path, "distances are negative, or positions are out of range")
    columns = [has[name].tolist() for name in ("classes", "starts", "stops") if num_classes]
    segments = {label: slice(*ends) for label, *ends in zip(*columns, strict=True)}
    rows, pages = stored.map()
    shape, mapped = _sample_shape(about.get("shape", "")), MappedFile(pages, stored.start)
    pairs = None
    if size:
        mask = has["masks"].reshape(-1, *_sample_shape(about.get("mask_shape", "")))
        pairs = MaskedLabels(has.get("labels"), mask, shape)
    bank = make(rows, has["offset"], shape, has.get("index"), segments, mapped, has["keys"], pairs)
    bank.conditions, bank._unread = has.get("conditions"), path
    bank.centre, bank.sq_norms = has["centre"], has["sq_norms"]
    if bank.fingerprint != about.get("fingerprint"):
        raise Damaged.of(path, "its fingerprint is not that of what it holds")
    return bank


def read_rows(path: FilePath, bank: RowStore) -> None:
    """Reads the rows of an open bank, and refuses it if anything is not as it was written."""
    bank.require_intact()
    if read_header(path)[0]["rows"].verify():
        return  # the other tensors have checksums too, which were compared at opening
    mean, sq_norms = measure(bank.rows, bank.index)
    index = bank.index
    if not (
        torch.allclose(mean + bank.offset, bank.centre, rtol=1e-9, atol=1e-12)
        and torch.allclose(sq_norms, bank.sq_norms, rtol=1e-9, atol=0)
        and (index is None or torch.equal(index.sort().values, torch.arange(len(index))))
    ):
        raise Damaged.of(path, "its mean, distances or positions are not those of its rows")


def _sample_shape(text: str) -> tuple[int, ...]:
    """The shape in the metadata; empty if it is none, which no fingerprint has."""
    try:
        return tuple(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return ()
