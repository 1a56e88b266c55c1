"""The level plots draw what the dataclasses say: names, order, colours, captions; odd names and sizes; mismatches refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image

from singreg.analysis.levels.classes import analyze_classes
from singreg.analysis.levels.concept_results import ConceptShift
from singreg.analysis.levels.image_results import ImageMeasurement, Neighbour, PictureShift, WorstImage
from singreg.analysis.levels.joint import joint_distribution
from singreg.analysis.results import Rows
from singreg.reporting.level_plots import (
    GOOD,
    HARM,
    draw_class_accuracy,
    draw_class_violins,
    draw_concept_arrows,
    draw_joint_distribution,
    draw_worst_images,
)
from singreg.reporting.plots import save_figure
from tests.analysis.levels.level_data import NumberedPart, World


class ColouredPart(NumberedPart):
    """Picture i is one shade of grey."""

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 6), (10 * index, 0, 0))


def texts(figure: Figure) -> list[str]:
    """Every text of a figure that holds something: titles, labels, ticks, captions."""
    found = [text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, axes.xaxis.label]]
    found += [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    found += [text.get_text() for legend in legends for text in legend.get_texts()]
    return [text for text in [*found, *(t.get_text() for t in figure.texts)] if text]


def saved(figure: Figure, folder: Path) -> np.ndarray:
    save_figure(figure, folder / "plot.png")
    with Image.open(folder / "plot.png") as picture:
        return np.asarray(picture.convert("L"))


def make_rows(classes: int, count: int = 400) -> Rows:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    return {
        "label": labels, "correct": rng.integers(0, 2, count).astype(float), "kappa/auditor": np.zeros(count),
        "AS/auditor": rng.normal(0, 1, count) + 2 - labels, "IS/auditor": rng.uniform(10, 30, count),
    }  # fmt: skip


def test_violins_name_classes_by_leakage_and_colour_them_by_sign(tmp_path: Path) -> None:
    found = analyze_classes(make_rows(5), ["a $ign", "b", "c", "d" * 60, "e", "nobody"])
    figure = draw_class_violins(found)
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == ["e (80)", f"{'d' * 27}… (80)", "c (80)", "b (80)", "a \\$ign (80)"]
    colours = [to_hex(body.get_facecolor()[0]) for body in figure.axes[0].collections]
    assert colours == [HARM if score.means["AS"] < 0 else GOOD for score in found.classes]
    assert {HARM, GOOD} == set(colours)
    assert any("1 classes have no picture" in text for text in texts(figure))
    assert saved(figure, tmp_path).std() > 10


def test_of_many_classes_the_leakiest_and_the_least_leaky_are_drawn() -> None:
    found = analyze_classes(make_rows(40), [f"class {label}" for label in range(40)])
    figure = draw_class_violins(found, shown=7)
    ticks = [label.get_text().split(" (")[0] for label in figure.axes[0].get_yticklabels()]
    assert ticks == [score.name for score in (*found.classes[:4], *found.classes[-3:])]
    assert any("4 leakiest and 3 least leaky of 40" in text for text in texts(figure))


def test_a_class_with_a_single_picture_is_drawn_as_a_mark(tmp_path: Path) -> None:
    rows = {name: values[:4] for name, values in make_rows(3).items()}
    figure = draw_class_violins(analyze_classes(rows, ["a", "b", "c"]))
    assert len(figure.axes[0].collections) == 1
    assert len(figure.axes[0].lines[-2].get_xdata()) == 3  # type: ignore[arg-type]
    saved(figure, tmp_path)


def test_the_accuracy_plot_says_the_correlation_or_that_there_is_none(tmp_path: Path) -> None:
    found = analyze_classes(make_rows(8), [f"class {label}" for label in range(8)])
    said = texts(draw_class_accuracy(found, named=2))
    assert f"ρ = {found.correlations['AS_neg'].value:+.2f}" in "".join(said)
    assert [text for text in said if text.startswith(("1  ", "2  "))] == ["1  class 7", "2  class 6"]
    alone = analyze_classes(make_rows(1), ["x"])
    figure = draw_class_accuracy(alone)
    assert "rank correlation not defined" in "".join(texts(figure))
    saved(figure, tmp_path)


def test_the_joint_plot_has_two_ellipses_a_name_and_the_measured_shares(tmp_path: Path) -> None:
    joint = joint_distribution(make_rows(3))
    figure = draw_joint_distribution({"mine": joint})
    assert [patch.width for patch in figure.axes[0].patches if isinstance(patch, Ellipse)] == [e.width for e in joint.ellipses]
    assert f"{joint.ellipses[0].share:.0%} and {joint.ellipses[1].share:.0%}" in "".join(texts(figure))
    many = draw_joint_distribution({f"model {place}": joint for place in range(10)})
    assert len(many.axes[0].patches) == 20
    assert len([text for text in texts(many) if text.startswith("model ")]) == 10
    assert saved(many, tmp_path).std() > 10


@pytest.mark.parametrize("label", [None, 1])
def test_arrows_point_from_before_to_after_in_the_colour_of_their_sign(label: int | None, tmp_path: Path) -> None:
    found = World.make().measure()
    figure = draw_concept_arrows(found, count=4, label=label)
    for axes, shifts in zip(figure.axes, (found.select("strongest", 4, label), found.select("weakest", 4, label)), strict=True):
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [shift.concept for shift in shifts]
    strongest = found.select("strongest", 4, label)
    arrows = [text for text in figure.axes[0].texts if text.arrow_patch is not None]
    assert len(arrows) == 4
    for arrow, shift in zip(arrows, strongest, strict=True):
        assert arrow.xy[0] == shift.after
        assert arrow.xyann[0] == shift.before
        assert to_hex(arrow.arrow_patch.get_edgecolor()) == (HARM if shift.score < 0 else GOOD)
    assert f"{strongest[0].score:+.2f} [{strongest[0].low:+.2f}, {strongest[0].high:+.2f}]" in texts(figure)
    saved(figure, tmp_path)
    assert len(draw_concept_arrows(found, count=9).axes) == 1  # nothing is left for the weakest


def worst_images(count: int, *, steered: bool) -> tuple[ImageMeasurement, list[PictureShift]]:
    shift = ConceptShift("red $", 80.0, 90.0, -10.0)
    worst = tuple(
        WorstImage(place, f"picture-{place}", 1, "class 1", "class 0", -5.0 - place, 20.0, (), (shift,)) for place in range(count)
    )
    near = tuple(Neighbour(place, f"gallery-{place}", 30.0 + place) for place in range(3))
    shifts = [PictureShift(place, f"picture-{place}", near, near[::-1], near if steered else None) for place in range(count)]
    return ImageMeasurement("AS", False, 50, 0, worst), shifts


@pytest.mark.parametrize("steered", [False, True])
def test_the_sheet_shows_each_picture_beside_its_nearest_ones(steered: bool, tmp_path: Path) -> None:
    found, shifts = worst_images(3, steered=steered)
    part, gallery = ColouredPart(np.ones(9, np.int64), 2), ColouredPart(np.arange(9) % 2, 2, "gallery")
    figure = draw_worst_images(found, shifts, part, gallery, shown=2, nearest=2)
    shades = [int(image.get_array()[0, 0, 0]) // 10 for axes in figure.axes for image in axes.images]  # type: ignore[index]
    row = [0, 1, 2, 1, *([0, 1] if steered else [])]
    assert shades == [0, *row, 1, *row]
    across = len(figure.axes) // 2
    filled = [place for place, axes in enumerate(figure.axes[:across]) if axes.images]
    assert filled == [0, 3, 4, 6, 7, *([9, 10] if steered else [])]  # figures beside the picture, a gap before each group
    said = texts(figure)
    assert "2 pictures of 50 with the most negative AS, paper's removal" in said
    assert sum("nearest to" in text for text in said) == 2 + steered
    assert "class 1\nnamed: class 0" in said
    assert "class 1\n31.0°" in said
    assert any("moves away:" in text and "red \\$ -10.0°" in text and "comes closer" not in text for text in said)
    assert saved(figure, tmp_path).std() > 10


@pytest.mark.filterwarnings("error")  # matplotlib warns of a glyph that its font lacks, and draws a box
def test_names_in_letters_the_font_lacks_are_drawn_by_their_numbers(tmp_path: Path) -> None:
    found = analyze_classes(make_rows(3), ["猫", "犬", "\U0001f408"])
    shift = ConceptShift("赤い", 80.0, 90.0, -10.0)
    images, shifts = worst_images(1, steered=False)
    images = replace(images, worst=(replace(images.worst[0], class_name="猫", predicted="犬", falls=(shift,)),))
    part = ColouredPart(np.ones(9, np.int64), 2)
    figures = [
        draw_class_violins(found), draw_class_accuracy(found), draw_joint_distribution({"猫": joint_distribution(make_rows(3))}),
        draw_worst_images(images, shifts, part, part),
    ]  # fmt: skip
    for figure in figures:
        saved(figure, tmp_path)
        assert any("\\u732b" in text for text in texts(figure))


def test_pictures_and_shifts_that_do_not_go_together_are_refused() -> None:
    found, shifts = worst_images(3, steered=False)
    part = ColouredPart(np.ones(9, np.int64), 2)
    for wrong in (shifts[::-1], shifts[:2], []):
        with pytest.raises(ValueError, match="the same pictures in the same order"):
            draw_worst_images(found, wrong, part, part)
