"""Plots of scores: every label inside its figure and on no other, names that cannot break a figure, few classes."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from singreg import plots, report
from singreg.analysis.chance import measure_perturbations
from singreg.analysis.comparison import compare_rows
from singreg.analysis.levels import analyze_classes, analyze_concepts, explain_images
from singreg.nullspace import NullSpace
from singreg.plots import scores
from tests import toy
from tests.test_scores import measure
from tests.toy import World

LONG = "a class whose name is far too long to be drawn beside any axis at all"
AWKWARD = ["$x_1$ & <b>", LONG, "猫", "tab\tline\nend", "e"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved while a test runs."""
    kept: list[Figure] = []
    save = plots.save

    def keep(figure: Figure, path: Path, caption: str) -> report.Figure:
        kept.append(figure)
        return save(figure, path, caption)

    monkeypatch.setattr(scores, "save", keep)
    return kept


def texts(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]  # type: ignore[attr-defined]


def assert_readable(figure: Figure) -> None:
    """Every text lies inside the figure, and no two lie on each other."""
    figure.draw_without_rendering()
    boxes = {t: t.get_window_extent() for t in texts(figure)}
    ticks = {t for axes in figure.axes for t in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes.items():
        if text not in ticks:
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, (text.get_text(), box, width, height)
    free = [(text, box.padded(-1)) for text, box in boxes.items() if text not in ticks]
    for (one, first), (other, second) in combinations(free, 2):
        assert not first.overlaps(second), (one.get_text(), other.get_text())


def test_the_plots_of_a_fine_tuning_run(drawn: list[Figure], tmp_path: Path) -> None:
    measured = dict.fromkeys(scores.STAGES | scores.DROPPED, measure())
    figures = scores.plot_finetune(measured, compare_rows(*[{0: measured["sing"][0]}] * 2), tmp_path)
    for figure in drawn:
        assert_readable(figure)
    assert len(drawn) == len(figures) == 2


@pytest.mark.parametrize("classes", [1, 5, 60])
def test_the_plot_of_classes_at_any_number(classes: int, drawn: list[Figure], tmp_path: Path) -> None:
    names, rng = [AWKWARD[label % 5] + str(label) for label in range(classes)], np.random.default_rng(0)
    labels = np.arange(600) % classes
    rows = pd.DataFrame({"label": labels, "correct": 1.0, "kappa/auditor": 0.1})
    rows = rows.assign(**{"AS/auditor": rng.normal(-1, 3, 600) - labels, "IS/auditor": rng.uniform(10, 30, 600)})
    scores.plot_classes(rows, analyze_classes(rows, names), tmp_path / "classes.png")
    assert_readable(drawn[0])
    shown = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert len(shown) == min(classes, scores.CLASSES_SHOWN)


def test_the_plots_of_perturbations_and_concepts(drawn: list[Figure], tmp_path: Path) -> None:
    w, concepts = World.make(), [f"{name} {place}" for place in range(4) for name in AWKWARD]
    chosen: Any = {"translators": {"auditor": w.translator}, "chosen": np.arange(31)}
    moved = measure_perturbations(w.batches(), weight=w.weight, null_space=w.space, **chosen)
    scores.plot_perturbations(moved, tmp_path / "perturbations.png")
    found = analyze_concepts(w.batches(), concepts, toy.texts(20), **w.reader)
    scores.plot_concepts(found, tmp_path / "concepts.png")
    for figure in drawn:
        assert_readable(figure)


@pytest.mark.parametrize(("neighbours", "shown"), [(1, 6), (5, 2)])
def test_the_plot_of_explained_images(neighbours: int, shown: int, drawn: list[Figure], tmp_path: Path) -> None:
    split, model = toy.ToySplit(31), toy.classifier()
    split.class_names = tuple(AWKWARD)
    concepts, words = [f"{name} {place}" for place in range(4) for name in AWKWARD], toy.texts(20)
    reader: Any = {"null_space": NullSpace.from_weight(model.weight), "translator": toy.translator()}
    reader |= {"gallery": (split, toy.embeddings(31), neighbours), "settings": toy.QUIET}
    where = model, split, np.arange(shown), toy.embeddings(31), toy.texts()
    scores.plot_images(explain_images(*where, concepts, words, **reader), split, split, tmp_path / "images.png")
    assert sum(bool(axes.images) for axes in drawn[0].axes) == shown * (1 + 2 * neighbours)
    assert_readable(drawn[0])
