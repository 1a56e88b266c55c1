"""An arm's figures against plain loops: information, side effects, a dropped null space; processes."""

import itertools
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from singreg.analysis.features import FeatureBatch, fit_on_split, iterate_features
from singreg.analysis.probes import fit_blocks, measure_information
from singreg.analysis.scores import AUDITOR, Rows, analyze_model
from singreg.data.splits import Splits
from singreg.models.edits import drop_null
from singreg.nullspace import NullSpace
from singreg.setup import Setup
from singreg.study import results as arms
from singreg.study.results import network_outputs, ood_figures
from tests import toy
from tests.processes import run_same
from tests.reference.formulas import null_projector

FIT, COUNT = 90, 31
BANK = toy.ToySplit(40, seed=2, unlabelled=tuple(range(17)))
AUDIT, TEST = toy.ToySplit(FIT), toy.ToySplit(COUNT, seed=1)
BANK.name, AUDIT.name, TEST.name = "bank", "audit", "test"
TESTED = TEST, toy.embeddings(COUNT, seed=1)


def measure(cache: str | None = None, dropped: bool = False, held: Any = None, **changes: Any) -> Any:
    splits = Splits(BANK, BANK, AUDIT, TEST, TEST.class_names, None)
    tables = {"bank": toy.embeddings(40, seed=2), "audit": toy.embeddings(FIT), "test": TESTED[1]}
    nothing: Any = None
    passes = replace(toy.QUIET, cache=cache)
    model = drop_null(toy.classifier(), spare=1).eval() if dropped else toy.classifier()
    setup = Setup(splits, model, nothing, toy.texts(), tables, passes, held=held)
    fitted = fit_on_split(model, AUDIT, tables["audit"], ridges=(0.3,), settings=passes)
    judges, how = {AUDITOR: fitted.translator}, {"mean": fitted.mean, "auditor": fitted, "settings": passes}
    scores = analyze_model(model, *TESTED, toy.texts(), judges, **how)
    return arms.measure_arm(setup, fitted, scores, **{"ood": 9, **changes}), scores


measured = cache(lambda: measure(held=TESTED))


def test_scores_are_those_of_analyze_model() -> None:
    (same, found), (rows, scores) = measured()
    judged = scores["translators"][AUDITOR]
    assert same is rows
    assert found["figures"]["AS_neg"] == pytest.approx(judged["overall"]["AS_neg"])
    assert found["figures"]["class_variance"] == scores["audit"]["class_variance"]
    assert found["intervals"]["IS"] == pytest.approx(judged["intervals"]["IS"])
    held = found["validation"]  # here the test images once more
    assert held["images"] == COUNT
    assert all(found["figures"][key] == pytest.approx(held[key], rel=1e-5) for key in held if key != "images")


def test_information_and_side_effects_are_held_out() -> None:
    model, figures = toy.classifier(), measured()[0][1]["figures"]
    batches = partial(iterate_features, model, settings=toy.QUIET, description="test")
    sizes: dict[str, Any] = {"classes": toy.CLASSES, "target_dim": toy.DIM}
    fits = fit_blocks(batches(AUDIT, toy.embeddings(FIT)), null_space=NullSpace.from_weight(model.weight), **sizes)
    information = measure_information(batches(*TESTED), fits)
    assert figures["null_probe"] == information["accuracy"]["null_space"]
    assert {"ood_vim", "retrieval"} <= {*figures}
    assert "ood_vim" not in measure(ood=0)[0][1]["figures"]
    assert all(isinstance(value, float) for value in figures.values())


def test_without_the_null_space_logits_stay_and_what_it_held_is_gone() -> None:
    kept, dropped = measured()[0][1]["figures"], measure(dropped=True)[0][1]["figures"]
    for figure in ("top1", "ood_energy"):
        assert dropped[figure] == pytest.approx(kept[figure], abs=1e-5), figure
    assert dropped["ood_null_energy"] == 0.5
    for figure in ("class_variance", "AS_abs", "IS", "null_energy"):
        assert abs(dropped[figure]) < 1e-9 < abs(kept[figure]), figure
    assert dropped["harmless_r2"] < kept["harmless_r2"]
    assert dropped["retrieval"] < kept["retrieval"]
    assert dropped["self 4 sd"] == dropped["self 1 sd"] < kept["self 4 sd"]


def test_retrieval_is_1_for_turned_embeddings_and_chance_for_others() -> None:
    generator, labels = torch.Generator().manual_seed(0), np.repeat(np.arange(4), 60)
    z, other = torch.randn(2, 240, 16, generator=generator)
    turned = z @ torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q

    def of(features: torch.Tensor) -> float:
        batch = FeatureBatch(features, features, z, torch.from_numpy(labels), torch.arange(240))
        return arms.retrieval([batch], labels)

    assert of(3 * turned) == 1
    assert of(other) == pytest.approx(arms.NEIGHBOURS / 59, abs=0.03)


def test_cached_features_and_processes_give_the_same_figures(tmp_path: Path) -> None:
    whole, (rows, _) = measured()[0][1]["figures"], measured()[1]
    assert measure(cache=str(tmp_path))[0][1]["figures"] == pytest.approx(whole, abs=1e-4, rel=1e-4)
    assert len(list(tmp_path.glob("*.npy"))) == 3  # audit, test and strange images, each through the network once
    for (images, got), _ in run_same(2, measure):
        assert got["figures"] == pytest.approx(whole, abs=2e-3, rel=1e-4)
        assert images["image"].tolist() == rows["image"].tolist()


# Side effects.
Values = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def slow_auroc(known: Any, strange: Any) -> float:
    pairs = list(itertools.product(known, strange))
    return sum(1.0 if b > a else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(Values, Values)
def test_auroc_is_that_of_all_pairs(known: list[int], strange: list[int]) -> None:
    a, b = (1000 + 1e-9 * np.array(values) for values in (known, strange))  # that a float32 sigmoid calls equal
    assert arms.auroc(a, b) == pytest.approx(slow_auroc(a, b), abs=1e-9)


C, M = 4, 10


def images(push: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weight, bias, and known, strange and fitted features: the strange ones lie further out in the null space."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(C, M, generator=g), torch.randn(C, generator=g)
    known, strange, fit = (torch.randn(count, M, generator=g) + 2 for count in (40, 30, 60))
    return weight, bias, [known, strange + push * torch.randn(30, M, generator=g) @ null_projector(weight).float(), fit]


def outputs(weight: Tensor, bias: Tensor, features: list[Tensor]) -> list[Rows]:
    space, mean, found = NullSpace.from_weight(weight), features[2].double().mean(0), []
    for f in features:
        places = torch.arange(len(f))
        batch = FeatureBatch(f, f.double() @ weight.double().T + bias.double(), f, places % C, places)
        found.append(network_outputs([batch], space, mean))
    return found


def test_ood_scores_are_those_of_plain_loops() -> None:
    weight, bias, features = images(push=0.7)
    project, mean = null_projector(weight), features[2].double().mean(0)

    def parts(f: Tensor) -> tuple[float, float, float]:
        logits = weight.double() @ f.double() + bias.double()
        energy = math.log(sum(math.exp(v) for v in logits))
        return float(((f.double() - mean) @ project).norm()), energy, float(logits.max())

    known, strange, fit = (np.array([parts(f) for f in each]) for each in features)
    ways = {"null_energy": (1, 0), "energy": (0, 1), "vim": (fit[:, 2].mean() / fit[:, 0].mean(), 1)}
    slow = {}
    for name, (a, b) in ways.items():
        slow[f"ood_{name}"] = slow_auroc(*(a * e[:, 0] - b * e[:, 1] for e in (known, strange)))
    assert ood_figures(*outputs(weight, bias, features)) == pytest.approx(slow, abs=1e-6)
    assert len({round(value, 3) for value in slow.values()}) == 3


def test_dropping_moving_or_rescaling_the_null() -> None:
    weight, bias, features = images()
    space, before = NullSpace.from_weight(weight), ood_figures(*outputs(*images()))
    after = ood_figures(*outputs(weight, bias, [space.remove(f) for f in features]))  # float32: rounding is left
    assert before["ood_null_energy"] > 0.8  # planted
    assert after["ood_null_energy"] == 0.5
    assert after["ood_energy"] == pytest.approx(before["ood_energy"], abs=1e-6) == after["ood_vim"]
    moved = [f + 3 * space.component(f) + space.component(torch.ones(M)) for f in features]
    assert ood_figures(*outputs(weight, bias, moved)) == pytest.approx(before, abs=1e-6)
