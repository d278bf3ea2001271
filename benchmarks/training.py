"""What the oracle and the monitor cost beside a training step of the recipe, and of SiT-XL/2."""

from __future__ import annotations

import io
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from measure import FEW, Options, Result, Row, measure, ratio, row
from report import Report
from torch import Tensor

from stagewise import LatentBank, Oracle

BATCHES = 16
EVERY = 200  # steps between probes in experiment/photos.yaml


def training(options: Options) -> Report:
    """The recipe's SiT on photographs, by its own configuration."""
    report = Report("training", "share of a step of the photos recipe, and of SiT-XL/2").start()
    before = torch.get_float32_matmul_precision()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of_recipe(report, folder, options)
    except ModuleNotFoundError as error:
        text = str(error).split("\n")[0]
        report.note(f"photos recipe: skipped, {text}")
    finally:
        torch.set_float32_matmul_precision(before)
    counted(report)
    return report


def of_recipe(report: Report, folder: str, options: Options) -> None:
    """Times a step, the oracle's correction on the same batches, and a probe."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    from stagewise.certificate import Certificate

    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        config = compose(
            "train",
            [
                "experiment=photos",
                f"run_dir={folder}",
                f"data.train_size={options.rows(20_000)}",
                "callbacks.monitor.every_n_steps=1",
            ],
        )
    torch.set_float32_matmul_precision("high")  # as `recipes.train` does
    data = instantiate(config.data)
    data.setup()
    module = instantiate(
        config.module, net=instantiate(config.net), objective=instantiate(config.objective)
    )
    x, labels = data.train.tensors
    bank = LatentBank(x, labels)
    batches = queries(bank, module.objective, config.data.batch_size)
    size = config.data.batch_size
    report.note(
        f"N={len(bank)}, D={bank.dim}, {len(bank.classes)} classes, batch {size}, "
        f"{sum(p.numel() for p in module.net.parameters()) / 1e6:.1f} M weights"
    )

    def corrections(wise: bool, certified: bool) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            made = None
            if certified:
                made = Certificate.compute(bank, class_wise=wise, progress=False)
            oracle, turn = Oracle(bank, certificate=made), itertools.cycle(batches)

            def run() -> Tensor:
                x1, names, source, t, xt = next(turn)
                return oracle.correction(xt, t, x1, names if wise else None, source=source)

            return run

        return make

    base = "training step"
    rows = [Row(base, step(module, batches, config.trainer.gradient_clip_val))]
    for wise, certified in itertools.product((True, False), (False, True)):
        scope, with_it = "class-wise" if wise else "all rows", ", certificate" if certified else ""
        rows.append(row(f"correction, {scope}{with_it}", corrections(wise, certified)))
    turn = itertools.cycle(batches)
    rows.append(Row("bank.find(x1)", lambda: bank.find(next(turn)[0])))
    results = measure(rows, 3 * options.runs, base=base)
    probe = probes(config, module, data, min(FEW, options.runs))
    if probe is not None:
        results[probe.name] = probe
        probe.ratio = probe.milliseconds / results[base].milliseconds
    report.table("times", list(results.values()))
    report.note("ratio: share of a step; a probe's is for a probe at every step")
    share = ratio(results, "correction, class-wise", base)
    report.target("exact targets at every step, class-wise / step", share, 0.10)
    if probe is not None and share is not None:
        amortised = probe.ratio / EVERY
        report.note(f"a probe every {EVERY} steps: {amortised:.2%} of the steps")
        report.target("the same and the monitor / step", share + amortised, 0.10)
    for name in ("class-wise, certificate", "all rows", "all rows, certificate"):
        share = ratio(results, f"correction, {name}", base)
        report.target(f"exact targets at every step, {name} / step", share, 0.10)


def queries(bank: LatentBank, objective: Any, size: int) -> list[tuple[Any, ...]]:
    """Batches as the objective draws them, and what it made of them."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for _ in range(BATCHES):
        source = torch.randint(len(bank), (size,), generator=generator)
        x1 = bank.take(source).float().reshape(-1, *bank.shape)
        t = objective.timesteps.sample(size, generator=generator)
        x0 = torch.randn(x1.shape, generator=generator)
        xt = objective.path.interpolate(x0, x1, t).to(x1.dtype)
        names = torch.tensor(bank.labels_of(source.tolist()))
        made.append((x1, names, source, t, xt))
    return made


def step(module: Any, batches: list[tuple[Any, ...]], clip: float) -> Callable[[], None]:
    """Forward, backward, clipping, AdamW."""
    optimizer = module.configure_optimizers()["optimizer"]
    turn = itertools.cycle(batches)
    module.train()

    def run() -> None:
        x1, labels, *_ = next(turn)
        loss = module.objective(module.net, x1, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.net.parameters(), clip)
        optimizer.step()

    return run


def probes(config: Any, module: Any, data: Any, count: int) -> Result | None:
    """Probes of the real monitor in a real fit, with its pictures, less the first."""
    from hydra.utils import instantiate

    from stagewise.callbacks import PosteriorMonitor

    monitor = instantiate(config.callbacks.monitor)
    assert isinstance(monitor, PosteriorMonitor)
    with silence():
        trainer = instantiate(
            config.trainer,
            max_steps=count + 1,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=[monitor],
            logger=[instantiate(logger) for logger in config.logger.values()],
        )
    with silence():
        trainer.fit(module, datamodule=data)
    seconds = sorted(entry["probe_seconds"] for entry in monitor.history[1:])
    middle = 1e3 * seconds[len(seconds) // 2]
    name = f"probe of the monitor, {monitor.strata * monitor.queries} queries"
    return Result(name, middle, runs=len(seconds), note=f"{len(seconds)} runs, pictures included")


@contextmanager
def silence() -> Iterator[None]:
    """Without what Lightning and progress bars say."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def sit_multiply_adds(depth: int, width: int, tokens: int, channels: int, patch: int) -> float:
    """Multiply-adds of one forward pass of a SiT for one sample."""
    linear = 12 * width**2 * tokens  # queries, keys, values, projection; MLP of ratio 4
    attention = 2 * tokens**2 * width
    modulation = 6 * width**2
    ends = tokens * width * channels * patch**2 * (1 + 2)  # the output has mean and variance
    return depth * (linear + attention + modulation) + ends + 2 * width**2 + width * (256 + width)


def counted(report: Report) -> None:
    """SiT-XL/2 by operations, 2 for a multiply-add: no time is measured here."""
    forward = 2 * sit_multiply_adds(28, 1152, 256, 4, 2)
    report.note(
        f"SiT-XL/2 at 256x256, counted: {forward / 2e9:.1f} G multiply-adds = {forward / 1e9:.0f} "
        "GFLOP per sample and forward pass (published as 118.6 'Gflops', a multiply-add for one); "
        "a training step is 3 forward passes"
    )
    dim, lines = 4096, []
    for scope, n in (("class-wise", 1281), ("whole bank", 1_281_167)):
        for text, asked, second in (
            ("every query, both products", 1.0, 1.0),
            ("second product for t < 0.12", 1.0, 0.12),
            ("the same, certified from t = 0.2", 0.2, 0.6),
        ):
            flop = asked * 2 * n * dim * (1 + second)
            share = flop / (3 * forward)
            lines.append(
                {
                    "oracle": scope,
                    "queries": text,
                    "N": n,
                    "D": dim,
                    "GFLOP per sample": flop / 1e9,
                    "% of step": 100 * share,
                }
            )
    report.plain("what it would be at SiT-XL/2, by counted operations", lines)
    report.note("operations are not time: class-wise, it is the reading of the rows that costs,")
    report.note("in bf16 2 N D bytes (10.5 MB) for each class in the batch")
    worst = max(line["% of step"] for line in lines)
    report.target("SiT-XL/2: largest share of the step's operations", worst / 100, 0.10)
