"""Steering over pairs and budgets: against plain loops over pictures and targets, in chunks, over processes, on planted truths."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import singreg.analysis.old_steering.plan as planning
from singreg.analysis.features import FeatureBatch
from singreg.analysis.old_steering.curves import Budgets, steer_curves
from singreg.analysis.old_steering.pairs import steer_pairs
from singreg.analysis.old_steering.plan import PairPlan, plan_pairs
from singreg.analysis.old_steering.results import NaturalRadii, SteeringCurve
from singreg.analysis.steering import measure_steering, steering_targets
from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian, bisect_step
from singreg.translator import LinearTranslator
from tests.processes import run_processes
from tests.reference.formulas import angle_degrees

C, M, N, COUNT = 4, 12, 7, 11
STEPS, RADII = [0.0, 0.1, 0.3, 0.8], [0.9, 1.2, 2.0, 5.0]
NAMES = ["ant", "bee", "cat", "dog"]


@dataclasses.dataclass
class World:
    """A head, two translators, pictures with labels, class and target prompts, and the Gaussian of their features."""

    weight: Tensor
    space: NullSpace
    translators: dict[str, Any]
    features: Tensor
    labels: Tensor
    texts: Tensor
    plan: PairPlan
    budgets: Budgets

    def batches(self, size: int = 4, rank: int = 0, world: int = 1) -> list[FeatureBatch]:
        mine = torch.arange(rank, COUNT, world)
        logits = self.features @ self.weight.T
        return [
            FeatureBatch(self.features[rows], logits[rows], torch.zeros(len(rows), N), self.labels[rows], rows)
            for rows in mine.split(size)
        ]


def make_world(seed: int = 0, **plan: Any) -> World:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(C, M, generator=g)
    space = NullSpace.from_weight(weight)
    matrices = torch.randn(2, N, M, generator=g)
    matrices[1] = matrices[0] + 0.6 * matrices[1]
    translators = {name: LinearTranslator(a, torch.randn(N, generator=g)) for name, a in zip(("one", "two"), matrices, strict=True)}
    features = torch.randn(COUNT, M, generator=g) + 0.5
    labels = torch.arange(COUNT) % C
    texts = torch.nn.functional.normalize(torch.randn(C, N, generator=g), dim=1)
    extra = torch.nn.functional.normalize(torch.randn(1, N, generator=g), dim=1)
    options = {"source_labels": [0, 2, 3], "targets": ["bee", "cat", "a red hat"], "target_texts": torch.cat([texts[1:3], extra])}
    made = plan_pairs(labels.numpy(), NAMES, texts, **{**options, **plan})
    root = torch.randn(M, M, generator=g)
    gaussian = ConditionalGaussian.from_moments(features.mean(0), root @ root.T / M, space)
    radii = gaussian.radius(features)
    quantiles = torch.quantile(radii, torch.tensor([0.5, 0.95, 0.99]).double()).tolist()
    natural = NaturalRadii(*quantiles, images=COUNT, dimensions=M - C, fit_images=99, floor=1e-3, floored=0)
    return World(weight, space, translators, features, labels, texts, made, Budgets.over(STEPS, RADII, gaussian, natural))


def curves_of(world: World, batches: list[FeatureBatch] | None = None, **changes: Any) -> list[SteeringCurve]:
    options = {"texts": world.texts, "null_space": world.space, "attackers": world.translators, **changes}
    return steer_curves(batches or world.batches(), world.plan, world.budgets, **options)


def pairs_of(world: World, batches: list[FeatureBatch] | None = None, **changes: Any) -> list[Any]:
    options = {"texts": world.texts, "weight": world.weight, "null_space": world.space, "attackers": world.translators, **changes}
    return steer_pairs(batches or world.batches(), world.plan, **options)


def gradient(translator: LinearTranslator, f: Tensor, text: Tensor) -> Tensor:
    leaf = f.clone().requires_grad_()
    torch.nn.functional.cosine_similarity(translator(leaf), text, dim=0).backward()
    return leaf.grad


def loops(world: World) -> list[tuple[int, int, Tensor, Tensor]]:
    """(picture, target, feature, prompt) of every planned steering, in float64."""
    place = {label: s for s, label in enumerate(world.plan.source_labels.tolist())}
    return [
        (i, k, world.features[i].double(), world.plan.texts[k].double())
        for i in range(COUNT)
        if world.plan.chosen[i]
        for k in range(len(world.plan.targets))
        if world.plan.wanted[place[int(world.labels[i])], k]
    ]


def wins(z: Tensor, text: Tensor, texts: Tensor) -> float:
    own = torch.nn.functional.cosine_similarity(z, text, dim=0)
    rivals = [torch.nn.functional.cosine_similarity(z, t.double(), dim=0) for t in texts if (t.double() - text).norm() > 1e-3]
    return float(all(own > rival for rival in rivals))


def slow_curve(world: World, attacker: str, judge: str, budget: str) -> dict[str, np.ndarray]:
    """The curve by plain loops: per picture the mean over its targets, then the mean over pictures."""
    gaussian, grid = world.budgets.gaussian, world.budgets.grid(budget)
    by_picture: dict[int, list[list[list[float]]]] = {}
    for i, _, f, text in loops(world):
        g = world.space.component(gradient(world.translators[attacker], f, text))
        d = gaussian.on_manifold(g) if budget == "on-manifold" else g
        d = d / d.norm()
        row = []
        for limit in grid:
            radius = limit * world.budgets.natural.median
            step = limit * float(f.norm()) if budget == "step" else largest_inside(gaussian, f, d, radius)
            z, moved = (world.translators[judge](x) for x in (f, f + step * d))
            gained = float(angle_degrees(z, text) - angle_degrees(moved, text))
            row.append([gained, abs(gained), wins(moved, text, world.texts)])
        by_picture.setdefault(i, []).append(row)
    mean = np.mean([np.mean(rows, axis=0) for rows in by_picture.values()], axis=0)
    return {name: mean[:, place] for place, name in enumerate(("AS", "AS_abs", "success"))}


def largest_inside(gaussian: ConditionalGaussian, f: Tensor, d: Tensor, radius: float) -> float:
    """The last of many steps that stays within the radius, then the last of many after it; 0 if none does."""
    start = 0.0
    for width in (60.0, 0.02):
        tried = start + torch.linspace(0, width, 6001, dtype=torch.float64)
        inside = gaussian.radius(f + tried[:, None] * d) <= radius
        start = float(tried[inside][-1]) if inside.any() else 0.0
    return start


@pytest.mark.parametrize("budget", ["step", "radius", "on-manifold"])
def test_curves_are_those_of_plain_loops(budget: str) -> None:
    world = make_world()
    found = [curve for curve in curves_of(world) if curve.budget == budget]
    assert [(c.attacker, c.judge) for c in found] == [("one", "one"), ("one", "two"), ("two", "one"), ("two", "two")]
    for curve in found[:2]:
        slow = slow_curve(world, curve.attacker, curve.judge, budget)
        for name, values in slow.items():
            np.testing.assert_allclose(curve.figures[name], values, atol=2e-2 if budget != "step" else 1e-4, err_msg=name)
            height = np.sum((values[1:] + values[:-1]) / 2 * np.diff(curve.grid)) / (curve.grid[-1] - curve.grid[0])
            assert curve.area[name][0] == pytest.approx(height, abs=2e-2)
            assert curve.area[name][1] <= curve.area[name][0] <= curve.area[name][2]
            low, high = np.array(curve.intervals[name]).T
            assert (low <= np.array(curve.figures[name]) + 1e-9).all()
            assert (np.array(curve.figures[name]) <= high + 1e-9).all()
    assert found[0].figures["AS"] != found[1].figures["AS"]  # attacker and judge are told apart


def test_natural_percentiles_are_on_the_radius_grid_and_steps_begin_at_nothing() -> None:
    world = make_world()
    step, radius = (next(c for c in curves_of(world) if c.budget == budget) for budget in ("step", "radius"))
    assert step.figures["AS"][0] == 0
    assert step.outside == [0.0] * len(STEPS)
    assert set(world.budgets.natural.marks.values()) | set(RADII) == set(radius.grid)
    assert radius.grid == sorted(radius.grid)
    assert radius.at(1.0, "AS") == radius.figures["AS"][radius.grid.index(1.0)]
    with pytest.raises(ValueError, match=r"1\.05 is not on the grid of radius: 0\.9, "):
        radius.at(1.05, "AS")
    # Half of all pictures are outside the median by definition; a wider radius leaves out fewer, and 0 of them in the end.
    assert radius.outside == sorted(radius.outside, reverse=True)
    assert radius.outside[0] > 0
    assert radius.outside[-1] == 0


def test_table_of_pairs_is_that_of_plain_loops() -> None:
    world = make_world()
    for found in pairs_of(world, image_score=40.0):
        attacker, judge = world.translators[found.attacker], world.translators[found.judge]
        table: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
        for i, k, f, text in loops(world):
            g = world.space.component(gradient(attacker, f, text))
            d = g / g.norm()
            step = float(bisect_step(attacker, f[None], d[None], 40.0, largest=1e9))
            source = world.plan.source_labels.tolist().index(int(world.labels[i]))
            if math.isnan(step):
                row = (math.nan, math.nan, 0.0)
            else:
                moved = f + step * d
                gained = float(angle_degrees(judge(f), text) - angle_degrees(judge(moved), text))
                row = (gained, step / float(f.norm()), wins(judge(moved), text, world.texts))
            table.setdefault((source, k), []).append(row)
        for (source, k), rows in table.items():
            values = np.array(rows)
            reached = ~np.isnan(values[:, 0])
            cell = {name: matrix[source][k] for name, matrix in found.matrices.items()}
            assert cell["images"] == len(rows)
            assert cell["reachable"] == pytest.approx(reached.mean())
            assert cell["success"] == pytest.approx(values[:, 2].mean())
            if reached.any():
                assert cell["AS"] == pytest.approx(values[reached, 0].mean(), abs=1e-4)
                assert cell["AS_abs"] == pytest.approx(np.abs(values[reached, 0]).mean(), abs=1e-4)
                assert cell["AS_abs_std"] == pytest.approx(np.abs(values[reached, 0]).std(), abs=1e-3)
                assert cell["step"] == pytest.approx(values[reached, 1].mean(), rel=1e-5)
            else:
                assert cell["AS"] is None
        everything = np.array([row for rows in table.values() for row in rows])
        reached = ~np.isnan(everything[:, 0])
        assert found.overall["rows"] == len(everything)
        assert found.overall["pairs"] == len(table) == 8  # 3 x 3 without cat to cat
        assert found.overall["images"] == len({i for i, *_ in loops(world)})
        assert found.overall["AS_abs"] == pytest.approx(np.abs(everything[reached, 0]).mean(), abs=1e-4)
        assert found.overall["AS_abs_std"] == pytest.approx(np.abs(everything[reached, 0]).std(), abs=1e-3)
        low, high = found.intervals["AS_abs"]
        assert low <= found.overall["AS_abs"] <= high
        assert found.calibration_error < 1e-3
        assert found.logit_change < 1e-9
        assert found.matrices["AS"][1][1] is None  # cat to cat


def test_one_pair_is_what_measure_steering_reads() -> None:
    """Two classes leave one target each, so both must choose the same one."""
    world = make_world()
    labels, texts = world.labels % 2, world.texts[:2]
    head = NullSpace.from_weight(world.weight[:2])
    attacker, judge = world.translators["one"], world.translators["two"]
    single = measure_steering(
        world.features, labels, torch.arange(COUNT), texts=texts, null_space=head, attacker=attacker, judge=judge, image_score=30.0
    )
    assert torch.equal(steering_targets(labels, torch.arange(COUNT), 2), 1 - labels)
    plan = plan_pairs(labels.numpy(), NAMES[:2], texts, [0, 1], NAMES[:2], texts)
    batch = FeatureBatch(world.features, world.features @ world.weight[:2].T, torch.zeros(COUNT, N), labels, torch.arange(COUNT))
    (found,) = steer_pairs(
        [batch], plan, texts=texts, weight=world.weight[:2], null_space=head,
        attackers={"one": attacker}, judges={"two": judge}, image_score=30.0,
    )  # fmt: skip
    assert found.overall["AS"] == pytest.approx(single["attribute_score"], abs=1e-3)
    assert found.overall["step"] == pytest.approx(single["step"], rel=1e-4)
    assert found.overall["reachable"] == pytest.approx(single["reachable"])
    assert found.overall["success"] == pytest.approx(single["success"])


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    whole, table = curves_of(world), pairs_of(world)
    monkeypatch.setattr(planning, "CHUNK_ELEMENTS", 3 * (M + N + C))  # three rows a chunk: a picture's targets are torn apart
    rows = list(world.plan.select(world.batches(COUNT)[0]).rows(world.plan, C))
    assert [len(r.features) for r in rows[:-1]] == [3] * (len(rows) - 1)
    for a, b in zip(whole, curves_of(world, world.batches(5)), strict=True):
        assert a.grid == b.grid
        for name in a.figures:
            np.testing.assert_allclose(a.figures[name], b.figures[name], atol=1e-5)
    for a, b in zip(table, pairs_of(world, world.batches(5)), strict=True):
        assert a.overall == pytest.approx(b.overall, rel=1e-9)


def test_any_callable_may_attack_and_judge() -> None:
    """A linear translator behind a plain function takes autograd, bisection and a call a step, and must read the same."""
    world = make_world()
    hidden = {"one": lambda f: world.translators["one"](f)}
    fast, slow = (curves_of(world, attackers=kind) for kind in ({"one": world.translators["one"]}, hidden))
    for a, b in zip(fast, slow, strict=True):
        for name in a.figures:
            np.testing.assert_allclose(a.figures[name], b.figures[name], atol=1e-4)
    (known,), (opaque,) = (pairs_of(world, attackers=kind) for kind in ({"one": world.translators["one"]}, hidden))
    assert known.overall == pytest.approx(opaque.overall, rel=1e-6)
    assert known.matrices["step"][0] == pytest.approx(opaque.matrices["step"][0], rel=1e-6)


def test_a_float32_network_attacks_float64_features() -> None:
    torch.manual_seed(0)
    world = make_world()
    network = torch.nn.Sequential(torch.nn.Linear(M, 16), torch.nn.Tanh(), torch.nn.Linear(16, N)).eval()
    (found,) = pairs_of(world, attackers={"network": network}, image_score=10.0)
    assert found.overall["reachable"] > 0.5
    assert found.calibration_error < 1e-3
    curves = curves_of(world, attackers={"network": network}, judges=world.translators)
    assert {c.judge for c in curves} == {"one", "two"}
    assert curves[0].figures["AS"][0] == 0


def test_a_null_space_the_translator_is_blind_to_cannot_be_steered() -> None:
    """Planted truth: without A's null part nothing moves and nothing is reachable; the control moves."""
    world = make_world()
    blind = {"blind": LinearTranslator(world.space.remove(world.translators["one"].matrix), torch.zeros(N))}
    for curve in curves_of(world, attackers=blind):
        assert max(map(abs, curve.figures["AS"])) < 1e-4
        assert curve.figures["success"] == [curve.figures["success"][0]] * len(curve.grid)
    (found,) = pairs_of(world, attackers=blind)
    assert found.overall["reachable"] == 0
    assert found.overall["AS"] is None
    assert found.overall["success"] == 0
    assert found.intervals["AS"] == [None, None]
    assert found.calibration_error is None
    assert all(value is None for row in found.matrices["AS_abs"] for value in row)
    control = next(c for c in curves_of(world) if c.budget == "step")
    assert control.figures["AS"][-1] > 10
    assert control.figures["success"][-1] > control.figures["success"][0]


def test_the_on_manifold_direction_gains_more_where_variances_are_uneven() -> None:
    """Planted truth: pictures drawn from a Gaussian with variances from 0.001 to 10; the control has equal ones and no difference."""
    world = make_world()
    gained = {}
    for name, deviation in {"uneven": torch.logspace(-1.5, 0.5, M), "even": torch.ones(M)}.items():
        g = torch.Generator().manual_seed(5)
        rotation = torch.linalg.qr(torch.randn(M, M, generator=g)).Q
        features = torch.randn(COUNT, M, generator=g) * deviation @ rotation.T
        covariance = rotation @ torch.diag(deviation**2) @ rotation.T
        gaussian = ConditionalGaussian.from_moments(torch.zeros(M), covariance, world.space, floor=1e-6)
        budgets = Budgets.over(STEPS, RADII, gaussian, world.budgets.natural)
        drawn = dataclasses.replace(world, features=features, budgets=budgets)
        radius, manifold = (next(c for c in curves_of(drawn) if c.budget == b) for b in ("radius", "on-manifold"))
        gained[name] = manifold.at(1.2, "AS") / radius.at(1.2, "AS")
    assert gained["uneven"] > 1.2
    assert gained["even"] == pytest.approx(1, abs=1e-5)


def _share(rank: int, world: int, stride: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    made = make_world(images_per_source=2)
    mine = made.batches(2, rank, stride) if rank < stride else []  # stride 1: the second process is idle
    options = {"texts": made.texts, "null_space": made.space, "attackers": made.translators}
    curves = steer_curves(mine, made.plan, made.budgets, **options)
    pairs = steer_pairs(mine, made.plan, weight=made.weight, **options)
    return [dataclasses.asdict(c) for c in curves], [dataclasses.asdict(p) for p in pairs]


@pytest.mark.parametrize("stride", [2, 1])
def test_processes_count_every_picture_once(stride: int) -> None:
    world = make_world(images_per_source=2)
    curves, pairs = curves_of(world), pairs_of(world)
    assert pairs[0].overall["images"] == 6
    for found_curves, found_pairs in run_processes(2, _share, stride):
        for a, b in zip(curves, found_curves, strict=True):
            np.testing.assert_allclose(a.figures["AS"], b["figures"]["AS"], atol=1e-5)
            np.testing.assert_allclose(a.area["success"], b["area"]["success"], atol=1e-6)
            np.testing.assert_allclose(a.outside, b["outside"], atol=1e-7)
        for a, b in zip(pairs, found_pairs, strict=True):
            assert a.overall == pytest.approx(b["overall"], rel=1e-9)
            assert a.matrices["images"] == b["matrices"]["images"]
            assert a.intervals["AS"] == pytest.approx(b["intervals"]["AS"], rel=1e-9)
            assert a.calibration_error == pytest.approx(b["calibration_error"], abs=1e-9)


def test_pairs_are_drawn_evenly_over_sources_and_pictures_limited() -> None:
    labels, texts = np.arange(60) % 5, torch.eye(5)
    names = list("abcde")
    plan = plan_pairs(labels, names, texts, range(5), names, texts, max_pairs=10, images_per_source=3, seed=1)
    assert plan.wanted.sum(1).tolist() == [2] * 5
    assert not plan.wanted.diagonal().any()
    assert plan.chosen.sum() == 15
    assert np.flatnonzero(plan.chosen).max() == 14  # the first of each class
    again, other = (plan_pairs(labels, names, texts, range(5), names, texts, max_pairs=10, seed=seed) for seed in (1, 2))
    assert torch.equal(plan.wanted, again.wanted)
    assert not torch.equal(plan.wanted, other.wanted)
    few = plan_pairs(labels, names, texts, range(5), names, texts, max_pairs=2)
    assert int(few.wanted.sum()) == 2
    assert few.chosen.sum() == 24  # only pictures that have a target
    assert plan_pairs(labels, names, texts, range(5), names, texts, max_pairs=999).wanted.sum() == 20


def test_bad_plans_name_everything_wrong() -> None:
    labels, texts = np.array([0, 0, 1]), torch.eye(4)[:3]
    with pytest.raises(ValueError, match=r"without test pictures: cat; the only target is the source itself.*: bee"):
        plan_pairs(labels, ["ant", "bee", "cat"], texts, [0, 1, 2], ["an image of a bee"], texts[1:2])
    world = make_world()
    with pytest.raises(ValueError, match="two different steps"):
        Budgets.over([0.1, 0.1], RADII, world.budgets.gaussian, world.budgets.natural)
