"""The worst pictures and what moved in them, against slow loops, whatever the batches; bad input. (Processes: test_concepts.)"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from singreg.analysis.levels.image_results import ImageMeasurement
from tests.analysis.levels.level_data import World
from tests.reference import formulas


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("by", ["AS", "IS"])
def test_the_worst_pictures_and_their_concepts_are_those_of_the_slow_loops(by: str, centred: bool) -> None:
    world = World.make()
    found = world.worst(by=by, centred=centred, count=6, moved=3)
    pairs = formulas.translations(
        world.features, world.weight, world.translator.matrix, world.translator.offset, world.mean if centred else None
    )
    before, after = formulas.concept_angles(pairs, world.concept_texts)
    own = [world.texts[label] for label in world.labels]
    attribute = np.array([formulas.degrees(z, t) - formulas.degrees(z_eq, t) for (z, z_eq), t in zip(pairs, own, strict=True)])
    image = np.array([formulas.degrees(z, z_eq) for z, z_eq in pairs])
    badness = np.where(world.labels.numpy() < 0, np.inf, attribute if by == "AS" else -image)
    assert [worst.index for worst in found.worst] == np.argsort(badness)[:6].tolist()
    assert (found.images, found.unlabelled, found.by, found.centred) == (30, 1, by, centred)
    for place, worst in enumerate(found.worst):
        index = worst.index
        assert worst.attribute_score == pytest.approx(attribute[index], abs=1e-4)
        assert worst.image_score == pytest.approx(image[index], abs=1e-4)
        assert (worst.image, worst.class_name) == (f"picture-{index}", f"class {world.labels[index]}")
        assert worst.predicted == f"class {int((world.weight @ world.features[index]).argmax())}"
        score = (before - after)[index]
        order = torch.argsort(score).tolist()
        expected = [f"concept {k}" for k in order if score[k] < 0][:3], [f"concept {k}" for k in order[::-1] if score[k] > 0][:3]
        assert ([shift.concept for shift in worst.falls], [shift.concept for shift in worst.rises]) == expected
        for shift in (*worst.falls, *worst.rises):
            k = int(shift.concept.split()[1])
            assert (shift.before, shift.after) == pytest.approx((float(before[index, k]), float(after[index, k])), abs=1e-4)
            assert shift.score == pytest.approx(shift.before - shift.after)
        assert np.array_equal(found.features[place], world.features[index].numpy())


def test_neither_batches_nor_their_order_decide_who_is_worst() -> None:
    world = World.make()
    first = world.worst(count=5)
    assert [w.index for w in world.worst(count=5, size=31).worst] == [w.index for w in first.worst]
    backwards = np.arange(31)[::-1].copy()
    assert [w.index for w in world.worst(count=5, share=backwards).worst] == [w.index for w in first.worst]


def test_equal_pictures_go_by_their_number() -> None:
    world = World.make(12, unlabelled=False)
    world.features[:] = world.features[0]
    world.labels[:] = 0
    assert [worst.index for worst in world.worst(count=4, share=np.arange(12)[::-1].copy()).worst] == [0, 1, 2, 3]


def test_fewer_pictures_than_asked_for_are_all_returned() -> None:
    found = World.make(4).worst(count=10)
    assert len(found.worst) == found.images == 4
    assert World.make(4).worst(count=10, moved=0).worst[0].rises == ()


def test_a_way_through_json_changes_nothing_but_the_features() -> None:
    found = World.make().worst(count=3)
    back = ImageMeasurement.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert back == found
    assert back.features is None


@pytest.mark.parametrize(
    ("options", "words"),
    [({"by": "leak"}, "by must be"), ({"count": 0}, "count must be at least 1"), ({"moved": -1}, "moved at least 0")],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        World.make().worst(**options)


def test_texts_that_do_not_fit_and_parts_without_labels_are_refused() -> None:
    world = World.make()
    world.texts, world.concept_texts = world.texts[:, :6], world.concept_texts[:, :5]
    with pytest.raises(ValueError, match=r"expected texts \(4, 7\), got \(4, 6\); expected concept_texts \(9, 7\), got \(9, 5\)"):
        world.worst()
    nobody = World.make()
    nobody.labels[:] = -1
    with pytest.raises(ValueError, match=r"no labelled picture \(31 without a label\)"):
        nobody.worst()
