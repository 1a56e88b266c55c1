"""Steering picture by picture against plain loops: fixed image score, fixed steps, natural radii; other judges; what cannot be reached."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis.old_steering.curves import FIGURES, Budgets
from singreg.analysis.results import Rows
from singreg.analysis.steering import measure_steering, steering_targets
from singreg.analysis.study.steering_images import equal_effort, steer_images
from singreg.steering import bisect_step
from singreg.translator import LinearTranslator
from tests.analysis.steering.test_steering_curves import (
    COUNT,
    C,
    N,
    World,
    gradient,
    largest_inside,
    make_world,
    wins,
)
from tests.reference.formulas import angle_degrees

GRID = (0.0, 0.05, 0.1, 0.25, 0.6)


def budgets(world: World) -> Budgets:
    return Budgets.over(GRID, (), world.budgets.gaussian, world.budgets.natural)


def steered(world: World, attacker: Any = None, **options: Any) -> Rows:
    attacker = attacker or world.translators["one"]
    columns = [
        steer_images(batch, texts=world.texts, null_space=world.space, attacker=attacker, budgets=budgets(world), **options)
        for batch in world.batches()
    ]
    return {name: np.concatenate([found[name] for found in columns]) for name in columns[0]}


def slow(world: World, i: int, target: int, step: float, d: Tensor, judge: LinearTranslator, texts: Tensor) -> tuple[float, ...]:
    f, text = world.features[i].double(), texts[target].double()
    z, moved = judge(f), judge(f + step * d)
    gained = float(angle_degrees(z, text) - angle_degrees(moved, text))
    return gained, abs(gained), wins(moved, text, texts)


@pytest.mark.parametrize("judge", ["one", "two", "another VLM"])
def test_every_picture_is_steered_as_in_plain_loops(judge: str) -> None:
    world = make_world()
    options: dict[str, Any] = {}
    reader, texts, attacker = world.translators["one"], world.texts, world.translators["one"]
    if judge == "two":
        options["judge"] = reader = world.translators["two"]
    if judge == "another VLM":
        g = torch.Generator().manual_seed(8)
        reader = LinearTranslator(torch.randn(N + 2, world.features.shape[1], generator=g), torch.randn(N + 2, generator=g))
        texts = torch.nn.functional.normalize(torch.randn(C, N + 2, generator=g), dim=1)
        options |= {"judge": reader, "judge_texts": texts}
    found = steered(world, **options)
    targets = steering_targets(world.labels, torch.arange(COUNT), C)
    for i, target in enumerate(targets.tolist()):
        f = world.features[i].double()
        g = world.space.component(gradient(attacker, f, world.texts[target].double()))
        d = g / g.norm()
        step = float(bisect_step(attacker, f[None], d[None], 40.0, largest=1e9))
        if math.isnan(step):
            assert (found["steering_reachable"][i], found["steering_success"][i]) == (0, 0)
            assert np.isnan(found["steering_AS"][i])
            assert np.isnan(found["steering_step"][i])
        else:
            gained, _, won = slow(world, i, target, step, d, reader, texts)
            assert found["steering_AS"][i] == pytest.approx(gained, abs=1e-4)
            assert found["steering_step"][i] == pytest.approx(step / float(f.norm()), rel=1e-6)
            assert (found["steering_reachable"][i], found["steering_success"][i]) == (1, won)
        path = [slow(world, i, target, share * float(f.norm()), d, reader, texts) for share in GRID]
        for place, name in enumerate(FIGURES):
            assert found[f"{name}10"][i] == pytest.approx(path[2][place], abs=1e-4)
            assert found[f"{name}25"][i] == pytest.approx(path[3][place], abs=1e-4)
            heights = [(a[place] + b[place]) / 2 for a, b in itertools.pairwise(path)]
            assert found[f"area_{name}"][i] == pytest.approx(np.dot(heights, np.diff(GRID)) / GRID[-1], abs=1e-4)
        natural = world.budgets.gaussian.on_manifold(gradient(attacker, f, world.texts[target].double()))
        natural = natural / natural.norm()
        for label, mark in world.budgets.natural.marks.items():
            limit = largest_inside(world.budgets.gaussian, f, natural, mark * world.budgets.natural.median)
            values = slow(world, i, target, limit, natural, reader, texts)
            for name, value in zip(FIGURES[:2], values, strict=False):
                assert found[f"manifold_{name}{label.removesuffix(' %')}"][i] == pytest.approx(value, abs=3e-2)


@pytest.mark.parametrize("degrees", [40.0, 75.0])
def test_figures_are_means_over_what_was_steered_and_agree_with_table_1(degrees: float) -> None:
    world = make_world()
    found = steered(world, image_score=degrees)
    columns = {f"{name}/one": np.append(values, np.nan) for name, values in found.items()}  # one picture is not steered
    got = equal_effort(columns, "one", degrees)
    assert (got.reachable < 1) == (degrees == 75)
    expected = measure_steering(
        world.features, world.labels, torch.arange(COUNT), texts=world.texts, null_space=world.space,
        attacker=world.translators["one"], image_score=degrees,
    )  # fmt: skip
    assert (got.AS, got.step) == pytest.approx((expected["attribute_score"], expected["step"]), abs=1e-4)
    assert (got.reachable, got.success, got.images) == pytest.approx((expected["reachable"], expected["success"], COUNT))
    assert got.at_steps["25 %"]["AS"] == pytest.approx(np.nanmean(columns["AS25/one"]))
    assert got.on_manifold["95 %"]["success"] == pytest.approx(np.nanmean(columns["manifold_success95/one"]))
    assert list(got.on_manifold) == ["50 %", "95 %", "99 %"]
    assert got.area["success"] == pytest.approx(np.nanmean(columns["area_success/one"]))


def test_a_blind_translator_cannot_be_steered_and_a_callable_is_steered_as_its_matrix() -> None:
    world = make_world()
    one = world.translators["one"]
    blind = LinearTranslator(world.space.remove(one.matrix), one.offset)
    columns = {f"{name}/blind": values for name, values in steered(world, blind).items()}
    got = equal_effort(columns, "blind", 40.0)
    assert (got.reachable, got.success) == (0, 0)
    assert math.isnan(got.AS)
    assert math.isnan(got.step)
    assert abs(got.at_steps["25 %"]["AS"]) < 1e-4
    control, opaque = steered(world), steered(world, lambda f: one(f))
    assert control["AS25"].mean() > 2
    for name, values in control.items():
        np.testing.assert_allclose(opaque[name], values, atol=1e-3, err_msg=name)


def test_targets_are_fixed_by_seed_and_picture_not_by_batch() -> None:
    world = make_world()
    whole, batch = steered(world), world.batches(COUNT)[0]
    options = {"texts": world.texts, "null_space": world.space, "attacker": world.translators["one"], "budgets": budgets(world)}
    for name, values in steer_images(batch, **options).items():
        np.testing.assert_allclose(values, whole[name], atol=1e-9)
    assert not np.allclose(steer_images(batch, **options, seed=1)["AS25"], whole["AS25"])
