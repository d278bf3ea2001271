"""How much memory a bank needs, and how much there is."""

from __future__ import annotations

import math
import os

import torch

__all__ = ["available_memory", "format_bytes", "oracle_device", "require_memory"]


def available_memory(device: torch.device | str = "cpu") -> float | None:
    """Bytes that can still be allocated on `device`, or None if that is unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        # Memory that torch has reserved and does not use is free too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min(free, _control_group())


def _control_group() -> float:
    """What a container's limit (cgroup v2) leaves; infinite without one."""
    folder = "/sys/fs/cgroup"
    try:
        with open(f"{folder}/memory.max") as limit, open(f"{folder}/memory.current") as current:
            with open(f"{folder}/memory.stat") as stat:
                reclaimable = next(int(line.split()[1]) for line in stat if "inactive_file" in line)
            return int(limit.read()) - int(current.read()) + reclaimable
    except (OSError, ValueError, StopIteration):  # no such files, or the limit is "max"
        return math.inf


def oracle_device(device: torch.device) -> torch.device:
    """The device for an oracle beside a model on `device`: MPS lacks the float64 it needs."""
    return torch.device("cpu") if device.type == "mps" else device


def format_bytes(count: float) -> str:
    """A number of bytes as text, such as "10.5 GB"."""
    unit = max(0, min(4, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**unit:.{1 if unit else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def require_memory(num_rows: int, dim: int, dtype: torch.dtype, copies: int = 1) -> None:
    """Refuses N x D numbers, in each of `copies` processes, that do not fit into host memory."""
    need, have = copies * num_rows * dim * dtype.itemsize, available_memory()
    if have is None or need <= have:
        return
    half = copies * num_rows * dim * 2
    rounding = f"dtype=torch.bfloat16 ({format_bytes(half)}), " if half < need else ""
    each = f", once in each of {copies} processes," if copies > 1 else ""
    raise MemoryError(
        f"A bank of {num_rows} rows x {dim} numbers in {dtype}{each} needs {format_bytes(need)}, "
        f"and {format_bytes(have)} are available. Ways to make it fit: {rounding}a subset of the "
        f"rows (num_rows={int(num_rows * have / need * 0.8)}; the boundary is then measured a "
        "little early, as with any smaller data set), a bank of some classes only, or one on disk, "
        "memory-mapped: LatentBank.write(path, batches, num_rows)."
    )
