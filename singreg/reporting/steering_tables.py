"""A steering report's figures as tables: on screen, in report.md and in TensorBoard. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence

from singreg.analysis.old_steering.results import SteeringCurve, SteeringPairs, SteerReport
from singreg.reporting.tables import escape, number, percent, render

BUDGET_TITLES = {
    "step": "step ε / norm of f, along the gradient",
    "radius": "Mahalanobis radius, along the gradient",
    "on-manifold": "Mahalanobis radius, on-manifold direction",
}
"""How the budgets are called wherever people read them."""
PAIRS_SHOWN = 10
MATRIX_SHOWN = 20


def _interval(low_high: Sequence[float | None], digits: int, factor: float = 1.0) -> str:
    low, high = (None if value is None else factor * value for value in low_high)
    return f"[{number(low, digits)}, {number(high, digits)}]"


def table1(report: SteerReport, compact: bool = False) -> str:
    """Paper table 1 over all pairs, by attacker and judge: |AS| mean ± sd in degrees, signed AS, step, reachable, success.

    Markdown with 95 % intervals over pictures, or plain without them if compact. No shapes.
    """
    rows = []
    for pairs in report.pairs:
        figures, intervals = pairs.overall, pairs.intervals
        absolute = f"{number(figures['AS_abs'])} ± {number(figures['AS_abs_std'])}"
        cells = [absolute, number(figures["AS"]), number(figures["step"], 3), percent(figures["reachable"]), percent(figures["success"])]
        if not compact:
            low_high = [_interval(intervals[name], digits) for name, digits in (("AS_abs", 2), ("AS", 2), ("step", 3))]
            low_high += [f"{_interval(intervals[name], 1, 100)} %" for name in ("reachable", "success")]
            cells = [f"{cell} {interval}" for cell, interval in zip(cells, low_high, strict=True)]
        counts = [number(figures[name], 0) for name in ("pairs", "images")]
        rows.append([pairs.attacker, pairs.judge, *cells, *counts])
    absolute = "|AS| °" if compact else "\\|AS\\| °"
    headers = ["attacker", "judge", f"{absolute} at IS {report.image_score:g}°", "AS °", "step / norm of f", "reachable", "success"]
    return render(rows, [*headers, "pairs", "pictures"], compact)


def curve_table(report: SteerReport) -> str:
    """Area under every curve (mean height over its grid) with 95 % intervals, and success at the natural percentiles (Markdown)."""
    rows = []
    for curve in report.curves:
        area = [number(curve.area["AS"][0]), _interval(curve.area["AS"][1:], 2), number(curve.area["AS_abs"][0])]
        area += [percent(curve.area["success"][0]), f"{_interval(curve.area['success'][1:], 1, 100)} %"]
        marks = ["–" if curve.budget == "step" else _at(curve, mark) for mark in report.natural.marks.values()]
        rows.append([BUDGET_TITLES[curve.budget], f"{curve.grid[0]:g} – {curve.grid[-1]:.3g}", curve.attacker, curve.judge, *area, *marks])
    headers = ["budget", "grid", "attacker", "judge", "mean AS °", "95 %", "mean \\|AS\\| °", "mean success", "95 %"]
    return render(rows, [*headers, *(f"success (AS) at natural {name}" for name in report.natural.marks)])


def _at(curve: SteeringCurve, mark: float) -> str:
    return f"{percent(curve.at(mark, 'success'))} ({number(curve.at(mark, 'AS'), 1)}°)"


def step_table(report: SteerReport, attacker: str = "fitted", judge: str = "auditor") -> str:
    """Success and AS at every relative step by one attacker and judge, with 95 % intervals (Markdown; shares and degrees)."""
    curve = next(c for c in report.curves if (c.budget, c.attacker, c.judge) == ("step", attacker, judge))
    rows = [
        [
            f"{value:g}",
            f"{percent(curve.figures['success'][place])} {_interval(curve.intervals['success'][place], 1, 100)} %",
            f"{number(curve.figures['AS'][place])} {_interval(curve.intervals['AS'][place], 2)}",
            number(curve.figures["AS_abs"][place]),
        ]
        for place, value in enumerate(curve.grid)
    ]
    return render(rows, ["step / norm of f", "success", "AS °", "\\|AS\\| °"])


def pair_table(report: SteerReport, pairs: SteeringPairs, figure: str = "AS_abs") -> str:
    """Sources against targets for one figure: the whole matrix when small, else the pairs steered most and least (Markdown)."""
    matrix = pairs.matrices[figure]
    if max(len(report.sources), len(report.targets)) <= MATRIX_SHOWN:
        rows = [[escape(name), *(number(v, 1) for v in row)] for name, row in zip(report.sources, matrix, strict=True)]
        return render(rows, ["from \\ to", *(escape(target) for target in report.targets)])
    known = [(value, s, t) for s, row in enumerate(matrix) for t, value in enumerate(row) if value is not None]
    known.sort(reverse=True)
    shown = known if len(known) <= 2 * PAIRS_SHOWN else [*known[:PAIRS_SHOWN], *known[-PAIRS_SHOWN:]]
    cells = [
        [
            escape(report.sources[s]), escape(report.targets[t]), number(value), number(pairs.matrices[f"{figure}_std"][s][t]),
            percent(pairs.matrices["reachable"][s][t]), percent(pairs.matrices["success"][s][t]), number(pairs.matrices["images"][s][t], 0),
        ]
        for value, s, t in shown
    ]  # fmt: skip
    return render(cells, ["from", "to", "\\|AS\\| °", "sd", "reachable", "success", "pictures"])


def translator_table(report: SteerReport) -> str:
    """How good both translators are on the test pictures: pictures, ridge, cosine, R², zero-shot (Markdown; shares in [0, 1])."""
    rows = [
        [
            name, str(s.fit_images), f"{s.ridge:g}", "yes" if s.standardized else "no", number(s.cosine, 3), number(s.r2, 3),
            percent(s.zero_shot), percent(report.measurement.vlm_zero_shot), number(s.overall["IS"], 1), number(s.overall["AS_abs"]),
        ]
        for name, s in report.measurement.translators.items()
    ]  # fmt: skip
    headers = ["translator", "fit on", "ridge", "standardised", "cosine", "R²", "zero-shot", "the VLM's own"]
    return render(rows, [*headers, "IS ° of a removal", "\\|AS\\| ° of a removal"])
