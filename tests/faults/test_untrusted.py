"""Files from who knows where: none does harm, each is answered with a message that names it; all messages in one table."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tabulate import tabulate

from singreg.data import UnreadableImageError, load_splits, reading
from singreg.data.embeddings import encode_split
from singreg.evaluation.analyze_config import parse_analyze
from singreg.models.classifier import Classifier
from singreg.old_seals import DamagedFileError, read_rows, read_sealed
from singreg.reporting.report_files import write_report
from singreg.training.checkpoint import _whole
from singreg.training.config import parse_finetune
from singreg.translator import LinearTranslator, load_translator
from tests.data.pictures_for_tests import config, names, write_parquet, write_picture, write_tree
from tests.faults import untrusted
from tests.reporting.small_report import finetune_report

MESSAGES: list[tuple[str, str]] = []
MEBIBYTES = 256  # no untrusted file may make this process grow by more


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print("\n" + tabulate(MESSAGES, headers=["file", "message"], maxcolwidths=[None, 120]))


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEBIBYTES * 1024


def note(what: str, message: object, folder: Path) -> str:
    text = " ".join(str(message).replace(str(folder), "FOLDER").split())
    MESSAGES.append((what, text))
    return text


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "pictures", {"train": {"a": 6, "b": 6}, "validation": {"a": 2, "b": 2}})


BAD_PICTURES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "PNG of 100,000 × 100,000 pixels": (lambda folder: untrusted.huge_png(folder / "huge.png"), "DecompressionBombError"),
    "BMP of 100,000 × 100,000 pixels": (lambda folder: untrusted.huge_bmp(folder / "huge.bmp"), "DecompressionBombError"),
    "truncated JPEG": (lambda folder: untrusted.truncated_jpeg(folder / "cut.jpg"), "truncated"),
    "JPEG whose EXIF block cannot be written again": (lambda folder: untrusted.damaged_exif(folder / "exif.jpg"), "struct.error"),
    "PNG of 1 TiB (sparse)": (lambda folder: untrusted.sparse_png(folder / "sparse.png"), "at most 256 MiB are read"),
    "pipe named .png": (lambda folder: untrusted.pipe(folder / "pipe.png"), "not a regular file"),
    "PostScript named .png": (lambda folder: untrusted.postscript(folder / "program.png"), "cannot identify image file"),
    "text named .png": (lambda folder: untrusted.text_as_picture(folder / "text.png"), "cannot identify image file"),
}


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_bad_picture_is_named_or_left_out(what: str, pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    write, words = BAD_PICTURES[what]
    bad = write(pictures / "train" / "a")
    with pytest.raises(UnreadableImageError) as stop:
        load_splits(config(pictures))
    assert str(bad) in note(what, stop.value, pictures).replace("FOLDER", str(pictures))
    assert words in str(stop.value)
    with caplog.at_level(logging.WARNING):
        parts = load_splits(config(pictures, unreadable="skip"))
    assert str(bad) in caplog.text
    assert len(parts.train) + len(parts.audit) == 12
    assert str(bad) not in names(parts.train) + names(parts.audit)


def test_one_bad_picture_in_a_hundred(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, rng = write_tree(tmp_path, {"train": {"a": 100, "b": 100}, "validation": {"a": 50, "b": 50}}), np.random.default_rng(0)
    found = sorted(root.rglob("*.png"))
    bad = [found[place] for place in rng.choice(len(found), len(found) // 100, replace=False)]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UnreadableImageError, match=f"{len(bad)} unreadable pictures") as stop:
        load_splits(config(root))
    assert all(str(path) in str(stop.value) for path in bad)
    with caplog.at_level(logging.WARNING):
        parts = load_splits(config(root, unreadable="skip"))
    assert all(str(path) in caplog.text for path in bad)
    used = {name for part in (parts.train, parts.audit, parts.test) for name in names(part)}
    assert used == {str(path) for path in found} - {str(path) for path in bad}
    print(f"\none bad picture in a hundred: {len(bad)} of {len(found)}, all named with stop, all left out with skip")


def test_a_link_out_of_the_folder_is_not_followed(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = write_tree(tmp_path / "elsewhere", {"train": {"a": 1}}) / "train" / "a" / "0.png"
    untrusted.link_outside(pictures / "train" / "a" / "link.png", secret)
    (pictures / "train" / "c").symlink_to(tmp_path / "elsewhere" / "train" / "a")
    with pytest.raises(ValueError, match=r"1 class folders in .*/train are links that lead out of") as stop:
        load_splits(config(pictures))
    note("class folder that is a link out of the data folder", stop.value, pictures)
    (pictures / "train" / "c").unlink()
    with pytest.raises(UnreadableImageError, match=r"1 links lead out .* not followed; .*\n.*/link\.png") as stop:
        load_splits(config(pictures))
    note("link out of the data folder", stop.value, pictures)
    with caplog.at_level(logging.WARNING):
        parts = load_splits(config(pictures, unreadable="skip"))
    assert "1 links lead out" in caplog.text
    assert parts.class_names == ("a", "b")
    used = names(parts.train) + names(parts.audit) + names(parts.test)
    assert not any("link.png" in name or "elsewhere" in name for name in used)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_does_not_choose_what_is_read(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    opened: list[str] = []
    real = reading.xopen
    monkeypatch.setattr(reading, "xopen", lambda path, *rest: (opened.append(path), real(path, *rest))[1])
    root, secret = tmp_path / "set", write_picture(tmp_path / "elsewhere" / "secret.png")
    untrusted.link_outside(write_picture(root / "own.png").with_name("link.png"), secret)
    untrusted.pipe(root / "pipe.png")
    bad = [str(secret), str(root / "link.png"), str(root / ".." / "elsewhere" / "secret.png"), "/dev/zero", str(root / "pipe.png"),
           "http://127.0.0.1:9/x.png", "hf://datasets/some/one/x.png", f"zip://x.png::{secret}", "file:///etc/hostname",
           "simplecache::http://127.0.0.1:9/x.png", "a\0b"]  # fmt: skip
    cells = [{"bytes": None, "path": path} for path in bad] + [None, {"bytes": None, "path": None}]
    good = [write_picture(tmp_path / "raw" / f"{number}.png") for number in range(6)]
    own = {"bytes": None, "path": str(root / "own.png")}
    rows = [*cells, *good, own]
    write_parquet(root / "train.parquet", rows, ["a"] * len(rows))
    write_parquet(root / "validation.parquet", [write_picture(tmp_path / "raw" / "test.png")], ["a"])
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    with pytest.raises(UnreadableImageError, match=f"{len(cells)} unreadable pictures") as stop:
        load_splits(config(root, **options))
    said = str(stop.value)
    assert all(repr(path) in said or path == str(root / "pipe.png") for path in bad)
    assert said.count("the row holds no picture (null)") == 2
    note(f"Parquet rows that name files elsewhere (streaming: {streaming})", said, tmp_path)
    with caplog.at_level(logging.WARNING):
        parts = load_splits(config(root, **options, unreadable="skip"))
    assert len(parts.train) + len(parts.audit) == len(good) + 1, "the data set's own file is read"
    assert hashlib.sha256(secret.read_bytes()).digest() not in {bytes(digest) for part in parts for digest in part.digests}
    assert not opened


@pytest.mark.parametrize(
    ("what", "text", "words"),
    [
        ("YAML with a tag that runs code", "name: !!python/object/apply:pathlib.Path.touch [x]", "could not determine a constructor"),
        ("YAML whose aliases stand for 10^9 values", None, "aliases stand for more than"),
        ("YAML that is its own value", "loss: &a {terms: *a}", "aliases stand for more than"),
        ("YAML nested 5,000 deep", "name: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("prompt with control characters", 'vlm: {templates: ["\\e[2J an image of a {class}"]}', "has the control character U+001B"),
        ("run name with a control character", 'name: "a\\0b"', "has the control character U+0000"),
        ("integer of 9,000 digits", "seed: 0x" + "f" * 9000, "a number of 9002 digits is not meant"),
    ],
)
def test_a_bad_configuration_is_refused(
    what: str, text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.faults.fuzz import LAUGHS

    file = tmp_path / "bad.yaml"
    file.write_text((LAUGHS if text is None else text) + "\n")
    for parse in (parse_finetune, parse_analyze):
        with pytest.raises(SystemExit) as stop:
            parse(["--config", str(file)])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in said
        assert not any(ord(character) < 32 and character != "\n" for character in said)
    note(what, said.partition("run with --help")[0], tmp_path)
    assert not (tmp_path / "x").exists()


def test_markup_in_class_names_stays_text(tmp_path: Path) -> None:
    evil = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b](javascript:alert(1))")
    write_report(finetune_report(class_names=evil, tag=evil[1]), tmp_path, {})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    MESSAGES.append(("class names with HTML", "shown as text: &lt;script&gt;alert(1)&lt;/script&gt;; no script, no img"))


def test_a_weights_file_that_announces_absurd_shapes(tmp_path: Path) -> None:
    file = untrusted.absurd_safetensors(tmp_path / "translator.safetensors", {"format": LinearTranslator.FORMAT, "info": "{}"})
    with pytest.raises(ValueError, match=r"translator\.safetensors"):
        load_translator(file)
    untrusted.long_header_safetensors(file)
    with pytest.raises(ValueError, match=r"translator\.safetensors") as stop:
        load_translator(file)
    note("translator with a header of 2^62 bytes", stop.value, tmp_path)


def test_a_model_folder_with_absurd_weights_or_settings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Classifier.from_timm("test_resnet", pretrained=False, num_classes=3).save(tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()  # whoever forges a model forges these
    whole = (tmp_path / "model" / "config.json").read_text()
    settings = json.loads(whole)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, "num_classes": 10**13}))
    assert Classifier.from_timm(f"local-dir:{tmp_path / 'model'}").num_classes == 3  # what the weights have
    for key, value in (("model_args", {"layers": "many"}), ("architecture", "../../etc/passwd")):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(ValueError, match=str(tmp_path / "model")) as stop:
            Classifier.from_timm(f"local-dir:{tmp_path / 'model'}")
        note(f"model folder with {key}: {value}", stop.value, tmp_path)
    (tmp_path / "model" / "config.json").write_text(whole)
    untrusted.absurd_safetensors(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path / "model")) as stop:
        Classifier.from_timm(f"local-dir:{tmp_path / 'model'}")
    note("model folder with weights of 10^12 × 10^6", stop.value, tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    untrusted.pickled(tmp_path / "model" / "pytorch_model.bin", tmp_path / "touched")
    with pytest.raises(ValueError, match=str(tmp_path / "model")) as stop:
        Classifier.from_timm(f"local-dir:{tmp_path / 'model'}")
    note("model folder with a pickle", stop.value, tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_forged_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "position.json").write_text('{"step": 1, "epoch": 0, "batches": 1}')
    untrusted.pickled(tmp_path / "custom_checkpoint_0.pkl", tmp_path / "touched")
    with pytest.raises(Exception, match=r"[Ww]eights") as stop:
        _whole(tmp_path)
    note("checkpoint with a pickle", str(stop.value)[:200], tmp_path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("write", [untrusted.absurd_npz, untrusted.bomb_npz])
def test_rows_that_announce_more_than_they_hold(write: Callable[[Path], Path], tmp_path: Path) -> None:
    file = write(tmp_path / "rows.npz")
    with pytest.raises(DamagedFileError, match=r"rows\.npz is damaged: .*announces") as stop:
        read_rows(file)
    note(f"rows: {write.__name__}", stop.value, tmp_path)


def test_rows_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    import zipfile

    member = untrusted.pickled_npy(tmp_path / "AS.npy", tmp_path / "touched")
    with zipfile.ZipFile(tmp_path / "rows.npz", "w") as archive:
        archive.write(member, "AS.npy")
    with pytest.raises(DamagedFileError, match=r"rows\.npz") as stop:
        read_rows(tmp_path / "rows.npz")
    note("rows of pickled objects", stop.value, tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_cache_of_objects_or_of_another_shape_is_made_anew(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = load_splits(config(pictures)).test

    def encoded() -> np.ndarray:
        return np.asarray(encode_split(
            lambda images: images.mean((2, 3)), lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), part, 3,
            tmp_path / "cache", key={"encoder": "mean"}, progress=False,
        ))  # fmt: skip

    first = encoded().copy()  # not the mapped file, which is about to be overwritten
    file = next((tmp_path / "cache").glob("*.npy"))
    sidecar = json.loads(file.with_suffix(".json").read_text())
    whole = file.read_bytes()
    for what, write in (
        ("cache of pickled objects", lambda: untrusted.pickled_npy(file, tmp_path / "touched")),
        ("cache of another shape", lambda: np.save(file, np.zeros((3, 2), np.float32))),
        ("cache that is cut", lambda: file.write_bytes(whole[:-4])),
    ):
        write()
        forged = {**sidecar, "bytes": file.stat().st_size, "sha256": _sha(file)}  # as whoever forges one would
        file.with_suffix(".json").write_text(json.dumps(forged))
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(encoded(), first)
        assert str(file) in note(what, caplog.messages[-1], tmp_path).replace("FOLDER", str(tmp_path))
    assert not (tmp_path / "touched").exists()
    shutil.rmtree(tmp_path / "cache")


def _sha(file: Path) -> str:
    from singreg.utils import sha256_of_file

    return sha256_of_file(file)


def test_a_report_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[" * 100_000)
    with pytest.raises(DamagedFileError, match=r"report\.json is damaged") as stop:
        read_sealed(tmp_path / "report.json")
    note("report.json nested 100,000 deep", stop.value, tmp_path)
