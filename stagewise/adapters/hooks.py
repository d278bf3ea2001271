"""What is put on objects of the user for a while: copies and pickles of them have none of it.

Copies of a network are made within training (averages, teachers, files), and outlive it. One that
carried a live hook would report its own calls, and drag along what listens.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

__all__ = ["CallHook", "in_place_of"]


class CallHook:
    """A forward hook on a module, which copies and pickles of that module do not have.

    A deep copy that is made meanwhile has one that does nothing, and `remove` takes that off too.
    In a pickle it is a function of the standard library that does nothing, so that a process
    without this library loads it.

    Args:
        function: Called with the module, its arguments and keyword arguments, and its output unless
            it is called before. It returns nothing.
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
        # A handle knows the module's hooks: by the memo its copy knows those of the copied module.
        copied._handle = copy.deepcopy(self._handle, memo)
        self._copies.append(copied)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext, "__exit__")


def in_place_of(value: Any) -> tuple[Any, ...]:
    """What `__reduce__` of a stand-in for a value returns: copies and pickles hold the value."""
    return operator.getitem, ((value,), 0)
