"""A report's figures as tables: on screen, in report.md and in TensorBoard. Nothing is computed here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from singreg.analysis.results import CENTRED, FinetuneReport, ModelMeasurement, TranslatorScores

STAGES = {"before": "before", "control": "control (cross-entropy)", "sing": "SingLoss"}
"""How the stages are called wherever people read them."""
TRANSLATORS = ("frozen", "loop", "auditor")


OBEYED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, which terminals obey, and those that turn the direction of a text."""


def escape(text: object) -> str:
    """Text that cannot break a Markdown table or smuggle markup into a report, whatever a folder was called (no shapes)."""
    readable = str(text).encode("utf-8", "backslashreplace").decode()  # a folder's name may hold bytes that are no UTF-8
    readable = OBEYED.sub("\ufffd", readable)
    plain = readable.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = plain.replace("](", "]&#40;").replace("*", "&#42;").replace("~", "&#126;")  # no link, picture or emphasis
    plain = re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", plain)  # within a word it is itself
    return " ".join(plain.replace("|", "\\|").replace("`", "\\`").split())


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure with its unit, or a dash when there is none (None, NaN; no shapes); what rounds to nothing has no sign."""
    return "–" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}{unit}".replace("inf", "∞")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage (no shapes)."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}%}"


def _with_interval(scores: TranslatorScores, name: str, digits: int = 2, *, centred: bool = False) -> str:
    low, high = scores.intervals[f"{CENTRED}{name}" if centred else name]
    value = (scores.centred if centred else scores.overall)[name]
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def render(rows: Sequence[Sequence[str]], headers: Sequence[str], compact: bool = False) -> str:
    """Rows of text cells (R, k) under k headers as a Markdown table, or a plain one if compact."""
    style = "simple" if compact else "pipe"
    table: str = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, stralign="left")
    return table


def _result_row(stage: str, name: str, measured: ModelMeasurement, compact: bool) -> list[str]:
    scores = measured.translators[name]

    def figure(key: str, digits: int = 2, centred: bool = False) -> str:
        if compact:
            return number((scores.centred if centred else scores.overall)[key], digits)
        return _with_interval(scores, key, digits, centred=centred)

    head = [STAGES.get(stage, stage), name, percent(measured.top1), figure("AS_neg"), figure("AS_neg", centred=True), figure("AS_abs")]
    if not compact:
        head.append(figure("AS"))
    tail = [figure("IS"), figure("IS", centred=True), figure("kappa", 3), number(measured.null_share, 3), number(scores.cosine, 3)]
    return [*head, *tail] if compact else [*head, *tail, percent(scores.zero_shot)]


def results_table(report: FinetuneReport, compact: bool = False) -> str:
    """Every model by every translator: top-1, AS⁻, |AS|, IS in degrees, κ, null share, cosine; Markdown, or plain if compact.

    Intervals (Markdown only) are 95 % bootstrap over classes and their test images. No shapes.
    """
    rows = [
        _result_row(stage, name, measured, compact)
        for stage, measured in report.measurements.items()
        for name in TRANSLATORS
        if name in measured.translators
    ]
    return render(rows, _result_headers("model", compact), compact)


def measurement_table(measured: ModelMeasurement, compact: bool = False) -> str:
    """One model by every translator, with the columns of `results_table` (degrees; no shapes)."""
    rows = [_result_row(escape(measured.head.tag), name, measured, compact) for name in measured.translators]
    return render(rows, _result_headers("classifier", compact), compact)


def _result_headers(first: str, compact: bool) -> list[str]:
    headers = [first, "translator", "top-1", "AS⁻ °", "AS⁻ centred °", "|AS| °" if compact else "\\|AS\\| °"]
    headers += [] if compact else ["AS °"]
    return headers + ["IS °", "IS centred °", "κ", "null share", "cosine"] + ([] if compact else ["zero-shot"])


def comparison_table(report: FinetuneReport) -> str:
    """SingLoss against the control, paired by image, with 95 % intervals (Markdown; degrees, points or factors)."""
    rows = [
        [
            escape(found.name),
            found.translator.replace("-", "–"),
            number(found.value, 3),
            f"[{number(found.low, 3)}, {number(found.high, 3)}]",
            found.unit,
        ]
        for found in report.comparisons
    ]
    return render(rows, ["figure", "translator", "value", "95 % interval", "unit"], compact=False)


def head_table(report: FinetuneReport) -> str:
    """Passport of every model's head: classes, features, rank, nullity, conditioning, largest logit change (Markdown)."""
    rows = [
        [
            STAGES.get(stage, stage),
            escape(m.head.tag),
            str(m.head.classes),
            str(m.head.features),
            str(m.head.rank),
            f"{m.head.nullity} ({m.head.null_dimensions:.0%})",
            f"{m.head.conditioning:.1e}",
            percent(m.null_energy),
            f"{m.logit_change_float64:.1e}",
            f"{m.logit_change_float32:.1e}",
        ]
        for stage, m in report.measurements.items()
    ]
    headers = ["model", "classifier", "classes", "features", "rank", "nullity", "σ_min/σ_max", "null energy"]
    return render(rows, [*headers, "max Δlogit (float64)", "(float32)"], compact=False)


def steering_table(report: FinetuneReport) -> str:
    """Steering to another class's prompt inside the null space, at a fixed image score (METHOD section 9; Markdown, degrees)."""
    rows = [
        [
            STAGES.get(stage, stage),
            name,
            number(s.image_score, 0, "°"),
            f"{number(s.attribute_score)} ± {number(s.attribute_score_std)}",
            number(s.step, 3),
            percent(s.reachable),
            percent(s.success),
            str(s.images),
        ]
        for stage, measured in report.measurements.items()
        for name, s in measured.steering.items()
    ]
    headers = ["model", "attacker", "at IS", "AS to target °", "step / norm of f", "reachable", "success", "images"]
    return render(rows, headers, compact=False)


def translator_table(report: FinetuneReport) -> str:
    """How good every translator is: pictures, ridge, cosine, R², zero-shot (Markdown; shares in [0, 1])."""
    rows = [
        [
            STAGES.get(stage, stage),
            name,
            str(s.fit_images),
            f"{s.ridge:g}",
            "yes" if s.standardized else "no",
            number(s.cosine, 3),
            number(s.r2, 3),
            number(s.validation_r2, 3),
            percent(s.zero_shot),
            percent(measured.vlm_zero_shot),
        ]
        for stage, measured in report.measurements.items()
        for name, s in measured.translators.items()
    ]
    headers = ["model", "translator", "fit on", "ridge", "standardised", "cosine", "R²", "R² (validation)"]
    return render(rows, [*headers, "zero-shot", "the VLM's own"], compact=False)


def per_class_table(report: FinetuneReport, translator: str = "auditor") -> str:
    """AS⁻ and IS of every class in every model by one translator, the leakiest class before first (Markdown; degrees)."""
    stages = list(report.measurements)
    table = {stage: report.measurements[stage].translators[translator].per_class for stage in stages}
    first = table[stages[0]]["AS_neg"]
    order = sorted(range(len(first)), key=lambda c: -(first[c] if first[c] is not None else -1.0))  # type: ignore[operator]
    rows = [
        [escape(report.class_names[c]), *(number(table[s][key][c]) for key in ("AS_neg", "IS") for s in stages)] for c in order
    ]
    headers = ["class", *(f"{label} {stage}" for label in ("AS⁻ °", "IS °") for stage in stages)]
    return render(rows, headers, compact=False)


def facts(settings: Mapping[str, Any], machine: Mapping[str, Any], seconds: Mapping[str, float], *more: str) -> str:
    """How a report was made, as a Markdown list: command, configuration, what is given in `more`, machine, seconds by stage."""
    command = " ".join(str(settings.get("command", "")).replace("`", "").split())  # a blank line would end the list
    return "\n".join(
        [
            f"- command: `{command}`",
            "- configuration: config.yaml beside this file",
            *(f"- {line}" for line in more),
            f"- machine: {', '.join(f'{escape(key)}: {escape(value)}' for key, value in machine.items())}",
            f"- time: {', '.join(f'{escape(stage)} {value:.0f} s' for stage, value in seconds.items())}",
        ]
    )
