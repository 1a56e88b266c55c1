"""Perturbations of equal norm: against plain loops, what theory says of each kind, heads without a null space, processes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from singreg.analysis.features import evenly
from singreg.analysis.passport import head_passport
from singreg.analysis.perturbation import KINDS, PerturbationReport, measure_perturbations
from singreg.nullspace import NullSpace
from tests.analysis.levels.level_data import World
from tests.processes import run_processes
from tests.reference import formulas

SIZES = [0.1, 1.0]


def measure(w: World, *, size: int = 4, share: np.ndarray | None = None, **options: object) -> PerturbationReport:
    space = options.pop("null_space", None) or w.space
    settings = {"null_space": space, "translators": {"T": w.translator}, "sizes": SIZES, **options}
    batches = (replace(b, embeddings=b.features) for b in w.batches(size, share))
    return measure_perturbations(batches, weight=w.weight, **settings)  # type: ignore[arg-type]


def loops(w: World, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Every figure picture by picture: {kind: {figure: (N, sizes)}}."""
    project = formulas.null_projector(w.weight)
    weight, matrix, offset = w.weight.double(), w.translator.matrix.double(), w.translator.offset.double()
    found: dict[str, dict[str, list[list[float]]]] = {kind: {} for kind in KINDS}
    for index, f in enumerate(w.features.double()):
        gaussian = torch.from_numpy(np.random.Generator(np.random.Philox(key=[seed, index])).standard_normal(len(f)))
        kinds = {"null": project @ gaussian, "random": gaussian, "principal": gaussian - project @ gaussian}
        for kind, direction in kinds.items():
            rows: dict[str, list[float]] = {}
            for size in SIZES:
                moved = f + size * f.norm() * direction / direction.norm()
                change = (weight @ moved - weight @ f).abs().max()
                flipped = float((weight @ moved).argmax() != (weight @ f).argmax())
                angle = formulas.angle_degrees(matrix @ f + offset, matrix @ moved + offset)
                for name, value in (("logit_change", float(change)), ("flipped", flipped), ("angle T", float(angle))):
                    rows.setdefault(name, []).append(value)
            for name, values in rows.items():
                found[kind].setdefault(name, []).append(values)
    return {kind: {name: np.array(values) for name, values in rows.items()} for kind, rows in found.items()}


def test_every_figure_is_that_of_plain_loops() -> None:
    w = World.make(31)
    report = measure(w, seed=3)
    for kind, figures in loops(w, 3).items():
        for name, values in figures.items():
            tolerance = 1e-5 if name.startswith("angle") else 1e-9  # T works in float32's precision of its matrix, in float64
            assert report.curves[kind].mean[name] == pytest.approx(values.mean(0).tolist(), abs=tolerance), (kind, name)
            if name != "flipped":
                assert report.curves[kind].low[name] == pytest.approx(np.quantile(values, 0.05, axis=0).tolist(), abs=tolerance)
                assert report.curves[kind].high[name] == pytest.approx(np.quantile(values, 0.95, axis=0).tolist(), abs=tolerance)
    top = (w.features.double() @ w.weight.double().T).topk(2, dim=1).values
    assert report.margin == pytest.approx(float((top[:, 0] - top[:, 1]).mean()))
    assert report.images == 31


def test_the_null_moves_meaning_and_no_logit_the_row_space_moves_logits() -> None:
    w = World.make(200)
    report = measure(w)
    null, random, principal = (report.curves[kind] for kind in KINDS)
    assert max(null.mean["logit_change"]) < 1e-12
    assert null.mean["flipped"] == [0, 0]
    assert null.mean["angle T"][1] > 5
    assert null.mean["logit_change"][1] < random.mean["logit_change"][1] < principal.mean["logit_change"][1]
    # A random direction has √(r/m) of its length in the row space.
    ratio = random.mean["logit_change"][1] / principal.mean["logit_change"][1]
    assert ratio == pytest.approx((4 / 12) ** 0.5, rel=0.1)
    assert principal.mean["logit_change"][1] == pytest.approx(10 * principal.mean["logit_change"][0])
    assert principal.mean["flipped"][1] > principal.mean["flipped"][0]


def test_what_float32_leaves_of_a_null_perturbation_is_within_the_passports_bound() -> None:
    w = World.make(100)
    report = measure(w)
    bound = head_passport(w.weight).logit_bound
    largest = float(w.features.norm(dim=1).max())
    for place, size in enumerate(SIZES):
        change = report.curves["null"].high["logit_change_float32"][place]
        assert 0 < change <= bound * largest * (1 + size)


def test_a_head_without_a_null_space_has_no_null_curve() -> None:
    w = World.make(9)
    full = replace(w, weight=torch.randn(15, 12, generator=torch.Generator().manual_seed(2)))
    report = measure(full, null_space=NullSpace.from_weight(full.weight, allow_empty=True))
    assert sorted(report.curves) == ["principal", "random"]
    for name, values in report.curves["random"].mean.items():
        assert report.curves["principal"].mean[name] == pytest.approx(values)


def test_softmax_invariance_reads_changes_about_their_mean() -> None:
    w = World.make(20)
    space = NullSpace.from_weight(w.weight, invariance="softmax")
    assert max(measure(w, null_space=space).curves["null"].mean["logit_change"]) < 1e-12
    assert space.nullity == w.space.nullity + 1
    plain = NullSpace(space.basis, space.singular_values)  # the control: the same space, read as if logits had to stay
    assert max(measure(w, null_space=plain).curves["null"].mean["logit_change"]) > 0.1


def test_only_the_chosen_pictures_are_used_and_the_seed_decides() -> None:
    w = World.make(31)
    few = measure(w, chosen=np.arange(7))
    assert few.images == 7
    cut = replace(w, features=w.features[:7], labels=w.labels[:7])
    assert few == measure(cut)
    assert measure(w, chosen=evenly(31, 7)).images == 7
    assert measure(w, chosen=evenly(31, 7)) != few
    assert measure(w, seed=1) == measure(w, seed=1) != measure(w, seed=2)


def test_json_round_trip() -> None:
    report = measure(World.make(11))
    assert PerturbationReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def _in_process(rank: int, world: int) -> PerturbationReport:
    torch.set_num_threads(1)
    return measure(World.make(31), size=5, share=np.arange(rank, 31, 2) if rank < 2 else np.arange(0))


@pytest.mark.parametrize("world", [2, 3])
def test_over_processes_it_is_the_same(world: int) -> None:
    expected = measure(World.make(31))
    for report in run_processes(world, _in_process):
        assert report.images == 31
        for kind in KINDS:
            for name, values in expected.curves[kind].mean.items():
                tolerance = 1e-5 if name == "logit_change_float32" else 1e-9  # float32 products depend on the batch's size
                assert report.curves[kind].mean[name] == pytest.approx(values, abs=tolerance), (kind, name)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"above 0, got \[0\.1, 0\.0\]"):
        measure(World.make(5), sizes=[0.1, 0.0])
    with pytest.raises(ValueError, match="no process has any row"):
        measure(World.make(5), chosen=np.arange(0))
