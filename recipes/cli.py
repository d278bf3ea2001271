"""The `stagewise` command: `stagewise <command> ...`."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.util import find_spec

__all__ = ["main"]

_COMMANDS = {
    "train": "train a recipe, with the stage monitors on",
    "encode": "make latents of a folder of pictures",
    "sample": "draw samples from a run",
    "report": "write a page of a run, from its files",
    "profile": "look at latents before training",
    "make-latents": "make latents to try things on",
}

_MOVED = re.compile(r"\+{0,2}data\.(path|format|flips|moments|normalize|multiplier|expected_std)=")
"""Settings that were those of the data module, and are those of its latents."""


def main() -> None:
    """Hands the arguments after the command to its module."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in _COMMANDS:
        for argument in sys.argv[2:]:
            if name == "train" and _MOVED.match(argument):
                now = argument.replace("data.", "data.latents.", 1)
                sys.exit(f"stagewise: {argument.split('=')[0]} is said of the latents now: {now}")
        module = f"stagewise.recipes.{name.replace('-', '_')}"
        sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
        # Lightning starts further processes of this program by the name of the main module.
        sys.modules["__main__"].__spec__ = find_spec(module)
        import_module(module).main()
        return
    lines = [
        f"  {command:{max(map(len, _COMMANDS))}}  {_COMMANDS[command]}" for command in _COMMANDS
    ]
    usage = "\n".join(["usage: stagewise <command> [arguments]", "", "commands:", *lines])
    if name in ("-h", "--help"):
        print(usage)
        return
    sys.exit(f"stagewise: there is no command {name!r}.\n{usage}")
