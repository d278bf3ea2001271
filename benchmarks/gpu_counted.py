"""What the oracle costs on a CUDA device, counted: the real code on fake tensors of real sizes.

Nothing is measured. A fake tensor has a shape and no numbers, and raises when it is read: code that
passes waits for nothing but copies from the host, which are counted. Each operation takes at least
the time of its bytes or its products at the rates below, and the host about 5 us.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from tables import table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stagewise import LatentBank, Oracle
from stagewise.engines import fused

ROWS, SHAPE, CLASSES, LARGEST = 1_281_167, (4, 32, 32), 1000, 1300
BANDWIDTH, LAUNCH = 4.3e12, 5e-6
RATES = {torch.bfloat16: 750e12, torch.float16: 750e12, torch.float32: 48e12, torch.float64: 55e12}
"""One H200, assumed: bytes copied a second, seconds of a launch, operations a second."""

VIEWS = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "t"),
    *("transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "empty", "empty_like"),
    *("new_empty", "split_with_sizes", "scalar_tensor"),
}

BEFORE = {
    ("class", "bfloat16", 256): (6016, 11, 1.4, 30),
    ("class", "bfloat16", 32): (1016, 11, 0.19, 5.1),
    ("class", "float32", 256): (1627, 11, 2.5, 8.1),
    ("all rows", "bfloat16", 256): (670, 18, 33.6, 3.4),
    ("all rows", "float32", 256): (613, 18, 124, 3.1),
}
"""Launches, waits, ms of the device and of the host, of the engine before there were kernels."""


class Counted(TorchDispatchMode):
    """Launches, copies that wait, and the least seconds of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits = 0
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        outs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if _there(x)]
        if name == "launch":
            self._kernel(*args)
        elif outs and name not in VIEWS:
            self.names[name] += 1
            given = [x for x in args if isinstance(x, torch.Tensor)]
            self.waits += any(x.ndim and x.device.type == "cpu" for x in given)
            # A few rows of a bank are not all of it.
            size = sum(x.nbytes for x in outs)
            size += size if name in ("index", "index_select") else sum(x.nbytes for x in given)
            operations = 0
            if name in ("mm", "bmm"):
                operations = 2 * outs[0].numel() * args[0].shape[-1]
            if name == "topk":  # a selection by digits, four of 8 bits
                size += 3 * args[0].nbytes
            self._add(size, operations, args[0].dtype if given else torch.float32)
        return out

    def _kernel(self, name: str, grid: Any, read: Any, written: Any, numbers: Any, *_: Any) -> None:
        self.names[name] += 1
        if name in ("pull", "merge") and numbers[-1]:  # of chosen queries: none, as a rule
            return
        size, operations = sum(x.nbytes for x in written), 0
        if name == "pull":
            rows, width = read[0], numbers[0]
            size += rows.element_size() * rows.shape[1] * len(read[1]) * width
            operations = 8 * size // rows.element_size()
        else:
            size += sum(x.nbytes for x in read)
        self._add(size, operations, torch.float32)

    def _add(self, size: float, operations: float, dtype: torch.dtype) -> None:
        self.seconds += max(size / BANDWIDTH, operations / RATES.get(dtype, 48e12))

    @property
    def launches(self) -> int:
        return sum(self.names.values())


def _there(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_cuda


def large_bank(small: LatentBank, dtype: torch.dtype) -> LatentBank:
    """The bank of ImageNet's latents without numbers, inside a `FakeTensorMode`."""
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cuda"}
    large = object.__new__(LatentBank)
    large.__dict__.update(small.__dict__, shape=SHAPE, largest_class=LARGEST, _class_table={})
    dim = torch.Size(SHAPE).numel()
    large.rows = torch.empty(ROWS, dim, dtype=dtype, device="cuda")
    large.offset, large.centre = torch.empty(2, dim, **wide)
    large.sq_norms, large.mean_sq_norm = torch.empty(ROWS, **wide), torch.empty((), **wide)
    return large


def cases() -> dict[tuple[str, str, int], Counted]:
    """One `Oracle.correction` each, as `BEFORE` has them."""
    small = LatentBank(torch.randn(2 * CLASSES, 4), torch.arange(2 * CLASSES) // 2)
    small = LatentBank(small.rows, torch.arange(2 * CLASSES) // 2, dtype=torch.bfloat16)
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for over, dtype, count in BEFORE:
            oracle = Oracle(large_bank(small, getattr(torch, dtype)))
            xt = torch.empty(count, *SHAPE, device="cuda")
            t = torch.empty(count, device="cuda")
            labels = torch.empty(count, dtype=torch.int64, device="cuda")
            # As if no reason not to use the kernels were known, whatever is installed here.
            with patch.object(fused, "_said", set()):
                oracle.bank.class_table(xt.device)  # goes to the device once
                with Counted() as counts:
                    oracle.correction(xt, t, xt, labels if over == "class" else None)
            found[over, dtype, count] = counts
    return found


def counted() -> str:
    """The table of docs/engines.md."""
    head = ["one correction", "launches", "waits", "device at least", "host about"]
    lines = []
    for (over, dtype, count), counts in cases().items():
        launches, waits, device, host = BEFORE[over, dtype, count]
        now = (f"{1e3 * counts.seconds:.2g}", f"{1e3 * LAUNCH * counts.launches:.2g}")
        cells = (f"{launches} -> {counts.launches}", f"{waits} -> {counts.waits}")
        times = (f"{device:g} -> {now[0]} ms", f"{host:g} -> {now[1]} ms")
        lines.append([f"{over}, {dtype}, {count} queries", *cells, *times])
    return table(head, lines)
