"""The commands of the fault campaign, and readers of their results."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from stagewise import Certificate, LatentBank
from stagewise.latents import make_latents, open_latents
from stagewise.latents.opening import FORMATS
from stagewise.recipes.arguments import exit_with_message

COMMANDS = ("train", "encode", "sample", "bank")
KINDS = [*FORMATS, "repa.zip", "edm2.zip"]
ROWS, SHAPE = 48, (4, 4, 4)

FILES = [*(f"latents {kind}" for kind in KINDS), "bank", "certificate", "encode", "sample"]
FILES += ["run: sample", "run: report", "run: resume"]
"""What is read after a bit of it was flipped."""


# -- the commands ----------------------------------------------------------------------------------


def prepare(base: Path) -> None:
    """Makes what the commands begin with, once: pictures, an autoencoder, latents."""
    for name in ("train", "encode", "sample", "report"):  # for all forks
        import_module(f"stagewise.recipes.{name}")
    import_module("matplotlib.pyplot")
    if (base / "ready").exists():
        return
    from diffusers import AutoencoderKL

    for index in range(24):
        folder = base / "pictures" / f"{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(base / "vae")
    for name in KINDS:
        kind = name.removesuffix(".zip")
        about: dict[str, Any] = {"num_classes": 2, "format": kind, "shard_size": 20}
        make_latents(latents_of(base, name), ROWS, SHAPE, **about)
    (base / "ready").touch()


def action(name: str, base: Path, out: Path, resume: bool) -> Callable[[], object]:
    """What a command does, with its files in `out`."""
    if name == "bank":
        return exit_with_message("bank")(partial(_bank, base, out))
    arguments = {"train": _train, "encode": _encode, "sample": _sample}[name](base, out, resume)
    return lambda: _main(name, arguments)


def _main(name: str, arguments: list[object]) -> None:
    sys.argv = [f"stagewise {name}", *map(str, arguments)]
    import_module(f"stagewise.recipes.{name}").main()


def _train(base: Path, out: Path, resume: bool) -> list[object]:
    latents = latents_of(base, "lightningdit")
    return [
        *("experiment=imagenet256_sdvae_sit_s", f"data.latents.path={latents}", f"run_dir={out}"),
        *("data.num_classes=2", "data.held_out=8", "data.batch_size=8", "data.num_workers=0"),
        *("net.input_size=4", "net.hidden_size=16", "net.depth=1", "net.num_heads=2", "name=x"),
        *("data.latents.expected_std=null", "net.class_dropout=0.0", "ema=short"),
        *("trainer.max_steps=12", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"),
        *("trainer.devices=1", "trainer.val_check_interval=4", "callbacks=steer", "logger=csv"),
        *("trainer.enable_progress_bar=false", "~callbacks.progress", "precision=fp32"),
        *("callbacks.monitor.every_n_steps=6", "~callbacks.errors", "~callbacks.memorization"),
        *("callbacks.checkpoint.every_n_train_steps=2", "evaluation.queries=16"),
        *("evaluation.samples_per_class=1", "evaluation.steps=2"),
        *(["resume=true"] if resume else []),
    ]


def _encode(base: Path, out: Path, resume: bool) -> list[object]:
    return [
        *(base / "pictures", out, "--vae", base / "vae", "--size", 16, "--num-workers", 0),
        *("--batch-size", 3, "--shard-size", 3, "--device", "cpu"),
        *(["--resume"] if resume else []),
    ]


def _sample(base: Path, out: Path, resume: bool) -> list[object]:
    return [
        *(base / "whole" / "train", "--out", out, "--count", 32, "--batch-size", 2, "--steps", 2),
        *("--method", "euler", "--device", "cpu", "--grid", 4),
        *(["--resume"] if resume else []),
    ]


def _bank(base: Path, out: Path) -> None:
    """A bank in a file and its certificate; done again from the beginning."""
    out.mkdir(parents=True, exist_ok=True)
    latents = open_latents(latents_of(base, "plain"))
    for number in range(6):
        file = out / f"bank{number}.safetensors"
        LatentBank(latents.rows(0, len(latents)), latents.labels).save(file)
        Certificate.cached(out / f"certificate{number}.safetensors", LatentBank.open(file))
    print("done")


# -- what came out ---------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """A hash for each part of each file: numbers of checkpoints and lines one by one."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            for key, value in _parts(file):
                found[f"{name}{key}"] = hashlib.sha256(value).hexdigest()[:16]
    return found


def _parts(file: Path) -> Iterator[tuple[str, bytes]]:
    data = file.read_bytes()
    try:
        if file.suffix in (".ckpt", ".pt"):
            held: Any = torch.load(file, "cpu", weights_only=True)
        elif file.suffix == ".json":
            held = json.loads(data)
        elif file.name == "config.yaml":
            held = {**yaml.safe_load(data), "resume": None}
        elif file.suffix == ".jsonl":
            held = [json.loads(line) for line in data.splitlines()]
        elif file.suffix == ".csv":
            lines = list(csv.DictReader(io.StringIO(data.decode())))
            held = {name: [line[name] for line in lines] for name in lines[0]}
        else:
            held = data
    except Exception:  # damaged, in any way
        held = data
    yield from _walk(held)


def _walk(held: Any, key: str = "") -> Iterator[tuple[str, bytes]]:
    if isinstance(held, Mapping):
        for name, value in held.items():
            if key == "" and name == "loops":  # Lightning's counters of how often it began
                continue
            yield from _walk(value, f"{key}/{name}")
    elif isinstance(held, (list, tuple)):
        yield f"{key}#", str(len(held)).encode()
        for number, value in enumerate(held):
            yield from _walk(value, f"{key}/{number}")
    elif isinstance(held, torch.Tensor):
        yield key, held.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        yield key, held if isinstance(held, bytes) else repr(held).encode()


def _print_hash(*values: Any) -> None:
    """Prints a hash of the values that were read."""
    total = hashlib.sha256()
    for _, part in _walk(values):
        total.update(part)
    print(f"\nRESULT {total.hexdigest()[:16]}")


def latents_of(base: Path, kind: str) -> Path:
    """Where `prepare` puts latents of a format."""
    files = {"plain": "data.safetensors", "repa.zip": "data.zip", "edm2.zip": "data.zip"}
    return base / "latents" / kind / files.get(kind, "")


def reader(what: str, base: Path, out: Path) -> Callable[[], object]:
    """A function that reads `out`, a copy of `source(what)`, and prints a hash of the values."""
    kind, _, name = what.partition(" ")
    if kind == "run:":
        return partial(_read_run, name, base, out)
    if what in ("encode", "sample"):
        return partial(_resume, what, base, out)
    return exit_with_message("read")(partial(_read, kind, name, base, out))


def source(what: str, base: Path) -> Path:
    """The folder of which a file is damaged."""
    if what.startswith("latents "):
        path = latents_of(base, what.split()[1])
        return path.parent if path.is_file() else path
    command = {"certificate": "bank"}.get(what, "train" if what.startswith("run") else what)
    return base / "whole" / command


def _read(kind: str, name: str, base: Path, out: Path) -> None:
    if kind == "latents":
        path = out / latents_of(base, name).relative_to(source(f"latents {name}", base))
        latents = open_latents(path, name.removesuffix(".zip"))
        latents.verify(full=True)
        _print_hash(latents.rows(0, len(latents)), latents.labels)
        return
    bank = LatentBank.open(out / "bank0.safetensors", verify="full")
    if kind == "bank":
        _print_hash(bank.rows.clone(), bank.offset, list(bank.classes))
        return
    held = Certificate.load(out / "certificate0.safetensors", bank)
    _print_hash(
        len(held), {name: value for name, value in vars(held).items() if torch.is_tensor(value)}
    )


def _resume(name: str, base: Path, out: Path) -> None:
    action(name, base, out, True)()
    _print_hash(contents(out))


def _read_run(how: str, base: Path, out: Path) -> None:
    if how == "sample":
        made = out / "made"
        about = ("--count", 2, "--steps", 1, "--method", "euler", "--device", "cpu")
        _main("sample", [out, "--out", made, *about])
        _print_hash(contents(made)["latents.npz"])
    elif how == "report":
        _main("report", [out])
        _print_hash([file.read_bytes() for file in sorted(out.glob("*.html"))])
    else:
        _main("train", [*_train(base, out, True), "trainer.max_steps=13"])
        held = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
        _print_hash(held["state_dict"], held["global_step"])
