"""Validation pictures, agreement of auditors, the dropped null space: the same numbers from the rows that are needed alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from singreg.analysis.features import PassSettings
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.training import study_validation
from singreg.training.config import FinetuneConfig
from singreg.training.experiment import Experiment
from singreg.training.study import Study
from singreg.training.study_validation import VALIDATION, agreement_points, hold_out
from singreg.translator import TranslatorInfo
from singreg.workbench.run import make_accelerator
from tests.processes import run_processes
from tests.training.small_arm import CLASSES, COUNT, DIM, Pixels, small_classifier

TRAIN = 10


def as_float(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def network() -> Classifier:
    classifier = small_classifier().float().eval()
    classifier._transform = as_float
    return classifier


def experiment(folder: Path) -> Experiment:
    AcceleratorState._reset_state(True)
    pictures = Pixels()
    table = np.random.default_rng(5).standard_normal((COUNT, DIM)).astype(np.float32)
    np.save(folder / "table.npy", table)
    stored = np.load(folder / "table.npy", mmap_mode="r")
    parts: Any = SimpleNamespace(
        train=pictures.subset(range(TRAIN), "train"), bank=pictures.subset(range(COUNT), "bank"),
        audit=pictures.subset(range(COUNT), "audit"), test=pictures.subset(range(COUNT), "test"),
    )  # fmt: skip
    texts = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(4)), dim=1)
    return Experiment(
        FinetuneConfig(cache=str(folder / "cache")), make_accelerator(seed=0), parts, network(), texts,
        {"audit": stored, "bank": stored, "test": stored}, TranslatorInfo(), PassSettings(4, 0, progress=False),
    )  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Experiment:
    found = experiment(tmp_path)
    AcceleratorState._reset_state(True)
    return found


def test_the_audit_parts_rows_are_split_and_stay_on_disk(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_validation, "ROWS_AT_ONCE", 7)  # 43 - 6 = 37 rows: five times 7, and 2
    replaced = Experiment(**{**vars(made), "parts": _Parts(made)})
    held = hold_out(replaced, 2)
    assert held.validation is not None
    assert [len(held.parts.audit), len(held.validation)] == [COUNT - 2 * CLASSES, 2 * CLASSES]
    names = {held.validation.identifier(i) for i in range(6)} | {held.parts.audit.identifier(i) for i in range(COUNT - 6)}
    assert len(names) == COUNT
    whole = made.embeddings["audit"]
    for part, rows in ((held.parts.audit, held.embeddings["audit"]), (held.validation, held.embeddings[VALIDATION])):
        wanted = [int(part.identifier(i).removeprefix("pixels-")) for i in range(len(part))]
        np.testing.assert_array_equal(rows, whole[wanted])
    kept = held.embeddings["audit"]
    assert isinstance(kept, np.memmap)
    assert not kept.flags.writeable
    assert list(Path(made.config.cache).iterdir()) == [], "the file has no name, so nothing is left behind"


def _Parts(made: Experiment) -> Any:
    """`dataclasses.replace` wants a dataclass, and the real one wants class indices."""
    from singreg.data.datasets import Splits

    found = object.__new__(Splits)
    for name in Splits.__dataclass_fields__:
        object.__setattr__(found, name, getattr(made.parts, name, ()))
    return found


def test_agreement_reads_the_pictures_it_needs_and_none_that_trained(
    made: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[np.ndarray] = []
    original = study_validation.take_rows

    def noted(table: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        read.append(rows)
        return original(table, rows)

    monkeypatch.setattr(study_validation, "take_rows", noted)
    bank = np.array(made.embeddings["bank"])
    bank[:TRAIN] = np.nan
    made.embeddings["bank"] = bank
    points = agreement_points(made, [5, 10, 1000], 1.0, str(tmp_path / "features"))
    assert [point.images for point in points] == [5, 10]
    assert all(np.isfinite([point.agreement, *point.cosine, *point.AS_neg]).all() for point in points)
    pictures, embeddings, held = read[:2], read[2:4], read[4:]
    assert sum(map(len, pictures)) == sum(map(len, embeddings)) == 2 * 10
    assert all(len(rows) and len(set(rows.tolist())) == len(rows) for rows in pictures)
    assert min(pictures[1]) >= TRAIN
    assert [len(rows) for rows in held] == [COUNT, COUNT]
    again = agreement_points(made, [5, 10], 1.0, str(tmp_path / "features"))
    assert again == points
    assert agreement_points(made, [1000], 1.0, str(tmp_path / "features")) == []


def _dropped(rank: int, world: int, folder: str) -> dict[str, float]:
    place = Path(folder) / str(rank)
    place.mkdir(parents=True, exist_ok=True)
    made = experiment(place)
    study = cast(Study, SimpleNamespace(experiment=made))
    found = Study._dropped(study, made.classifier, made.settings)
    AcceleratorState._reset_state(True)
    return found


def test_dropping_the_null_space_is_measured_batch_by_batch_and_over_processes(tmp_path: Path) -> None:
    part: ImageSplit = Pixels()
    classifier, pictures = network(), torch.stack([as_float(part.image(i)) for i in range(COUNT)])
    with torch.no_grad():
        before, after = classifier(pictures), drop_null(classifier).eval()(pictures)
    found = _dropped(0, 1, str(tmp_path / "one"))
    assert found["top1"] == pytest.approx(float((after.argmax(1).numpy() == part.labels).mean()))
    assert found["logit_change"] == pytest.approx(float((after - before).abs().max()), abs=1e-6)
    for other in run_processes(2, _dropped, str(tmp_path / "two")):
        assert other["top1"] == found["top1"]
        assert other["logit_change"] == pytest.approx(found["logit_change"], abs=1e-6)
