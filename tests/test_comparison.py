"""The arms against each other: ratios and differences by hand, and the sentences in every case they distinguish."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from singreg.analysis.comparison import Measured, audit_gap, compare_arms, finetune_warnings, verdict
from singreg.analysis.statistics import paired_difference, paired_ratio

COUNT, FEATURES, ENOUGH = 200, 24, 144
TRANSLATORS = {"before": ("frozen", "auditor"), "control": ("frozen", "auditor"), "sing": ("frozen", "loop", "auditor")}
CORRECT = (np.arange(COUNT) % 5 > 0).astype(float)
LABELS = np.random.default_rng(9).permutation(COUNT) % 10


def images(seed: int = 0) -> np.ndarray:
    """What images have in common whatever the model: an attribute score in degrees, mostly harm."""
    return np.random.default_rng(seed).normal(-4, 3, COUNT)


def jitter(size: float) -> np.ndarray:
    return np.random.default_rng(3).normal(0, size, COUNT)


def arm(
    stage: str,
    *,
    attribute: np.ndarray | None = None,
    correct: np.ndarray = CORRECT,
    loop: float = 1.0,
    image: float = 1.0,
    fit_images: int = ENOUGH,
    zero_shot: float = 0.8,
    vlm_zero_shot: float = 0.9,
) -> Measured:
    """What `analyze_model` returns, with the scores given; the loop's AS is `loop` times the others'."""
    attribute = images() if attribute is None else attribute
    rows, translators = {"label": LABELS, "correct": correct}, {}
    for name in TRANSLATORS[stage]:
        score = (loop if name == "loop" else 1.0) * attribute
        for kind in ("", "centred "):
            rows |= {f"{kind}AS/{name}": score, f"{kind}IS/{name}": image * (30 + images(1))}
        overall = {"AS_neg": float(np.maximum(-score, 0).mean()), "IS": float(rows[f"IS/{name}"].mean())}
        translators[name] = {"overall": overall, "fit_images": fit_images, "zero_shot": zero_shot}
    figures: dict[str, Any] = {"images": COUNT, "null_share": 0.78, "vlm_zero_shot": vlm_zero_shot}
    return pd.DataFrame(rows), {**figures, "head": {"features": FEATURES}, "translators": translators}


def arms(**sing: Any) -> dict[str, Measured]:
    """Before, control and sing: all alike but for what is given for sing."""
    return {"before": arm("before"), "control": arm("control"), "sing": arm("sing", **sing)}


def sentences(measured: dict[str, Measured], **options: Any) -> list[str]:
    return verdict(measured, compare_arms(measured), **options)


def test_figures_are_paired_by_image_and_against_the_control() -> None:
    after, correct = 0.5 * images() + jitter(1.0), (np.arange(COUNT) % 4 > 0).astype(float)
    measured = arms(attribute=after, correct=correct, image=0.9)
    measured["before"] = arm("before", attribute=7 * images())  # not what sing is compared with
    measured["control"] = arm("control", attribute=2 * images())
    found = {(row.name, row.translator): row for row in compare_arms(measured).itertuples(index=False)}
    was, classes = np.maximum(-2 * images(), 0), LABELS
    for translator in ("frozen", "auditor"):
        for name in ("AS⁻ ratio", "AS⁻ centred ratio", "|AS| ratio"):
            pair = (np.abs(after), np.abs(2 * images())) if name == "|AS| ratio" else (np.maximum(-after, 0), was)
            got = found[name, translator]
            assert (got.value, got.low, got.high) == pytest.approx(paired_ratio(*pair, groups=classes))
            assert got.unit == "×"
        assert found["IS ratio", translator].value == found["IS centred ratio", translator].value == pytest.approx(0.9)
        got = found["AS⁻ difference", translator]
        expected = paired_difference(np.maximum(-after, 0), was, groups=classes)
        assert (got.value, got.low, got.high) == pytest.approx(expected)
    top1 = found["top-1", "-"]
    assert top1.value == pytest.approx(100 * (3 / 4 - 4 / 5))
    assert top1.low < top1.value < top1.high
    assert (top1.unit, len(found)) == ("points", 13)


@pytest.mark.parametrize(
    ("factor", "noise", "word"), [(0.5, 0.5, "lower"), (1.6, 0.5, "higher"), (1.0, 2.0, "not distinguishable")]
)
def test_leakage_is_lower_higher_or_not_distinguishable(factor: float, noise: float, word: str) -> None:
    lines = sentences(arms(attribute=factor * images() + jitter(noise)))
    assert len(lines) == 4
    assert f"an AS⁻ that is {word}: " in lines[2]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (np.zeros(COUNT), "kept"),
        (np.where(np.arange(COUNT) % 5 == 0, 1.0, 0.0), "kept"),  # better is kept too
        (np.where(np.arange(COUNT) % 20 < 4, -1.0, 0.0) * (np.arange(COUNT) % 5 > 0), "lost"),
        (np.where(np.arange(COUNT) < 30, np.array([1.0, -1.0, 0, 0, 0] * 40), 0.0), "not shown to be kept"),
    ],
    ids=["same", "better", "worse", "unclear"],
)
def test_accuracy_is_kept_lost_or_not_shown_to_be_kept(changed: np.ndarray, word: str) -> None:
    assert f"Top-1 is {word}: {100 * changed.mean():+.2f} points [" in sentences(arms(correct=CORRECT + changed))[-1]


@pytest.mark.parametrize(("loop", "gamed"), [(1.0, False), (0.7, False), (0.5, True)])
def test_a_loop_that_reads_far_less_than_the_auditor_was_gamed(loop: float, gamed: bool) -> None:
    measured = arms(loop=loop)
    assert audit_gap(measured["sing"][1]) == pytest.approx(1 / loop)
    assert ("was gamed" in sentences(measured)[1]) == gamed
    assert f"{1 / loop:.2f} times" in sentences(measured)[1]


def test_without_leakage_in_the_loop_or_training_there_is_less_to_say() -> None:
    measured = arms(loop=0.0)
    assert audit_gap(measured["sing"][1]) is None
    assert len(sentences(measured)) == 3
    before, nothing = sentences(measured, trained=False)
    overall = measured["before"][1]["translators"]["auditor"]["overall"]
    assert f"78% of the feature norm; removing it costs the true class {overall['AS_neg']:.2f}° (AS⁻)" in before
    assert nothing.startswith("Nothing was trained")


def test_an_arm_without_any_leakage_is_told_in_degrees() -> None:
    assert "lower: 0.00× [0.00, 0.00]" in sentences(arms(attribute=np.abs(images())))[-2]
    measured = arms()
    measured["control"] = arm("control", attribute=np.abs(images()))
    assert f"higher: {np.maximum(-images(), 0).mean():.2f}° [" in sentences(measured)[-2]
    measured["sing"] = arm("sing", attribute=np.abs(images()))
    assert "not distinguishable: 0.00° [0.00, 0.00]" in sentences(measured)[-2]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"fit_images": ENOUGH - 1}, f"fitted on {ENOUGH - 1} images for {FEATURES} features"),
        ({"zero_shot": 0.4}, "name 40% of the classes"),
        ({"vlm_zero_shot": 0.4, "zero_shot": 0.35}, "itself names only 40%"),
    ],
)
def test_a_good_instrument_gives_no_warning_and_each_fault_its_own(fault: dict[str, Any], words: str) -> None:
    assert finetune_warnings(arm("before")[1]) == []
    (said,) = finetune_warnings(arm("before", **fault)[1])
    assert words in said


def test_an_auditor_of_too_few_images_supports_no_claim() -> None:
    attribute = 0.3 * images()
    assert "SingLoss leaves an AS⁻ that is lower" in " ".join(sentences(arms(attribute=attribute)))
    few = " ".join(sentences(arms(attribute=attribute, fit_images=ENOUGH - 1)))
    assert f"No claim: the auditor has {ENOUGH - 1} images, {ENOUGH} are needed" in few
    assert "SingLoss leaves" not in few
