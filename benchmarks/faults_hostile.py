"""Trials of the fault campaign: files that would do more than they say, if they were trusted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults_campaign import Campaign, Line, Trial, about
from faults_cases import KINDS, reader, source
from omegaconf import OmegaConf


def hostile(campaign: Campaign) -> Iterator[Trial]:
    """Configurations, checkpoints and latents that would leave a mark if they were trusted."""
    for target in TARGETS:
        for how in ("sample", "resume", "report"):
            yield f"config {target} {how}", partial(config, campaign, target, how)
    for how in ("sample", "resume"):
        yield f"checkpoint {how}", partial(checkpoint, campaign, how)
    for kind in (*KINDS, "bank", "certificate"):
        yield f"pickle {kind}", partial(pickled, campaign, kind)
    for kind in ("repa.zip", "edm2.zip"):
        yield f"names {kind}", partial(outside_names, campaign, kind)


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


def judged(campaign: Campaign, what: str) -> Line:
    """Reads what is in `out`; whether that left a mark, or was refused by name."""
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


def config(campaign: Campaign, target: str, how: str) -> Line:
    """A run whose configuration calls something else, for its network and within its data."""
    shutil.copytree(source("run: sample", campaign.base), campaign.out)
    mark, file = campaign.base / "mark", campaign.base / "pickle"
    with open(file, "wb") as stream:
        pickle.dump(Mark(mark), stream)
    told = json.dumps(TARGETS[target]).replace("MARK", str(mark)).replace("PICKLE", str(file))
    held = OmegaConf.load(campaign.out / "config.yaml")
    held.data.latents.path = {"_target_": target, **json.loads(told)}
    held.net = {"_target_": target, **json.loads(told)}
    OmegaConf.save(held, campaign.out / "config.yaml")
    return judged(campaign, f"run: {how}")


def checkpoint(campaign: Campaign, how: str) -> Line:
    """A checkpoint that is a pickle of something else."""
    shutil.copytree(source("run: sample", campaign.base), campaign.out)
    for file in campaign.out.rglob("*.ckpt"):
        held = torch.load(file, weights_only=True)
        torch.save({**held, "more": Mark(campaign.base / "mark")}, file)
    return judged(campaign, f"run: {how}")


def pickled(campaign: Campaign, kind: str) -> Line:
    """Files of which each is a pickle, in the way that its ending has them."""
    what = kind if kind in ("bank", "certificate") else f"latents {kind}"
    shutil.copytree(source(what, campaign.base), campaign.out)
    mark = Mark(campaign.base / "mark")
    files = [file for file in campaign.out.rglob("*") if file.is_file()]
    for file in files:
        if kind == "certificate" and "bank" in file.name:
            continue
        if file.suffix == ".npy":
            np.save(file, np.array([mark], dtype=object), allow_pickle=True)
        elif file.suffix == ".npz":
            np.savez(file, moments=np.array([mark], dtype=object))
        elif file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
            with zipfile.ZipFile(file, "w") as archive:
                for name in names:
                    archive.writestr(name, pickle.dumps(mark))
        elif file.suffix == ".pt":
            torch.save(mark, file)
        elif file.suffix == ".safetensors":
            file.write_bytes(pickle.dumps(mark))
    return judged(campaign, what)


def outside_names(campaign: Campaign, kind: str) -> Line:
    """A zip with members that lie outside of it."""
    shutil.copytree(source(f"latents {kind}", campaign.base), campaign.out)
    file = next(campaign.out.rglob("*.zip"))
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    rows = [name for name in held if name.endswith(".npy")]
    index = json.loads(held["dataset.json"])
    index["labels"] += [["../../mark/x.npy", 0], ["/mark/x.npy", 1]]
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("../../mark/x.npy", "/mark/x.npy", *rows):
            archive.writestr(name, held.get(name, held[rows[0]]))
        archive.writestr("dataset.json", json.dumps(index))
    return judged(campaign, f"latents {kind}")
