"""What the fault campaign runs, in processes of its own, and what it reads of the results.

Python, torch and the commands are imported once: each trial is a fork, which takes milliseconds
where a new process takes seconds. It has a HOME, a TMPDIR and a working directory of its own, and
notes which files it opens to write outside of its folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stagewise import Certificate, LatentBank
from stagewise.latents import make_latents, open_latents
from stagewise.latents.opening import FORMATS

__all__ = ["COMMANDS", "FILES", "Ended", "action", "contents", "prepare", "reader", "spawn"]

COMMANDS = ("train", "encode", "sample", "bank")
KINDS = [*FORMATS, "repa.zip", "edm2.zip"]
ROWS, SHAPE = 48, (4, 4, 4)

FILES = [*(f"latents {kind}" for kind in KINDS), "bank", "certificate", "encode", "sample"]
FILES += ["run: sample", "run: report", "run: resume"]
"""What is read after a bit of it was flipped."""


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    code: int  # negative: by that signal
    said: str
    outside: list[str]

    @property
    def raw(self) -> bool:
        """Whether it ended in a traceback, where one line should be, or by a signal of its own."""
        return "Traceback (most recent call last)" in self.said or self.code < -signal.SIGKILL


def spawn(
    action: Callable[[], object],
    place: Path,
    inside: Path,
    until: Callable[[float], bool] = lambda seconds: False,
    limit: float = 300.0,
) -> Ended:
    """Runs an action in a fork, until it ends or `until` says that it is to be killed.

    Args:
        action: What a command does.
        place: A folder for what it says, its HOME and its working directory.
        inside: Where it may write.
        until: Asked all the time, with the seconds since it began.
        limit: Seconds after which it hangs.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "said.txt").write_text("")
    (place / "outside.txt").write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _run_and_exit(action, place, inside)
    began = time.monotonic()
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            break
        seconds = time.monotonic() - began
        if seconds > limit or until(seconds):
            os.killpg(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            break
        time.sleep(0.0005)
    said = (place / "said.txt").read_text(errors="replace")
    outside = sorted(set((place / "outside.txt").read_text().splitlines()))
    return Ended(os.waitstatus_to_exitcode(status), said, outside)


def _run_and_exit(action: Callable[[], object], place: Path, inside: Path) -> None:
    os.setpgid(0, 0)
    code = 1
    try:
        log = os.open(place / "said.txt", os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for name in ("home", "tmp", "work"):
            (place / name).mkdir(exist_ok=True)
        os.environ |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
        tempfile.tempdir = None
        os.chdir(place / "work")
        _watch(os.open(place / "outside.txt", os.O_WRONLY | os.O_APPEND), inside.resolve())
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = 0 if end.code is None else code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(log: int, inside: Path) -> None:
    """Notes files that are opened to write, made or removed elsewhere."""
    own, writes = os.getpid(), os.O_WRONLY | os.O_RDWR | os.O_CREAT
    # What libraries keep in HOME and TMPDIR is theirs.
    kept = (os.environ["HOME"], os.environ["TMPDIR"], "/dev", "/proc")
    allowed = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in (inside, *kept))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int) or not flags & writes:
                return
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"):
            path = arguments[1] if event == "os.rename" else arguments[0]
        else:
            return
        if isinstance(path, int) or os.getpid() != own:
            return
        full = os.path.realpath(os.fsdecode(path))
        if not f"{full}{os.sep}".startswith(allowed):
            os.write(log, f"{event} {full}\n".encode())

    sys.addaudithook(hook)


# -- the commands -----------------------------------------------------------------------------------


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
        return lambda: _bank(base, out)
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


# -- what came out ----------------------------------------------------------------------------------


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
        elif file.suffix == ".jsonl":
            held = [json.loads(line) for line in data.splitlines()]
        elif file.suffix == ".csv":
            lines = list(csv.DictReader(io.StringIO(data.decode())))
            held = {name: [line[name] for line in lines] for name in lines[0]}
        else:
            held = data
    except Exception:  # damaged, in the ways that damage takes
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


def _told(*values: Any) -> None:
    """Prints a hash of what was read."""
    total = hashlib.sha256()
    for _, part in _walk(values):
        total.update(part)
    print(f"\nRESULT {total.hexdigest()[:16]}")


def latents_of(base: Path, kind: str) -> Path:
    """Where `prepare` puts latents of a format."""
    end = {"plain": ".safetensors", "repa.zip": "/data.zip", "edm2.zip": "/data.zip"}.get(kind, "")
    return base / "latents" / f"{kind.removesuffix('.zip') if kind == 'plain' else kind}{end}"


def reader(what: str, base: Path, out: Path) -> Callable[[], object]:
    """What reads `out`, a copy of what `source` names, and prints a hash of what it read."""
    if what.startswith("latents "):
        kind = what.split()[1]
        path = out / latents_of(base, kind).relative_to(source(what, base))
        return lambda: _read_latents(path, kind.removesuffix(".zip"))
    if what in ("bank", "certificate"):
        return lambda: (_read_bank if what == "bank" else _read_certificate)(out)
    if what in ("encode", "sample"):
        return lambda: (action(what, base, out, True)(), _told(contents(out)))
    return lambda: _read_run(what.split()[1], base, out)


def source(what: str, base: Path) -> Path:
    """The folder of which a file is damaged."""
    if what.startswith("latents "):
        path = latents_of(base, what.split()[1])
        return path.parent if path.is_file() else path
    command = {"certificate": "bank"}.get(what, "train" if what.startswith("run") else what)
    return base / "whole" / command


def _read_run(how: str, base: Path, out: Path) -> None:
    if how == "sample":
        made = out / "made"
        about = ("--count", 2, "--steps", 1, "--method", "euler", "--device", "cpu")
        _main("sample", [out, "--out", made, *about])
        _told(contents(made)["samples.npz"])
    elif how == "report":
        _main("report", [out])
        _told([file.read_bytes() for file in sorted(out.glob("*.html"))])
    else:
        _main("train", [*_train(base, out, True), "trainer.max_steps=13"])
        held = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
        _told(held["state_dict"], held["global_step"])


def _read_latents(path: Path, kind: str) -> None:
    latents = open_latents(path, kind)
    latents.verify(full=True)
    _told(latents.rows(0, len(latents)), latents.labels)


def _read_bank(path: Path) -> None:
    bank = LatentBank.open(path / "bank0.safetensors", verify="full")
    _told(bank.rows.clone(), bank.offset, list(bank.classes))


def _read_certificate(path: Path) -> None:
    bank = LatentBank.open(path / "bank0.safetensors")
    held = Certificate.load(path / "certificate0.safetensors", bank)
    _told(len(held), {name: value for name, value in vars(held).items() if torch.is_tensor(value)})
