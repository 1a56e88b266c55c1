"""Measurements to strict JSON and back: nothing lost, what is not defined is null on disk and NaN in memory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from singreg.analysis.results import ModelMeasurement, nan_for_null, nulls_for_nan
from tests.analysis import in_processes
from tests.analysis.study.arms import arm


def through_disk(measurement: ModelMeasurement) -> ModelMeasurement:
    text = json.dumps(measurement.to_json(), allow_nan=False)
    return ModelMeasurement.from_json(json.loads(text))


def test_a_real_measurement_comes_back_equal_and_without_its_rows() -> None:
    measured = in_processes.measure(0, 1, 43)
    back = through_disk(measured)
    assert back == measured  # rows take no part in it
    assert back.rows == {}
    assert "rows" not in measured.to_json()
    assert len(measured.rows["index"]) == 43  # and writing took nothing away
    again = ModelMeasurement.from_json(measured.to_json(), measured.rows)
    np.testing.assert_array_equal(again.rows["AS/auditor"], measured.rows["AS/auditor"])
    assert list(measured.to_json()) == [name for name in asdict(replace(measured, rows={})) if name != "rows"]


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_what_is_not_defined_is_null_on_disk_and_nan_in_memory(hole: float) -> None:
    measured = arm()
    scores = measured.translators["auditor"]
    scores = replace(
        scores,
        overall={**scores.overall, "ratio": hole}, centred={**scores.centred, "kappa": hole}, r2=hole, validation_r2=None,
        intervals={**scores.intervals, "ratio": [1.0, hole]}, quantiles={**scores.quantiles, "AS_5": hole},
        per_class={**scores.per_class, "AS": [1.5, None, hole, 2.5, 3.5]},
    )  # fmt: skip
    steering = replace(measured.steering["auditor"], attribute_score=hole, step=hole)
    holed = replace(
        measured, translators={"auditor": scores}, steering={"auditor": steering}, null_energy=hole, top1_interval=[0.1, hole]
    )
    written = holed.to_json()
    assert written["translators"]["auditor"]["overall"]["ratio"] is None
    assert written["steering"]["auditor"]["step"] is None
    back = through_disk(holed)
    got = back.translators["auditor"]
    undefined = (
        got.overall["ratio"], got.centred["kappa"], got.r2, got.intervals["ratio"][1], got.quantiles["AS_5"],
        back.steering["auditor"].attribute_score, back.steering["auditor"].step, back.null_energy, back.top1_interval[1],
    )  # fmt: skip
    assert all(math.isnan(value) for value in undefined)
    assert got.per_class["AS"] == [1.5, None, None, 2.5, 3.5]  # a class without pictures is None in memory, too
    assert got.validation_r2 is None
    assert got.intervals["ratio"][0] == 1.0
    assert got.overall["AS"] == scores.overall["AS"]
    assert back.steering["auditor"].images == steering.images


def test_a_class_without_pictures_is_none_in_a_real_measurement() -> None:
    measured = in_processes.measure(0, 1, 3)  # the last two of five classes have no picture
    per_class = measured.translators["auditor"].per_class
    assert [value is None for value in per_class["AS"]] == [False, False, False, True, True]
    assert per_class["count"] == [1, 1, 1, 0, 0]
    assert through_disk(measured).translators["auditor"].per_class == per_class


def test_json_of_another_shape_is_refused() -> None:
    value = arm().to_json()
    for wrong in ({**value, "unknown": 1}, {key: inner for key, inner in value.items() if key != "top1"}):
        with pytest.raises(TypeError, match=r"'unknown'|'top1'"):
            ModelMeasurement.from_json(wrong)


def test_nulls_reach_every_depth_and_leave_everything_else_alone() -> None:
    value: dict[str, Any] = {"a": [1, math.nan, {"b": (math.inf, "nan")}], "c": None, "d": True, "e": 2}
    assert nulls_for_nan(value) == {"a": [1, None, {"b": [None, "nan"]}], "c": None, "d": True, "e": 2}
    back = nan_for_null({"a": [None, {"b": None}], "c": "x"})
    assert math.isnan(back["a"][0])
    assert math.isnan(back["a"][1]["b"])
    assert back["c"] == "x"
