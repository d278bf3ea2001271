"""Which rows are near to which: among the rows themselves, or in another space."""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.nearest_rows import nearest_others
from stagewise.oracle import require_tensors

__all__ = ["index_header", "neighbour_index", "search_space"]

_FORMAT = {"format": "stagewise.Smoothing", "version": "1"}


def search_space(bank: LatentBank, features: Tensor | None, class_wise: bool) -> LatentBank:
    """Where neighbours are searched: the bank, or features in its order and classes.

    Args:
        bank: The rows.
        features: (N, *) numbers, in the order of the samples that the bank was made from; or None.
        class_wise: Whether neighbours are of the row's own class.

    Raises:
        ValueError: On features of another length or with NaN or Inf, or classes that are not there.
        TypeError: If the features are no tensor.
    """
    if class_wise:
        bank.require_classes()
    if features is None:
        return bank
    require_tensors(features=features)
    if len(features) != len(bank) or features.ndim < 2:
        raise ValueError(
            f"Expected `features` with shape ({len(bank)}, F), a line for each row of the bank, "
            f"got {tuple(features.shape)}. Compute them for the samples the bank was made from."
        )
    features = features.detach().to(bank.device).flatten(1)
    features = features if features.is_floating_point() else features.float()
    wrong = (~features.isfinite().all(1)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"Expected finite `features`, got NaN or Inf in {len(wrong)} of {len(bank)} lines, the "
            f"first {wrong[0]}. Leave these samples out of the bank, or features=None."
        )
    own = features if bank.index is None else features[bank.index]
    labels = torch.tensor(bank.labels_of(range(len(bank)))) if class_wise else None
    return LatentBank(own, labels)


def neighbour_index(
    space: LatentBank,
    neighbours: int,
    class_wise: bool,
    device: torch.device | str | None,
    progress: bool,
) -> Tensor:
    """The K nearest rows that differ from each row, (N, K), int32; itself where there are fewer."""
    near = nearest_others(space, neighbours, class_wise, device, progress)
    own = torch.arange(len(near), dtype=torch.int32)[:, None]
    return near.where(near >= 0, own)


def index_header(
    bank: LatentBank, neighbours: int, class_wise: bool, space: LatentBank | str
) -> dict[str, str]:
    """What a file of neighbours says about itself; `space` may be its name."""
    name = space if isinstance(space, str) else "rows" if space is bank else space.fingerprint
    numbers = {"rows": len(bank), "dim": bank.dim, "neighbours": neighbours}
    about = {**{k: str(v) for k, v in numbers.items()}, "class_wise": str(class_wise)}
    return {**_FORMAT, "fingerprint": bank.fingerprint, **about, "space": name}
