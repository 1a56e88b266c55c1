"""Steering at a fixed image score and at equal effort: plain loops, chunks, processes, planted truths."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import singreg.analysis.steering as steering
from singreg.analysis.features import iterate_features
from singreg.analysis.steering import plan_pairs, steering_targets
from singreg.analysis.steering_curves import natural_radii
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, ConditionalGaussian, bisect_step
from singreg.translator import LinearTranslator
from tests import toy
from tests.processes import run_processes
from tests.recipe_run import same
from tests.reference.formulas import angle_degrees
from tests.steering_world import COUNT, C, M, N, SteeringWorld, shared


def gradient(translator: AnyTranslator, f: Tensor, text: Tensor) -> Tensor:
    leaf = f.clone().requires_grad_()
    cosine_similarity(translator(leaf), text, dim=0).backward()
    return leaf.grad


def first(z: Tensor, text: Tensor, texts: Tensor) -> float:
    own = cosine_similarity(z, text, dim=0)
    rivals = [t.double() for t in texts if (t.double() - text).norm() > 1e-3]
    return float(all(own > cosine_similarity(z, rival, dim=0) for rival in rivals))


def steerings(world: SteeringWorld) -> list[tuple[int, int, int, Tensor, Tensor]]:
    """(image, source, target, feature, prompt) of every planned steering, in float64."""
    sources = world.plan.source_labels.tolist()
    return [
        (i, sources.index(label), k, world.features[i].double(), world.plan.texts[k].double())
        for i, label in enumerate(world.labels.tolist())
        if world.plan.chosen[i]
        for k in range(len(world.plan.targets))
        if world.plan.wanted[sources.index(label), k]
    ]


def figures(world: SteeringWorld, judge: str, f: Tensor, moved: Tensor, text: Tensor) -> list[float]:
    """AS, |AS| and success of one displacement as a judge reads it."""
    before, after = (world.translators[judge](x) for x in (f, moved))
    gained = float(angle_degrees(before, text) - angle_degrees(after, text))
    return [gained, abs(gained), first(after, text, world.texts)]


def largest_inside(gaussian: ConditionalGaussian, f: Tensor, d: Tensor, radius: float) -> float:
    """The last of many steps that stays within the radius, then of many after it; 0 if none does."""
    start = 0.0
    for width in (60.0, 0.02):
        tried = start + torch.linspace(0, width, 6001, dtype=torch.float64)
        inside = gaussian.radius(f + tried[:, None] * d) <= radius
        start = float(tried[inside][-1]) if inside.any() else 0.0
    return start


def slow_curve(world: SteeringWorld, attacker: str, judge: str, budget: str) -> np.ndarray:
    """(3, G) by plain loops: for each image the mean over its targets, then the mean over images."""
    gaussian, natural = world.gaussian, world.natural
    by_image: dict[int, list[list[list[float]]]] = {}
    for i, _, _, f, text in steerings(world):
        d = world.space.component(gradient(world.translators[attacker], f, text))
        d = d / d.norm()
        row = []
        for limit in world.grid(budget):
            radius = limit * natural["median"]
            step = limit * float(f.norm()) if budget == "step" else largest_inside(gaussian, f, d, radius)
            row.append(figures(world, judge, f, f + step * d, text))
        by_image.setdefault(i, []).append(row)
    return np.mean([np.mean(rows, axis=0) for rows in by_image.values()], axis=0).T


@pytest.mark.parametrize("budget", ["step", "radius"])
def test_curves_are_those_of_plain_loops(budget: str) -> None:
    world = SteeringWorld.make()
    found = [curve for curve in world.curves() if curve["budget"] == budget]
    assert [(c["attacker"], c["judge"]) for c in found] == [(a, j) for a in ("one", "two") for j in ("one", "two")]
    for curve in found[:2]:
        slow = slow_curve(world, curve["attacker"], curve["judge"], budget)
        for name, values in zip(("AS", "AS_abs", "success"), slow, strict=True):
            got = np.array(curve["figures"][name])
            np.testing.assert_allclose(got, values, atol=2e-2 if budget != "step" else 1e-4, err_msg=name)
            grid, (area, least, most) = np.array(curve["grid"]), curve["area"][name]
            height = np.sum((values[1:] + values[:-1]) / 2 * np.diff(grid)) / (grid[-1] - grid[0])
            assert area == pytest.approx(height, abs=2e-2)
            assert least <= area <= most
            low, high = np.array(curve["intervals"][name]).T
            assert ((low <= got + 1e-9) & (got <= high + 1e-9)).all()
    assert found[0]["figures"]["AS"] != found[1]["figures"]["AS"]  # the judges are told apart


@pytest.mark.parametrize("image_score", [40.0, 75.0], ids=["all within reach", "some out of reach"])
def test_table_of_pairs_is_that_of_plain_loops(image_score: float) -> None:
    world = SteeringWorld.make()
    for found in world.pairs(image_score=image_score):
        table: dict[tuple[int, int], list[list[float]]] = {}
        for _, source, target, f, text in steerings(world):
            attacker = world.translators[found["attacker"]]
            d = world.space.component(gradient(attacker, f, text))
            d = d / d.norm()
            step = float(bisect_step(attacker, f[None], d[None], image_score))
            row = [math.nan, math.nan, 0.0, math.nan]
            if not math.isnan(step):
                row = [*figures(world, found["judge"], f, f + step * d, text), step / float(f.norm())]
            table.setdefault((source, target), []).append(row)
        everything = np.concatenate([np.array(rows) for rows in table.values()])
        cells = {place: {n: m[place[0]][place[1]] for n, m in found["matrices"].items()} for place in table}
        for cell, rows in [*((cells[place], rows) for place, rows in table.items()), (found["overall"], everything)]:
            values = np.array(rows)
            reached = ~np.isnan(values[:, 0])
            assert cell.get("rows", cell["images"]) == len(values)
            assert cell["reachable"] == pytest.approx(reached.mean())
            assert cell["success"] == pytest.approx(values[:, 2].mean())
            if not reached.any():
                assert cell["AS"] is cell["step"] is None
                continue
            means = values[reached].mean(0)[[0, 1, 3]]
            assert [cell[name] for name in ("AS", "AS_abs", "step")] == pytest.approx(means, abs=1e-4)
        assert found["overall"]["AS_abs_std"] == pytest.approx(np.nanstd(everything[:, 1]), abs=1e-3)
        assert found["overall"]["pairs"] == len(table) == 8  # 3 x 3 without cat to cat
        assert found["overall"]["images"] == len({i for i, *_ in steerings(world)})
        low, high = found["intervals"]["AS"]
        assert low <= found["overall"]["AS"] <= high
        assert found["logit_change"] < 1e-9  # and the logits stay
        assert found["matrices"]["AS"][1][1] is None  # cat to cat
    assert (everything[:, 3] > 0).all() == (image_score == 40)


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SteeringWorld.make()
    curves, pairs = world.curves(), world.pairs()
    monkeypatch.setattr(steering, "CHUNK_ELEMENTS", 2 * len(world.plan.targets) * (M + N + C))
    rows = list(world.plan.rows(world.batches(COUNT)))
    assert [len(r.image.unique()) for r in rows[:-1]] == [2] * (len(rows) - 1)
    same(world.curves(world.batches(5)), curves, rel=1e-5, abs=1e-5)
    same(world.pairs(world.batches(5)), pairs, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("stride", [2, 1], ids=["both have images", "one has none"])
def test_processes_count_every_image_once(stride: int) -> None:
    world = SteeringWorld.make(images_per_source=2)
    curves, pairs = world.curves(), world.pairs()
    assert pairs[0]["overall"]["images"] == 6
    for found_curves, found_pairs in run_processes(2, shared, stride):
        same(found_curves, curves, rel=1e-5, abs=1e-5)
        same(found_pairs, pairs, rel=1e-9, abs=1e-9)


def test_any_callable_may_attack_and_judge() -> None:
    """A linear translator behind a plain function takes autograd and bisection, and reads the same."""
    world = SteeringWorld.make()
    known = {"one": world.translators["one"]}
    hidden = {"one": lambda f: world.translators["one"](f)}
    same(world.curves(None, hidden, known), world.curves(None, known), abs=1e-4)
    same(world.pairs(attackers=hidden), world.pairs(attackers=known), rel=1e-6, abs=1e-6)


def test_what_the_translator_does_not_see_cannot_be_steered() -> None:
    """Planted truth: without A's null part nothing moves and nothing is reachable; the control moves."""
    world = SteeringWorld.make()
    blind = {"blind": LinearTranslator(world.space.remove(world.translators["one"].matrix), torch.zeros(N))}
    for curve in world.curves(attackers=blind):
        assert max(map(abs, curve["figures"]["AS"])) < 1e-4
        assert len(set(curve["figures"]["success"])) == 1
    (found,) = world.pairs(attackers=blind)
    assert (found["overall"]["reachable"], found["overall"]["AS"], found["overall"]["success"]) == (0, None, 0)
    assert found["intervals"]["AS"] == [None, None]
    control, transfer = world.curves()[0], world.pairs()[1]["overall"]
    assert transfer["AS"] < world.pairs()[0]["overall"]["AS"] - 1  # another judge sees less than the attacker's own
    assert control["figures"]["AS"][-1] > 10
    assert control["figures"]["success"][-1] > control["figures"]["success"][0]


def test_natural_radii_are_of_images_that_did_not_make_the_gaussian() -> None:
    model, test = toy.classifier(), toy.ToySplit(40, seed=9)
    space, f = NullSpace.from_weight(model.weight), toy.features(model, toy.ToySplit(120))
    gaussian = ConditionalGaussian.from_moments(f.mean(0), torch.cov(f.T), space)
    batches = iterate_features(model, test, toy.embeddings(40, seed=9), toy.QUIET, "test")
    found = natural_radii(batches, gaussian, fit_images=120)
    radii = gaussian.radius(toy.features(model, test))
    assert found["median"] == pytest.approx(float(radii.quantile(0.5)), rel=1e-6)
    assert (found["images"], found["fit_images"], found["dimensions"]) == (40, 120, space.nullity)
    assert found["p99"] > found["p95"] > found["median"]


def test_pairs_are_drawn_evenly_over_sources_and_images_limited() -> None:
    labels, texts, names = np.arange(60) % 5, torch.eye(5), list("abcde")

    def plan(**limits: Any) -> steering.PairPlan:
        return plan_pairs(labels, names, texts, range(5), names, texts, **limits)

    found = plan(max_pairs=10, images_per_source=3, seed=1)
    assert found.wanted.sum(1).tolist() == [2] * 5
    assert not found.wanted.diagonal().any()
    assert np.flatnonzero(found.chosen).tolist() == list(range(15))  # the first of each class
    assert torch.equal(found.wanted, plan(max_pairs=10, seed=1).wanted)
    assert not torch.equal(found.wanted, plan(max_pairs=10, seed=2).wanted)
    few = plan(max_pairs=2)
    assert int(few.wanted.sum()) == 2
    assert few.chosen.sum() == 24  # only images that have a target
    assert plan(max_pairs=999).wanted.sum() == 20


def test_bad_plans_name_everything_wrong() -> None:
    labels, texts = np.array([0, 0, 1]), torch.eye(4)[:3]
    with pytest.raises(ValueError, match=r"without test images: cat; the only target is the source itself.*: bee"):
        plan_pairs(labels, ["ant", "bee", "cat"], texts, [0, 1, 2], ["an image of a bee"], texts[1:2])


def test_targets_are_other_classes_fixed_by_the_image() -> None:
    labels, indices = torch.arange(4000) % 7, torch.arange(4000)
    targets = steering_targets(labels, indices, 7)
    assert (targets != labels).all()
    assert torch.bincount((targets - labels) % 7, minlength=7)[1:].min() > 0.7 * 4000 / 6
    some = torch.tensor([3999, 5, 17])
    assert torch.equal(steering_targets(labels[some], indices[some], 7), targets[some])
    assert steering_targets(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]), 2).tolist() == [1, 0, 1]
