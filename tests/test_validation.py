"""Validation images: how many, whose they were, the curves read on them, and where there are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from singreg.data.splits import Splits
from singreg.loop import hold_out, validation_images
from singreg.setup import Setup
from tests import toy
from tests.small_arm import Arm


@pytest.mark.parametrize(("counts", "each"), [([20, 31, 40], 2), ([19, 50], 1), ([2, 50], 1), ([1, 50], 0), ([], 0)])
def test_a_tenth_of_the_smallest_class_is_taken_of_every_class(counts: list[int], each: int) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)] + [-1] * 7
    split = toy.ToySplit(len(labels))
    split.labels = np.array(labels)
    chosen = validation_images(split)
    assert np.bincount(split.labels[chosen], minlength=len(counts)).tolist() == [each] * len(counts)
    assert chosen.sum() == each * len(counts), "no unlabelled one"


def test_validation_images_are_taken_from_the_auditors(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", toy.embeddings(43))
    split, table = toy.ToySplit(43), np.load(tmp_path / "table.npy", mmap_mode="r")
    splits = Splits(split, split, split, split, split.class_names, None)
    nothing: Any = None
    setup = Setup(splits, nothing, nothing, nothing, {"audit": table}, nothing)
    for per_class, count in ((2, 10), (None, 5)):
        left = hold_out(setup, per_class)
        held, embeddings = left.held
        assert (len(held), len(left.splits.audit)) == (count, 43 - count)
        names = [each.identifier(i) for each in (held, left.splits.audit) for i in range(len(each))]
        assert len(set(names)) == 43
        for each, rows in ((held, embeddings), (left.splits.audit, left.embeddings["audit"])):
            wanted = [int(each.identifier(i).removeprefix("toy-")) for i in range(len(each))]
            np.testing.assert_array_equal(rows, toy.embeddings(43)[wanted])
    assert hold_out(setup, 0) is setup
    with pytest.raises(ValueError, match="no more than the 9 images"):
        hold_out(setup, 9)


def test_without_validation_images_there_are_no_curves(tmp_path: Path) -> None:
    arm = Arm(tmp_path / "none")
    arm.run()
    assert not [name for figures in arm.logged.values() for name in figures if name.startswith(("val/", "watch/"))]
