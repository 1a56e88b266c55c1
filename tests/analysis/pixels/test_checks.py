"""What a pixel report says: shares, warnings, sentences, and the rule on the opposite direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from singreg.analysis.pixels.checks import pixel_warnings
from singreg.analysis.pixels.features import feature_sentence
from singreg.analysis.pixels.results import HOLD, AttackedModel, PixelReport
from singreg.analysis.pixels.shares import share_interval
from singreg.analysis.pixels.twins import natural_twins, twins_problem
from singreg.reporting.pixels_features import absent_table, feature_table
from singreg.reporting.pixels_plots import draw_twins
from singreg.reporting.pixels_tables import twin_table
from tests.analysis import toy
from tests.analysis.pixels.test_pixels import SETTINGS, attacked_toy, failing
from tests.analysis.robustness import robust


def report(**values: Any) -> PixelReport:
    names = ("summaries", "transfers", "differences", "twins", "robustness", "checks", "findings", "warnings", "models", "encoders")
    empty: dict[str, Any] = {name: [] for name in names}
    plain: dict[str, Any] = {"tau": 1.0, "pictures": 128, "zero_shot": {}, "settings": {}, "machine": {}, "seconds": {}}
    return PixelReport(**{**empty, **plain, **values})


@pytest.mark.parametrize(("count", "total", "low", "high"), [(0, 128, 0.0, 0.02914), (128, 128, 0.97086, 1.0), (5, 10, 0.23659, 0.76341)])
def test_shares_have_wilson_intervals(count: int, total: int, low: float, high: float) -> None:
    assert share_interval(count, total) == pytest.approx([count / total, low, high], abs=1e-4)
    with pytest.raises(ValueError, match="at least 1 picture"):
        share_interval(1, 0)


def test_the_opposite_direction_is_held_to_its_cosines(tmp_path: Path) -> None:
    rows, climbs = attacked_toy(tmp_path, hold=2)
    held = [row for row in rows if row.attacked.arm == HOLD]
    assert len(held) == 2
    assert all(row.cosine_change["fitted"] <= SETTINGS.hold for row in held)
    assert failing(rows, climbs=climbs) == ""
    beyond = [replace(row, cosine_change={"fitted": 0.03}) if row is held[0] else row for row in rows]
    assert "class-prompt cosines are held in the opposite direction" in failing(beyond, climbs=climbs)


def model(label: str, classes: int) -> AttackedModel:
    return AttackedModel(label, label, classes, 1024, 24, 0.9, 1.0, {})


def test_a_weaker_attack_above_the_tangents_limit_is_said() -> None:
    both = pixel_warnings(report(models=[model("small", 64), model("large", 65)]), [], ["x was left out."])
    assert [w for w in both if w.startswith("Warning: large has 65 classes. Above 64 the attack does not follow")]
    assert [w for w in both if "models compared: large met a weaker attack than small" in w]
    assert "Warning: x was left out." in both
    alike = pixel_warnings(report(models=[model("a", 1000), model("b", 1000)]), [])
    assert len(alike) == 2
    assert not any("models compared" in w for w in alike)
    assert pixel_warnings(report(models=[model("a", 64), model("b", 16)]), []) == []


def test_attacks_that_could_not_be_made_are_printed_and_the_soft_null_is_said() -> None:
    found = replace(robust.usual(), absent={"near-null 5 %": "the smallest singular value is 9 %"})
    one = report(features={"A": found})
    assert "the smallest singular value is 9 %" in absent_table(one)
    assert absent_table(report(features={"A": robust.usual()})) == ""
    assert "decision kept alone" in feature_table(one)
    names = {"one": "fitted", "two": "auditor"}
    curves = [replace(c, judge=names[c.judge], crafted_on="fitted") for c in found.curves if c.crafted_on == "one"]
    said = replace(found, curves=curves, reachable={"fitted": 0.25, "auditor": 1.0})
    whole, dropped = (feature_sentence("A", said, dropped=flag) for flag in (False, True))
    assert "could put the target first in 25.0% (fitted) of the steerings" in whole
    assert "near-null 5 %, τ 0.1:" in whole
    assert "by exactly null directions success is exactly 0 at every step" in dropped
    assert "which dropping leaves, on average (near-null 5 %, τ 0.01:" in dropped


def test_twins_of_the_second_encoder_alone_are_drawn_and_none_is_no_error() -> None:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(10) % 2
    some = natural_twins(torch.randn(10, 4, generator=g), torch.randn(10, 6, generator=g), labels, model="m", encoder="second")
    none = natural_twins(100 * torch.eye(2)[labels] + torch.rand(10, 2), torch.randn(10, 6), labels, model="m", encoder="first")
    assert some.shown
    assert not none.shown
    assert some.rate_interval[0] <= some.rate <= some.rate_interval[1]
    assert none.rate_interval[0] == 0
    assert none.rate_interval[1] > 0.3  # ten pictures exclude little
    both = report(twins=[none, some], encoders=["first", "second"])
    figure = draw_twins(both, toy.ToyPart(10))
    assert "far apart for second" in str(figure.get_suptitle())
    assert "second" in twin_table(both)
    assert twins_problem(torch.from_numpy(np.arange(4))) is not None
    assert twins_problem(torch.tensor([0, 0, 1])) is None
