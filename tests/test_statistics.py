"""Bootstrap intervals against plain loops and theory, paired and of ratios; classifiers compared on the same images."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from singreg.analysis import comparison, statistics
from singreg.analysis.comparison import comparison_verdict, model_differences, model_figures, order_check
from singreg.analysis.statistics import ends, mean_interval, paired_ratio, resampled_means


def paired_difference(after: Any, before: Any, **how: Any) -> Any:
    return mean_interval(np.asarray(after, np.float64) - before, **how)


def slow_means(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draw images with replacement and average them, one draw after the other."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(columns), len(columns)) for _ in range(resamples)]
    return np.stack([np.mean([columns[place] for place in drawn], axis=0) for drawn in draws])


def values(count: int = 57) -> np.ndarray:
    return np.random.default_rng(0).gamma(2.0, 3.0, (count, 3))


def test_means_are_those_of_the_plain_loop() -> None:
    found = resampled_means(values(), resamples=40, seed=3)
    np.testing.assert_allclose(found, [values().mean(0), *slow_means(values(), 40, 3)], rtol=1e-12)
    assert not np.array_equal(resampled_means(values(), resamples=40, seed=4), found)


def slow_clustered(columns: np.ndarray, groups: np.ndarray, resamples: int) -> np.ndarray:
    """Draw classes, then images within each class drawn, in plain loops with numbers of their own."""
    rng, means, names = np.random.default_rng(99), [], np.unique(groups)
    places = {name: np.flatnonzero(groups == name) for name in names}
    for _ in range(resamples):
        drawn = [rng.choice(places[name], len(places[name])) for name in rng.choice(names, len(names))]
        means.append(columns[np.concatenate(drawn)].mean(0))
    return np.stack(means)


def test_images_are_clustered_in_their_classes() -> None:
    rng = np.random.default_rng(4)
    groups = rng.permutation(np.repeat(np.arange(12), rng.integers(3, 40, 12)))
    columns = rng.normal(0, 3, 12)[groups][:, None] + rng.normal(0, 1, (len(groups), 2))
    found, slow = resampled_means(columns, groups=groups, resamples=4000, seed=1), slow_clustered(columns, groups, 4000)
    np.testing.assert_allclose(found.mean(0), slow.mean(0), atol=0.1)
    np.testing.assert_allclose(found.std(0), slow.std(0), rtol=0.08)
    plain = resampled_means(columns, resamples=4000).std(0)
    assert found.std(0).min() > 3 * plain.max()  # the control: what drawing images alone would say
    for same in (np.arange(len(groups)), np.zeros(len(groups))):  # every image a class of its own; one class for all
        np.testing.assert_allclose(resampled_means(columns, groups=same, resamples=4000).std(0), plain, rtol=0.08)


@pytest.mark.parametrize("clustered", [True, False])
def test_intervals_cover_the_mean_as_often_as_they_say(clustered: bool) -> None:
    rng, groups = np.random.default_rng(5), np.repeat(np.arange(30), 8)
    covered = {"groups": 0, "images": 0}
    for _ in range(200):
        sample = rng.normal(10, 2, 30)[groups] * clustered + rng.normal(0 if clustered else 10, 1, len(groups))
        for name, drawn in (("groups", groups), ("images", None)):
            _, low, high = mean_interval(sample, groups=drawn, resamples=300)
            covered[name] += low <= 10 <= high
    assert covered["groups"] >= 0.9 * 200
    assert covered["images"] < 0.7 * 200 if clustered else covered["images"] >= 0.9 * 200  # the control


def test_intervals_are_the_percentiles_of_the_plain_loop() -> None:
    after, before, _ = values().T
    means = slow_means(values(), 300, 5)
    options = {"resamples": 300, "seed": 5}

    def expected(value: float, drawn: np.ndarray) -> object:
        return pytest.approx((value, *np.quantile(drawn, [0.025, 0.975])))

    assert mean_interval(after, **options) == expected(after.mean(), means[:, 0])
    difference = after.mean() - before.mean()
    assert paired_difference(after, before, **options) == expected(difference, means[:, 0] - means[:, 1])
    assert paired_ratio(after, before, **options) == expected(after.mean() / before.mean(), means[:, 0] / means[:, 1])
    assert abs(np.mean(after / before) - after.mean() / before.mean()) > 0.2  # the control: a mean of ratios differs


def test_pairing_takes_out_what_images_have_in_common() -> None:
    rng = np.random.default_rng(2)
    before = rng.normal(20, 10, 400)
    after = before - 1 + rng.normal(0, 0.5, 400)
    mean, low, high = paired_difference(after, before)
    assert mean == pytest.approx(-1, abs=0.1)
    assert low < high < -0.9
    assert paired_ratio(after, before)[2] < 1
    shuffled = rng.permutation(after)  # the control: the same numbers, images mixed up, show nothing
    assert paired_difference(shuffled, before)[1] < 0 < paired_difference(shuffled, before)[2]
    assert paired_ratio(shuffled, before)[2] > 1
    assert mean_interval(np.array([True, False, True, True]))[0] == 0.75
    assert paired_difference(np.array([3, 4]), np.array([1, 1]))[0] == 2.5


@pytest.mark.filterwarnings("error")
def test_a_ratio_to_nothing_is_not_a_number_and_never_astronomic() -> None:
    zeros, ones = np.zeros(50), np.ones(50)
    rare = np.eye(50)[0]  # more than a third of the draws do not hold this image
    assert np.isnan([paired_ratio(ones, zeros), paired_ratio(zeros, zeros)]).all()
    assert paired_ratio(zeros, ones) == (0, 0, 0)
    value, low, high = paired_ratio(ones, rare)
    assert (value, high) == (50, np.inf)  # from these images the ratio has no upper bound
    assert low == pytest.approx(50 / 3, rel=0.35)
    # A draw with no image that could be steered says nothing about the mean over steered ones.
    assert paired_ratio(3 * rare, rare) == pytest.approx((3, 3, 3))


@pytest.mark.parametrize(("gained", "lost", "count"), [(12, 2, 50), (0, 0, 80), (9, 9, 100)])
def test_paired_proportions_are_tangos(gained: int, lost: int, count: int) -> None:
    """The score test of every difference on a grid, its variance by brute force over the nuisance proportion."""
    after = np.r_[np.ones(gained), np.zeros(lost), np.ones(count - gained - lost)]
    before = np.r_[np.zeros(gained), np.ones(lost), np.ones(count - gained - lost)]
    found = statistics.paired_proportions(after, before)
    assert found[0] == (gained - lost) / count
    if gained == lost == 0:  # where no image differs the interval has a closed form, and a width
        assert found[2] == pytest.approx(1.96**2 / (count + 1.96**2), abs=1e-6)
    kept = []
    for delta in np.linspace(-0.5, 0.5, 1001):
        q = np.linspace(max(0, -delta), (1 - delta) / 2, 4001)[1:-1]  # of the lost; the gained are q + delta
        rest = count - gained - lost
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [n * np.log(p) if n else 0.0 for n, p in ((lost, q), (gained, q + delta), (rest, 1 - 2 * q - delta))]
        likely = q[np.argmax(np.nan_to_num(sum(logs), nan=-np.inf))]
        z = (gained - lost - count * delta) / np.sqrt(count * (2 * likely + delta * (1 - delta)))
        kept += [delta] if abs(z) <= 1.96 else []
    assert (min(kept), max(kept)) == pytest.approx(found[1:], abs=2e-3)
    mirrored = statistics.paired_proportions(before, after)
    assert mirrored == pytest.approx((-found[0], -found[2], -found[1]), abs=1e-9)


COUNT = 200
LABELS = [place % 5 for place in range(COUNT)]
TRANSLATORS = ("fitted", "auditor")


def model(shift: float, seed: int = 0, *, reversed_for: str = "", image: float = 1.0) -> pd.DataFrame:
    """Rows of a model `shift` degrees below what all have in common; one translator may say the opposite."""
    common, noise = np.random.default_rng(0).normal(-4, 3, COUNT), np.random.default_rng(5 + seed).normal(0, 0.2, COUNT)
    rows = {"image": [f"image {i}" for i in range(COUNT)], "label": LABELS}
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
    figures = model_figures({"A": measured, "B": measured}, seed=3)
    assert [*figures.xs("IS", axis=1, level="figure")] == [
        (s, name, m) for s in "AB" for name in TRANSLATORS for m in measured
    ]
    keys = ["figure", "space", "translator", "first", "second"]
    table = pd.DataFrame(model_differences(figures)).set_index(keys)[["value", "low", "high"]]
    found = {key: tuple(row) for key, row in zip(table.index, table.to_numpy(), strict=True)}
    assert len(found) == 3 * (1 + 4 * len(comparison.SCORES))
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
    assert ends(figures["ratio", "A", "auditor", "good"].to_numpy()) == pytest.approx(ratios[0])
    assert found["ratio", "A", "auditor", "good", "bad"][0] == pytest.approx(ratios[1][0] - ratios[0][0])
    points = paired_difference(100 * bad["correct"].to_numpy(), 100 * good["correct"].to_numpy(), **options)
    assert found["top1", "-", "-", "good", "bad"] == pytest.approx(points)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_tau_is_scipys_with_ties_too(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    found = comparison.kendall_tau(np.stack([first, second]))[0, 1]
    assert found == pytest.approx(float(kendalltau(first, second).statistic), nan_ok=True, abs=1e-6)


def test_a_clear_order_holds_and_a_reversed_view_is_seen() -> None:
    check = order_check(model_figures({"A": three(), "B": three()}))
    assert check["orders"] == [["good", "fair", "bad"]] * 4
    assert check["lowest"] == 1.0
    check = order_check(model_figures({"A": three(), "B": three(reversed_for="fitted")}))
    assert check["views"][2] == "B, fitted"
    assert check["orders"][2:] == [["bad", "fair", "good"], ["good", "fair", "bad"]]
    assert (check["tau"][0][2], check["tau"][1][3], check["lowest"]) == (-1.0, 1.0, -1.0)


def test_verdict_names_best_worst_order_and_what_was_left_out() -> None:
    heads = [head("good"), head("full", "no null space: 9 classes fill all 8 features")]
    figures = model_figures({"clip": three(), "eva": three()})
    first, second, third = comparison_verdict(figures, heads, LABELS)
    harm = {name: figures.iloc[0]["AS_neg", "clip", "auditor", name] for name in ("good", "bad")}
    assert f"good loses least of the true class when its null space is removed (AS⁻ {harm['good']:.2f}° [" in first
    assert f"bad most ({harm['bad']:.2f}° [" in first
    assert f"they are {harm['bad'] - harm['good']:.2f}° [" in first
    assert "is the same in all 4 views (lowest Kendall τ 1.00)" in second
    assert third.endswith("full.")
    turned = model_figures({"clip": dict(reversed(three().items()))})  # the order given does not matter
    assert comparison_verdict(turned, [], LABELS)[0] == first


def test_no_order_is_claimed_of_equal_models_or_few_images() -> None:
    equal = comparison_verdict(model_figures({"A": {"a": model(0), "b": model(0)}}), [], LABELS)
    assert len(equal) == 1
    assert "none is shown to lose more than another" in equal[0]
    few = model_figures({"A": {name: rows[:3] for name, rows in three().items()}})
    assert comparison_verdict(few, [], LABELS[:3])[0].startswith(
        "No claim: an interval from 3 test images of 3 classes"
    )
