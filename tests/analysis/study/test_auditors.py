"""Auditors from one pass against fits on the same pictures; what the agreement curve reads; processes; refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from singreg.analysis.old_fitting import VALIDATION_EVERY, fit_on_part
from singreg.analysis.study.agreement import translator_agreement
from singreg.analysis.study.auditors import Auditor, auditor_agreement_curve, fit_auditors
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator, MLPTranslator, TranslatorInfo
from tests.analysis import planted, toy
from tests.processes import run_processes
from tests.reference.formulas import angle_degrees, null_projector

COUNT = 83


def auditors(count: int = COUNT, **options: object) -> dict[str, Auditor]:
    options = {"settings": toy.QUIET, **options}
    return fit_auditors(toy.classifier(), toy.ToyPart(count), toy.embeddings(count), **options)  # type: ignore[arg-type]


def linear(found: Auditor) -> LinearTranslator:
    assert isinstance(found.translator, LinearTranslator)
    return found.translator


@pytest.mark.parametrize("ridge", [None, 0.3])
def test_the_auditor_is_the_part_s_own_standardised_fit(ridge: float | None) -> None:
    got = auditors(ridge=ridge, info=TranslatorInfo(vlm="toys"))
    options = {} if ridge is None else {"ridges": (ridge,)}
    expected = fit_on_part(
        toy.classifier(), toy.ToyPart(COUNT), toy.embeddings(COUNT), standardize="blocks", settings=toy.QUIET, **options
    )  # fmt: skip
    assert list(got) == ["auditor", "auditor A", "auditor B"]
    np.testing.assert_allclose(linear(got["auditor"]).matrix, expected.translator.matrix, atol=1e-6)
    np.testing.assert_allclose(linear(got["auditor"]).offset, expected.translator.offset, atol=1e-6)
    np.testing.assert_allclose(got["auditor"].mean, expected.mean, atol=1e-7)
    assert got["auditor"].translator.info.validation_r2 == pytest.approx(expected.translator.info.validation_r2)
    assert got["auditor"].translator.info.vlm == "toys"
    assert all(found.translator.info.by_block for found in got.values())


def test_halves_share_no_picture_and_are_fits_on_theirs() -> None:
    got = auditors(ridge=0.3)
    f, z = toy.features(toy.classifier(), toy.ToyPart(COUNT)), torch.from_numpy(toy.embeddings(COUNT)).double()
    basis = NullSpace.from_weight(toy.classifier().weight).basis
    first = torch.arange(COUNT) // VALIDATION_EVERY % 2 == 0
    for name, mine in (("auditor A", first), ("auditor B", ~first)):
        alone = RidgeStatistics(toy.WIDTH, toy.DIM).update(f[mine], z[mine]).solve(0.3, standardize=basis)
        np.testing.assert_allclose(linear(got[name]).matrix, alone.matrix, atol=1e-5)
        np.testing.assert_allclose(got[name].mean, f[mine].mean(0), atol=1e-6)
        assert got[name].translator.info.images == int(mine.sum())
    assert got["auditor"].translator.info.images == COUNT
    assert list(auditors(halves=False)) == ["auditor"]


def test_another_vlm_and_a_network_under_their_own_names(tmp_path: Path) -> None:
    settings, mlp = replace(toy.QUIET, cache=str(tmp_path)), MLPSettings(hidden=8, epochs=2)
    got = auditors(name="auditor VLM2", halves=False, mlp=mlp, normalize_targets=True, settings=settings)
    assert list(got) == ["auditor VLM2", "auditor VLM2 mlp"]
    assert isinstance(got["auditor VLM2 mlp"].translator, MLPTranslator)
    assert all(found.translator.info.normalized_targets for found in got.values())
    assert len(list(tmp_path.glob("*.npy"))) == 1  # one feature pass for both
    with pytest.raises(ValueError, match=r"give PassSettings\(cache=FOLDER\)"):
        auditors(mlp=mlp)


def share(rank: int, world: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (linear(found).matrix, found.mean) for name, found in auditors().items()}


def test_processes_fit_what_one_fits() -> None:
    expected = share(0, 1)
    for got in run_processes(2, share):
        for name, (matrix, mean) in expected.items():
            np.testing.assert_allclose(got[name][0], matrix, atol=1e-5)
            np.testing.assert_allclose(got[name][1], mean, atol=1e-6)


def test_the_curve_is_that_of_fits_on_disjoint_draws_and_more_pictures_agree_better() -> None:
    world, test = planted.plant("leakage"), planted.plant("leakage", seed=1, count=200)
    sizes, seed = [60, 300, 1500], 3
    points = auditor_agreement_curve(
        world.features, world.embeddings, world.texts, sizes[::-1], ridge=0.1, basis=world.space.basis,
        held_out=(test.features, test.embeddings, test.labels), seed=seed,
    )  # fmt: skip
    assert [point.images for point in points] == sizes
    order, project = torch.randperm(planted.COUNT, generator=torch.Generator().manual_seed(seed)), null_projector(world.weight)
    for point in points:
        sets = [order[place::2][: point.images] for place in (0, 1)]
        assert not {*sets[0].tolist()} & {*sets[1].tolist()}
        fits = []
        for place, rows in enumerate(sets):
            sums = RidgeStatistics(planted.WIDTH, planted.DIM).update(world.features[rows], world.embeddings[rows])
            fits.append(LinearTranslator.from_solution(sums.solve(0.1, standardize=world.space.basis)))
            z, z_eq = fits[-1](test.features), fits[-1](test.features - test.features @ project)
            text = world.texts[test.labels]
            assert point.cosine[place] == pytest.approx(float(torch.cosine_similarity(z, test.embeddings).mean()), abs=1e-6)
            harm = torch.relu(angle_degrees(z_eq, text) - angle_degrees(z, text)).mean()
            assert point.AS_neg[place] == pytest.approx(float(harm), abs=1e-4)
        assert point.agreement == pytest.approx(translator_agreement(*fits, world.texts), abs=1e-6)
    agreement, cosine = [point.agreement for point in points], [min(point.cosine) for point in points]
    assert agreement == sorted(agreement)
    assert cosine == sorted(cosine)
    assert agreement[0] < 0.95 < agreement[-1]


def test_sizes_that_cannot_be_drawn_are_refused() -> None:
    world = planted.plant("nothing", count=40)
    held_out = (world.features, world.embeddings, world.labels)
    for sizes in ([], [1, 10], [10, 21]):
        with pytest.raises(ValueError, match=r"out of 40 pictures hold 2 to 20 each"):
            auditor_agreement_curve(
                world.features, world.embeddings, world.texts, sizes, ridge=0.1, basis=world.space.basis, held_out=held_out
            )
