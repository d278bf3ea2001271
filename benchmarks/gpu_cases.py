"""What `benchmarks/gpu.py` measures on a card, with data made there, of ImageNet's sizes.

Every case takes a device, sizes, and a clock of the seconds left, and returns rows of plain
numbers. On a CPU with `SMALL` sizes all of it runs too: its logic, not its times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from measure import first_line
from torch import Tensor

from stagewise import LatentBank, LinearPath, Mix, Oracle, Scheme
from stagewise.engines import Exact
from stagewise.products import full_precision, rounding, scores

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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def clock(run: Callable[[int], Any], device: torch.device, turns: int) -> tuple[float, float]:
    """Medians in ms: the time of a call on the device, and the time until it returns."""
    for turn in range(2):
        run(turn)
    spent, host, cuda = [], [], device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
    for turn in range(turns):
        _wait(device)
        start = time.perf_counter()
        for event in events[:1]:
            event.record()
        run(turn)
        for event in events[1:]:
            event.record()
        host.append(1e3 * (time.perf_counter() - start))
        _wait(device)
        spent.append(events[0].elapsed_time(events[1]) if cuda else host[-1])
    return statistics.median(spent), statistics.median(host)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """What the card does at best."""
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
            spent = clock(lambda _: a @ a, device, 3)[0]  # noqa: B023
        found.append(
            {"what": name_of(dtype), "unit": "TFLOP/s", "reached": 2 * side**3 / spent / 1e9}
        )
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
    """Largest error against differences in float64, duplicates included."""
    count, dim = sizes.right
    found: Rows = []
    for dtype in DTYPES:
        bank = made(count, (dim,), min(20, sizes.classes), dtype, device)
        reference = Oracle(bank, engine=Exact("float64"))
        for over, engine, t in product(("class", "all rows"), (Exact(), Exact("float32")), TIMES):
            if left() < 0:
                return found
            oracle = Oracle(bank, engine=engine)
            xt, times, x1, labels = asked(bank, 8, t)
            known = labels if over == "class" else None
            exact, x = reference.posterior(xt, times, known).mean, x1.double()
            off = oracle.correction(xt, times, x1, known, prediction="data").double()
            mean = oracle.posterior(xt, times, known).mean
            # At t = 0 the mean is that of all rows, and the difference one of rounding.
            spread = (exact - bank.centre).norm(dim=1).clamp_min(1e-8)
            pull = (exact - x).norm(dim=1).clamp_min(1e-8)
            about = {"rows": name_of(dtype), "over": over, "engine": repr(engine), "t": t}
            errors = {
                "mean": (mean - exact).norm(dim=1) / spread,
                "pull": (off - (exact - x)).norm(dim=1) / pull,
            }
            found.append(about | {key: float(error.max()) for key, error in errors.items()})
    return found


def digits(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """Rounding of products, in units of what `products.rounding` says."""
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
        for what, some in (("own row", share[:32, :32].diagonal()), ("other rows", share[32:])):
            deviation = float(some.square().mean().sqrt())
            found.append({"rows": name_of(dtype), "what": what, "of said": deviation})
    return found


def waited(call: Callable[[], Any], device: torch.device) -> str:
    """Where the host waits for the device, in either direction."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return first_line(error)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return "none"


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
    """Waits for the device and kernels started."""
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
        for _ in range(3):
            expected = call()
        row = {"call": name, "waits": waited(call, device), "launches": launched(call, device)}
        found.append({**row, "graph": captured(call, expected, device)})
    return found


def captured(call: Callable[[], Tensor], expected: Tensor, device: torch.device) -> str:
    """Whether a graph of the call gives the same."""
    if device.type != "cuda":
        return "no card"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            answer = call()
        graph.replay()
        _wait(device)
    except RuntimeError as error:
        return first_line(error)
    return "the same bits" if torch.equal(answer, expected) else "other numbers"
