"""OOD scores and calibration against pair by pair and bin by bin loops, and what they must not depend on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from singreg.analysis.study.arm_results import OodScores
from singreg.analysis.study.side_effects import BINS, auroc, calibration, ood_auroc
from singreg.nullspace import NullSpace
from tests.reference.formulas import null_projector

C, M = 4, 11


def slow_auroc(known: list[float], strange: list[float]) -> float:
    pairs = list(itertools.product(known, strange))
    return sum(1.0 if b > a else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_auroc_is_that_of_all_pairs(known: list[int], strange: list[int]) -> None:
    a, b = ([100.0 * value for value in values] for values in (known, strange))  # far outside [0, 1], with ties
    assert auroc(torch.tensor(a), torch.tensor(b)) == pytest.approx(slow_auroc(a, b), abs=1e-6)


def test_auroc_of_large_scores_that_a_float32_sigmoid_would_call_equal() -> None:
    known, strange = torch.arange(50.0).double() + 1000, torch.arange(50.0).double() + 1000.5
    assert auroc(known, strange) == pytest.approx(slow_auroc(known.tolist(), strange.tolist()))
    assert auroc(known, known + 1e-9) > 0.5
    with pytest.raises(ValueError, match="3 known and 0 strange"):
        auroc(torch.zeros(3), torch.zeros(0))
    with pytest.raises(ValueError, match="finite scores"):
        auroc(torch.tensor([0.0, torch.nan]), torch.zeros(2))


def pictures(seed: int = 0, push: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, bias, known, strange and fitted features: the strange ones lie further out in the null space."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(C, M, generator=g), torch.randn(C, generator=g)
    known, strange, fit = (torch.randn(count, M, generator=g) + 2 for count in (40, 30, 60))
    strange = strange + push * torch.randn(30, M, generator=g) @ null_projector(weight).float()
    return weight, bias, known, strange, fit


def slow_scores(weight: Tensor, bias: Tensor, known: Tensor, strange: Tensor, fit: Tensor) -> dict[str, float]:
    project, mean = null_projector(weight), fit.double().mean(0)

    def parts(f: Tensor) -> tuple[float, float, float]:
        logits = weight.double() @ f.double() + bias.double()
        return float(((f.double() - mean) @ project).norm()), math.log(sum(math.exp(v) for v in logits)), float(logits.max())

    fitted = [parts(f) for f in fit]
    scale = (sum(top for *_, top in fitted) / len(fit)) / (sum(residual for residual, *_ in fitted) / len(fit))
    score = {
        "null_energy": lambda residual, energy: residual,
        "energy": lambda residual, energy: -energy,
        "vim": lambda residual, energy: scale * residual - energy,
    }
    return {
        name: slow_auroc(*([how(*parts(f)[:2]) for f in features] for features in (known, strange))) for name, how in score.items()
    }


def scores(weight: Tensor, bias: Tensor, known: Tensor, strange: Tensor, fit: Tensor) -> OodScores:
    return ood_auroc(NullSpace.from_weight(weight), known, strange, weight, bias, fit)


def test_ood_scores_are_those_of_plain_loops() -> None:
    for seed in range(4):
        slow = slow_scores(*pictures(seed, push=0.7))
        assert vars(scores(*pictures(seed, push=0.7))) == pytest.approx(slow, abs=1e-6)
        assert len({round(value, 3) for value in slow.values()}) == 3
    assert scores(*pictures()).null_energy > 0.8  # planted


def test_dropping_the_null_leaves_null_energy_at_chance_and_the_energy_score_alone() -> None:
    weight, bias, *features = pictures()
    space = NullSpace.from_weight(weight)
    dropped = [space.remove(f) for f in features]  # float32: rounding is left
    before, after = scores(weight, bias, *features), scores(weight, bias, *dropped)
    assert before.null_energy > 0.8
    assert after.null_energy == 0.5
    assert after.energy == pytest.approx(before.energy, abs=1e-6) == after.vim


def test_moving_the_null_mean_or_rescaling_the_null_changes_no_null_energy() -> None:
    weight, bias, *features = pictures()
    space = NullSpace.from_weight(weight)
    moved = [f + 3 * space.component(f) + space.component(torch.ones(M)) for f in features]
    assert scores(weight, bias, *moved).null_energy == pytest.approx(scores(weight, bias, *features).null_energy, abs=1e-6)
    assert scores(weight, bias, *moved).vim == pytest.approx(scores(weight, bias, *features).vim, abs=1e-6)


def slow_calibration(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    nll = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        probabilities = row.exp() / row.exp().sum()
        top = float(probabilities.max())
        bins[min(int(top * BINS), BINS - 1)].append((top, float(int(probabilities.argmax()) == label)))
        nll -= float(probabilities[label].log())
    gaps = [abs(sum(t for t, _ in b) - sum(h for _, h in b)) for b in bins]
    return sum(gaps) / len(logits), nll / len(logits)


def test_calibration_is_that_of_plain_bins() -> None:
    g = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        logits, labels = scale * torch.randn(300, C, generator=g), torch.randint(C, (300,), generator=g)
        assert calibration(logits, labels) == pytest.approx(slow_calibration(logits, labels), abs=1e-6)
        assert calibration(logits + 50, labels) == pytest.approx(calibration(logits, labels), abs=1e-6)  # a shift is no information


def test_a_classifier_that_says_its_true_probabilities_is_calibrated_and_a_bolder_one_is_not() -> None:
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20000, C, generator=g)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    true, bold = calibration(logits, labels), calibration(3 * logits, labels)
    assert true[0] < 0.015 < 0.1 < bold[0]
    assert true[1] < bold[1]
    with pytest.raises(ValueError, match="got 3, 1 of them unlabelled"):
        calibration(torch.zeros(3, C), torch.tensor([0, -1, 2]))
    with pytest.raises(ValueError, match="got 0"):
        calibration(torch.zeros(0, C), torch.zeros(0, dtype=torch.long))
