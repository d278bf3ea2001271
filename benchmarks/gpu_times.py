"""Times of the oracle on a device beside those of others: a case of `benchmarks/gpu.py`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from gpu_cases import Left, Rows, Sizes, asked, clock, made, name_of
from measure import first_line
from peers import with_cdist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stagewise import LatentBank, Oracle


def padded(bank: LatentBank, xt: Tensor, t: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Class-wise as one writes it: classes filled up to the largest, gathered, two `bmm`."""
    table = bank.class_table(labels.device)
    ends = table[torch.searchsorted(table[:, 0].contiguous(), labels), 1:]
    at = ends[:, :1] + torch.arange(bank.largest_class, device=xt.device)
    none = at >= ends[:, 1:]
    at = at.clamp_max(len(bank) - 1)
    query, scale = xt.flatten(1).to(bank.dtype)[:, None], (t / (1 - t) ** 2)[:, None]
    norms = bank.sq_norms.float()

    def run() -> Tensor:
        rows = bank.rows[at]
        logits = (query @ rows.mT)[:, 0].float() * scale
        logits = logits - norms[at] * (scale * t[:, None]) / 2
        weights = logits.masked_fill(none, -torch.inf).softmax(1)
        return (weights[:, None].to(rows.dtype) @ rows)[:, 0]

    return run


def peers(bank: LatentBank, xt: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Callable]:
    """What others do for the same queries, and the floor."""
    if labels is not None:
        return {"padded bmm": padded(bank, xt, t, labels)}
    rows, query = bank.rows, xt.flatten(1).to(bank.dtype)
    weights = torch.rand(len(query), len(rows), device=xt.device).to(bank.dtype)

    def attention() -> Tensor:
        scale = (t / (1 - t) ** 2)[:, None].to(query.dtype)
        return scaled_dot_product_attention((query * scale)[None], rows[None], rows[None], scale=1)

    return {
        "two bare products": lambda: (query @ rows.T, weights @ rows),
        "cdist + softmax": lambda: with_cdist(rows.float(), xt.flatten(1).float(), t),
        "SDPA": attention,
    }


def timed(
    bank: LatentBank, sizes: Sizes, class_wise: bool, count: int, early: bool, left: Left
) -> Rows:
    """Rotating queries of one kind, and peers where t is from all of [0, 1]."""
    device, oracle = bank.device, Oracle(bank)
    sets = []
    for seed in range(3):
        t = torch.rand(count, device=device) * (0.1 if early else 0.999) + 1e-4
        sets.append(asked(bank, count, t, seed))
    about = {
        "rows": name_of(bank.dtype),
        "over": "class" if class_wise else "all rows",
        "queries": count,
        "t": "t < 0.1" if early else "U(0, 1)",
    }

    def run(turn: int) -> Tensor:
        xt, t, x1, labels = sets[turn % len(sets)]
        return oracle.correction(xt, t, x1, labels if class_wise else None)

    spent, host = clock(run, device, sizes.turns)
    read = (sizes.rows / sizes.classes * count if class_wise else sizes.rows) * bank.dim
    ours = {"what": "stagewise", "ms": spent, "host ms": host}
    found: Rows = [about | ours | {"GB": read * bank.rows.element_size() / 1e9}]
    xt, t, _, labels = sets[0]
    others = {} if early else peers(bank, xt, t, labels if class_wise else None)
    for name, peer in others.items():
        if left() < 0:
            break
        try:
            spent, host = clock(lambda _: peer(), device, 3)  # noqa: B023
        except RuntimeError as error:  # out of memory, most of all
            found.append(about | {"what": name, "failed": first_line(error)})
            continue
        found.append(about | {"what": name, "ms": spent, "host ms": host})
    return found


def times(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """Times, class-wise and over all rows, many queries first, with peers."""
    found: Rows = []
    for dtype in (torch.bfloat16, torch.float32):
        bank = made(sizes.rows, sizes.shape, sizes.classes, dtype, device)
        kinds = product((True, False), reversed(sizes.queries), (False, True))
        for class_wise, count, early in kinds:
            if left() < 0:
                return found
            found += timed(bank, sizes, class_wise, count, early, left)
        del bank
    return found
