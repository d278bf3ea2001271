"""`stagewise completion`: tab completion for bash.

The script that is printed contains the options of the parsers. Groups, choices and keys of recipes
come from Hydra: bash runs this file alone, without the package, so that it takes half a second.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra

__all__ = ["script"]

_SCRIPT = """\
# Tab completion of stagewise for bash. To install it:
#   stagewise completion > ~/.local/share/bash-completion/completions/stagewise
# For this shell only: eval "$(stagewise completion)"
_stagewise() {
  local word="${COMP_LINE:0:COMP_POINT}" words="" files="-f"
  word="${word##* }"
  local before="${COMP_WORDS[COMP_CWORD-1]}" key=""
  COMPREPLY=()
  # "--format=re" and "data.path=./a": only what follows "=" is completed.
  if [[ "$word" == *=* ]] && (( COMP_CWORD > 1 )); then key="${word%%=*}" before="${word%%=*}"; fi
  if (( COMP_CWORD == 1 )); then
    words="@COMMANDS@" files=""
  else
    [[ "$word" == *=*/* ]] && before="$word"
    case "${COMP_WORDS[1]} $before" in
@CASES@
      train\\ *=*/*) ;;  # a path
      train\\ *)
        words="$(COMP_LINE="${COMP_LINE#*stagewise }" @ASK@ -sc query=bash 2> /dev/null)"
        words="$words --cfg --help --multirun" ;;
    esac
  fi
  # If "=" does not separate words, bash expects the whole word back.
  local back="" value="${word#*=}" found one
  [[ -n "$key" && "$COMP_WORDBREAKS" != *=* ]] && back="$key="
  [[ -n "$key" ]] || value="$word"
  found="$(compgen -W "$words" -- "$word")"
  [[ -n "$key" && -z "$found" ]] && found="$(compgen -W "$words" -- "$value")"
  while IFS= read -r one; do
    one="${one#"$key="}"; [[ -n "$one" ]] && COMPREPLY+=("$back$one")
  done <<< "$found"
  if [[ -n "$files" ]] && (( ${#COMPREPLY[@]} == 0 )); then
    compopt -o filenames 2> /dev/null  # escapes names, and ends folders with "/"
    while IFS= read -r one; do
      [[ -n "$one" ]] && COMPREPLY+=("$back$one")
    done <<< "$(compgen -f -- "$value")"
    if (( ${#COMPREPLY[@]} == 1 )) && [[ ! -d "${COMPREPLY[0]#"$back"}" ]]; then
      compopt +o nospace 2> /dev/null
    fi
  elif (( ${#COMPREPLY[@]} == 1 )) && [[ "${COMPREPLY[0]}" != *[=./] ]]; then
    compopt +o nospace 2> /dev/null
  fi
}
complete -o nospace -F _stagewise stagewise"""


def script(commands: list[str], parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script, with all `commands` and the parsers of those that have one."""
    cases = []
    for name, parser in parsers.items():
        for option, action in parser._option_string_actions.items():
            words = [str(choice) for choice in action.choices or ()]
            if words:
                cases.append(f'      "{name} {option}") words="{" ".join(words)}" files="" ;;')
        options = " ".join(key for key in parser._option_string_actions if key.startswith("--"))
        cases.append(f'      {name}\\ *) words="{options}" ;;')
    ask = shlex.join([sys.executable, str(Path(__file__).resolve())])
    filled = {"@COMMANDS@": " ".join(commands), "@CASES@": "\n".join(cases), "@ASK@": ask}
    text = _SCRIPT
    for place, value in filled.items():
        text = text.replace(place, value)
    return text


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def _ask(config: Any) -> None:
    """Nothing: Hydra answers bash before it calls this."""


if __name__ == "__main__":
    _ask()
