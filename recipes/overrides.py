"""Errors in the overrides of `stagewise train`, with suggestions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from stagewise.recipes.arguments import did_you_mean
from stagewise.recipes.run_files import flat

__all__ = ["explained", "refuse_unknown", "require_numbers"]

_CONF = "stagewise.recipes.conf"
_GONE = {
    "engine=coarse": "The engine Coarse was removed. Use engine=exact, which is as good.",
    "engine=faiss": "The engine Faiss was removed. Use engine=nearest, which is faster.",
    "scheme=leave_one_out": "The target LeaveOneOut was removed, since it regularised nothing. Use "
    "scheme=two_stage.",
}
"""Choices of earlier versions."""
_MOVED = re.compile(r"data\.(path|format|flips|moments|normalize|multiplier|expected_std)=")
"""Settings that moved from the data module to its latents."""
_NUMBERS = ("seed", "module.", "data.", "net.", "evaluation.", "callbacks.", "trainer.")
_WORDS_TOO = ("trainer.devices", "trainer.precision")
"""Keys whose default is a number and that need one, and the exceptions."""


def refuse_unknown(arguments: Sequence[str]) -> None:
    """Refuses unknown options, and choices of earlier versions, with a line to paste."""
    for argument in arguments:
        plain = argument.lstrip("+")
        if plain in _GONE:
            raise ValueError(f"{argument}: {_GONE[plain]}")
        if _MOVED.match(plain):
            now = argument.replace("data.", "data.latents.", 1)
            raise ValueError(f"{argument.split('=')[0]} has moved to the latents. Use {now}")
        if argument in ("-sc", "--shell-completion"):
            raise ValueError('To switch tab completion on: eval "$(stagewise completion)"')
        option = argument.split("=")[0]
        if option.startswith("--") and option not in get_args_parser()._option_string_actions:
            raise ValueError(
                f"There is no option {option}; settings are key=value."
                f"{_meant(option.strip('-').replace('-', '_'), arguments)}"
            )


def require_numbers(config: DictConfig, choices: dict[str, str]) -> None:
    """Refuses a word where the recipe has a number; `choices` are those of the groups."""
    default = _composed([f"{group}={choice}" for group, choice in choices.items()])
    for key, value in flat(OmegaConf.to_container(config)).items():
        was = default.get(key)
        number = isinstance(was, (int, float)) and not isinstance(was, bool)
        word = isinstance(value, str) and not value.startswith("${")
        if number and word and key.startswith(_NUMBERS) and key not in _WORDS_TOO:
            raise ValueError(f"Expected a number for {key}, such as {was}, got {value!r}.")


def explained(error: Exception, arguments: Sequence[str]) -> str:
    """The message of an error of Hydra or OmegaConf, with suggestions."""
    if isinstance(error, InstantiationException):
        part = re.search(r"full_key: (\S+)", str(error))
        name = f"{part[1]}: " if part else ""
        return f"{name}{error.__cause__ or error}"
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if known := error.options:
            meant = did_you_mean(choice, known)
            return f"There is no {group}={choice}.{meant} There are: {', '.join(sorted(known))}."
    if match := re.match(r"Could not override '([^']+)'", text):
        meant = _meant(match[1], arguments)
        return f"There is no key {match[1]} in the configuration.{meant} +key=value adds one."
    if isinstance(error, InterpolationKeyError):
        text += ": another group must set it. experiment=... sets groups that belong together."
    if isinstance(error, OverrideParseException):
        text += "\nQuote a value with spaces or signs twice: 'key=\"a (b)\"'"
    return text


def _meant(key: str, arguments: Sequence[str]) -> str:
    """Suggests keys of the configuration, or groups."""
    groups = [item.name for item in files(_CONF).iterdir() if item.is_dir()]
    chosen = [one for one in arguments if one.lstrip("+").partition("=")[0] in groups]
    try:
        known = list(_composed(chosen))
    except HydraException:
        known = list(_composed([]))
    place, dot, last = key.rpartition(".")
    beside = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == place]
    near = [f"{place}.{one}" for one in get_close_matches(last, beside, n=1, cutoff=0.45) if dot]
    near = near or [one for one in known if one.rpartition(".")[2] == last][:3]
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return did_you_mean(key, [*known, *groups])


def _composed(overrides: list[str]) -> dict[str, Any]:
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_module(_CONF, version_base="1.3"):
        return flat(OmegaConf.to_container(compose("train", overrides)))
