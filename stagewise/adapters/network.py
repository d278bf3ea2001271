r"""The network of a training, found by what it is called with.

A seam knows the path, what is predicted and how time is counted, but not who predicts. In the first
training step every submodule is watched. The network is the one that is given `x_t` and a time such
that, with the `x_1` of the batch and the path of a seam, the noise

    x_0 = (x_t - a_t x_1) / s_t

comes out standard normal. No other call passes that test: not an encoder, not a loss, not a network
that is given other samples than the batch's, not the right network read with reversed time. From
then on the same call can be made with other samples, and its answer read as a velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seam
from stagewise.paths import Path, PathCoefficients, expand_like, same_path

__all__ = ["Network", "NetworkSearch", "can_tell", "noise_of", "tensor_of"]

_NOISY = 0.05
"""The least sigma at which the noise of a sample is held against a normal distribution."""


def noise_of(path: Path, xt: Tensor, t: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The noise of a noisy sample, and where that can be said.

    Args:
        path: The path.
        xt: Noisy samples, (B, *).
        t: Times in [0, 1], (B,).
        x1: What they were made from, (B, *).

    Returns:
        `x_0`, (B, *), float32, and whether sigma is so large that the rounding of `xt` leaves at
        least a tenth of it unspoilt, (B,). Elsewhere it is 0.
    """
    values = path(t.to(torch.float32))
    known = can_tell(values, xt.dtype)
    gap = xt.float() - expand_like(values.alpha, x1) * x1.float()
    x0 = gap / expand_like(torch.where(known, values.sigma, torch.inf), x1)
    return x0, known


def can_tell(path: PathCoefficients, dtype: torch.dtype) -> Tensor:
    """Where the noise is ten times the rounding of noisy samples in `dtype`; any shape."""
    return path.sigma >= 10 * torch.finfo(dtype).eps


def _is_normal(path: Path, xt: Tensor, t: Tensor, x1: Tensor) -> bool:
    """Whether the noise has mean 0 and mean square 1, within six standard errors or 2 %."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        return False
    noisy = path(t.float()).sigma >= _NOISY
    if not bool(noisy.any()):
        return False
    x0 = noise_of(path, xt, t, x1)[0][noisy]
    n = x0.numel()
    mean, square = float(x0.mean()), float(x0.square().mean())
    return abs(mean) < max(6 / math.sqrt(n), 0.02) and abs(square - 1) < max(
        6 * math.sqrt(2 / n), 0.02
    )


@dataclass(frozen=True)
class _Slots:
    """Where in the flattened arguments of a call what lies.

    Attributes:
        spec: The structure of `(args, kwargs)`.
        leaves: Its leaves; those below are replaced in a call of our own.
        x: The leaf that holds `x_t`.
        time: The leaf that holds the time; -1: the last column of `x`.
        labels: The leaf that holds the classes; None: there is none.
    """

    spec: Any
    leaves: tuple[Any, ...]
    x: int
    time: int
    labels: int | None = None

    def read(self, leaves: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """`x`, (B, *), and time, (B,), of a call."""
        x = leaves[self.x]
        if self.time < 0:
            return x[:, :-1], x[:, -1]
        return x, leaves[self.time].reshape(-1).to(torch.float32)


class Network:
    """A network that can be asked for the velocity, as the training asks it.

    Attributes:
        module: What is called.
        name: Its name below the module that was searched; empty for that itself.
        seam: What says path, prediction and convention.
    """

    def __init__(self, module: nn.Module, name: str, seam: Seam, slots: _Slots) -> None:
        self.module, self.name, self.seam = module, name, seam
        self._slots = slots

    def describe(self) -> str:
        """One line for logs."""
        where = f"module.{self.name}" if self.name else "module"
        labels = ", labels" if self.conditional else ""
        return f"{where}: {type(self.module).__name__}(x_t, time{labels})"

    @property
    def conditional(self) -> bool:
        """Whether it is given labels."""
        return self._slots.labels is not None

    def of(self, root: nn.Module) -> Network:
        """The same network in a copy of the module that was searched."""
        return Network(root.get_submodule(self.name), self.name, self.seam, self._slots)

    @torch.no_grad()
    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The velocity at noisy samples, in the library's convention.

        Args:
            xt: Noisy samples, (B, *).
            t: Times in [0, 1], (B,), t = 0 is noise.
            labels: Classes, (B,), for a network that is given some.

        Returns:
            The velocity, (B, *), float32.

        Raises:
            ValueError: If the network is given labels and there are none, or returns another shape.
        """
        slots = self._slots
        leaves = list(slots.leaves)
        x, time = self.seam.to_network(xt, t)
        if slots.time < 0:
            like = leaves[slots.x]
            leaves[slots.x] = torch.cat([x.to(like.dtype), time[:, None].to(like.dtype)], 1)
        else:
            leaves[slots.x] = x.to(leaves[slots.x].dtype)
            like = leaves[slots.time]
            leaves[slots.time] = time.to(like.dtype).reshape(-1, *like.shape[1:])
        if slots.labels is not None:
            if labels is None:
                raise ValueError(f"{self.describe()} is given labels, and there are none here.")
            like = leaves[slots.labels]
            if like.is_floating_point():
                leaves[slots.labels] = functional.one_hot(labels, like.shape[1]).to(like.dtype)
            else:
                leaves[slots.labels] = labels.to(like.dtype)
        args, kwargs = pytree.tree_unflatten(leaves, slots.spec)
        return self.velocity(self.module(*args, **kwargs), xt, t)

    def velocity(self, output: Any, xt: Tensor, t: Tensor) -> Tensor:
        """What an answer of the network stands for, (B, *), float32."""
        y = self.seam.convention.sign * tensor_of(output, tuple(xt.shape)).float()
        return self.seam.prediction.to_velocity(self.seam.path(t.float()), y, xt.float())

    def inputs(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """`x_t` and t of a call, None if it is made in another way than the first one."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._slots.spec:
            return None
        return self.seam.from_network(*self._slots.read(leaves))


def tensor_of(output: Any, shape: tuple[int, ...]) -> Tensor:
    """The tensor among what a network returns: itself, the first of a tuple, or its `.sample`.

    Raises:
        ValueError: If there is none of this shape.
    """
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        came = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"Expected the network to return what stands for a velocity, of shape {shape}, got "
            f"{came}. Say how: velocity=lambda module, xt, t, labels: ..."
        )
    return found


class NetworkSearch:
    """Watches the calls of one training step; see the module docstring.

    Args:
        root: The module.
        seams: What may make its targets (`find_seams`).
        x1: The samples of the batch, (B, *).
        labels: Their classes, (B,), or None.

    Attributes:
        found: The network, None so far.
        call: The arguments, keyword arguments and output of its call.
    """

    def __init__(
        self, root: nn.Module, seams: Sequence[Seam], x1: Tensor, labels: Tensor | None
    ) -> None:
        self.seams = [s for k, s in enumerate(seams) if not any(_alike(s, o) for o in seams[:k])]
        self.x1, self.labels = x1.detach(), labels
        self.seen: list[str] = []
        self.found: Network | None = None
        self.call: tuple[Any, Any, Any] | None = None
        self._inside: nn.Module | None = None
        self._problem = ""
        # What is compiled in place has hooks compiled into it; a compiled copy has them outside.
        self._hooks: list[Any] = []
        names = {module: name for name, module in root.named_modules()}
        for name, module in _eager(root):
            enter = self._enter(names.get(module, name))
            self._hooks += [
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ]

    def stop(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def result(self) -> Network:
        """The network.

        Raises:
            ValueError: If none was found, with what was seen and the cure.
        """
        if self.found is not None:
            return self.found
        if self._problem:
            raise ValueError(self._problem)
        calls = "".join(f"\n  {line}" for line in self.seen[:8]) or " none with such a tensor"
        paths = ", ".join(repr(seam.path) for seam in self.seams)
        raise ValueError(
            "Found no network from which a velocity can be had: no call in the first training step "
            f"was given x_t and a time that fit x_1 of the batch on {paths}. Calls with a tensor "
            f"of its shape, {tuple(self.x1.shape)}:{calls}\n"
            "If training encodes, scales, flips or reorders x_1 itself, say find=... so that it "
            "is what is trained on; if the network is called in another way, say "
            "velocity=lambda module, xt, t, labels: module.net(xt, t, labels)."
        )

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.found is not None or self._inside is not None or not torch.is_grad_enabled():
                return
            with torch.no_grad():
                if self._consider(module, name, args, kwargs):
                    self._inside = module

        return enter

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is self._inside:
            self._inside = None
            if self.call is None:
                self.call = args, kwargs, output

    def _consider(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> bool:
        """Whether this call is the network's; what is inside of it is not looked at."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        shape = tuple(self.x1.shape)
        for slots in _candidates(leaves, spec, shape):
            for seam in self.seams:
                xt, t = seam.from_network(*slots.read(leaves))
                if not _is_normal(seam.path, xt, t, self.x1):
                    continue
                where = f"module.{name}" if name else "module"
                labels, problem = _conditioning(leaves, slots, self.labels, len(self.x1))
                if problem:
                    self._problem = (
                        f"{where} is the network, but {problem}, so it cannot be asked about other "
                        "samples. Say how: velocity=lambda module, xt, t, labels: ..."
                    )
                    return True
                kept = _detached(leaves, (slots.x, slots.time, labels))
                self.found = Network(module, name, seam, replace(slots, leaves=kept, labels=labels))
                return True
        if any(isinstance(leaf, Tensor) and leaf.shape == shape for leaf in leaves):
            given = ", ".join(_short(leaf) for leaf in leaves[:6])
            self.seen.append(f"{name or 'module'}: {type(module).__name__}({given})")
        return False


def _candidates(leaves: list[Any], spec: Any, shape: tuple[int, ...]) -> list[_Slots]:
    """All ways to read `x_t` and a time out of a call."""
    found, size = [], shape[0]
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        if len(shape) == 2 and tuple(x.shape) == (size, shape[1] + 1):
            found.append(_Slots(spec, (), i, -1))
        if tuple(x.shape) != shape:
            continue
        others = [j for j in range(len(leaves)) if j != i and _one_each(leaves[j], size)]
        found += [_Slots(spec, (), i, j) for j in others]
    return found


def _one_each(leaf: Any, size: int) -> bool:
    """Whether a leaf is one number for each of `size` samples."""
    if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.dtype is torch.bool:
        return False
    return len(leaf) == size == leaf.numel()


def _conditioning(
    leaves: list[Any], slots: _Slots, labels: Tensor | None, size: int
) -> tuple[int | None, str]:
    """The leaf that holds the labels, and what is wrong with the other tensors of a call."""
    found = None
    for k, leaf in enumerate(leaves):
        if k in (slots.x, slots.time) or not isinstance(leaf, Tensor):
            continue
        if not leaf.ndim or len(leaf) != size or not leaf.numel():
            continue  # EDM's labels have no columns where there are none
        whole = leaf.shape == (size,) and not leaf.is_floating_point()
        one_hot = leaf.ndim == 2 and leaf.is_floating_point() and bool((leaf.sum(1) <= 1).all())
        if not (whole or one_hot) or found is not None or labels is None:
            return None, f"it is also given {_short(leaf)}, which is not a label of the batch"
        found = k
    return found, ""


def _detached(leaves: list[Any], taken: tuple[int | None, ...]) -> tuple[Any, ...]:
    """The leaves as they are reused: of those that are replaced only the shape and type matter."""
    return tuple(
        (leaf[:1].clone() if k in taken else leaf).detach() if isinstance(leaf, Tensor) else leaf
        for k, leaf in enumerate(leaves)
    )


def _eager(root: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The submodules whose hooks run as they are, outside of what is compiled."""
    if getattr(root, "_compiled_call_impl", None) is not None:
        return []
    found = [(name, root)]
    if "_orig_mod" in root._modules:  # torch.compile(module)
        return found
    for key, child in root.named_children():
        found += _eager(child, f"{name}.{key}" if name else key)
    return found


def _alike(one: Seam, other: Seam) -> bool:
    kinds = [(type(seam), seam.prediction, seam.convention) for seam in (one, other)]
    return kinds[0] == kinds[1] and same_path(one.path, other.path)


def _short(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return type(leaf).__name__
