"""The ascent against linear programming; judging from files, checks that find broken attacks, natural twins, shares."""

import itertools
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from scipy.optimize import linprog
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

from singreg.analysis import attack
from singreg.analysis import attack_judges as judges
from singreg.analysis.attack import ATTACK, LAGRANGIAN, SIGNED, TANGENT, Best, PixelModel, Reading, Tangent, ascend
from singreg.analysis.statistics import share_interval
from singreg.config import DataConfig
from singreg.data.datasets import load_splits
from singreg.models.edits import drop_null
from singreg.translator import LinearTranslator
from tests import attack_toy as toy
from tests.demo import ASSETS, demo_classifier


@pytest.mark.parametrize("size", [8, 24])
def test_the_ascent_nears_what_a_linear_program_allows(size: int) -> None:
    """Of a linear objective: max g·d with |W d| ≤ τ and |d| ≤ ε, without any rounding."""
    model, _, _, x, _ = toy.parts()
    _, logits = model(x)
    goal = torch.randn(48, generator=toy.seeded(9))

    def judged(images: torch.Tensor) -> Reading:
        features, now = model(images)
        return Reading(features @ goal, (now - logits) / toy.TAU, now.new_zeros(len(now), 0))

    weight = model.classifier.weight.numpy().astype(float)
    rows, tolerances = np.concatenate([weight, -weight]), np.full(6, toy.TAU)
    most = -linprog(-goal.numpy(), rows, tolerances, bounds=(-size / 255, size / 255)).fun
    how: dict[str, Any] = {"steps": 60, "restarts": 2}
    images, found = ascend(judged, x, size, None, generator=toy.seeded(), **how)
    gain = found[TANGENT] - found["before"]
    assert bool((gain > 0.9 * most).all()), (gain, most)
    assert bool((gain < 1.0001 * most).all())
    torch.testing.assert_close(judged(images).value.double(), torch.maximum(found[TANGENT], found[LAGRANGIAN]))
    with patch.object(attack, "MOST_HELD", 0):
        _, found = ascend(judged, x, size, None, generator=toy.seeded(), **how)
    assert [*found] == ["before", "one_step", "began", LAGRANGIAN, SIGNED]
    for kind in (LAGRANGIAN, SIGNED):
        assert bool((found[kind] - found["before"] > 0.4 * most).all()), kind


def test_a_tangent_moves_nothing_that_is_held() -> None:
    """On a linear model: along it no logit moves, back takes any logit change away, and pixels at an edge stay."""
    model, _, _, x, _ = toy.parts()
    leaf = x.clone().requires_grad_()
    logits = model(leaf)[1]
    tangent = Tangent.of(logits, leaf)
    direction = torch.randn(x.shape, generator=toy.seeded(5))
    edge = torch.full_like(x, 0.02)
    moved = torch.where(torch.rand(x.shape, generator=toy.seeded(6)) < 0.3, edge, torch.zeros_like(x))
    inside = tangent.within(moved, direction, -edge, edge)
    still = (moved == edge) & (direction > 0)
    assert 3 < int(still.sum()) < still.numel() / 2

    def change(displacement: torch.Tensor) -> torch.Tensor:
        return (model(x + displacement)[1] - logits).detach()

    assert float(change(direction).abs().max()) > 0.1  # the control
    for kept, rows in ((tangent, torch.zeros_like(still)), (inside, still)):
        held = torch.randn(4, 3, generator=toy.seeded(7))
        along, back = kept.along(direction), kept.back(held, x)
        assert float(change(along).abs().max()) < 1e-4
        torch.testing.assert_close(change(back), -held, atol=1e-3, rtol=0)
        assert not along[rows].any()
        assert not back[rows].any()


def test_nothing_infeasible_is_ever_kept() -> None:
    model, translator, texts, x, chosen = toy.parts()
    judged = attack.towards_prompt(
        model, translator, x, texts[chosen["target"].tolist()], 1e-7
    )  # less than any 8-bit step
    images, found = ascend(judged, x, 8, None, steps=8, restarts=2, generator=toy.seeded())
    assert torch.equal(images, x)
    assert all(torch.equal(values, found["before"]) for values in found.values())


@pytest.mark.parametrize("size", [0, 1, 3, 255])
def test_the_grid_never_outgrows_the_budget(size: int) -> None:
    x = torch.randint(0, 256, (6, 3, 8, 8), generator=toy.seeded()) / 255
    for moved in (torch.randn(x.shape, generator=toy.seeded(1)), attack.random_images(x, size, toy.seeded(2)) - x):
        levels = 255 * attack.on_grid(x, moved, size)
        assert float((levels - levels.round()).abs().max()) < 1e-3
        assert float((levels - 255 * x).round().abs().max()) <= size
        assert 0 <= float(levels.min()) <= float(levels.max()) <= 255


def test_what_is_recorded_is_each_pass_without_help() -> None:
    """Single step and start are no part of what a pass reached; and a batch made again is the same."""
    model, translator, texts, x, chosen = toy.parts()
    judged = attack.towards_prompt(model, translator, x, texts[chosen["target"].tolist()], toy.TAU)

    def made(seed: int) -> list[tuple[int, dict[str, torch.Tensor], Any]]:
        return list(attack.attack_images(judged, x, [2, 8], (seed, 0), steps=12, restarts=2))

    (_, first, small), (_, second, large) = made(0)
    assert list(small) == ["one_step", "began", TANGENT, LAGRANGIAN]
    assert (small["began"] == small["one_step"]).all()  # no smaller budget to begin from
    assert (large["began"] > 0).all()
    assert (large["began"] >= large["one_step"]).all()
    torch.testing.assert_close([arms for _, arms, _ in made(0)], [first, second], atol=0, rtol=0)
    assert not torch.equal(made(1)[0][1]["random"], first["random"])


def failing(rows: pd.DataFrame) -> str:
    return "; ".join(check["name"] for check in judges.attack_checks(rows) if not check["passed"])


def test_all_checks_hold_of_the_real_attack(tmp_path: Path) -> None:
    rows = toy.judged(tmp_path)
    assert failing(rows) == ""
    assert len(rows) == 4 * 2 * 2
    summaries = judges.summarize_attack(rows, ["fitted", "auditor"], seed=0)
    found = next(s for s in summaries if (s["budget"], s["arm"]) == (toy.LARGE, ATTACK))
    assert found["rise"]["auditor"] == found["rise"]["fitted"]
    assert (found["rise"]["fitted"][0] > 1, found["kept"]) == (True, 1)
    climbs = judges.summarize_climbs(rows)
    assert [*climbs["kind"]] == [TANGENT] * 2 + [LAGRANGIAN] * 2
    with patch.object(attack, "MOST_HELD", 0):
        rows = toy.judged(tmp_path / "many")
    assert [*judges.summarize_climbs(rows)["kind"]] == [LAGRANGIAN] * 2 + [SIGNED] * 2
    assert failing(rows) == ""


@pytest.mark.parametrize("fault", ["dead", "wrong sign", "no length"])
@pytest.mark.parametrize("kind", [TANGENT, LAGRANGIAN])
def test_a_broken_pass_is_caught(tmp_path: Path, kind: str, fault: str) -> None:
    """Only this kind of pass is broken: the single step is sound, and what the attack keeps hides it."""
    climb, right = attack.climb, torch.autograd.grad

    def broken(*args: Any, **how: Any) -> Best:
        if how["kind"] != kind:
            return climb(*args, **how)
        if fault == "dead":
            return args[4]  # type: ignore[no-any-return]
        if fault == "no length":
            with patch.dict(attack.PATH, {kind: 0.0}):
                return climb(*args, **how)
        with patch.object(torch.autograd, "grad", lambda *a, **k: tuple(-gradient for gradient in right(*a, **k))):
            return climb(*args, **how)

    with patch.object(attack, "climb", broken):
        rows = toy.judged(tmp_path)
    assert failing(rows).startswith(f"{kind} climb by themselves")
    assert (rows.loc[rows["arm"] == ATTACK, "rise fitted"] > 0).all()


def test_attacks_that_forget_the_budget_or_the_logits_are_caught(tmp_path: Path) -> None:
    """And what breaks either is no success."""

    everywhere = lambda x, moved, _: (255 * (x + 3 * moved)).round().clamp(0, 255) / 255  # noqa: E731
    with patch.object(attack, "on_grid", everywhere):
        far = toy.judged(tmp_path / "far")
    nothing = property(lambda reading: torch.zeros(len(reading.value), 4))
    with patch.object(Reading, "constraints", nothing), patch.object(attack, "MOST_HELD", 0):
        free = toy.judged(tmp_path / "free")
    for rows, wrong in ((far, far["linf"] > far["size"]), (free, free["logit_change"] > toy.TAU)):
        broken = rows[wrong & (rows["arm"] == ATTACK)]
        assert len(broken)
        assert "kept in the saved files" in failing(rows)
        assert not broken[["won fitted", "rise fitted"]].any(axis=None)


def test_finished_batches_are_not_attacked_again(tmp_path: Path) -> None:
    whole = toy.judged(tmp_path / "whole", batch_size=3)
    right, made = attack.attack_images, list[int]()

    def killed(*args: Any, **how: Any) -> Any:
        made.append(len(args[1]))
        if len(made) == 2:
            raise KeyboardInterrupt
        return right(*args, **how)

    with patch.object(attack, "attack_images", killed):
        with pytest.raises(KeyboardInterrupt):
            toy.judged(tmp_path / "killed", batch_size=3)
        pd.testing.assert_frame_equal(toy.judged(tmp_path / "killed", batch_size=3), whole)
    assert made == [3, 1, 1]


def test_differences_and_transfers_count_what_was_kept(tmp_path: Path) -> None:
    rows = toy.judged(tmp_path)
    other = rows.assign(model="other", **{"rise fitted": rows["rise fitted"] + 2})
    differences = judges.model_differences(pd.concat([rows, other.sample(frac=1, random_state=0)]), ["fitted"], seed=0)
    names = [("toy", "other", budget) for budget in (toy.SMALL, toy.LARGE)]
    assert [(d["first"], d["second"], d["budget"]) for d in differences] == names
    assert [d["value"] for d in differences] == pytest.approx([2, 2])
    model, translator, texts, _, _ = toy.parts()
    judge = judges.Judge("fitted", model, translator, texts)
    lost = judges.judge_images(other[other["arm"] == ATTACK], tmp_path, model, [judge], tau=1e-9)
    small, large = judges.transfers_of(rows, lost)
    own = rows.loc[(rows["arm"] == ATTACK) & (rows["budget"] == toy.SMALL), "rise fitted"].mean()
    assert small == {**small, "crafted_on": "other", "judged_on": "toy", "rise": 0.0, "own": own, "kept": 0.0}
    assert large["budget"] == toy.LARGE


def test_plain_timm_reads_the_saved_logits_and_dropping_the_null_space_changes_nothing(tmp_path: Path) -> None:
    """Only timm, PIL and torchvision's to-tensor and normalise: what anyone would write."""
    split = load_splits(DataConfig(scenes={"train": 12, "audit": 6, "test": 20})).test
    translator = LinearTranslator(torch.randn(16, 256, generator=toy.seeded(3)) / 16, torch.zeros(16))
    texts = normalize(torch.randn(10, 16, generator=toy.seeded(4)), dim=-1)
    chosen, settings = attack.choose_images(split, 3, seed=0), toy.SETTINGS | {"tau": 0.5, "linf": [2], "steps": 8}
    classifier, rises = demo_classifier().eval().requires_grad_(False), list[float]()
    models = PixelModel(classifier), PixelModel(drop_null(classifier).eval())
    for place, model in enumerate(models):
        rows = attack.attack_split(model, translator, split, chosen, texts, tmp_path, str(place), **settings)
        judge = judges.Judge("fitted", model, translator, texts)
        judged = judges.judge_images(rows[rows["arm"] == ATTACK], tmp_path, model, [judge], 0.5)
        rises.append(judged["rise fitted"].mean())
    assert rises[0] == pytest.approx(rises[1], abs=0.3)
    x = attack.load_images([tmp_path / name for name in judged["original"]])
    assert torch.equal(x, torch.stack([models[0].image(split, index) for index in judged["image"]]))
    torch.testing.assert_close(models[0](x), models[1](x), atol=1e-4, rtol=1e-4)

    plain = timm.create_model(f"local-dir:{ASSETS / 'demo_classifier'}", pretrained=True).eval()
    mean, std = (torch.tensor(classifier.preprocessing[name])[:, None, None] for name in ("mean", "std"))

    def logits(name: str) -> Tensor:
        with Image.open(tmp_path / name) as image, torch.no_grad():
            out: Tensor = plain((to_tensor(image)[None] - mean) / std)
        return out[0]

    for original, file in zip(judged["original"], judged["file"], strict=True):
        before, after = logits(original), logits(file)
        assert 0 < float((after - before).abs().max()) <= 0.5
        assert before.argmax() == after.argmax()
    whole = classifier(classifier.transform(split.image(int(chosen["image"][0])))[None])
    torch.testing.assert_close(whole[0], logits(judged["original"][0]), atol=2e-3, rtol=1e-3)


def test_images_are_chosen_evenly() -> None:
    split = toy.Noise(np.array([0] * 30 + [1] * 5 + [2] * 5 + [-1] * 5))
    chosen = attack.choose_images(split, 39, seed=3)
    assert np.bincount(chosen["label"]).tolist() == [29, 5, 5]
    assert np.bincount(attack.choose_images(split, 9, seed=3)["label"]).tolist() == [3, 3, 3]
    assert chosen.equals(attack.choose_images(split, 39, seed=3))
    assert (chosen["target"] != chosen["label"]).all()
    assert {*chosen["target"]} == {0, 1, 2}
    with pytest.raises(ValueError, match="at least two classes"):
        attack.choose_images(toy.Noise(np.array([1, 1, -1])), 2, seed=0)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 128, 0.0, 0.02914), (128, 128, 0.97086, 1.0), (5, 10, 0.23659, 0.76341)]
)
def test_shares_have_wilson_intervals(count: int, total: int, low: float, high: float) -> None:
    assert share_interval(count, total) == pytest.approx([count / total, low, high], abs=1e-4)


def test_twins_are_those_of_a_loop_over_all_pairs() -> None:
    g, labels, places = toy.seeded(), torch.arange(30) % 3, np.arange(30) + 100
    logits, z = torch.randn(30, 4, generator=g) + 2 * torch.eye(3, 4)[labels], torch.randn(30, 5, generator=g)
    found = judges.twins_among(logits, z, labels, places)

    def far(i: int, j: int) -> float:
        return math.degrees(math.acos(float(normalize(z[i].double(), dim=0) @ normalize(z[j].double(), dim=0))))

    pairs = list(itertools.combinations(range(30), 2))
    distance = {(i, j): float((logits[i] - logits[j]).double().abs().max()) for i, j in pairs}
    same = sorted(distance[p] for p in pairs if labels[p[0]] == labels[p[1]])
    other = [p for p in pairs if labels[p[0]] != labels[p[1]]]
    close = same[(len(same) - 1) // 2]  # torch's median is the lower of the two middle ones
    limit = sorted(far(*p) for p in other)[(len(other) - 1) // 2]
    wanted = {p for p in other if distance[p] <= close + 1e-6 and far(*p) >= limit - 1e-9}
    assert found["pairs"] == len(other)
    assert found["rate"] == pytest.approx(len(wanted) / len(other), abs=1.1 / len(other))
    assert {(t["first"] - 100, t["second"] - 100) for t in found["shown"]} <= wanted
    used = [i for t in found["shown"] for i in (t["first"], t["second"])]
    ranks = [t["logit_distance"] for t in found["shown"]]
    assert (len(used), ranks) == (len(set(used)), sorted(ranks))
    assert ranks[0] == pytest.approx(min(distance[p] for p in wanted), abs=1e-5)


def test_only_a_classifier_that_cannot_tell_classes_apart_has_twins() -> None:
    g, labels = toy.seeded(1), torch.arange(40) % 4
    z, noise, places = torch.randn(40, 6, generator=g), torch.randn(40, 4, generator=g), np.arange(40)
    given = (noise + 100 * torch.eye(4)[labels], noise, 1000 * noise)
    apart, blind, larger = (judges.twins_among(logits, z, labels, places) for logits in given)
    assert (apart["rate"], apart["shown"]) == (0.0, [])
    assert blind["rate"] > 0.15
    assert larger["rate"] == pytest.approx(blind["rate"])  # the limit grows with the logits
