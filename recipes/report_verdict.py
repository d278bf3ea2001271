"""What follows from the numbers of a run: a verdict in one sentence, and advice."""

from __future__ import annotations

import math
from typing import NamedTuple

from stagewise.recipes.report_facts import FLAT, NOTHING, Facts, number, percent, span, time_of
from stagewise.recipes.run_files import Event
from stagewise.velocity_probe import STAGES

__all__ = ["Advice", "advice", "copied", "share_of", "verdict"]

_OWN = "this run"
_RESULTS = "second-hand: docs/results.md, other data and models"
_PAPER = "second-hand: Liu et al., arXiv 2512.02826, on ImageNet"
_NAVIGATION, _, _REFINEMENT = STAGES


class Advice(NamedTuple):
    """What to change, and why."""

    do: str
    why: str
    source: str  # this run or other measurements; empty for what the run did not measure


def verdict(facts: Facts) -> str:
    """One sentence."""
    last = facts.last
    if last is not None and last.get("alarm"):
        return (
            f"Do not act on these numbers yet: at step {last['step']} {last['alarm']}, so the "
            "oracle is not that of this training."
        )
    if last is None and not facts.samples:
        middle = facts.boundary.midpoint
        if math.isnan(middle):
            return "These files measure neither the data nor the model, so there is no verdict."
        return (
            f"Navigation ends at t = {time_of(middle)} in these data; how well the model learns "
            "was not measured."
        )
    parts = [_learning(facts), _held_out(facts), copied(facts)]
    text = f"{', '.join(parts[:2])}, and {parts[2]}."
    return text[0].upper() + text[1:]


def _learning(facts: Facts) -> str:
    if facts.last is None:
        return "how well navigation is learned was not measured"
    if not facts.spans[_NAVIGATION][1] > 0:
        return "there is no navigation to learn, since one row explains a noisy sample at all t"
    excess = facts.stage(facts.last, _NAVIGATION, "excess")
    above = f"its error is {percent(excess)} above the floor" if math.isfinite(excess) else ""
    event, trend = facts.noticed("navigation learned"), facts.trend(_NAVIGATION)
    if trend is not None and trend[0] < -FLAT:
        fell = f"the error above the floor fell by {percent(-trend[0])} since step {trend[1]}"
        return f"navigation still improves ({fell})"
    if event is not None:
        return f"navigation was learned by step {event['step']}" + (above and f" ({above})")
    if trend is not None and trend[0] > FLAT:
        changed = f"the error above the floor rose by {percent(trend[0])} since step {trend[1]}"
        return f"navigation no longer improves ({changed})"
    if trend is not None:
        return "navigation no longer changes much" + (above and f" ({above})")
    state = f"in navigation {above}" if above else "navigation was measured"
    return f"{state}, with too few probes to see a trend"


def _held_out(facts: Facts) -> str:
    last, onset = facts.last, facts.noticed("memorization onset")
    gap = NOTHING if last is None else facts.gap(last)
    if math.isnan(gap.mean):
        if onset is not None:
            return f"memorization began at step {onset['step']}"
        if facts.guarded:
            return f"memorization had not begun by step {facts.guarded[-1]['step']}"
        return "held-out samples were not measured"
    train = facts.mean(last, "train", "conditional").mean
    side = "above" if gap.mean >= 0 else "below"
    spread = percent(2 * gap.error / train)
    share = f"{percent(abs(gap.mean) / train)} ± {spread} {side} training error"
    if onset is not None:
        return f"memorization began at step {onset['step']} (held-out error {share})"
    if gap.mean > 2 * gap.error:
        return f"held-out error is {share}"
    return f"held-out samples are predicted as well as training samples within noise ({share})"


def copied(facts: Facts) -> str:
    """How many samples of the model alone are copies, with the exact interval."""
    if not facts.samples:
        return "copies among samples were not measured"
    last = facts.samples[-1]
    if last["copies"][0] is None:
        return "no sample could be compared with training rows"
    switch = (last.get("t_switch") or [0])[0]
    what = f"{share_of(last, 0)} samples"
    what += f" with the oracle up to t = {number(switch)}" if switch else ""
    ends = span(last["low"][0], last["high"][0])
    return f"{what} are copies" + (ends and f" (95 % exact interval {ends})")


def share_of(probe: Event, place: int) -> str:
    """How many of the samples are copies; a share if not all could be compared."""
    share, count = probe["copies"][place], probe.get("samples")
    if share is None or count is None or probe.get("not_finite"):
        return f"{number(share)} of the"
    return f"{round(share * count)} of {count}"


# -- advice -----------------------------------------------------------------------------------


def advice(facts: Facts) -> list[Advice]:
    """What to change, the most important first."""
    last = facts.last
    if last is not None and last.get("alarm"):
        return [
            Advice(
                "Repair the oracle first: check the scale of the bank, the path, augmentation, and "
                "whether the model and the oracle get the same labels.",
                f"At step {last['step']} {last['alarm']}; with the right oracle they are equal for "
                "any model.",
                _OWN,
            )
        ]
    found = [_memorization(facts), _longer(facts), _times(facts), _targets(facts), _more(facts)]
    return [each for each in found if each is not None]


def _memorization(facts: Facts) -> Advice | None:
    """Stop earlier, or smooth refinement."""
    best, onset = facts.best_held_out(), facts.noticed("memorization onset")
    gap = facts.smoothing()
    early, why = "", []
    if best is not None:
        probe, rise = best
        early = f"Use the weights of about step {probe['step']}. "
        why.append(f"Held-out error was lowest there and has risen by {percent(rise)}.")
    elif onset is not None:
        early = f"Use the weights of about step {onset['step']}. "
        why.append(f"Memorization began there: {onset['message']}.")
    if gap is not None and gap.worth_trying:
        why.append(f"{(gap.seen if facts.run.of('scheme') else str(gap)).capitalize()}.")
    if facts.samples and (facts.samples[-1]["low"][0] or 0) > 0:
        why.append(f"{copied(facts).capitalize()}.")
    if not why:
        return None
    smooth = "Smooth refinement, MemorizationGuard() and StageScheme(Scheme.two_stage), or train "
    smooth += "on more data."
    if facts.steered:
        return Advice(early or "Train on more data, or fewer steps.", " ".join(why), _OWN)
    return Advice(early + smooth, " ".join(why), f"{_OWN}; the effect of smoothing is {_RESULTS}")


def _longer(facts: Facts) -> Advice | None:
    trend = facts.trend(_NAVIGATION)
    if trend is None or trend[0] >= -FLAT or facts.best_held_out() is not None:
        return None
    why = f"The error above the floor in navigation fell by {percent(-trend[0])} from step "
    why += f"{trend[1]} to the end"
    held_out = facts.last is not None and facts.last.get("held_out")
    why += ", and held-out error has not risen." if held_out else "."
    return Advice("Train longer.", why, _OWN)


def _times(facts: Facts) -> Advice | None:
    _, width = facts.spans[_NAVIGATION]
    if not facts.windows or not facts.boundary.midpoint > 0:
        return None
    draws = facts.windows[-1]["stages"][_NAVIGATION]["draws"]
    if facts.steered or draws is None or draws > width / 2:
        return None
    return Advice(
        "Draw more t in navigation: StageScheme(timesteps=StageAware(0.3)), or a shift of 0.5.",
        f"Navigation is {percent(width)} of t and has {percent(draws)} of the draws.",
        _PAPER,
    )


def _targets(facts: Facts) -> Advice | None:
    """Oracle targets, if the floor is most of the loss, or by the forecast of the run."""
    last = facts.last
    if last is None or facts.steered:
        return None
    loss = facts.stage(last, _NAVIGATION, "conditional")
    share = facts.stage(last, _NAVIGATION, "floor") / loss if loss > 0 else math.nan
    if forecasts := facts.run.of("forecast"):
        gain = str(forecasts[-1].get("targets", ""))
        source = f"{_OWN} (Forecast)"
        advised = gain and not gain.endswith("do not bother")
        return Advice("Consider oracle targets.", gain, source) if advised else None
    if not share > 0.5:
        return None
    return Advice(
        'Try oracle targets, StageScheme(target=Mix("boundary")); measure first with Forecast().',
        f"In navigation {percent(share)} of the loss is the floor: noise of the target, which "
        "averages out over steps. The oracle's target has no such noise.",
        f"{_RESULTS}: 6 to 20 % fewer steps on small models, no time saved on a CPU",
    )


def _more(facts: Facts) -> Advice | None:
    """Monitors that the run did not have."""
    lacks = []
    if not facts.run.of("probe"):
        lacks.append("PosteriorMonitor() (the stages of the data)")
    if facts.last is None:
        lacks.append("VelocityErrorMonitor() (error by t, what training spends)")
    elif not facts.last.get("held_out"):
        lacks.append("held-out samples, VelocityErrorMonitor(held_out=...) (memorization)")
    if not facts.samples:
        lacks.append("MemorizationMonitor() (copies among samples)")
    if not lacks:
        return None
    return Advice(f"Next time add {'; '.join(lacks)}.", "These are not in this run.", "")
