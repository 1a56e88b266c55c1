"""The arms against each other: ratios and differences by hand, and the sentences in every case they distinguish."""

from __future__ import annotations

import numpy as np
import pytest

from singreg.analysis.comparison import compare_arms, report_warnings, verdict
from singreg.analysis.results import ModelMeasurement
from singreg.analysis.statistics import paired_difference, paired_ratio
from tests.analysis.study.arms import COUNT, arm, arms, pictures


def jitter(size: float) -> np.ndarray:
    return np.random.default_rng(3).normal(0, size, COUNT)


@pytest.mark.parametrize("control", [True, False])
def test_figures_are_the_paired_ones_against_the_control_or_else_the_model_before(control: bool) -> None:
    after = 0.5 * pictures() + jitter(1.0)
    correct = (np.arange(COUNT) % 4 > 0).astype(float)
    measurements = arms(control=control, attribute=after, correct=correct, image=0.9)
    measurements["control" if control else "before"] = arm("before", attribute=2 * pictures())
    if control:
        measurements["before"] = arm("before", attribute=7 * pictures())  # not what sing is compared with
    found = {(c.name, c.translator): c for c in compare_arms(measurements)}
    was, classes = np.maximum(-2 * pictures(), 0), measurements["sing"].rows["label"]
    for translator in ("frozen", "auditor"):
        for name, kind in (("AS⁻ ratio", "harm"), ("AS⁻ centred ratio", "harm"), ("|AS| ratio", "abs")):
            pair = (np.maximum(-after, 0), was) if kind == "harm" else (np.abs(after), np.abs(2 * pictures()))
            got = found[name, translator]
            assert (got.value, got.low, got.high) == pytest.approx(paired_ratio(*pair, groups=classes))
            assert got.unit == "×"
        assert found["IS ratio", translator].value == pytest.approx(0.9)
        assert found["IS centred ratio", translator].value == pytest.approx(0.9)
        difference = found["AS⁻ difference", translator]
        expected = paired_difference(np.maximum(-after, 0), was, groups=classes)
        assert (difference.value, difference.low, difference.high) == pytest.approx(expected)
        assert difference.unit == "°"
    top1 = found["top-1", "-"]
    assert top1.value == pytest.approx(100 * (3 / 4 - 4 / 5))
    assert top1.low < top1.value < top1.high
    assert top1.unit == "points"


def sentences(measurements: dict[str, ModelMeasurement]) -> str:
    return " ".join(verdict(measurements))


@pytest.mark.parametrize(
    ("factor", "noise", "word"),
    [(0.5, 0.5, "lower"), (1.6, 0.5, "higher"), (1.0, 2.0, "not distinguishable")],
)
def test_leakage_is_called_lower_higher_or_not_distinguishable(factor: float, noise: float, word: str) -> None:
    text = sentences(arms(attribute=factor * pictures() + jitter(noise)))
    assert f"Against plain fine-tuning, SingLoss leaves an AS⁻ that is {word}: " in text
    assert sum(f"that is {other}:" in text for other in ("lower", "higher", "not distinguishable")) == 1


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (np.zeros(COUNT), "kept"),
        (np.where(np.arange(COUNT) % 5 == 0, 1.0, 0.0), "kept"),  # better is kept too
        (np.where(np.arange(COUNT) % 20 < 4, -1.0, 0.0) * (np.arange(COUNT) % 5 > 0), "lost"),
        (np.where(np.arange(COUNT) < 30, np.array([1.0, -1.0, 0, 0, 0] * 40), 0.0), "not shown to be kept"),  # six won, six lost
    ],
    ids=["same", "better", "worse", "unclear"],
)
def test_accuracy_is_called_kept_lost_or_not_shown_to_be_kept(changed: np.ndarray, word: str) -> None:
    reference = (np.arange(COUNT) % 5 > 0).astype(float)
    text = sentences(arms(correct=reference + changed))
    assert f"Top-1 is {word}: {100 * changed.mean():+.2f} points [" in text


@pytest.mark.parametrize(("loop", "gamed"), [(1.0, False), (0.7, False), (0.5, True)])
def test_a_loop_that_reads_far_less_than_the_auditor_is_called_gamed(loop: float, gamed: bool) -> None:
    text = sentences(arms(loop=loop))
    assert f"Audit gap {1 / loop:.2f} " in text
    assert ("was gamed: do not believe its figure" in text) == gamed
    assert ("loop and auditor agree" in text) != gamed


def test_without_leakage_in_the_loop_there_is_no_gap_to_speak_of() -> None:
    assert "Audit gap" not in sentences(arms(loop=0.0))


def test_the_first_sentence_gives_the_model_befores_own_figures() -> None:
    measurements = arms(attribute=0 * pictures())
    before = measurements["before"]
    overall = before.translators["auditor"].overall
    first = verdict(measurements)[0]
    assert f"{before.null_share:.0%} of the feature norm" in first
    assert f"costs the true class {overall['AS_neg']:.2f}° (AS⁻)" in first
    assert f"by {overall['IS']:.1f}° (IS)" in first
    assert f"of {COUNT} test pictures" in first


def test_without_a_control_every_sentence_says_so() -> None:
    measurements = arms(control=False, attribute=0.3 * pictures())
    assert "Against the model before (no control was trained), SingLoss leaves an AS⁻ that is lower" in sentences(measurements)
    assert any("no control arm was trained" in warning for warning in report_warnings(measurements, 0.1))
    assert not any("no control" in warning for warning in report_warnings(arms(), 0.1))


def test_an_arm_without_any_leakage_left_or_to_begin_with_is_told_in_degrees() -> None:
    gone = sentences(arms(attribute=np.abs(pictures())))
    assert "AS⁻ that is lower: 0.00× [0.00, 0.00]" in gone
    measurements = arms()
    measurements["control"] = arm("control", attribute=np.abs(pictures()))
    never = sentences(measurements)
    assert f"AS⁻ that is higher: {np.maximum(-pictures(), 0).mean():.2f}° [" in never
    measurements["sing"] = arm(attribute=np.abs(pictures()))
    assert "AS⁻ that is not distinguishable: 0.00° [0.00, 0.00]" in sentences(measurements)


def warned(*, images_per_feature: float = 2.0, **before: object) -> list[str]:
    good = {"fit_images": 100, "zero_shot": 0.8, "vlm_zero_shot": 0.9}
    measurements = {**arms(), "before": arm("before", **{**good, **before})}  # type: ignore[arg-type]
    return report_warnings(measurements, images_per_feature)


def test_a_good_instrument_gives_no_warning_and_each_fault_its_own() -> None:
    assert warned() == []
    (few,) = warned(fit_images=47)  # 24 features
    assert "fitted on 47 pictures for 24 features; below 2 a feature" in few
    assert warned(fit_images=48) == []
    (poor,) = warned(zero_shot=0.4)
    assert "name 40% of the classes" in poor
    assert "own embeddings name 90%" in poor
    (blind,) = warned(vlm_zero_shot=0.4, zero_shot=0.35)
    assert "itself names only 40%" in blind
    assert len(warned(fit_images=1, zero_shot=0.1, vlm_zero_shot=0.3)) == 3


def test_an_auditor_of_too_few_pictures_supports_no_claim() -> None:
    measurements = arms(attribute=0.3 * pictures())
    before = measurements["before"]
    have, width = before.translators["auditor"].fit_images, before.head.features
    enough = " ".join(verdict(measurements, images_per_feature=have / width))
    assert "SingLoss leaves an AS⁻ that is lower" in enough
    assert "No claim" not in enough
    few = " ".join(verdict(measurements, images_per_feature=(have + 1) / width))
    assert f"No claim: the auditor has {have} pictures, {have + 1} are needed (data.audit_per_class, data.unlabeled" in few
    assert "SingLoss leaves" not in few
