"""Training the head on stored features: the obvious loop, the same by seed, constraints, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.models.edits import constrain_to_rows, release_rows
from singreg.nullspace import NullSpace
from singreg.training.config import FinetuneConfig
from singreg.training.head_only import batches, train_head
from singreg.training.loop import Schedule, TrainingFailed
from singreg.translator import LinearTranslator
from tests.training.small_arm import small_classifier

COUNT = 40


def network() -> Classifier:
    return small_classifier().float().eval()


def data(classifier: Classifier) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = np.arange(COUNT) % classifier.num_classes
    return (rng.standard_normal((COUNT, classifier.feature_dim)) + labels[:, None]).astype(np.float32), labels


def config(**training: float) -> FinetuneConfig:
    found = FinetuneConfig(seed=1)
    for name, value in {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "head_factor": 2.0, **training}.items():
        setattr(found.training, name, value)
    return found


def sing_of(classifier: Classifier, terms: dict[str, float]) -> SingLoss:
    generator = torch.Generator().manual_seed(5)
    texts = torch.nn.functional.normalize(torch.randn(classifier.num_classes, 6, generator=generator), dim=1)
    matrix = torch.randn(6, classifier.feature_dim, generator=generator)
    return SingLoss(classifier, LinearTranslator(matrix, torch.zeros(6)), texts, weight=1.0, terms=terms)


def test_it_is_the_obvious_loop() -> None:
    classifier = network()
    features, labels = data(classifier)
    weight, bias = (each.detach().clone().requires_grad_() for each in (classifier.weight, classifier.bias))  # type: ignore[union-attr]
    wanted, backbone = config(), {k: v.clone() for k, v in classifier.state_dict().items()}
    schedule = Schedule.from_config(wanted, COUNT)
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": wanted.training.weight_decay}, {"params": [bias], "weight_decay": 0.0}], lr=2e-2
    )
    for step, chosen in enumerate(batches(COUNT, 8, 3, seed=1)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * schedule.learning_rate_factor(step)
        logits = torch.from_numpy(features[chosen]) @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight, bias], wanted.training.clip)
        optimizer.step()
    trained = train_head("a", classifier, None, features, labels, wanted)
    torch.testing.assert_close(trained.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained.bias, bias, rtol=1e-5, atol=1e-6)
    moved = [key for key, value in trained.state_dict().items() if not torch.equal(value, backbone[key])]
    assert moved
    assert all(key.startswith(f"model.{classifier.head_name}.") for key in moved)
    assert not trained.training


def test_every_epoch_has_an_order_of_its_own_and_every_picture_once() -> None:
    first, second = np.split(np.concatenate(list(batches(24, 8, 2, seed=0))), 2)
    assert sorted(first) == sorted(second) == list(range(24))
    assert list(first) != list(second)


def test_the_seed_decides_and_nothing_else() -> None:
    def trained(seed: int) -> torch.Tensor:
        classifier = network()
        wanted = config()
        wanted.seed = seed
        torch.rand(seed + 7)  # what others drew before must not matter
        return train_head("a", classifier, None, *data(classifier), wanted).weight.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_terms_of_the_head_move_it_and_accumulation_does_not_slow_their_ramp() -> None:
    shares = {}
    for name in ("without", "with"):
        classifier = network()
        sing = sing_of(classifier, {"capacity": 10.0})
        trained = train_head("a", classifier, sing if name == "with" else None, *data(classifier), config(epochs=10))
        directions = sing.texts @ sing.matrix
        outside = NullSpace.from_weight(trained.weight).component(directions)
        shares[name] = float(outside.square().sum() / directions.square().sum())
    assert shares["with"] < 0.5 * shares["without"], shares
    classifier = network()
    sing = sing_of(classifier, {"capacity": 1.0})
    sing.accumulation = 2
    train_head("a", classifier, sing, *data(classifier), config(accumulation=2))
    assert int(sing.step) == 2 * 15


def test_a_constrained_head_stays_in_its_row_space_and_a_free_one_leaves_it() -> None:
    outside = {}
    for name in ("constrained", "free"):
        classifier = network()
        space = NullSpace.from_weight(classifier.weight)
        if name == "constrained":
            constrain_to_rows(classifier, classifier.weight.detach())
        train_head("a", classifier, None, *data(classifier), config())
        if name == "constrained":
            release_rows(classifier)
        outside[name] = float(space.component(classifier.weight.detach()).norm() / classifier.weight.detach().norm())
    assert outside["constrained"] < 1e-5
    assert outside["free"] > 1e-2


def test_what_does_not_fit_or_is_not_finite_is_refused() -> None:
    classifier = network()
    features, labels = data(classifier)
    with pytest.raises(ValueError, match=rf"expected features \(N, {classifier.feature_dim}\)"):
        train_head("a", classifier, None, features[:, :-1], labels, config())
    with pytest.raises(ValueError, match="fewer than training"):
        train_head("a", classifier, None, features, labels, config(batch_size=64))
    before = classifier.weight.detach().clone()
    with pytest.raises(TrainingFailed, match=r"'broken'.*not finite at step 1"):
        train_head("broken", classifier, None, features * np.float32("nan"), labels, config())
    assert torch.equal(classifier.weight, before)
