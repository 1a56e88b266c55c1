"""Bootstrap intervals against plain loops and against what is known of normal means; pairing; ratios of nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from singreg.analysis import statistics as bootstrap
from singreg.analysis.statistics import mean_interval, paired_difference, paired_ratio, resampled_means


def slow_means(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draw pictures with replacement and average them, one draw after the other."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(columns), len(columns))
        means.append(np.mean([columns[place] for place in drawn], axis=0))
    return np.stack(means)


def values(count: int = 57, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 3.0, (count, 3))


@pytest.mark.parametrize("together", [1, 200, 2**16])
def test_means_are_those_of_the_plain_loop_however_many_draws_are_taken_at_once(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "DRAWN_TOGETHER", together)
    columns = values()
    np.testing.assert_allclose(resampled_means(columns, resamples=40, seed=3), slow_means(columns, 40, 3), rtol=1e-12)
    assert not np.array_equal(resampled_means(columns, resamples=40, seed=4), resampled_means(columns, resamples=40, seed=3))


def slow_clustered(columns: np.ndarray, groups: np.ndarray, resamples: int) -> np.ndarray:
    """Draw classes, then pictures within each class drawn, in plain loops with numbers of their own."""
    rng = np.random.default_rng(99)
    names = np.unique(groups)
    means = []
    for _ in range(resamples):
        drawn = [rng.choice(np.flatnonzero(groups == name), (groups == name).sum()) for name in rng.choice(names, len(names))]
        means.append(columns[np.concatenate(drawn)].mean(0))
    return np.stack(means)


def test_pictures_are_clustered_in_their_classes() -> None:
    rng = np.random.default_rng(4)
    groups = rng.permutation(np.repeat(np.arange(12), rng.integers(3, 40, 12)))
    columns = rng.normal(0, 3, 12)[groups][:, None] + rng.normal(0, 1, (len(groups), 2))
    found, slow = resampled_means(columns, groups=groups, resamples=4000, seed=1), slow_clustered(columns, groups, 4000)
    np.testing.assert_allclose(found.mean(0), slow.mean(0), atol=0.1)
    np.testing.assert_allclose(found.std(0), slow.std(0), rtol=0.08)
    assert found.std(0).min() > 3 * resampled_means(columns).std(0).max()  # the control: what drawing pictures alone would say
    alone = resampled_means(columns, groups=np.arange(len(groups)), resamples=4000)  # every picture a class of its own
    np.testing.assert_allclose(alone.std(0), resampled_means(columns, resamples=4000).std(0), rtol=0.08)
    one = resampled_means(columns, groups=np.zeros(len(groups)), resamples=4000)  # one class for all
    np.testing.assert_allclose(one.std(0), resampled_means(columns, resamples=4000).std(0), rtol=0.08)
    with pytest.raises(ValueError, match=f"a group for each of {len(groups)} images, got 3"):
        resampled_means(columns, groups=groups[:3])


def test_a_clustered_interval_covers_the_mean_over_classes() -> None:
    rng, covered = np.random.default_rng(5), {"clustered": 0, "pictures": 0}
    groups = np.repeat(np.arange(30), 8)
    for _ in range(200):
        values = rng.normal(10, 2, 30)[groups] + rng.normal(0, 1, len(groups))
        for name, given in (("clustered", groups), ("pictures", None)):
            _, low, high = mean_interval(values, groups=given, resamples=300)
            covered[name] += low <= 10 <= high
    assert covered["clustered"] >= 0.9 * 200
    assert covered["pictures"] < 0.7 * 200  # the control


def test_one_draw_serves_all_columns() -> None:
    columns = values()
    both = resampled_means(np.stack([columns[:, 0], 2 * columns[:, 0] + 1], axis=1), resamples=50)
    np.testing.assert_allclose(both[:, 1], 2 * both[:, 0] + 1)


def test_intervals_are_the_percentiles_of_the_plain_loop() -> None:
    columns = values()
    after, before, _ = columns.T
    means = slow_means(columns, 300, 5)
    expected = (after.mean(), *np.quantile(means[:, 0], [0.025, 0.975]))
    assert mean_interval(after, resamples=300, seed=5) == pytest.approx(expected)
    expected = (after.mean() - before.mean(), *np.quantile(means[:, 0] - means[:, 1], [0.025, 0.975]))
    assert paired_difference(after, before, resamples=300, seed=5) == pytest.approx(expected)
    expected = (after.mean() / before.mean(), *np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975]))
    assert paired_ratio(after, before, resamples=300, seed=5) == pytest.approx(expected)
    assert abs(np.mean(after / before) - after.mean() / before.mean()) > 0.2  # the control: a mean of ratios is another number


def test_the_interval_is_the_one_known_for_a_mean_and_covers_it_as_often_as_it_says() -> None:
    sample = np.random.default_rng(0).normal(10, 3, 900)
    mean, low, high = mean_interval(sample)
    half = 1.96 * sample.std() / np.sqrt(len(sample))
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        _, low, high = mean_interval(rng.normal(10, 3, 60), resamples=300)
        covered.append(low <= 10 <= high)
    assert 0.91 <= np.mean(covered) <= 0.98  # 95 %, give or take three standard errors


def test_pairing_takes_out_what_pictures_have_in_common() -> None:
    rng = np.random.default_rng(2)
    before = rng.normal(20, 10, 400)
    after = before - 1 + rng.normal(0, 0.5, 400)
    mean, low, high = paired_difference(after, before)
    assert mean == pytest.approx(-1, abs=0.1)
    assert low < high < -0.9
    assert paired_ratio(after, before)[2] < 1
    shuffled = rng.permutation(after)  # the control: the same numbers, pictures mixed up, show nothing
    assert paired_difference(shuffled, before)[1] < 0 < paired_difference(shuffled, before)[2]
    assert paired_ratio(shuffled, before)[2] > 1


def test_integers_and_booleans_count_as_numbers() -> None:
    correct = np.array([True, False, True, True])
    assert mean_interval(correct)[0] == 0.75
    assert paired_difference(np.array([3, 4]), np.array([1, 1]))[0] == 2.5


def test_a_ratio_to_nothing_is_not_a_number_and_never_an_astronomic_one() -> None:
    zeros, ones = np.zeros(50), np.ones(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(paired_ratio(ones, zeros)).all()
        assert np.isnan(paired_ratio(zeros, zeros)).all()
        assert paired_ratio(zeros, ones) == (0, 0, 0)
        rare = zeros.copy()
        rare[0] = 1.0  # more than a third of the draws do not hold this picture
        value, low, high = paired_ratio(ones, rare)
    assert value == 50
    assert low == pytest.approx(50 / 3, rel=0.35)
    assert high == np.inf  # from these pictures the ratio has no upper bound


def test_ratios_where_nothing_stands_over_nothing_are_left_out() -> None:
    """A draw with no picture that could be steered says nothing about the mean over steered ones."""
    reached = np.zeros(50)
    reached[0] = 1.0
    assert paired_ratio(3 * reached, reached) == pytest.approx((3, 3, 3))
