"""Plots: every file there, decodable, drawn without a warning, whatever classes are called and however few there are."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from singreg.analysis.results import FinetuneReport, ModelMeasurement
from singreg.reporting import plots
from singreg.reporting.plots import (
    draw_classes,
    draw_distributions,
    draw_joint,
    draw_summary,
    drawable,
    save_figure,
    save_plots,
)
from tests.analysis import toy
from tests.reporting.real_report import HOSTILE, real_report

NAMES = {"summary", "joint", "distributions", "classes"}


def drawn(report: FinetuneReport, folder: Path, *some: str) -> dict[str, np.ndarray]:
    """All plots or some as pixels (H, W, 3); any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if some:
            paths = {name: folder / f"{name}.png" for name in some}
            for name, path in paths.items():
                save_figure(getattr(plots, f"draw_{name}")(report), path)
        else:
            paths = save_plots(report, folder)
            assert set(paths) == NAMES
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in paths)
    pictures = {}
    for name, path in paths.items():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            pictures[name] = np.asarray(picture.convert("RGB"))
        height, width, _ = pictures[name].shape
        assert 150 < height < 2000
        assert 300 < width < 2500
        assert pictures[name].std() > 5  # something is on it
    return pictures


def with_classes(report: FinetuneReport, values: dict[str, list[float | None]], names: list[str]) -> FinetuneReport:
    """The report with other classes: AS⁻ by stage."""

    def changed(measured: ModelMeasurement, figures: list[float | None]) -> ModelMeasurement:
        scores = replace(measured.translators["auditor"], per_class={"AS_neg": figures, "IS": figures})
        return replace(measured, translators={**measured.translators, "auditor": scores})

    measurements = {stage: changed(measured, values[stage]) for stage, measured in report.measurements.items()}
    return replace(report, measurements=measurements, class_names=names)


def test_all_plots_are_written_the_same_each_time(tmp_path: Path) -> None:
    report = real_report()
    first, again = drawn(report, tmp_path / "a"), drawn(report, tmp_path / "b", "joint", "classes")
    for name, pixels in again.items():
        np.testing.assert_array_equal(first[name], pixels)


def test_without_a_control_there_are_two_of_everything(tmp_path: Path) -> None:
    report = real_report(control=False)
    drawn(report, tmp_path)
    assert len(draw_joint(report).axes) == 2
    assert len(draw_classes(report).axes[0].get_legend().get_texts()) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "names",
    [
        HOSTILE,
        ("$x", "$x^2$", "a $\\frac{$ b", "\\$", "100 % \\alpha_{"),
        tuple(f"{name}, which goes by a name that does not end {'and goes on ' * 20}" for name in toy.NAMES),
        ("", " ", "two\nlines", "tab\tbed", "ünïcödé"),
        ("\x00nul", "\x07bell", "ctrl\x1b[31m", "\udcff", "x" * 500),
        ("猫", "犬 and more", "고양이", "\U0001f408", "เหมียว"),
    ],
    ids=["markup", "mathematics", "very long", "blank and broken", "unprintable", "letters the font lacks"],
)
@pytest.mark.filterwarnings("error")  # matplotlib warns of a glyph that its font lacks, and draws a box
def test_any_class_name_can_be_drawn(names: tuple[str, ...], tmp_path: Path) -> None:
    drawn(real_report(names), tmp_path, "classes")


def test_names_are_drawn_as_they_are_and_long_ones_shortened() -> None:
    figure = draw_classes(real_report(("$x^2$", "a" * 200, *toy.NAMES[2:])))
    labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert "\\$x^2\\$" in labels  # matplotlib's way to write a dollar
    (long,) = [label for label in labels if label.startswith("aaa")]
    assert len(long) < 60
    assert long.endswith("…")


def test_letters_the_font_lacks_become_their_numbers_and_names_stay_apart() -> None:
    names = ["猫", "犬", "猫犬猫犬猫犬猫犬", "ünï π", "…" * 60]
    found = [drawable(name, limit=20) for name in names]
    assert found == ["\\u732b", "\\u72ac", "\\u732b\\u72ac\\u732b…", "ünï π", "…" * 20]
    assert all(len(name) <= 20 for name in found)


def test_one_class_and_classes_without_pictures(tmp_path: Path) -> None:
    report = real_report()
    drawn(with_classes(report, {stage: [2.0] for stage in report.measurements}, ["only"]), tmp_path / "one", "classes")
    holes = with_classes(report, {stage: [None, 1.0, None, 3.0, 0.0] for stage in report.measurements}, list(toy.NAMES))
    drawn(holes, tmp_path / "holes", "classes")
    labels = [label.get_text() for label in draw_classes(holes).axes[0].get_yticklabels()]
    assert labels == ["delta", "beta", "epsilon"]
    assert "(3 of 5 classes)" in draw_classes(holes).axes[0].get_title()
    none = with_classes(report, {stage: [None] * 5 for stage in report.measurements}, list(toy.NAMES))
    drawn(none, tmp_path / "none", "classes")


def test_a_thousand_classes_are_cut_to_the_leakiest(tmp_path: Path) -> None:
    report = real_report()
    values: dict[str, list[float | None]] = {stage: [float(c) for c in range(1000)] for stage in report.measurements}
    many = with_classes(report, values, [f"class {c}" for c in range(1000)])
    drawn(many, tmp_path, "classes")
    labels = [label.get_text() for label in draw_classes(many).axes[0].get_yticklabels()]
    assert labels == [f"class {c}" for c in range(999, 999 - plots.CLASSES_SHOWN, -1)]


def few(report: FinetuneReport, count: int, *, constant: bool = False) -> FinetuneReport:
    def cut(measured: ModelMeasurement) -> ModelMeasurement:
        rows = {name: column[:count] if not constant else np.full_like(column[:count], column[0]) for name, column in measured.rows.items()}
        return replace(measured, rows=rows, images=count)

    return replace(report, measurements={stage: cut(measured) for stage, measured in report.measurements.items()})


@pytest.mark.parametrize(("count", "constant"), [(1, False), (2, False), (3, False), (3, True)])
def test_very_few_pictures_and_equal_ones(count: int, constant: bool, tmp_path: Path) -> None:
    drawn(few(real_report(), count, constant=constant), tmp_path, "joint", "distributions")


def test_undefined_intervals_are_left_out(tmp_path: Path) -> None:
    report = real_report()
    sing = report.measurements["sing"]
    hole = [float("nan"), float("nan")]
    scores = {name: replace(s, intervals=dict.fromkeys(s.intervals, hole)) for name, s in sing.translators.items()}
    drawn(replace(report, measurements={**report.measurements, "sing": replace(sing, translators=scores)}), tmp_path, "summary")


def test_the_summary_shows_the_figures_with_their_intervals() -> None:
    report = real_report()
    axes = draw_summary(report).axes
    assert len(axes) == 4
    heights = sorted(round(bar.get_height(), 6) for bar in axes[0].patches)  # type: ignore[attr-defined]
    expected = [m.translators[t].overall["AS_neg"] for m in report.measurements.values() for t in ("auditor", "frozen")]
    assert heights == sorted(round(value, 6) for value in expected)
    assert [bar.get_height() for bar in axes[3].patches] == [100 * m.top1 for m in report.measurements.values()]  # type: ignore[attr-defined]


def test_the_joint_plot_has_every_picture_one_scale_and_the_ellipse_of_its_points() -> None:
    report = real_report()
    axes = draw_joint(report).axes
    assert len(axes) == 3
    assert len({panel.get_xlim() for panel in axes}) == len({panel.get_ylim() for panel in axes}) == 1
    rows = report.measurements["before"].rows
    points = np.asarray(axes[0].collections[0].get_offsets())
    np.testing.assert_allclose(points, np.stack([rows["IS/auditor"], rows["AS/auditor"]], axis=1))
    (ellipse,) = axes[0].patches
    turn = np.deg2rad(ellipse.angle)  # type: ignore[attr-defined]
    centred = points - np.asarray(ellipse.get_center())  # type: ignore[attr-defined]
    along, across = centred @ [np.cos(turn), np.sin(turn)], centred @ [-np.sin(turn), np.cos(turn)]
    assert ellipse.width == pytest.approx(4 * along.std(ddof=1), rel=1e-6)  # type: ignore[attr-defined]
    assert ellipse.height == pytest.approx(4 * across.std(ddof=1), rel=1e-6)  # type: ignore[attr-defined]
    assert abs((along * across).mean()) < 1e-9 * along.std() * across.std() + 1e-9
    inside = (along / (ellipse.width / 2)) ** 2 + (across / (ellipse.height / 2)) ** 2 < 1  # type: ignore[attr-defined]
    assert 0.8 < inside.mean() < 0.92  # 86 % of a normal cloud lie within 2σ in the plane


def test_distributions_have_a_violin_a_model() -> None:
    axes = draw_distributions(real_report()).axes
    assert [label.get_text().split(" ")[0] for label in axes[0].get_xticklabels()] == ["before", "control", "SingLoss"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plot.png"
    save_figure(draw_distributions(real_report()), path)
    old = path.read_bytes()

    def half(self: Figure, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space"):
        save_figure(Figure(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
