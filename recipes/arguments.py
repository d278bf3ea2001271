"""What all commands share: their parser, the word that was meant, an end without a traceback."""

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

__all__ = ["Parser", "did_you_mean", "ends_in_a_line"]

_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", None: "NAME", str: "NAME"}
_USERS = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
_DAMAGED = (SafetensorError, BadZipFile, UnpicklingError, EOFError)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: the known words nearest to `word`; empty if none is near."""
    near = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


@contextmanager
def ends_in_a_line(command: str, *errors: type[Exception]) -> Iterator[None]:
    """Ends the process with one message where the user can mend what is wrong.

    Args:
        command: Its name.
        errors: Further exceptions that are the user's to mend. The variable HYDRA_FULL_ERROR=1
            gives the traceback, as it does in Hydra.
    """
    whole = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        yield
    except KeyboardInterrupt as end:
        print(f"\nstagewise {command}: stopped {end}".rstrip(), file=sys.stderr)
        sys.exit(130)  # as shells have it for an interrupt
    except Exception as error:
        if whole or not isinstance(error, (*_USERS, *_DAMAGED, *errors)):
            raise
        text = str(error).strip() or type(error).__name__
        text = f"A file is damaged: {text}" if isinstance(error, _DAMAGED) else text
        # Of what another package has raised the message alone may not tell what to mend.
        frame = list(walk_tb(error.__traceback__))[-1][0]
        foreign = not frame.f_globals.get("__name__", "").startswith("stagewise")
        foreign &= not isinstance(error, OSError)
        text += " (Where: HYDRA_FULL_ERROR=1)" * foreign
        notes = getattr(error, "__notes__", [])
        sys.exit("\n".join([f"stagewise {command}: {text}", *notes]))


class Parser(argparse.ArgumentParser):
    """Names the kind of each value in `--help`, and the option or choice that was meant."""

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
