"""Chance levels against plain loops with explicit projectors, over batches and processes; what they must be by theory."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis.chance import _cycle, measure_chance
from singreg.analysis.chance_results import FIGURES, KINDS, ChanceReport
from singreg.nullspace import NullSpace, RandomSubspace, matched_coefficients
from singreg.translator import LinearTranslator
from tests.analysis.levels.level_data import World
from tests.processes import run_processes
from tests.reference import formulas

DRAWS, SEED = 3, 5


def world() -> World:
    return World.make(31, unlabelled=False)


def measure(w: World, *, size: int = 4, share: np.ndarray | None = None, function: bool = False, **options: object) -> ChanceReport:
    translator = w.translator.double()
    reader = (lambda f: f.double() @ translator.matrix.T + translator.offset) if function else translator
    batches = (replace(b, features=b.features.double()) for b in w.batches(size, share))
    settings = {"draws": DRAWS, "seed": SEED, **options}
    return measure_chance(
        batches, texts=w.texts.double(), null_space=w.space, translators={"T": reader}, mean=w.mean.double(), **settings  # type: ignore[arg-type]
    )["T"]


def projector(w: World, draw: int) -> Tensor:
    """The random subspace's projection as an (m, m) matrix."""
    space = RandomSubspace.draw(w.weight.shape[1], w.space.nullity, seed=(SEED, draw))
    inside = space.basis @ space.basis.T
    return torch.eye(len(inside)).double() - inside if space.complement else inside


def displacement(kind: str, g: Tensor, null: Tensor, random: Tensor) -> Tensor:
    """δ of one picture, from vectors: as long as the null part and at its angle to g, towards P g's part across g."""
    if kind == "dimension":
        return random @ g
    n, along = null @ g, g / g.norm()
    across = random @ g - (random @ g @ along) * along
    return n.norm() ** 2 / g.norm() * along + n.norm() * (1 - (n.norm() / g.norm()) ** 2).sqrt() * across / across.norm()


def loops(w: World, kind: str, centred: bool) -> dict[str, tuple[float, float]]:
    """Mean and spread over draws by plain loops; the texts' cycle is read from the function itself."""
    null, f, t = formulas.null_projector(w.weight), w.features.double(), w.texts.double()
    matrix, offset = w.translator.matrix.double(), w.translator.offset.double()
    draws = []
    for draw in range(DRAWS):
        cycle = _cycle(len(t), seed=(SEED, draw))
        rows = []
        for x, label in zip(f, w.labels.tolist(), strict=True):
            g = x - w.mean.double() if centred else x
            delta = null @ g if kind == "texts" else displacement(kind, g, null, projector(w, draw))
            text = t[int(cycle[label])] if kind == "texts" else t[label]
            z, z_eq = matrix @ x + offset, matrix @ (x - delta) + offset
            before, after, moved = (formulas.angle_degrees(a, b) for a, b in ((z, text), (z_eq, text), (z, z_eq)))
            rad = [torch.deg2rad(v) for v in (before, after, moved)]
            kappa = (rad[1].cos() - rad[0].cos() * rad[2].cos()) / (rad[0].sin() * rad[2].sin())
            score = before - after
            rows.append([score, (-score).clamp_min(0), score.clamp_min(0), score.abs(), moved, kappa])
        draws.append(torch.tensor(rows).double().mean(0))
    table = torch.stack(draws)
    return {name: (float(table[:, k].mean()), float(table[:, k].std())) for k, name in enumerate(FIGURES)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("function", [False, True])
def test_levels_are_those_of_plain_loops(kind: str, centred: bool, function: bool) -> None:
    """By the thin products of a linear translator, and by calling one as a function."""
    w = world()
    report = measure(w, function=function)
    level = (report.centred if centred else report.paper).levels[kind]
    for name, (mean, spread) in loops(w, kind, centred).items():
        assert level.mean[name] == pytest.approx(mean, abs=1e-6), name
        assert level.spread[name] == pytest.approx(spread, abs=1e-6), name
    assert report.images == 31
    assert (report.dimensions, report.features) == (8, 12)


def test_the_observed_scores_are_the_real_removals() -> None:
    w = world()
    report = measure(w)
    z = w.translator.double()(w.features.double())
    for scores, mean in ((report.paper, None), (report.centred, w.mean.double())):
        z_eq = w.translator(w.space.remove(w.features.double(), mean=mean))
        image = formulas.angle_degrees(z, z_eq)
        text = w.texts.double()[w.labels]
        change = formulas.angle_degrees(z, text) - formulas.angle_degrees(z_eq, text)
        assert scores.observed["IS"] == pytest.approx(float(image.mean()), abs=1e-6)
        assert scores.observed["AS"] == pytest.approx(float(change.mean()), abs=1e-6)
        assert scores.levels["texts"].mean["IS"] == pytest.approx(scores.observed["IS"], abs=1e-9)
        assert scores.levels["texts"].spread["IS"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rows", [2, 9])  # a null space larger and smaller than the row space
def test_equal_energy_is_equal_for_every_picture_at_the_same_angle(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    f = torch.randn(50, 12, generator=g, dtype=torch.float64) + 1
    space = NullSpace.from_weight(torch.randn(rows, 12, generator=g))
    random = RandomSubspace.draw(12, space.nullity, seed=1)
    assert random.complement == (rows < 6)
    null, part = space.component(f), random.component(f)
    squared = f.square().sum(1)
    share, other = null.square().sum(1) / squared, part.square().sum(1) / squared
    assert (share - other).abs().max() > 0.05  # the control: a plain random removal takes another share of each picture
    alpha, beta = matched_coefficients(share, other)
    delta = alpha[:, None] * f + beta[:, None] * part
    torch.testing.assert_close(delta.norm(dim=1), null.norm(dim=1))
    torch.testing.assert_close((delta * f).sum(1), (null * f).sum(1))
    torch.testing.assert_close((f - delta).norm(dim=1), space.remove(f).norm(dim=1))


def test_energies_removed_are_reported() -> None:
    w = world()
    report = measure(w, draws=200, size=31)
    f = w.features.double()
    expected = float(w.space.component(f).square().sum() / f.square().sum())
    assert report.paper.energy == pytest.approx(expected, rel=1e-9)
    assert report.paper.levels["energy"].energy == pytest.approx(expected, rel=1e-9)
    assert report.paper.levels["texts"].energy == pytest.approx(expected, rel=1e-9)
    assert report.paper.levels["dimension"].energy == pytest.approx(8 / 12, abs=0.03)  # d/m whatever the features
    assert abs(expected - 8 / 12) > 0.03


def test_random_subspaces_are_uniform_and_orthonormal() -> None:
    for dimension in (3, 7):
        spaces = [RandomSubspace.draw(10, dimension, seed=seed) for seed in range(400)]
        assert {s.basis.shape[1] for s in spaces} == {3}
        assert {s.complement for s in spaces} == {dimension == 7}
        eye = torch.eye(10).double()
        mean = torch.stack([s.component(eye) for s in spaces]).mean(0)
        torch.testing.assert_close(mean, eye * dimension / 10, atol=0.06, rtol=0)
        first = spaces[0].component(eye)
        torch.testing.assert_close(first @ first, first)
        assert torch.linalg.matrix_rank(first) == dimension
    assert torch.equal(RandomSubspace.draw(10, 3, seed=1).basis, RandomSubspace.draw(10, 3, seed=1).basis)


def test_a_null_space_drawn_at_random_is_at_its_own_chance_level() -> None:
    """And one that was put where the meaning is, is not: the levels are centred where they should be, and they discriminate."""
    g = torch.Generator().manual_seed(0)
    f, matrix = torch.randn(400, 20, generator=g), torch.randn(9, 20, generator=g)
    w = World(f, torch.arange(400) % 4, torch.randn(8, 20, generator=g), LinearTranslator(matrix, torch.zeros(9)),
              torch.randn(4, 9, generator=g), torch.randn(3, 9, generator=g), f.mean(0))  # fmt: skip
    scores = measure(w, size=100, draws=30).paper
    for kind in ("dimension", "energy"):
        for name in FIGURES:
            distance = scores.beyond(kind, name)
            assert distance is not None
            assert abs(distance) < 4, (kind, name)
    aligned = replace(w, weight=torch.linalg.qr(matrix.T).Q.T[:8])  # the null space loses eight of the nine directions T reads
    distance = measure(aligned, size=100, draws=12).paper.beyond("dimension", "IS")
    assert distance is not None
    assert distance < -5


def test_shuffled_texts_never_read_a_class_by_its_own() -> None:
    for classes in (2, 3, 50):
        for seed in range(20):
            order = _cycle(classes, seed=seed)
            assert sorted(order.tolist()) == list(range(classes))
            assert not (order == torch.arange(classes)).any()
    assert len({tuple(_cycle(5, seed=seed).tolist()) for seed in range(40)}) > 10


def test_classes_without_pictures_are_none_and_the_rest_average_to_the_whole() -> None:
    w = world()
    level = measure(w).paper.levels["dimension"]
    per_class = level.per_class["AS"]
    assert per_class[3] is None
    counts = [int((w.labels == label).sum()) for label in range(3)]
    assert np.average(per_class[:3], weights=counts) == pytest.approx(level.mean["AS"])  # type: ignore[arg-type]


def test_json_round_trip_and_reproducibility() -> None:
    report = measure(world())
    assert ChanceReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    assert measure(world()) == report
    other = measure(world(), seed=6).paper
    for kind in KINDS:
        assert other.levels[kind] != report.paper.levels[kind]


def test_float32_features_give_the_same_to_rounding() -> None:
    w = world()
    exact = measure(w)
    narrow = measure_chance(
        w.batches(), texts=w.texts, null_space=w.space, translators={"T": w.translator.float()}, mean=w.mean, draws=DRAWS, seed=SEED
    )["T"]
    for kind in KINDS:
        assert narrow.centred.levels[kind].mean == pytest.approx(exact.centred.levels[kind].mean, abs=1e-3)


def _in_process(rank: int, world_size: int) -> ChanceReport:
    torch.set_num_threads(1)
    share = np.arange(rank, 31, 2) if rank < 2 else np.arange(0)  # the third process is idle
    return measure(world(), size=5, share=share)


@pytest.mark.parametrize("processes", [2, 3])
def test_over_processes_it_is_the_same(processes: int) -> None:
    expected = measure(world())
    for report in run_processes(processes, _in_process):
        assert report.images == 31
        for removal in ("paper", "centred"):
            mine, theirs = getattr(report, removal), getattr(expected, removal)
            assert mine.observed == pytest.approx(theirs.observed, rel=1e-9)
            assert mine.energy == pytest.approx(theirs.energy, rel=1e-9)
            for kind in KINDS:
                assert mine.levels[kind].mean == pytest.approx(theirs.levels[kind].mean, rel=1e-9)
                assert mine.levels[kind].energy == pytest.approx(theirs.levels[kind].energy, rel=1e-9)
                assert mine.levels[kind].spread == pytest.approx(theirs.levels[kind].spread, rel=1e-6, abs=1e-9)


def test_bad_input_is_named() -> None:
    w = world()
    with pytest.raises(ValueError, match="labelled pictures"):
        measure(World.make(31))
    with pytest.raises(ValueError, match="2 draws"):
        measure(w, draws=1)
    with pytest.raises(ValueError, match="no process had a picture"):
        measure(w, share=np.arange(0))
    with pytest.raises(ValueError, match=r"dimension in 1\.\.4, got 5"):
        RandomSubspace.draw(4, 5, seed=0)
    full = NullSpace.from_weight(torch.eye(12), allow_empty=True)
    with pytest.raises(ValueError, match="no null space"):
        measure_chance([], texts=w.texts, null_space=full, translators={}, mean=w.mean)
