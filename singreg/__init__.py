"""singreg: fine-tuning with null-space regularisation. The names below are the public ones; each is imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from singreg.analysis.classes import analyze_classes
    from singreg.analysis.concepts import analyze_concepts
    from singreg.analysis.fitting import fit_on_part
    from singreg.analysis.images import analyze_images
    from singreg.analysis.model import analyze_model
    from singreg.analysis.steering import measure_steering
    from singreg.data.config import DataConfig
    from singreg.data.embeddings import cached_embeddings
    from singreg.data.loading import load_parts
    from singreg.geometry.angles import alignment_coefficient, angle, attribute_score, image_score
    from singreg.geometry.nullspace import NullSpace, row_space_projection
    from singreg.geometry.steering import steer, steering_direction, step_for_image_score
    from singreg.losses import SingLoss
    from singreg.metrics import AttributeScore, ImageScore, SemanticLeakage
    from singreg.models.classifier import Classifier
    from singreg.models.vision_language import VisionLanguageModel
    from singreg.translation.mlp import MLPSettings, MLPTranslator
    from singreg.translation.mlp_fitting import fit_mlp_translator
    from singreg.translation.ridge import RidgeStatistics
    from singreg.translation.translator import LinearTranslator, TranslatorInfo, fit_translator, load_translator

__version__ = "0.1.0"

_HOMES = {
    "singreg.analysis.classes": ("analyze_classes",),
    "singreg.analysis.concepts": ("analyze_concepts",),
    "singreg.analysis.fitting": ("fit_on_part",),
    "singreg.analysis.images": ("analyze_images",),
    "singreg.analysis.model": ("analyze_model",),
    "singreg.analysis.steering": ("measure_steering",),
    "singreg.data.config": ("DataConfig",),
    "singreg.data.embeddings": ("cached_embeddings",),
    "singreg.data.loading": ("load_parts",),
    "singreg.geometry.angles": ("alignment_coefficient", "angle", "attribute_score", "image_score"),
    "singreg.geometry.nullspace": ("NullSpace", "row_space_projection"),
    "singreg.geometry.steering": ("steer", "steering_direction", "step_for_image_score"),
    "singreg.losses": ("SingLoss",),
    "singreg.metrics": ("AttributeScore", "ImageScore", "SemanticLeakage"),
    "singreg.models.classifier": ("Classifier",),
    "singreg.models.vision_language": ("VisionLanguageModel",),
    "singreg.translation.mlp": ("MLPSettings", "MLPTranslator"),
    "singreg.translation.mlp_fitting": ("fit_mlp_translator",),
    "singreg.translation.ridge": ("RidgeStatistics",),
    "singreg.translation.translator": ("LinearTranslator", "TranslatorInfo", "fit_translator", "load_translator"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order of the data's flow)
    "NullSpace", "row_space_projection", "angle", "attribute_score", "image_score", "alignment_coefficient",
    "steering_direction", "step_for_image_score", "steer",
    "RidgeStatistics", "LinearTranslator", "TranslatorInfo", "load_translator", "fit_translator",
    "MLPTranslator", "MLPSettings", "fit_mlp_translator",
    "Classifier", "VisionLanguageModel",
    "SingLoss", "AttributeScore", "ImageScore", "SemanticLeakage",
    "DataConfig", "load_parts", "cached_embeddings",
    "analyze_model", "analyze_classes", "analyze_concepts", "analyze_images", "fit_on_part", "measure_steering",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import singreg` costs nothing for those who need one function."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'singreg' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
