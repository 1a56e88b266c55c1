"""A fine-tuning report around real measurements of the toy classifier, with whatever names a user's folders may have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from singreg.analysis.comparison import compare_arms, report_warnings, verdict
from singreg.analysis.results import FinetuneReport
from tests.analysis import toy
from tests.analysis.study.arms import arms, pictures

HOSTILE = (
    "<script>alert(1)</script>", "a|b | c", "[click](http://evil.example)", "![x](http://evil.example/t.png)", "`code` & <b>*bold*</b>",
)  # fmt: skip


def real_report(
    class_names: tuple[str, ...] = toy.NAMES, *, tag: str = "toy", name: str = "run", control: bool = True, **changes: Any
) -> FinetuneReport:
    measurements = arms(control=control, attribute=0.5 * pictures(), loop=0.8)
    measurements = {stage: replace(m, head=replace(m.head, tag=tag)) for stage, m in measurements.items()}
    report = FinetuneReport(
        measurements=measurements,
        comparisons=compare_arms(measurements),
        audit_gap=1.25,
        verdict=verdict(measurements),
        warnings=report_warnings(measurements, 20.0),
        settings={"name": name, "loss": {"weight": 0.1, "terms": None}, "command": f"recipes/finetune.py --name {name}"},
        machine={"cores": 2, "device": "cpu"},
        seconds={"before": 12.4, "sing": 100.0},
        class_names=list(class_names),
    )
    return replace(report, **changes)
