"""Hooks on the user's modules that copies and pickles of them do not have.

Training makes copies of a network (averages, teachers, files), which outlive it. A copy with a
live hook would report its own calls, and keep the listener alive.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

__all__ = ["CallHook", "eager"]


class CallHook:
    """A forward hook on a module that does nothing in copies and pickles of that module.

    `remove` also takes it off deep copies. In a pickle it is a function of the standard library
    that does nothing, so a process without this library can load it.

    Args:
        function: Called with the module, its arguments, keyword arguments and, after a forward
            call, its output. It returns nothing.
        register: `module.register_forward_hook` or `module.register_forward_pre_hook`.
        **options: Of `register`.
    """

    def __init__(
        self, function: Callable[..., None], register: Callable[..., Any], **options: Any
    ) -> None:
        self._function: Callable[..., None] | None = function
        self._copies: list[CallHook] = []
        self._handle = register(self, with_kwargs=True, **options)

    def __call__(self, *args: Any) -> None:
        """Calls the function; in a copy it does nothing."""
        if self._function is not None:
            self._function(*args)

    def remove(self) -> None:
        """Takes it off the module and off copies of it; calling it again does nothing."""
        self._handle.remove()
        for copied in self._copies:
            copied.remove()
        self._copies = []

    def __deepcopy__(self, memo: dict[int, Any]) -> CallHook:
        copied = memo[id(self)] = CallHook.__new__(CallHook)
        copied._function, copied._copies = None, []
        # The handle holds the module's hooks; through the memo its copy holds the copied ones.
        copied._handle = copy.deepcopy(self._handle, memo)
        self._copies.append(copied)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext, "__exit__")


def eager(root: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """Names and submodules outside of what is compiled, whose hooks run."""
    if getattr(root, "_compiled_call_impl", None) is not None:
        return []
    found = [(name, root)]
    if "_orig_mod" in root._modules:  # torch.compile(module)
        return found
    for key, child in root.named_children():
        found += eager(child, f"{name}.{key}" if name else key)
    return found
