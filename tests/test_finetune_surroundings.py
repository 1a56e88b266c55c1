"""recipes/finetune.py's ways in and out: uploads, other trackers, refusals, dry runs, the shipped configurations."""

from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

import finetune as recipe
from singreg.classes import expand_classes
from singreg.config import FinetuneConfig, located, parse
from tests.images import write_tree
from tests.tiny_run import finetune, surroundings  # noqa: F401


def test_a_model_is_uploaded_with_its_card(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with patch.object(recipe, "HfApi") as hub, patch.object(recipe, "get_token", return_value="hf_test"):
        finetune(folder, "--training.epochs", "0", "--push_to_hub", "me/scenes")
    hub.return_value.create_repo.assert_called_once_with("me/scenes", exist_ok=True)
    pushed = hub.return_value.upload_folder.call_args.kwargs
    assert (pushed["repo_id"], pushed["folder_path"]) == ("me/scenes", folder / "model")
    assert {path.name for path in pushed["folder_path"].iterdir()} == {"README.md", "config.json", "model.safetensors"}
    _, front, card = (folder / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert {"license", "tags"} <= set(yaml.safe_load(front))
    rows = [line.split()[1] for line in card.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["before", "control", "SingLoss", "control,"]  # the last: its null space dropped
    assert str(tmp_path) not in card
    code = card.partition("```py\n")[2].partition("```")[0].replace("hf-hub:me/scenes", f"local-dir:{folder / 'model'}")
    names: dict[str, Any] = {"image": Image.new("RGB", (70, 60))}
    exec(code, names)
    assert names["logits"].shape == (1, len(names["model"].pretrained_cfg["label_names"])) == (1, 10)


@pytest.mark.parametrize("more", [[], ["--dry_run", "true"]])
def test_without_a_token_nothing_begins(more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "get_token", lambda: None)
    with pytest.raises(SystemExit, match=r"^error: push_to_hub: .*token.*HF_TOKEN$"):
        finetune(tmp_path / "run", "--push_to_hub", "me/scenes", *more)
    with pytest.raises(SystemExit):
        finetune(tmp_path / "run", "--push_to_hub", "scenes", *more)
    assert not (tmp_path / "run").exists()


class Recorded(GeneralTracker):
    """A tracker of someone else's: what each of its runs was told."""

    name, requires_logging_directory, tracker = "recorded", False, None
    told: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.own = self.told[run_name] = {"images": []}

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.own["epochs"] = values["training.epochs"]

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.own |= {name: (step, value) for name, value in values.items()}

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.own["images"] += list(values)

    def finish(self) -> None:
        self.own["ended"] = True


def test_measuring_only_with_another_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorded", Recorded)
    report = finetune(tmp_path / "only", "--training.epochs", "0", "--log_with", "recorded")
    assert [line.split()[0] for line in report["verdict"]] == ["Before:", "Nothing"]
    before, after = (report["measurements"][stage]["translators"]["auditor"]["overall"] for stage in ("before", "sing"))
    np.testing.assert_allclose([before[k] for k in ("AS", "IS")], [after[k] for k in ("AS", "IS")], atol=1e-4)
    assert report["measurements"]["sing"]["translators"]["auditor"]["fit_images"] == 64 - 10, "one of a class is held"
    assert list(Recorded.told) == ["control", "sing"]
    told = Recorded.told["sing"]
    assert (told["epochs"], told["ended"]) == (0, True)
    assert told["auditor/AS_neg"] == (1, pytest.approx(after["AS_neg"]))
    assert {"val/top1", "watch/IS"} <= set(told)
    assert told["images"] == ["watch/histogram", "plots/summary", "plots/joint"]
    assert not (tmp_path / "only" / "tensorboard").exists()


def test_a_dry_run_tells_its_numbers_before_it_embeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with patch("singreg.setup.embed_splits", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "run", "--dry_run", "true")
    early = capsys.readouterr().out
    finetune(tmp_path / "run", "--dry_run", "true")
    shown = capsys.readouterr().out
    for words in ("rank 10, nullity 246 (96.1% of", "train 80, bank 90, audit 64, test 45", "steps: 10 (5 an epoch)"):
        assert words in shown
    assert "No claim: the auditor has 54 images, 1536 are needed" in shown
    assert "one batch: features (45, 256), logits (45, 10)" in shown
    assert "nullity 246" in early
    assert "steps: " in early
    assert not (tmp_path / "run").exists()


REAL = ["imagenet16_lite0", "imagenette_resnet50", "imagenet100_resnet50", "imagenet1k_resnet50", "own"]


@pytest.mark.parametrize("name", REAL)
def test_those_for_real_images_are_built(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their own classes, splits and settings; only the images, and the models that need weights, are others."""
    file = f"configs/{name}.yaml"
    data = parse(FinetuneConfig, ["--config", file]).data
    classes = expand_classes(data.classes) if isinstance(data.classes, str) else ["circle", "star"]
    counts = {data.train_split: dict.fromkeys(classes, 4), data.test_split: dict.fromkeys(classes, 1)}
    source, pool = write_tree(tmp_path / "source", counts), write_tree(tmp_path / "pool", {"a": {"b": 6}})
    given = {"data.source": source, "data.per_class": "{train: 2, audit: 2, test: 1}", "data.workers": 0}
    given |= {"model.name": "test_efficientnet", "model.pretrained": False, "model.head": "new", "data.image_size": 32}
    given |= {"vlm.name": located("demo", "vlm"), "vlm.pretrained": None, "training.batch_size": 4, "dry_run": True}
    given |= {"data.unlabeled": pool} if data.unlabeled else {}
    words = [word for key, value in given.items() for word in (f"--{key}", "null" if value is None else str(value))]
    finetune(tmp_path / "run", "--config", file, *words, "--out", str(tmp_path / "run"))
    shown, count = capsys.readouterr().out, len(classes)
    assert f"rank {count}, nullity {256 - count}" in shown
    assert f"train {2 * count}, bank " in shown
    assert not (tmp_path / "run").exists()
