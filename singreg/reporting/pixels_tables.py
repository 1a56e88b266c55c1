"""A pixel attack's figures as tables: on screen, in report.md and in TensorBoard. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence

from singreg.analysis.pixels.results import ATTACK, CONTROLS, HOLD, READINGS, PixelReport
from singreg.reporting.tables import escape, number, percent, render


def _interval(values: Sequence[float], digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
    value, low, high = (factor * value for value in values)
    return f"{number(value, digits)}{unit} [{number(low, digits)}, {number(high, digits)}]"


def pixels_table(report: PixelReport, compact: bool = False) -> str:
    """Rise in degrees towards the target prompt by model, budget, arm and judge, with 95 % intervals over pictures (Markdown or plain)."""
    judges = _judges(report)
    rows = [
        [
            escape(s.model), s.budget, s.arm, percent(s.kept, 0), number(s.logit_change),
            *(number(s.rise[name][0]) if compact else _interval(s.rise[name]) for name in judges),
        ]
        for s in report.summaries
        if s.arm not in (HOLD, *CONTROLS)
    ]  # fmt: skip
    headers = ["model", "budget", "arm", "kept", "max Δlogit", *(f"{escape(name)} °" for name in judges)]
    return render(rows, headers, compact)


def success_table(report: PixelReport) -> str:
    """Share of pictures whose target prompt became first, by judge, and how each is read, with Wilson's intervals (Markdown; shares)."""
    judges = _judges(report)
    rows = [
        [
            escape(s.model), s.budget, *(_interval(s.success[name], 0, 100, " %") for name in judges),
            *(_interval(s.readings[name], 0, 100, " %") for name in READINGS),
        ]
        for s in report.summaries
        if s.arm == ATTACK
    ]  # fmt: skip
    return render(rows, ["model", "budget", *(escape(name) for name in judges), *READINGS])


def checks_table(report: PixelReport, compact: bool = False) -> str:
    """Every sanity check with what was found (Markdown or plain)."""
    rows = [["pass" if c.passed else "FAIL", *((c.name, c.found) if compact else (escape(c.name), escape(c.found)))] for c in report.checks]
    return render(rows, ["", "check", "found"], compact)


def transfer_table(report: PixelReport) -> str:
    """Pictures crafted on one model and read by another's fitted translator, within the other's τ (Markdown; degrees)."""
    rows = [
        [escape(t.crafted_on), escape(t.judged_on), t.budget, percent(t.kept, 0), number(t.rise), number(t.own)] for t in report.transfers
    ]
    return render(rows, ["crafted on", "judged on", "budget", "kept there", "rise °", "its own white box °"])


def difference_table(report: PixelReport) -> str:
    """Every later model minus the first, paired by picture, with 95 % intervals (Markdown; degrees or points)."""
    rows = [
        [escape(d.second), escape(d.first), d.budget, d.figure, escape(d.judge), _interval([d.value, d.low, d.high]), unit]
        for d in report.differences
        for unit in ["°" if d.figure == "rise" else "points"]
    ]
    return render(rows, ["model", "minus", "budget", "figure", "judge", "difference", "unit"])


def twin_table(report: PixelReport) -> str:
    """How common natural twins are, by model and encoder (Markdown; shares, logits, degrees)."""
    rows = [
        [
            escape(t.model), escape(t.encoder), str(t.pictures), str(t.pairs),
            _interval([t.rate, *t.rate_interval], 2, 100, " %"), percent(t.touched, 0), number(t.close),
            number(t.far, 1), number(t.shown[0].logit_distance if t.shown else None),
        ]
        for t in report.twins
    ]  # fmt: skip
    headers = ["model", "encoder", "pictures", "pairs of two classes", "twins among them", "pictures with a twin"]
    return render(rows, [*headers, "close: Δlogit below", "far: above °", "closest Δlogit"])


def robustness_table(report: PixelReport) -> str:
    """Ordinary robustness: shares still right, untouched, under PGD and corrupted (Markdown; shares in [0, 1])."""
    budgets = list(report.robustness[0].adversarial)
    kinds = list(report.robustness[0].corrupted)
    rows = [
        [escape(r.model), percent(r.clean), *(percent(r.adversarial[b]) for b in budgets), *(percent(r.corrupted[k]) for k in kinds)]
        for r in report.robustness
    ]
    return render(rows, ["model", "clean", *(f"PGD {budget}/255" for budget in budgets), *kinds])


def model_table(report: PixelReport) -> str:
    """The models: head, null space, top-1, logit scale, how well each translator imitates the encoder (Markdown)."""
    rows = [
        [
            escape(m.label), escape(m.source), str(m.classes), str(m.features), str(m.nullity), percent(m.top1), number(m.logit_sd, 1),
            *(number(value, 3) for value in m.cosine.values()),
        ]
        for m in report.models
    ]  # fmt: skip
    headers = ["model", "source", "classes", "features", "null space", "top-1", "logits, sd"]
    return render(rows, [*headers, *(f"cosine of {name}" for name in report.models[0].cosine)])


def hold_table(report: PixelReport) -> str:
    """The opposite direction: decisions moved, class-prompt cosines held, and how far every judge's whole reading turned (degrees)."""
    held = [s for s in report.summaries if s.arm == HOLD]
    rows = [
        [
            escape(s.model), s.budget, str(s.pictures), percent(s.flipped, 0), number(s.logit_change),
            *(_interval(turned, 1) for turned in s.shift.values()),
        ]
        for s in held
    ]  # fmt: skip
    headers = ["model", "budget", "pictures", "decided otherwise", "max Δlogit"]
    return render(rows, [*headers, *(f"{escape(name)} turns °" for name in _judges(report))])


def _judges(report: PixelReport) -> list[str]:
    return list(report.summaries[0].rise)
