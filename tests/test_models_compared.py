"""Several classifiers on the same images: differences paired, the order checked over views, what is said of it."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from singreg.analysis import models_compared
from singreg.analysis.models_compared import comparison_verdict, model_differences, order_check, paired_figures
from singreg.analysis.statistics import ends, paired_difference, paired_ratio

COUNT = 200
TRANSLATORS = ("fitted", "auditor")


def model(shift: float, seed: int = 0, *, reversed_for: str = "", image: float = 1.0) -> pd.DataFrame:
    """Rows of a model `shift` degrees below what all have in common; one translator may say the opposite."""
    common, noise = np.random.default_rng(0).normal(-4, 3, COUNT), np.random.default_rng(5 + seed).normal(0, 0.2, COUNT)
    rows = {"image": [f"image {i}" for i in range(COUNT)], "label": np.arange(COUNT) % 5}
    rows["correct"] = (np.arange(COUNT) % 5 > 0).astype(float)
    for name in TRANSLATORS:
        rows[f"AS/{name}"] = common + (shift if name == reversed_for else -shift) + noise
        rows[f"IS/{name}"] = image * (30 + np.random.default_rng(1).normal(-4, 3, COUNT))
    return pd.DataFrame(rows)


def three(reversed_for: str = "") -> dict[str, pd.DataFrame]:
    shifts = {"good": 0, "fair": 1, "bad": 2}
    return {name: model(shift, shift, reversed_for=reversed_for) for name, shift in shifts.items()}


def head(label: str, omitted: str | None = None) -> dict[str, Any]:
    return {"label": label, "source": label, "passport": None, "omitted": omitted}


def test_figures_and_differences_are_the_slow_ones() -> None:
    measured = three()
    measured["bad"]["correct"] = 0.0
    figures = paired_figures({"A": measured, "B": measured}, seed=3)
    assert figures.views == tuple((space, name) for space in "AB" for name in TRANSLATORS)
    assert (figures.models, figures.images, figures.primary) == (("good", "fair", "bad"), COUNT, 1)
    keys = ["figure", "space", "translator", "first", "second"]
    table = pd.DataFrame(model_differences(figures)).set_index(keys)[["value", "low", "high"]]
    found = {key: tuple(row) for key, row in zip(table.index, table.to_numpy(), strict=True)}
    assert len(found) == 3 * (1 + 4 * len(models_compared.FIGURES))
    good, bad = measured["good"], measured["bad"]
    options: dict[str, Any] = {"seed": 3, "groups": good["label"].to_numpy()}
    for figure, of in (
        ("AS_neg", lambda r: np.maximum(-r["AS/auditor"].to_numpy(), 0)),
        ("AS_abs", lambda r: np.abs(r["AS/auditor"].to_numpy())),
        ("IS", lambda r: r["IS/auditor"].to_numpy()),
    ):
        expected = paired_difference(of(bad), of(good), **options)
        assert found[figure, "B", "auditor", "good", "bad"] == pytest.approx(expected)
    ratios = [paired_ratio(r["IS/auditor"], np.abs(r["AS/auditor"]), **options) for r in (good, bad)]
    assert ends(figures.figures["ratio"][:, 1, 0]) == pytest.approx(ratios[0])
    assert found["ratio", "A", "auditor", "good", "bad"][0] == pytest.approx(ratios[1][0] - ratios[0][0])
    points = paired_difference(100 * bad["correct"].to_numpy(), 100 * good["correct"].to_numpy(), **options)
    assert found["top1", "-", "-", "good", "bad"] == pytest.approx(points)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_tau_is_scipys_with_ties_too(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    found = models_compared.kendall_tau(np.stack([first, second]))[0, 1]
    assert found == pytest.approx(float(kendalltau(first, second).statistic), nan_ok=True, abs=1e-6)


def test_a_clear_order_holds_and_a_reversed_view_is_seen() -> None:
    check = order_check(paired_figures({"A": three(), "B": three()}))
    assert check["orders"] == [["good", "fair", "bad"]] * 4
    assert (check["lowest"], check["stable"]) == (1.0, [1.0] * 4)
    check = order_check(paired_figures({"A": three(), "B": three(reversed_for="fitted")}))
    assert check["views"][2] == "B, fitted"
    assert check["orders"][2:] == [["bad", "fair", "good"], ["good", "fair", "bad"]]
    assert (check["tau"][0][2], check["same"][0][2], check["lowest"]) == (-1.0, 0.0, -1.0)
    assert (check["tau"][1][3], check["same"][1][3]) == (1.0, 1.0)


def test_models_that_are_alike_have_no_order() -> None:
    figures = paired_figures({"A": {"a": model(0), "b": model(0, seed=1)}})
    check, drawn = order_check(figures), figures.figures["AS_neg"][1:, 0]
    assert all(0.05 < stable < 0.95 for stable in check["stable"])
    by_hand = (drawn[:, 0] < drawn[:, 1]).mean()
    assert check["stable"][0] == pytest.approx(by_hand if check["orders"][0] == ["a", "b"] else 1 - by_hand)


def test_verdict_names_best_worst_order_and_what_was_left_out() -> None:
    heads = [head("good"), head("full", "no null space: 9 classes fill all 8 features")]
    figures = paired_figures({"clip": three(), "eva": three()})
    first, second, third = comparison_verdict(figures, heads)
    harm = figures.figures["AS_neg"][0, 1]
    assert f"good loses least of the true class when its null space is removed (AS⁻ {harm[0]:.2f}° [" in first
    assert f"bad most ({harm[2]:.2f}° [" in first
    assert f"they are {harm[2] - harm[0]:.2f}° [" in first
    assert "is the same in all 4 views (lowest Kendall τ 1.00)" in second
    assert third.endswith("full.")
    turned = paired_figures({"clip": dict(reversed(three().items()))})  # the order given does not matter
    assert comparison_verdict(turned, [])[0] == first


def test_no_order_is_claimed_of_equal_models_or_few_images() -> None:
    equal = comparison_verdict(paired_figures({"A": {"a": model(0), "b": model(0)}}), [])
    assert len(equal) == 1
    assert "none is shown to lose more than another" in equal[0]
    few = paired_figures({"A": {name: rows[:3] for name, rows in three().items()}})
    assert comparison_verdict(few, [])[0].startswith("No claim: an interval from 3 test images of 3 classes")
