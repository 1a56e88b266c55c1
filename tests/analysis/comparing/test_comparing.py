"""Several classifiers on the same pictures: differences paired, order checked over views, and what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from singreg.analysis.comparing.differences import (
    FIGURES,
    Measured,
    kendall_tau,
    model_differences,
    order_check,
    paired_figures,
)
from singreg.analysis.comparing.findings import compare_findings, compare_warnings
from singreg.analysis.comparing.results import ComparedHead, CompareReport
from singreg.analysis.old_passport import head_passport
from singreg.analysis.results import ModelMeasurement
from singreg.analysis.statistics import paired_difference, paired_ratio
from tests.analysis.study.arms import COUNT, arm, pictures

NOISE = np.random.default_rng(5).normal(0, 0.2, (6, COUNT))


def model(shift: float, *, reversed_for: str | None = None, image: float = 1.0, seed: int = 0, **changes: object) -> ModelMeasurement:
    """A model that reads `shift` degrees below what all have in common; one of its translators may say the opposite."""
    measured = arm("before", attribute=pictures() - shift + NOISE[seed], image=image, **changes)
    if reversed_for is not None:
        measured.rows[f"AS/{reversed_for}"] = pictures() + shift + NOISE[seed]
    return measured


def three(**changes: object) -> dict[str, ModelMeasurement]:
    return {"good": model(0, seed=0), "fair": model(1, seed=1), "bad": model(2, seed=2, **changes)}


def head(label: str, omitted: str | None = None, classes: int = 2) -> ComparedHead:
    torch.manual_seed(0)
    return ComparedHead(label, f"timm:{label}", head_passport(torch.randn(classes, 8), tag=label), omitted)


def test_figures_and_differences_are_the_slow_ones_paired_by_picture() -> None:
    measured = three(correct=np.zeros(COUNT))
    figures = paired_figures({"A": measured, "B": measured}, resamples=200, seed=3)
    assert figures.views == (("A", "frozen"), ("A", "auditor"), ("B", "frozen"), ("B", "auditor"))
    assert (figures.models, figures.images) == (("good", "fair", "bad"), COUNT)
    differences = {(d.figure, d.space, d.translator, d.first, d.second): (d.value, d.low, d.high) for d in model_differences(figures)}
    assert len(differences) == 3 * (1 + 4 * len(FIGURES))
    rows = {name: m.rows for name, m in measured.items()}
    classes = rows["good"]["label"]
    for figure, of in {
        "AS_neg": lambda r: np.maximum(-r["AS/auditor"], 0), "AS_abs": lambda r: np.abs(r["AS/auditor"]), "IS": lambda r: r["IS/auditor"]
    }.items():  # fmt: skip
        expected = paired_difference(of(rows["bad"]), of(rows["good"]), resamples=200, seed=3, groups=classes)
        assert differences[figure, "B", "auditor", "good", "bad"] == pytest.approx(expected)
    one, other = ((r["IS/auditor"], np.abs(r["AS/auditor"])) for r in (rows["good"], rows["bad"]))
    ratio = paired_ratio(*one, resamples=200, seed=3, groups=classes)
    assert figures.values["ratio"][1, 0] == pytest.approx(ratio[0])
    assert figures.interval("ratio", 1, 0) == pytest.approx(ratio[1:])
    value = other[0].mean() / other[1].mean() - one[0].mean() / one[1].mean()
    assert differences["ratio", "A", "auditor", "good", "bad"][0] == pytest.approx(value)
    points = paired_difference(100 * rows["bad"]["correct"], 100 * rows["good"]["correct"], resamples=200, seed=3, groups=classes)
    assert differences["top1", "-", "-", "good", "bad"] == pytest.approx(points)


def test_pairing_sees_a_difference_that_unpaired_intervals_hide() -> None:
    figures = paired_figures({"A": {"a": model(0), "b": model(0.1, seed=1)}})
    found = next(d for d in model_differences(figures) if (d.figure, d.translator) == ("AS_abs", "auditor"))
    assert 0 < found.low < found.value < found.high
    assert found.high - found.low < 0.15
    ends = [figures.interval("AS_abs", 1, place) for place in (0, 1)]
    assert ends[0][1] > ends[1][0]  # the control: the two models' own intervals overlap, by far
    assert ends[0][1] - ends[0][0] > 5 * (found.high - found.low)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_tau_is_scipys_with_ties_too(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    assert kendall_tau(first, second) == pytest.approx(float(kendalltau(first, second).statistic), nan_ok=True)


def test_a_clear_order_holds_everywhere_and_a_reversed_view_is_seen() -> None:
    figures = paired_figures({"A": three(), "B": three()})
    check = order_check(figures, "AS_neg")
    assert check.orders == [["good", "fair", "bad"]] * 4
    assert (check.lowest_tau, check.everywhere, check.stable) == (1.0, 1.0, [1.0] * 4)
    turned = {name: model(shift, reversed_for="frozen", seed=seed) for seed, (name, shift) in enumerate(zip("xyz", (0, 1, 2), strict=True))}
    check = order_check(paired_figures({"A": three(), "B": dict(zip(three(), turned.values(), strict=True))}), "AS_neg")
    assert check.views[2] == "B, frozen"
    assert check.orders[2] == ["bad", "fair", "good"]
    assert check.orders[3] == ["good", "fair", "bad"]
    assert (check.tau[0][2], check.same[0][2], check.lowest_tau, check.everywhere) == (-1.0, 0.0, -1.0, 0.0)
    assert (check.tau[1][3], check.same[1][3]) == (1.0, 1.0)


def test_models_that_are_alike_have_no_order_of_their_own() -> None:
    figures = paired_figures({"A": {"a": model(0), "b": model(0, seed=1)}})
    check = order_check(figures, "AS_neg")
    assert all(0.05 < stable < 0.95 for stable in check.stable)
    by_hand = (figures.samples["AS_neg"][:, 0, 0] < figures.samples["AS_neg"][:, 0, 1]).mean()
    assert check.stable[0] == pytest.approx(by_hand if check.orders[0] == ["a", "b"] else 1 - by_hand)


def test_large_is_good_for_the_ratio_and_small_for_leakage() -> None:
    figures = paired_figures({"A": {"small": model(0), "large": model(0, image=2.0, seed=1)}})
    assert order_check(figures, "ratio").orders[0] == ["large", "small"]
    assert order_check(figures, "IS").orders[0] == ["large", "small"]
    assert order_check(paired_figures({"A": three()}), "AS_abs").orders[0] == ["good", "fair", "bad"]


def renamed(measured: ModelMeasurement) -> ModelMeasurement:
    rows = dict(measured.rows)
    rows["image"] = rows["image"].copy()
    rows["image"][3] = "another"
    return replace(measured, rows=rows)


def shortened(measured: ModelMeasurement) -> ModelMeasurement:
    return replace(measured, rows={name: column[:-1] for name, column in measured.rows.items()})


def foreign(measured: ModelMeasurement) -> ModelMeasurement:
    return replace(measured, translators={"mine": measured.translators["auditor"]})


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({}, "no measured model"),
        ({"A": {}}, "no measured model"),
        ({"A": {"a": model(0), "b": renamed(model(1))}}, "b in A and a in A .*same order: picture 3 is another"),
        ({"A": {"a": model(0), "b": shortened(model(1))}}, f"b in A was measured on {COUNT - 1} pictures, a in A on {COUNT}"),
        ({"A": {"a": model(0)}, "B": {"b": model(0)}}, r"same models; 'B' has \['b'\], the first one has \['a'\]"),
        ({"A": {"a": model(0), "b": foreign(model(0))}}, "no translator was fitted for all models in 'A'"),
    ],
)
def test_what_cannot_be_compared_is_named(measured: Measured, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paired_figures(measured)


def test_three_sentences_name_best_worst_order_and_what_was_left_out() -> None:
    figures = paired_figures({"clip": three(), "eva": three()})
    heads = [head("good"), head("fair"), head("bad"), head("full", "no null space: 9 classes fill all 8 features", classes=9)]
    first, second, third = compare_findings(figures, model_differences(figures), order_check(figures, "AS_neg"), heads)
    value = figures.values["AS_neg"][1]
    assert f"good ({value[0]:.2f}° [" in first
    assert f"bad ({value[2]:.2f}° [" in first
    assert f"differ by {value[2] - value[0]:.2f}° [" in first
    assert "in clip by the auditor" in first
    assert "is the same in all 4 views" in second
    assert "lowest Kendall τ 1.00" in second
    assert "In 3 of 3 pairs" in third
    assert "for want of a null space: full." in third
    turned = dict(reversed(three().items()))  # the order they are given in does not matter
    figures = paired_figures({"clip": turned})
    again = compare_findings(figures, model_differences(figures), order_check(figures, "AS_neg"), heads[:3])
    assert again[0] == first
    assert "Every model has a null space." in again[2]


def test_one_measured_model_or_none_is_said_plainly() -> None:
    heads = [head("good"), head("full", "no null space: 9 classes fill all 8 features", classes=9)]
    figures = paired_figures({"clip": {"good": model(0)}})
    said = compare_findings(figures, [], order_check(figures, "AS_neg"), heads)
    assert said[0].startswith("Only good could be measured: AS⁻ ")
    assert compare_findings(None, [], None, heads[1:])[0].startswith("None of the models has a null space")


def read(*, fit_images: int = 9999, zero_shot: float = 0.9, vlm_zero_shot: float = 0.9) -> ModelMeasurement:
    """A model whose translators all have this quality."""
    measured = model(0)
    scores = {n: replace(s, fit_images=fit_images, zero_shot=zero_shot) for n, s in measured.translators.items()}
    return replace(measured, translators=scores, vlm_zero_shot=vlm_zero_shot)


def test_warnings_name_the_models_and_the_space() -> None:
    measured = {
        "clip": {"few": read(fit_images=3), "lost": read(zero_shot=0.01)},
        "blind": {"few": read(vlm_zero_shot=0.2), "lost": read(vlm_zero_shot=0.2)},
    }
    heads = [head("few"), head("lost", classes=7), head("full", "no null space", classes=9)]
    agreement = {"clip": {"few": 0.3, "lost": 0.9}, "blind": {"few": 0.9, "lost": 0.9}}
    width = measured["clip"]["few"].head.features
    few = ", ".join(f"few (3 for {width} features, {name})" for name in ("frozen", "auditor"))
    lost = ", ".join(f"lost ({name}: 1%)" for name in ("frozen", "auditor"))
    said = compare_warnings(heads, measured, agreement, 6.0)
    assert said[2:] == [
        f"Warning: in clip, fewer than 6 pictures a feature, so AS⁻ reads too high: {few}.",
        f"Warning: in clip, translation loses too much of the class for AS to mean it (zero-shot; the VLM's 90%): {lost}.",
        "Warning: in clip, translators from different pictures agree on the classes' directions to less than 0.75: few (0.30).",
        "Warning: in blind, the vision-language model itself names only 20% of the pictures' classes.",
    ]
    passports = "few has 6 of 8 dimensions in its null space (75 %), lost has 1 of 8 dimensions (12 %)"
    assert said[0].startswith(f"Warning: {passports}")
    assert "few 2, lost 7)" in said[1]
    assert not any("full" in sentence for sentence in said)  # a row says that already
    fine = {"clip": {"a": read(), "b": read()}}
    assert compare_warnings([head("a"), head("b")], fine, {"clip": {"a": 0.9, "b": 0.9}}, 6.0) == []


def test_the_report_is_strict_json() -> None:
    figures = paired_figures({"clip": three()})
    report = CompareReport(
        heads=[head("good"), ComparedHead("headless", "x", None, "no linear head")], measurements={"clip": three()}, chance={},
        agreement={"clip": {"good": float("nan")}}, differences=model_differences(figures),
        orders=[order_check(figures, figure) for figure in FIGURES], findings=[], warnings=[], settings={}, machine={}, seconds={},
    )  # fmt: skip
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["kind"] == "compare"
    assert value["heads"][1]["passport"] is None
    assert value["agreement"]["clip"]["good"] is None
    assert value["orders"][0]["orders"] == [["good", "fair", "bad"]] * 2
    assert set(value["measurements"]["clip"]) == {"good", "fair", "bad"}
