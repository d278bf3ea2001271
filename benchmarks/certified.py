"""The certificate: how many rows a training step need not look at, and that nothing is lost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Options, engine, measure, ratio, row
from report import Report
from torch import Tensor

from stagewise import Certificate, LatentBank, LinearPath, Oracle

ETA, DELTA = 1e-3, 1e-6
QUERIES, BATCH, TIMED = 10_000, 500, 128


def certificate(options: Options) -> Report:
    """Training mix t ~ U(0, 1) on clusters and on photographs."""
    report = Report(
        "certificate", f"t~U(0, 1), eta={ETA:g}, delta={DELTA:g}, timed with B={TIMED}"
    ).start()
    lines: list[dict[str, Any]] = []
    bank = LatentBank(clusters(options.rows(20_000), 4096, 200))
    lines += of_bank(report, "clusters", bank, [False], options)
    del bank
    photos = photo_bank(options)
    if isinstance(photos, str):
        report.note(f"photographs: skipped, {photos}")
    else:
        lines += of_bank(report, "photographs", photos, [False, True], options)
    report.plain("rows touched, and what is lost", lines)
    for line in lines:
        if line["bank"] == "clusters":
            report.target(
                "rows touched without / with it, clusters",
                line["factor"],
                5,
                most=False,
            )
    for line in lines:
        missed = line["missed"]
        report.target(f"mass missed, {line['bank']}", missed, ETA)
    report.note("missed: the largest true posterior mass that a certified answer lacks;")
    report.note("mean off: the largest error of its mean, relative to the diameter of the rows")
    return report


def clusters(n: int, dim: int, count: int) -> Tensor:
    """Unit variance, about half of it within clusters: near rows are some 60 apart, as latents."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, dim, generator=generator)
    centres = torch.randn(count, dim, generator=generator)
    within = 0.3 + 0.4 * torch.rand(count, 1, generator=generator)
    member = torch.arange(n) % count
    return x.mul_(within[member].sqrt()).add_(((1 - within).sqrt() * centres)[member])


def photo_bank(options: Options) -> LatentBank | str:
    """The patches of the recipe, or why there are none."""
    try:
        from stagewise.recipes.photos import PhotoPatches

        data = PhotoPatches(train_size=options.rows(20_000))
        data.setup()
    except ModuleNotFoundError as error:
        return str(error).split("\n")[0]
    return LatentBank(*data.train.tensors)


def of_bank(
    report: Report, name: str, bank: LatentBank, scopes: list[bool], options: Options
) -> list[dict[str, Any]]:
    """Lines of the table for one bank: whole and class-wise."""
    lines = []
    for wise in scopes:
        start = time.perf_counter()
        made = Certificate.compute(bank, class_wise=wise, progress=False)
        seconds = time.perf_counter() - start
        where = f"{name}{', class-wise' if wise else ''}"
        nearest = float(made.distances[:, 0].median())
        report.note(
            f"{where}: {len(bank)} x {bank.dim}, median distance to the nearest row {nearest:.3g}; "
            f"certificate computed in {seconds:.1f} s"
        )
        timed = timings(bank, made, wise, options)
        report.table(f"{where}: a batch of {TIMED}", list(timed.values()))
        line = verify(bank, made, wise, options)
        lines.append({"bank": where, **line, "speed-up": ratio(timed, "without", "with")})
    return lines


def timings(bank: LatentBank, made: Certificate, wise: bool, options: Options) -> Any:
    """Time of a batch with and without, over batches that are the same for all rows."""
    batches = list(itertools.islice(mix(bank, TIMED, wise, 6), options.runs + 2))

    def maker(**settings: Any) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            oracle = Oracle(bank, engine=engine("Exact"), **settings)
            turn = itertools.cycle(batches)

            def run() -> Any:
                xt, t, source, labels = next(turn)
                return oracle.posterior(xt, t, labels, source=source)

            return run

        return make

    rows = [row("without", maker()), row("with", maker(certificate=made, eta=ETA, delta=DELTA))]
    return measure(rows, options.runs, base="without")


def verify(bank: LatentBank, made: Certificate, wise: bool, options: Options) -> dict[str, Any]:
    """Rows touched, and every certified answer against the full engine."""
    exact = Oracle(bank, engine=engine("Exact"))
    oracle = Oracle(bank, engine=engine("Exact"), certificate=made, eta=ETA, delta=DELTA)
    count = max(BATCH, round(QUERIES * options.scale))
    asked = certified = without = with_it = 0
    missed = off = 0.0
    for xt, t, source, labels in itertools.islice(mix(bank, BATCH, wise, 7), count // BATCH):
        asked += len(t)
        names = [None] * len(t) if labels is None else labels
        segments = [bank.whole if name is None else bank.segment(name) for name in names]
        sizes = torch.tensor([segment.stop - segment.start for segment in segments])
        yes = made.certified(LinearPath()(t.double()), source, sizes, eta=ETA, delta=DELTA)
        certified += int(yes.sum())
        without += int(sizes.sum())
        with_it += int(torch.where(yes, 1, sizes).sum())
        some = yes.nonzero()[:, 0]
        if not len(some):
            continue
        own = [names[i] for i in some.tolist()] if wise else None
        full, post = (
            one.posterior(xt[some], t[some], own, source=source[some]) for one in (exact, oracle)
        )
        if post.tail_kind != "bounded":
            raise RuntimeError("a query that `certified` names was answered by the engine")
        mass = full.source_weight * (1 + made.copies[source[some], int(wise)])
        gap = (post.mean - full.mean).flatten(1).norm(dim=1) / (2 * bank.radius)
        missed, off = max(missed, float((1 - mass).max())), max(off, float(gap.max()))
    return {
        "queries": asked,
        "certified": certified / asked,
        "rows without": without / asked,
        "rows with": with_it / asked,
        "factor": without / with_it,
        "missed": missed,
        "mean off": off,
    }


def mix(bank: LatentBank, size: int, wise: bool, seed: int) -> Any:
    """Batches of queries as training makes them: noisy samples, times, sources, labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        source = torch.randint(len(bank), (size,), generator=generator)
        t = torch.rand(size, generator=generator)
        x0 = torch.randn(size, *bank.shape, generator=generator)
        x1 = bank.take(source).float().reshape(x0.shape)
        labels = bank.labels_of(source.tolist()) if wise else None
        yield LinearPath().interpolate(x0, x1, t), t, source, labels
