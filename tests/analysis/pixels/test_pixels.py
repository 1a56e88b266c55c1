"""The pixel attack against closed forms, and every sanity rule with a broken attack that it must catch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

from singreg.analysis.pixels import ascent, budgets
from singreg.analysis.pixels.ascent import ascend, one_step
from singreg.analysis.pixels.attack import AttackSettings, Batch, attack_batch, save_batch
from singreg.analysis.pixels.budgets import Budget, Reading, random_pictures
from singreg.analysis.pixels.checks import pixel_checks, unchanged_without_null
from singreg.analysis.pixels.judges import (
    Reader,
    encoder_reader,
    judge_pictures,
    reading_of,
    summarise,
    translator_reader,
)
from singreg.analysis.pixels.model import PixelModel, away_from_label, load_pictures, save_picture, towards_prompt
from singreg.analysis.pixels.passes import Climbed
from singreg.analysis.pixels.plain_robustness import corrupted_right, still_right
from singreg.analysis.pixels.results import ATTACK, JudgedPicture, Transfer
from singreg.analysis.pixels.tangent import Tangent
from singreg.data.config import DataConfig
from singreg.data.corruption import CorruptedSplit
from singreg.data.datasets import ImageSplit, load_splits
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.translator import LinearTranslator
from tests.demo import ASSETS, demo_classifier, demo_vlm

TAU = 0.1  # tight for the toy's logits, so that forgetting it shows
DEMO_TAU = 0.5
SMALL, LARGE = Budget("linf", 2), Budget("linf", 8)
SETTINGS = AttackSettings([SMALL, LARGE], tau=TAU, steps=12, restarts=2, seed=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_pictures(count: int, side: int, seed: int = 0, low: int = 40, high: int = 216) -> Tensor:
    """Pictures far enough from black and white that no budget meets an edge."""
    return torch.randint(low, high, (count, 3, side, side), generator=seeded(seed)) / 255


class Linear(nn.Module):
    """Logits that are linear in the pixels, through features that are the pixels themselves."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * side * side, classes, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(self.fc.weight.shape, generator=seeded(5)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


def linear_model(side: int = 4, classes: int = 2) -> PixelModel:
    classifier = Classifier.from_module(Linear(side, classes)).requires_grad_(False)
    return PixelModel(classifier, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def toy() -> tuple[PixelModel, LinearTranslator, Tensor, Batch]:
    """Four pictures, 48 pixels, 3 logits: 45 directions are free, so steering has an answer that linear algebra knows."""
    model, x = linear_model(classes=3), grid_pictures(4, 4)
    translator = LinearTranslator(torch.randn(5, 48, generator=seeded(1)), torch.zeros(5))
    texts = normalize(torch.randn(3, 5, generator=seeded(2)), dim=-1)
    decision = model(x)[1].argmax(1)
    targets = [(int(own) + 1) % 3 for own in decision]
    return model, translator, texts, Batch([3, 1, 4, 7], list("abcd"), x, decision.tolist(), targets)


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_unconstrained_ascent_finds_the_closed_form_of_a_linear_model(size: float) -> None:
    """Largest margin within L-infinity ε is at x + ε sign(w_j - w_y), on the 8-bit grid too; in L2 at x + ε w / |w|."""
    model, x = linear_model(), grid_pictures(5, 4)
    labels = model(x)[1].argmin(1)
    weight = model.classifier.weight
    gradient = (weight[1 - labels] - weight[labels]).reshape(x.shape)
    found = ascend(away_from_label(model, labels), x, Budget("linf", size), steps=12, generator=seeded())
    torch.testing.assert_close(255 * found.images, 255 * x + size * gradient.sign(), atol=1e-3, rtol=0)
    radius = 0.1 * size  # no picture meets an edge
    found = ascend(away_from_label(model, labels), x, Budget("l2", radius), steps=25, generator=seeded())
    best = radius * gradient.flatten(1).norm(dim=1)
    assert bool((found.after - found.before > 0.97 * best).all())
    assert bool((Budget("l2", radius).lengths(found.images - x) <= radius * (1 + 1e-6)).all())


def test_constrained_ascent_reaches_what_linear_algebra_allows() -> None:
    """With logits linear in the pixels the ascent can move in 45 free directions; dropping the constraint row space bounds it."""
    model, translator, texts, batch = toy()
    x = batch.pictures
    features, logits = model(x)
    judged = towards_prompt(model, translator, logits, texts[batch.targets], TAU)
    budget = Budget("l2", 0.3)
    found = ascend(judged, x, budget, steps=60, restarts=2, generator=seeded())
    with patch.object(ascent, "MOST_HELD", 0):
        lagrangian = ascend(judged, x, budget, steps=60, restarts=2, generator=seeded())
    # The slow, obvious way: projected gradient steps in the null space of W, exactly in the budget, without any rounding.
    basis = torch.linalg.svd(model.classifier.weight.double()).Vh[3:]
    moved = torch.zeros(4, 48, dtype=torch.float64)
    for _ in range(400):
        free = moved.clone().requires_grad_()
        value = (normalize((features.double() + free) @ translator.matrix.double().T, dim=-1) * texts[batch.targets].double()).sum()
        (gradient,) = torch.autograd.grad(value, free)
        moved = moved + 0.01 * normalize(gradient @ basis.T @ basis, dim=-1)
        moved = moved * (0.3 / moved.norm(dim=1, keepdim=True)).clamp_max(1)
    exact = (normalize((features.double() + moved) @ translator.matrix.double().T, dim=-1) * texts[batch.targets].double()).sum(1)
    gain, most = found.after - found.before, exact - found.before
    assert bool((most > 0).all())
    assert bool((gain > 0.97 * most).all()), (gain, most)
    assert bool((gain < 1.03 * most).all())  # the tolerance itself leaves a little
    by_penalty = lagrangian.after - lagrangian.before
    assert bool((by_penalty > 0.5 * most).all()), (by_penalty, most)


def test_a_tangent_moves_nothing_that_is_held() -> None:
    """On a linear model: along it no logit moves, back takes any logit change away, and pixels at an edge stay."""
    model, _, _, batch = toy()
    x = batch.pictures.clone().requires_grad_()
    logits = model(x)[1]
    tangent = Tangent.of(logits, x)
    direction = torch.randn(x.shape, generator=seeded(5))
    edge = torch.full_like(x, 0.02)
    moved = torch.where(torch.rand(x.shape, generator=seeded(6)) < 0.3, edge, torch.zeros_like(x))
    inside = tangent.within(moved, direction, -edge, edge)
    still = (moved == edge) & (direction > 0)
    assert 3 < int(still.sum()) < still.numel() / 2
    for kept, rows in ((tangent, torch.zeros_like(still)), (inside, still)):
        along = kept.along(direction)
        assert float((model(batch.pictures + along)[1] - logits).detach().abs().max()) < 1e-4
        assert float((model(batch.pictures + direction)[1] - logits).detach().abs().max()) > 0.1  # the control
        held = torch.randn(4, 3, generator=seeded(7))
        back = kept.back(held, x)
        torch.testing.assert_close((model(batch.pictures + back)[1] - logits).detach(), -held, atol=1e-3, rtol=0)
        assert not along[rows].any()
        assert not back[rows].any()


def test_nothing_infeasible_is_ever_kept() -> None:
    model, translator, texts, batch = toy()
    _, logits = model(batch.pictures)
    judged = towards_prompt(model, translator, logits, texts[batch.targets], 1e-7)  # a tolerance that no 8-bit step can keep
    for found in (ascend(judged, batch.pictures, LARGE, steps=8, generator=seeded()), one_step(judged, batch.pictures, LARGE)):
        assert torch.equal(found.images, batch.pictures)
        assert not bool(found.rose.any())


@pytest.mark.parametrize("budget", [Budget("linf", 1), Budget("linf", 2.5), Budget("l2", 0.05), Budget("l2", 0.5), Budget("linf", 0)])
def test_the_grid_never_outgrows_the_budget(budget: Budget) -> None:
    x = grid_pictures(6, 8)
    for seed in range(5):
        picture = random_pictures(x, budget, seeded(seed))
        assert bool(((255 * picture - (255 * picture).round()).abs() < 1e-3).all())
        assert bool((budget.lengths(((255 * (picture - x)).round() / 255)) <= budget.radius * (1 + 1e-6)).all())
    if budget.radius == 0:
        assert torch.equal(picture, x)


def test_pictures_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="8-bit grid"):
        ascend(lambda p: Reading.free(p.sum((1, 2, 3))), torch.full((1, 3, 2, 2), 0.3), SMALL, steps=1, generator=seeded())
    with pytest.raises(ValueError, match="at least 1 step"):
        ascend(lambda p: Reading.free(p.sum((1, 2, 3))), grid_pictures(1, 2), SMALL, steps=0, generator=seeded())


def attacked_toy(folder: Path, settings: AttackSettings = SETTINGS, hold: int = 0) -> tuple[list[JudgedPicture], list[Climbed]]:
    """The toy through the whole chain: attack, PNG, judges; and what its passes found by themselves."""
    model, translator, texts, batch = toy()
    found = attack_batch(model, translator, texts, batch, settings, number=0, hold=hold)
    rows = save_batch(found.pictures, batch, "toy", folder, Path("attacked"))
    readers = {"fitted": translator_reader(model, translator, texts), "auditor": translator_reader(model, translator, texts)}
    return judge_pictures(rows, folder, model, readers, {b.label: b for b in settings.budgets}, tau=TAU), found.climbs


def judged_rows(folder: Path) -> list[JudgedPicture]:
    return attacked_toy(folder)[0]


@cache
def sound_climbs() -> list[Climbed]:
    model, translator, texts, batch = toy()
    return attack_batch(model, translator, texts, batch, SETTINGS, number=0).climbs


def failing(rows: list[JudgedPicture], transfers: list[Transfer] | None = None, climbs: list[Climbed] | None = None) -> str:
    checks = pixel_checks(
        rows, transfers or [], SETTINGS.budgets, TAU,
        climbs={"toy": sound_climbs() if climbs is None else climbs}, hold=SETTINGS.hold, reachable={"toy": {0, 1, 2}},
    )  # fmt: skip
    return "; ".join(check.name for check in checks if not check.passed)


def test_all_sanity_rules_hold_of_the_real_attack(tmp_path: Path) -> None:
    rows, climbs = attacked_toy(tmp_path)
    assert failing(rows, climbs=climbs) == ""
    summary = summarise([row for row in rows if (row.attacked.budget, row.attacked.arm) == (LARGE.label, ATTACK)], [])
    assert summary.rise["fitted"][0] > 1
    assert summary.kept == 1
    assert len(rows) == 4 * (2 * 3 + 2)


def test_an_attack_of_the_wrong_sign_is_caught(tmp_path: Path) -> None:
    right = torch.autograd.grad
    with patch.object(torch.autograd, "grad", lambda *a, **k: tuple(-gradient for gradient in right(*a, **k))):
        rows = judged_rows(tmp_path)
    assert "a random direction is far below the gradient" in failing(rows)
    assert "success goes to 100 %" in failing(rows)


def test_an_attack_without_projection_is_caught(tmp_path: Path) -> None:
    def everywhere(x: Tensor, moved: Tensor, _: Budget) -> Tensor:
        return ((255 * (x + 3 * moved)).round()).clamp(0, 255) / 255

    grids = [patch.object(module, "on_grid", everywhere) for module in (ascent, budgets)]
    with grids[0], grids[1], patch.object(Budget, "project", lambda _, moved: moved):
        rows = judged_rows(tmp_path)
    assert "every displacement is within its budget" in failing(rows)
    assert not any(row.won("fitted") for row in rows if row.linf > 8.5)  # and what is outside is no success


def test_an_attack_that_forgets_the_logits_is_caught(tmp_path: Path) -> None:
    nothing = property(lambda reading: torch.zeros(len(reading.value), 4))
    with patch.object(Reading, "constraints", nothing), patch.object(ascent, "MOST_HELD", 0):
        rows = judged_rows(tmp_path)
    assert "logits stay within the tolerance" in failing(rows)
    assert not any(row.won("fitted") for row in rows if row.logit_change > TAU)


def test_a_rule_fails_where_it_should(tmp_path: Path) -> None:
    """Each of the others, from rows with one thing changed."""
    rows = judged_rows(tmp_path)

    def changed(arm: str, budget: str | None = None, **values: object) -> list[JudgedPicture]:
        return [
            replace(row, **values) if row.attacked.arm == arm and budget in (None, row.attacked.budget) else row  # type: ignore[arg-type]
            for row in rows
        ]

    assert "no budget, no success" in failing(changed("no budget", rise={"fitted": 3.0, "auditor": 0.0}))
    assert "a larger budget reaches" in failing(changed(ATTACK, LARGE.label, rise={"fitted": 0.0, "auditor": 0.0}))
    assert "success goes to 100 %" in failing(changed("no limits", first={"fitted": False, "auditor": True}))
    assert "many steps reach at least" in failing(changed("one step", rise={"fitted": 99.0, "auditor": 0.0}, kept=True))
    assert "the decision stays" in failing(changed(ATTACK, decision=-1))
    carried = [Transfer("other", "toy", budget.label, 5.0, 2.0, 1.0) for budget in SETTINGS.budgets]
    assert "white box reaches at least" in failing(rows, carried)
    assert failing(rows, [replace(t, rise=1.0) for t in carried]) == ""


def test_who_was_fooled_needs_two_encoders_to_be_meaning(tmp_path: Path) -> None:
    row = replace(judged_rows(tmp_path)[0], kept=True)

    def read(encoders: list[str], **first: bool) -> str | None:
        none = dict.fromkeys(first, False)
        return reading_of(replace(row, first=first, first_before=none), encoders)

    assert read(["A", "B"], fitted=True, auditor=False, A=False, B=False) == "fooled the translator"
    assert read(["A", "B"], fitted=True, auditor=True, A=False, B=False) == "fooled the translators"
    assert read(["A", "B"], fitted=True, auditor=True, A=True, B=False) == "fooled the VLM"
    assert read(["A", "B"], fitted=True, auditor=True, A=True, B=True) == "changed meaning"
    assert read(["A"], fitted=True, auditor=True, A=True) == "fooled the VLM"  # one witness is none
    assert read(["A", "B"], fitted=False, auditor=False, A=False, B=False) is None
    lost = replace(row, kept=False, first=dict.fromkeys("AB", True), first_before=dict.fromkeys("AB", False))
    assert reading_of(replace(lost, first={**lost.first, "auditor": True, "fitted": True}), ["A", "B"]) is None


def scenes() -> ImageSplit:
    return load_splits(DataConfig(scenes_train=12, scenes_audit=6, scenes_test=20)).test


def demo_pixels(count: int) -> tuple[PixelModel, LinearTranslator, Tensor, Batch]:
    """The packaged classifier on scenes, a translator drawn at random (what it says does not matter here)."""
    model = PixelModel.of(demo_classifier().eval())
    test = scenes()
    width = model.classifier.feature_dim
    translator = LinearTranslator(torch.randn(16, width, generator=seeded(3)) / width**0.5, torch.zeros(16))
    texts = normalize(torch.randn(10, 16, generator=seeded(4)), dim=-1)
    x = torch.stack([model.picture(test, index) for index in range(count)])
    labels = test.labels[:count].tolist()
    return model, translator, texts, Batch(range(count), [str(i) for i in range(count)], x, labels, [(y + 1) % 10 for y in labels])


def test_a_saved_picture_read_by_plain_timm_keeps_its_logits(tmp_path: Path) -> None:
    """Only timm, PIL and torchvision's to-tensor and normalise: what anyone would write."""
    model, translator, texts, batch = demo_pixels(3)
    settings = replace(SETTINGS, budgets=[SMALL], tau=DEMO_TAU, steps=8)
    found = attack_batch(model, translator, texts, batch, settings, number=1)
    rows = [row for row in save_batch(found.pictures, batch, "demo", tmp_path, Path("a")) if row.arm == ATTACK]
    plain = timm.create_model(f"local-dir:{ASSETS / 'demo_classifier'}", pretrained=True).eval()
    mean, std = (torch.tensor(plain.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))

    def logits(name: str) -> Tensor:
        with Image.open(tmp_path / name) as picture, torch.no_grad():
            out: Tensor = plain((to_tensor(picture)[None] - mean) / std)
        return out[0]

    moved = 0.0
    for row in rows:
        before, after = logits(row.original), logits(row.file)
        assert float((after - before).abs().max()) <= DEMO_TAU
        assert before.argmax() == after.argmax()
        moved += float((load_pictures([tmp_path / row.file]) - load_pictures([tmp_path / row.original])).abs().max())
    assert moved > 0
    with torch.no_grad():  # and the classifier's own transform gives that very picture
        whole = model.classifier(model.classifier.transform(scenes().image(0))[None])
    torch.testing.assert_close(whole[0], logits(rows[0].original), atol=2e-3, rtol=1e-3)


def test_a_batch_made_again_is_the_same() -> None:
    model, translator, texts, batch = toy()
    one, two = (attack_batch(model, translator, texts, batch, SETTINGS, number=2, hold=2) for _ in range(2))
    assert one.climbs == two.climbs
    first, again = one.pictures, two.pictures
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = attack_batch(model, translator, texts, batch, replace(SETTINGS, seed=1), number=2).pictures
    assert not torch.equal(other[SMALL.label, "random"], first[SMALL.label, "random"])


def test_dropping_the_null_space_changes_nothing_in_pixels(tmp_path: Path) -> None:
    model, translator, texts, batch = demo_pixels(3)
    dropped = PixelModel.of(drop_null(model.classifier))
    for before, after in zip(model(batch.pictures), dropped(batch.pictures), strict=True):
        torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    summaries = []
    for name, current in (("own", model), ("dropped", dropped)):
        found = attack_batch(current, translator, texts, batch, replace(SETTINGS, tau=DEMO_TAU, steps=6), number=1)
        rows = save_batch(found.pictures, batch, name, tmp_path, Path(name))
        readers = {"fitted": translator_reader(current, translator, texts)}
        judged = judge_pictures(rows, tmp_path, current, readers, {b.label: b for b in SETTINGS.budgets}, tau=DEMO_TAU)
        summaries.append(summarise([r for r in judged if (r.attacked.budget, r.attacked.arm) == (SMALL.label, ATTACK)], []))
    assert unchanged_without_null("dropped", *summaries).passed
    assert summaries[0].rise["fitted"][0] == pytest.approx(summaries[1].rise["fitted"][0], abs=0.3)
    moved = replace(summaries[1], rise={"fitted": [summaries[0].rise["fitted"][2] + 1, 0.0, 99.0]})
    assert not unchanged_without_null("dropped", summaries[0], moved).passed


def test_ordinary_robustness_falls_with_the_budget_and_matches_the_closed_form() -> None:
    model, x = linear_model(), grid_pictures(40, 4)
    logits = model(x)[1]
    labels = logits.argmax(1)
    weight = model.classifier.weight
    slope = (weight[1 - labels] - weight[labels]).abs().sum(1) / 255  # of the margin, by 255ths
    margin = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
    found = still_right(model, x, labels, [1, 2, 4, 16], steps=12, restarts=1, seed=0)
    assert bool(found["clean"].all())
    for size in (1, 2, 4, 16):
        assert torch.equal(found[f"{size}"], margin > size * slope), size
    shares = [float(found[name].double().mean()) for name in ("clean", "1", "2", "4", "16")]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.9


def test_corrupted_pictures_are_judged_one_by_one() -> None:
    model = PixelModel.of(demo_classifier().eval())
    test = scenes()
    labels = torch.from_numpy(test.labels)
    found = corrupted_right(model, test, labels, severity=1, batch_size=7)
    assert list(found) == ["blur", "noise", "contrast"]
    for kind, kept in found.items():
        part = CorruptedSplit(test, kind, 1)
        images = torch.stack([model.classifier.transform(part.image(index)) for index in range(20)])
        with torch.no_grad():
            assert torch.equal(model.classifier(images).argmax(1) == labels, kept), kind
    assert 0 < sum(float(kept.double().sum()) for kept in found.values()) < 60


def test_a_classifier_that_does_not_say_how_it_normalises() -> None:
    with pytest.raises(ValueError, match="does not say how it normalises"):
        PixelModel.of(Classifier.from_module(Linear(4, 2)))


def test_pictures_survive_the_file(tmp_path: Path) -> None:
    x = grid_pictures(2, 5, low=0, high=256)
    for place, picture in enumerate(x):
        save_picture(picture, tmp_path / f"{place}.png")
    assert torch.equal(load_pictures([tmp_path / "0.png", tmp_path / "1.png"]), x)


def test_rows_go_to_json_and_encoders_read_files(tmp_path: Path) -> None:
    rows = judged_rows(tmp_path)
    assert json.loads(json.dumps(asdict(rows[0]), allow_nan=False))["attacked"]["model"] == "toy"
    reader: Reader = encoder_reader(demo_vlm(), torch.eye(64)[:3])
    paths = [tmp_path / row.attacked.file for row in rows[:2]]
    assert reader.read(paths).shape == (2, 64)
    assert np.isfinite(reader.read(paths).numpy()).all()
