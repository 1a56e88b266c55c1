"""What a fine-tuning run refuses before any training, and what it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from singreg.training.loop import TrainingFailed, _Arm
from tests.demo import ASSETS
from tests.tiny_run import finetune


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 3)):
        for name in ("circle", "star"):
            (root / split / name).mkdir(parents=True)
            for place in range(count):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / split / name / f"{place}.png")
    return root


FOLDER = ["--data.train_per_class", "4", "--model.head", "new", "--training.batch_size", "4", "--data.source"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--training.batch_size", "500"], "80 pictures, fewer than training.batch_size = 500"),
        (["--training.batch_size", "15", "--training.accumulation", "2"], "cannot be split evenly into 2 accumulation"),
        (["--data.scenes_audit", "0"], "audit part is empty"),
        (["--vlm.name", "local-dir:no/such/folder"], "no/such/folder"),
        (["--vlm.name", "ViT-L-14", "--vlm.pretrained", "openay"], "neither a file nor a tag"),
        (["--data.source", "./no-such-folder"], "there is no folder"),
    ],
)
def test_settings_that_cannot_work(more: list[str], words: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune(tmp_path, cache, *more)
    assert words in str(stop.value)
    assert not list(tmp_path.rglob("config.yaml")), "a run that never began left a folder"


def test_a_vlm_folder_without_weights(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "demo_vlm", tmp_path / "vlm")
    (tmp_path / "vlm" / "open_clip_model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"no weights in .*vlm"):
        finetune(tmp_path, cache, "--vlm.name", f"local-dir:{tmp_path / 'vlm'}")


def test_a_head_without_a_null_space(cache: Path, tmp_path: Path) -> None:
    """vgg's little sister: the demo's classifier has 256 features, so 256 classes leave nothing."""
    from singreg.nullspace import NullSpace

    with pytest.raises(ValueError, match="256 classes, 256 features"):
        NullSpace.from_weight(torch.randn(256, 256))
    with pytest.raises(SystemExit, match="no null space"):
        finetune(tmp_path, cache, "--model.name", "test_vit", "--model.pretrained", "false", "--model.head", "keep",
                 "--data.image_size", "160")  # fmt: skip


def test_classes_that_do_not_exist_or_have_too_few_pictures(pictures: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"'starr' \(near: star"):
        finetune(tmp_path, cache, *FOLDER, str(pictures), "--data.classes", '["circle", "starr"]')
    with pytest.raises(SystemExit, match="star has 24 for train 25"):
        finetune(tmp_path, cache, *FOLDER, str(pictures), "--data.train_per_class", "25")


def test_unreadable_pictures_stop_before_training_or_are_left_out(pictures: Path, cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    (broken / "train" / "star" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit, match=r"(?s)1 unreadable pictures.*star/3\.png"):
        finetune(tmp_path, cache, *FOLDER, str(broken), "--data.train_per_class", "5")
    finetune(tmp_path, cache, *FOLDER, str(broken), "--data.train_per_class", "5", "--data.unreadable", "skip", "--name", "skipped")
    assert (tmp_path / "skipped" / "report.md").is_file()


def test_a_loss_that_is_not_finite_stops_and_names_its_pictures(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, taken = _Arm._micro_step, [0]

    def poisoned(self: _Arm, batch: tuple[torch.Tensor, ...], step: int) -> None:
        taken[0] += 1
        if taken[0] == 5:
            batch = (batch[0] * float("nan"), *batch[1:])
        original(self, batch, step)

    monkeypatch.setattr(_Arm, "_micro_step", poisoned)
    with pytest.raises(TrainingFailed, match=r"(?s)'control'.*not finite at step 5.*scene-\d+-\d+"):
        finetune(tmp_path, cache, "--name", "poisoned")
    kept = sorted(path.name for path in (tmp_path / "poisoned" / "checkpoints" / "control").iterdir())
    assert kept == ["step-00000003"]
