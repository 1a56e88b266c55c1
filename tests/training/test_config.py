"""Values of a fine-tuning configuration: presets and their changes, and everything wrong with them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from singreg.loss_terms import PRESETS, TERMS
from singreg.training.config import HEAD_TERMS, FinetuneConfig, check_finetune, parse_finetune
from tests.training.small_arm import small_classifier, small_sing


def changed(**sections: dict[str, Any]) -> FinetuneConfig:
    config = FinetuneConfig()
    for section, values in sections.items():
        for name, value in values.items():
            assert hasattr(getattr(config, section), name)
            setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_a_configuration(preset: str) -> None:
    config = parse_finetune(["--loss.preset", preset])
    assert config.loss.preset == preset
    assert config.loss.terms == {}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"loss": {"preset": "song"}}, "loss.preset: no preset 'song'; known are"),
        ({"loss": {"preset": "label_only", "terms": {"class_share": 0.0}}}, "loss.terms: no term of the preset 'label_only' is left"),
        ({"loss": {"terms": {"leak": -1.0}}}, "loss.terms.leak: expected a finite weight of at least 0"),
        ({"loss": {"balance": -0.1}}, "loss.balance: expected a number of at least 0"),
        ({"loss": {"preset": "orthogonal", "balance": 0.1}}, "loss.balance: orthogonal move the head alone"),
        ({"training": {"l2_sp": float("nan")}}, "training.l2_sp: expected a number of at least 0"),
        ({"training": {"head_first": 1.5}}, "training.head_first: expected a share between 0 and 1"),
        ({"translator": {"folds": 0}}, "translator.folds: expected a number above 0"),
        ({"translator": {"stream_every": -1}}, "translator.stream_every: expected a number of at least 0"),
        ({"translator": {"stream_every": 5, "forgetting": 0.0}}, "translator.forgetting: 0 would forget the bank at once"),
        ({"translator": {"stream_every": 5, "folds": 2}}, "translator.stream_every: streaming keeps one translator"),
    ],
)
def test_what_cannot_work_is_named(sections: dict[str, dict[str, Any]], words: str) -> None:
    (problem,) = check_finetune(changed(**sections))
    assert problem.startswith(words)


def test_all_problems_come_at_once() -> None:
    config = changed(
        loss={"preset": "song", "terms": {"leek": 1.0, "leak": -2.0}, "balance": -1.0},
        translator={"folds": 0, "forgetting": 2.0},
        training={"head_first": -1.0, "l2_sp": -1.0},
    )
    keys = {problem.partition(":")[0] for problem in check_finetune(config)}
    assert keys == {
        "loss.preset", "loss.terms.leek", "loss.terms.leak", "loss.balance", "translator.folds", "translator.forgetting",
        "training.head_first", "training.l2_sp",
    }  # fmt: skip


def test_a_head_that_trains_alone_can_be_balanced_by_terms_of_the_head() -> None:
    assert check_finetune(changed(loss={"preset": "orthogonal", "balance": 0.1}, model={"tuning": "head"})) == []
    assert check_finetune(changed(loss={"preset": "orthogonal", "terms": {"leak": 0.1}, "balance": 0.1})) == []


@pytest.mark.parametrize("term", sorted(TERMS))
def test_terms_of_the_head_are_those_without_a_gradient_on_features(term: str) -> None:
    classifier = small_classifier(dropout=0.0)
    sing = small_sing(classifier, terms={term: 1.0}, ramp_steps=0)
    features = torch.randn(9, classifier.feature_dim, dtype=torch.float64, requires_grad=True)
    loss = sing(features, torch.arange(9) % 3)
    gradient = torch.autograd.grad(loss, features, allow_unused=True)[0] if loss.requires_grad else None
    moves = gradient is not None and bool((gradient != 0).any())
    assert moves == (term not in HEAD_TERMS)
