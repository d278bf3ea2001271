"""The certificate: how many rows a training step need not look at, and that nothing is lost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Options, Report, Row, measure, ratio

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.certificate import Certificate
from stagewise.engines import Exact
from stagewise.posterior import Posterior
from stagewise.recipes.photos import PhotoPatches

ETA, DELTA = 1e-3, 1e-6
ASKED, BATCH, TIMED = 10_000, 500, 128


def certificate(options: Options) -> Report:
    """Clusters and photographs, with times of the training mix, t ~ U(0, 1)."""
    about = f"t~U(0, 1), eta={ETA:g}, delta={DELTA:g}, timed with B={TIMED}"
    report = Report("certificate", about)
    lines = [_certified(report, "clusters", clusters(options.rows(20_000), 4096), False, options)]
    data = PhotoPatches(train_size=options.rows(20_000))
    data.setup()
    bank = LatentBank(*data.train.tensors)
    lines += [_certified(report, "photographs", bank, wise, options) for wise in (False, True)]
    report.table("rows touched, and what is lost", lines)
    report.target("rows touched without / with it, clusters", lines[0]["factor"], 5, most=False)
    for line in lines:
        report.target(f"mass missed, {line['bank']}", line["missed"], ETA)
    report.note("missed: the largest true posterior mass that a certified answer lacks;")
    report.note("mean off: the largest error of its mean, relative to the diameter of the rows")
    return report


def clusters(n: int, dim: int, count: int = 200) -> LatentBank:
    """Unit variance, about half of it within clusters: near rows are some 60 apart, as latents."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, dim, generator=generator)
    centres = torch.randn(count, dim, generator=generator)
    within = 0.3 + 0.4 * torch.rand(count, 1, generator=generator)
    member = torch.arange(n) % count
    return LatentBank(x.mul_(within[member].sqrt()).add_(((1 - within).sqrt() * centres)[member]))


def _certified(
    report: Report, name: str, bank: LatentBank, wise: bool, options: Options
) -> dict[str, Any]:
    """Times a batch with and without; counts rows; compares certified answers with the engine's."""
    title = f"{name}{', class-wise' if wise else ''}"
    start = time.perf_counter()
    made = Certificate.compute(bank, class_wise=wise, progress=False)
    report.note(f"{title}: certificate computed in {time.perf_counter() - start:.1f} s")
    exact = Oracle(bank, engine=Exact())
    certified = Oracle(bank, engine=Exact(), certificate=made, eta=ETA, delta=DELTA)
    batches = list(itertools.islice(mix(bank, TIMED, wise, 6), options.runs + 2))

    def asking(oracle: Oracle) -> Callable[[], Posterior]:
        turn = itertools.cycle(batches)

        def run() -> Posterior:
            xt, t, source, labels = next(turn)
            return oracle.posterior(xt, t, labels, source=source)

        return run

    rows = [Row("without", asking(exact)), Row("with", asking(certified))]
    timed = measure(rows, options.runs, base="without")
    report.results(f"{title}: a batch of {TIMED}", timed)

    asked = max(BATCH, round(ASKED * options.scale)) // BATCH
    total, touched, kept, missed, off = 0, 0, 0, 0.0, 0.0
    for xt, t, source, labels in itertools.islice(mix(bank, BATCH, wise, 7), asked):
        sizes = torch.full((BATCH,), len(bank))
        if labels is not None:
            segments = [bank.segment(label) for label in labels]
            sizes = torch.tensor([segment.stop - segment.start for segment in segments])
        sure = made.certified(LinearPath()(t.double()), source, sizes, eta=ETA, delta=DELTA)
        total += int(sizes.sum())
        touched += int(torch.where(sure, 1, sizes).sum())
        kept += int(sure.sum())
        at = sure.nonzero()[:, 0]
        if not len(at):
            continue
        own = None if labels is None else [labels[i] for i in at.tolist()]
        full = exact.posterior(xt[at], t[at], own, source=source[at])
        post = certified.posterior(xt[at], t[at], own, source=source[at])
        assert full.source_weight is not None
        missed = max(missed, float((1 - full.source_weight).max()))
        error = (post.mean - full.mean).flatten(1).norm(dim=1) / (2 * bank.radius)
        off = max(off, float(error.max()))
    count = asked * BATCH
    return {
        "bank": title,
        "queries": count,
        "certified": kept / count,
        "rows without": total / count,
        "rows with": touched / count,
        "factor": total / touched,
        "missed": missed,
        "mean off": off,
        "speed-up": ratio(timed, "without", "with"),
    }


def mix(bank: LatentBank, size: int, wise: bool, seed: int) -> Iterator[Any]:
    """Batches of queries as training makes them: noisy samples, times, sources, labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        source = torch.randint(len(bank), (size,), generator=generator)
        t = torch.rand(size, generator=generator)
        x0 = torch.randn(size, *bank.shape, generator=generator)
        x1 = bank.take(source).float().reshape(x0.shape)
        labels = bank.labels_of(source.tolist()) if wise else None
        yield LinearPath().interpolate(x0, x1, t), t, source, labels
