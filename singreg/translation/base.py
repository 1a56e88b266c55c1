"""What every translator is: a frozen map of features into a VLM's space that says what it was fitted on (METHOD section 2)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class TranslatorInfo:
    """What a translator was fitted on. It is stored in the file and checked when the file is loaded.

    kind is "linear", "mlp3", "mlp4" or "residual"; ridge belongs to the linear one only. by_block: standardised by the head's
    row-space and null block, not feature by feature.
    """

    classifier: str = ""
    head_hash: str = ""
    classifier_preprocessing: str = ""
    vlm: str = ""
    vlm_weights_hash: str = ""
    vlm_preprocessing: str = ""
    images: int = 0
    ridge: float = 0.0
    standardized: bool = False
    normalized_targets: bool = False
    validation_r2: float | None = None
    held_out_cosine: float | None = None
    held_out_r2: float | None = None
    kind: str = "linear"
    by_block: bool = False


class Translator(nn.Module):
    """Base of all translators: T maps (..., m) to (..., n), has no parameter to train, and lets gradients through to features."""

    info: TranslatorInfo

    @property
    def feature_dim(self) -> int:
        """m, the width of the features it takes."""
        raise NotImplementedError(f"{type(self).__name__} must define feature_dim")

    @property
    def target_dim(self) -> int:
        """n, the width of the vision-language model's space."""
        raise NotImplementedError(f"{type(self).__name__} must define target_dim")

    def forward(self, features: Tensor) -> Tensor:
        """Translated features. Shapes: (..., m) to (..., n)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file to the path, atomically; `load_translator` opens it (no shapes)."""
        raise NotImplementedError(f"{type(self).__name__} must define save")

    def check_width(self, features: Tensor) -> None:
        """Raise a ValueError unless features are (..., m)."""
        if features.shape[-1] != self.feature_dim:
            raise ValueError(f"this translator takes features (..., {self.feature_dim}), got {tuple(features.shape)}")


def info_from_stored(stored: Any) -> TranslatorInfo:
    """The info as a file has it (a mapping; keys of later versions are left out; no shapes).

    Raises:
        TypeError: it is no mapping.
    """
    if not isinstance(stored, dict):
        raise TypeError(f"expected a mapping of what it was fitted on, got {type(stored).__name__}")
    known = {field.name for field in fields(TranslatorInfo)}
    return TranslatorInfo(**{key: value for key, value in stored.items() if key in known})


def check_fit(info: TranslatorInfo, expected: TranslatorInfo, path: str) -> None:
    """Raise a ValueError that names every field in which a translator (read from `path`) is not the expected one.

    The kind is not compared: it says what a translator is, not what it belongs to.
    """
    differences = [
        f"  {field.name}: it was fitted on {getattr(info, field.name)!r}, here it is {getattr(expected, field.name)!r}"
        for field in fields(TranslatorInfo)
        if isinstance(getattr(expected, field.name), str)
        and field.name != "kind"
        and getattr(expected, field.name)
        and getattr(info, field.name) != getattr(expected, field.name)
    ]
    if differences:
        raise ValueError(f"the translator {path} belongs to another setting; fit a new one:\n" + "\n".join(differences))
