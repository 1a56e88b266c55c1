"""The arms against each other: ratios and differences by hand, and the sentences in every case they distinguish."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from singreg.analysis.comparison import FIGURES, Measured, Paired, compare_rows, finetune_warnings, verdict
from singreg.analysis.scores import AUDITED
from singreg.analysis.statistics import paired_ratio

COUNT, FEATURES, ENOUGH = 200, 24, 144
JUDGES = ("loop", "auditor")
CORRECT = (np.arange(COUNT) % 5 > 0).astype(float)
LABELS = np.random.default_rng(9).permutation(COUNT) % 10


def images(seed: int = 0) -> np.ndarray:
    """What images have in common whatever the model: an attribute score in degrees, mostly harm."""
    return np.random.default_rng(seed).normal(-4, 3, COUNT)


def jitter(size: float) -> np.ndarray:
    return np.random.default_rng(3).normal(0, size, COUNT)


def arm(
    *,
    attribute: np.ndarray | None = None,
    correct: np.ndarray = CORRECT,
    loop: float = 1.0,
    null: float = 1.0,
    image: float = 1.0,
    fit_images: int = ENOUGH,
    zero_shot: float = 0.8,
    vlm_zero_shot: float = 0.9,
) -> Measured:
    """What `analyze_model` returns: the loop's AS is `loop` times the auditor's."""
    attribute = images() if attribute is None else attribute
    rows, translators = {"image": range(COUNT), "label": LABELS, "correct": correct}, {}
    for place, name in enumerate(sorted(AUDITED)):
        rows[name] = (null if name == "null scores" else 1.0) * np.random.default_rng(place).uniform(1, 2, COUNT)
    for name in JUDGES:
        score = (loop if name == "loop" else 1.0) * attribute
        for kind in ("", "centred "):
            rows |= {f"{kind}AS/{name}": score, f"{kind}IS/{name}": image * (30 + images(1))}
        translators[name] = {"fit_images": fit_images, "zero_shot": zero_shot}
    figures: dict[str, Any] = {"images": COUNT, "vlm_zero_shot": vlm_zero_shot, "head": {"features": FEATURES}}
    figures["audit"] = {"class_variance": 0.12, "AS_neg": 4.0, "IS": 30.0}
    return pd.DataFrame(rows), {**figures, "translators": translators}


def arms(**sing: Any) -> dict[str, Measured]:
    return {"before": arm(), "control": arm(), "sing": arm(**sing)}


def compare(measured: dict[str, Measured]) -> Paired:
    return compare_rows(*({0: measured[name][0]} for name in ("sing", "control")))


def sentences(measured: dict[str, Measured]) -> list[str]:
    return verdict(measured, compare(measured))


def test_figures_are_paired_by_image_and_against_the_control() -> None:
    after, correct = 0.5 * images() + jitter(1.0), (np.arange(COUNT) % 4 > 0).astype(float)
    measured = arms(attribute=after, correct=correct, image=0.9, null=0.3)
    measured["before"] = arm(attribute=7 * images())  # not what sing is compared with
    measured["control"] = arm(attribute=2 * images())
    found = {name: tuple(each.values()) for name, each in compare(measured).items()}
    was, classes = np.maximum(-2 * images(), 0), LABELS
    for name in ("AS_neg", "centred AS_neg", "AS_abs"):
        pair = (np.abs(after), np.abs(2 * images())) if name == "AS_abs" else (np.maximum(-after, 0), was)
        assert found[name] == (*(pytest.approx(end) for end in paired_ratio(*pair, groups=classes)), "×")
    assert found["IS"][0] == found["centred IS"][0] == pytest.approx(0.9)
    value, low, high, unit = found["top1"]
    assert value == pytest.approx(100 * (3 / 4 - 4 / 5))
    assert low < value < high
    assert (unit, found.keys()) == ("points", FIGURES.keys())
    # Paired by image: whatever is resampled, what the arms share cancels.
    for name, value in (("class_variance", 0.3), ("unique_r2", 1.0), ("cross 4 sd", 1.0)):
        assert found[name][:3] == pytest.approx((value, value, value))


@pytest.mark.parametrize(
    ("factor", "noise", "word"), [(0.5, 0.5, "lower"), (1.6, 0.5, "higher"), (1.0, 2.0, "not distinguishable")]
)
def test_every_claimed_figure_is_told_with_its_interval(factor: float, noise: float, word: str) -> None:
    measured = arms(attribute=factor * images() + jitter(noise), null=0.3)
    lines = sentences(measured)
    assert len(lines) == 4
    assert "12% of the class scores' variance" in lines[0]
    told = dict(each.split(" ", 1) for each in lines[1].split(": ")[1].split("; ") if "AS" in each)
    assert ("not shown to fall: AS⁻, |AS|, 4 sd" in lines[1]) == (word != "lower")
    for name in ("AS⁻", "|AS|"):
        value, low, high = (float(each.strip("[],×")) for each in told[name].split(" ")[:3])
        assert low <= value <= high
        assert {"lower": high < 1, "higher": low > 1, "not distinguishable": low <= 1 <= high}[word]
        assert ("(not distinguishable)" in told[name]) == (word == "not distinguishable")
    assert "class-score variance in the null 0.30× [0.30, 0.30]" in lines[1]
    assert "4 sd step judged by another 1.00× [1.00, 1.00] (not distinguishable)" in lines[1]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (np.zeros(COUNT), "not shown to be kept"),  # 200 images cannot show half a point
        (1 - CORRECT, "kept"),  # better is kept too
        (np.where(np.arange(COUNT) % 20 < 4, -CORRECT, 0.0), "lost"),
    ],
    ids=["same", "better", "worse"],
)
def test_accuracy_is_kept_lost_or_not_shown_to_be_kept(changed: np.ndarray, word: str) -> None:
    told = sentences(arms(attribute=0.5 * images(), correct=CORRECT + changed))[-1]
    assert f"Top-1 is {word}: {100 * changed.mean():+.2f} points [" in told


@pytest.mark.parametrize(("auditor", "loop", "gamed"), [(0.4, 1.0, False), (0.4, 0.2, True), (0.4, 0.5, False)])
def test_a_loop_whose_fall_the_auditor_does_not_confirm_was_gamed(auditor: float, loop: float, gamed: bool) -> None:
    """The control's reading is 1 by both, the loss's `auditor` and auditor · loop: the share that is confirmed."""
    measured = arms(attribute=auditor * images(), loop=loop)
    share, low, high, _ = compare(measured)["confirmed"].values()
    assert (share, low, high) == pytest.approx([(1 - auditor) / (1 - auditor * loop)] * 3)
    said = sentences(measured)[2]
    assert ("the loss was gamed" in said) == gamed == (share < 2 / 3)
    assert f"confirms {share:.0%} [{share:.0%}, {share:.0%}]" in said


def test_each_judge_is_held_against_its_own_reading_of_the_control() -> None:
    measured = arms(attribute=0.5 * images() + jitter(1.0), loop=0.4)
    measured["control"] = arm(attribute=images(), loop=0.8)
    both = [measured[name][0] for name in ("sing", "control")]
    read = [{name: np.maximum(-rows[f"AS/{name}"], 0).mean() for name in JUDGES} for rows in both]
    fall = {name: read[1][name] - read[0][name] for name in JUDGES}
    share, low, high, _ = compare(measured)["confirmed"].values()
    assert share == pytest.approx(fall["auditor"] / fall["loop"])
    assert low < share < high
    for factor in (1.2, 1 - 1e-7):  # rounding is no fall
        measured = arms(attribute=factor * images() + 0.01 * (images() > 0))
        assert "confirmed" not in compare(measured)
        assert "reads no fall in AS⁻, so there is nothing to confirm" in sentences(measured)[2]


def test_no_claim_from_arms_that_are_the_same_or_from_few_images() -> None:
    same = sentences(arms(attribute=images()))
    assert "No claim: the two arms are the same" in same[1]
    assert not any("kept" in line for line in same)
    few = {name: (rows[:20], found) for name, (rows, found) in arms().items()}
    assert "No claim: an interval from 20 test images of" in sentences(few)[1]
    auditor = " ".join(sentences(arms(attribute=0.3 * images(), fit_images=ENOUGH - 1)))
    assert f"No claim: the auditor has {ENOUGH - 1} images, {ENOUGH} are needed" in auditor
    assert "Against plain" not in auditor
    many = sentences(arms(attribute=0.97 * images()))[1]  # an effect that nobody would act on
    assert "AS⁻ 0.97× [0.97, 0.97] (too little to matter)" in many


def test_a_control_that_has_next_to_nothing_supports_no_ratio() -> None:
    assert "AS⁻ 0.00× [0.00, 0.00];" in sentences(arms(attribute=np.abs(images())))[1]
    without = arms() | {"control": arm(attribute=np.abs(images()))}
    assert "AS⁻ undefined (the control has it on 0 images" in sentences(without)[1]
    measured = arms(attribute=0.5 * images())
    for name, count in (("sing", 0), ("control", 9)):
        measured[name][0]["cross 4 sd"] = np.arange(COUNT) < count
    assert "judged by another undefined (the control has it on 9 images" in sentences(measured)[1]
    measured["control"][0]["cross 4 sd"] = np.arange(COUNT) < 10
    assert "judged by another 0.00×" in sentences(measured)[1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"fit_images": ENOUGH - 1}, f"fitted on {ENOUGH - 1} images for {FEATURES} features"),
        ({"zero_shot": 0.4}, "name 40% of the classes"),
        ({"vlm_zero_shot": 0.4, "zero_shot": 0.35}, "itself names only 40%"),
    ],
)
def test_a_good_instrument_gives_no_warning_and_each_fault_its_own(fault: dict[str, Any], words: str) -> None:
    assert finetune_warnings(arm()[1]) == []
    (said,) = finetune_warnings(arm(**fault)[1])
    assert words in said
