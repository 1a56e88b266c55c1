"""The pass over a split: features in order, every image once over processes, bad features named, the cache."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, cached_features, gathered, iterate_features, process_share
from tests import toy
from tests.processes import run_same

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
