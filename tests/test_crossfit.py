"""What two half-auditors agree on: image by image, in a world whose truth is known, and over processes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.crossfit import AUDITED, BUDGETS, CrossFit, figures, summarize
from singreg.analysis.fitting import FittedTranslator
from singreg.analysis.steering import steering_targets
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.translator import LinearTranslator
from tests.planted import CLASSES, DIM, WIDTH, Planted, plant
from tests.reference import formulas


def split(bank: Planted) -> list[Planted]:
    """Two halves of a bank, with the same classes in both."""
    first = torch.arange(len(bank.labels)) // CLASSES % 2 == 0
    parts = [(bank.features[k], bank.embeddings[k], bank.labels[k]) for k in (first, ~first)]
    return [Planted(*part, bank.weight, bank.texts) for part in parts]


def auditor(bank: Planted, ridge: float) -> FittedTranslator:
    halves = [RidgeStatistics(WIDTH, DIM).update(p.features, p.embeddings) for p in split(bank)]
    whole = halves[0] + halves[1]
    translator = LinearTranslator.from_solution(whole.solve(ridge, standardize=bank.space.basis))
    return FittedTranslator(translator, bank.features.mean(0), (halves[0], halves[1]))


def read(crossfit: CrossFit, images: Planted) -> dict[str, Tensor]:
    parts = [crossfit.read(batch) for batch in images.batches(64)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fitted(bank: Planted, ridge: float, scale: np.ndarray) -> tuple[Tensor, Tensor]:
    """(A, a) by the normal equations, of features scaled by block."""
    matrix, offset = formulas.ridge(bank.features.numpy() @ scale, bank.embeddings.numpy(), ridge)
    return torch.from_numpy(matrix @ scale), torch.from_numpy(offset)


def test_every_column_is_the_slow_one() -> None:
    bank, test, ridge = plant("leakage", seed=1, count=200), plant("leakage", seed=2, count=24), 0.1
    got = read(CrossFit(auditor(bank, ridge), bank.texts, bank.space), test)
    assert set(got) == AUDITED
    halves = split(bank)
    scales = [formulas.block_scale(part.features.numpy(), bank.weight) for part in (*halves, bank)]
    translators = [fitted(part, ridge, scale) for part, scale in zip((*halves, bank), scales, strict=True)]
    for maps in (scales, [bank.space.basis.numpy()] * 3):  # what predicts best: of f, of Π_p f
        pair = [(part.features.numpy() @ maps[place], part.embeddings.numpy()) for place, part in enumerate(halves)]
        best = max(DEFAULT_RIDGES, key=lambda r: formulas.held_out_r2(*pair, r))
        matrix, offset = formulas.ridge(bank.features.numpy() @ maps[2], bank.embeddings.numpy(), best)
        translators.append((torch.from_numpy(matrix @ maps[2].T), torch.from_numpy(offset)))
    targets = steering_targets(test.labels, torch.arange(24), CLASSES)
    for place in range(24):
        image = (test.features[place], test.embeddings[place], int(test.labels[place]), int(targets[place]))
        slow = formulas.audited(*image, translators, bank.texts, bank.weight, bank.features, bank.embeddings)
        assert {name: float(values[place]) for name, values in got.items()} == pytest.approx(slow, rel=1e-4, abs=1e-6)
    for name in ("cross 2 sd", "cross 10% of |f|", "self 25% of |f|"):  # the outcomes were of both kinds
        assert 0 < float(got[name].mean()) < 1


def success(case: str, count: int) -> tuple[dict[str, float], float, dict[str, float]]:
    """Shares of steered images by kind and budget, that without a step, and the figures."""
    bank, test = plant(case, seed=1, count=count), plant(case, seed=2, count=400)
    crossfit = CrossFit(auditor(bank, 0.01), bank.texts, bank.space)
    rows = {name: values.numpy() for name, values in read(crossfit, test).items()}
    targets = steering_targets(test.labels, torch.arange(400), CLASSES)
    unmoved = [(normalize(half(test.features), dim=1) @ test.texts.T).argmax(1) == targets for half in crossfit.halves]
    found = summarize(rows, test.labels.numpy())
    means = figures({name: rows[name].mean() for name in rows})
    assert {name: found[name] for name in means} == pytest.approx({name: float(value) for name, value in means.items()})
    return found, float(torch.stack(unmoved).double().mean()), found["intervals"]


def test_a_step_along_the_attacked_auditors_errors_convinces_no_other() -> None:
    """The null space holds nothing: the truth is that no null step changes what an image means."""
    few, rate, intervals = success("nothing", 120)
    assert few["self 4 sd"] > 0.45
    assert few["self 25% of |f|"] > 5 * rate
    for budget in BUDGETS:
        assert few[f"cross {budget}"] == pytest.approx(rate, abs=0.03)
    low, high = intervals["cross 4 sd"]
    assert low < rate < high < few["self 4 sd"] / 2
    # The control: what the null does hold convinces both, and more images leave less error to follow.
    leaking, rate, _ = success("leakage", 3000)
    assert leaking["cross 4 sd"] > max(0.5, 5 * rate)
    assert leaking["cross 4 sd"] == pytest.approx(leaking["self 4 sd"], abs=0.1)
    many, _, _ = success("nothing", 3000)
    assert many["self 4 sd"] < 0.1 * few["self 4 sd"]
    for name in ("class_variance", "unique_r2"):
        assert abs(many[name]) < 0.02 < 0.1 < leaking[name]
