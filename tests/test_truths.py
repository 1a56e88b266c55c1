"""What is planted is what the scores name; nothing done to the null block moves the auditor.

What each figure should say of what is planted in the null space (yes: clearly not chance):

- leakage, class meaning: AS⁻ and κ < 0, a class probe succeeds, and the null space has information of its own
- nuisance, across the class: AS⁺ and κ > 0, no class probe, information of its own
- copy of the row space: as leakage, but no information of its own
- offset, one for all images: AS⁻, which goes with centring
- nothing: chance
"""

import copy
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singreg.analysis.chance import measure_chance
from singreg.analysis.features import fit_on_split
from singreg.analysis.probes import fit_blocks, measure_information
from singreg.analysis.scores import analyze_model
from singreg.metrics import score_columns, summarize_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, fit_translator
from tests import toy
from tests.planted import CASES, CLASSES, DIM, Planted, plant

LOUD = [case for case in CASES if case != "nothing"]
Found = dict[str, Any]


@cache
def findings(case: str) -> tuple[Found, Found, Found]:
    """Both removals' scores with their chance levels, and information: fitted on one split, measured on another."""
    fit, test = plant(case, seed=1), plant(case, seed=2, count=800)
    auditor = fit_translator([(b.features, b.embeddings) for b in fit.batches()], standardize=fit.space.basis)
    options: Any = {"texts": test.texts, "null_space": test.space, "mean": fit.features.mean(0), "draws": 4}
    chance = measure_chance(test.batches(), translator=auditor, **options)
    fits = fit_blocks(fit.batches(), null_space=fit.space, classes=CLASSES, target_dim=DIM)
    return chance["paper"], chance["centred"], measure_information(test.batches(), fits)


def test_the_papers_absolute_score_cannot_tell_them_apart() -> None:
    """Leakage and nuisance, its opposite, read the same |AS|; so do all four that are not nothing."""
    values = {case: findings(case)[0]["observed"]["AS_abs"] for case in CASES}
    assert [values[case] for case in LOUD] == pytest.approx([5.0] * len(LOUD), rel=0.05)
    assert values["nothing"] < 0.5


@pytest.mark.parametrize(
    ("case", "sign", "unique", "inside", "own"),
    [
        ("leakage", -1, 0.11, True, True),
        ("copy", -1, 0, True, True),
        ("offset", -1, 0, False, False),
        ("nuisance", 1, 0.65, False, None),
        ("nothing", 0, 0, False, False),
    ],
)
def test_figures_say_what_the_table_says(case: str, sign: int, unique: float, inside: bool, own: bool | None) -> None:
    paper, centred, information = findings(case)
    figures = paper["observed"]
    if sign:  # the sign tells harm from help
        assert sign * figures["kappa"] > 0.2
        assert sign * (figures["AS_pos"] - figures["AS_neg"]) > 0.95 * figures["AS_abs"]
        ratio = centred["observed"]["AS_abs"] / figures["AS_abs"]  # only an offset goes with centring
        assert ratio < 0.15 if case == "offset" else ratio == pytest.approx(1, abs=0.02)
    else:
        assert abs(figures["kappa"]) < 0.05
        assert abs(figures["AS"]) < 0.1
    low, high = information["intervals"]["unique"]
    assert information["unique"] == pytest.approx(unique, abs=0.02)
    assert low <= information["unique"] <= high
    assert (low > 0.05) == (unique > 0)
    low, high = information["intervals"]["accuracy null_space"]
    assert (low > 0.7) == inside
    assert inside or low < 1.2 / CLASSES < high + 0.05
    assert (information["unique_accuracy"] > 0.05) == (case == "leakage")  # a copy adds nothing to the row space
    other = paper["levels"]["texts"]["mean"]["AS_neg"]
    if own is not None:  # another class's text tells the class from a shift of all
        assert figures["AS_neg"] > 4 * other if own else figures["AS_neg"] < 1.2 * other


def test_removing_nothing_is_far_below_a_random_removal() -> None:
    """It is no accident of its size: random subspaces as large, or as energetic, cost meaning."""
    paper = findings("nothing")[0]
    for kind in ("dimension", "energy"):
        assert paper["observed"]["IS"] < 0.15 * paper["levels"][kind]["mean"]["IS"]
        assert paper["observed"]["AS_neg"] < 0.05 * paper["levels"][kind]["mean"]["AS_neg"]


# The auditor: f' = Π_p f + M Π_n f, with M a rotation inside the null space or 0.1 of it, gives the same logits and
# holds the same information. A frozen translator is fooled by the rotation, an un-standardised refit by the shrinking,
# and so is one standardised feature by feature (METHOD section 8.6).
FIGURES = ("AS", "AS_neg", "AS_abs", "IS", "kappa")
RIDGE = 1.0  # relative; a penalty that is felt, as on real features
Warp = Literal["same", "rotated", "shrunk", "both"]


def warp_matrix(space: NullSpace, warp: Warp) -> Tensor:
    """The map of feature space (m, m) that leaves the row space alone."""
    null, g = space.null_basis(), torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(space.nullity, space.nullity, generator=g, dtype=torch.float64)).Q
    inside = turn if warp in ("rotated", "both") else torch.eye(space.nullity).double()
    return space.basis @ space.basis.T + (0.1 if warp in ("shrunk", "both") else 1) * null @ inside @ null.T


def warped(part: Planted, warp: Warp) -> Planted:
    return replace(part, features=part.features @ warp_matrix(part.space, warp).T)


def fit(part: Planted, standardize: Tensor | None) -> LinearTranslator:
    return fit_translator([(part.features, part.embeddings)], standardize=standardize, ridges=[RIDGE])


def read(translator: LinearTranslator, part: Planted) -> dict[str, float]:
    """Figures of the real removal, in float64."""
    translator = copy.deepcopy(translator).double()
    z, z_eq = translator(part.features), translator(part.space.remove(part.features))
    summary = summarize_columns(score_columns(z, z_eq, part.texts[part.labels]).sum(1, keepdim=True))
    return {name: float(summary[name]) for name in FIGURES}


@cache
def auditor(warp: Warp, how: str) -> dict[str, float]:
    """Refitted on the warped images of one split, read on the warped images of another."""
    made = [plant("leakage", seed=seed, count=count) for seed, count in ((1, 3000), (2, 400))]
    fitted, test = (warped(part, warp) for part in made)
    return read(fit(fitted, fitted.space.basis if how == "blocks" else None), test)


def change(after: dict[str, float], before: dict[str, float]) -> float:
    return max(abs(after[name] / before[name] - 1) for name in FIGURES)


@pytest.mark.parametrize("warp", ["rotated", "shrunk", "both"])
def test_the_auditor_does_not_move(warp: Warp) -> None:
    assert auditor("same", "blocks")["AS_neg"] > 1  # there is something to lose
    assert change(auditor(warp, "blocks"), auditor("same", "blocks")) < 1e-4  # float32 storage of A is all that is left


def test_what_the_auditor_sees_through_fools_the_others() -> None:
    frozen, test = fit(plant("leakage", seed=1), plant("leakage").space.basis), plant("leakage", seed=2, count=400)
    assert read(frozen, warped(test, "rotated"))["AS_neg"] < 0.5 * read(frozen, test)["AS_neg"]
    assert auditor("shrunk", "plain")["AS_neg"] < 0.5 * auditor("same", "plain")["AS_neg"]
    assert change(auditor("rotated", "plain"), auditor("same", "plain")) < 1e-4


def test_the_whole_path_from_images_to_report_stays_within_one_per_cent() -> None:
    """fit_on_split and analyze_model on a classifier whose null block was turned and shrunk by a layer of its own."""
    model, split, test = toy.classifier(), toy.ToySplit(240), toy.ToySplit(31, seed=1)
    mean, z = toy.features(model, split).mean(0).float(), toy.embeddings(240)
    found: dict[tuple[str, str], list[float]] = {}
    for warp in ("same", "both"):
        matrix = warp_matrix(NullSpace.from_weight(model.weight), warp).float()  # type: ignore[arg-type]
        layers, layer = list(copy.deepcopy(model.model).children()), nn.Linear(toy.WIDTH, toy.WIDTH, bias=False)
        layer.weight.data.copy_(matrix)
        other = Classifier.from_module(nn.Sequential(*layers[:-1], layer, layers[-1]), "5", transform=toy.to_tensor)
        plain = fit_translator([(toy.features(other, split), torch.from_numpy(z))], ridges=[RIDGE])
        blocks = fit_on_split(other, split, z, ridges=[RIDGE], settings=toy.QUIET).translator
        auditors = {"blocks": blocks, "plain": plain}
        options: Any = {"mean": mean @ matrix.T, "settings": toy.QUIET}
        measured = analyze_model(other, test, toy.embeddings(31, 1), toy.texts(), auditors, **options)[1]
        for how, by in measured["translators"].items():
            kept = [by[kind][name] for kind in ("overall", "centred") for name in ("AS", "AS_neg", "AS_abs", "IS")]
            found[warp, how] = kept
    moved = {how: np.abs(np.array(found["both", how]) / found["same", how] - 1).max() for how in auditors}
    assert moved["blocks"] < 0.01
    assert moved["plain"] > 0.3
