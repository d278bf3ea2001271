"""The checks of a scheme before the first step, and of samples that are no rows of its bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.oracle import Oracle
from stagewise.paths import LinearPath, Path, same_path, unlike
from stagewise.schemes.conditions import unknown_conditions
from stagewise.smoothing import Smoothing
from stagewise.targets import Target
from stagewise.timesteps import TimestepSampler

if TYPE_CHECKING:
    from stagewise.schemes.scheme import Scheme

__all__ = [
    "check_density",
    "check_labels",
    "check_rows",
    "check_settings",
    "distance_from_rows",
    "labels_in",
    "near_rows",
    "tell_rounding",
    "unknown_boundary",
]


def check_settings(
    oracle: Oracle | None,
    timesteps: object,
    target: object,
    weight: object,
    class_wise: object,
    on_missing: object,
    path: Path | None,
    preserve_objective: bool,
    smoothing: object,
    strength: object,
) -> None:
    """Refuses settings of a `Scheme` that are wrong or contradict each other."""
    kinds: tuple[tuple[str, object, type, str], ...] = (
        ("oracle", oracle, Oracle, "Oracle(bank)"),
        ("target", target, Target, 'Mix("boundary")'),
        ("timesteps", timesteps, TimestepSampler, "LogitNormal()"),
        ("smoothing", smoothing, Smoothing, "Smoothing(bank)"),
    )
    for name, value, kind, example in kinds:
        if value is not None and not isinstance(value, kind):
            what = f"{'an' if kind is Oracle else 'a'} {kind.__name__} such as {example}"
            raise TypeError(f"Expected `{name}` to be {what}, got {value!r}.")
    held = None if oracle is None or oracle.condition else oracle.bank.conditions
    if target is not None and held is not None and class_wise is not False:
        raise unknown_conditions("a bank with conditions, and no kernel on them")
    if target is not None and oracle is None:
        raise ValueError(
            f"{target!r} needs an oracle, got none: Scheme(Oracle(bank, path), target=...). In a "
            "Lightning trainer StageScheme(target=...) makes one of the training set."
        )
    if preserve_objective and timesteps is None:
        raise ValueError(
            "Expected `timesteps` with preserve_objective=True, got none: the weight p(t)/q(t) "
            "needs the density q of the draws. Give the sampler that draws t: "
            "Scheme(timesteps=LogitNormal(), preserve_objective=True)."
        )
    if class_wise not in (True, False, "auto"):
        raise ValueError(f'Expected `class_wise` to be True, False or "auto", got {class_wise!r}.')
    if on_missing not in ("insert", "error"):
        raise ValueError(f'Expected `on_missing` "insert" or "error", got {on_missing!r}.')
    if on_missing == "error" and target is None:
        raise ValueError(
            'Expected a target for on_missing="error", got none: without one no sample is looked '
            "up in the bank. Leave it out, or give one: "
            'Scheme(oracle, target=Mix(), on_missing="error").'
        )
    if isinstance(smoothing, Smoothing) and oracle is not None:
        smoothing.check(oracle)
    if strength is not None and smoothing is None:
        raise ValueError(
            "Expected a smoothing for the `strength`, got none: "
            "Scheme(smoothing=Smoothing(bank), strength=lambda t: (t >= 0.7).float())."
        )
    functions = (("weight", weight, "t"), ("strength", strength, "(t >= 0.7).float()"))
    for name, value, example in functions:
        if value is not None and not callable(value):
            cure = f"{name}=lambda t: {example}"
            raise TypeError(f"Expected `{name}` to be a function of t, got {value!r}: {cure}.")
    if oracle is not None and path is not None and not same_path(path, oracle.path):
        raise ValueError(
            f"Expected the path of the oracle, {unlike(oracle.path, path)}. Give one of them."
        )


def check_density(sampler: TimestepSampler, weight: Callable[[Tensor], Tensor] | None) -> None:
    """Refuses a density of 0 where the loss counts."""
    t = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    counts = torch.ones_like(t) if weight is None else weight(t)
    missed = t[(sampler.density(t) <= 0) & (counts > 0)]
    if len(missed):
        raise ValueError(
            "Expected draws wherever the loss counts (preserve_objective=True), but the density of "
            f"{sampler!r} is 0 from t = {missed[0]:.3f} to {missed[-1]:.3f}. Give it uniform "
            "draws: WithFloor(sampler, 0.1)."
        )


def unknown_boundary(collapsed: bool = False) -> ValueError:
    """The error for a boundary, or its collapsed end, that is needed and not known."""
    if collapsed:
        return ValueError(
            "Expected the boundary from which samples are smoothed, which has not been measured "
            "yet: scheme.measure_boundary(), before the first step. Or say where: "
            "Scheme(strength=lambda t: (t >= 0.7).float(), ...)."
        )
    return ValueError(
        "Expected the boundary of the stages, which has not been measured yet. Give it as a "
        "number, Scheme(boundary=0.1) or scheme.set_boundary(0.1), or measure it before the first "
        "step: scheme.measure_boundary()."
    )


def check_labels(
    labels: Tensor, own: Tensor, classes: Sequence[int], null: int | None = None
) -> None:
    """Refuses labels, (B,), that differ from those of their rows, `own`, (B,), negative if unknown.

    If all wrong labels are one number that is none of the bank's `classes`, and others are right,
    it means dropped labels (classifier-free guidance), as `null` does.
    """
    labels = labels.reshape(-1).to(own)
    off = (labels != own) & (own >= 0)
    off &= labels != null if null is not None else True
    if not bool(off.any()):
        return
    got, had = int(labels[off][0]), int(own[off][0])
    if got not in classes and bool((labels[off] == got).all()) and bool((labels == own).any()):
        return
    said = (
        f"Expected `labels` of the samples, got others for {int(off.sum())} of {len(own)}: class "
        f"{got} for an x_1 of class {had}."
    )
    if classes and got not in classes:
        raise ValueError(
            f"{said} {got} is no class of the bank. If it means dropped labels (classifier-free "
            "guidance), give the labels before dropping, labels=batch[1], or say so: "
            f"Oracle(bank, null_class={got})."
        )
    raise ValueError(
        f"{said} Give the labels of the network, in the order of x_1: labels=batch[1]. If "
        "training has other classes than the batch, say so: "
        "StageRun(read_batch=lambda batch: (batch[0], classes_of(batch[1])))."
    )


def labels_in(bank: LatentBank, x1: Tensor, labels: Tensor) -> Tensor:
    """The classes of samples, (B,), as rows of a bank, -1 for others; `labels` if a row has it."""
    rows, starts = bank.find(x1).tolist(), {y: first for y, first, _ in bank.class_ends}
    known = zip(rows, bank.labels_of(rows), strict=True)
    own = torch.tensor([label if row >= 0 else -1 for row, label in known])
    first = torch.tensor([starts.get(label, -1) for label in labels.reshape(-1).tolist()])
    same = bank.find(x1, first=first.to(x1.device)).cpu() >= 0
    return torch.where(same, labels.reshape(-1), own)


def near_rows(scheme: Scheme, x1: Tensor) -> Tensor | None:
    """The row that each sample nearly equals, (B,), -1 for none; None if rows are not encoded."""
    if not scheme.rows_checked:  # in a trainer a callback does it, on all ranks
        tell_rounding(scheme, x1)
    held = scheme.oracle or scheme.smoothing
    return held.bank.find_near(x1) if scheme.encoded and held else None


def tell_rounding(scheme: Scheme, x1: Tensor) -> None:
    """Sets `Scheme.encoded` once: whether rows and samples are rounded differently."""
    held = scheme.oracle or scheme.smoothing
    whole = scheme.oracle is None or scheme.oracle.engine.holds_all_rows
    if held is None or held.bank.pairs or not whole:
        scheme.encoded = False
    elif scheme.encoded is None and len(x1):
        still = held.bank.conditions is None and not held.bank.origin
        used = scheme.target is not None or scheme.smoothing is not None
        others = x1[held.bank.find(x1) < 0] if still and used else x1[:0]
        scheme.encoded = bool((held.bank.find_near(others) >= 0).any())


def check_rows(
    bank: LatentBank,
    x1: Tensor,
    *,
    known: bool = False,
    shard: bool = False,
    near: bool = False,
    condition: Tensor | None = None,
) -> str | None:
    """Checks samples of a scheme against its bank.

    Refuses a wrong scale: most samples, at least 4, are no rows, and the distance of the median one
    from the bank's centre is more than 1.5 times that of the median row, and above that of 99 % of
    the rows; or below in the same way. Augmented and resampled samples are not so far off.

    Returns a warning with the share of samples that are no rows, or None: none for samples that are
    `known` by their sources, or a bank that is a `shard`, in which samples are not looked up. With
    `near` a sample that nearly equals a row is that row; one with another `condition` is none.
    """
    missing = torch.ones(len(x1), dtype=torch.bool)
    if not shard:
        missing = (bank.find_near(x1) if near else bank.find(x1, None, condition)).cpu() < 0
    if not missing.any():
        return None
    share, others = float(missing.float().mean()), x1[missing.to(x1.device)].to(bank.device)
    distance = (others.flatten(1).double() - bank.centre).norm(dim=1).median()
    further = float((bank.sq_norms > distance.square()).double().mean())
    ratio = float(distance / bank.sq_norms.median().sqrt().clamp_min(1e-30))
    off = ratio > 1.5 and further < 0.01 or ratio < 1 / 1.5 and further > 0.99
    # Of a few samples any may be far off.
    if off and share > 0.5 and len(others) >= 4:
        raise ValueError(
            f"Expected samples at the scale of the bank, got {share:.0%} that are no rows of it, "
            f"{ratio:.3g} times as far from its centre as its rows: the oracle's targets would be "
            "wrong. Build the bank from the latents that are trained on, as the model sees them "
            "(scaled, normalised)."
        )
    if shard or known:
        return None
    if bank.origin:
        return (
            f"{share:.0%} of the samples in the first step are not those that the reservoir took "
            "from the batch: the step draws or augments x_1 itself. Another draw of each "
            "is among the rows, which biases the targets. Draw in the data set instead, or train "
            "on fixed samples, for example the mean of an encoder, and say so: "
            "encode=lambda x, module: module.vae.encode(x).mean."
        )
    if condition is not None and (bank.find(x1).cpu()[missing] >= 0).all():
        return (
            f"{share:.0%} of the samples in the first step are rows of the bank under another "
            "condition, and each of them is added to its rows. Random captions, noisy "
            "observations? Give the bank a row for each, LatentBank(x, conditions=c), or the "
            "`source` of each sample (`stagewise.sources`), which then replaces its row."
        )
    gap = "" if bank.pairs is not None else f"{distance_from_rows(bank, others):.0%} of their norm"
    off_by = gap and f": the nearest row is off by {gap}"
    return (
        f"{share:.0%} of the samples in the first step are no rows of the bank, and each of them "
        f"is added to its rows{off_by}. Flips, augmentation, another VAE sample or another data "
        "set? Build the bank from the training samples; give the `source` of resampled latents "
        "(`stagewise.sources`), which then replace their row; or refuse them: "
        'Scheme(on_missing="error").'
    )


def distance_from_rows(bank: LatentBank, x1: Tensor) -> float:
    """The median distance of the first samples from their nearest rows, relative to their norm."""
    # On the linear path t = 1 has no noise at all: the posterior mean is the nearest row.
    few = x1[:16].to(bank.device, torch.float32)
    gap = (Oracle(bank, LinearPath()).posterior(few, 1.0).mean - few).flatten(1).norm(dim=1)
    return float(gap.median() / few.flatten(1).norm(dim=1).median().clamp_min(1e-30))
