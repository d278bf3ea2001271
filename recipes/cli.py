"""The `stagewise` command: `stagewise <command> ...`."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

__all__ = ["main"]

_COMMANDS = {
    "train": "train a recipe, with the stage monitors on",
    "encode": "make latents from a folder of pictures",
    "sample": "draw samples from a run",
    "report": "write a page about a run, from its files",
    "profile": "measure latents before training",
    "make-latents": "make synthetic latents",
    "completion": "print the tab completion for bash",
}


def main() -> None:
    """Hands the arguments after the command to its module."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    lines = [
        f"  {command:{max(map(len, _COMMANDS))}}  {about}" for command, about in _COMMANDS.items()
    ]
    usage = "\n".join(["usage: stagewise <command> [arguments]", "", "commands:", *lines])
    if name in ("-h", "--help"):
        print(f"{usage}\n\nMore: stagewise <command> --help, stagewise --version.")
    elif name in ("-V", "--version"):
        print(f"stagewise {version('stagewise')}")
    elif name not in _COMMANDS:
        # Imported here, so that known commands start without it.
        from stagewise.recipes.arguments import did_you_mean

        meant = did_you_mean(name, _COMMANDS)
        sys.exit(f"stagewise: there is no command {name!r}.{meant}\n{usage}")
    else:
        try:
            _run(name)
        except ModuleNotFoundError as error:
            sys.exit(f"stagewise {name}: {error}. Install it: pip install 'stagewise[recipes]'")
        except KeyboardInterrupt:  # during the import
            sys.exit(130)


def _run(name: str) -> None:
    if name == "completion":
        if sys.argv[2:]:
            sys.exit(f"stagewise completion: Expected no arguments, got {' '.join(sys.argv[2:])}.")
        completion = import_module("stagewise.recipes.completion")
        parsers = {
            command: import_module(f"stagewise.recipes.{command.replace('-', '_')}").parser()
            for command in _COMMANDS
            if command not in ("train", "completion")
        }
        print(completion.script(list(_COMMANDS), parsers))
        return
    module = f"stagewise.recipes.{name.replace('-', '_')}"
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    # Lightning starts the processes of further ranks by the name of the main module.
    sys.modules["__main__"].__spec__ = find_spec(module)
    import_module(module).main()
