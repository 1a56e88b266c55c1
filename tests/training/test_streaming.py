"""The loop's translator kept current: folds of the bank, streamed sums that fade, several processes, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from singreg.analysis.old_fitting import fold_statistics, standardization
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.training.config import FinetuneConfig
from singreg.training.streaming import LoopTranslator
from singreg.workbench.run import make_accelerator
from tests.processes import run_processes
from tests.training.small_arm import (
    COUNT,
    DIM,
    WIDTH,
    Arm,
    Pixels,
    Stop,
    as_double,
    small_classifier,
    small_keeper,
    small_sing,
)
from tests.training.test_arm import same_bits


def features_of(classifier: Classifier, part: Pixels) -> torch.Tensor:
    classifier.eval()
    with torch.no_grad():
        return classifier.features(torch.stack([as_double(part.image(index)) for index in range(COUNT)])).float()


def keeper_with(**options: Any) -> tuple[LoopTranslator, Classifier, Any]:
    AcceleratorState._reset_state(True)
    config = FinetuneConfig()
    for name, value in options.items():
        setattr(config.translator, name, value)
    classifier = small_classifier()
    sing = small_sing(classifier)
    return small_keeper(sing, Pixels(), config, make_accelerator(seed=0)), classifier, sing


def fitted(features: torch.Tensor, targets: np.ndarray, classifier: Classifier, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The slow way: weighted centred normal equations, in the two blocks of the head."""
    f, z = features.double(), torch.from_numpy(np.asarray(targets)).double()
    w = torch.ones(len(f), dtype=torch.float64) if weights is None else weights
    f, z = f - (w @ f) / w.sum(), z - (w @ z) / w.sum()
    space = NullSpace.from_weight(classifier.weight)
    row = space.basis @ space.basis.T
    blocks = [row, torch.eye(WIDTH, dtype=torch.float64) - row]
    scatter = f.T @ (w[:, None] * f)
    energy = [((b @ scatter @ b) @ (b @ scatter @ b)).trace() / (b @ scatter @ b).trace() / w.sum() for b in blocks]
    scale = sum(b / e.sqrt() for b, e in zip(blocks, energy, strict=True))
    g = f @ scale
    scaled = g.T @ (w[:, None] * g)
    penalty = 0.01 * scaled.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    return (scale @ torch.linalg.solve(scaled + penalty, g.T @ (w[:, None] * z))).T.float()


def test_folds_are_disjoint_and_together_the_whole_bank() -> None:
    keeper, classifier, _ = keeper_with()
    parts = fold_statistics(classifier, keeper.bank, keeper.embeddings, 3, settings=keeper.settings)
    assert sorted(int(part.count) for part in parts) == [14, 14, 15]
    features = features_of(classifier, Pixels())
    whole = RidgeStatistics(WIDTH, DIM).update(features, torch.from_numpy(keeper.embeddings))
    merged = RidgeStatistics(WIDTH, DIM)
    for part in parts:
        merged.merge(part)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
    again = fold_statistics(classifier, keeper.bank, keeper.embeddings, 3, seed=1, settings=keeper.settings)
    assert not torch.allclose(parts[0].f, again[0].f), "another seed cuts elsewhere"


def test_with_folds_the_loss_reads_each_share_and_reports_the_whole() -> None:
    keeper, classifier, sing = keeper_with(folds=3)
    keeper.refresh(classifier, sing)
    features = features_of(classifier, Pixels())
    fold = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)) % 3
    assert len(sing.translators) == 3
    for number, (matrix, _) in enumerate(sing.translators):
        expected = fitted(features[fold == number], keeper.embeddings[(fold == number).numpy()], classifier)
        torch.testing.assert_close(matrix, expected, atol=1e-4, rtol=1e-4)
    whole = fitted(features, keeper.embeddings, classifier)
    torch.testing.assert_close(keeper.current(sing).matrix, whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sing.matrix, whole, atol=1e-2)


def test_without_folds_the_losses_translator_is_the_reported_one() -> None:
    keeper, classifier, sing = keeper_with()
    keeper.refresh(classifier, sing)
    assert not keeper.stateful
    assert torch.equal(keeper.current(sing).matrix, sing.matrix)
    torch.testing.assert_close(sing.matrix, fitted(features_of(classifier, Pixels()), keeper.embeddings, classifier), atol=1e-4, rtol=1e-4)


def test_streamed_sums_are_a_weighted_regression_in_which_old_features_fade() -> None:
    keeper, classifier, sing = keeper_with(stream_every=2, forgetting=0.8)
    keeper.refresh(classifier, sing)
    bank, first = features_of(classifier, Pixels()), sing.matrix.clone()
    seen, targets, weights = [bank], [keeper.embeddings], [torch.ones(COUNT, dtype=torch.float64)]
    for step in range(1, 5):
        indices = torch.randperm(COUNT, generator=torch.Generator().manual_seed(step))[:8]
        moved = bank[indices] + 0.3 * torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        keeper.observe(moved, indices)
        seen, targets = [*seen, moved], [*targets, keeper.embeddings[indices.numpy()]]
        weights = [*weights, torch.ones(8, dtype=torch.float64)]
        before = sing.matrix.clone()
        keeper.step_ended(step, classifier, sing)
        if step % 2:
            assert torch.equal(sing.matrix, before)
        else:
            expected = fitted(torch.cat(seen), np.concatenate(targets), classifier, torch.cat(weights))
            torch.testing.assert_close(sing.matrix, expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(expected, first, atol=1e-3)
        weights = [0.8 * weight for weight in weights]


@pytest.mark.parametrize("options", [{"folds": 3}, {"stream_every": 2, "forgetting": 0.9}], ids=["folds", "streaming"])
@pytest.mark.parametrize("augmentation", ["none", "flip"])
def test_a_stopped_arm_finds_its_translators_again(options: dict[str, Any], augmentation: str, tmp_path: Path) -> None:
    whole = Arm(tmp_path / "whole", translator=options, augmentation=augmentation)
    expected = whole.run()
    with pytest.raises(Stop):
        Arm(tmp_path / "stopped", translator=options, augmentation=augmentation).run(stop_after=8)
    again = Arm(tmp_path / "stopped", translator=options, augmentation=augmentation)
    assert same_bits(again.run(resume=True), expected)
    assert again.keeper is not None and whole.keeper is not None  # noqa: PT018
    assert same_bits(again.keeper.state_dict(), whole.keeper.state_dict())
    assert again.sing is not None and whole.sing is not None  # noqa: PT018
    assert same_bits(again.sing.state_dict(), whole.sing.state_dict())


def test_streaming_reads_the_training_pictures_own_embeddings(tmp_path: Path) -> None:
    """With a backbone that does not move and nothing forgotten, streaming two epochs counts pictures up to three times."""
    arm = Arm(
        tmp_path, dropout=0.0, tuning="head", translator={"stream_every": 1, "forgetting": 1.0, "refreshes": 0}, augmentation="none"
    )
    arm.run()
    assert arm.keeper is not None
    trained = arm.part.asked[COUNT:]
    times = 1 + np.bincount(trained, minlength=COUNT)
    features = features_of(small_classifier(dropout=0.0), Pixels())
    repeated = np.repeat(np.arange(COUNT), times)
    expected = RidgeStatistics(WIDTH, DIM).update(features[repeated], torch.from_numpy(arm.keeper.embeddings[repeated]))
    assert int(expected.count) == COUNT + 80
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(arm.keeper.statistics.state_dict()[name], value, atol=1e-4, rtol=1e-5)


def _in_process(rank: int, world: int, folder: str, stop_after: int | None, resume: bool) -> Any:
    arm = Arm(Path(folder), dropout=0.0, translator={"stream_every": 2, "forgetting": 0.9})
    try:
        weights = arm.run(stop_after=stop_after, resume=resume)
    except Stop:
        return None
    assert arm.keeper is not None
    return weights, arm.keeper.state_dict()


def test_two_processes_stream_what_one_streams_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    _, alone = _in_process(0, 1, str(tmp_path / "one"), None, False)
    together = run_processes(2, _in_process, str(tmp_path / "two"), None, False)
    for weights, state in together:
        assert same_bits(state, together[0][1])
        assert same_bits(weights, together[0][0])
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, atol=1e-3, rtol=1e-4)
    # Stopped between two solutions, where half of the window's batches were another process's.
    assert run_processes(2, _in_process, str(tmp_path / "stopped"), 4, False) == [None, None]
    for (weights, state), straight in zip(run_processes(2, _in_process, str(tmp_path / "stopped"), None, True), together, strict=True):
        assert same_bits(weights, straight[0])
        assert same_bits(state, straight[1])


def test_words_for_the_scale_are_checked() -> None:
    classifier = small_classifier()
    assert standardization(classifier, "features", "logits") is True
    assert standardization(classifier, "no", "logits") is False
    with pytest.raises(ValueError, match='"blocks", "features" or "no", got \'rows\''):
        standardization(classifier, "rows", "logits")
