"""What a study does before and beside its test pictures: a validation part to choose an arm on, and how many pictures an auditor needs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from singreg.analysis.features import PassSettings, cached_features
from singreg.analysis.model import analyze_model
from singreg.analysis.study.auditors import AgreementPoint, Auditor, auditor_agreement_curve
from singreg.data.datasets import ImageSplit
from singreg.data.embeddings import take_rows
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.training.experiment import Experiment

VALIDATION = "validation"
ROWS_AT_ONCE = 4096


def hold_out(experiment: Experiment, per_class: int) -> Experiment:
    """The experiment with a part "validation" of `per_class` labelled audit pictures of every class; the auditor loses them.

    The first of each class in the part's own order, which is a seeded draw; with 0 nothing changes. Embeddings (N, n) go along.

    Raises:
        ValueError: a class has too few labelled audit pictures to leave the auditor one.
    """
    if not per_class:
        return experiment
    audit, embeddings = experiment.parts.audit, experiment.embeddings["audit"]
    chosen = []
    for label, name in enumerate(audit.class_names):
        rows = np.flatnonzero(audit.labels == label)
        if len(rows) <= per_class:
            raise ValueError(
                f"validation_per_class is {per_class}, but the audit part has {len(rows)} labelled pictures of {name!r} and must keep "
                "one; lower it, or give the audit part more (data.audit_per_class, data.scenes_audit)"
            )
        chosen.append(rows[:per_class])
    taken = np.sort(np.concatenate(chosen))
    kept = np.setdiff1d(np.arange(len(audit)), taken)
    parts = replace(experiment.parts, audit=audit.subset(kept, "audit"))
    held = {"audit": _rows_on_disk(embeddings, kept, Path(experiment.config.cache).expanduser()), VALIDATION: np.asarray(embeddings[taken])}
    validation = audit.subset(taken, VALIDATION)
    return replace(experiment, parts=parts, embeddings={**experiment.embeddings, **held}, validation=validation)


def _rows_on_disk(table: np.ndarray, rows: np.ndarray, folder: Path) -> np.ndarray:
    """Rows (M,) of a memory-mapped table (N, n) as one (M, n), in a file of the folder that has no name and goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        found: np.ndarray = np.memmap(file, dtype=table.dtype, mode="w+", shape=(len(rows), table.shape[1]))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        found[start : start + ROWS_AT_ONCE] = table[rows[start : start + ROWS_AT_ONCE]]
    found.flags.writeable = False
    return found


def validation_figures(
    experiment: Experiment, classifier: Classifier, auditor: Auditor, settings: PassSettings, invariance: Invariance
) -> dict[str, float]:
    """The few figures an arm is chosen by, on the validation part (degrees, shares; no shapes); empty without such a part."""
    if experiment.validation is None:
        return {}
    found = analyze_model(
        classifier, experiment.validation, experiment.embeddings[VALIDATION], experiment.texts, {"auditor": auditor.translator},
        mean=auditor.mean, invariance=invariance, settings=settings,
    )  # fmt: skip
    scores, steering = found.translators["auditor"].overall, found.steering["auditor"]
    return {
        "top1": found.top1, "images": float(found.images), "step": steering.step,
        **{key: scores[key] for key in ("AS_neg", "AS_abs", "IS")},
    }  # fmt: skip


def agreement_points(experiment: Experiment, sizes: list[int], ridge: float, folder: str) -> list[AgreementPoint]:
    """How far two auditors of N pictures agree on the starting classifier, N by N (no shapes; features stored in `folder`).

    The pictures are drawn from the audit part and those of the bank that training never sees, as many as the largest size needs;
    held out are the validation pictures, or without them the test ones. Every process computes the same, from stored features.
    """
    classifier, settings, parts = experiment.classifier, experiment.settings, experiment.parts
    held, of_held = (parts.test, "test") if experiment.validation is None else (experiment.validation, VALIDATION)

    def features(part: ImageSplit) -> np.ndarray:
        return cached_features(
            classifier, part, folder, batch_size=settings.batch_size, workers=settings.workers, progress=settings.progress
        )

    audit, bank = np.arange(len(parts.audit)), np.arange(len(parts.train), len(parts.bank))
    usable = sorted({size for size in sizes if size <= (len(audit) + len(bank)) // 2})
    if not usable:
        return []
    drawn = np.sort(np.random.default_rng(0).permutation(len(audit) + len(bank))[: 2 * usable[-1]])  # read in the order they lie in
    rows = {"audit": audit[drawn[drawn < len(audit)]], "bank": bank[drawn[drawn >= len(audit)] - len(audit)]}
    pictures = torch.cat([take_rows(features(getattr(parts, name)), chosen) for name, chosen in rows.items()])
    embeddings = torch.cat([take_rows(experiment.embeddings[name], chosen) for name, chosen in rows.items()])
    basis = NullSpace.from_weight(classifier.weight.cpu(), invariance=experiment.config.model.invariance).basis
    every = np.arange(len(held))
    return auditor_agreement_curve(
        pictures, embeddings, experiment.texts.cpu(), usable, ridge=ridge, basis=basis,
        held_out=(take_rows(features(held), every), take_rows(experiment.embeddings[of_held], every), torch.from_numpy(held.labels.copy())),
    )  # fmt: skip
