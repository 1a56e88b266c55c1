"""The embedding cache: rows belong to pictures, the key follows what matters, damage is noticed, processes share the work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.data import FolderSplit, cached_embeddings, encode_split, verified
from singreg.utils import sha256_of_file
from tests.data.encoding import Encoder, encode_in_process, make_part, one_by_one


@pytest.fixture
def part(tmp_path: Path) -> FolderSplit:
    return make_part(tmp_path / "pictures")


def test_row_i_is_picture_i_read_only_and_computed_once(part: FolderSplit, tmp_path: Path) -> None:
    encoder = Encoder()
    rows = cached_embeddings(encoder, part, tmp_path / "cache", batch_size=4, progress=False)
    assert isinstance(rows, np.memmap)
    assert rows.dtype == np.float32
    assert rows.shape == (11, 4)
    assert np.allclose(rows, one_by_one(Encoder(), part), rtol=1e-5)
    assert encoder.seen == 11
    assert not rows.flags.writeable
    again = cached_embeddings(encoder, part, tmp_path / "cache", batch_size=7, progress=False)
    assert encoder.seen == 11
    assert np.array_equal(rows, again)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy"]


def test_the_key_follows_all_that_matters_and_not_the_place(part: FolderSplit, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def files_after(encoder: Encoder, which: Any) -> int:
        cached_embeddings(encoder, which, cache, progress=False)
        return len(list(cache.glob("*.npy")))

    assert files_after(Encoder(), part) == 1
    assert files_after(Encoder(), make_part(tmp_path / "moved")) == 1
    assert files_after(Encoder(1), part) == 2
    other = Encoder()
    other.preprocessing = {"size": [8, 8]}
    assert files_after(other, part) == 3
    assert files_after(Encoder(), part.subset(range(10, -1, -1))) == 4
    note = json.loads(next(cache.glob("*.json")).read_text())
    assert set(note["key"]) == {"format", "part", "shape", "weights", "preprocessing"}
    assert len(note["sha256"]) == 64


def truncate(data: Path) -> None:
    data.write_bytes(data.read_bytes()[:-8])


def flip_a_byte(data: Path) -> None:
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)


def other_shape(data: Path) -> None:
    sidecar = data.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace("11", "12"))


def no_sidecar(data: Path) -> None:
    data.with_suffix(".json").unlink()


def broken_sidecar(data: Path) -> None:
    data.with_suffix(".json").write_text('{"bytes": 3')


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, other_shape, no_sidecar, broken_sidecar])
def test_a_damaged_cache_is_named_and_made_anew(
    part: FolderSplit, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    expected = np.array(cached_embeddings(Encoder(), part, tmp_path / "cache", progress=False))
    (data,) = (tmp_path / "cache").glob("*.npy")
    damage(data)
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        rows = cached_embeddings(encoder, part, tmp_path / "cache", progress=False)
    assert encoder.seen == 11
    assert np.array_equal(rows, expected)
    assert str(data) in caplog.text
    assert np.array_equal(cached_embeddings(encoder, part, tmp_path / "cache", progress=False), expected)
    assert encoder.seen == 11


def test_a_second_pass_does_not_hash_the_file_again(part: FolderSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(verified, "SETTLED_NS", 0)
    monkeypatch.setattr(verified, "sha256_of_file", lambda path: (hashed.append(path), sha256_of_file(path))[1])
    for _ in range(4):
        cached_embeddings(Encoder(), part, tmp_path / "cache", progress=False)
    (data,) = (tmp_path / "cache").glob("*.npy")
    assert hashed == [data]
    flip_a_byte(data)
    encoder = Encoder()
    cached_embeddings(encoder, part, tmp_path / "cache", progress=False)
    assert encoder.seen == 11


def test_a_reader_keeps_its_rows_while_another_run_replaces_the_file(part: FolderSplit, tmp_path: Path) -> None:
    rows = cached_embeddings(Encoder(), part, tmp_path / "cache", progress=False)
    expected = np.array(rows)
    next((tmp_path / "cache").glob("*.json")).unlink()
    cached_embeddings(Encoder(), part, tmp_path / "cache", progress=False)
    assert np.array_equal(rows, expected)


def test_a_failed_run_leaves_nothing_behind(part: FolderSplit, tmp_path: Path) -> None:
    encoder = Encoder()
    encoder.embed_images = lambda images: images.flatten(1)[:, :4] / 0  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"not finite for 3 pictures: .*0\.png, .*1\.png, .*2\.png"):
        cached_embeddings(encoder, part, tmp_path / "cache", batch_size=3, progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_bad_row_is_named(part: FolderSplit, tmp_path: Path) -> None:
    encoder = Encoder()
    fine, target = encoder.embed_images, encoder.transform(part.image(7))

    def spoil(images: Tensor) -> Tensor:
        rows = fine(images)
        rows[(images == target).flatten(1).all(1), 2] = float("nan")
        return rows

    with pytest.raises(ValueError, match=r"not finite for 1 pictures: .*/7\.png$"):
        encode_split(spoil, encoder.transform, part, 4, tmp_path / "cache", key={"spoilt": 1}, batch_size=4, progress=False)


def test_wrong_width_and_empty_parts_are_refused(part: FolderSplit, tmp_path: Path) -> None:
    encoder = Encoder()
    with pytest.raises(ValueError, match=r"gave \(11, 4\) for 11 pictures, expected width 5"):
        encode_split(encoder.embed_images, encoder.transform, part, 5, tmp_path, key={}, progress=False)
    with pytest.raises(ValueError, match="part 'none' has no pictures"):
        cached_embeddings(encoder, part.subset([], "none"), tmp_path, progress=False)


def test_with_a_real_model(part: FolderSplit, tmp_path: Path) -> None:
    from singreg.models.vlm import VisionLanguageModel
    from tests.models.tiny_vlm import write_tiny_vlm

    vlm = VisionLanguageModel.from_open_clip(write_tiny_vlm(tmp_path / "vlm"))
    rows = cached_embeddings(vlm, part, tmp_path / "cache", batch_size=3, progress=False)
    expected = vlm.embed_images(torch.stack([vlm.transform(part.image(index)) for index in range(11)]))
    assert rows.shape == (11, vlm.dim)
    assert np.allclose(rows, expected.numpy(), atol=1e-5)


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(encode_in_process, args=(2, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    expected = one_by_one(Encoder(), make_part(tmp_path / "pictures", 5))
    assert np.allclose(first["rows"], expected, rtol=1e-5)
    assert first["rows"] == second["rows"]
    assert np.allclose(second["alone"], expected[3:4], rtol=1e-5)
    assert first["alone"] == second["alone"]
    assert first["seen"] == 3 + 1
    assert second["seen"] == 2 + 0 + 2
    assert "not finite for 3 pictures" in first["failure"]
    assert "encoding failed elsewhere: process 0: ValueError" in second["failure"]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".json", ".npy", ".npy"]
