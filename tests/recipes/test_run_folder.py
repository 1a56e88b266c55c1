"""A finished run's folder: what a second start, a full disk and somebody else's translator do with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import timm
import torch

from singreg import files
from singreg.models.classifier import Classifier
from singreg.training import finetuning
from singreg.translator import load_translator
from tests.tiny_run import finetune, report_of


def contents(folder: Path) -> dict[str, bytes]:
    """All files but TensorBoard's, which grow with every start."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def resume(folder: Path, cache: Path) -> None:
    finetune(folder.parent, cache, "--name", folder.name, "--resume", "true")


def test_resuming_a_finished_run_trains_and_measures_nothing(finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was done again")

    before = contents(finished)
    monkeypatch.setattr(finetuning, "train_arm", forbidden)
    monkeypatch.setattr(Classifier, "features_and_logits", forbidden)
    resume(finished, cache)
    after = contents(finished)
    assert before.keys() == after.keys()
    # Reports hold the command, which now says --resume; safetensors writes its metadata in any order.
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"report.json", "report.md", "report.html", "translator-before.safetensors"}


@pytest.mark.parametrize("name", ["report.json", "scores.parquet", "translator-before.safetensors", "summary.png"])
def test_a_full_disk_while_reporting_keeps_every_old_file_whole(
    name: str, finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, first = contents(finished), report_of(finished)
    replace, refused = os.replace, []

    def full(source: object, target: object) -> None:
        if Path(str(target)).name == name:
            refused.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(str(source), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(SystemExit, match="No space left"):
            resume(finished, cache)
    assert refused, f"{name} is not written under a temporary name first"
    assert f"kept in {finished}" in capsys.readouterr().err
    after = contents(finished)
    assert before.keys() == after.keys(), "a temporary file was left behind"
    assert before[next(key for key in before if Path(key).name == name)] == after[next(key for key in after if Path(key).name == name)]
    resume(finished, cache)
    assert report_of(finished) == first


def test_features_of_the_reloaded_model_are_those_of_plain_timm(finished: Path) -> None:
    """Through the adapter or through timm alone: the same bits, for features and logits, for both arms."""
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    for folder in (finished / "model", finished / "model-control"):
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        classifier = Classifier.from_timm(f"local-dir:{folder}")
        with torch.no_grad():
            features, logits = classifier.features_and_logits(images)
            pooled = plain.forward_head(plain.forward_features(images), pre_logits=True)
            assert torch.equal(plain(images), logits)
            assert torch.equal(pooled, features)
            assert torch.equal(classifier.logits(features), logits)


def test_the_translators_say_which_model_they_belong_to(finished: Path) -> None:
    before, after = (finished / f"translator-{name}.safetensors" for name in ("before", "after"))
    model = Classifier.from_timm(f"local-dir:{finished / 'model'}")
    of_the_model = load_translator(after).info
    assert of_the_model.head_hash == model.head_hash()
    assert of_the_model.vlm.startswith("local-dir:")
    assert load_translator(after, expected=of_the_model).info == of_the_model
    with pytest.raises(ValueError, match=r"(?s)translator-before\.safetensors belongs to another setting; fit a new one.*head_hash"):
        load_translator(before, expected=of_the_model)
    control = load_translator(finished / "translator-after-control.safetensors").info
    assert len({control.head_hash, of_the_model.head_hash, load_translator(before).info.head_hash}) == 3
