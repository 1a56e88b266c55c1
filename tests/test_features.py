"""Passes over a split, for embeddings and features: row i is image i, once over processes, and what the cache keeps."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, cached_features, gathered, iterate_features, process_share
from singreg.data import embeddings
from singreg.data.embeddings import PassSettings, cached_embeddings, encode_split
from singreg.data.splits import TableSplit
from tests import toy
from tests.images import file_split, to_tensor
from tests.processes import run_processes, run_same


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


@patch.object(embeddings, "BLOCK", 4)
def test_a_killed_run_goes_on_at_its_last_block(split: TableSplit, cache: Path) -> None:
    killed, again = Encoder(1), Encoder(1)
    whole = torch.stack([to_tensor(split.image(index)) for index in range(11)]).flatten(1) @ again.weight

    def until_the_last_block(images: Tensor) -> Tensor:
        if killed.seen == 8:
            raise KeyboardInterrupt
        return Encoder.embed_images(killed, images)

    killed.embed_images = until_the_last_block  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        embed(killed, split)
    assert np.allclose(embed(again, split), whole, rtol=1e-5)
    assert again.seen == 3
    assert len(list(cache.iterdir())) == 1


def _encode_in_a_group(rank: int, world: int, folder: str, count: int, block: int) -> tuple[int, bytes, str]:
    split, encoder = file_split(Path(folder) / f"images-{rank}", count), Encoder()
    elsewhere = patch.dict("os.environ", SINGREG_CACHE=f"{folder}/cache-{world}")
    with elsewhere, patch.object(embeddings, "BLOCK", block):  # the process serves other tests too
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


@pytest.mark.parametrize(("count", "block"), [(1, 99), (11, 99), (11, 6)])
def test_processes_share_the_work_to_the_same_bits(tmp_path: Path, count: int, block: int) -> None:
    _, expected, _ = _encode_in_a_group(0, 1, str(tmp_path), count, 99)
    for world in (2, 3):
        found = run_processes(world, _encode_in_a_group, str(tmp_path), count, block)
        assert [rows for _, rows, _ in found] == [expected] * world
        assert sum(seen for seen, _, _ in found) == count
        assert f"not finite for {min(count, block)} images" in found[0][2]
        assert "embedding failed elsewhere: process 0: ValueError" in found[1][2]
        assert len(list((tmp_path / f"cache-{world}").iterdir())) == 1


FIELDS = ("features", "logits", "embeddings", "labels", "indices")


def walk(model=None, split=None, settings=toy.QUIET, embeddings=None) -> list[FeatureBatch]:  # type: ignore[no-untyped-def]
    split = split or toy.ToySplit(11, unlabelled=(3,))
    z = toy.embeddings(len(split)) if embeddings is None else embeddings
    return list(iterate_features(model or toy.classifier(), split, z, settings, "test"))


def joined(batches: list[FeatureBatch], name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batches_hold_the_models_features_and_the_images_rows(batch_size: int) -> None:
    model, split = toy.classifier(), toy.ToySplit(11, unlabelled=(3,))
    batches = walk(model, split, replace(toy.QUIET, batch_size=batch_size))
    assert [len(batch.labels) for batch in batches] == [min(batch_size, 11 - i) for i in range(0, 11, batch_size)]
    expected = toy.features(model, split)
    torch.testing.assert_close(joined(batches, "features"), expected.float())
    logits = expected @ model.weight.double().T + model.bias
    torch.testing.assert_close(joined(batches, "logits"), logits.float())
    assert joined(batches, "indices").tolist() == list(range(11))
    assert joined(batches, "labels").tolist() == split.labels.tolist()
    np.testing.assert_array_equal(joined(batches, "embeddings").numpy(), toy.embeddings(11))
    assert not joined(batches, "features").requires_grad


@pytest.mark.parametrize(("rows", "sizes"), [(1, [4, 4, 3]), (5, [8, 3]), (9, [11])])
def test_gathered_batches_hold_the_same_images_in_order(rows: int, sizes: list[int]) -> None:
    small, large = walk(), list(gathered(walk(), rows))
    assert [len(batch.indices) for batch in large] == sizes
    assert all(torch.equal(joined(small, name), joined(large, name)) for name in FIELDS)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_comes_back_even_when_left_early(training: bool) -> None:
    model, split = toy.classifier().train(training), toy.ToySplit(11)
    passing = iterate_features(model, split, toy.embeddings(11), toy.QUIET, "test")
    first = next(passing)
    passing.close()
    assert model.training == model.model[2].training == training
    torch.testing.assert_close(first.features, toy.features(toy.classifier(), split)[:4].float())  # no dropout in it


def test_bad_features_are_named_and_embeddings_must_be_as_many(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="11 images but 10 embeddings"):
        walk(embeddings=toy.embeddings(10))
    model, split = toy.classifier().train(), toy.ToySplit(11)
    split.pixels.clip(1, out=split.pixels)
    split.pixels[[6, 9]] = 0
    with torch.no_grad():  # infinity times 0 is NaN, so for the two black images; tanh makes 1 of the others' infinity
        model.model[1].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="toy-6"):
        walk(model, split)
    with pytest.raises(ValueError, match="toy-6, toy-9"):
        walk(model, split, replace(toy.QUIET, batch_size=11))
    assert model.training
    with pytest.raises(ValueError, match="toy-6"):
        walk(model, split, replace(toy.QUIET, cache=str(tmp_path)))


def share_of(count: int, cache: str | None) -> tuple[list[int], Tensor, list[int]]:
    batches = walk(split=toy.ToySplit(count), settings=replace(toy.QUIET, cache=cache))
    features = torch.cat([torch.zeros(0, toy.WIDTH), *[batch.features for batch in batches]])
    return [i for batch in batches for i in batch.indices.tolist()], features, process_share(count).tolist()


@pytest.mark.parametrize(("world", "count"), [(2, 11), (3, 11), (3, 2)], ids=["odd over 2", "odd over 3", "one idle"])
@pytest.mark.parametrize("stored", [False, True])
def test_processes_read_every_image_once(world: int, count: int, stored: bool, tmp_path: Path) -> None:
    answers = run_same(world, share_of, count, str(tmp_path) if stored else None)
    assert sorted(index for indices, _, _ in answers for index in indices) == list(range(count))
    expected = toy.features(toy.classifier(), toy.ToySplit(count)).float()
    for indices, features, share in answers:
        assert indices == share
        torch.testing.assert_close(features, expected[indices])


def test_the_cache_gives_the_same_batches_and_computes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = toy.classifier().train(), list[int]()
    forward = model.features_and_logits
    monkeypatch.setattr(model, "features_and_logits", lambda x: passes.append(len(x)) or forward(x))
    stored = replace(toy.QUIET, cache=str(tmp_path))
    first, plain = walk(model, settings=stored), walk()
    for name in FIELDS:
        torch.testing.assert_close(joined(first, name), joined(plain, name))
    assert model.training
    walk(model, settings=stored)
    kept = cached_features(model, toy.ToySplit(11, unlabelled=(3,)), stored)
    np.testing.assert_array_equal(kept, joined(first, "features"))
    assert sum(passes) == 11  # read back
    with torch.no_grad():
        model.model[1].bias += 1
    changed = walk(model, settings=stored)
    assert sum(passes) == 22  # other weights are another entry
    assert (joined(changed, "features") - joined(first, "features")).abs().max() > 0.01
    with torch.no_grad():
        model.head.weight.mul_(2)
    headed = walk(model, settings=stored)
    assert sum(passes) == 22  # the head has no part in its own input
    torch.testing.assert_close(joined(headed, "features"), joined(changed, "features"))
    assert not torch.equal(joined(headed, "logits"), joined(changed, "logits"))  # read by the head as it is now
