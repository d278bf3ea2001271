"""The `stagewise` command: `stagewise <command> ...`."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

__all__ = ["main"]

_COMMANDS = {
    "train": ("stagewise.recipes.train", "train a recipe, with the stage monitors on"),
    "encode": ("stagewise.recipes.encode", "make latents of a folder of pictures"),
    "sample": ("stagewise.recipes.sample", "draw samples from a run"),
    "report": ("stagewise.recipes.report", "write a page of a run, from its files"),
    "profile": (
        "stagewise.recipes.profile",
        "look at latents before training, and say what follows",
    ),
    "make-latents": ("stagewise.recipes.make_latents", "make latents to try things on"),
}


def main() -> None:
    """Hands the arguments after the command to its module."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in _COMMANDS:
        module, _ = _COMMANDS[name]
        sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
        # Whoever starts more processes of this program, as Lightning does for several devices,
        # starts the module.
        sys.modules["__main__"].__spec__ = find_spec(module)
        import_module(module).main()
        return
    width = max(map(len, _COMMANDS))
    lines = [f"  {command:{width}}  {about}" for command, (_, about) in _COMMANDS.items()]
    usage = "\n".join(["usage: stagewise <command> [arguments]", "", "commands:", *lines])
    if name in ("-h", "--help"):
        print(usage)
        return
    sys.exit(f"stagewise: there is no command {name!r}.\n{usage}")
