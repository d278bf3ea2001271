"""Class-wise: one query for each class, where reading the rows is all there is to do."""

from __future__ import annotations

import peers
import torch
from measure import Options, Row, engine, measure, row
from report import Report

from stagewise import LatentBank, LinearPath, Oracle
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
    kinds: dict[str, torch.dtype] = {}
    for t_max in (0.1, 1.0):
        t = 0.001 + (t_max - 0.002) * torch.rand(classes, generator=generator)
        x0 = torch.randn(classes, DIM, generator=generator)
        for kind, bank in banks.items():
            xt = LinearPath().interpolate(x0, bank.take(source).float(), t)

            def make(bank=bank, xt=xt, t=t):
                oracle = Oracle(bank, engine=engine("Exact"))
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
    results = measure(rows, options.runs)
    fastest = min(
        (results[name] for name in reads if results[name].best is not None),
        key=lambda result: result.best,
    )
    bandwidth = banks[torch.float32].nbytes / fastest.best  # bytes per ms
    for name, kind in kinds.items():
        if results[name].milliseconds is not None:
            floor = banks[kind].nbytes / bandwidth
            results[name].ratio = results[name].milliseconds / floor
            results[name].more["share"] = 1 / results[name].ratio
    report.table("class-wise", list(results.values()), ["share"])
    report.note(f"bandwidth: {bandwidth / 1e6:.1f} GB/s, the best single run of '{fastest.name}'")
    report.note("ratio: to the bytes of all rows, read once, over the bandwidth; share: 1 / ratio")
    for name in kinds:
        report.target(
            f"share of the bandwidth floor, {name}", results[name].more.get("share"), 0.6, False
        )
    return report


def _rows(bank: LatentBank, label: int) -> torch.Tensor:
    segment = bank.segment(label)
    return bank.take(torch.arange(segment.start, segment.stop))
