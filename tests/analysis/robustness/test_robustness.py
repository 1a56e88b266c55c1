"""Robustness to steering: curves against plain loops, the rules on sound and on broken attacks, drop_null, processes, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import singreg.analysis.old_steering.plan as planning
from singreg.analysis.old_steering.curves import Budgets
from singreg.analysis.old_steering.results import NaturalRadii
from singreg.analysis.old_robustness.attacks import (
    MAXIMISER,
    RANDOM,
    SINGLE,
    Attack,
    Climb,
    Grids,
    Outsider,
    adaptive_name,
    transfer_name,
)
from singreg.analysis.old_robustness.measure import RobustnessSettings, usual_attacks
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.maximiser import Directions, Maximiser
from singreg.models.edits import drop_null
from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian, steering_direction
from tests.analysis import toy
from tests.analysis.robustness import robust
from tests.processes import run_processes
from tests.reference.formulas import angle_degrees, null_projector

LABELS = toy.ToyPart(robust.COUNT).labels
THIN = Outsider(lambda f: f, NullSpace.from_weight(torch.ones(1, 3)))
PAIRS = [(i, k) for i in range(robust.COUNT) for k in range(toy.CLASSES) if k != LABELS[i]]


def outranks(z: Tensor, target: int) -> bool:
    return int(cosine_similarity(z[None], toy.texts().double()).argmax()) == target


def slow(displace: Any, judge: str, *, project: Tensor | None = None) -> dict[str, float]:
    """Success and AS of one attack at one budget by plain loops: displace(f, target) is d; project is what a defence lets through."""
    model, read = robust.classifier(), robust.translators()[judge]
    through = torch.eye(toy.WIDTH).double() if project is None else project
    weight, bias = model.weight.double(), model.bias.double()
    won, gained, kept = [], [], []
    for i, k in PAIRS:
        f = robust.features()[i]
        moved = f + displace(f, k)
        before, after = read(through @ f), read(through @ moved)
        same = int((weight @ f + bias).argmax()) == int((weight @ moved + bias).argmax())
        text = toy.texts()[k].double()
        gained.append(float(angle_degrees(before, text) - angle_degrees(after, text)))
        kept.append(float(same))
        if not outranks(before, k):
            won.append(float(same and outranks(after, k)))
    figures = {"success": won, "AS": gained, "AS_abs": np.abs(gained), "kept": kept}
    return {name: float(np.mean(values)) for name, values in figures.items()}


def single(space: NullSpace, step: float) -> Any:
    t = robust.translators()["one"]
    arguments = {"matrix": t.matrix.double(), "offset": t.offset.double(), "null_space": space}
    return lambda f, k: step * f.norm() * steering_direction(f[None], toy.texts()[k].double(), **arguments)[0]


def most(space: NullSpace, step: float) -> Any:
    t = robust.translators()["one"]
    maximiser = Maximiser(Directions(space), matrix=t.matrix, offset=t.offset)
    return lambda f, k: maximiser.maximise(f[None], toy.texts()[k], step * float(f.norm())).displacement[0]


def test_curves_are_those_of_plain_loops() -> None:
    found, space = robust.usual(), NullSpace.from_weight(robust.classifier().weight)
    assert found.rows == len(PAIRS)
    assert found.images == robust.COUNT
    for attack, displace in ((SINGLE, single), (MAXIMISER, most)):
        for judge in ("one", "two"):
            curve = found.curve(attack, crafted_on="one", judge=judge)
            # at 0.6 many displacements reach the target exactly, and which of them is found another judge can tell
            for step in (0.1, 0.6) if attack == SINGLE or judge == "one" else (0.1,):
                for name, value in slow(displace(space, step), judge).items():
                    close = pytest.approx(value, abs=2e-2 if name.startswith("AS") else 1e-9)
                    assert curve.at(step, name) == close, (attack, judge, step, name)
            heights = np.array(curve.figures["AS"])
            area = np.sum((heights[1:] + heights[:-1]) / 2 * np.diff(curve.grid)) / 0.6
            assert curve.area["AS"][0] == pytest.approx(area)
            assert curve.area["AS"][1] <= area <= curve.area["AS"][2]
            for place in range(1, 4):
                low, high = curve.intervals["success"][place]
                assert low <= curve.figures["success"][place] <= high
    read = robust.translators()["two"]
    already = np.mean([outranks(read(robust.features()[i]), k) for i, k in PAIRS])
    assert found.already["two"] == pytest.approx(already)
    assert 0 < already < 0.5


def test_matrix_holds_what_the_curve_averages() -> None:
    found = robust.usual()
    for matrix in found.matrices:
        curve = found.curve(matrix.attack, crafted_on=matrix.crafted_on, judge=matrix.judge)
        assert matrix.step == 0.3
        rows = np.array([[count or 0 for count in row] for row in matrix.rows])
        gained = np.array([[value or 0 for value in row] for row in matrix.AS])
        assert rows.sum() == len(PAIRS)
        assert (np.diag(rows) == 0).all()
        assert matrix.success[0][0] is None
        assert (gained * rows).sum() / rows.sum() == pytest.approx(curve.at(0.3, "AS"))
    assert {(m.attack, m.crafted_on, m.judge) for m in found.matrices} == {
        (attack, a, b) for attack in (SINGLE, MAXIMISER) for a in ("one", "two") for b in ("one", "two")
    }


def test_every_rule_holds_on_a_sound_measurement() -> None:
    found = robust.usual()
    assert [str(check) for check in found.checks if not check.passed] == []
    assert found.sound
    assert found.absent == {}
    names = " ".join(check.name for check in found.checks)
    for rule in ("goes to 100 %", "many steps", "white box", "random direction", "no budget", "the tolerance", "its budget", "exactly 0"):
        assert rule in names
    assert found.limit_success == {"one": 1.0, "two": 1.0}
    strict = found.curve(MAXIMISER, crafted_on="one", judge="one").figures["similarity"]
    near = [found.curve(name, judge="one") for name in ("near-null 5 %, τ 0.01", "near-null 5 %, τ 0.1")]
    assert 0.005 < max(near[0].logit_change) <= 0.01 < max(near[1].logit_change) <= 0.1
    assert strict[2] <= near[0].figures["similarity"][2] + 1e-6 <= near[1].figures["similarity"][2] + 1e-5
    assert near[1].figures["similarity"][2] > strict[2] + 1e-4


class Broken:
    """An attack with one fault: turned round, or not brought back to its budget, or out of the null space."""

    def __init__(self, attack: Attack, fault: str) -> None:
        self.name, self.crafted_on, self.budgets, self.tolerance = attack.name, attack.crafted_on, attack.budgets, attack.tolerance
        self._attack, self._fault = attack, fault

    def displacements(self, rows: Any, index: Any, budget: str, grid: Any) -> Iterator[Tensor]:
        for d in self._attack.displacements(rows, index, budget, grid):
            if self._fault == "out of the null space":
                yield d + 0.001 * d.norm(dim=1, keepdim=True) * robust.classifier().weight.double()[0]
            else:
                yield {"wrong sign": -1.0, "no retraction": 1.5, "no effort": 0.2}[self._fault] * d


def attacks(**changes: Any) -> list[Attack]:
    model, options = robust.classifier(), replace(robust.OPTIONS, **changes)
    space = NullSpace.from_weight(model.weight)
    return usual_attacks(robust.translators(), model.weight.detach(), space, Grids(options.grid(), limit=options.limit), {}, options)[0]


def failed(found: RobustnessFigures) -> set[str]:
    return {check.name.split(" (")[0] for check in found.checks if not check.passed}


@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        ("wrong sign", {"success goes to 100 % as the budget grows", "many steps reach at least what one step does"}),
        ("no retraction", {"every displacement is within its budget"}),
        ("no effort", {"many steps reach at least what one step does", "white box reaches at least what transfer does"}),
        ("out of the null space", {"logits stay within the tolerance"}),
    ],
)
def test_a_broken_maximiser_is_found(fault: str, rules: set[str]) -> None:
    kind = [a for a in attacks(near_ratios=()) if a.name != RANDOM]
    broken = [Broken(a, fault) if a.name == MAXIMISER and a.crafted_on == "one" else a for a in kind]
    assert rules <= failed(robust.measure(attacks=broken))
    assert not failed(robust.measure(attacks=kind))


def test_an_attack_that_forgets_the_null_space_is_found_by_the_defence_too() -> None:
    one = robust.translators()["one"]
    everywhere = Maximiser(Directions(basis=torch.eye(toy.WIDTH).double()), matrix=one.matrix, offset=one.offset)
    loose = Climb(MAXIMISER, "one", everywhere, grids=Grids(robust.STEPS))
    assert failed(robust.measure(attacks=[loose])) >= {"logits stay within the tolerance", "success is exactly 0"}


def test_a_single_step_of_the_wrong_sign_and_a_tolerance_that_is_not_kept_are_found() -> None:
    kind = attacks(tolerances=(0.1,))
    broken = [Broken(a, "wrong sign") if a.name == SINGLE else a for a in kind]
    assert failed(robust.measure(attacks=broken)) == {"a random direction is far below the gradient"}
    loose = next(a for a in kind if a.name == "near-null 5 %, τ 0.1")
    loose.tolerance = 0.01
    assert failed(robust.measure(attacks=[loose])) >= {"logits stay within the tolerance"}


def test_dropping_the_null_space_leaves_exactly_nothing() -> None:
    found, model = robust.usual(), robust.classifier()
    for attack in (SINGLE, MAXIMISER, RANDOM):
        curve = found.curve(attack, crafted_on="one", judge="two", defence="drop_null")
        assert curve.figures["success"] == [0.0] * 4
        assert max(curve.figures["AS_abs"]) < 1e-5
    # nearly null directions are not dropped: they are what an attacker has left
    near = found.curve("near-null 5 %, τ 0.1", judge="two", defence="drop_null")
    assert near.figures["AS_abs"][-1] > 1e-3
    # the same features as those of the edited model, mapped back
    dropped = drop_null(model)
    part = toy.ToyPart(robust.COUNT)
    thin = toy.features(dropped, part)
    basis = NullSpace.from_weight(model.weight).basis
    wide = robust.features() - robust.features() @ null_projector(model.weight)
    torch.testing.assert_close(thin @ basis.T, wide, atol=1e-5, rtol=0)
    kept = torch.eye(toy.WIDTH).double() - null_projector(model.weight)
    slowly = slow(most(NullSpace.from_weight(model.weight), 0.6), "two", project=kept)
    assert slowly["success"] == 0
    with pytest.raises(ValueError, match="no null space"):
        robust.measure(classifier=dropped)


def other_model(angle: float) -> tuple[NullSpace, Tensor]:
    """A head turned a little away from this one's."""
    weight = robust.classifier().weight.detach().double()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).double()
    turned = weight + angle * noise * weight.norm() / noise.norm()
    return NullSpace.from_weight(turned), turned


def test_other_models_attack_by_transfer_and_by_their_null_space() -> None:
    mine = Outsider(robust.translators()["one"], NullSpace.from_weight(robust.classifier().weight))
    theirs = Outsider(robust.translators()["two"], other_model(0.3)[0])
    found = robust.measure(outsiders={"itself": mine, "pretrained": theirs}, near_ratios=())
    own = found.curve(MAXIMISER, crafted_on="one", judge="two")
    for name in (transfer_name("itself"), adaptive_name("itself")):
        same = found.curve(name, judge="two")
        assert same.figures["AS"] == pytest.approx(own.figures["AS"])
        assert max(same.logit_change) < 1e-6
    for name in (transfer_name("pretrained"), adaptive_name("pretrained")):
        curve = found.curve(name, judge="one")
        assert max(curve.logit_change) > 0.05  # measured, not promised
        assert curve.tolerance is None
        assert curve.figures["kept"][0] == 1
    assert found.curve(transfer_name("pretrained"), judge="one").crafted_on == "pretrained"
    assert not failed(found)


def with_radii() -> Budgets:
    f, space = robust.features(), NullSpace.from_weight(robust.classifier().weight)
    root = torch.randn(toy.WIDTH, toy.WIDTH, generator=torch.Generator().manual_seed(2)).double()
    gaussian = ConditionalGaussian.from_moments(f.mean(0), root @ root.T / toy.WIDTH, space)
    quantiles = torch.quantile(gaussian.radius(f), torch.tensor([0.5, 0.95, 0.99]).double()).tolist()
    natural = NaturalRadii(*quantiles, images=len(f), dimensions=space.nullity, fit_images=99, floor=1e-3, floored=0)
    return Budgets.over(robust.STEPS, [0.9, 1.5, 4.0], gaussian, natural)


def test_natural_radii_are_a_second_budget() -> None:
    budgets = with_radii()
    found = robust.measure(radii=budgets, near_ratios=())
    many, one = (found.curve(attack, crafted_on="one", judge="one", budget="radius") for attack in (MAXIMISER, SINGLE))
    assert many.grid == budgets.grid("radius")
    assert found.natural is not None
    assert found.natural == budgets.natural.marks
    assert found.natural["99 %"] >= found.natural["95 %"] > 1
    assert RobustnessFigures.from_json(json.loads(json.dumps(found.to_json()))).natural == found.natural
    assert max(np.array(many.longest) - many.grid) <= 1e-6
    assert many.at(4.0, "similarity") >= one.at(4.0, "similarity")
    assert many.at(4.0, "AS") > many.at(0.9, "AS")
    assert many.figures["similarity"] == sorted(many.figures["similarity"])
    assert not failed(found)


def test_chunks_and_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = robust.usual().to_json()
    shared = run_processes(2, robust.measure)
    assert [figures.to_json()["rows"] for figures in shared] == [whole["rows"]] * 2
    monkeypatch.setattr(planning, "CHUNK_ELEMENTS", 3 * (toy.WIDTH + toy.DIM + toy.CLASSES))
    torn = robust.measure().to_json()
    for other in (torn, *(figures.to_json() for figures in shared)):
        for a, b in zip(whole["curves"], other["curves"], strict=True):
            for name in ("success", "AS", "kept", "similarity"):
                # At the largest step the attacker reaches cosine 1 by many displacements alike, which another judge tells apart.
                until = -1 if name in ("AS", "success") and a["judge"] != a["crafted_on"] else None
                assert a["figures"][name][:until] == pytest.approx(b["figures"][name][:until], abs=1e-6), (a["attack"], name)
        for a, b in zip(whole["matrices"], other["matrices"], strict=True):
            assert a["rows"] == b["rows"]


def test_json_is_strict_and_comes_back() -> None:
    found = robust.usual()
    text = json.dumps(found.to_json(), allow_nan=False)
    assert RobustnessFigures.from_json(json.loads(text)) == found
    with pytest.raises(ValueError, match="expected robustness figures of format 2, got 'steer'"):
        RobustnessFigures.from_json({"kind": "steer", "format": 1})
    with pytest.raises(ValueError, match="0 curves are 'nothing'"):
        found.curve("nothing")
    with pytest.raises(ValueError, match=r"0\.2 is not on the grid of step"):
        found.curve(SINGLE, crafted_on="one", judge="one").at(0.2, "AS")


def test_a_network_is_attacked_too_and_heads_without_near_null_say_so() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(toy.WIDTH, 16), torch.nn.Tanh(), torch.nn.Linear(16, toy.DIM)).eval()
    found = robust.measure(classifier=toy.classifier(), translators={"one": network}, near_ratios=(0.001,), tolerances=(0.1,), limit=2.0)
    many, one = (found.curve(attack, crafted_on="one", judge="one") for attack in (MAXIMISER, SINGLE))
    assert all(a >= b - 1e-6 for a, b in zip(many.figures["similarity"], one.figures["similarity"], strict=True))
    assert list(found.absent) == ["near-null 0.1 %, τ 0.1"]
    assert "smallest singular value is" in found.absent["near-null 0.1 %, τ 0.1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacker": "three"}, "the attacker 'three' is not among the translators: one, two"),
        ({"steps": (0.0,)}, "one above 0"),
        ({"steps": (-0.1, 0.5)}, "0 or more"),
        ({"limit": 0.2}, "the limit must be above the largest step 0.6, got 0.2"),
        ({"outsiders": {"one": THIN}}, "one has 3 features and toy 24: .*; one is the name of both"),
    ],
)
def test_what_cannot_be_measured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robust.measure(**changes)


def test_the_grid_begins_at_nothing() -> None:
    assert RobustnessSettings(steps=(0.3, 0.1)).grid() == (0.0, 0.1, 0.3)
    assert isinstance(attacks()[1], Climb)
