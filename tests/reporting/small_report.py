"""A fine-tuning report with made-up figures: what the writers need, in no time."""

from __future__ import annotations

import numpy as np

from singreg.analysis.comparison import compare_arms
from singreg.analysis.results import FinetuneReport, HeadSummary, ModelMeasurement, SteeringSummary, TranslatorScores

FIGURES = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa")
IMAGES = 24


def measurement(tag: str, translators: list[str], seed: int) -> ModelMeasurement:
    rng = np.random.default_rng(seed)
    labels = np.arange(IMAGES) % 3
    rows = {"index": np.arange(IMAGES), "label": labels, "correct": rng.integers(0, 2, IMAGES).astype(float)}
    for name in translators:
        for kind in ("", "centred "):
            rows |= {f"{kind}AS/{name}": rng.normal(-1, 2, IMAGES), f"{kind}IS/{name}": rng.uniform(20, 40, IMAGES)}
            rows[f"{kind}kappa/{name}"] = rng.normal(0, 0.1, IMAGES)
    values = {name: float(value) for name, value in zip(FIGURES, rng.uniform(1, 9, 6), strict=True)}
    intervals = {f"{kind}{name}": [value - 0.5, value + 0.5] for kind in ("", "centred ") for name, value in values.items()}
    scores = TranslatorScores(
        overall=values, centred=values, intervals=intervals, per_class={"AS_neg": [1.0, None, 2.5], "IS": [20.0, None, 30.0]},
        quantiles={}, cosine=0.8, r2=0.6, zero_shot=0.7, ridge=0.1, fit_images=100, standardized=True, validation_r2=None,
    )  # fmt: skip
    steering = SteeringSummary(40.0, 12.0, 1.0, 0.2, 0.9, 0.5, IMAGES)
    return ModelMeasurement(
        images=IMAGES, top1=0.5, top1_interval=[0.4, 0.6], null_share=0.7, null_energy=0.5, logit_change_float64=1e-14,
        logit_change_float32=1e-6, vlm_zero_shot=0.9, head=HeadSummary(tag, 3, 8, 3, 3, 5, 0.625, 0.3, "abc"),
        translators=dict.fromkeys(translators, scores), steering=dict.fromkeys(translators, steering), rows=rows,
    )  # fmt: skip


def finetune_report(class_names: tuple[str, str, str] = ("cat", "dog", "fish"), tag: str = "tiny") -> FinetuneReport:
    measurements = {
        "before": measurement(tag, ["frozen", "auditor"], 0),
        "control": measurement(tag, ["frozen", "auditor"], 1),
        "sing": measurement(tag, ["frozen", "loop", "auditor"], 2),
    }
    return FinetuneReport(
        measurements=measurements, comparisons=compare_arms(measurements), audit_gap=1.2, verdict=["It leaks.", "Less now.", "Kept."],
        warnings=["Warning: only made up."], settings={"name": "run", "command": "recipes/finetune.py --x <y>"},
        machine={"cores": 2}, seconds={"before": 1.0}, class_names=list(class_names),
    )  # fmt: skip
