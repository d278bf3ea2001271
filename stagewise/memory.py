"""How much memory a bank needs, how much there is, and what to say when it does not fit."""

from __future__ import annotations

import os

import torch

__all__ = ["available_memory", "require_memory"]


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on `device`, or None where that cannot be told."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return None


def require_memory(num_rows: int, dim: int, dtype: torch.dtype) -> None:
    """Refuses a bank that would not fit into host memory.

    Args:
        num_rows: Rows, N.
        dim: Numbers in a row, D.
        dtype: Storage dtype.

    Raises:
        MemoryError: If the rows need more than is available, with the ways to make them fit.
    """
    need, have = num_rows * dim * dtype.itemsize, available_memory()
    if have is None or need <= have:
        return
    half = (
        "" if dtype.itemsize <= 2 else f"dtype=torch.bfloat16 ({num_rows * dim * 2 / 1e9:.1f} GB), "
    )
    raise MemoryError(
        f"A bank of {num_rows} rows x {dim} numbers in {dtype} needs {need / 1e9:.1f} GB, and "
        f"{have / 1e9:.1f} GB are available. Ways to make it fit: {half}a subset of the rows "
        f"(num_rows={int(num_rows * have / need * 0.8)}; the boundary is then measured a little "
        "early, as with any smaller data set), or a bank of some classes only."
    )
