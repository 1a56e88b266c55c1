"""Judging from files, checks with a broken attack that each must catch, natural twins, ordinary robustness."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

from singreg.analysis import attack
from singreg.analysis import attack_images as images
from singreg.analysis import attack_judges as judges
from singreg.analysis import attack_summary as summary
from singreg.analysis.attack import LAGRANGIAN, TANGENT, Budget, Reading
from singreg.config import DataConfig
from singreg.data.corruption import CorruptedSplit
from singreg.data.datasets import ImageSplit, load_splits
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.translator import LinearTranslator
from tests import attack_toy as toy
from tests.demo import ASSETS, demo_classifier

FILES, BUDGET = "logits within the tolerance", "every displacement within its budget"
STEP, GROWS = "the attack reaches what its single step does", "a larger budget reaches"


def failing(rows: pd.DataFrame, climbs: pd.DataFrame | None = None) -> str:
    checks = summary.attack_checks(
        rows, toy.sound_climbs() if climbs is None else climbs, toy.SETTINGS.budgets, toy.TAU
    )
    return "; ".join(check["name"] for check in checks if not check["passed"])


def test_all_checks_hold_of_the_real_attack(tmp_path: Path) -> None:
    rows, climbs = toy.judged(tmp_path)
    assert failing(rows, climbs) == ""
    assert len(rows) == 4 * 2 * 3
    found = next(
        s for s in summary.summarize_attack(rows, []) if (s["budget"], s["arm"]) == (toy.LARGE.label, images.ATTACK)
    )
    assert found["rise"]["fitted"][0] > 1
    assert found["kept"] == 1
    assert [c["images"] for c in summary.summarize_climbs(climbs)] == [4] * 4


def dead(*_: Any, **__: Any) -> None:
    """A pass that does nothing."""


def downhill(one_pass: Callable[..., None]) -> Callable[..., None]:
    """The same pass with the sign of every gradient turned round, those of the tangent too."""
    right = torch.autograd.grad

    def turned(*args: Any, **kwargs: Any) -> None:
        with patch.object(torch.autograd, "grad", lambda *a, **k: tuple(-gradient for gradient in right(*a, **k))):
            one_pass(*args, **kwargs)

    return turned


def uphill_nowhere(one_pass: Callable[..., None]) -> Callable[..., None]:
    """The same pass with steps of no length: it looks at its start again and again."""
    return lambda *args, **kwargs: one_pass(*args, **{**kwargs, "size": 0.0})


@pytest.mark.parametrize("fault", [lambda _: dead, downhill, uphill_nowhere], ids=["dead", "wrong sign", "no length"])
@pytest.mark.parametrize(("name", "kind"), [("tangent_pass", TANGENT), ("lagrangian_pass", LAGRANGIAN)])
def test_a_broken_pass_is_caught(tmp_path: Path, name: str, kind: str, fault: Callable[..., Any]) -> None:
    """Only this kind of pass is broken: the single step is sound, and what the attack keeps hides it."""
    with patch.object(attack, name, fault(getattr(attack, name))):
        rows, climbs = toy.judged(tmp_path)
    assert f"{kind} climb by themselves" in failing(rows, climbs)
    assert failing(rows) == ""  # the other rules see nothing of it
    if kind == TANGENT and fault is not uphill_nowhere:
        assert f"{kind} alone reach the single step" in failing(rows, climbs)


def test_a_broken_pass_is_caught_where_the_lagrangian_stands_alone(tmp_path: Path) -> None:
    with patch.object(attack, "MOST_HELD", 0):
        rows, climbs = toy.judged(tmp_path)
        assert {*climbs["kind"]} == {LAGRANGIAN}
        assert "climb by themselves" not in failing(rows, climbs)
        with patch.object(attack, "lagrangian_pass", dead):
            rows, climbs = toy.judged(tmp_path / "dead")
        assert f"{LAGRANGIAN} climb by themselves" in failing(rows, climbs)
    assert "climb by themselves" in failing(rows, climbs.iloc[:0])  # nothing measured is no pass


def test_an_attack_of_the_wrong_sign_is_caught(tmp_path: Path) -> None:
    right = torch.autograd.grad
    with patch.object(torch.autograd, "grad", lambda *a, **k: tuple(-gradient for gradient in right(*a, **k))):
        rows, climbs = toy.judged(tmp_path)
    assert f"{TANGENT} climb by themselves" in failing(rows, climbs)
    assert f"{LAGRANGIAN} climb by themselves" in failing(rows, climbs)


def test_an_attack_without_projection_is_caught(tmp_path: Path) -> None:
    def everywhere(x: Tensor, moved: Tensor, _: Budget) -> Tensor:
        return (255 * (x + 3 * moved)).round().clamp(0, 255) / 255

    with patch.object(attack, "on_grid", everywhere), patch.object(Budget, "project", lambda _, moved: moved):
        rows, _ = toy.judged(tmp_path)
    assert BUDGET in failing(rows)
    assert not judges.won(rows[rows["linf"] > 8.5], "fitted").any()  # what is outside is no success


def test_an_attack_that_forgets_the_logits_is_caught(tmp_path: Path) -> None:
    nothing = property(lambda reading: torch.zeros(len(reading.value), 4))
    with patch.object(Reading, "constraints", nothing), patch.object(attack, "MOST_HELD", 0):
        rows, _ = toy.judged(tmp_path)
    assert FILES in failing(rows)
    assert not judges.won(rows[rows["logit_change"] > toy.TAU], "fitted").any()


def test_a_check_fails_where_it_should(tmp_path: Path) -> None:
    rows, climbs = toy.judged(tmp_path)

    def changed(arm: str, name: str, value: object, budget: str = toy.LARGE.label) -> pd.DataFrame:
        copy = rows.copy()
        copy.loc[(copy["arm"] == arm) & (copy["budget"] == budget), name] = value
        return copy

    assert GROWS in failing(changed(images.ATTACK, "rise fitted", 0.0))
    assert STEP in failing(changed(images.ONE_STEP, "rise fitted", 99.0))
    assert FILES in failing(changed(images.ATTACK, "decision", -1))
    assert BUDGET in failing(changed("random", "linf", 9.0))
    tangent = climbs["kind"] == TANGENT
    gains = climbs.assign(one_step=1.0, began=2.0, alone=3.0)
    assert failing(rows, gains) == ""
    one = tangent & (climbs["budget"] == toy.SMALL.label)
    assert failing(rows, gains.assign(alone=gains["alone"].mask(one, 1.5))) == ""  # beyond at one budget is enough
    assert "alone reach the single step" in failing(rows, gains.assign(alone=gains["alone"].mask(one, 0.5)))
    assert f"{TANGENT} climb" in failing(rows, gains.assign(alone=gains["alone"].mask(tangent, 1.5)))


def test_meaning_has_changed_only_where_two_encoders_say_so(tmp_path: Path) -> None:
    rows, _ = toy.judged(tmp_path)

    def read(encoders: list[str], *seen: str, kept: bool = True) -> str:
        names = ("fitted", "auditor", *encoders)
        first = {f"first {name}": name in seen for name in names} | {f"first_before {name}": False for name in names}
        row = rows.iloc[:1].assign(kept=kept, **first, **{f"rise {name}": 0.0 for name in names})
        return str(judges.readings_of(row, encoders).iloc[0])

    assert read(["A", "B"], "fitted") == "fooled the translator"
    assert read(["A", "B"], "fitted", "auditor") == "fooled the translators"
    assert read(["A", "B"], "fitted", "auditor", "A") == "fooled the VLM"
    assert read(["A", "B"], "fitted", "auditor", "A", "B") == "changed meaning"
    assert read(["A"], "fitted", "auditor", "A") == "fooled the VLM"  # one witness is none
    assert read(["A", "B"]) == ""
    assert read(["A", "B"], "fitted", "auditor", "A", "B", kept=False) == ""


def test_differences_and_transfers_count_what_was_kept(tmp_path: Path) -> None:
    rows, _ = toy.judged(tmp_path)
    attacks = rows["arm"] == images.ATTACK
    other = rows.assign(model="other", **{"rise fitted": rows["rise fitted"] + 2})
    differences = summary.model_differences(pd.concat([rows, other.sample(frac=1, random_state=0)]))
    assert {(d["first"], d["second"]) for d in differences} == {("toy", "other")}
    rises = [d["value"] for d in differences if (d["figure"], d["judge"]) == ("rise", "fitted")]
    assert rises == pytest.approx([2, 2])
    lost = other.assign(kept=False)
    (small, _) = summary.transfers_of(rows, lost, "other")
    own = rows.loc[attacks & (rows["budget"] == toy.SMALL.label), "rise fitted"].mean()
    assert (small["rise"], small["kept"], small["own"]) == (0.0, 0.0, pytest.approx(own))


def scenes() -> ImageSplit:
    return load_splits(DataConfig(scenes={"train": 12, "audit": 6, "test": 20})).test


def demo_attack(model: images.PixelModel, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three scenes attacked on a packaged classifier, by a translator drawn at random: rows and judged rows."""
    split, width = scenes(), 256
    translator = LinearTranslator(torch.randn(16, width, generator=toy.seeded(3)) / width**0.5, torch.zeros(16))
    texts = normalize(torch.randn(10, 16, generator=toy.seeded(4)), dim=-1)
    chosen, _ = images.choose_images(split, 3, range(10), seed=0)
    x = torch.stack([model.image(split, index) for index in chosen["image"]])
    settings = images.AttackSettings([toy.SMALL], tau=0.5, steps=8)
    found, _ = images.attack_images(model, translator, x, texts[chosen["target"].tolist()], settings, number=1)
    rows = images.save_batch(found, x, chosen, folder, Path("a")).assign(model="demo")
    readers = dict.fromkeys(("fitted", "auditor"), judges.translator_judge(model, translator, texts))
    return rows[rows["arm"] == images.ATTACK], judges.judge_images(
        rows, folder, model, readers, settings.budgets, tau=0.5
    )


def test_plain_timm_reads_the_saved_logits_and_dropping_the_null_space_changes_nothing(tmp_path: Path) -> None:
    """Only timm, PIL and torchvision's to-tensor and normalise: what anyone would write."""
    model = images.PixelModel.of(demo_classifier().eval())
    rows, judged = demo_attack(model, tmp_path / "own")
    plain = timm.create_model(f"local-dir:{ASSETS / 'demo_classifier'}", pretrained=True).eval()
    mean, std = (torch.tensor(plain.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))

    def logits(name: str) -> Tensor:
        with Image.open(tmp_path / "own" / name) as image, torch.no_grad():
            out: Tensor = plain((to_tensor(image)[None] - mean) / std)
        return out[0]

    for original, file in zip(rows["original"], rows["file"], strict=True):
        before, after = logits(original), logits(file)
        assert 0 < float((after - before).abs().max()) <= 0.5
        assert before.argmax() == after.argmax()
    first = scenes().image(int(rows["image"].iloc[0]))
    with torch.no_grad():  # and the classifier's own transform gives that very image
        whole = model.classifier(model.classifier.transform(first)[None])
    torch.testing.assert_close(whole[0], logits(rows["original"].iloc[0]), atol=2e-3, rtol=1e-3)

    dropped = images.PixelModel.of(drop_null(model.classifier).eval())
    x = images.load_images([tmp_path / "own" / name for name in rows["original"]])
    for one, other in zip(model(x), dropped(x), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    _, without = demo_attack(dropped, tmp_path / "dropped")
    means = [frame.loc[frame["arm"] == images.ATTACK, "rise fitted"].mean() for frame in (judged, without)]
    assert means[0] == pytest.approx(means[1], abs=0.3)


def test_ordinary_robustness_matches_the_closed_form() -> None:
    model, x = toy.linear_model(), toy.grid_images(40, 4)
    logits = model(x)[1]
    labels = logits.argmax(1)
    weight = model.classifier.weight
    slope = (weight[1 - labels] - weight[labels]).abs().sum(1) / 255  # of the margin, by 255ths
    margin = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
    found = judges.still_right(model, x, labels, [1, 2, 4, 16], steps=12, seed=0)
    assert bool(found["clean"].all())
    for size in (1, 2, 4, 16):
        assert torch.equal(found[f"{size}"], margin > size * slope), size
    assert float(found["16"].double().mean()) < 0.9


def test_corrupted_images_are_judged_one_by_one() -> None:
    model, split = images.PixelModel.of(demo_classifier().eval()), scenes()
    labels = torch.from_numpy(split.labels)
    found = judges.corrupted_right(model, split, labels, batch_size=7)
    assert list(found) == ["blur", "noise", "contrast"]
    for kind, kept in found.items():
        corrupted = CorruptedSplit(split, kind, 3)
        seen = torch.stack([model.classifier.transform(corrupted.image(index)) for index in range(20)])
        with torch.no_grad():
            assert torch.equal(model.classifier(seen).argmax(1) == labels, kept), kind
    assert 0 < sum(int(kept.sum()) for kept in found.values()) < 60


def test_images_survive_the_file_and_plain_modules_are_refused(tmp_path: Path) -> None:
    x, path = toy.grid_images(1, 5, low=0, high=256), tmp_path / "0.png"
    images.save_image(x[0], path)
    assert torch.equal(images.load_images([path]), x)
    with pytest.raises(ValueError, match="does not say how it normalises"):
        images.PixelModel.of(Classifier.from_module(toy.Linear(4, 2)))


class Noise(ImageSplit):
    """Random images, the first `flat` of one colour."""

    def __init__(self, labels: np.ndarray, flat: int) -> None:
        super().__init__("test", ("a", "b", "c"), labels, np.zeros((len(labels), 32), np.uint8))
        self.flat = flat

    def image(self, index: int) -> Image.Image:
        if index < self.flat:
            return Image.new("RGB", (4, 4), "red")
        return Image.fromarray(np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8))

    def identifier(self, index: int) -> str:
        return str(index)


def test_images_are_chosen_evenly_and_those_of_one_colour_left_out() -> None:
    split = Noise(np.array([0] * 30 + [1] * 5 + [2] * 5 + [-1] * 5), flat=1)
    (chosen, left_out), (again, _) = (images.choose_images(split, 39, range(3), seed=3) for _ in range(2))
    assert np.bincount(chosen["label"]).tolist() == [29, 5, 5]
    assert np.bincount(images.choose_images(split, 9, range(3), seed=3)[0]["label"]).tolist() == [3, 3, 3]
    assert left_out == ["0"]
    assert chosen.equals(again)
    assert (chosen["target"] != chosen["label"]).all()
    assert {*images.choose_images(split, 40, [1, 2], seed=3)[0]["target"]} == {1, 2}
    with pytest.raises(ValueError, match="b is the only target of its own images"):
        images.choose_images(split, 40, [1], seed=3)
    with pytest.raises(ValueError, match="2 of one colour"):
        images.choose_images(Noise(np.array([0, 1]), flat=2), 4, range(3), seed=0)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 128, 0.0, 0.02914), (128, 128, 0.97086, 1.0), (5, 10, 0.23659, 0.76341)]
)
def test_shares_have_wilson_intervals(count: int, total: int, low: float, high: float) -> None:
    assert judges.share_interval(count, total) == pytest.approx([count / total, low, high], abs=1e-4)
    with pytest.raises(ValueError, match="at least 1 image"):
        judges.share_interval(1, 0)


def test_twins_are_those_of_a_loop_over_all_pairs() -> None:
    g = toy.seeded()
    labels = torch.arange(30) % 3
    logits, z = torch.randn(30, 4, generator=g) + 2 * torch.eye(3, 4)[labels], torch.randn(30, 5, generator=g)
    found = judges.natural_twins(logits, z, labels, shown=100)

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
    assert found["touched"] == pytest.approx(len({i for p in wanted for i in p}) / 30, abs=0.07)
    assert {(t["first"], t["second"]) for t in found["shown"]} <= wanted
    used = [i for t in found["shown"] for i in (t["first"], t["second"])]
    assert len(used) == len(set(used))
    ranks = [t["logit_distance"] for t in found["shown"]]
    assert ranks == sorted(ranks)
    assert ranks[0] == pytest.approx(min(distance[p] for p in wanted), abs=1e-5)


def test_only_a_classifier_that_cannot_tell_classes_apart_has_twins() -> None:
    g = toy.seeded(1)
    labels = torch.arange(40) % 4
    z, noise = torch.randn(40, 6, generator=g), torch.randn(40, 4, generator=g)
    apart, blind = (
        judges.natural_twins(noise + 100 * torch.eye(4)[labels], z, labels),
        judges.natural_twins(noise, z, labels),
    )
    assert (apart["rate"], apart["shown"]) == (0.0, [])
    assert apart["rate_interval"][1] > 0.1  # forty images exclude little
    assert blind["rate"] > 0.15
    assert blind["rate_interval"][0] <= blind["rate"] <= blind["rate_interval"][1]
    assert judges.natural_twins(1000 * noise, z, labels)["rate"] == pytest.approx(
        blind["rate"]
    )  # the limit grows with logits
    for few, message in ((torch.zeros(4), "at least two classes"), (torch.arange(4), "two images of one")):
        assert message in str(judges.twins_problem(few))
    with pytest.raises(ValueError, match="equally many rows"):
        judges.natural_twins(noise, z[:3], labels)
