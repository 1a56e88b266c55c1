"""Batches fixed by seed, epoch and index; image files of every kind, unreadable ones, copies of others."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from singreg.data.datasets import without_copies
from singreg.data.scenes import sample_scenes
from singreg.data.splits import ImageSplit, SceneSplit, TableSplit, make_loader
from tests.images import check_disjoint, contents, file_split, load, names, per_class, write_image, write_tree


def noisy(image: Image.Image) -> Tensor:
    """A transform that draws from all three random generators."""
    tensor = Compose([RandomCrop(4), RandomHorizontalFlip(), ToTensor()])(image)
    return tensor + random.random() + np.random.rand()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TableSplit:
    return file_split(tmp_path_factory.mktemp("images"), 9)


def test_every_image_comes_once_with_its_index(split: TableSplit) -> None:
    seen = list(make_loader(split, ToTensor(), 4))
    assert [len(batch[0]) for batch in seen] == [4, 4, 1]
    assert torch.cat([batch[2] for batch in seen]).tolist() == list(range(9))
    assert torch.cat([batch[1] for batch in seen]).tolist() == split.labels.tolist()
    assert torch.equal(seen[2][0][0], ToTensor()(split.image(8)))
    assert [len(batch[0]) for batch in make_loader(split, ToTensor(), 4, drop_last=True)] == [4, 4]
    assert list(make_loader(split.subset([]), ToTensor(), 4)) == []


def test_order_and_augmentation_depend_on_seed_and_epoch_only(split: TableSplit) -> None:
    def run(epoch: int, *, workers: int = 0, seed: int = 5, batch_size: int = 5) -> tuple[Tensor, Tensor]:
        torch.rand(1), np.random.rand()  # what others draw must not matter
        loader = make_loader(split, noisy, batch_size, shuffle=True, seed=seed, workers=workers)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen = list(loader)
        return torch.cat([batch[0] for batch in seen]), torch.cat([batch[2] for batch in seen])

    first, order = run(0)
    for other, other_order in (run(0), run(0, workers=2), run(0, batch_size=3)):
        assert torch.equal(first, other)
        assert torch.equal(order, other_order)
    assert sorted(order.tolist()) == list(range(9))
    assert not torch.equal(order, run(1)[1])
    assert not torch.equal(order, run(0, seed=6)[1])
    by_image = dict(zip(run(1)[1].tolist(), run(1)[0], strict=True))
    assert not torch.equal(by_image[int(order[0])], first[0])


def test_the_draws_are_those_of_earlier_versions(split: TableSplit) -> None:
    drawn = [int(index) for _, _, index in make_loader(split, ToTensor(), 1, shuffle=True, seed=5)]
    assert drawn == [5, 6, 8, 4, 0, 3, 2, 7, 1]
    first = next(iter(make_loader(split, noisy, 9, seed=5)))[0]
    assert first.sum().item() == pytest.approx(650.4228515625, rel=1e-6)


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb_and_upright(tmp_path: Path, mode: str) -> None:
    path, exif = tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 4), (200, 200, 200)).convert(mode).save(path, exif=exif)
    split = TableSplit.from_files("x", [str(path)], ["x"], [0])
    assert not split.examine([0])
    assert (split.image(0).mode, split.image(0).size) == ("RGB", (4, 5))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("16.png", RAMP.astype(np.uint16), None),
        ("16.tif", RAMP.astype(np.uint16), None),
        ("16.pgm", RAMP.astype(np.uint16), None),
        ("8.png", (RAMP / 257).astype(np.uint8), None),
        ("12.png", (RAMP / 16).astype(np.uint16), "16-bit values up to 4095"),
        ("white is zero.tif", (65535 - RAMP).astype(np.uint16), None),
        ("int32.tif", RAMP.astype(np.int32), "32-bit values"),
        ("float.tif", (RAMP / 65535).astype(np.float32), "32-bit values"),
    ],
)
def test_wide_values_are_scaled_or_refused(name: str, values: np.ndarray, words: str | None, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / name, **({"tiffinfo": {262: 0}} if "zero" in name else {}))
    split = TableSplit.from_files("x", [str(tmp_path / name)], ["x"], [0])
    assert split.examine([0]) == bool(words)
    if words:
        assert words in split.bad[0]
    else:
        assert np.array_equal(np.asarray(split.image(0))[..., 0], (RAMP / 257).astype(int)) or name != "8.png"
        assert np.abs(np.asarray(split.image(0), float)[..., 1] - RAMP / 257).max() <= 1


def colour_png(path: Path, most: int) -> None:
    """A grey ramp up to a value as a PNG file of 16 bits a colour, which PIL does not write."""
    rows = np.repeat((RAMP / 65535 * most).astype(">u2")[..., None], 3, axis=2).reshape(64, -1).view(np.uint8)
    pixels = np.pad(rows, ((0, 0), (1, 0)))  # each row begins with its filter, 0
    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(pixels.tobytes()), b"IEND": b""}
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts.items()]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_dark_values_are_judged_by_all_images_of_a_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [str(tmp_path / f"{most}.png") for most in (4095, 16383, 65535)]
    for path, most in zip(paths, (4095, 16383, 65535), strict=True):
        colour_png(Path(path), most)
    alone = TableSplit.from_files("x", paths, ["x"], [0] * 3)
    assert alone.examine([0])
    assert "(12 bits?)" in alone.bad[0]
    together = TableSplit.from_files("x", paths, ["x"], [0] * 3)
    assert not together.examine([0, 1])
    assert "16-bit images have values up to 16128 alone" in caplog.text
    assert not together.examine([2])
    assert np.abs(np.asarray(together.image(0), float) - RAMP[..., None] / 257 / 16).max() <= 1


def test_what_can_be_opened_is_used_and_the_rest_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tree(tmp_path / "data", {"train": {"a": 2}, "val": {"a": 1, "b": 1, "only here": 1}})
    write_tree(tmp_path, {"elsewhere": {"b": 4}})
    (root / "train/b").symlink_to(tmp_path / "elsewhere/b")  # a class folder may be a link
    (root / "train/a/again").symlink_to(root / "train/a")  # and a link may lead back
    for old, new in (("a/0.png", "a/one.jfif"), ("a/1.png", "a/two"), ("b/1.png", "b/x.weird")):
        (root / "train" / old).rename(root / "train" / new)
    for name in ("a/notes.txt", "loose.png", ".hidden"):
        (root / "train" / name).write_text("no image")
    splits = load(root, test_split="val")
    assert [per_class(split) for split in (splits.train, splits.audit)] == [[1, 2], [1, 2]]
    assert "2 files are no images in a class folder and are left out" in caplog.text
    assert "1 classes are in val alone and are left out:\n  only here" in caplog.text
    assert "hidden" not in caplog.text
    for deeper in (root / "train", root / "train/a"):
        with pytest.raises(FileNotFoundError, match=f"no split 'train' in .*set data.source to {root}$"):
            load(deeper, test_split="val")


def test_unreadable_images_stop_or_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tree(tmp_path, {"train": {"a": 4, "b": 5}, "validation": {"a": 2, "b": 3}, "pool": {"x": 4}})
    bad = [root / "train/a/cut.jpg", root / "validation/b/cut.png", root / "pool/text.JPEG"]
    for path in bad[:2]:
        path.write_bytes(write_image(path, size=(64, 48)).read_bytes()[:-300])
    bad[2].write_text("not an image")
    with pytest.raises(ValueError, match="3 images cannot be read") as caught:
        load(root, unlabeled=str(root / "pool"))
    assert all(str(path) in str(caught.value) for path in bad)
    for name in ("text2.png", "text3.png"):
        (root / "pool" / name).write_text("not an image")
    with pytest.raises(ValueError, match=r"(?s)5 images cannot be read.*and 2 more$"):
        load(root, unlabeled=str(root / "pool"))
    splits = load(root, unlabeled=str(root / "pool"), bad_images="drop", per_class={"train": 2, "audit": 2})
    assert all(str(path) in caplog.text for path in bad)
    assert [per_class(split) for split in (splits.train, splits.audit, splits.test)] == [[2, 2], [2, 2], [2, 3]]
    used = {*names(splits.bank), *names(splits.audit), *names(splits.test)}
    assert not used & {str(path) for path in bad}
    assert len(used) == 2 * 4 + 5 + 4
    with pytest.raises(ValueError, match=r"(?s)2 unreadable ones not counted.*a has 4 for train 4"):
        load(root, bad_images="drop", per_class={"train": 4, "audit": 1})


def test_images_that_grow_or_get_lost_after_loading_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = file_split(tmp_path, 2)
    victim = Path(split.identifier(1))
    for damage in (lambda: write_image(victim, size=(60, 50)), lambda: victim.write_bytes(b"gone bad"), victim.unlink):
        damage()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a decompression bomb
        with pytest.raises(ValueError, match=f"cannot read the image {victim}"):
            split.image(1)


def test_equal_images_in_two_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tree(tmp_path, {"train": {"a": 6, "b": 6}, "validation": {"a": 2, "b": 2}})
    copies = [write_image(root / place / "copy.png", 5) for place in ("train/a", "validation/b")]
    with pytest.raises(ValueError, match="1 images are copies") as caught:
        load(root, per_class={"audit": 1})
    assert all(str(copy) in str(caught.value) for copy in copies)
    splits = load(root, per_class={"audit": 1}, bad_images="drop")
    assert "1 images are copies of another split's (named second) and are left out" in caplog.text
    assert per_class(splits.test) == [2, 3]
    assert len(splits.train) + len(splits.audit) == 12
    check_disjoint(splits)
    for name in ("one", "two"):
        write_image(root / "pool" / f"{name}.png", 6)
    kept = load(root, unlabeled=str(root / "pool"), unlabeled_to_audit=0.0, bad_images="drop")
    assert len(kept.bank) == len(kept.train) + 2, "copies within one side are no leak"


def test_copies_are_found_as_by_a_set_of_all() -> None:
    rng = np.random.default_rng(0)

    def split(name: str, count: int) -> ImageSplit:
        made = SceneSplit(name, sample_scenes(count, seed=1))
        made.digests = np.zeros((count, 32), np.uint8)
        made.digests[:, [0, 31]] = rng.integers(0, 8, (count, 2))  # many equal, many that differ in the last byte only
        return made

    groups = [[split("test", 20)], [split("audit", 15), split("more", 0)], [split("train", 30), split("bank", 9)]]
    seen: set[bytes] = set()
    for before, after in zip(groups, without_copies(groups, drop=True), strict=True):
        for one, left in zip(before, after, strict=True):
            assert [bytes(d) for d in left.digests] == [bytes(d) for d in one.digests if bytes(d) not in seen]
        seen |= {content for one in before for content in contents(one)}
