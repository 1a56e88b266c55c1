"""Every shipped configuration is built: demos as they are but for their size, others on folders made up to look like theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from recipes import analyze, compare, finetune, steer
from singreg.data.classes import expand_classes
from singreg.training.config import parse_finetune
from singreg.workbench.build import model_name

FEW = ["--data.scenes_train", "48", "--data.scenes_audit", "32", "--data.scenes_test", "30", "--data.scenes_bank", "8", "--dry_run", "true"]
RECIPES: dict[str, Callable[[list[str]], None]] = {
    "demo": finetune.main, "analyze_demo": analyze.main, "steer_demo": steer.main, "compare_demo": compare.main,
}  # fmt: skip


def run(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    AcceleratorState._reset_state(True)
    try:
        main(arguments)
    finally:
        AcceleratorState._reset_state(True)


def test_every_demo_has_its_recipe_here() -> None:
    configs = Path(sys.modules["recipes"].__path__[0]).parent / "configs"
    assert sorted(path.stem for path in configs.glob("*demo.yaml")) == sorted(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_shipped_demos_are_built_and_make_nothing(name: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(RECIPES[name], ["--config", name, "--runs", str(tmp_path), "--cache", str(cache), *FEW])
    shown = capsys.readouterr().out
    assert "dry run: nothing was" in shown
    assert " 246 " in shown, "the null space of 10 rows in 256 features"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_rank_nullity_memory_and_steps(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(finetune.main, ["--config", "demo", "--runs", str(tmp_path), "--cache", str(cache), *FEW, "--training.batch_size", "16",
                        "--training.epochs", "4", "--translator.refreshes", "2"])  # fmt: skip
    shown = capsys.readouterr().out
    for words in (
        "10 classes, 256 features", "rank 10, nullity 246 (96.1% of the dimensions)", "features (56, 256), logits (56, 10)",
        "train 48, bank 56, audit 32, test 30", "steps: 12 (3 an epoch), translator refreshed after [4, 8]", "MiB",
    ):  # fmt: skip
        assert words in shown, words


def test_a_dry_run_tells_its_numbers_before_it_embeds(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("singreg.workbench.build.embed_parts", stop)
    with pytest.raises(KeyboardInterrupt):
        run(finetune.main, ["--config", "demo", "--runs", str(tmp_path), "--cache", str(cache), *FEW])
    shown = capsys.readouterr().out
    for words in (
        "nullity 246", "audit 32, test 30", "steps: ", f"embedding the 118 pictures of bank, audit and test once; {cache}",
        "No claim: the auditor has 32 pictures, 1536 are needed",
    ):  # fmt: skip
        assert words in shown, words


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_readmes_command_for_ones_own_folder_needs_nothing_but_the_folder(
    some: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The packaged models in the places of ResNet50 and CLIP; a folder of JPEGs and nothing else."""
    source, rng = tmp_path / "FOLDER", np.random.default_rng(0)
    for split, count in {"train": 4, "val": 1}.items():
        for name in ("circle", "square", "star"):
            (source / split / name).mkdir(parents=True)
            for place in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(source / split / name / f"{place}.jpg")
    chosen = ["--data.classes", '["circle", "star"]'] if some else []
    run(finetune.main, ["--config", "own", "--data.source", str(source), "--data.test_split", "val", *chosen,
                        "--model.name", model_name("demo", "classifier"), "--vlm.name", model_name("demo", "vlm"), "--vlm.pretrained",
                        "null", "--data.workers", "0", "--training.batch_size", "4", "--name", "mine", "--runs", str(tmp_path / "runs"),
                        "--cache", str(tmp_path / "cache"), "--dry_run", "true"])  # fmt: skip
    shown, classes = capsys.readouterr().out, 2 if some else 3
    assert f"nullity {256 - classes}" in shown
    assert f"train {2 * classes}, bank {2 * classes}, audit {2 * classes}, test {classes}" in shown
    assert f"No claim: the auditor has {2 * classes} pictures, 1536 are needed" in shown
    assert not (tmp_path / "runs").exists()


def folder_like(source: Path, classes: tuple[str, ...], splits: dict[str, int]) -> Path:
    """SPLIT/WNID/picture files of noise, each its own."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for name in classes:
            (source / split / name).mkdir(parents=True)
            for place in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(source / split / name / f"{place}.png")
    return source


@pytest.mark.parametrize("name", ["imagenet16_lite0", "imagenette_resnet50", "imagenet100_resnet50"])
def test_configurations_for_real_pictures_are_built_on_a_made_up_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their own classes, splits, head mode and settings; only the pictures, and the models that need weights, are others."""
    config = parse_finetune(["--config", name])
    assert isinstance(config.data.classes, str)
    classes = expand_classes(config.data.classes)
    source = folder_like(tmp_path / "source", classes, {config.data.train_split: 4, config.data.test_split: 1})
    pool = folder_like(tmp_path / "pool", ("a",), {"b": 6})
    more = ["--data.train_per_class", "2", "--data.audit_per_class", "2", "--data.test_per_class", "1", "--data.workers", "0"]
    unlabeled = ["--data.unlabeled", str(pool)] if config.data.unlabeled else []
    standins = ["--model.name", "test_efficientnet", "--model.pretrained", "false", "--vlm.name", "demo", "--vlm.pretrained", "null",
                "--data.image_size", "32", "--training.batch_size", "8"]  # fmt: skip
    run(finetune.main, ["--config", name, "--data.source", str(source), *unlabeled, *more, *standins, "--runs", str(tmp_path / "runs"),
                        "--cache", str(tmp_path / "cache"), "--dry_run", "true", "--training.mixed_precision", "no"])  # fmt: skip
    shown = capsys.readouterr().out
    assert f"{len(classes)} classes, 256 features" in shown
    assert f"rank {len(classes)}, nullity {256 - len(classes)}" in shown
    assert f"train {2 * len(classes)}, bank " in shown
    assert not (tmp_path / "runs").exists()
