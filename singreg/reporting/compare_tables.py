"""A comparison's figures as tables: on screen, in report.md and in TensorBoard. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence

from singreg.analysis.results import PRIMARY
from singreg.analysis.comparing.results import CompareReport, OrderCheck
from singreg.analysis.results import ModelMeasurement, TranslatorScores
from singreg.reporting.tables import escape, number, percent, render

TITLES = {"top1": "top-1 (points)", "AS_neg": "AS⁻ °", "AS_abs": "|AS| °", "IS": "IS °", "ratio": "IS / |AS|"}
"""How the figures are called wherever people read them; escaped where they stand in a Markdown table."""


def compare_table(report: CompareReport, compact: bool = False) -> str:
    """Every model in every space by every translator, those without a null space as a row that says so (degrees, shares).

    Markdown with 95 % bootstrap intervals over pictures, or plain without them if compact. No shapes.
    """
    rows = []
    for space, models in report.measurements.items():
        for head in report.heads:
            if head.label not in models:
                why = (head.omitted or "not measured").partition(":")[0] if compact else head.omitted or "not measured"
                rows.append([escape(head.label), escape(space), escape(why), *[""] * (7 if compact else 10)])
                continue
            measured = models[head.label]
            for name, scores in measured.translators.items():
                label = [escape(head.label), escape(space), name]
                rows.append([*label, *_figures(report, space, head.label, measured, name, scores, compact)])
    headers = ["model", "space", "translator", "top-1", "AS⁻ °", "|AS| °" if compact else "\\|AS\\| °", "IS °"]
    headers += ["IS / |AS|" if compact else "IS / \\|AS\\|", "κ", "null share"]
    return render(rows, headers if compact else [*headers, "AS⁻ at chance °", "IS at chance °", "cosine"], compact)


def _figures(
    report: CompareReport, space: str, label: str, measured: ModelMeasurement, name: str, scores: TranslatorScores, compact: bool
) -> list[str]:
    def figure(key: str, digits: int = 2) -> str:
        low, high = scores.intervals[key]
        value = number(scores.overall[key], digits)
        return value if compact else f"{value} [{number(low, digits)}, {number(high, digits)}]"

    low, high = measured.top1_interval
    top1 = percent(measured.top1) if compact else f"{percent(measured.top1)} [{100 * low:.1f}, {100 * high:.1f}]"
    cells = [top1, figure("AS_neg"), figure("AS_abs"), figure("IS"), figure("ratio", 1), figure("kappa", 3), percent(measured.null_share)]
    if compact:
        return cells
    chance = report.chance.get(space, {}).get(label)
    level = chance.paper.levels["energy"].mean if chance is not None and name == PRIMARY else {}
    return [*cells, number(level.get("AS_neg")), number(level.get("IS"), 1), number(scores.cosine, 3)]


def difference_table(report: CompareReport, space: str, translator: str) -> str:
    """Second minus first for every two models in one view, with 95 % intervals (Markdown; points, degrees)."""
    rows = []
    pairs = list(dict.fromkeys((d.first, d.second) for d in report.differences))
    views = (("-", "-"), (space, translator))
    for first, second in pairs:
        found = {
            d.figure: f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
            for d in report.differences
            if (d.first, d.second) == (first, second) and (d.space, d.translator) in views
        }
        rows.append([escape(second), escape(first), *(found[figure] for figure in TITLES)])
    return render(rows, ["model", "minus", *(title.replace("|", "\\|") for title in TITLES.values())])


def order_table(orders: Sequence[OrderCheck]) -> str:
    """Each figure's order in each view, τ against the first view, and how often resamples repeat it (Markdown; shares)."""
    rows = [
        [
            TITLES[order.figure].removesuffix(" °").replace("|", "\\|"),
            escape(view),
            " › ".join(escape(name) for name in names),
            number(order.tau[0][place]),
            percent(order.same[0][place], 0),
            percent(order.stable[place], 0),
        ]
        for order in orders
        for place, (view, names) in enumerate(zip(order.views, order.orders, strict=True))
    ]
    return render(rows, ["figure", "view", "order, best first", "τ with the first view", "alike in resamples", "own order again"])


def view_table(order: OrderCheck) -> str:
    """Kendall's τ of one figure's order between every two views, with the share of resamples that order alike (Markdown)."""
    rows = [
        [escape(view), *(f"{number(tau)} ({percent(same, 0)})" for tau, same in zip(order.tau[place], order.same[place], strict=True))]
        for place, view in enumerate(order.views)
    ]
    return render(rows, ["", *(escape(view) for view in order.views)])


def source_table(report: CompareReport) -> str:
    """Where every model came from, with the pictures behind its translators (Markdown)."""
    rows = []
    for head in report.heads:
        found = next((models[head.label] for models in report.measurements.values() if head.label in models), None)
        behind = "–" if found is None else ", ".join(f"{name} {scores.fit_images}" for name, scores in found.translators.items())
        change = "–" if found is None else f"{found.logit_change_float64:.1e}"
        head_hash = head.passport.summary.head_hash[:12] if head.passport else "–"
        rows.append([escape(head.label), escape(head.source), behind, change, head_hash])
    return render(rows, ["model", "taken from", "pictures behind the translators", "max Δlogit (float64)", "head's hash"])
