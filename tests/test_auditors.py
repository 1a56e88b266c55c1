"""Auditors from one pass against fits on the same images; what the agreement curve reads; processes; refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis import auditors as module
from singreg.analysis.auditors import agreement_curve, auditor_need, fit_auditors
from singreg.analysis.fitting import VALIDATION_EVERY, fit_on_split, translator_agreement
from singreg.data.embeddings import take_rows
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator, MLPTranslator, Translator, TranslatorInfo
from tests import planted, toy
from tests.processes import run_processes
from tests.reference.formulas import angle_degrees, null_projector

COUNT = 83


def auditors(**options: Any) -> tuple[dict[str, Translator], Tensor]:
    options = {"settings": toy.QUIET, **options}
    return fit_auditors(toy.classifier(), toy.ToySplit(COUNT), toy.embeddings(COUNT), **options)


def linear(found: Translator) -> LinearTranslator:
    assert isinstance(found, LinearTranslator)
    return found


@pytest.mark.parametrize("ridge", [None, 0.3])
def test_the_auditor_is_the_splits_own_standardised_fit(ridge: float | None) -> None:
    got, mean = auditors(ridge=ridge, info=TranslatorInfo(vlm="toys"))
    options: Any = {} if ridge is None else {"ridges": (ridge,)}
    split = toy.ToySplit(COUNT), toy.embeddings(COUNT)
    expected = fit_on_split(toy.classifier(), *split, standardize="blocks", settings=toy.QUIET, **options)
    assert list(got) == ["auditor", "auditor A", "auditor B"]
    np.testing.assert_allclose(linear(got["auditor"]).matrix, expected.translator.matrix, atol=1e-6)
    np.testing.assert_allclose(linear(got["auditor"]).offset, expected.translator.offset, atol=1e-6)
    np.testing.assert_allclose(mean, expected.mean, atol=1e-7)
    assert got["auditor"].info.validation_r2 == pytest.approx(expected.translator.info.validation_r2)
    assert (got["auditor"].info.vlm, got["auditor"].info.images) == ("toys", COUNT)
    assert all(found.info.by_block for found in got.values())


def test_halves_share_no_image_and_are_fits_on_theirs() -> None:
    got, _ = auditors(ridge=0.3)
    f, z = toy.features(toy.classifier(), toy.ToySplit(COUNT)), torch.from_numpy(toy.embeddings(COUNT)).double()
    basis = NullSpace.from_weight(toy.classifier().weight).basis
    first = torch.arange(COUNT) // VALIDATION_EVERY % 2 == 0
    for name, mine in (("auditor A", first), ("auditor B", ~first)):
        alone = RidgeStatistics(toy.WIDTH, toy.DIM).update(f[mine], z[mine]).solve(0.3, standardize=basis)
        np.testing.assert_allclose(linear(got[name]).matrix, alone.matrix, atol=1e-5)
        assert got[name].info.images == int(mine.sum())
    assert list(auditors(halves=False)[0]) == ["auditor"]


def test_another_vlm_and_a_network_under_their_own_names(tmp_path: Path) -> None:
    settings, mlp = replace(toy.QUIET, cache=str(tmp_path)), MLPSettings(hidden=8, epochs=2)
    got, _ = auditors(name="auditor VLM2", halves=False, mlp=mlp, settings=settings)
    assert list(got) == ["auditor VLM2", "auditor VLM2 mlp"]
    assert isinstance(got["auditor VLM2 mlp"], MLPTranslator)
    assert len(list(tmp_path.glob("*.npy"))) == 1  # one feature pass for both
    with pytest.raises(ValueError, match=r"give PassSettings\(cache=FOLDER\)"):
        auditors(mlp=mlp)


def share(rank: int, world: int) -> list[Tensor]:
    found, mean = auditors()
    return [*(linear(each).matrix for each in found.values()), mean]


def test_processes_fit_what_one_fits() -> None:
    for got in run_processes(2, share):
        for mine, one in zip(got, share(0, 1), strict=True):
            np.testing.assert_allclose(mine, one, atol=1e-5)


def test_the_curve_is_that_of_fits_on_disjoint_draws() -> None:
    world, test = planted.plant("leakage"), planted.plant("leakage", seed=1, count=200)
    sizes, seed = [60, 300, 1500], 3
    options: Any = {"ridge": 0.1, "basis": world.space.basis, "seed": seed}
    held_out = (test.features, test.embeddings, test.labels)
    points = agreement_curve(world.features, world.embeddings, world.texts, sizes[::-1], held_out=held_out, **options)
    assert [point["images"] for point in points] == sizes
    order = torch.randperm(planted.COUNT, generator=torch.Generator().manual_seed(seed))
    equivalent, text = test.features - test.features @ null_projector(world.weight), world.texts[test.labels]
    for point in points:
        sets = [order[place::2][: point["images"]] for place in (0, 1)]
        assert not {*sets[0].tolist()} & {*sets[1].tolist()}
        fits = []
        for place, rows in enumerate(sets):
            sums = RidgeStatistics(planted.WIDTH, planted.DIM).update(world.features[rows], world.embeddings[rows])
            fits.append(LinearTranslator.from_solution(sums.solve(0.1, standardize=world.space.basis)))
            z, z_eq = fits[-1](test.features), fits[-1](equivalent)
            assert point["cosine"][place] == pytest.approx(float(torch.cosine_similarity(z, test.embeddings).mean()))
            harm = torch.relu(angle_degrees(z_eq, text) - angle_degrees(z, text)).mean()
            assert point["AS_neg"][place] == pytest.approx(float(harm), abs=1e-4)
        assert point["agreement"] == pytest.approx(translator_agreement(*fits, world.texts), abs=1e-6)
    agreement, cosine = ([point["agreement"] for point in points], [min(point["cosine"]) for point in points])
    assert (agreement, cosine) == (sorted(agreement), sorted(cosine))  # more images agree better
    assert agreement[0] < 0.95 < agreement[-1]


def test_sizes_that_cannot_be_drawn_are_refused() -> None:
    world = planted.plant("nothing", count=40)
    table = world.features, world.embeddings, world.texts
    options: Any = {"held_out": (world.features, world.embeddings, world.labels), "basis": world.space.basis}
    for sizes in ([], [1, 10], [10, 21]):
        with pytest.raises(ValueError, match=r"out of 40 images hold 2 to 20 each"):
            agreement_curve(*table, sizes, ridge=0.1, **options)


def test_need_reads_only_the_images_it_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def noted(table: np.ndarray, rows: np.ndarray) -> Tensor:
        assert len(set(rows.tolist())) == len(rows)
        assert len(read) not in (2, 3) or rows.min() >= 9  # of the second split the first nine are not for the auditor
        read.append(len(rows))
        return take_rows(table, rows)

    monkeypatch.setattr(module, "take_rows", noted)
    pool = [(toy.ToySplit(40, seed=seed), toy.embeddings(40, seed=seed), np.arange(9 * seed, 40)) for seed in (0, 1)]
    held = toy.ToySplit(9, seed=2), toy.embeddings(9, seed=2)
    settings = replace(toy.QUIET, cache=str(tmp_path))
    need = auditor_need(toy.classifier(), pool, held, toy.texts(), [5, 10, 1000], ridge=1.0, settings=settings)
    assert [point["images"] for point in need] == [5, 10]
    assert read[0] + read[2] == 2 * 10  # features and embeddings of both splits, then the held-out ones
    assert read[4:] == [9, 9]
    assert all(np.isfinite([point["agreement"], *point["cosine"], *point["AS_neg"]]).all() for point in need)
    assert auditor_need(toy.classifier(), pool, held, toy.texts(), [1000], ridge=1.0, settings=settings) == []
