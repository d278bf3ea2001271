"""Work on a side stream of a CUDA device: an oracle's answer while a network runs.

The side stream waits for all work queued before, and the main stream waits for it before the result
is used. Memory freed in between may be reused: so what the work reads is held until then, and what
it makes is marked as used by the main stream (`record_stream`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stagewise.tracing import untraced

__all__ = ["beside"]

_streams: dict[torch.device, torch.cuda.Stream] = {}


@untraced
def beside(work: Callable[[], tuple[Tensor, ...]], *reads: Any) -> Callable[[], tuple[Tensor, ...]]:
    """Queues work on a side stream; returns a function that waits for it and returns its result.

    It may read everything queued so far. `reads` are its inputs that may be freed before the result
    is used; the first one, a tensor, decides the device. Results are bitwise the same: random draws
    keep the order of the calls. Without CUDA, or in a CUDA graph, the work runs at once.
    """
    first = reads[0]
    if not _runs_beside(first):
        result = work()
        return lambda: result
    device = first.device
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    side = _streams[device]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        found = work()

    def wait(held: tuple[Any, ...] = reads) -> tuple[Tensor, ...]:
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)
        for value in found:
            value.record_stream(main)
        return found

    return wait


def _runs_beside(x: Tensor) -> bool:
    # Fake tensors, which test placement without a device, have no streams.
    real = x.device.type == "cuda" and type(x) in (Tensor, torch.nn.Parameter)
    return real and not torch.cuda.is_current_stream_capturing()
