"""Work beside the main stream of a CUDA device: an oracle's answer, while a network runs.

The side stream first waits for all that was queued, and the main stream waits for it before the
result is used. So memory that is freed in between may be used again: what the work reads is held
until then, and what it makes is freed after later work of the main stream only if that is told of
it (`record_stream`).
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
    """Queues work on a side stream, and returns what waits for it and gives its result.

    Results are the same to the last bit: the order of all random draws is that of the calls. What
    is not on a CUDA device, or recorded into a graph, is done as it is called.

    Args:
        work: What is done; it reads what is queued so far.
        *reads: What it reads and may be freed before the result is asked for. The first one, a
            tensor, says on which device.
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
    # Fake tensors, with which placement is checked without a device, have no streams.
    real = x.device.type == "cuda" and type(x) in (Tensor, torch.nn.Parameter)
    return real and not torch.cuda.is_current_stream_capturing()
