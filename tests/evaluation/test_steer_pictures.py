"""Steered pictures through the recipe: refused before any work when they cannot be drawn, and drawn by a made-up pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import singreg.evaluation.steer as steering
import singreg.evaluation.steer_pictures as drawing
from recipes.steer import main
from singreg.evaluation.steer import Steering, SteeringBench
from singreg.evaluation.steer_config import parse_steer
from singreg.evaluation.steer_pictures import choose_shown, draw_steered
from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.reporting.unclip import UnclipRenderer
from singreg.workbench.build import Bench
from singreg.workbench.run import Run, make_accelerator
from tests.evaluation.test_steer import arguments

SIDE = 12


class Pipeline:
    """Draws an embedding as a grey picture and remembers it; in place of diffusers', which has its own tests under the extra."""

    def __init__(self, width: int) -> None:
        self.text_proj = SimpleNamespace(config=SimpleNamespace(clip_embeddings_dim=width))
        self.decoder, self.device = torch.nn.Linear(1, 1), torch.device("cpu")
        self.seen: list[tuple[torch.Tensor, int]] = []

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, *, image_embeddings: torch.Tensor, generator: torch.Generator, **_: Any) -> Any:
        self.seen.append((image_embeddings[0], generator.initial_seed()))
        return SimpleNamespace(images=[np.full((SIDE, SIDE, 3), 0.5)])


def with_pipeline(monkeypatch: pytest.MonkeyPatch, width: int) -> Pipeline:
    pipeline = Pipeline(width)
    monkeypatch.setattr(drawing, "check_extra", lambda: None)
    monkeypatch.setattr(UnclipRenderer, "from_pretrained", classmethod(lambda cls, name, **_: cls(pipeline)))
    return pipeline


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def width() -> int:
    from singreg.models.vlm import VisionLanguageModel
    from singreg.workbench.build import model_name

    return VisionLanguageModel.from_open_clip(model_name("demo", "vlm")).embed_texts(["a"]).shape[1]


def test_without_the_extra_the_recipe_stops_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("data and models were loaded although nothing can be drawn")

    monkeypatch.setattr(Bench, "build", forbidden)
    with pytest.raises(SystemExit, match=r'unclip: .*pip install "singreg\[unclip\]"'):
        main(arguments(tmp_path / "runs", tmp_path / "cache", "--unclip", "some/pipeline"))
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_another_width_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    with_pipeline(monkeypatch, width + 1)
    with pytest.raises(SystemExit, match=f"some/pipeline draws {width + 1}-dimensional embeddings and .* gives {width}"):
        main(arguments(tmp_path, cache, "--unclip", "some/pipeline"))
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_draws_a_row_a_source_into_the_report(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    pipeline = with_pipeline(monkeypatch, width)
    main(arguments(tmp_path, cache, "--name", "drawn", "--unclip", "some/pipeline", "--seed", "5"))
    folder = tmp_path / "drawn"
    shown = json.loads((folder / "report.json").read_text())["shown"]
    assert [(s["source"], s["target"]) for s in shown] == [("circle", "star"), ("star", "an image of grass")]
    assert all(s["step"] > 0 for s in shown)
    assert [seed for _, seed in pipeline.seen] == [5] * 4 + [6] * 4  # one noise a row: CLIP, T(f), T(f~), steered
    lengths = torch.stack([z for z, _ in pipeline.seen]).norm(dim=1).reshape(2, 4)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(2, 4))  # of the picture's own embedding
    assert Image.open(folder / "plots" / "unclip.png").size[0] > 500
    text = (folder / "report.md").read_text()
    assert "## Pictures" in text
    assert "drawn by some/pipeline" in text
    assert "](plots/unclip.png)" in text
    assert (folder / "report.html").read_text().count("data:image/png") == 3


def test_steered_drawings_turn_by_the_image_score_and_the_unreachable_are_listed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    pipeline = with_pipeline(monkeypatch, width)
    config = parse_steer(arguments(tmp_path, cache, "--name", "part", "--unclip", "x"))
    accelerator = make_accelerator(seed=0)
    found = SteeringBench.build(config, accelerator)
    job = Steering(Run(config, accelerator, "steer"), config, found)
    job.fit_translators()
    translator = job.fitted["fitted"].translator
    options = {"null_space": NullSpace.from_weight(found.bench.classifier.weight), "attacker": translator, "judge": translator}
    pictures = draw_steered(found.renderer, found.bench, found.plan, 2, image_score=40.0, **options)
    assert pictures.sheet is not None
    assert len(pictures.sheet.axes) == 2 * 5
    for picture, rows in zip(pictures.shown, (pipeline.seen[:4], pipeline.seen[4:]), strict=True):
        clip, before, removed, steered = (z.double() for z, _ in rows)
        torch.testing.assert_close(clip.float(), torch.from_numpy(np.array(found.bench.embeddings["test"][picture.index])))
        assert float(angle(before, steered)) == pytest.approx(40, abs=1e-2)
        text = found.plan.texts[found.plan.targets.index(picture.target)].double()
        assert float(angle(steered, text)) < float(angle(before, text)) - 5
        assert float(angle(before, removed)) > 1
    far = draw_steered(found.renderer, found.bench, found.plan, 2, image_score=179.5, **options)
    assert far.sheet is None
    assert [picture.step for picture in far.shown] == [None, None]
    assert len(pipeline.seen) == 8


def test_out_of_reach_is_said_in_the_report(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    with_pipeline(monkeypatch, width)
    main(arguments(tmp_path, cache, "--name", "far", "--unclip", "x", "--image_score", "179.5"))
    text = (tmp_path / "far" / "report.md").read_text()
    assert "2 more cannot reach it and are not drawn: scene-" in text
    assert not (tmp_path / "far" / "plots" / "unclip.png").exists()


def test_every_source_shows_its_first_picture_and_targets_take_turns() -> None:
    plan = steering.PairPlan(
        ("a", "b", "c"), ("x", "y"), torch.tensor([4, 2, 7]), torch.eye(2),
        torch.tensor([[True, True], [False, False], [True, True]]), np.array([False, True, True, True, False, True]),
    )  # fmt: skip
    labels = np.array([4, 7, 4, 2, 4, 7])
    assert choose_shown(plan, labels, 5) == [(2, 0, 0), (1, 2, 1)]  # b has no target
    assert choose_shown(plan, labels, 1) == [(2, 0, 0)]
