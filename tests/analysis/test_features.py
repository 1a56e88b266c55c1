"""The pass over a part: the model's own features in order, every picture once over processes, bad features named, the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, PassSettings, cached_features, gathered, iterate_features
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from tests.analysis import in_processes, toy
from tests.processes import run_processes


def walk(
    model: Classifier, part: ImageSplit, settings: PassSettings = toy.QUIET, embeddings: np.ndarray | None = None
) -> list[FeatureBatch]:
    z = toy.embeddings(len(part)) if embeddings is None else embeddings
    return list(iterate_features(model, part, z, settings, "test"))


def joined(batches: list[FeatureBatch], name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batches_hold_the_models_features_and_the_pictures_own_rows(batch_size: int) -> None:
    model, part = toy.classifier(), toy.ToyPart(11, unlabelled=(3,))
    batches = walk(model, part, replace(toy.QUIET, batch_size=batch_size))
    assert [len(batch.labels) for batch in batches] == [min(batch_size, 11 - i) for i in range(0, 11, batch_size)]
    expected = toy.features(model, part)
    torch.testing.assert_close(joined(batches, "features"), expected.float())
    torch.testing.assert_close(joined(batches, "logits"), (expected @ model.weight.double().T + model.bias).float())
    assert joined(batches, "indices").tolist() == list(range(11))
    assert joined(batches, "labels").tolist() == part.labels.tolist()
    np.testing.assert_array_equal(joined(batches, "embeddings").numpy(), toy.embeddings(11))
    assert not joined(batches, "features").requires_grad


@pytest.mark.parametrize(("rows", "sizes"), [(1, [4, 4, 3]), (5, [8, 3]), (8, [8, 3]), (9, [11]), (512, [11])])
def test_gathered_batches_hold_the_same_pictures_in_order(rows: int, sizes: list[int]) -> None:
    model, part = toy.classifier(), toy.ToyPart(11, unlabelled=(3,))
    small, large = walk(model, part), list(gathered(walk(model, part), rows))
    assert [len(batch.indices) for batch in large] == sizes
    for name in ("features", "logits", "embeddings", "labels", "indices"):
        assert torch.equal(joined(small, name), joined(large, name))
    assert list(gathered([], rows)) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_pass_runs_in_eval_mode_and_puts_the_mode_back_even_when_left_early(training: bool) -> None:
    model, part = toy.classifier(), toy.ToyPart(11)
    model.train(training)
    passing = iterate_features(model, part, toy.embeddings(11), toy.QUIET, "test")
    first = next(passing)
    passing.close()
    assert model.training == training
    assert model.model[2].training == training
    torch.testing.assert_close(first.features, toy.features(toy.classifier(), part)[:4].float())  # no dropout in it


def test_a_feature_that_is_not_finite_names_its_pictures() -> None:
    model, part = toy.classifier(), toy.ToyPart(11)
    part.pixels.clip(1, out=part.pixels)
    part.pixels[[6, 9]] = 0
    with torch.no_grad():  # infinity times 0 is NaN, so for the two black pictures; tanh makes 1 of the others' infinity
        model.model[1].weight.fill_(float("inf"))
    model.train()
    with pytest.raises(ValueError, match="toy gives features that are not finite for 1 pictures: toy-6"):
        walk(model, part)
    with pytest.raises(ValueError, match="for 2 pictures: toy-6, toy-9"):
        walk(model, part, replace(toy.QUIET, batch_size=11))
    assert model.training


def test_embeddings_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="part 'toys' has 11 pictures but 10 embeddings"):
        walk(toy.classifier(), toy.ToyPart(11), embeddings=toy.embeddings(10))


@pytest.mark.parametrize(("world", "count"), [(2, 11), (3, 11), (3, 2)], ids=["odd over 2", "odd over 3", "one idle"])
@pytest.mark.parametrize("stored", [False, True])
def test_processes_read_every_picture_once(world: int, count: int, stored: bool, tmp_path: Path) -> None:
    answers = run_processes(world, in_processes.walk, count, str(tmp_path) if stored else None)
    seen = [index for indices, _, _ in answers for index in indices]
    assert len(seen) == count
    assert set(seen) == set(range(count))
    assert all(indices == share for indices, _, share in answers)
    expected = toy.features(toy.classifier(), toy.ToyPart(count)).float()
    for indices, features, _ in answers:
        torch.testing.assert_close(features, expected[indices])


def test_the_cache_gives_the_same_batches_and_computes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, part = toy.classifier(), toy.ToyPart(11, unlabelled=(3,))
    model.train()
    passes: list[int] = []
    forward = model.features_and_logits
    monkeypatch.setattr(model, "features_and_logits", lambda x: passes.append(len(x)) or forward(x))
    stored = replace(toy.QUIET, cache=str(tmp_path))
    first, plain = walk(model, part, stored), walk(toy.classifier(), part)
    assert sum(passes) == 11
    for name in ("features", "logits", "embeddings", "labels", "indices"):
        torch.testing.assert_close(joined(first, name), joined(plain, name))
    assert model.training
    walk(model, part, stored)
    np.testing.assert_array_equal(cached_features(model, part, str(tmp_path), progress=False), joined(first, "features"))
    assert sum(passes) == 11  # read back
    with torch.no_grad():
        model.model[1].bias += 1
    changed = walk(model, part, stored)
    assert sum(passes) == 22  # other weights are another entry
    assert (joined(changed, "features") - joined(first, "features")).abs().max() > 0.01
    with torch.no_grad():
        model.head.weight.mul_(2)
    headed = walk(model, part, stored)
    assert sum(passes) == 22  # the head has no part in its own input
    torch.testing.assert_close(joined(headed, "features"), joined(changed, "features"))
    assert not torch.equal(joined(headed, "logits"), joined(changed, "logits"))  # which is read by the head as it is now


def test_the_cache_names_a_picture_whose_feature_is_not_finite(tmp_path: Path) -> None:
    model, part = toy.classifier(), toy.ToyPart(5)
    with torch.no_grad():
        model.model[1].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite for \d pictures: toy-0"):
        walk(model, part, replace(toy.QUIET, cache=str(tmp_path)))
