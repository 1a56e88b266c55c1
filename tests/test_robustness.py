"""Robustness to steering: plain loops, sound and broken attacks, the dropped null space, what can be reached at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import singreg.analysis.steering as steering
from singreg.analysis import attackers
from singreg.analysis.attackers import MAXIMISER, RANDOM, SINGLE, Attack, Outsider, best_reading, near_null_name
from singreg.analysis.robustness import measure_robustness, points_of
from singreg.analysis.steering_curves import Budgets, at, the_curve
from singreg.maximiser import Directions, Maximiser
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian, similarity_gradient, unit_in_null
from singreg.translator import LinearTranslator
from tests import toy
from tests.processes import run_processes
from tests.reference.formulas import angle_degrees, null_projector
from tests.steering_world import natural_of

COUNT = 12
STEPS = (0.0, 0.1, 0.3, 0.6)
LABELS = toy.ToySplit(COUNT).labels
PAIRS = [(i, k) for i in range(COUNT) for k in range(toy.CLASSES) if k != LABELS[i]]
LOGITS, LENGTH = "logits stay within what the attack promises", "every displacement is within its budget"
MANY = "many steps reach at least what one step does"
LIMIT = "success goes to 100 % of what is reachable as the budget grows"
FAR_BELOW, DROPPED = "a random direction is far below the gradient", "success is exactly 0 with the null space dropped"
Found = dict[str, Any]


@cache
def classifier() -> Classifier:
    """Its head's two smallest singular values are 3 % and 0.5 % of the largest."""
    model = toy.classifier()
    with torch.no_grad():
        u, sigma, vh = torch.linalg.svd(model.weight.double(), full_matrices=False)
        sigma[-2:] = sigma[0] * torch.tensor([0.03, 0.005], dtype=torch.float64)
        model.head.get_parameter("weight").copy_(20 * (u * sigma) @ vh)  # so that the tolerances bind
    return model


@cache
def narrow() -> Classifier:
    """So many classes that 4 null dimensions are left of 24, as 24 are of 1,024 with 1,000 classes."""
    return toy.classifier(classes=toy.WIDTH - 4)


@cache
def translators() -> dict[str, LinearTranslator]:
    one, noise = toy.translator(0), toy.translator(1)
    return {"one": one, "two": LinearTranslator(one.matrix + 0.5 * noise.matrix, one.offset + 0.5 * noise.offset)}


def space() -> NullSpace:
    return NullSpace.from_weight(classifier().weight)


def features() -> Tensor:
    return toy.features(classifier(), toy.ToySplit(COUNT)).float().double()


def measure(rank: int = 0, world: int = 1, model: Classifier | None = None, **changes: Any) -> Found:
    options = {"budgets": Budgets.over(STEPS), "near_ratios": (0.05,), "tolerances": (0.01, 0.1), **changes}
    judges = options.pop("translators", None) or translators()
    settings = replace(toy.QUIET, batch_size=COUNT)
    inputs = (model or classifier(), toy.ToySplit(COUNT), toy.embeddings(COUNT), toy.texts(), judges)
    return measure_robustness(*inputs, settings=settings, **options)[1]


@cache
def usual() -> Found:
    return measure()


def curve(
    found: Found, attack: str, on: str = "one", judge: str = "one", budget: str = "step", defence: str = ""
) -> Any:
    return the_curve(found["curves"], attack=attack, crafted_on=on, judge=judge, budget=budget, defence=defence)


def failed(found: Found) -> set[str]:
    return {check["name"] for check in found["checks"] if not check["passed"]}


def first(z: Tensor, target: int) -> bool:
    return int(cosine_similarity(z[None], toy.texts().double()).argmax()) == target


def slow(attack: str, step: float, judge: str, through: Tensor | None = None) -> dict[str, float]:
    """Figures of one attack at one budget by plain loops; `through`: what a defence lets through."""
    t, read, model = translators()["one"], translators()[judge], classifier()
    most, weight, bias = Maximiser(Directions(space()), t), model.weight.double(), model.bias.double()
    through = torch.eye(toy.WIDTH).double() if through is None else through
    won, gained, kept = [], [], []
    for i, k in PAIRS:
        f, text = features()[i], toy.texts()[k].double()
        limit = step * f.norm()
        if attack == SINGLE:
            gradient = similarity_gradient(f[None], text, t)
            moved = f + limit * unit_in_null(space().component(gradient), gradient)[0]
        else:
            moved = f + most.maximise(f[None], text, limit).displacement[0]
        before, after = read(through @ f), read(through @ moved)
        kept.append(float((weight @ f + bias).argmax() == (weight @ moved + bias).argmax()))
        gained.append(float(angle_degrees(before, text) - angle_degrees(after, text)))
        if not first(before, k):
            won.append(float(kept[-1] and first(after, k)))
    values = {"success": won, "AS": gained, "AS_abs": np.abs(gained), "kept": kept}
    return {name: float(np.mean(each)) for name, each in values.items()}


def test_curves_are_those_of_plain_loops() -> None:
    found = usual()
    assert (found["rows"], found["images"]) == (len(PAIRS), COUNT)
    for attack in (SINGLE, MAXIMISER):
        for judge in ("one", "two"):
            got = curve(found, attack, judge=judge)
            # At 0.6 many displacements reach the target exactly, and another judge can tell which of them was found.
            for step in (0.1, 0.6) if attack == SINGLE or judge == "one" else (0.1,):
                for name, value in slow(attack, step, judge).items():
                    close = pytest.approx(value, abs=2e-2 if name.startswith("AS") else 1e-9)
                    assert at(got, step, name) == close, (attack, judge, step, name)
            heights = np.array(got["figures"]["AS"])
            area = np.sum((heights[1:] + heights[:-1]) / 2 * np.diff(got["grid"])) / 0.6
            assert got["area"]["AS"][0] == pytest.approx(area)
            assert got["area"]["AS"][1] <= area <= got["area"]["AS"][2]
            for value, (low, high) in zip(got["figures"]["success"], got["intervals"]["success"], strict=True):
                assert low <= value <= high
    already = np.mean([first(translators()["two"](features()[i]), k) for i, k in PAIRS])
    assert found["already"]["two"] == pytest.approx(already)
    assert 0 < already < 0.5


def test_matrices_hold_what_the_curves_average() -> None:
    found = usual()
    assert len(found["matrices"]) == 2 * 2 * 2
    for matrix in found["matrices"]:
        rows, gained = (np.array(matrix[name], dtype=float) for name in ("rows", "AS"))
        assert np.nansum(rows) == len(PAIRS)
        assert np.isnan(np.diag(rows)).all()
        mean = at(curve(found, matrix["attack"], matrix["crafted_on"], matrix["judge"]), matrix["step"], "AS")
        assert np.nansum(gained * rows) / np.nansum(rows) == pytest.approx(mean)


def test_what_holds_of_every_sound_attack() -> None:
    found = usual()
    assert len(found["checks"]) == 6
    assert not failed(found)
    assert found["absent"] == {}
    assert found["limit_success"] == {"one": 1.0, "two": 1.0}
    for name in ("one", "two"):
        most, one = (curve(found, attack, name, name)["figures"] for attack in (MAXIMISER, SINGLE))
        transfer = curve(found, MAXIMISER, {"one": "two", "two": "one"}[name], name)["figures"]
        assert most["similarity"] == sorted(most["similarity"])  # a larger budget is never worse
        assert (np.array(most["similarity"]) >= np.array(one["similarity"]) - 1e-6).all()
        assert (np.array(most["AS"]) >= np.array(transfer["AS"]) - 0.05).all()
        assert (np.diff(most["success"]) >= -0.05).all()
    for each in found["curves"]:
        assert each["figures"]["success"][0] == 0  # nothing without a budget
        assert each["figures"]["AS_abs"][0] <= 1e-4
    random, gradient = (curve(found, attack)["area"]["AS"][0] for attack in (RANDOM, SINGLE))
    assert random < 0.5 * gradient
    strict = curve(found, MAXIMISER)["figures"]["similarity"]
    tight, loose = (curve(found, near_null_name(0.05, tolerance)) for tolerance in (0.01, 0.1))
    assert 0.005 < max(tight["logit_change"]) <= 0.01 < max(loose["logit_change"]) <= 0.1
    # Nearly null directions reach more, and the more a logit may move, the more.
    assert strict[1] < tight["figures"]["similarity"][1] < loose["figures"]["similarity"][1]


def attacks(model: Classifier | None = None, **options: Any) -> list[Attack]:
    weight = (model or classifier()).weight.detach()
    made = {"near_ratios": (), "tolerances": (0.1,), **options}
    return attackers.usual_attacks(translators(), weight, NullSpace.from_weight(weight), Budgets.over(STEPS), **made)[0]


def broken(attack: Attack, fault: str) -> Attack:
    """An attack turned round, not brought back to its budget, too weak, or out of the null space."""
    factor = {"wrong sign": -1.0, "no retraction": 1.5, "no effort": 0.2}

    def displace(*arguments: Any) -> Iterator[Tensor]:
        for d in attack.displace(*arguments):
            aside = 0.001 * d.norm(dim=1, keepdim=True) * classifier().weight.double()[0]
            yield factor[fault] * d if fault in factor else d + aside

    return replace(attack, displace=displace)


@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        ("wrong sign", {LIMIT, MANY}),
        ("no retraction", {LENGTH}),
        ("no effort", {MANY}),
        ("out of the null space", {LOGITS}),
    ],
)
def test_a_broken_maximiser_is_found(fault: str, rules: set[str]) -> None:
    kind = [attack for attack in attacks() if attack.name != RANDOM]
    wrong = [broken(a, fault) if (a.name, a.crafted_on) == (MAXIMISER, "one") else a for a in kind]
    assert rules <= failed(measure(attacks=wrong))
    assert not failed(measure(attacks=kind))


def test_other_broken_attacks_are_found_by_their_rules() -> None:
    kind = [broken(a, "wrong sign") if a.name == SINGLE else a for a in attacks()]
    assert failed(measure(attacks=kind)) == {FAR_BELOW}
    everywhere = attackers.climb(
        MAXIMISER, "one", translators()["one"], Directions(basis=torch.eye(toy.WIDTH).double()), Budgets.over(STEPS)
    )
    assert failed(measure(attacks=[everywhere])) >= {LOGITS, DROPPED}  # it forgets the null space
    loose = next(a for a in attacks(near_ratios=(0.05,)) if a.name == near_null_name(0.05, 0.1))
    assert failed(measure(attacks=[replace(loose, tolerance=0.01)])) == {LOGITS}


def test_dropping_the_null_space_leaves_exactly_nothing() -> None:
    found, model = usual(), classifier()
    for attack in (SINGLE, MAXIMISER, RANDOM):
        dropped = curve(found, attack, judge="two", defence="drop_null")
        assert dropped["figures"]["success"] == [0.0] * 4
        assert max(dropped["figures"]["AS_abs"]) < 1e-5
    # Nearly null directions are not dropped: they are what an attacker has left.
    near = curve(found, near_null_name(0.05, 0.1), judge="two", defence="drop_null")
    assert near["figures"]["AS_abs"][-1] > 1e-3
    # The same features as those of the edited model, mapped back.
    edited = drop_null(model)
    wide = features() - features() @ null_projector(model.weight)
    torch.testing.assert_close(toy.features(edited, toy.ToySplit(COUNT)) @ space().basis.T, wide, atol=1e-5, rtol=0)
    through = torch.eye(toy.WIDTH).double() - null_projector(model.weight)
    assert slow(MAXIMISER, 0.6, "two", through)["success"] == 0
    with pytest.raises(ValueError, match="no null space"):
        measure(model=edited)


def turned(angle: float) -> NullSpace:
    """The null space of a head turned a little away from this one's."""
    weight = classifier().weight.detach().double()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).double()
    return NullSpace.from_weight(weight + angle * noise * weight.norm() / noise.norm())


def test_other_models_attack_by_transfer_and_by_their_null_space() -> None:
    others = {
        "itself": Outsider(translators()["one"], space()),
        "pretrained": Outsider(translators()["two"], turned(0.3)),
    }
    loose, tight = (measure(outsiders=others, near_ratios=(), tolerances=(tau,)) for tau in (1e9, 0.05))
    assert not failed(tight)
    own = curve(tight, MAXIMISER, judge="two")
    assert own["figures"]["success"] == own["figures"]["decision_success"]
    for name, on in (("transfer from itself", "itself"), ("null space of itself", "one")):
        same = curve(tight, name, on, "two")
        assert same["figures"]["AS"] == pytest.approx(own["figures"]["AS"])
        assert max(same["logit_change"]) < 1e-6
    for name, on in (("transfer from pretrained", "pretrained"), ("null space of pretrained", "one")):
        wide, held = (curve(found, name, on) for found in (loose, tight))
        assert max(wide["logit_change"]) > 0.05  # measured, not promised
        assert wide["tolerance"] is None
        assert wide["figures"]["success"] == wide["figures"]["decision_success"] == held["figures"]["decision_success"]
        assert held["figures"]["success"][-1] < wide["figures"]["success"][-1]  # a success needs the logits
        assert max(wide["figures"]["success"]) > 0.3


def test_natural_radii_are_a_second_budget() -> None:
    f = features()
    root = torch.randn(toy.WIDTH, toy.WIDTH, generator=torch.Generator().manual_seed(2)).double()
    gaussian = ConditionalGaussian.from_moments(f.mean(0), root @ root.T / toy.WIDTH, space())
    budgets = Budgets.over(STEPS, [0.9, 1.5, 4.0], gaussian, natural_of(gaussian.radius(f)))
    found = measure(budgets=budgets, near_ratios=())
    many, one = (curve(found, attack, budget="radius") for attack in (MAXIMISER, SINGLE))
    assert many["grid"] == list(budgets.radii)
    assert found["natural"] == budgets.marks
    assert max(np.array(many["longest"]) - many["grid"]) <= 1e-6
    assert (np.array(many["figures"]["similarity"]) >= np.array(one["figures"]["similarity"]) - 1e-6).all()
    assert many["figures"]["similarity"] == pytest.approx(sorted(many["figures"]["similarity"]))
    assert many["figures"]["AS"][-1] >= many["figures"]["AS"][0] - 1e-6
    assert not failed(found)


def test_chunks_and_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shared = usual(), run_processes(2, measure)
    assert [found["rows"] for found in shared] == [whole["rows"]] * 2
    monkeypatch.setattr(steering, "CHUNK_ELEMENTS", 3 * (toy.WIDTH + toy.DIM + toy.CLASSES))
    for other in (measure(), *shared):
        for a, b in zip(whole["curves"], other["curves"], strict=True):
            for name in ("success", "AS", "kept", "similarity"):
                # At the largest step many displacements reach cosine 1 alike, which another reading tells apart.
                other_reading = a["judge"] != a["crafted_on"] or a["defence"]
                until = -1 if name in ("AS", "success") and other_reading else None
                assert a["figures"][name][:until] == pytest.approx(b["figures"][name][:until], abs=1e-6), a["attack"]
            assert a["longest"] == pytest.approx(b["longest"], abs=1e-9)
        for a, b in zip(whole["matrices"], other["matrices"], strict=True):
            assert a["rows"] == b["rows"]


def test_points_are_those_of_the_curves_and_figures_are_strict_json() -> None:
    found = usual()
    points = points_of(found["curves"])
    assert json.loads(json.dumps(found, allow_nan=False))["curves"] == found["curves"]
    assert len(points) == len(found["curves"]) * len(STEPS)
    chosen = points.query("attack == @MAXIMISER and crafted_on == 'one' and judge == 'two' and defence == ''")
    assert chosen["at"].tolist() == list(STEPS)
    assert chosen["AS"].tolist() == curve(found, MAXIMISER, judge="two")["figures"]["AS"]
    assert (chosen["AS_low"] <= chosen["AS"]).all()


def test_a_network_is_attacked_and_absent_attacks_say_why() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(toy.WIDTH, 16), torch.nn.Tanh(), torch.nn.Linear(16, toy.DIM)).eval()
    few = {"near_ratios": (0.001,), "tolerances": (0.1,)}
    found = measure(model=toy.classifier(), translators={"one": network}, **few)
    many, one = (curve(found, attack)["figures"]["similarity"] for attack in (MAXIMISER, SINGLE))
    assert (np.array(many) >= np.array(one) - 1e-6).all()
    assert found["reachable"] == {"one": None}
    assert list(found["absent"]) == [near_null_name(0.001, 0.1)]
    assert "smallest singular value is" in found["absent"][near_null_name(0.001, 0.1)]


def test_outsiders_of_another_width_or_name_are_refused() -> None:
    thin = Outsider(lambda f: f, NullSpace.from_weight(torch.ones(1, 3)))
    with pytest.raises(ValueError, match=r"one is the name of both .*; one has 3 features and toy 24"):
        measure(outsiders={"one": thin})


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_best_reading_is_that_of_brute_force() -> None:
    """No point of z + V has a larger cosine, and points of V alone do not either where the best lies at infinity."""
    basis = torch.linalg.qr(seeded(0, 6, 2)).Q
    z, text = seeded(1, 8, 6), normalize(seeded(2, 8, 6), dim=-1)
    best = cosine_similarity(best_reading(z, text, basis), text)
    scales = torch.tensor([0.1, 1.0, 10.0, 100.0, 1e5], dtype=torch.float64).repeat(4000)
    tried = seeded(3, len(scales), 2) * scales[:, None] @ basis.T
    reached = torch.stack([cosine_similarity(row + tried, t[None]).max() for row, t in zip(z, text, strict=True)])
    assert bool((reached <= best + 1e-4).all())
    assert bool((best <= reached + 0.02).all())
    rest = z - (z @ basis) @ basis.T
    assert 0 < int(((rest * text).sum(1) > 0).sum()) < 8  # both kinds were there


def test_the_maximiser_reaches_the_best_reading() -> None:
    null, t = NullSpace.from_weight(seeded(4, 20, 24)), LinearTranslator(seeded(5, 6, 24).float(), seeded(6, 6).float())
    f, text = seeded(7, 10, 24), normalize(seeded(8, 10, 6), dim=-1)
    step = Maximiser(Directions(null), t)
    u, basis = step.unbounded(f, text), attackers.reach_basis(t, null)
    assert u is not None
    assert basis is not None
    assert step.reach is not None
    matrix, offset = t.matrix.double(), t.offset.double()
    moved = (f + step.reach.to_features(u)) @ matrix.T + offset
    torch.testing.assert_close(moved, best_reading(f @ matrix.T + offset, text, basis), rtol=1e-6, atol=1e-6)
    assert Maximiser(Directions(null), lambda f: t(f)).unbounded(f, text) is None


def test_a_sound_attack_passes_on_a_small_null_space() -> None:
    found = measure(model=narrow(), near_ratios=())
    assert found["nullity"] == 4
    assert all(0.05 < share < 0.99 for share in found["reachable"].values())  # the rest is reported as out of reach
    assert found["limit_success"] == {"one": 1.0, "two": 1.0}
    assert not failed(found)
    wrong = [broken(a, "wrong sign") if (a.name, a.crafted_on) == (MAXIMISER, "one") else a for a in attacks(narrow())]
    assert LIMIT in failed(measure(model=narrow(), attacks=wrong))
