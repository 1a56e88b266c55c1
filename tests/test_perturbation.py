"""Perturbations of equal norm: plain loops, what theory says of each kind, heads without a null space, processes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from singreg.analysis.perturbation import KINDS, SIZES, measure_perturbations
from singreg.nullspace import NullSpace
from tests.processes import run_same
from tests.reference import formulas
from tests.toy import World


def measure(w: World, size: int = 4, **options: Any) -> dict[str, Any]:
    settings = {"null_space": options.pop("null_space", None) or w.space, "chosen": np.arange(len(w.labels)), **options}
    return measure_perturbations(w.batches(size), weight=w.weight, translators={"T": w.translator}, **settings)


def loops(w: World, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Every figure image by image: {kind: {figure: (N, sizes)}}."""
    project = formulas.null_projector(w.weight)
    weight, matrix, offset = w.weight.double(), w.translator.matrix.double(), w.translator.offset.double()
    found: dict[str, dict[str, list[list[float]]]] = {kind: {} for kind in KINDS}
    for index, f in enumerate(w.features.double()):
        gaussian = np.random.Generator(np.random.Philox(key=[seed, index])).standard_normal(len(f))
        whole = torch.from_numpy(gaussian)
        kinds = {"null": project @ whole, "random": whole, "principal": whole - project @ whole}
        for kind, direction in kinds.items():
            rows: dict[str, list[float]] = {"logit_change": [], "angle T": []}
            for size in SIZES:
                moved = f + size * f.norm() * direction / direction.norm()
                rows["logit_change"].append(float((weight @ moved - weight @ f).abs().max()))
                angle = formulas.angle_degrees(matrix @ f + offset, matrix @ moved + offset)
                rows["angle T"].append(float(angle))
            for name, values in rows.items():
                found[kind].setdefault(name, []).append(values)
    return {kind: {name: np.array(values) for name, values in rows.items()} for kind, rows in found.items()}


def test_every_figure_is_that_of_plain_loops() -> None:
    w = World.make(31)
    report = measure(w, seed=3)
    for kind, figures in loops(w, 3).items():
        for name, values in figures.items():
            tolerance = 1e-5 if name.startswith("angle") else 1e-9  # the translator's matrix is in float32
            expected = values.mean(0).tolist()
            assert report["curves"][kind][name] == pytest.approx(expected, abs=tolerance), (kind, name)
    top = (w.features.double() @ w.weight.double().T).topk(2, dim=1).values
    assert report["margin"] == pytest.approx(float((top[:, 0] - top[:, 1]).mean()))
    assert report["images"] == 31


def test_the_null_moves_meaning_and_no_logit_the_row_space_moves_logits() -> None:
    null, random, principal = (measure(World.make(200))["curves"][kind] for kind in KINDS)
    assert max(null["logit_change"]) < 1e-12
    assert null["angle T"][4] > 5
    assert null["logit_change"][4] < random["logit_change"][4] < principal["logit_change"][4]
    # A random direction has √(r/m) of its length in the row space.
    ratio = random["logit_change"][4] / principal["logit_change"][4]
    assert ratio == pytest.approx((4 / 12) ** 0.5, rel=0.1)
    assert principal["logit_change"][4] == pytest.approx(10 * principal["logit_change"][2])


def test_a_head_without_a_null_space_has_no_null_curve() -> None:
    full = replace(World.make(9), weight=torch.randn(15, 12, generator=torch.Generator().manual_seed(2)))
    curves = measure(full, null_space=NullSpace.from_weight(full.weight, allow_empty=True))["curves"]
    assert sorted(curves) == ["principal", "random"]
    for name, values in curves["random"].items():
        assert curves["principal"][name] == pytest.approx(values)


def test_softmax_invariance_reads_changes_about_their_mean() -> None:
    w = World.make(20)
    space = NullSpace.from_weight(w.weight, invariance="softmax")
    plain = NullSpace(space.basis, space.singular_values)  # the control: read as if logits had to stay
    changes = [max(measure(w, null_space=s)["curves"]["null"]["logit_change"]) for s in (space, plain)]
    assert changes[0] < 1e-12
    assert changes[1] > 0.1


@pytest.mark.parametrize(("world", "count"), [(2, 31), (3, 31), (3, 2)])  # with two images the third is idle
def test_over_processes_it_is_the_same(world: int, count: int) -> None:
    expected = measure(World.make(count))
    for report in run_same(world, measure, World.make(count), 5):
        assert report["images"] == count
        for kind in KINDS:
            for name, values in expected["curves"][kind].items():
                tolerance = 1e-5 if name == "logit_change_float32" else 1e-9  # float32 products depend on the batch
                assert report["curves"][kind][name] == pytest.approx(values, abs=tolerance), (kind, name)
