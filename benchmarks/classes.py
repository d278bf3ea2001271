"""Class-wise: one query for each class, where reading the rows is all there is to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import peers
import torch
from measure import Options, Row, measure, row
from report import Report

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Exact
from stagewise.memory import available_memory

ROWS, DIM = 1300, 4096


def class_wise(options: Options) -> Report:
    """100 classes of the size of ImageNet's."""
    classes = max(4, round(100 * options.scale))
    n = classes * ROWS
    report = Report(
        "class-wise", f"{classes} classes x {ROWS} rows, D={DIM}, one query for each class"
    ).start()
    need, have = 3.5 * n * DIM * 4, available_memory()
    if have is not None and have < need:
        report.note(f"skipped: needs {need / 2**30:.1f} GiB, {have / 2**30:.1f} are available")
        return report
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, DIM, generator=generator)
    labels = torch.arange(classes).repeat_interleave(ROWS)
    banks = {kind: LatentBank(x, labels, dtype=kind) for kind in (torch.float32, torch.bfloat16)}
    del x
    source = torch.arange(classes) * ROWS + torch.randint(ROWS, (classes,), generator=generator)
    names = list(range(classes))
    vector = torch.randn(DIM, generator=generator)
    flat = banks[torch.float32].rows.flatten()
    blocks, weights = flat.view(classes, ROWS, DIM), torch.rand(classes, 1, ROWS)
    reads = {
        "read: sum": lambda: flat.sum(),
        "read: dot product": lambda: torch.dot(flat, flat),
        "read: rows x vector": lambda: torch.mv(banks[torch.float32].rows, vector),
        "read: weights x rows": lambda: torch.bmm(weights, blocks),
    }
    rows = [Row(name, run) for name, run in reads.items()]
    passes: dict[str, float] = {}
    kinds: dict[str, torch.dtype] = {}
    for t_max in (0.1, 1.0):
        t = 0.001 + (t_max - 0.002) * torch.rand(classes, generator=generator)
        x0 = torch.randn(classes, DIM, generator=generator)
        for kind, bank in banks.items():
            xt = LinearPath().interpolate(x0, bank.take(source).float(), t)

            def make(bank=bank, xt=xt, t=t):
                oracle = Oracle(bank, engine=Exact())
                return lambda: oracle.posterior(xt, t, names)

            def judge(post, bank=bank, xt=xt, t=t) -> dict[str, float]:
                # A few classes: the explicit differences of all would take longer than the case.
                some = range(0, classes, max(1, classes // 8))
                errors = [
                    peers.relative(
                        post.mean[i : i + 1],
                        peers.reference(_rows(bank, i), xt[i : i + 1], t[i : i + 1])[0],
                    )
                    for i in some
                ]
                return {"error": max(errors), "tail": float(post.tail_mass.max())}

            name = f"Exact(), {str(kind)[6:]}, t~U(0, {t_max:g})"
            kinds[name] = kind
            rows.append(row(name, make, judge))
            passes[name] = _bytes_read(make) / bank.nbytes
    results = measure(rows, options.runs)
    fastest = min(
        (results[name] for name in reads if results[name].milliseconds is not None),
        key=lambda result: result.milliseconds,
    )
    bandwidth = banks[torch.float32].nbytes / fastest.milliseconds  # bytes per ms
    for name, kind in kinds.items():
        if results[name].milliseconds is not None:
            floor = banks[kind].nbytes / bandwidth
            results[name].ratio = results[name].milliseconds / floor
            share = 1 / results[name].ratio
            results[name].more = {"share": share, "passes": passes[name]}
            results[name].more["of passes"] = share * passes[name]
    columns = ["share", "passes", "of passes"]
    report.table("class-wise", list(results.values()), columns)
    best = banks[torch.float32].nbytes / fastest.best
    report.note(
        f"bandwidth: {bandwidth / 1e6:.1f} GB/s, '{fastest.name}' (its best run {best / 1e6:.1f})"
    )
    report.note("ratio: to the bytes of all rows, read once, over the bandwidth; share: 1 / ratio")
    report.note("passes: how often rows were read, for queries in navigation twice: share x passes")
    for name in kinds:
        value = results[name].more.get("of passes")
        report.target(f"bytes read, share of the bandwidth, {name}", value, 0.6, False)
    return report


def _bytes_read(make: Callable[[], Callable[[], object]]) -> int:
    """Of the bank, by one call of what `make` makes."""
    count, chunks = 0, LatentBank.chunks

    def counted(bank: LatentBank, *args, **kwargs) -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal count
        for first, rows in chunks(bank, *args, **kwargs):
            count += rows.numel() * bank.rows.element_size()
            yield first, rows

    with patch.object(LatentBank, "chunks", counted):
        make()()
    return count


def _rows(bank: LatentBank, label: int) -> torch.Tensor:
    segment = bank.segment(label)
    return bank.take(torch.arange(segment.start, segment.stop))
