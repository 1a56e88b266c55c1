"""Unreadable pictures, bombs, copies in two parts: named, replaced or dropped, never passed over in silence."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import ToTensor

from singreg.data import ImageSplit, SceneSplit, UnreadableImageError, load_splits, make_loader
from singreg.data.pictures import open_rgb
from singreg.data.scenes import sample_scenes
from singreg.data.selection import remove_copies
from tests.data.pictures_for_tests import check_disjoint, config, names, per_class, write_picture, write_tree


def damage(root: Path) -> list[Path]:
    """A truncated JPEG, a truncated PNG and a text file with a picture's name, one in every source."""
    whole = write_picture(root / "train" / "a" / "cut.jpg", size=(64, 48))
    whole.write_bytes(whole.read_bytes()[:900])
    second = write_picture(root / "validation" / "b" / "cut.png", size=(64, 48))
    second.write_bytes(second.read_bytes()[:-300])
    text = root / "pool" / "text.JPEG"
    text.write_text("not a picture")
    return [whole, second, text]


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, list[Path]]:
    root = write_tree(tmp_path, {"train": {"a": 4, "b": 5}, "validation": {"a": 2, "b": 3}, "pool": {"x": 4}})
    return root, damage(root)


def test_unreadable_pictures_stop_the_run_and_are_all_named(damaged: tuple[Path, list[Path]]) -> None:
    root, bad = damaged
    with pytest.raises(UnreadableImageError, match="3 unreadable pictures") as caught:
        load_splits(config(root, unlabeled=str(root / "pool")))
    assert all(str(path) in str(caught.value) for path in bad)


def test_unreadable_pictures_are_replaced_on_request(
    damaged: tuple[Path, list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    root, bad = damaged
    with caplog.at_level(logging.WARNING):
        parts = load_splits(config(root, unlabeled=str(root / "pool"), unreadable="skip", train_per_class=2, audit_per_class=2))
    assert "3 unreadable pictures are left out" in caplog.text
    assert all(str(path) in caplog.text for path in bad)
    assert per_class(parts.train) == [2, 2]
    assert per_class(parts.audit) == [2, 2]
    assert per_class(parts.test) == [2, 3]
    used = {name for part in (parts.bank, parts.audit, parts.test) for name in names(part)}
    assert not used & {str(path) for path in bad}
    assert len(used) == 2 * 4 + 5 + 4
    with pytest.raises(ValueError, match=r"1 unreadable ones not counted.*a has 4 for train 4"):
        load_splits(config(root, unreadable="skip", train_per_class=4, audit_per_class=1))


def test_a_decompression_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path, {"train": {"a": 3}, "validation": {"a": 2}})
    big = write_picture(root / "train" / "a" / "big.png", size=(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"big\.png \(DecompressionBombError"):
        load_splits(config(root))
    with pytest.raises(UnreadableImageError, match=r"big\.png"):
        open_rgb(big, str(big))


def test_a_picture_lost_or_damaged_after_loading_is_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"train": {"a": 3}, "validation": {"a": 2}})
    parts = load_splits(config(root))
    victim = Path(parts.test.identifier(1))
    victim.write_bytes(b"gone bad")
    loader = make_loader(parts.test, ToTensor(), 2)
    with pytest.raises(UnreadableImageError, match=f"cannot read the picture {victim}"):
        list(loader)
    victim.unlink()
    with pytest.raises(UnreadableImageError, match=f"cannot read the picture {victim}"):
        parts.test.image(1)


def test_equal_pictures_in_two_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tree(tmp_path, {"train": {"a": 6, "b": 6}, "validation": {"a": 2, "b": 2}})
    write_picture(root / "train" / "a" / "copy.png", 5)
    write_picture(root / "validation" / "b" / "copy.png", 5)
    with pytest.raises(ValueError, match="1 pictures are in two parts") as caught:
        load_splits(config(root, audit_per_class=1))
    assert str(root / "train/a/copy.png") in str(caught.value)
    assert str(root / "validation/b/copy.png") in str(caught.value)
    with caplog.at_level(logging.WARNING):
        parts = load_splits(config(root, audit_per_class=1, duplicates="drop"))
    assert "1 pictures that are in another part too were dropped" in caplog.text
    assert per_class(parts.test) == [2, 3]
    assert len(parts.train) + len(parts.audit) == 12
    check_disjoint(parts)


def test_copies_are_found_as_by_a_table_of_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def part(name: str, count: int) -> ImageSplit:
        digests = np.zeros((count, 32), np.uint8)
        digests[:, [0, 31]] = rng.integers(0, 8, (count, 2))  # many equal, many that differ in the last byte only
        made = SceneSplit(name, sample_scenes(count, seed=1))
        made.digests = digests
        return made

    groups = [("test", [part("test", 20)]), ("audit", [part("audit", 15), part("more", 0)]), ("bank", [part("train", 30), part("bank", 9)])]
    kept = remove_copies(groups, "drop")
    seen: set[bytes] = set()
    for (_, parts), left in zip(groups, kept, strict=True):
        for before, after in zip(parts, left, strict=True):
            expected = [bytes(digest) for digest in before.digests if bytes(digest) not in seen]
            assert [bytes(digest) for digest in after.digests] == expected
        seen |= {bytes(digest) for before in parts for digest in before.digests}
    assert sum(len(one) for left in kept for one in left) < 74


def test_errors_name_the_option_and_what_to_do(tmp_path: Path) -> None:
    counts = {f"c{number:02}": 1 for number in range(14)}
    root = write_tree(tmp_path, {"train": counts, "val": counts})
    with pytest.raises(FileNotFoundError, match=r"no split 'validation' in .*; folders there: train, val; set data\.test_split to one of"):
        load_splits(config(root))
    with pytest.raises(FileNotFoundError, match=r"no split 'training' in .*; set data\.train_split to one of them"):
        load_splits(config(root, train_split="training"))
    with pytest.raises(ValueError, match="too few pictures") as stop:
        load_splits(config(root, test_split="val", train_per_class=5))
    assert "c09 has 1" in str(stop.value)
    assert "c10" not in str(stop.value)
    assert str(stop.value).endswith(
        "and 4 more classes; lower data.train_per_class / data.audit_per_class, or set them to null"
    )
    with pytest.raises(ValueError, match=r"lower data\.test_per_class, or set it to null$"):
        load_splits(config(root, test_split="val", audit_per_class=0, test_per_class=3))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/pool \(data\.unlabeled\)"):
        load_splits(config(root, test_split="val", audit_per_class=0, unlabeled=str(root / "pool")))


def test_equal_pictures_within_one_side_are_no_leak(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"train": {"a": 4}, "validation": {"a": 2}})
    write_picture(root / "pool" / "one.png", 5)
    write_picture(root / "pool" / "two.png", 5)
    parts = load_splits(config(root, unlabeled=str(root / "pool"), unlabeled_to_audit=0.0))
    assert len(parts.bank) == len(parts.train) + 2
