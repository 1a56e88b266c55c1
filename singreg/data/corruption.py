"""Corrupted pictures, made here and the same every time: Gaussian blur, Gaussian noise, lowered contrast."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from singreg.data.splits import ImageSplit, SubsetSplit

KINDS = ("blur", "noise", "contrast")
BLUR = (0.005, 0.01, 0.015, 0.02, 0.03)
"""Radius (standard deviation) by severity, as a share of the shorter side, so that it means the same at any resolution."""
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)
"""Standard deviation by severity, of values in [0, 1]."""
CONTRAST = (0.75, 0.6, 0.45, 0.3, 0.15)
"""What is left of the distance to the picture's mean, by severity."""


def corrupt(picture: Image.Image, kind: str, severity: int = 3, seed: int = 0) -> Image.Image:
    """One RGB picture (H, W), corrupted; the same seed gives the same noise. Severity 1 to 5.

    Raises:
        ValueError: another kind or severity.

    Example:
        >>> grey = Image.new("RGB", (8, 8), (100, 100, 100))
        >>> np.asarray(corrupt(grey, "contrast")).mean(), np.asarray(corrupt(grey, "noise")).std() > 10
        (np.float64(100.0), np.True_)
    """
    check_corruptions([kind], severity)
    picture = picture.convert("RGB")
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(BLUR[severity - 1] * min(picture.size)))
    values = np.asarray(picture, dtype=np.float64)
    if kind == "noise":
        values = values + 255 * NOISE[severity - 1] * np.random.default_rng(seed).standard_normal(values.shape)
    else:
        values = values.mean() + CONTRAST[severity - 1] * (values - values.mean())
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def check_corruptions(kinds: Sequence[str], severity: int) -> None:
    """Raise a ValueError that names every unknown kind, and a severity outside 1 to 5 (no shapes)."""
    unknown = sorted({*kinds} - {*KINDS})
    problems = [f"no such corruption: {', '.join(unknown)}; known are {', '.join(KINDS)}"] if unknown else []
    if severity not in range(1, 1 + len(BLUR)):
        problems.append(f"severity must be 1 to {len(BLUR)}, got {severity}")
    if problems:
        raise ValueError("; ".join(problems))


class CorruptedSplit(SubsetSplit):
    """Another split's images, corrupted; an image always gets the same noise, and the fingerprint is one of its own.

    Raises:
        ValueError: another kind than `KINDS` or severity than 1 to 5.
    """

    def __init__(self, parent: ImageSplit, kind: str, severity: int = 3, *, seed: int = 0) -> None:
        check_corruptions([kind], severity)
        super().__init__(parent, np.arange(len(parent)), f"{parent.name} {kind}")
        note = f"{kind} {severity} {seed}".encode()
        # The noise follows the content, not the place: an image is corrupted alike in every selection of it.
        rows = [hashlib.sha256(digest.tobytes() + note).digest() for digest in parent.digests]
        self.digests = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32)
        self.kind, self.severity = kind, severity

    def image(self, index: int) -> Image.Image:
        drawn = int.from_bytes(self.digests[index, :8].tobytes(), "little")
        return corrupt(super().image(index), self.kind, self.severity, seed=drawn)

    def identifier(self, index: int) -> str:
        return f"{super().identifier(index)} ({self.kind} {self.severity})"
