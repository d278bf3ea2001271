"""What follows from a profile for training and sampling: each item with its reason and source.

Little of this is known beyond the data set it was measured on, and each item says so. All times and
shifts are in the convention t = 0 noise: `t -> s t / (1 + (s - 1) t)` with s < 1 gives navigation
more, and s is 1 over the shift of papers that count from data to noise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from stagewise.memory import available_memory, format_bytes
from stagewise.profile import Profile
from stagewise.sampling import guidance_interval

__all__ = ["Advice", "advise"]

_EARLY, _LATE = 0.1, 0.3
"""Midpoints up to here are like those of ImageNet's latents (about 0.06), and from here on like
those of the photographs that were trained on for this project (0.59)."""

_PAPER = "arXiv 2512.02826"
_RAE = "arXiv 2510.11690"
_OURS = "this project"


@dataclass(frozen=True)
class Advice:
    """One item.

    Attributes:
        what: What is to be set.
        value: To what.
        reason: Why, and how far that is known.
        source: Where it comes from.
    """

    what: str
    value: str
    reason: str
    source: str

    def as_dict(self) -> dict[str, str]:
        """The fields."""
        return asdict(self)


def advise(profile: Profile, *, total_rows: int | None = None) -> list[Advice]:
    """What to set for latents with this profile.

    Args:
        profile: Of the bank, or of a part of it.
        total_rows: Rows of the whole set, if the profile is of a part; default those profiled.

    Returns:
        The items: shifts for training and sampling, mixing, guidance, memory, engine, and what was
        found wrong with the rows, if anything.
    """
    total = total_rows or profile.rows
    found = [
        _training_shift(profile),
        _sampling_shift(profile),
        _mixing(profile),
        _guidance(profile),
        _memory(profile, total),
        Advice(
            "engine",
            profile.engine.split(":")[0].split(",")[0].split(". ")[0],
            profile.engine + _part(profile, total),
            "measured on CPUs, docs/engines.md",
        ),
    ]
    if profile.duplicates:
        found.append(_duplicates(profile))
    if not math.isclose(profile.std, 1, rel_tol=0.3):
        found.append(_scale(profile))
    return found


def _training_shift(profile: Profile) -> Advice:
    midpoint, rule = profile.boundary.midpoint, dimension_shift(profile.dim)
    if midpoint <= _EARLY:
        return Advice(
            "timestep shift, training",
            "s = 0.5",
            f"The boundary ({midpoint:.3f}) is as early as that of ImageNet 256 latents, where of "
            "s = 1, 0.7, 0.5 and 0.1 this gave the best gFID (12.46 at 0.7, 12.23 at 0.5, 19.91 "
            "at 0.1; LightningDiT-B/1 on VA-VAE, one model and data set). The rule by dimension, "
            f"min(1, sqrt(4096 / D)), says {rule:.2f}.",
            f"{_PAPER}; {_RAE} for the rule",
        )
    if midpoint >= _LATE:
        return Advice(
            "timestep shift, training",
            "s = 1 (none)",
            f"The boundary is late ({midpoint:.3f}): uniform t is in navigation for that share of "
            "the draws already. On photographs with a boundary of 0.59 times that favoured "
            "navigation or the middle gave a higher held-out loss than uniform ones (one data "
            "set, a small model).",
            f"{_OURS}, docs/results.md",
        )
    where = "was not reached" if math.isnan(midpoint) else f"is at {midpoint:.3f}"
    return Advice(
        "timestep shift, training",
        f"s = {rule:.2f}",
        f"The rule by dimension, min(1, sqrt(4096 / D)): made for latents of D = 196608 and not "
        f"measured for these. The boundary {where}, between what was measured: 0.5 was best at "
        "0.06, none at 0.59. Try both.",
        f"{_RAE} (1 / s there, t = 1 is noise)",
    )


def _sampling_shift(profile: Profile) -> Advice:
    rule = dimension_shift(profile.dim)
    if profile.boundary.midpoint <= _EARLY:
        return Advice(
            "timestep shift, sampling",
            "s = 0.3",
            "What LightningDiT's configurations sample with (VA-VAE, D = 8192, Euler, 250 steps): "
            "a setting in use for one set of latents, no optimum for these. The rule by dimension "
            f"says {rule:.2f}, the same as for training.",
            f"hustvl/LightningDiT configs; {_RAE} for the rule",
        )
    return Advice(
        "timestep shift, sampling",
        f"s = {rule:.2f}",
        "The rule by dimension, min(1, sqrt(4096 / D)), the same for training and sampling: made "
        "for latents of D = 196608. With many steps the shift of a sampler matters little.",
        f"{_RAE} (1 / s there, t = 1 is noise)",
    )


def _mixing(profile: Profile) -> Advice:
    at = profile.boundary.collapsed
    measured = (
        f"mean largest weight 0.99 at t = {at:.3f} [{profile.boundary.collapsed_low:.3f}, "
        f"{profile.boundary.collapsed_high:.3f}]"
    )
    if not 0 < at < 1:
        return Advice(
            "mixing boundary",
            "none: oracle targets at all t",
            "The mean largest weight does not cross 0.99 between the first and the last t that "
            "were measured, so no t is known from which the oracle's target is the conditional "
            "one.",
            f"measured here; definition of the stages: {_PAPER}",
        )
    return Advice(
        "mixing boundary",
        f"t = {at:.3f}",
        f"Above it the oracle's target is the conditional one ({measured}), and asking for it is "
        f"wasted. Below are {at:.0%} of uniform t and {_logit_normal(at):.1%} of logit-normal(0, "
        f"1) ones, to which mixing is confined. Over uniform t it takes {profile.removable:.3g} "
        "off the loss per number, all of it variance: the optimum is the same.",
        f"measured here; definition of the stages: {_PAPER}",
    )


def _guidance(profile: Profile) -> Advice:
    at = profile.boundary.collapsed
    known = (
        "On ImageNet 256 [0.1, 0.6] gave gFID 2.80 against 10.79 for all t (LightningDiT-B/1, "
        "VA-VAE, w = 2.5), and there the target has collapsed at about 0.10."
    )
    interval = guidance_interval(at)
    if interval is not None:
        return Advice(
            "CFG interval",
            "[{:.2f}, {:.1f}]".format(*interval),
            f"{known} That the interval begins where the target has collapsed is a reading of "
            "this one result, not measured elsewhere. Scan its lower end.",
            f"{_PAPER}; the reading is {_OURS}'s",
        )
    return Advice(
        "CFG interval",
        "scan, from [0.1, 0.6]",
        f"{known} Nothing is known for a boundary as late as that of these latents.",
        _PAPER,
    )


def _memory(profile: Profile, total: int) -> Advice:
    wide, half = 4 * total * profile.dim, 2 * total * profile.dim
    free = available_memory()
    reason = f"{total} rows of {profile.dim} numbers, {format_bytes(wide)} in float32"
    value = f"{format_bytes(half)} in bfloat16"
    if free is not None:
        reason += f"; {format_bytes(free)} are free on this machine"
        if wide < 0.5 * free:
            value = f"{format_bytes(wide)} in float32"
        elif half > 0.8 * free:
            value += ", on disk: LatentBank.write"
    reason += ". In bfloat16 rows are rounded relative to their distance from the mean. "
    reason += "Stored flips double it."
    return Advice("bank", value, reason, "arithmetic; the rounding: docs/engines.md")


def _duplicates(profile: Profile) -> Advice:
    labels = f", {profile.mislabelled} of them under another label" * bool(profile.mislabelled)
    return Advice(
        "duplicates",
        f"{profile.duplicates} rows",
        f"They equal an earlier row to the last bit{labels}. Their largest weight stays at 1/2 or "
        "below at every t, which holds the collapsed boundary back or hides it, and models copy "
        "rows that are there more often. Remove them before training, unless they are meant.",
        "measured here",
    )


def _scale(profile: Profile) -> Advice:
    return Advice(
        "scale",
        f"standard deviation {profile.std:.3g}",
        "Schedules and shifts are made for 1 (EDM2: 0.5). A boundary in t moves with the scale: "
        "rho_t x standard deviation is what counts. If it is not meant, look at how the latents "
        "are normalised.",
        "hustvl/LightningDiT issues 22 and 34",
    )


def _part(profile: Profile, total: int) -> str:
    if total == profile.rows:
        return ""
    return f" (for the {profile.rows} rows that were profiled, of {total})"


def dimension_shift(dim: int) -> float:
    """RAE's rule in the convention t = 0 noise, `min(1, sqrt(4096 / D))` (arXiv 2510.11690)."""
    return min(1.0, math.sqrt(4096 / dim))


def _logit_normal(t: float) -> float:
    """P(sigmoid(z) < t) for a standard normal z."""
    return 0.5 * math.erfc(-math.log(t / (1 - t)) / math.sqrt(2))
