"""R² of what is not class and of known attributes: plain least squares, planted truths, the limits, processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis.information import BlockFits, fit_blocks
from singreg.analysis.study.harmless import attribute_r2, harmless_rows
from tests.analysis import planted
from tests.processes import run_processes

NAMES = ("seen", "hidden", "noise", "constant")


def fits_of(world: planted.Planted) -> BlockFits:
    return fit_blocks(world.batches(), null_space=world.space, classes=planted.CLASSES, target_dim=world.embeddings.shape[1])


def r2(rows: dict[str, np.ndarray]) -> float:
    return float(1 - rows["residual"].sum() / rows["spread"].sum())


def harmless(case: str) -> tuple[dict[str, np.ndarray], planted.Planted, BlockFits]:
    test, fits = planted.plant(case, seed=1, count=900), fits_of(planted.plant(case))
    return harmless_rows(test.batches(), fits, test.texts), test, fits


def test_harmless_rows_are_picture_by_picture_what_the_fit_misses_off_the_prompts() -> None:
    rows, test, fits = harmless("nuisance")
    off = torch.eye(planted.DIM).double() - torch.linalg.pinv(test.texts) @ test.texts
    matrix = fits.solutions["features"].matrix @ fits.basis["features"].T
    z, mean = test.embeddings, test.embeddings.mean(0)
    for i in range(0, 900, 97):
        error = off @ (z[i] - matrix @ test.features[i] - fits.solutions["features"].offset)
        assert rows["residual"][i] == pytest.approx(float(error @ error))
        assert rows["spread"][i] == pytest.approx(float((off @ (z[i] - mean)).square().sum()))
    assert rows["index"].tolist() == list(range(900))


def test_nuisance_in_the_null_is_harmless_variety_and_class_is_none() -> None:
    assert r2(harmless("nuisance")[0]) > 0.8
    assert abs(r2(harmless("leakage")[0])) < 0.1  # z's variety is class alone, and that lies within the prompts' span
    emptied, test, _ = harmless("nuisance")
    train = planted.plant("nuisance")
    bare = planted.Planted(train.space.remove(train.features), train.embeddings, train.labels, train.weight, train.texts)
    gone = planted.Planted(test.space.remove(test.features), test.embeddings, test.labels, test.weight, test.texts)
    after = r2(harmless_rows(gone.batches(), fits_of(bare), test.texts))
    assert after < 0.1 < 0.8 < r2(emptied)


def test_prompts_that_span_everything_leave_nothing_to_measure() -> None:
    rows, test, fits = harmless("nuisance")
    everything = harmless_rows(test.batches(), fits, torch.eye(planted.DIM))
    assert not everything["residual"].any()
    assert not everything["spread"].any()
    repeated = harmless_rows(test.batches(), fits, torch.cat([test.texts, test.texts]))  # the same span
    np.testing.assert_allclose(repeated["residual"], rows["residual"], rtol=1e-9)


def attributes(seed: int, count: int) -> planted.Planted:
    """Known attributes in the place of embeddings: one in the row space, one in the null space, noise, a constant."""
    world = planted.plant("nuisance", seed=seed, count=count)
    row, null = world.features @ world.space.basis, world.features @ world.space.null_basis()
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()
    known = torch.stack([row[:, 0] + row[:, 3], null[:, 0], noise, torch.ones_like(noise)], dim=1)
    return planted.Planted(world.features, known, world.labels, world.weight, world.texts)


def known(rank: int, world: int) -> dict[str, dict[str, float]]:
    train, test = attributes(0, 1200), attributes(1, 601)
    fits = fit_blocks(train.batches(100, rank, world), null_space=train.space, classes=planted.CLASSES, target_dim=4)
    return attribute_r2(test.batches(100, rank, world), fits, NAMES)


def test_attributes_are_found_in_the_block_they_were_planted_in() -> None:
    found = known(0, 1)
    assert list(found) == list(NAMES)
    expected = {"seen": (1, 1, 0), "hidden": (1, 0, 1), "noise": (0, 0, 0)}
    for name, values in expected.items():
        assert tuple(found[name].values()) == pytest.approx(values, abs=0.06), name
    assert all(np.isnan(value) for value in found["constant"].values())


def test_r2_of_an_attribute_is_the_slow_one() -> None:
    train, test = attributes(0, 1200), attributes(1, 601)
    fits, found = fits_of(train), known(0, 1)
    solution = fits.solutions["null_space"]

    def slow(place: int) -> float:
        target: Tensor = test.embeddings[:, place]
        read = torch.stack([solution.matrix[place] @ (fits.basis["null_space"].T @ f) + solution.offset[place] for f in test.features])
        return float(1 - (target - read).square().sum() / (target - target.mean()).square().sum())

    for place in range(3):
        assert found[NAMES[place]]["null_space"] == pytest.approx(slow(place), abs=1e-8)


def test_processes_find_what_one_finds() -> None:
    for got in run_processes(2, known):
        for name, blocks in known(0, 1).items():
            assert got[name] == pytest.approx(blocks, abs=1e-8, nan_ok=True)
