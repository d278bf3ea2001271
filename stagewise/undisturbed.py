"""Reads data in the middle of a run without changing what the run draws afterwards."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["in_eval_mode", "same_draws", "undisturbed"]


_EMPTY = {str, bytes, int, float, complex, bool, type(None), CodeType, torch.dtype, torch.Size}
"""Types of values that refer to no others."""

_OTHERS = {"stagewise", "torch", "numpy", "torchmetrics", *sys.stdlib_module_names}
_OTHERS |= {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
"""Packages whose classes refer to no generator; their objects may."""


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a module; restores the mode of every submodule at the end."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def same_draws() -> Iterator[None]:
    """Restores the global generators of torch, numpy and Python at the end."""
    own, numbers = random.getstate(), np.random.get_state()
    # All devices by name: without names it warns if there are several.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numbers)


@contextmanager
def undisturbed(module: nn.Module, *others: Any, seed: int = 0) -> Iterator[None]:
    """Restores every generator of a run, and the mode of every submodule, at the end.

    `others` are objects that may hold a generator: loader, functions. Inside, all generators start
    from the same seed, so that draws are the same on every rank and each time; gradients are off,
    and the module, which a `read_batch` may call, is in evaluation mode.
    """
    generators = [_access(generator) for generator in _generators([module, *others])]
    kept = [(put, get()) for get, put, _ in generators]
    with same_draws(), torch.no_grad(), in_eval_mode(module):
        try:
            for reseed in (random.seed, np.random.seed, torch.manual_seed):
                reseed(seed)
            for _, _, own in generators:
                own(seed)
            yield
        finally:
            for put, state in kept:
                put(state)


def _generators(roots: list[Any]) -> list[Any]:
    """All generators that the roots refer to, anywhere in data sets, transforms and closures."""
    kinds = {torch.Generator, random.Random, np.random.RandomState}
    kinds.update(np.random.BitGenerator.__subclasses__())
    held = {*kinds, np.random.Generator}
    found, seen, ahead = [], set(), roots
    while ahead:
        value = ahead.pop()
        kind = type(value)
        if kind in _EMPTY or id(value) in seen:
            continue
        seen.add(id(value))
        if kind in kinds:
            found.append(value)
        elif isinstance(value, FunctionType):
            # Not all names of its module: they lead to everything that is imported anywhere.
            names = value.__globals__
            if id(names) not in seen:
                seen.add(id(names))
                ahead += [one for one in names.values() if type(one) in held]
            held_by = value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)
            ahead += filter(None, held_by)
        # Long lists are the samples.
        elif not isinstance(value, (ModuleType, Tensor)) and not (
            (kind in (list, tuple, dict) and len(value) > 1000)
            or (isinstance(value, type) and str(value.__module__).split(".")[0] in _OTHERS)
        ):
            ahead += gc.get_referents(value)
    return found


def _access(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any], Callable[[int], Any]]:
    """Getter and setter of a generator's state, and what seeds it."""
    if isinstance(generator, np.random.BitGenerator):
        put = partial(setattr, generator, "state")
        return lambda: generator.state, put, lambda seed: put(type(generator)(seed).state)
    if isinstance(generator, np.random.RandomState):
        get = partial(generator.get_state, legacy=False)
        # Its bit generator is seeded by itself; this clears the cached normal number.
        clear = {"has_gauss": 0, "gauss": 0.0}
        return get, generator.set_state, lambda _: generator.set_state(get() | clear)
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate, generator.seed
    return generator.get_state, generator.set_state, generator.manual_seed
