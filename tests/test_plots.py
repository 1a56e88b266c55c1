"""Plots of scores: every label inside its figure and on no other, names that cannot break a figure, few classes."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from singreg import plots
from singreg.analysis.comparison import compare_arms
from singreg.analysis.levels import analyze_classes, analyze_concepts, describe_images, nearest_images, worst_images
from singreg.analysis.perturbation import measure_perturbations
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

    def keep(figure: Figure, path: Path) -> Path:
        kept.append(figure)
        return save(figure, path)

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
    figures = scores.plot_finetune(measured, compare_arms(measured), AWKWARD, tmp_path)
    for figure in drawn:
        assert_readable(figure)
    assert len(drawn) == len(figures) == 3
    assert all(Image.open(figure.path).size > (300, 200) for figure in figures)


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


@pytest.mark.parametrize("neighbours", [1, 5])
def test_the_plots_of_perturbations_concepts_and_images(neighbours: int, drawn: list[Figure], tmp_path: Path) -> None:
    split, model = toy.ToySplit(31), toy.classifier()
    f, concepts = toy.features(model, split).float(), [f"{name} {place}" for place in range(4) for name in AWKWARD]
    w = World(f, torch.from_numpy(split.labels), model.weight, toy.translator(), toy.texts(), torch.randn(20, 7), f[0])
    chosen: Any = {"translators": {"auditor": w.translator}, "chosen": np.arange(31)}
    moved = measure_perturbations(w.batches(), weight=w.weight, null_space=w.space, **chosen)
    scores.plot_perturbations(moved, tmp_path / "perturbations.png")
    reader: Any = {"null_space": w.space, "translator": w.translator}
    found = analyze_concepts(w.batches(), concepts, w.concept_texts, **reader)
    scores.plot_concepts(found, tmp_path / "concepts.png")
    rows = pd.DataFrame(
        {"index": range(31), "image": "x", "label": split.labels, "AS/auditor": -1.0, "IS/auditor": 9.0}
    )
    worst = worst_images(rows, 2)
    images = describe_images(model, f[:2], worst, AWKWARD, concepts, w.concept_texts, **reader)
    near = nearest_images(w.translator(f[:2]), split, toy.embeddings(31), neighbours)
    shifts = [dict.fromkeys(scores.SIDES, each) for each in near]
    scores.plot_images(images, shifts, split, split, tmp_path / "images.png")
    assert sum(bool(axes.images) for axes in drawn[-1].axes) == 2 * (1 + 3 * neighbours)
    for figure in drawn:
        assert_readable(figure)
