"""The event files read back: scalars, histograms, images, text and hparams are there, and what would be dropped raises."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from singreg.reporting.tensorboard import TensorBoardLog, as_number, flatten


def read(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def text_of(events: EventAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


def pixels_of(events: EventAccumulator, tag: str) -> np.ndarray:
    (event,) = events.Images(tag)
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def test_scalars_of_every_kind_of_number(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "int": 2, "float": 0.5, "bool": True, "np32": np.float32(0.25), "np64": np.int64(7), "array": np.array([[3.0]]),
        "tensor": torch.tensor(1.5), "half": torch.tensor([0.5], dtype=torch.bfloat16), "grad": torch.ones((), requires_grad=True),
    }  # fmt: skip
    with TensorBoardLog(tmp_path) as log:
        log.scalars(values, step=3)
        log.scalars({"int": 5}, step=9)
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == set(values)
    got = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in values}
    assert got["int"] == [(3, 2.0), (9, 5.0)]
    expected = [2.0, 0.5, 1.0, 0.25, 7.0, 3.0, 1.5, 0.5, 1.0]
    assert {tag: points[0] for tag, points in got.items()} == {tag: (3, value) for tag, value in zip(values, expected, strict=True)}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "'a': expected a number, got NoneType"),
        ("0.5", "'a': expected a number, got str"),
        (torch.ones(3), r"'a': expected one number, got shape \(3,\); use histograms"),
        (np.ones((2, 2)), r"'a': expected one number, got shape \(2, 2\)"),
        (torch.ones(0), r"'a': expected one number, got shape \(0,\)"),
        ({"b": 1.0}, "'a': expected a number, got dict"),
        (1 + 2j, "'a': expected a number, got complex"),
        (torch.tensor(1 + 2j), "'a': expected a real number"),
        (np.complex64(1j), "'a': expected a real number"),
        (np.str_("0.5"), "'a': expected a real number"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_not_one_number_raises_with_its_name_on_every_process(value: Any, words: str, enabled: bool, tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path / "log", enabled=enabled)
    with pytest.raises(TypeError, match=words):
        log.scalars({"fine": 1.0, "a": value}, step=0)
    with pytest.raises(TypeError, match=words):
        log.hparams({}, {"a": value})
    log.close()
    if enabled:
        assert read(tmp_path / "log").Tags()["scalars"] == []  # nothing of the batch was written


def test_not_finite_numbers_are_numbers(tmp_path: Path) -> None:
    assert np.isnan(as_number("x", float("nan")))
    with TensorBoardLog(tmp_path) as log:
        log.scalars({"loss": float("inf")}, step=0)
    assert read(tmp_path).Scalars("loss")[0].value == float("inf")


def test_histograms_hold_every_finite_value_whatever_the_shape(tmp_path: Path) -> None:
    values = torch.linspace(-2, 2, 60).reshape(3, 20)
    values[0, 0], values[1, 1] = float("nan"), float("inf")
    with TensorBoardLog(tmp_path) as log:
        log.histograms({"h": values, "array": np.arange(5), "one": 3.0, "list": [1, 2], "none": torch.ones(0)}, step=4)
        log.histograms({"half": torch.ones(3, dtype=torch.bfloat16, requires_grad=True)}, step=4)
    events = read(tmp_path)
    assert set(events.Tags()["histograms"]) == {"h", "array", "one", "list", "half"}
    (event,) = events.Histograms("h")
    kept = values[torch.isfinite(values)]
    assert event.step == 4
    assert event.histogram_value.num == len(kept) == 58
    assert event.histogram_value.sum == pytest.approx(float(kept.sum()), abs=1e-5)
    assert (event.histogram_value.min, event.histogram_value.max) == (pytest.approx(float(kept.min())), 2.0)
    with pytest.raises((TypeError, RuntimeError)):
        TensorBoardLog(tmp_path, enabled=False).histograms({"h": "words"}, step=0)


def test_pictures_come_back_pixel_by_pixel(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1], [0, 1])
    grid = torch.rand(2, 3, 5, 7)
    saved = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(saved).save(tmp_path / "picture.png")
    with TensorBoardLog(tmp_path / "log") as log:
        log.figure("figure", figure, 1)
        log.images("grid", grid, 1)
        log.image_file("file", tmp_path / "picture.png", 1)
    events = read(tmp_path / "log")
    assert set(events.Tags()["images"]) == {"figure", "grid", "file"}
    np.testing.assert_array_equal(pixels_of(events, "file"), saved)
    drawn = pixels_of(events, "figure")
    assert drawn.shape == (50, 100, 3)
    assert drawn.std() > 5
    tiles = pixels_of(events, "grid")
    assert tiles.shape == (5, 14, 3)
    np.testing.assert_allclose(tiles[:, :7], (grid[0].permute(1, 2, 0) * 255).numpy(), atol=1)


def test_a_figure_that_was_logged_is_not_kept_by_pyplot(tmp_path: Path) -> None:
    open_before = pyplot.get_fignums()
    figure, _ = pyplot.subplots()
    assert pyplot.get_fignums() != open_before
    with TensorBoardLog(tmp_path) as log:
        log.figure("figure", figure, 0)
    assert pyplot.get_fignums() == open_before


def test_text_comes_back(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log.text("results", "| a | AS⁻ |\n|:--|:--|\n| 1 | 2° |", 0)
        log.text("name", "run \udcff", 0)
    assert text_of(read(tmp_path), "results") == ["| a | AS⁻ |\n|:--|:--|\n| 1 | 2° |"]
    assert text_of(read(tmp_path), "name") == ["run \\udcff"]


def test_hparams_are_in_the_same_run_flat_and_with_the_final_figures(tmp_path: Path) -> None:
    settings = {
        "name": "r", "seed": 3, "rate": 2e-4, "flag": True, "model": {"head": {"mode": "keep"}, "rows": None},
        "templates": ["a {class}", "b"], "folder": Path("x/y"), "odd": "run \udcff",
    }  # fmt: skip
    with TensorBoardLog(tmp_path) as log:
        log.hparams(settings, {"final/AS_neg": torch.tensor(1.25), "final/top1": np.float64(0.5)})
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1  # no second run named by the clock
    events = read(tmp_path)
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == {"final/AS_neg": 1.25, "final/top1": 0.5}
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    got = {key: getattr(value, value.WhichOneof("kind")) for key, value in info.hparams.items()}
    assert got == {
        "name": "r", "seed": 3.0, "rate": 2e-4, "flag": True, "model.head.mode": "keep", "model.rows": "none",
        "templates": "a {class}, b", "folder": "x/y", "odd": "run \\udcff",
    }  # fmt: skip
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"final/AS_neg", "final/top1"}


def test_flatten_keeps_what_hparams_show_and_writes_the_rest_as_text() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": False}, "e": (), "f": [1, None]}) == {"a.b.c": 1, "a.d": False, "e": "", "f": "1, None"}


def test_a_log_that_is_not_enabled_writes_nothing(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path / "log", enabled=False) as log:
        log.scalars({"a": 1.0}, 0)
        log.histograms({"a": torch.ones(3)}, 0)
        log.figure("a", Figure(), 0)
        log.images("a", torch.ones(1, 3, 2, 2), 0)
        log.image_file("a", tmp_path / "not-there.png", 0)
        log.text("a", "b", 0)
        log.hparams({"a": 1}, {"b": 2.0})
    assert list(tmp_path.iterdir()) == []
