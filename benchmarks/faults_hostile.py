"""Trials of the fault campaign: files that would run code or write elsewhere, if trusted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults_campaign import Campaign, Line, Trial, about
from faults_cases import KINDS, reader, source
from omegaconf import OmegaConf


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


TARGETS = {
    "os.mkdir": {"_args_": ["MARK"]},
    "builtins.eval": {"_args_": ["__import__('os').mkdir('MARK')"]},
    "numpy.load": {"file": "PICKLE", "allow_pickle": True},
    "torch.load": {"f": "PICKLE", "weights_only": False},
    "stagewise.files.os.mkdir": {"_args_": ["MARK"]},
    "hydra.utils.instantiate": {"config": {"_target_": "os.mkdir", "_args_": ["MARK"]}},
}


def hostile(campaign: Campaign) -> Iterator[Trial]:
    """Configurations, checkpoints and latents that would leave a mark if they were trusted."""

    def trial(key: str, what: str, damage: Callable[..., None], *more: str) -> Trial:
        mark = Mark(campaign.base / "mark")
        return key, partial(judged, campaign, what, partial(damage, campaign.out, mark, *more))

    for target, how in product(TARGETS, ("sample", "resume", "report")):
        yield trial(f"config {target} {how}", f"run: {how}", config, target)
    for how in ("sample", "resume"):
        yield trial(f"checkpoint {how}", f"run: {how}", checkpoint)
    for kind in (*KINDS, "bank", "certificate"):
        what = f"latents {kind}" if kind in KINDS else kind
        yield trial(f"pickle {kind}", what, pickled, kind)
    for kind in ("repa.zip", "edm2.zip"):
        yield trial(f"names {kind}", f"latents {kind}", outside_names)


def judged(campaign: Campaign, what: str, damage: Callable[[], None]) -> Line:
    """Damages a copy of the files, and reads it: did that leave a mark, or was it refused?"""
    shutil.copytree(source(what, campaign.base), campaign.out)
    damage()
    ended = campaign.spawn(reader(what, campaign.base, campaign.out))
    ran = (campaign.base / "mark").exists()
    shutil.rmtree(campaign.base / "mark", ignore_errors=True)
    if ran or ended.raw:
        outcome = "ran" if ran else "raw"
    elif ended.code:
        named = str(campaign.out) in ended.said
        outcome = "named" if named else "refused without a name"
    else:
        outcome = "not asked for"
    said = "" if outcome in ("named", "not asked for") else ended.said[-1500:]
    return {"outcome": outcome, "ran": ran, **about(ended), "said": said}


def config(out: Path, mark: Mark, target: str) -> None:
    """A run whose configuration calls something else, for its network and within its data."""
    file = mark.file.with_name("pickle")
    file.write_bytes(pickle.dumps(mark))
    told = json.dumps(TARGETS[target]).replace("MARK", str(mark.file)).replace("PICKLE", str(file))
    held = OmegaConf.load(out / "config.yaml")
    held.data.latents.path = held.net = {"_target_": target, **json.loads(told)}
    OmegaConf.save(held, out / "config.yaml")


def checkpoint(out: Path, mark: Mark) -> None:
    """A checkpoint that is a pickle of something else."""
    for file in out.rglob("*.ckpt"):
        torch.save({**torch.load(file, weights_only=True), "more": mark}, file)


def pickled(out: Path, mark: Mark, kind: str) -> None:
    """Pickles in place of all files, in the form that their endings allow."""
    for file in [file for file in out.rglob("*") if file.is_file()]:
        if kind == "certificate" and "bank" in file.name:
            continue
        if file.suffix == ".npy":
            np.save(file, np.array([mark], dtype=object), allow_pickle=True)
        elif file.suffix == ".npz":
            np.savez(file, moments=np.array([mark], dtype=object))
        elif file.suffix == ".zip":
            rewrite(file, dict.fromkeys(members(file), pickle.dumps(mark)))
        elif file.suffix == ".pt":
            torch.save(mark, file)
        elif file.suffix == ".safetensors":
            file.write_bytes(pickle.dumps(mark))


def outside_names(out: Path, mark: Mark) -> None:
    """A zip with members that lie outside of it."""
    file = next(out.rglob("*.zip"))
    held = members(file)
    index = json.loads(held.pop("dataset.json"))
    rows = {name: data for name, data in held.items() if name.endswith(".npy")}
    outside = dict.fromkeys(("../../mark/x.npy", "/mark/x.npy"), next(iter(rows.values())))
    index["labels"] += [[name, label] for label, name in enumerate(outside)]
    rewrite(file, {**outside, **rows, "dataset.json": json.dumps(index).encode()})


def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(file: Path, held: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
