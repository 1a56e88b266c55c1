"""OOD scores and calibration against pair by pair and bin by bin loops, and what they must not depend on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from singreg.analysis.side_effects import BINS, auroc, calibration, measure_dropped, ood_columns, ood_figures
from singreg.models.edits import drop_null
from singreg.nullspace import NullSpace
from tests import toy
from tests.processes import run_processes
from tests.reference.formulas import null_projector

C, M = 4, 11
Values = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def slow_auroc(known: list[float], strange: list[float]) -> float:
    pairs = list(itertools.product(known, strange))
    return sum(1.0 if b > a else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(Values, Values)
def test_auroc_is_that_of_all_pairs(known: list[int], strange: list[int]) -> None:
    a, b = ([100.0 * value for value in values] for values in (known, strange))  # far outside [0, 1], with ties
    assert auroc(torch.tensor(a), torch.tensor(b)) == pytest.approx(slow_auroc(a, b), abs=1e-6)


def test_auroc_of_scores_that_a_float32_sigmoid_calls_equal() -> None:
    known = torch.arange(50.0).double() + 1000
    assert auroc(known, known + 0.5) == pytest.approx(slow_auroc(known.tolist(), (known + 0.5).tolist()))
    assert auroc(known, known + 1e-9) > 0.5
    with pytest.raises(ValueError, match="3 known, 0 strange"):
        auroc(torch.zeros(3), torch.zeros(0))
    with pytest.raises(ValueError, match="finite scores"):
        auroc(torch.tensor([0.0, torch.nan]), torch.zeros(2))


def images(seed: int = 0, push: float = 2.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """weight, bias, and known, strange and fitted features: the strange ones lie further out in the null space."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(C, M, generator=g), torch.randn(C, generator=g)
    known, strange, fit = (torch.randn(count, M, generator=g) + 2 for count in (40, 30, 60))
    return weight, bias, [known, strange + push * torch.randn(30, M, generator=g) @ null_projector(weight).float(), fit]


def scores(weight: Tensor, bias: Tensor, features: list[Tensor]) -> dict[str, float]:
    space, mean = NullSpace.from_weight(weight), features[2].double().mean(0)
    columns = [ood_columns(f, f.double() @ weight.double().T + bias.double(), space, mean) for f in features]
    return ood_figures(*({name: values.numpy() for name, values in each.items()} for each in columns))


@pytest.mark.parametrize("seed", range(3))
def test_ood_scores_are_those_of_plain_loops(seed: int) -> None:
    weight, bias, features = images(seed, push=0.7)
    project, mean = null_projector(weight), features[2].double().mean(0)

    def parts(f: Tensor) -> tuple[float, float, float]:
        logits = weight.double() @ f.double() + bias.double()
        return (
            float(((f.double() - mean) @ project).norm()),
            math.log(sum(math.exp(v) for v in logits)),
            float(logits.max()),
        )

    known, strange, fit = ([parts(f) for f in each] for each in features)
    scale = np.mean([top for *_, top in fit]) / np.mean([residual for residual, *_ in fit])
    ways = {"null_energy": (1, 0), "energy": (0, 1), "vim": (scale, 1)}
    slow = {
        f"ood_{name}": slow_auroc(
            *([a * residual - b * energy for residual, energy, _ in each] for each in (known, strange))
        )
        for name, (a, b) in ways.items()
    }
    assert scores(weight, bias, features) == pytest.approx(slow, abs=1e-6)
    assert len({round(value, 3) for value in slow.values()}) == 3


def test_dropping_moving_or_rescaling_the_null() -> None:
    weight, bias, features = images()
    space, before = NullSpace.from_weight(weight), scores(*images())
    after = scores(weight, bias, [space.remove(f) for f in features])  # float32: rounding is left
    assert before["ood_null_energy"] > 0.8  # planted
    assert after["ood_null_energy"] == 0.5
    assert after["ood_energy"] == pytest.approx(before["ood_energy"], abs=1e-6) == after["ood_vim"]
    moved = [f + 3 * space.component(f) + space.component(torch.ones(M)) for f in features]
    assert scores(weight, bias, moved) == pytest.approx(before, abs=1e-6)


def test_calibration_is_that_of_plain_bins() -> None:
    g = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        logits, labels = scale * torch.randn(300, C, generator=g), torch.randint(C, (300,), generator=g)
        bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
        nll = 0.0
        for row, label in zip(logits.double(), labels.tolist(), strict=True):
            p = row.exp() / row.exp().sum()
            bins[min(int(float(p.max()) * BINS), BINS - 1)].append((float(p.max()), float(int(p.argmax()) == label)))
            nll -= float(p[label].log())
        ece = sum(abs(sum(t for t, _ in b) - sum(h for _, h in b)) for b in bins) / 300
        assert calibration(logits, labels) == pytest.approx({"ece": ece, "nll": nll / 300}, abs=1e-6)
        assert calibration(logits + 50, labels) == pytest.approx(calibration(logits, labels), abs=1e-6)


def test_true_probabilities_are_calibrated_bolder_ones_not() -> None:
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20000, C, generator=g)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    true, bold = calibration(logits, labels), calibration(3 * logits, labels)
    assert true["ece"] < 0.015 < 0.1 < bold["ece"]
    assert true["nll"] < bold["nll"]
    with pytest.raises(ValueError, match="got 3, 1 unlabelled"):
        calibration(torch.zeros(3, C), torch.tensor([0, -1, 2]))


def dropped(rank: int = 0, world: int = 1) -> dict[str, float]:
    return measure_dropped(toy.classifier(), toy.ToySplit(31), toy.embeddings(31), toy.QUIET)


def test_dropping_the_null_keeps_top1_on_any_number_of_processes() -> None:
    model, split = toy.classifier(), toy.ToySplit(31)
    pixels = torch.stack([toy.to_tensor(split.image(index)) for index in range(31)])
    with torch.no_grad():
        before, after = (each.eval().features_and_logits(pixels)[1] for each in (model, drop_null(model)))
    change, right = (after - before).abs().max(), (after.argmax(1) == torch.from_numpy(split.labels)).double().mean()
    assert dropped()["top1"] == pytest.approx(float(right))
    assert dropped()["logit_change"] == pytest.approx(float(change), abs=1e-6)
    assert dropped()["logit_change"] < 1e-4
    for got in run_processes(2, dropped):
        assert got == pytest.approx(dropped(), abs=1e-6)
