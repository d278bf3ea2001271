"""What all commands share: parser, choice of the device, suggestions, errors without traceback."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from traceback import walk_tb
from typing import Any, NoReturn
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from typing_extensions import override

__all__ = ["DTYPES", "Parser", "device_of", "did_you_mean", "exit_with_message"]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", None: "NAME", str: "NAME"}
_USERS = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
_DAMAGED = (SafetensorError, BadZipFile, UnpicklingError, EOFError)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message with the known words nearest to `word`; empty if none is near."""
    near = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def device_of(name: str | None) -> torch.device:
    """The device of `--device`, by default a GPU if there is one; of several that of LOCAL_RANK."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Expected --device cpu, cuda, cuda:1 or mps, got {name!r}.") from error
    if device.type != "cuda":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    count = torch.cuda.device_count()
    if not count:
        raise ValueError(f"Found no CUDA device for --device {name}. Use --device cpu.")
    if index >= count:
        raise ValueError(
            f"Expected a CUDA device of number {index} for --device {name}, found {count} devices. "
            "Start as many ranks as there are devices, or give --device cpu."
        )
    return torch.device("cuda", index)


@contextmanager
def exit_with_message(command: str) -> Iterator[None]:
    """Ends the process with one message, without a traceback, for errors that a user can repair.

    HYDRA_FULL_ERROR=1 shows the traceback, as it does in Hydra.
    """
    whole = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        yield
    except KeyboardInterrupt as end:
        print(f"\nstagewise {command}: stopped {end}".rstrip(), file=sys.stderr)
        sys.exit(130)  # what shells return for an interrupt
    except Exception as error:
        if whole or not isinstance(error, (*_USERS, *_DAMAGED)):
            raise
        text = str(error).strip() or type(error).__name__
        text = f"A file is damaged: {text}" if isinstance(error, _DAMAGED) else text
        # The message of another package may not tell what to repair.
        frame = list(walk_tb(error.__traceback__))[-1][0]
        foreign = not frame.f_globals.get("__name__", "").startswith("stagewise")
        foreign &= not isinstance(error, OSError)
        text += " (Traceback: HYDRA_FULL_ERROR=1)" * foreign
        notes = getattr(error, "__notes__", [])
        sys.exit("\n".join([f"stagewise {command}: {text}", *notes]))


class Parser(argparse.ArgumentParser):
    """Names the type of each value in `--help`; suggests options and choices."""

    @override
    def add_argument(self, *names: str, **about: Any) -> argparse.Action:
        plain = about.get("action") is None and "choices" not in about
        if plain and names[0].startswith("-"):
            kind: Any = about.get("type")
            about.setdefault("metavar", _METAVARS.get(kind) or kind.__name__.strip("_").upper())
        return super().add_argument(*names, **about)

    @override
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            meant = did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{meant}")
        return options

    @override
    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        meant = did_you_mean(found[1], re.findall(r"[\w.-]+", found[2])) if found else ""
        super().error(message + meant)
