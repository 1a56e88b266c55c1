"""Robustness to steering: plain loops, sound and broken attacks, the dropped null space, chunks and processes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import singreg.analysis.steering as steering
from singreg.analysis import steering_curves
from singreg.analysis.features import iterate_features
from singreg.analysis.steering import plan_pairs
from singreg.analysis.steering_curves import MAXIMISER, RANDOM, SINGLE, Attack, at, climb, measure_robustness, the_curve
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.nullspace import NullSpace
from singreg.steering import Maximiser
from singreg.translator import LinearTranslator
from tests import toy
from tests.processes import run_same
from tests.recipe_run import same
from tests.reference.formulas import angle_degrees, null_projector

COUNT, STEPS = 12, (0.0, 0.1, 0.3, 0.6)
LABELS, NAMES = toy.ToySplit(COUNT).labels, toy.ToySplit(COUNT).class_names
PAIRS = [(i, k) for i in range(COUNT) for k in range(toy.CLASSES) if k != LABELS[i]]
LOGITS, MANY = "logits stay within what the attack promises", "many steps reach at least what one step does"
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
def translators() -> dict[str, LinearTranslator]:
    one, noise = toy.translator(0), toy.translator(1)
    return {"one": one, "two": LinearTranslator(one.matrix + 0.5 * noise.matrix, one.offset + 0.5 * noise.offset)}


def space() -> NullSpace:
    return NullSpace.from_weight(classifier().weight)


def features() -> Tensor:
    return toy.features(classifier(), toy.ToySplit(COUNT)).float().double()


def measure(tolerance: float = 0.1) -> Found:
    present = sorted(set(LABELS.tolist()))
    plan = plan_pairs(LABELS, NAMES, toy.texts(), present, [NAMES[k] for k in present], toy.texts()[present])
    settings = replace(toy.QUIET, batch_size=COUNT)
    batches = iterate_features(classifier(), toy.ToySplit(COUNT), toy.embeddings(COUNT), settings, "robustness")
    how: dict[str, Any] = {"classifier": classifier(), "space": space(), "steps": STEPS}
    return measure_robustness(batches, plan, translators(), **how, tolerance=tolerance)


@cache
def usual() -> Found:
    return measure()


def curve(found: Found, attack: str, on: str = "one", judge: str = "one", defence: str = "") -> Any:
    return the_curve(found["curves"], attack=attack, attacker=on, judge=judge, defence=defence)


def failed(found: Found) -> set[str]:
    """The rules of every sound attack that curves break."""
    broken, own = set[str](), dict[tuple[str, str], np.ndarray]()
    for each in found["curves"]:
        figures = each["figures"]
        if not each["defence"] and each["attacker"] == each["judge"]:
            own[each["attack"], each["judge"]] = np.array([figures["AS"], figures["AS_abs"]])
        if not max(each["logit_change"]) <= each["tolerance"]:
            broken.add(LOGITS)
        if each["defence"] and each["tolerance"] == steering_curves.EXACT and any(figures["success"]):
            broken.add(DROPPED)
    for (attack, judge), rises in own.items():
        single = own[SINGLE, judge][0]
        if attack == MAXIMISER and (single - rises[0] > 1e-3).any():
            broken.add(MANY)
        # The mean of max(gain, 0): gains of random directions cancel, and an attacker would keep the helpful ones.
        if attack == RANDOM and not rises.mean() <= 0.5 * single.mean():
            broken.add(FAR_BELOW)
    return broken


def first(z: Tensor, target: int) -> bool:
    return int(cosine_similarity(z[None], toy.texts().double()).argmax()) == target


def slow(step: float, judge: str, through: Tensor | None = None) -> dict[str, float]:
    """Figures of the maximiser at one step by plain loops; `through`: what a defence lets through."""
    read, model = translators()[judge], classifier()
    most, weight, bias = Maximiser(translators()["one"], space()), model.weight.double(), model.bias.double()
    through = torch.eye(toy.WIDTH).double() if through is None else through
    won, gained = [], []
    for i, k in PAIRS:
        f, text = features()[i], toy.texts()[k].double()
        limit = step * f.norm()
        moved = f + most.maximise(f[None], text[None], limit[None])[0][0]
        before, after = read(through @ f), read(through @ moved)
        gained.append(float(angle_degrees(before, text) - angle_degrees(after, text)))
        if not first(before, k):
            kept = (weight @ f + bias).argmax() == (weight @ moved + bias).argmax()
            won.append(float(kept and first(after, k)))
    return {"success": float(np.mean(won)), "AS": float(np.mean(gained)), "AS_abs": float(np.abs(gained).mean())}


def test_curves_are_those_of_plain_loops() -> None:
    found = usual()
    assert {(curve["rows"], curve["images"]) for curve in found["curves"]} == {(len(PAIRS), COUNT)}
    for judge in ("one", "two"):
        got = curve(found, MAXIMISER, judge=judge)
        for step in (0.1, 0.6):
            for name, value in slow(step, judge).items():
                close = pytest.approx(value, abs=2e-2 if name.startswith("AS") else 1e-9)
                assert at(got, step, name) == close, (judge, step, name)
        for value, (low, high) in zip(got["figures"]["success"], got["intervals"]["success"], strict=True):
            assert low <= value <= high


def test_what_holds_of_every_sound_attack() -> None:
    found, strict = usual(), measure(tolerance=0.01)
    assert not failed(found)
    assert not failed(strict)
    for name in ("one", "two"):
        most, one = (curve(found, attack, name, name)["figures"] for attack in (MAXIMISER, SINGLE))
        transfer = curve(found, MAXIMISER, {"one": "two", "two": "one"}[name], name)["figures"]
        assert most["AS"] == sorted(most["AS"])  # a larger step is never worse
        assert (np.array(most["AS"]) >= np.array(one["AS"]) - 1e-3).all()
        assert (np.array(most["AS"]) >= np.array(transfer["AS"]) - 0.05).all()
    for each in found["curves"]:
        assert each["figures"]["success"][0] == 0  # nothing without a step
        assert each["figures"]["AS_abs"][0] <= 1e-4
    random, gradient = (curve(found, attack)["area"]["AS"][0] for attack in (RANDOM, SINGLE))
    assert random < 0.5 * gradient
    tight, loose = curve(strict, "near-null 5 %, τ 0.01"), curve(found, "near-null 5 %, τ 0.1")
    assert 0.005 < max(tight["logit_change"]) <= 0.01 < max(loose["logit_change"]) <= 0.1
    # Nearly null directions reach more, and the more a logit may move, the more.
    assert curve(found, MAXIMISER)["figures"]["AS"][1] < tight["figures"]["AS"][1] < loose["figures"]["AS"][1]


@pytest.mark.parametrize(
    ("fault", "name", "rules"),
    [
        ("wrong sign", MAXIMISER, {MANY}),
        ("no effort", MAXIMISER, {MANY}),
        ("out of the null space", MAXIMISER, {LOGITS}),
        ("no null space", MAXIMISER, {LOGITS, DROPPED}),
        ("wrong sign", SINGLE, {FAR_BELOW}),
        ("too far", "near-null 5 %, τ 0.1", {LOGITS}),
    ],
)
def test_a_broken_attack_is_found(fault: str, name: str, rules: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usual_attacks, everywhere = steering_curves.usual_attacks, NullSpace.from_weight(torch.zeros(1, toy.WIDTH))

    def broken(attack: Attack) -> Attack:
        def craft(rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
            for d, steps in attack.craft(rows):
                aside = 1e-5 * d.norm(dim=1, keepdim=True) * classifier().weight.double()[0]
                yield {"wrong sign": -d, "no effort": 0.2 * d, "too far": 1.5 * d}.get(fault, d + aside), steps

        if (attack.attack, attack.attacker) != (name, "one"):
            return attack
        forgets = fault == "no null space"
        return replace(attack, craft=climb(translators()["one"], everywhere, STEPS, None) if forgets else craft)

    monkeypatch.setattr(steering_curves, "usual_attacks", lambda *given: [broken(a) for a in usual_attacks(*given)])
    assert failed(measure()) == rules


def test_dropping_the_null_space_leaves_exactly_nothing() -> None:
    found, model = usual(), classifier()
    for attack in (SINGLE, MAXIMISER, RANDOM):
        dropped = curve(found, attack, judge="two", defence="drop_null")
        assert dropped["figures"]["success"] == [0.0] * 4
        assert max(dropped["figures"]["AS_abs"]) < 1e-5
    # Nearly null directions are not dropped: they are what an attacker has left.
    near = curve(found, "near-null 5 %, τ 0.1", judge="two", defence="drop_null")
    assert near["figures"]["AS_abs"][-1] > 1e-3
    # The same features as those of the edited model, mapped back.
    edited = drop_null(model)
    wide = features() - features() @ null_projector(model.weight)
    torch.testing.assert_close(toy.features(edited, toy.ToySplit(COUNT)) @ space().basis.T, wide, atol=1e-5, rtol=0)
    through = torch.eye(toy.WIDTH).double() - null_projector(model.weight)
    assert slow(0.6, "two", through)["success"] == 0


def test_chunks_and_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shared = usual(), run_same(2, measure)
    monkeypatch.setattr(steering, "CHUNK_ELEMENTS", 2 * toy.CLASSES * (toy.WIDTH + toy.DIM + toy.CLASSES))
    for other in (measure(), *shared):
        for a, b in zip(whole["curves"], other["curves"], strict=True):
            same(b["figures"], a["figures"], rel=1e-7, abs=2e-4)
