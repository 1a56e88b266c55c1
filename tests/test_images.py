"""Image level: against slow loops, and single images as the whole analysis has them (recipes/analyze.py --image)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import analyze as recipe
from singreg import plots
from singreg.analysis import levels as level
from singreg.config import parse
from singreg.data.datasets import load_splits
from singreg.data.scenes import render_scene
from singreg.nullspace import NullSpace
from singreg.plots import scores as drawings
from singreg.translator import load_translator
from tests import toy
from tests.demo import demo_classifier
from tests.recipe_run import run_recipe
from tests.reference import formulas
from tests.test_analyze import TINY
from tests.test_plots import assert_readable

CHOSEN = (0, 7, 30)
Found = dict[str, Any]
Analysed = tuple[Path, list[str], pd.DataFrame]


def explain(out: Path, *more: str) -> Found:
    return run_recipe(recipe.main, out, "--concepts", '["red", "grass", "water"]', *more)


@pytest.fixture(scope="module")
def analysed(analysis: tuple[Path, Found], tmp_path_factory: pytest.TempPathFactory) -> Analysed:
    """A whole analysis, some of its test images as files, and its rows of them."""
    whole, folder = analysis[0], tmp_path_factory.mktemp("images")
    rows = pd.read_parquet(whole / "scores.parquet")
    test: Any = load_splits(parse(recipe.AnalyzeConfig, TINY).data).test
    paths = []
    for place in CHOSEN:
        paths.append(str(folder / f"{place}.png"))
        Image.fromarray(render_scene(test.table, place)).save(paths[-1])
    return whole, paths, rows.set_index("index").loc[list(CHOSEN)]


def same_scores(images: list[Found], rows: pd.DataFrame) -> None:
    for image, row in zip(images, rows.to_dict("records"), strict=True):
        assert image["attribute_score"] == pytest.approx(row["AS/auditor"], abs=1e-3)
        assert image["image_score"] == pytest.approx(row["IS/auditor"], abs=1e-3)
        assert image["logit_change"] < 1e-4


def test_images_have_the_analysis_figures(analysed: Analysed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, paths, rows = analysed
    figures: list[Figure] = []
    save = plots.save
    monkeypatch.setattr(drawings, "save", lambda figure, *to: (figures.append(figure), save(figure, *to))[1])
    label = demo_classifier().label_names[int(rows["label"].iloc[0])]
    given = ["--image", paths[0], "--label", label]
    found = explain(tmp_path / "data", *TINY, *given)["images"]
    same_scores(found, rows[:1])
    assert (found[0]["class_name"], found[0]["image"]) == (label, paths[0])
    assert {side: len(near) for side, near in found[0]["near"].items()} == {"before": 2, "after": 2}
    own = load_translator(folder / "translator-auditor.safetensors")
    torch.save({"weight": own.matrix, "bias": own.offset}, tmp_path / "best.pt")
    for number, file in enumerate((folder / "translator-auditor.safetensors", tmp_path / "best.pt")):
        found = explain(tmp_path / str(number), *given, "--translator.file", str(file))["images"]
        same_scores(found, rows[:1])
        assert found[0]["near"] == {}
    listed = "[" + ", ".join(f'"{path}"' for path in paths) + "]"
    found = explain(tmp_path / "all", "--image", listed, "--translator.file", str(tmp_path / "best.pt"))["images"]
    assert [image["class_name"] for image in found] == [image["predicted"] for image in found]
    same_scores([image for image, row in zip(found, rows["correct"], strict=True) if row], rows[rows["correct"] == 1])
    for figure in figures:
        assert_readable(figure)


def test_logits_and_concepts_are_those_of_the_slow_way(analysed: Analysed, tmp_path: Path) -> None:
    folder, paths, _ = analysed
    file = folder / "translator-auditor.safetensors"
    (found,) = explain(tmp_path / "run", "--image", paths[1], "--translator.file", str(file))["images"]
    classifier = demo_classifier()
    with torch.no_grad():
        f, logits = classifier.features_and_logits(classifier.transform(Image.open(paths[1]))[None])
        null = f - NullSpace.from_weight(classifier.weight).remove(f)
    shown = found["logits"]["class"][0], found["logits"]["before"][0]
    assert shown == (classifier.label_names[int(logits.argmax())], pytest.approx(float(logits.max()), abs=1e-4))
    assert found["logits"]["before"] == pytest.approx(found["logits"]["after"], abs=1e-4)
    assert found["null_share"] == pytest.approx(float(null.norm() / f.norm()), abs=1e-4)
    for moved in (*found["rises"], *found["falls"]):
        assert moved["AS"] == pytest.approx(moved["before"] - moved["after"])
    assert {moved["concept"] for moved in (*found["rises"], *found["falls"])} <= {"red", "grass", "water"}


def test_images_and_their_concepts_are_those_of_the_slow_loops() -> None:
    model, split = toy.classifier(), toy.ToySplit(31, unlabelled=(20,))
    translator, texts = toy.translator(), toy.texts()
    f, z, words = toy.features(model, split), toy.embeddings(31), torch.randn(9, toy.DIM)
    concepts, degrees, chosen = [f"concept {place}" for place in range(9)], formulas.degrees, np.array([20, 3, 7])
    reader: Any = {"null_space": NullSpace.from_weight(model.weight), "translator": translator}
    found = level.explain_images(model, split, chosen, z, texts, concepts, words, **reader, settings=toy.QUIET)
    pairs = formulas.translations(f, model.weight, translator.matrix, translator.offset)
    before, after = formulas.concept_angles(pairs, words)
    for place, image in zip(chosen, found, strict=True):
        predicted = int(model.logits(f[place].float()).argmax())
        label = predicted if place == 20 else int(split.labels[place])
        names = image["image"], image["class_name"], image["predicted"]
        assert names == (f"toy-{place}", toy.NAMES[label], toy.NAMES[predicted])
        score, (z_f, z_eq) = (before - after)[place], pairs[place]
        figures = image["attribute_score"], image["image_score"]
        own = degrees(z_f, texts[label]) - degrees(z_eq, texts[label]), degrees(z_f, z_eq)
        assert figures == pytest.approx(own, abs=1e-3)
        cosine = torch.nn.functional.cosine_similarity(z_f, torch.from_numpy(z[place]).double(), dim=0)
        assert image["cosine"] == pytest.approx(float(cosine), abs=1e-5)
        order = torch.argsort(score).tolist()
        falls, rises = [k for k in order if score[k] < 0][:5], [k for k in order[::-1] if score[k] > 0][:5]
        for shift, k in zip((*image["falls"], *image["rises"]), falls + rises, strict=True):
            angles = float(before[place, k]), float(after[place, k]), float(score[k])
            assert (shift["before"], shift["after"], shift["AS"]) == pytest.approx(angles, abs=1e-4)
            assert shift["concept"] == f"concept {k}"


@pytest.mark.parametrize("chunk", [4096, 5, 1])
def test_nearest_images_are_those_of_the_loop(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level, "GALLERY_CHUNK", chunk)
    z = np.random.default_rng(5).normal(size=(23, 7)).astype(np.float32)
    z[20] = z[3]  # equal angles go by the gallery's order
    queries = toy.World.make().features[:4, :7]
    found = level.nearest_images(queries, toy.ToySplit(23), z, 3)
    for query, near in zip(queries, found, strict=True):
        ranked = sorted((formulas.degrees(query, torch.from_numpy(row)), place) for place, row in enumerate(z))[:3]
        assert [each["image"] for each in near] == [f"toy-{place}" for _, place in ranked]
        assert [each["angle"] for each in near] == pytest.approx([degrees for degrees, _ in ranked], abs=1e-4)


def test_what_cannot_be_explained(analysed: Analysed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (path, *_), _ = analysed
    torch.save({"weight": torch.ones(64, 96), "bias": torch.ones(64)}, tmp_path / "best.pt")
    torch.save({"weight": torch.ones(64, 256), "bias": torch.ones(64)}, tmp_path / "fits.pt")
    (tmp_path / "text.png").write_text("no image")
    read = ("--translator.file", str(tmp_path / "fits.pt"))
    cases: dict[str, tuple[str, ...]] = {
        "takes features of 96": ("--image", path, "--translator.file", str(tmp_path / "best.pt")),
        "no translator file": ("--image", path, "--translator.file", str(tmp_path / "none.pt")),
        "there is no file none.png": ("--image", "none.png", *read),
        "text.png cannot be read": ("--image", str(tmp_path / "text.png"), *read),
        "label: expected one of 10 classes": ("--image", path, "--label", "cat", *read),
        "name the files": read,
        "has 1 lines, the head 10 rows": ("--image", path, "--model.label_names", str(tmp_path / "text.png"), *read),
    }
    for words, arguments in cases.items():
        with pytest.raises(SystemExit) as stop:
            explain(tmp_path / "run", *arguments)
        assert words in f"{stop.value} {capsys.readouterr().err}"
        assert not (tmp_path / "run").exists()
