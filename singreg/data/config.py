"""DataConfig: where the pictures come from and which go where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class DataConfig:
    """Which pictures a run uses. Counts are per class; null (None in Python) means all there are.

    Example:
        >>> DataConfig(train_per_class=0, workers=-1)
        Traceback (most recent call last):
        ValueError: data: train_per_class must be at least 1, got 0; workers must be at least 0, got -1
    """

    source: str = "scenes"
    """The built-in scenes, a folder of SPLIT/CLASS/picture or Parquet files (links out of it are not followed), or a Hugging Face name."""
    streaming: bool = False
    """Read a Hugging Face data set through once and keep what is wanted (the first of each class, up to the counts) in the cache."""
    train_split: str = "train"
    """Subfolder of the source, or its split, that training and audit pictures are taken from."""
    test_split: str = "validation"
    """Subfolder of the source, or its split, that the test pictures are taken from."""
    classes: list[str] | str | None = None
    """Wnids or class names, a named set (imagenet16, imagenette, imagewoof, imagenet100) or a list file; null: all there are."""
    train_per_class: int | None = None
    """Training pictures per class, at least 1; null: all that the audit part does not take."""
    audit_per_class: int | None = None
    """Pictures per class for the auditor, never trained on; null: what train_per_class leaves, or half if that is null too; 0: none."""
    test_per_class: int | None = None
    """Test pictures per class, at least 1; null: all there are."""
    unlabeled: str | None = None
    """Folder of further pictures, any depth, for bank and auditor (links leading out are not followed); null: none."""
    unlabeled_count: int | None = None
    """How many of the unlabelled pictures to use, drawn with the seed, at least 1; null: all there are."""
    unlabeled_to_audit: float = 0.5
    """Share of the unlabelled pictures that the auditor gets, from 0 to 1; the rest goes to the bank."""
    scenes_train: int = 2000
    """Number of training scenes, all classes together; this and the next six only with source: scenes."""
    scenes_audit: int = 1600
    """Number of scenes for the auditor, which are never trained on."""
    scenes_test: int = 1000
    """Number of test scenes."""
    scenes_bank: int = 0
    """Number of scenes in the bank beside the training ones."""
    scene_background_bias: float = 0.6
    """How often the background follows the class in training, bank and audit scenes, from 0 (no more than by chance) to 1."""
    scene_test_background_bias: float = 0.0
    """How often the background follows the class in the test scenes, from 0 (no more than by chance) to 1."""
    scene_pixels: int = 64
    """Side of a rendered scene in pixels, at least 8."""
    image_size: int | None = None
    """Side of the classifier's input in pixels; null: the pretrained model's own."""
    augmentation: Literal["none", "flip", "timm"] = "flip"
    """What training pictures go through: none, flip (a random mirroring) or timm (its standard training transform)."""
    workers: int = 0
    """Loader processes per training process; 0: pictures are read in the training process itself."""
    unreadable: Literal["stop", "skip"] = "stop"
    """Pictures that cannot be decoded, or are links that are not followed: stop and name them before anything long, or skip them."""
    duplicates: Literal["stop", "drop"] = "stop"
    """A picture (same bytes) in two of train, audit and test: stop and name both, or drop all but the first of test, audit, bank."""
    cache_dir: str | None = None
    """Folder where checked pictures are remembered (by path, size, time of change), so that a second start is quick; null: nowhere."""
    seed: int = 0
    """Seed of the draw of pictures for the parts, and of the scenes; at least 0."""

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong with the values."""
        problems = [*self._counts(), *self._shares()]
        if self.streaming and self.source == "scenes":
            problems.append("streaming needs a Hugging Face data set as source, got scenes")
        choices = {
            "augmentation": ("none", "flip", "timm"),
            "unreadable": ("stop", "skip"),
            "duplicates": ("stop", "drop"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if problems:
            raise ValueError("data: " + "; ".join(problems))

    def _counts(self) -> list[str]:
        least = {
            "train_per_class": 1, "audit_per_class": 0, "test_per_class": 1, "unlabeled_count": 1, "scenes_train": 1,
            "scenes_audit": 0, "scenes_test": 1, "scenes_bank": 0, "scene_pixels": 8, "image_size": 1, "workers": 0, "seed": 0,
        }  # fmt: skip
        values = {name: getattr(self, name) for name in least}
        return [
            f"{name} must be at least {least[name]}, got {value}"
            for name, value in values.items()
            if value is not None and value < least[name]
        ]

    def _shares(self) -> list[str]:
        names = ("unlabeled_to_audit", "scene_background_bias", "scene_test_background_bias")
        return [
            f"{name} must be from 0 to 1, got {getattr(self, name)}"
            for name in names
            if not 0 <= getattr(self, name) <= 1
        ]
