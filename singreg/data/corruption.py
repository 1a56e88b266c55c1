"""Corrupted images, the same every time: Gaussian blur, Gaussian noise, lowered contrast."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image, ImageFilter

from singreg.data.splits import ImageSplit, SubsetSplit

KINDS = ("blur", "noise", "contrast")
# By severity 1 to 5:
BLUR = (0.005, 0.01, 0.015, 0.02, 0.03)  # radius (standard deviation), as a share of the shorter side
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)  # standard deviation, of values in [0, 1]
CONTRAST = (0.75, 0.6, 0.45, 0.3, 0.15)  # what is left of the distance to the image's mean


def corrupt(image: Image.Image, kind: str, severity: int, seed: int = 0) -> Image.Image:
    """Return one RGB image (H, W) corrupted; the same seed gives the same noise."""
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(BLUR[severity - 1] * min(image.size)))
    values = np.asarray(image, dtype=np.float64)
    if kind == "noise":
        values = values + 255 * NOISE[severity - 1] * np.random.default_rng(seed).standard_normal(values.shape)
    else:
        values = values.mean() + CONTRAST[severity - 1] * (values - values.mean())
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


class CorruptedSplit(SubsetSplit):
    """Another split's images, corrupted; an image always gets the same noise, and the fingerprint is one of its own."""

    def __init__(self, parent: ImageSplit, kind: str, severity: int, *, seed: int = 0) -> None:
        if kind not in KINDS or not 1 <= severity <= len(BLUR):
            raise ValueError(f"expected a kind of {', '.join(KINDS)} and a severity of 1 to 5, got {kind}, {severity}")
        super().__init__(parent, np.arange(len(parent)), f"{parent.name} {kind}")
        # The noise follows the content, not the place: an image is corrupted alike in every selection of it.
        note = f"{kind} {severity} {seed}".encode()
        rows = [hashlib.sha256(digest.tobytes() + note).digest() for digest in parent.digests]
        self.digests = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32)
        self.kind, self.severity = kind, severity

    def image(self, index: int) -> Image.Image:
        drawn = int.from_bytes(self.digests[index, :8].tobytes(), "little")
        return corrupt(super().image(index), self.kind, self.severity, seed=drawn)

    def identifier(self, index: int) -> str:
        return f"{super().identifier(index)} ({self.kind} {self.severity})"
