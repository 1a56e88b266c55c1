"""DataConfig: where the pictures come from and which go where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class DataConfig:
    """Which pictures a run uses. Counts are per class; None means all there are.

    Example:
        >>> DataConfig(train_per_class=0, workers=-1)
        Traceback (most recent call last):
        ValueError: data: train_per_class must be at least 1, got 0; workers must be at least 0, got -1
    """

    source: str = "scenes"
    """"scenes" (built in, nothing to download), a folder with SPLIT/CLASS/picture files, or a Hugging Face data set."""
    streaming: bool = False
    """Read a Hugging Face data set through once, and keep the pictures of the wanted classes (the first ones, where counts are given)
    in the cache, instead of downloading it whole."""
    train_split: str = "train"
    """Subfolder (or split) that training and audit pictures are taken from."""
    test_split: str = "validation"
    """Subfolder (or split) of the test pictures."""
    classes: list[str] | str | None = None
    """Wnids or class names, a named set (imagenet16, imagenette, imagewoof, imagenet100) or a list file; None is all."""
    train_per_class: int | None = None
    """Training pictures per class; None: all that the audit part does not take."""
    audit_per_class: int | None = None
    """Pictures per class from the training split that training never sees, for the auditor. None: all that
    train_per_class leaves, or half of each class (rounded down) when that is None too. 0: none."""
    test_per_class: int | None = None
    """Test pictures per class; None: all."""
    unlabeled: str | None = None
    """Folder of further pictures without labels, for the bank and the auditor (translators need many pictures)."""
    unlabeled_count: int | None = None
    """How many of them to use, drawn with the seed; None: all."""
    unlabeled_to_audit: float = 0.5
    """Share of the unlabelled pictures given to the auditor, the rest goes to the bank; 0 to 1."""
    scenes_train: int = 2000
    """Training scenes (all classes together; only with source: scenes)."""
    scenes_audit: int = 1600
    """Scenes for the auditor."""
    scenes_test: int = 1000
    """Test scenes."""
    scenes_bank: int = 0
    """Scenes in the bank beside the training ones."""
    scene_background_bias: float = 0.6
    """How often the background follows the class in the training, bank and audit scenes (0: never more than by chance)."""
    scene_test_background_bias: float = 0.0
    """The same for the test scenes."""
    scene_pixels: int = 64
    """Side of a rendered scene in pixels."""
    image_size: int | None = None
    """Side in pixels of the classifier's input; None: the pretrained model's own."""
    augmentation: Literal["none", "flip", "timm"] = "flip"
    """What training pictures go through: nothing, a random mirroring, or timm's standard training transform."""
    workers: int = 0
    """Loader processes per training process."""
    unreadable: Literal["stop", "skip"] = "stop"
    """What to do about pictures that cannot be decoded: stop before training and name them all, or leave them out."""
    duplicates: Literal["stop", "drop"] = "stop"
    """What to do when one picture (same bytes) is in two of train, audit and test: stop and name the files, or keep it
    in the first of test, audit, train, bank only."""
    cache_dir: str | None = None
    """Where checked pictures are remembered (by path, size, time of change), so that a second start is quick; None: nowhere."""
    seed: int = 0
    """Which pictures go to which part, and which scenes are drawn."""

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong with the values."""
        problems = [*self._counts(), *self._shares()]
        if self.streaming and self.source == "scenes":
            problems.append("streaming needs a Hugging Face data set as source, got scenes")
        choices = {"augmentation": ("none", "flip", "timm"), "unreadable": ("stop", "skip"), "duplicates": ("stop", "drop")}
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
        return [f"{name} must be from 0 to 1, got {getattr(self, name)}" for name in names if not 0 <= getattr(self, name) <= 1]
