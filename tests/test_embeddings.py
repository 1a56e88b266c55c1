"""The embedding cache: row i is image i, the key follows what matters, processes share the work to the same bits."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.data.embeddings import PassSettings, cached_embeddings, encode_split
from singreg.data.splits import TableSplit
from tests.images import file_split, to_tensor
from tests.processes import run_processes


class Encoder:
    """A fixed linear map of the pixels, which counts the images it has seen."""

    def __init__(self, seed: int = 0) -> None:
        self.weight = torch.randn(9 * 7 * 3, 4, generator=torch.Generator().manual_seed(seed))
        self.weights_hash, self.dim = f"weights-{seed}", 4
        self.preprocessing: dict[str, Any] = {"size": [9, 7]}
        self.transform: Callable[[Any], Tensor] = to_tensor
        self.seen = 0

    def embed_images(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1) @ self.weight


def embed(encoder: Encoder, split: Any, **options: Any) -> np.ndarray:
    return cached_embeddings(encoder, split, progress=False, **options)


@pytest.fixture
def split(tmp_path: Path) -> TableSplit:
    return file_split(tmp_path / "images")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SINGREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_row_i_is_image_i_read_only_and_computed_once(split: TableSplit, cache: Path) -> None:
    encoder = Encoder()
    rows = embed(encoder, split, batch_size=4)
    assert isinstance(rows, np.memmap)
    assert (rows.dtype, rows.shape, rows.flags.writeable) == (np.float32, (11, 4), False)
    images = torch.stack([to_tensor(split.image(index)) for index in range(len(split))])
    assert np.allclose(rows, images.flatten(1) @ encoder.weight, rtol=1e-5)
    again = embed(encoder, split, batch_size=7)
    assert encoder.seen == 11
    assert np.array_equal(rows, again)
    assert len(list(cache.iterdir())) == 1


def test_the_key_follows_all_that_matters_and_not_the_place(split: TableSplit, tmp_path: Path, cache: Path) -> None:
    def files_after(encoder: Encoder, which: Any) -> int:
        embed(encoder, which)
        return len(list(cache.iterdir()))

    assert files_after(Encoder(), split) == 1
    assert files_after(Encoder(), file_split(tmp_path / "moved")) == 1
    assert files_after(Encoder(1), split) == 2
    other = Encoder()
    other.preprocessing = {"size": [8, 8]}
    assert files_after(other, split) == 3
    assert files_after(Encoder(), split.subset(range(10, -1, -1))) == 4


def test_a_damaged_file_is_made_anew(split: TableSplit, cache: Path) -> None:
    expected, file = np.array(embed(Encoder(), split)), next(cache.iterdir())
    whole, pickled = file.read_bytes(), pickle.dumps(Path("never made"))
    truncated, other_shape = lambda: file.write_bytes(whole[:-8]), lambda: np.save(file, expected[:9])
    for damage in (truncated, other_shape, lambda: file.write_bytes(pickled), file.unlink):
        damage()
        encoder = Encoder()
        for _ in range(2):
            assert np.array_equal(embed(encoder, split), expected)
            assert encoder.seen == 11


def test_a_failed_run_names_the_image_and_leaves_nothing(split: TableSplit, cache: Path) -> None:
    encoder = Encoder()
    target = encoder.transform(split.image(7))

    def spoil(images: Tensor) -> Tensor:
        return encoder.embed_images(images) / (images != target).flatten(1).any(1, keepdim=True)

    settings = PassSettings(4, progress=False, cache=str(cache))
    with pytest.raises(ValueError, match=r"not finite for 1 images: .*/7\.png$"):
        encode_split(spoil, encoder.transform, split, 4, {"spoilt": 1}, "x", settings)
    assert list(cache.iterdir()) == []
    with pytest.raises(ValueError, match="split 'none' has no images"):
        embed(encoder, split.subset([], "none"))


def _encode_in_a_group(rank: int, world: int, folder: str, count: int) -> tuple[int, bytes, str]:
    split, encoder = file_split(Path(folder) / f"images-{rank}", count), Encoder()
    os.environ["SINGREG_CACHE"] = f"{folder}/cache-{world}"
    rows = embed(encoder, split, batch_size=3)
    seen = encoder.seen
    if rank == 0:
        encoder.embed_images = lambda images: images.flatten(1)[:, :4] / 0  # type: ignore[method-assign]
    encoder.weights_hash = "failing"
    try:
        embed(encoder, split)
        failure = "none"
    except ValueError as error:
        failure = str(error)
    return seen, rows.tobytes(), failure


@pytest.mark.parametrize("count", [1, 11])
def test_processes_share_the_work_to_the_same_bits(tmp_path: Path, count: int) -> None:
    _, expected, _ = _encode_in_a_group(0, 1, str(tmp_path), count)
    for world in (2, 3):
        found = run_processes(world, _encode_in_a_group, str(tmp_path), count)
        assert [rows for _, rows, _ in found] == [expected] * world
        assert sum(seen for seen, _, _ in found) == count
        assert f"not finite for {count} images" in found[0][2]
        assert "embedding failed elsewhere: process 0: ValueError" in found[1][2]
        assert len(list((tmp_path / f"cache-{world}").iterdir())) == 1
