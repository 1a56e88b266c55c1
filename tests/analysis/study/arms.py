"""Measurements with chosen scores, for what compares, says and draws them: real ones of the toy classifier, overwritten."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from singreg.analysis.results import CENTRED, ModelMeasurement
from tests.analysis import in_processes

COUNT = 200
STAGES = {"before": ("frozen", "auditor"), "control": ("frozen", "auditor"), "sing": ("frozen", "loop", "auditor")}


@cache
def _measured() -> ModelMeasurement:
    return in_processes.measure(0, 1, COUNT, batch_size=COUNT)


def pictures(seed: int = 0) -> np.ndarray:
    """What pictures have in common whatever the model: an attribute score (N,) in degrees, mostly harm."""
    return np.random.default_rng(seed).normal(-4, 3, COUNT)


def arm(
    stage: str = "sing",
    *,
    attribute: np.ndarray | None = None,
    correct: np.ndarray | None = None,
    loop: float = 1.0,
    image: float = 1.0,
    **changes: object,
) -> ModelMeasurement:
    """A measurement whose AS (N,) and correct (N,) are given; IS is `image` times 30 degrees or so, the loop's AS `loop` times AS."""
    attribute = pictures() if attribute is None else attribute
    correct = (np.arange(COUNT) % 5 > 0).astype(float) if correct is None else correct
    base = _measured()
    rows = {name: column for name, column in base.rows.items() if "/" not in name} | {"correct": correct}
    translators = {}
    for name in STAGES[stage]:
        scale = loop if name == "loop" else 1.0
        for kind in ("", CENTRED):
            rows |= {f"{kind}{figure}/{name}": base.rows[f"{kind}{figure}/auditor"] for figure in ("AS", "IS", "kappa")}
            rows |= {f"{kind}AS/{name}": scale * attribute, f"{kind}IS/{name}": image * (30 + pictures(1))}
        harm = np.maximum(-scale * attribute, 0)
        overall = base.translators["auditor"].overall | {
            "AS": float(scale * attribute.mean()), "AS_neg": float(harm.mean()), "AS_abs": float(np.abs(scale * attribute).mean()),
            "IS": float(rows[f"IS/{name}"].mean()),
        }  # fmt: skip
        quality = {key: changes.pop(key) for key in ("fit_images", "zero_shot") if key in changes and name == "auditor"}
        translators[name] = replace(base.translators["auditor"], overall=overall, centred=overall, **quality)  # type: ignore[arg-type]
    steering = dict.fromkeys(translators, base.steering["auditor"])
    top1 = float(correct.mean())
    return replace(base, rows=rows, translators=translators, steering=steering, top1=top1, **changes)  # type: ignore[arg-type]


def arms(*, control: bool = True, **sing: object) -> dict[str, ModelMeasurement]:
    """Before, control and sing: all alike but for what is given for sing."""
    stages = {"before": arm("before"), **({"control": arm("control")} if control else {})}
    return {**stages, "sing": arm("sing", **sing)}  # type: ignore[arg-type]
