"""What `benchmarks/gpu.py` measures on a card. Data is made there; sizes are those of ImageNet.

Every case takes a device, sizes, and a clock of what is left of the time, and answers with rows of
plain numbers. On a CPU with `SMALL` sizes all of it runs too: its logic, not its times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagewise import LatentBank, LinearPath, Mix, Oracle, Scheme
from stagewise.engines import Exact
from stagewise.products import full_precision, rounding, scores

__all__ = ["SMALL", "Left", "Rows", "Sizes", "asked", "ceilings", "clock", "digits", "first_line"]
__all__ += ["made", "right", "waits"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.5, 0.9, 0.999, 1.0)
Left = Callable[[], float]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    rows: int = 1_281_167
    shape: tuple[int, int, int] = (4, 32, 32)
    classes: int = 1000
    queries: tuple[int, ...] = (32, 128, 256)
    copied: int = 2**31
    product: int = 8192
    right: tuple[int, int] = (20_000, 1024)  # rows and their numbers
    networks: tuple[str, ...] = ("SiT-S/2", "SiT-XL/2")
    steps: int = 20
    turns: int = 7

    @property
    def dim(self) -> int:
        return torch.Size(self.shape).numel()


SMALL = Sizes(2500, (4, 4, 4), 20, (4, 8), 2**16, 64, (1500, 16), ("tiny",), 3, 2)


def clock(run: Callable[[int], Any], device: torch.device, turns: int) -> tuple[float, float]:
    """Medians in ms: of what a call takes the device, and of the time until it returns."""
    for turn in range(2):
        run(turn)
    spent: list[float] = []
    host: list[float] = []
    for turn in range(turns):
        _wait(device)
        start = time.perf_counter()
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            run(turn)
            events[1].record()
            host.append(1e3 * (time.perf_counter() - start))
            _wait(device)
            spent.append(events[0].elapsed_time(events[1]))
        else:
            run(turn)
            spent.append(1e3 * (time.perf_counter() - start))
            host.append(spent[-1])
    return statistics.median(spent), statistics.median(host)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """What the card does at best: bytes it copies and reads, and products."""
    x = torch.empty(sizes.copied // 4, device=device).normal_()
    y = torch.empty_like(x)
    copied = clock(lambda _: y.copy_(x), device, sizes.turns)[0]
    read = clock(lambda _: x.sum(), device, sizes.turns)[0]
    found: Rows = [
        {"what": "copy", "unit": "TB/s", "reached": 2 * x.nbytes / copied / 1e9},
        {"what": "read", "unit": "TB/s", "reached": x.nbytes / read / 1e9},
    ]
    side = sizes.product
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.randn(side, side, device=device).to(dtype)
        with full_precision():
            spent = clock(lambda _, a=a: a @ a, device, 3)[0]
        what = str(dtype).removeprefix("torch.")
        found.append({"what": what, "unit": "TFLOP/s", "reached": 2 * side**3 / spent / 1e9})
    return found


def made(
    rows: int, shape: tuple[int, ...], classes: int, dtype: torch.dtype, device: torch.device
) -> LatentBank:
    """A bank of normal numbers, a few of its rows twice, made on the device."""
    torch.manual_seed(0)
    x = torch.empty(rows, *shape, dtype=dtype, device=device).normal_()
    x[1], x[rows - 1] = x[0], x[rows - 2]
    labels = torch.arange(rows, device=device) * classes // rows
    return LatentBank(x, labels)


def asked(
    bank: LatentBank, count: int, t: Tensor | float, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy samples of random rows: x_t, t, x_1 and their labels, all on the device."""
    device = bank.device
    generator = torch.Generator(device).manual_seed(seed)
    source = torch.randint(len(bank), (count,), generator=generator, device=device)
    source[0] = 0
    x1 = bank.take(source)
    x0 = torch.randn(x1.shape, generator=generator, device=device, dtype=torch.float64)
    time_ = torch.as_tensor(t, device=device, dtype=torch.float64).expand(count)
    xt = time_[:, None] * x1 + (1 - time_[:, None]) * x0
    ends = bank.class_ends
    stops = torch.tensor([stop for _, _, stop in ends], device=device)
    names = torch.tensor([label for label, _, _ in ends], device=device)
    labels = names[torch.searchsorted(stops, source, right=True)]
    sample = (count, *bank.shape)
    return xt.float().reshape(sample), time_.float(), x1.float().reshape(sample), labels


def right(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """Errors against differences in float64, duplicates included."""
    count, dim = sizes.right
    found: Rows = []
    for dtype in DTYPES:
        bank = made(count, (dim,), min(20, sizes.classes), dtype, device)
        reference = Oracle(bank, engine=Exact("float64"))
        for class_wise in (True, False):
            for engine in (Exact(), Exact("float32")):
                oracle = Oracle(bank, engine=engine)
                for t in TIMES:
                    if left() < 0:
                        return found
                    xt, times, x1, labels = asked(bank, 8, t)
                    labels_ = labels if class_wise else None
                    exact = reference.posterior(xt, times, labels_).mean
                    x = x1.double()
                    off = oracle.correction(xt, times, x1, labels_, prediction="data").double()
                    mean = oracle.posterior(xt, times, labels_).mean
                    pull = (exact - x).norm(dim=1)
                    centre = (exact - bank.centre).norm(dim=1)
                    found.append(
                        {
                            "rows": str(dtype).removeprefix("torch."),
                            "over": "class" if class_wise else "all rows",
                            "engine": repr(engine),
                            "t": t,
                            "mean": float(((mean - exact).norm(dim=1) / centre).max()),
                            "pull": float(
                                ((off - (exact - x)).norm(dim=1) / pull.clamp_min(1e-8)).max()
                            ),
                        }
                    )
    return found


def digits(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """`products.rounding` against products: its standard deviation in units of what is said."""
    found: Rows = []
    for dtype in DTYPES:
        rows = torch.randn(4000, sizes.dim, device=device).to(dtype)
        query = torch.randn(64, sizes.dim, dtype=torch.float64, device=device)
        query[:32] = rows[:32]  # where the terms add up
        true = query @ rows.double().T
        with full_precision():
            off = scores(query, rows if device.type == "cuda" else rows.float()) - true
        unit, growth = rounding(dtype, sizes.dim, truncates=dtype != torch.float32)
        size = query.norm(dim=1)[:, None] * rows.double().norm(dim=1)
        share = off / (unit * size + growth * true.abs())
        own = share[:32, :32].diagonal()
        others = share[32:]
        name = str(dtype).removeprefix("torch.")
        for what, some in (("own row", own), ("other rows", others)):
            found.append(
                {"rows": name, "what": what, "of said": float(some.square().mean().sqrt())}
            )
    return found


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Raises where the host waits for the device, in either direction."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launched(run: Callable[[], Any], device: torch.device) -> int:
    """Kernels that a call starts, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as report:
        run()
        _wait(device)
    there = torch.autograd.DeviceType.CUDA if device.type == "cuda" else None
    return sum(there is None or event.device_type == there for event in report.events())


def waits(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """Which calls never wait, how many kernels they start, and whether a graph holds them."""
    count = max(sizes.queries)
    bank = made(sizes.right[0], sizes.shape, 20, torch.bfloat16, device)
    xt, t, x1, labels = asked(bank, count, 0.9 * torch.rand(count, device=device))
    y = (x1 - xt) / (1 - t.reshape(-1, 1, 1, 1))
    oracle = Oracle(bank, LinearPath())
    scheme = Scheme(oracle, target=Mix())
    calls: dict[str, Callable[[], Any]] = {
        "posterior, class-wise": lambda: oracle.posterior(xt, t, labels).mean,
        "posterior, all rows": lambda: oracle.posterior(xt, t).mean,
        "correction, all rows": lambda: oracle.correction(xt, t, x1),
        "Scheme, class-wise": lambda: scheme(y, xt=xt, t=t, x1=x1, labels=labels)[0],
    }
    found: Rows = []
    for name, call in calls.items():
        row: dict[str, Any] = {"call": name, "waits": "none", "graph": "the same bits"}
        for _ in range(3):
            expected = call()
        try:
            with no_waits(device):
                call()
        except RuntimeError as error:
            row["waits"] = first_line(error)
        row["launches"] = launched(call, device)
        try:
            row["graph"] = _captured(call, expected, device)
        except RuntimeError as error:
            row["graph"] = first_line(error)
        found.append(row)
    return found


def _captured(call: Callable[[], Tensor], expected: Tensor, device: torch.device) -> str:
    if device.type != "cuda":
        return "no card"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = call()
    graph.replay()
    _wait(device)
    return "the same bits" if torch.equal(answer, expected) else "other numbers"


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:100]
