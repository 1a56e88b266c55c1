"""What each of several processes does in these tests; apart, so that they need not import what only the oracles use."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from singreg.analysis.features import iterate_features, process_share
from singreg.analysis.old_fitting import fit_on_part, reference_image_scores
from singreg.analysis.model import analyze_model
from singreg.analysis.results import ModelMeasurement
from singreg.nullspace import Invariance
from singreg.translator import TranslatorInfo
from tests.analysis import toy

UNLABELLED = (3, 4)


def walk(rank: int, world: int, count: int, cache: str | None) -> tuple[list[int], Tensor, list[int]]:
    """Indices and features of this process's pictures, and what its share should be."""
    settings = replace(toy.QUIET, cache=cache)
    batches = list(iterate_features(toy.classifier(), toy.ToyPart(count), toy.embeddings(count), settings, "test"))
    indices = [index for batch in batches for index in batch.indices.tolist()]
    features = torch.cat([torch.zeros(0, toy.WIDTH), *[batch.features for batch in batches]])
    return indices, features, process_share(count).tolist()


def fit(rank: int, world: int, count: int) -> tuple[Tensor, Tensor, Tensor, TranslatorInfo]:
    part = toy.ToyPart(count, unlabelled=UNLABELLED)
    got = fit_on_part(toy.classifier(), part, toy.embeddings(count), standardize=True, settings=toy.QUIET)
    return got.translator.matrix, got.mean, got.class_means, got.translator.info


def reference(rank: int, world: int, count: int) -> Tensor:
    """IS_ref of the pictures of a small part, by a translator fitted on a larger one."""
    larger = toy.ToyPart(30)
    fitted = fit_on_part(toy.classifier(), larger, toy.embeddings(30), settings=toy.QUIET)
    part = toy.ToyPart(count)
    return reference_image_scores(toy.classifier(), part, toy.embeddings(count), fitted, settings=toy.QUIET)


def measure(rank: int, world: int, count: int, batch_size: int = 4, invariance: Invariance = "logits") -> ModelMeasurement:
    """All figures of the toy classifier by two translators, one of which was fitted on normalised targets."""
    part = toy.ToyPart(count, seed=1)
    model, mean = toy.classifier(), toy.features(toy.classifier(), toy.ToyPart(30)).mean(0).float()
    return analyze_model(
        model, part, toy.embeddings(count, seed=1), toy.texts(),
        {"frozen": toy.translator(), "auditor": toy.translator(1, normalized=True)},
        mean=mean, invariance=invariance, settings=replace(toy.QUIET, batch_size=batch_size),
    )  # fmt: skip
