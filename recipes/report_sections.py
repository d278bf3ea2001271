"""The sections of the page of a run: what was measured, and what it means in words."""

from __future__ import annotations

import math
from collections.abc import Callable

from stagewise.callbacks import figures, velocity_figures
from stagewise.callbacks.drawing import STAGE_COLOURS, counted
from stagewise.recipes import report_figures
from stagewise.recipes.report_facts import Facts, even, number, percent, span, time_of
from stagewise.recipes.report_head import safely
from stagewise.recipes.report_html import (
    drawn,
    items,
    missing,
    paragraph,
    row,
    settings,
    stored,
    table,
)
from stagewise.recipes.report_verdict import advice, copied, share_of
from stagewise.recipes.run_files import Event
from stagewise.velocity_probe import STAGES

__all__ = ["sections"]

_READING = (
    "t = 0 is noise, t = 1 is data. In navigation many training samples explain a noisy one, and "
    "the best answer, the oracle velocity, points to their average. In refinement one sample does.",
    "The loss on this page is the error against the conditional velocity over uniform t, in "
    "evaluation mode, without the weights of the objective. Its floor, MSE(conditional, oracle), "
    "is noise of the target that no model removes. Loss = floor + error against the oracle: act on "
    "the part above the floor.",
    "In navigation an error above the floor is what the model still has to learn. In refinement it "
    "is the distance to repeating the training set: there compare held-out and training samples, "
    "and do not aim at zero.",
    "± is two standard errors, and intervals are 95 %. A difference within them is noise.",
    "Do not trust the oracle if noise and data are coupled (minibatch optimal transport), if the "
    "training set is augmented at random, or if this page says that errors do not add up.",
)


def sections(facts: Facts) -> list[str]:
    """All parts below the heading; a part that cannot be made says so."""
    parts: list[tuple[str, Callable[[Facts], str]]] = [
        ("How to read this page", lambda _: items(("", line, "") for line in _READING)),
        ("Samples", _samples),
        ("The loss against its floor", _loss),
        ("The stages", _stages),
        ("Memorization", lambda facts: safely(_gap, facts) + safely(_copies, facts)),
        ("What training spends on each stage", _spending),
        ("What to change, and why", _advice),
        ("Events", _events),
        ("Settings", _settings),
    ]
    return [f"<h2>{title}</h2>{safely(part, facts)}" for title, part in parts]


def _samples(facts: Facts) -> str:
    whole = facts.run.folder / "samples.png"
    if whole.is_file():
        return stored(
            whole,
            "Training samples (left) and generated samples after training (right), one row for "
            "each class. For copies of training rows see Memorization.",
        )
    if path := facts.run.picture("memorization_probe", "samples"):
        about = "Generated samples, at the step over the picture, beside their nearest rows."
        return stored(path, f"{about} At step {facts.samples[-1]['step']}: {copied(facts)}.")
    argument = "decode=..." if facts.samples else ""
    return missing("Pictures of samples", f"MemorizationMonitor({argument})")


def _loss(facts: Facts) -> str:
    last = facts.last
    if last is None:
        return missing("Error by t and by step", "VelocityErrorMonitor()")
    about = counted(facts.bank.get("rows"), facts.about.get("queries"), len(facts.edges) - 1)
    shown = facts.edges, last, facts.ends, about
    all_shown = facts.edges, facts.probes, "oracle", facts.ends, about
    return (
        row(
            drawn(report_figures.loss_by_step_figure(facts), _loss_now(facts, last)),
            drawn(
                report_figures.excess_figure(
                    "Loss above the floor while training, by stage",
                    {stage: (facts, stage) for stage in STAGES},
                    STAGE_COLOURS,
                ),
                _trends(facts),
            ),
            drawn(velocity_figures.loss_by_time_figure(*shown), _by_time(facts, last)),
            drawn(velocity_figures.dynamics_figure(*all_shown), _above(facts, last)),
        )
        + _stage_table(facts, last)
        + _check(facts)
    )


def _loss_now(facts: Facts, last: Event) -> str:
    loss, floor, above = (
        facts.mean(last, "train", key) for key in ("conditional", "floor", "oracle")
    )
    return (
        f"At step {last['step']} the loss is {loss}, {percent(floor.mean / loss.mean)} of it "
        f"floor; {above} is above the floor."
    )


def _trends(facts: Facts) -> str:
    trends = {stage: found for stage in STAGES if (found := facts.trend(stage)) is not None}
    if not trends:
        return "There are too few probes to see a trend."
    moved = [
        f"{'fell' if change < 0 else 'rose'} by {percent(abs(change))} in {stage}"
        for stage, (change, _) in trends.items()
    ]
    since = next(iter(trends.values()))[1]
    text = f"Since step {since} it {', '.join(moved)}. "
    return text + "Where a line is level, the model has learned what it can at this rate."


def _by_time(facts: Facts, last: Event) -> str:
    loss, floor = (facts.stage(last, STAGES[0], key) for key in ("conditional", "floor"))
    text = f"The floor is {percent(floor / loss)} of the loss in navigation. " if loss > 0 else ""
    if math.isfinite(facts.boundary.collapsed):
        text += "Above the collapsed boundary there is almost no floor: the loss is the model's. "
    if last.get("held_out"):
        text += (
            "Where the held-out line is clearly above the training line, rows are memorized, or "
            "held-out samples are harder (then it is above from the first probe on)."
        )
    return text


def _above(facts: Facts, last: Event) -> str:
    parts = [f"{percent(share)} in {stage}" for stage, share in facts.shares(last).items()]
    return (
        "Error against the oracle, from light (early) to dark (late). Of the loss above the floor "
        f"now, {', '.join(parts)}. In refinement only a model that memorizes reaches zero."
    )


def _stage_table(facts: Facts, last: Event) -> str:
    """A column for each stage: three fit on a telephone."""

    def over(key: str, split: str = "train") -> list[float]:
        return [facts.stage(last, stage, key, split) for stage in STAGES]

    loss, held_out = over("conditional"), over("conditional", "held_out")
    gaps = [b / a - 1 if a > 0 else math.nan for a, b in zip(loss, held_out, strict=True)]
    rows = {
        "t": [" to ".join(even(ends)) for ends in facts.spans.values()],
        "loss": even(loss),
        "floor": even(over("floor")),
        "above floor": even(over("oracle")),
        "above / floor": even(over("excess")),
        "cosine": even(over("cosine")),
        "held-out loss": even(held_out),
        "gap": [percent(gap, 1) for gap in gaps],
    }
    return table(["", *STAGES], [[name, *cells] for name, cells in rows.items()])


def _check(facts: Facts) -> str:
    z = [
        abs(value)
        for probe in facts.probes
        for value in probe["train"].get("pythagoras_z", [])
        if value is not None
    ]
    if not z:
        return ""
    return paragraph(
        f"Check: loss = floor + error against the oracle holds within {number(max(z))} standard "
        "errors over all probes and bins (up to 4 is usual; above 6 the oracle is not that of "
        "this training).",
        "dim",
    )


def _definition(facts: Facts) -> str:
    """The definition of the boundary, and where it is."""
    midpoint, collapsed = (
        ("not reached" if t == "–" else f"t = {t}") + (interval and f" (95 % interval {interval})")
        for t, interval in facts.crossings.values()
    )
    return (
        "Navigation ends at the midpoint, where the mean largest posterior weight crosses 0.5: "
        f"{midpoint}. Refinement begins at the collapsed boundary, where the mean largest "
        f"posterior weight crosses 0.99: {collapsed}. Between them "
        "is the transition. Both were measured once for this run, and hold for all tables and "
        "pictures of this page."
    )


def _stages(facts: Facts) -> str:
    if not facts.run.of("probe"):
        known = paragraph(_definition(facts)) * math.isfinite(facts.boundary.midpoint)
        return known + missing(
            "Intervals of these boundaries, and the largest weight over t", "PosteriorMonitor()"
        )
    probe, predicted = facts.run.first("probe"), facts.bank.get("predicted")
    middle = facts.boundary.midpoint
    where = f"Below t = {time_of(middle)}" if math.isfinite(middle) else "At any t"
    concentration = f"{where} a noisy sample may come from many rows. "
    if predicted is not None:
        concentration += f"The spectrum of the data alone predicts t = {time_of(predicted)}."
    title, label = "How far one row explains a noisy sample", "MSE(conditional, oracle velocity)"
    floor = "This loss says nothing about the model. It nearly ends at the collapsed boundary."
    pictures = (
        ("top1", "largest posterior weight", title, concentration),
        ("target_difference", label, "The floor of the loss", floor),
    )
    about = f"N = {number(facts.bank.get('rows'))} rows, {len(probe['t'])} bins of t"
    shown = [
        drawn(report_figures.posterior_figure(facts, key, label, title, about), caption)
        for key, label, title, caption in pictures
        if probe.get(key)
    ]
    return paragraph(_definition(facts)) + row(*shown) + _measured_again(facts)


def _measured_again(facts: Facts) -> str:
    """A warning if a later measurement contradicts the boundary of the page."""
    last, b = facts.run.of("probe")[-1], facts.boundary
    low, high = (last.get(f"midpoint_{end}") for end in ("low", "high"))
    if low is None or high is None or math.isnan(b.midpoint):
        return ""
    if low <= b.midpoint_high and b.midpoint_low <= high:
        return ""
    return paragraph(
        f"At step {last['step']} the midpoint was measured at t = {time_of(last.get('midpoint'))} "
        f"({span(low, high, time_of)}), not where this page has it: the training latents have "
        "changed.",
        "warn",
    )


def _gap(facts: Facts) -> str:
    probes = [probe for probe in facts.probes if probe.get("gap")]
    if not probes:
        said = missing("Held-out against training error", "VelocityErrorMonitor(held_out=...)")
        if guarded := facts.guarded:
            low, last = min(guarded, key=lambda probe: probe["held_out_loss"]), guarded[-1]
            said = paragraph(
                f"By MemorizationGuard held-out loss was lowest at step {low['step']}, "
                f"{number(low['held_out_loss'])}, and was {number(last['held_out_loss'])} at step "
                f"{last['step']}."
            )
        return said + row(_copies_drawn(facts))
    last, bins, best = probes[-1], len(facts.edges) - 1, facts.best_held_out()
    clear = int(velocity_figures.gap_is_clear(last).sum())
    if best is None:
        lowest = "Held-out error is lowest at the end, within noise: training was not too long."
    else:
        lowest = (
            f"Held-out error was lowest at step {best[0]['step']} and has risen by "
            f"{percent(best[1])} since: what the model learned later is its training rows."
        )
    caption = (
        f"Held-out minus training error: at step {last['step']} it is two standard errors or more "
        f"from zero in {clear} of {bins} bins of t; chance alone makes 1 in 20. All probes use the "
        f"same samples, so chance at one step stays at the next. {lowest}"
    )
    about = counted(facts.bank.get("rows"), facts.about.get("queries"), bins)
    marks = [(event["step"], event["kind"]) for event in facts.events if "kind" in event]
    figure = velocity_figures.gap_heatmap(facts.edges, probes, facts.ends, about, marks)
    return row(drawn(figure, caption), _copies_drawn(facts))


def _copies_drawn(facts: Facts) -> str:
    probes = [probe for probe in facts.samples if probe.get("t_switch")]
    if not probes:
        return ""
    last = probes[-1]
    shares = [
        f"{percent(last['copies'][place])} copies with the oracle up to t = {t:g}"
        for place, t in ((0, last["t_switch"][0]), (-1, last["t_switch"][-1]))
    ]
    caption = (
        f"{', '.join(shares)}. The oracle, which copies, moves a sample up to t_switch, and the "
        "model from there. Where the curve rises, the model no longer leaves the path to the copy."
    )
    return drawn(figures.copies_figure(probes), caption)


def _copies(facts: Facts) -> str:
    if not facts.samples:
        return missing("Copies among samples", "MemorizationMonitor()")
    last = facts.samples[-1]
    rows = []
    for place, t in enumerate(last.get("t_switch", [0.0])):
        ends = span(last["low"][place], last["high"][place])
        found = share_of(last, place), percent(last["copies"][place], 1)
        rows.append([f"{t:g}", *found, ends])
    about = paragraph(
        f"{copied(facts)}. A copy is a sample whose nearest training row is nearer than a third of "
        "the distance to the second nearest; intervals are exact (binomial)."
    )
    pictures = {
        "samples": "Generated samples, each beside its nearest training row. Red frame: a copy.",
        "resumed": "Held-out rows with noise, finished by the model. If the result is a copy of "
        "a training row (red frame), that row is memorized.",
    }
    shown = [stored(facts.run.picture(last["event"], k), text) for k, text in pictures.items()]
    titles = ["oracle until t", "copies", "share", "95 % exact interval"]
    return about + table(titles, rows) + row(*shown)


def _spending(facts: Facts) -> str:
    if not facts.windows:
        return missing("Draws, loss and gradients by stage", "VelocityErrorMonitor()")
    window, parts = facts.windows[-1], []
    for stage, (low, high) in facts.spans.items():
        draws, loss, gradient = (
            percent(window["stages"][stage][key]) for key in ("draws", "loss", "gradient")
        )
        parts.append(
            f"{stage} is {percent(high - low)} of t and has {draws} of the draws, {loss} of the "
            f"loss and {gradient} of the gradient at the output"
        )
    caption = "; ".join(parts)
    caption = f"{caption[0].upper()}{caption[1:]}."
    if facts.last is not None:
        whole, floor = (facts.stage(facts.last, STAGES[0], key) for key in ("conditional", "floor"))
        if floor > 0.5 * whole:
            caption += f" {percent(floor / whole)} of the loss in navigation is floor: it makes "
            caption += "gradients noisy, and the model learns nothing from it."
    figure = velocity_figures.spending_figure(facts.edges, window, facts.ends)
    lacking = window.get("lacking")
    return (paragraph(f"Not all: {lacking}.", "warn") if lacking else "") + drawn(figure, caption)


def _advice(facts: Facts) -> str:
    found = advice(facts)
    if not found:
        return paragraph("These numbers suggest no change.")
    return items((each.do, each.why, each.source and f"From: {each.source}.") for each in found)


def _events(facts: Facts) -> str:
    rows = []
    for event in facts.events:
        if event["event"] == "non-finite":
            kind, message = "not finite", f"rows {event['rows'][:16]} of a batch"
        else:
            kind, message = event.get("kind", "change of phase"), event["message"]
        rows.append([str(event["step"]), kind, message])
    listed = table(["step", "what", "evidence"], rows, numbers=(0,)) if rows else ""
    kinds = facts.looked_for
    if kinds is None:  # missing, or from an older version
        return listed + paragraph(
            "These files do not tell whether navigation was learned or memorization began: "
            "StageTransitions() looks for both.",
            "dim",
        )
    happened = {event.get("kind") for event in facts.events}
    quiet = [kind for kind, lacks in kinds.items() if not lacks and kind not in happened]
    blind = [f"{kind} (lacks {lacks})" for kind, lacks in kinds.items() if lacks]
    text = f"Looked for and not found up to step {facts.step}: {', '.join(quiet)}. " * bool(quiet)
    text += f"Could not be found in this run: {'; '.join(blind)}." * bool(blind)
    return listed + (paragraph(text, "dim") if text else "")


def _settings(facts: Facts) -> str:
    if facts.config is None:
        return paragraph(
            "Not in this run: there is no config.yaml in its folder. `stagewise train` writes one.",
            "dim",
        )
    return settings(facts.config)
