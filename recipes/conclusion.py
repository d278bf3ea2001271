"""What follows from the table at the end of a training, in a few sentences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ["conclusion"]


def conclusion(rows: Sequence[dict[str, Any]]) -> str:
    """Sentences about the rows of `evaluate.stage_table`: the stages, then all t."""
    if not rows:
        return ""
    *stages, whole = rows
    points = [_stages(stages), _floor(whole), _left(stages), _gap(stages)]
    wrapped = [
        textwrap.fill(p, 100, initial_indent="  - ", subsequent_indent="    ") for p in points
    ]
    return "\n".join(["What to conclude:", *(line for line in wrapped if line)])


def _stages(stages: Sequence[dict[str, Any]]) -> str:
    edges = {row["stage"]: (row["from"], row["to"]) for row in stages}
    parts = []
    if "navigation" in edges:
        end = edges["navigation"][1]
        until = f"up to t = {end:.3f}" if end < 1 else "at all t"
        parts.append(f"{until} many training samples explain a noisy one (navigation)")
    if "refinement" in edges:
        parts.append(f"from t = {edges['refinement'][0]:.3f} on one does (refinement)")
    text = ", ".join(parts)
    return text and f"{text[0].upper()}{text[1:]}. The data decide this, not the training."


def _floor(whole: dict[str, Any]) -> str:
    share = whole["floor"] / whole["train"]
    if not math.isfinite(share):
        return ""
    return (
        f"{share:.0%} of the training loss ({whole['floor']:.4f} of {whole['train']:.4f}) is its "
        "floor, which no model can remove. Subtract it before you compare losses."
    )


def _left(stages: Sequence[dict[str, Any]]) -> str:
    left = [(row["train"] - row["floor"]) * (row["to"] - row["from"]) for row in stages]
    total = sum(left)
    if not total > 0:
        return ""
    most = max(range(len(left)), key=left.__getitem__)
    row = stages[most]
    width = row["to"] - row["from"]
    return (
        f"The rest, {total:.4f}, can be learned: {left[most] / total:.0%} of it lies in "
        f"{row['stage']}, which is {width:.0%} of t. A loss does not say how good samples are."
    )


def _gap(stages: Sequence[dict[str, Any]]) -> str:
    known = [row for row in stages if math.isfinite(row["gap"]) and math.isfinite(row["gap_se"])]
    if not known:
        return ""
    clear = [row for row in known if row["gap"] > 2 * row["gap_se"]]
    if not clear:
        return (
            "Held-out loss is nowhere above training loss by two standard errors: no sign that "
            "training samples are memorized."
        )
    listed = " and ".join(f"{row['stage']} ({row['gap'] / row['train']:+.0%})" for row in clear)
    return (
        f"Held-out loss is above training loss in {listed}: there the model knows its training "
        "samples better than others. If that grows while held-out loss no longer falls, stop or "
        "take more data."
    )
