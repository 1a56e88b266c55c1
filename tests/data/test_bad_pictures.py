"""Unreadable pictures, bombs, copies in two parts: named, replaced or dropped, never passed over in silence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image
from torchvision.transforms import ToTensor

from singreg.data import UnreadableImageError, load_parts, make_loader
from singreg.data.pictures import open_rgb
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
        load_parts(config(root, unlabeled=str(root / "pool")))
    assert all(str(path) in str(caught.value) for path in bad)


def test_unreadable_pictures_are_replaced_on_request(
    damaged: tuple[Path, list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    root, bad = damaged
    with caplog.at_level(logging.WARNING):
        parts = load_parts(config(root, unlabeled=str(root / "pool"), unreadable="skip", train_per_class=2, audit_per_class=2))
    assert "3 unreadable pictures are left out" in caplog.text
    assert all(str(path) in caplog.text for path in bad)
    assert per_class(parts.train) == [2, 2]
    assert per_class(parts.audit) == [2, 2]
    assert per_class(parts.test) == [2, 3]
    used = {name for part in (parts.bank, parts.audit, parts.test) for name in names(part)}
    assert not used & {str(path) for path in bad}
    assert len(used) == 2 * 4 + 5 + 4
    with pytest.raises(ValueError, match=r"1 unreadable ones not counted.*a has 4 for train 4"):
        load_parts(config(root, unreadable="skip", train_per_class=4, audit_per_class=1))


def test_a_decompression_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path, {"train": {"a": 3}, "validation": {"a": 2}})
    big = write_picture(root / "train" / "a" / "big.png", size=(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"big\.png \(DecompressionBombError"):
        load_parts(config(root))
    with pytest.raises(UnreadableImageError, match=r"big\.png"):
        open_rgb(big, str(big))


def test_a_picture_lost_or_damaged_after_loading_is_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"train": {"a": 3}, "validation": {"a": 2}})
    parts = load_parts(config(root))
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
        load_parts(config(root, audit_per_class=1))
    assert str(root / "train/a/copy.png") in str(caught.value)
    assert str(root / "validation/b/copy.png") in str(caught.value)
    with caplog.at_level(logging.WARNING):
        parts = load_parts(config(root, audit_per_class=1, duplicates="drop"))
    assert "1 pictures that are in another part too were dropped" in caplog.text
    assert per_class(parts.test) == [2, 3]
    assert len(parts.train) + len(parts.audit) == 12
    check_disjoint(parts)


def test_equal_pictures_within_one_side_are_no_leak(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"train": {"a": 4}, "validation": {"a": 2}})
    write_picture(root / "pool" / "one.png", 5)
    write_picture(root / "pool" / "two.png", 5)
    parts = load_parts(config(root, unlabeled=str(root / "pool"), unlabeled_to_audit=0.0))
    assert len(parts.bank) == len(parts.train) + 2
