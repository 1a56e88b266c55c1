"""Turning or rescaling the null block leaves the auditor unmoved and fools the others (METHOD section 8.6).

The features f' = Π_p f + M Π_n f with M a rotation inside the null space, or 0.1 of it, give the same logits and hold the same
information. An auditor refitted on f' and standardised by block gives T'(f') = T(f). What is fooled: a frozen translator by the
rotation, an un-standardised refit by the shrinking, and so is a refit standardised feature by feature, unless the head happens to
be aligned with the axes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singreg.analysis.old_fitting import fit_on_part, refit
from singreg.analysis.model import analyze_model
from singreg.metrics import score_columns, summarize_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics, Standardize
from singreg.translator import LinearTranslator, fit_translator
from tests.analysis import toy
from tests.analysis.planted import Planted, plant

FIGURES = ("AS", "AS_neg", "AS_abs", "IS", "kappa")
RIDGE = 1.0  # relative; a penalty that is felt, as on real features
Warp = Literal["same", "rotated", "shrunk", "both"]


def warp_matrix(space: NullSpace, warp: Warp) -> Tensor:
    """The symmetric or orthogonal map of feature space (m, m) that leaves the row space alone."""
    null = space.null_basis()
    g = torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(space.nullity, space.nullity, generator=g, dtype=torch.float64)).Q
    inside = {"same": torch.eye(space.nullity).double(), "rotated": turn, "shrunk": 0.1 * torch.eye(space.nullity).double()}
    inside["both"] = 0.1 * turn
    return space.basis @ space.basis.T + null @ inside[warp] @ null.T


def warped(part: Planted, warp: Warp) -> Planted:
    return replace(part, features=part.features @ warp_matrix(part.space, warp).T)


def aligned(part: Planted) -> Planted:
    """The same pictures in coordinates in which the head reads the first axes only."""
    space = part.space
    basis = torch.cat([space.basis, space.null_basis()], dim=1)
    return replace(part, features=part.features @ basis, weight=part.weight @ basis)


def fit(part: Planted, standardize: Standardize) -> LinearTranslator:
    return fit_translator([(part.features, part.embeddings)], standardize=standardize, ridges=[RIDGE])


def read(translator: LinearTranslator, part: Planted) -> dict[str, float]:
    """Figures of the real removal, in float64."""
    translator = copy.deepcopy(translator).double()
    z, z_eq = translator(part.features), translator(part.space.remove(part.features))
    summary = summarize_columns(score_columns(z, z_eq, part.texts[part.labels]).sum(1, keepdim=True))
    return {name: float(summary[name]) for name in FIGURES}


def auditor(warp: Warp, how: str, make=lambda part: part) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Refitted on the warped pictures of one part, read on the warped pictures of another."""
    fit_part, test = (warped(make(plant("leakage", seed=seed, count=count)), warp) for seed, count in ((1, 3000), (2, 400)))
    return read(fit(fit_part, {"plain": False, "features": True, "blocks": fit_part.space.basis}[how]), test)


def change(after: dict[str, float], before: dict[str, float]) -> float:
    """Largest relative change of any figure."""
    return max(abs(after[name] - before[name]) / abs(before[name]) for name in FIGURES)


@pytest.mark.parametrize("warp", ["rotated", "shrunk", "both"])
def test_the_auditor_does_not_move(warp: Warp) -> None:
    before = auditor("same", "blocks")
    assert before["AS_neg"] > 1  # there is something to lose
    assert change(auditor(warp, "blocks"), before) < 1e-4  # wanted: 1 %; float32 storage of A is all that is left


def test_a_frozen_translator_is_fooled_by_a_rotation() -> None:
    frozen, test = fit(plant("leakage", seed=1), plant("leakage").space.basis), plant("leakage", seed=2, count=400)
    before, after = read(frozen, test), read(frozen, warped(test, "rotated"))
    assert after["AS_neg"] < 0.5 * before["AS_neg"]
    assert change(auditor("rotated", "blocks"), before) < 1e-4  # while the auditor still reads what is there


def test_an_unstandardised_refit_is_fooled_by_shrinking_but_not_by_rotating() -> None:
    before = auditor("same", "plain")
    assert auditor("shrunk", "plain")["AS_neg"] < 0.5 * before["AS_neg"]
    assert change(auditor("rotated", "plain"), before) < 1e-4


def test_standardising_single_features_is_safe_only_on_an_aligned_head() -> None:
    """With the axes along the head's two blocks, shrinking one is a rescaling of features; on any other head it is not."""
    before = auditor("same", "features", aligned)
    assert change(auditor("shrunk", "features", aligned), before) < 1e-4
    assert change(auditor("rotated", "features", aligned), before) > 0.01
    before = auditor("same", "features")
    assert auditor("shrunk", "features")["AS_neg"] < 0.5 * before["AS_neg"]
    # The block scale does not know where the axes are.
    assert change(auditor("shrunk", "blocks", aligned), auditor("same", "blocks")) < 1e-4


def test_block_scaling_is_plain_ridge_on_scaled_coordinates() -> None:
    """The slow way: rotate to row-space and null coordinates, divide each block by the root of the variance of its principal
    directions, weighted by that variance, fit, fold back."""
    part = plant("leakage", seed=1, count=300)
    space = part.space
    row, null = part.features @ space.basis, part.features @ space.null_basis()
    spectra = [torch.linalg.eigvalsh(torch.cov(x.T, correction=0)) for x in (row, null)]
    scale = [float((spectrum @ spectrum / spectrum.sum()).sqrt()) for spectrum in spectra]
    slow = RidgeStatistics(40, 24).update(torch.cat([row / scale[0], null / scale[1]], dim=1), part.embeddings).solve(0.3)
    matrix = slow.matrix[:, :8] / scale[0] @ space.basis.T + slow.matrix[:, 8:] / scale[1] @ space.null_basis().T
    statistics = RidgeStatistics(40, 24).update(part.features, part.embeddings)
    fast = statistics.solve(0.3, standardize=space.basis)
    torch.testing.assert_close(fast.matrix, matrix, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(fast.offset, slow.offset, atol=1e-9, rtol=1e-7)
    path = statistics.path(standardize=space.basis).solve(0.3)
    torch.testing.assert_close(path.matrix, matrix, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("block", ["row", "null"])
def test_a_block_that_does_not_vary_or_does_not_exist_gets_no_weight(block: str) -> None:
    part = plant("nothing", seed=1, count=300)
    space = part.space
    basis = space.basis if block == "row" else space.null_basis()
    constant = part.features - part.features @ basis @ basis.T + basis[:, 0]
    solution = RidgeStatistics(40, 24).update(constant, part.embeddings).solve(0.3, standardize=space.basis)
    assert torch.isfinite(solution.matrix).all()
    assert (solution.matrix @ basis).abs().max() < 1e-9
    everything = torch.eye(40).double()[:, : 40 if block == "row" else 0]  # no null block, no row block: one scale, plain ridge
    whole = RidgeStatistics(40, 24).update(part.features, part.embeddings)
    torch.testing.assert_close(whole.solve(0.3, standardize=everything).matrix, whole.solve(0.3).matrix, atol=1e-9, rtol=1e-7)


def test_a_basis_of_another_head_is_refused() -> None:
    part = plant("nothing", seed=1, count=30)
    with pytest.raises(ValueError, match=r"row-space basis \(40, r\).*\(39, 8\)"):
        RidgeStatistics(40, 24).update(part.features, part.embeddings).solve(1.0, standardize=torch.zeros(39, 8))


def turned(model: Classifier, warp: Warp) -> Classifier:
    """The classifier with a layer before its head that turns or shrinks the null part of its features."""
    layers = list(copy.deepcopy(model.model).children())
    layer = nn.Linear(toy.WIDTH, toy.WIDTH, bias=False)
    layer.weight.data.copy_(warp_matrix(NullSpace.from_weight(model.weight), warp).float())
    return Classifier.from_module(nn.Sequential(*layers[:-1], layer, layers[-1]), head="5", transform=toy.to_tensor, tag="toy")


def test_the_whole_path_from_pictures_to_report_stays_within_one_per_cent() -> None:
    """`fit_on_part(..., standardize="blocks")` and `analyze_model` on a classifier whose null block was turned and shrunk."""
    model, part, test = toy.classifier(), toy.ToyPart(240), toy.ToyPart(31, seed=1)
    mean = toy.features(model, part).mean(0).float()
    found: dict[tuple[str, str], dict[str, float]] = {}
    for warp in ("same", "both"):
        other = turned(model, warp)  # type: ignore[arg-type]
        options = {"ridges": [RIDGE], "settings": toy.QUIET}
        auditors = {
            how: fit_on_part(other, part, toy.embeddings(240), standardize=standard, **options).translator  # type: ignore[arg-type]
            for how, standard in (("blocks", "blocks"), ("features", True))
        }
        again = refit(other, part, toy.embeddings(240), auditors["blocks"], settings=toy.QUIET)
        torch.testing.assert_close(again.matrix, auditors["blocks"].matrix)  # a refresh keeps the kind of scale
        assert again.info.by_block
        assert not auditors["features"].info.by_block
        measured = analyze_model(
            other, test, toy.embeddings(31, 1), toy.texts(), auditors, mean=mean @ warp_matrix(NullSpace.from_weight(model.weight), warp).float().T,  # type: ignore[arg-type]  # noqa: E501
            settings=toy.QUIET,
        )
        for how in auditors:
            found[warp, how] = {**measured.translators[how].overall, **{f"c {k}": v for k, v in measured.translators[how].centred.items()}}
    figures = [f"{kind}{name}" for kind in ("", "c ") for name in ("AS", "AS_neg", "AS_abs", "IS")]
    moved = {how: max(abs(found["both", how][n] / found["same", how][n] - 1) for n in figures) for how in ("blocks", "features")}
    assert moved["blocks"] < 0.01
    assert moved["features"] > 0.3


def test_another_word_for_the_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="'block'"):
        fit_on_part(toy.classifier(), toy.ToyPart(9), np.zeros((9, 7), np.float32), standardize="block")  # type: ignore[arg-type]
