"""singreg: fine-tuning with null-space regularisation. The names below are the public ones; each is imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from singreg.analysis.chance import measure_chance
    from singreg.analysis.comparing.differences import model_differences, order_check, paired_figures
    from singreg.analysis.features import PassSettings, cached_features, iterate_features
    from singreg.analysis.fitting import fit_mlp_on_split, fit_on_split
    from singreg.analysis.information import fit_blocks, measure_information
    from singreg.analysis.levels.classes import analyze_classes
    from singreg.analysis.levels.concepts import analyze_concepts
    from singreg.analysis.levels.gallery import Gallery, nearest_pictures
    from singreg.analysis.levels.images import analyze_images
    from singreg.analysis.levels.joint import joint_distribution
    from singreg.analysis.levels.pairs import EquivalentPairs
    from singreg.analysis.old_steering.curves import Budgets, steer_curves
    from singreg.analysis.old_steering.on_manifold import fit_conditional, natural_radii
    from singreg.analysis.old_steering.pairs import steer_pairs
    from singreg.analysis.old_steering.plan import PairPlan, plan_pairs
    from singreg.analysis.passport import compare_passports, head_passport
    from singreg.analysis.perturbation import measure_perturbations
    from singreg.analysis.scores import analyze_model
    from singreg.analysis.steering import measure_steering
    from singreg.config import DataConfig
    from singreg.data.concepts import ConceptBank, embed_concepts, load_concepts
    from singreg.data.datasets import load_splits
    from singreg.data.embeddings import cached_embeddings
    from singreg.functional import angle, attribute_score, image_score, kappa, pairwise_angles
    from singreg.losses import SingLoss, resolve_terms
    from singreg.metrics import AttributeScore, ImageScore, SemanticLeakage
    from singreg.mlp import MLPSettings
    from singreg.models.classifier import Classifier
    from singreg.models.edits import (
        AlignedHead,
        align_head_,
        aligned_weight,
        constrain_to_rows,
        drop_null,
        head_agreement,
        interpolate_weights,
        prompt_directions,
        release_rows,
    )
    from singreg.models.vlm import VisionLanguageModel
    from singreg.nullspace import NullSpace, RandomSubspace, null_share, row_space_projection
    from singreg.ridge import RidgeStatistics
    from singreg.steering import (
        ConditionalGaussian,
        Steered,
        bisect_step,
        similarity_gradient,
        steer,
        steering_direction,
        step_for_image_score,
    )
    from singreg.translator import (
        LinearTranslator,
        MLPTranslator,
        TranslatorInfo,
        fit_mlp_translator,
        fit_translator,
        load_translator,
    )

__version__ = "0.1.0"

_HOMES = {
    "singreg.analysis.chance": ("measure_chance",),
    "singreg.analysis.levels.classes": ("analyze_classes",),
    "singreg.analysis.comparing.differences": ("model_differences", "order_check", "paired_figures"),
    "singreg.analysis.levels.concepts": ("analyze_concepts",),
    "singreg.analysis.features": ("PassSettings", "cached_features", "iterate_features"),
    "singreg.analysis.fitting": ("fit_mlp_on_split", "fit_on_split"),
    "singreg.analysis.levels.gallery": ("Gallery", "nearest_pictures"),
    "singreg.analysis.levels.images": ("analyze_images",),
    "singreg.analysis.information": ("fit_blocks", "measure_information"),
    "singreg.analysis.levels.joint": ("joint_distribution",),
    "singreg.analysis.scores": ("analyze_model",),
    "singreg.analysis.old_steering.on_manifold": ("fit_conditional", "natural_radii"),
    "singreg.analysis.levels.pairs": ("EquivalentPairs",),
    "singreg.analysis.passport": ("compare_passports", "head_passport"),
    "singreg.analysis.perturbation": ("measure_perturbations",),
    "singreg.analysis.old_steering.pairs": ("steer_pairs",),
    "singreg.analysis.steering": ("measure_steering",),
    "singreg.analysis.old_steering.curves": ("Budgets", "steer_curves"),
    "singreg.analysis.old_steering.plan": ("PairPlan", "plan_pairs"),
    "singreg.data.concepts": ("ConceptBank", "embed_concepts", "load_concepts"),
    "singreg.config": ("DataConfig",),
    "singreg.data.embeddings": ("cached_embeddings",),
    "singreg.data.datasets": ("load_splits",),
    "singreg.functional": ("pairwise_angles", "kappa", "angle", "attribute_score", "image_score"),
    "singreg.nullspace": ("RandomSubspace", "NullSpace", "null_share", "row_space_projection"),
    "singreg.steering": ("ConditionalGaussian",
        "Steered", "bisect_step", "similarity_gradient", "steer", "steering_direction", "step_for_image_score"
    ),
    "singreg.losses": ("SingLoss", "resolve_terms"),
    "singreg.metrics": ("AttributeScore", "ImageScore", "SemanticLeakage"),
    "singreg.models.edits": (
        "drop_null", "interpolate_weights", "AlignedHead", "align_head_", "aligned_weight", "constrain_to_rows", "head_agreement", "prompt_directions", "release_rows",
    ),
    "singreg.models.classifier": ("Classifier",),
    "singreg.models.vlm": ("VisionLanguageModel",),
    "singreg.mlp": ("MLPSettings",),
    "singreg.ridge": ("RidgeStatistics",),
    "singreg.translator": (
        "LinearTranslator",
        "MLPTranslator",
        "TranslatorInfo",
        "fit_mlp_translator",
        "fit_translator",
        "load_translator",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order of the data's flow)
    "NullSpace", "RandomSubspace", "row_space_projection", "null_share", "angle", "pairwise_angles",
    "attribute_score", "image_score", "kappa",
    "similarity_gradient", "steering_direction", "step_for_image_score", "bisect_step", "steer", "Steered", "ConditionalGaussian",
    "RidgeStatistics", "LinearTranslator", "TranslatorInfo", "load_translator", "fit_translator",
    "MLPTranslator", "MLPSettings", "fit_mlp_translator",
    "Classifier", "VisionLanguageModel",
    "AlignedHead", "prompt_directions", "aligned_weight", "align_head_", "head_agreement", "constrain_to_rows", "release_rows",
    "drop_null", "interpolate_weights",
    "SingLoss", "resolve_terms", "AttributeScore", "ImageScore", "SemanticLeakage",
    "DataConfig", "load_splits", "cached_embeddings", "ConceptBank", "load_concepts", "embed_concepts",
    "PassSettings", "iterate_features", "cached_features", "fit_on_split", "fit_mlp_on_split", "EquivalentPairs",
    "analyze_model", "analyze_classes", "analyze_concepts", "analyze_images", "joint_distribution",
    "measure_chance", "fit_blocks", "measure_information", "measure_perturbations", "head_passport", "compare_passports",
    "Gallery", "nearest_pictures", "paired_figures", "model_differences", "order_check",
    "measure_steering", "PairPlan", "plan_pairs", "steer_pairs", "Budgets", "steer_curves", "fit_conditional", "natural_radii",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import singreg` costs nothing for those who need one function."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'singreg' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
