"""The two translators of every evaluation: one from the bank's pictures, and an independent one, the auditor, from others."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from singreg.analysis.features import PassSettings
from singreg.analysis.old_fitting import FittedTranslator, fit_on_part
from singreg.data.datasets import Splits
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance
from singreg.ridge import DEFAULT_RIDGES
from singreg.translator import TranslatorInfo
from singreg.workbench.config import AuditorConfig, Standardization, TranslatorConfig


class Fittable(Protocol):
    """What is needed of a `Bench`: a classifier, parts, embeddings (N, n) by part name, and how to read pictures."""

    classifier: Classifier
    parts: Splits
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo
    settings: PassSettings


def fit_translators(
    bench: Fittable, translator: TranslatorConfig, auditor: AuditorConfig, *, invariance: Invariance = "logits"
) -> dict[str, FittedTranslator]:
    """ "fitted" from the bank and "auditor" from the audit part, standardised, with its own λ (METHOD section 8.6).

    Each comes with the mean feature (m,) of its pictures.
    """

    def fit(part: str, ridge: float | None, standardize: Standardization) -> FittedTranslator:
        return fit_on_part(
            bench.classifier,
            bench.parts.bank if part == "bank" else bench.parts.audit,
            bench.embeddings[part],
            ridges=DEFAULT_RIDGES if ridge is None else (ridge,),
            standardize=standardize,
            invariance=invariance,
            normalize_targets=translator.normalize_targets,
            info=bench.info,
            settings=bench.settings,
            description=f"fitting a translator on {part}",
        )

    return {"fitted": fit("bank", translator.ridge, translator.standardize), "auditor": fit("audit", auditor.ridge, auditor.standardize)}
