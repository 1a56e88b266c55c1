"""Plots of scores: every label inside its figure and on no other, names that cannot break a figure, few classes."""

from __future__ import annotations

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
from singreg.analysis.chance import measure_chance
from singreg.analysis.classes import analyze_classes, joint_distribution
from singreg.analysis.concepts import EquivalentPairs, analyze_concepts
from singreg.analysis.images import analyze_images, nearest_images
from singreg.analysis.perturbation import measure_perturbations
from singreg.analysis.probes import fit_blocks, measure_information
from singreg.plots import scores
from tests import toy
from tests.planted import CLASSES, DIM, plant
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


def rows_of(count: int = 200, classes: int = 5) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    rows: dict[str, Any] = {"label": labels, "correct": (rng.random(count) > labels / 9).astype(float)}
    rows |= {"AS/auditor": rng.normal(-1, 3, count) - labels, "IS/auditor": rng.uniform(10, 30, count)}
    return pd.DataFrame(rows).assign(**{"kappa/auditor": 0.1})


def test_the_plots_of_a_fine_tuning_run(drawn: list[Figure], tmp_path: Path) -> None:
    measured = dict.fromkeys(scores.STAGES, measure())
    figures = scores.plot_finetune(measured, AWKWARD, tmp_path)
    for figure in drawn:
        assert_readable(figure)
    assert len(drawn) == len(figures) == 3
    assert all(Image.open(figure.path).size > (300, 200) for figure in figures)


@pytest.mark.parametrize("classes", [1, 5, 60])
def test_the_plots_of_classes_at_any_number(classes: int, drawn: list[Figure], tmp_path: Path) -> None:
    names = [AWKWARD[label % 5] + str(label) for label in range(classes)]
    found = analyze_classes(rows_of(600, classes), names, resamples=20)
    scores.plot_classes(found, tmp_path / "classes.png")
    scores.plot_class_accuracy(found, tmp_path / "accuracy.png")
    scores.plot_joint({"auditor": joint_distribution(rows_of())}, tmp_path / "joint.png")
    for figure in drawn:
        assert_readable(figure)
    labels = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert len(labels) == min(classes, scores.CLASSES_SHOWN)


def test_the_plots_of_chance_information_and_perturbations(drawn: list[Figure], tmp_path: Path) -> None:
    part = plant("leakage", count=200)
    w, T = World.make(unlabelled=False), {"auditor": World.make().translator}
    options: Any = {"texts": w.texts, "mean": w.mean, "draws": 2}
    chance = measure_chance(w.batches(), null_space=w.space, translators=T, **options)
    fits = fit_blocks(part.batches(), null_space=part.space, classes=CLASSES, target_dim=DIM)
    moved = measure_perturbations(w.batches(), weight=w.weight, null_space=w.space, translators=T, chosen=np.arange(31))
    scores.plot_chance(chance["auditor"], tmp_path / "chance.png")
    scores.plot_information(measure_information(part.batches(), fits), tmp_path / "information.png")
    scores.plot_perturbations(moved, tmp_path / "perturbations.png")
    for figure in drawn:
        assert_readable(figure)


def test_the_plots_of_concepts_and_images(drawn: list[Figure], tmp_path: Path) -> None:
    split, model = toy.ToySplit(31), toy.classifier()
    f, concepts = toy.features(model, split).float(), [f"{name} {place}" for place in range(4) for name in AWKWARD]
    w = World(f, torch.from_numpy(split.labels), model.weight, toy.translator(), toy.texts(), torch.randn(20, 7), f[0])
    reader: Any = {"null_space": w.space, "translator": w.translator, "class_names": AWKWARD}
    found = analyze_concepts(w.batches(), concepts, w.concept_texts, **reader)
    scores.plot_concepts(found, tmp_path / "concepts.png")
    images, features = analyze_images(w.batches(), split, w.texts, concepts, w.concept_texts, count=2, **reader)
    indices, queries = [image["index"] for image in images["worst"]], torch.from_numpy(features)
    options: Any = {"pairs": EquivalentPairs(w.translator, w.space), "k": 2, "steered": queries}
    shifts = nearest_images(queries, indices, split, split, toy.embeddings(31), **options)
    scores.plot_images(images["worst"], shifts, split, split, tmp_path / "images.png")
    for figure in drawn:
        assert_readable(figure)


def test_labels_of_crowded_points_lie_on_no_other(tmp_path: Path) -> None:
    figure, (axes,) = plots.panels(width=7)
    x, y = np.random.default_rng(0).random((2, 12))
    axes.scatter(x, y)
    plots.label_points(axes, x, y, [f"arm {place}" for place in range(12)])
    plots.save(figure, tmp_path / "points.png")
    assert_readable(figure)
