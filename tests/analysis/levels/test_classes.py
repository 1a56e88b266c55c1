"""The class level against plain loops and scipy, its ranking, what is left out and counted, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from singreg.analysis.levels.class_results import ClassMeasurement
from singreg.analysis.levels.classes import analyze_classes, spearman
from singreg.analysis.results import CENTRED, Rows
from singreg.analysis.statistics import resampled_means

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def make_rows(seed: int = 0, count: int = 90) -> Rows:
    """Pictures of classes 0, 1, 2, 4 and 5 (class 3 has none), two of them unlabelled, class 5 with a single one."""
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, 2, 4])[rng.integers(0, 4, count)]
    labels[[3, 7]] = -1
    labels[11] = 5
    rows = {"label": labels, "correct": rng.integers(0, 2, count).astype(float)}
    for kind in ("", CENTRED):
        rows[f"{kind}AS/auditor"] = rng.normal(-1, 3, count) - labels
        rows[f"{kind}IS/auditor"] = rng.uniform(10, 30, count)
        rows[f"{kind}kappa/auditor"] = rng.normal(0, 0.1, count)
    return rows


@pytest.mark.parametrize("centred", [False, True])
def test_every_class_is_the_plain_mean_of_its_pictures(centred: bool) -> None:
    rows = make_rows()
    found = analyze_classes(rows, NAMES, centred=centred)
    kind = CENTRED if centred else ""
    assert sorted(score.label for score in found.classes) == [0, 1, 2, 4, 5]
    for score in found.classes:
        mine = rows["label"] == score.label
        attribute, image = rows[f"{kind}AS/auditor"][mine], rows[f"{kind}IS/auditor"][mine]
        assert (score.images, score.name) == (mine.sum(), NAMES[score.label])
        assert score.means["AS"] == pytest.approx(attribute.mean())
        assert score.means["AS_neg"] == pytest.approx(np.mean([max(-value, 0) for value in attribute]))
        assert score.means["AS_pos"] == pytest.approx(np.mean([max(value, 0) for value in attribute]))
        assert score.means["AS_abs"] == pytest.approx(np.abs(attribute).mean())
        assert score.means["IS"] == pytest.approx(image.mean())
        assert score.means["accuracy"] == pytest.approx(rows["correct"][mine].mean())
        quantiles = score.distribution["AS"]
        assert (quantiles[0], quantiles[25], quantiles[50]) == pytest.approx((attribute.min(), np.median(attribute), attribute.max()))
        assert len(quantiles) == 51


def test_the_leakiest_class_comes_first_with_an_interval_around_its_mean() -> None:
    found = analyze_classes(make_rows(), NAMES)
    leaks = [score.means["AS_neg"] for score in found.classes]
    assert leaks == sorted(leaks, reverse=True)
    for score in found.classes:
        if score.images == 1:
            assert set(score.intervals.values()) == {None}  # one picture says nothing about spread
            continue
        interval = score.intervals["AS_neg"]
        assert interval is not None
        assert interval[0] < score.means["AS_neg"] < interval[1]
    wide = {score.label: score.intervals["AS"] for score in found.classes}[0]
    values = make_rows()["AS/auditor"][make_rows()["label"] == 0]
    assert wide is not None
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * values.std() / len(values) ** 0.5, rel=0.15)


def test_empty_classes_and_unlabelled_pictures_are_named_and_counted() -> None:
    found = analyze_classes(make_rows(), NAMES)
    assert found.empty == ("dog",)
    assert (found.unlabelled, found.images) == (2, 88)
    assert found.omissions() == ["1 of 6 classes have no picture: dog.", "2 pictures have no label and are not counted."]
    whole = {name: values[make_rows()["label"] == 0] for name, values in make_rows().items()}
    assert analyze_classes(whole, NAMES[:1]).omissions() == []


def test_rank_correlation_is_scipys_with_ties_and_undefined_without_variation() -> None:
    rng = np.random.default_rng(3)
    for count in (3, 8, 200):
        x, y = rng.integers(0, 4, count).astype(float), rng.normal(size=count).round(1)
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_what_ties_leakage_to_accuracy_is_found_where_it_was_planted() -> None:
    """Accuracy falls with leakage by construction; the control draws it independently."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 40)
    leak = labels / 3
    rows = {
        "label": labels, "AS/auditor": -leak + rng.normal(0, 0.5, 1200), "IS/auditor": rng.uniform(10, 30, 1200),
        "kappa/auditor": np.zeros(1200), "correct": (rng.random(1200) > leak / 12).astype(float),
    }  # fmt: skip
    names = [str(label) for label in range(30)]
    planted = analyze_classes(rows, names).correlations["AS_neg"]
    assert planted.value is not None
    assert planted.low is not None
    assert planted.high is not None
    assert planted.low <= planted.value <= planted.high < -0.8
    control = analyze_classes({**rows, "correct": (rng.random(1200) > 0.4).astype(float)}, names).correlations["AS_neg"]
    assert control.low is not None
    assert control.high is not None
    assert control.low < 0 < control.high
    assert (planted.classes, planted.undefined) == (30, 0)


def test_a_correlation_that_is_not_defined_is_none() -> None:
    rows = make_rows()
    perfect = analyze_classes({**rows, "correct": np.ones(90)}, NAMES).correlations["AS_neg"]
    assert (perfect.value, perfect.low, perfect.undefined) == (None, None, 1000)
    two = {name: values[(rows["label"] == 0) | (rows["label"] == 1)] for name, values in rows.items()}
    assert analyze_classes(two, NAMES).correlations["IS"].value is None


def test_a_way_through_json_changes_nothing() -> None:
    found = analyze_classes(make_rows(), NAMES)
    assert ClassMeasurement.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_resampled_means_are_the_same_however_many_draws_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(17, 2))
    together = resampled_means(values, resamples=50, seed=4)
    monkeypatch.setattr("singreg.analysis.statistics.DRAWN_TOGETHER", 1)
    np.testing.assert_allclose(resampled_means(values, resamples=50, seed=4), together, atol=1e-12)
    rng = np.random.default_rng(4)
    np.testing.assert_allclose(together[:3], [values[rng.integers(0, 17, 17)].mean(0) for _ in range(3)], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "names", "words"),
    [
        ({"label": np.full(90, -1)}, NAMES, "none of the 90 pictures has a label"),
        ({}, NAMES[:4], "label 5, but there are 4 class names"),
        ({}, ["ant", "", "cat", " ", "eel", "fox"], r"without a name at positions \[1, 3\] of 6"),
    ],
)
def test_bad_input_is_refused(change: Rows, names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        analyze_classes({**make_rows(), **change}, names)


def test_rows_of_another_translator_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no 'AS/frozen', 'IS/frozen', 'kappa/frozen'; they have label"):
        analyze_classes(make_rows(), NAMES, translator="frozen")
