"""The joint distribution against numpy's covariance, its ellipses on a planted normal cloud, degenerate clouds, bad rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from singreg.analysis.levels.joint import JointDistribution, joint_distribution
from singreg.analysis.results import Rows


def rows(image: np.ndarray, attribute: np.ndarray, kind: str = "") -> Rows:
    return {f"{kind}IS/auditor": image, f"{kind}AS/auditor": attribute}


def test_a_tilted_normal_cloud_is_found_with_its_axes_and_shares() -> None:
    rng = np.random.default_rng(0)
    along, across = rng.normal(0, 4, 20000), rng.normal(0, 1, 20000)
    tilt = np.radians(30)
    image, attribute = 30 + along * np.cos(tilt) - across * np.sin(tilt), -2 + along * np.sin(tilt) + across * np.cos(tilt)
    found = joint_distribution(rows(image, attribute, "centred "), centred=True)
    assert found.mean == pytest.approx((image.mean(), attribute.mean()))
    assert found.ratio == pytest.approx(image.mean() / np.abs(attribute).mean())
    assert found.correlation == pytest.approx(np.corrcoef(image, attribute)[0, 1])
    one, two = found.ellipses
    assert (one.width, one.height, two.width, two.height) == pytest.approx((8, 2, 16, 4), rel=0.03)
    assert one.tilt % 180 == pytest.approx(30, abs=1)
    assert (one.share, two.share) == pytest.approx((1 - np.exp(-0.5), 1 - np.exp(-2)), abs=0.01)
    assert len(found.points) == 2000
    assert JointDistribution.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_clouds_without_spread_and_tiny_ones_are_stated_not_invented() -> None:
    flat = joint_distribution(rows(np.arange(5.0), np.zeros(5)))
    assert (flat.ratio, flat.correlation) == (None, None)
    assert flat.ellipses[0].height == 0
    assert flat.ellipses[1].share == 1
    assert joint_distribution(rows(np.ones(2), np.ones(2))).ellipses == ()


def test_rows_without_the_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected rows with \['IS/frozen', 'AS/frozen'\].*got IS/auditor"):
        joint_distribution(rows(np.ones(3), np.ones(3)), translator="frozen")
    with pytest.raises(ValueError, match="at least one picture"):
        joint_distribution(rows(np.ones(0), np.ones(0)))
