"""The parts of a configuration that all recipes share: which classifier, which vision-language model, where things go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from singreg.data.concepts import control_character
from singreg.data.config import DataConfig

Standardization = Literal["blocks", "features", "no"]


@dataclass
class ModelConfig:
    """The classifier that is fine-tuned.

    Args:
        name: any timm name, `local-dir:FOLDER` or `hf-hub:USER/MODEL`; "demo" is the small one inside the package.
        pretrained: load its weights; False only makes sense for tests.
        head: keep all rows of the pretrained head, slice it to the data's classes, or make a new one.
        tuning: train the head only, the last stage and the head, or all.
        batch_norm: keep batch-norm statistics fixed (eval) or update them (train).
        channels_last: memory format, faster for convolutions.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them; slower, less memory.
        compile: train through torch.compile; a minute or so at the start, then faster, mostly on GPUs. Measuring passes do without.
        invariance: null space of the logits, or of the softmax (one dimension more).
    """

    name: str = "demo"
    pretrained: bool = True
    head: Literal["keep", "slice", "new"] = "slice"
    tuning: Literal["head", "last_stage", "all"] = "all"
    batch_norm: Literal["eval", "train"] = "eval"
    channels_last: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    invariance: Literal["logits", "softmax"] = "logits"


@dataclass
class VisionLanguageConfig:
    """The vision-language model that says what features mean.

    Args:
        name: an open_clip name or `local-dir:FOLDER`; "demo" is the small one inside the package.
        pretrained: open_clip tag or weights file; null for folders.
        templates: prompts, each with "{class}"; several make an ensemble. The paper's default is one.
        batch_size: pictures a batch when embeddings are computed (once; they are cached).
    """

    name: str = "demo"
    pretrained: str | None = None
    templates: list[str] = field(default_factory=lambda: ["an image of a {class}"])
    batch_size: int = 64


@dataclass
class TranslatorConfig:
    """The translator, fitted on the bank (training pictures and the unlabelled ones not given to the auditor).

    Args:
        ridge: relative penalty; null chooses it by validation.
        standardize: scale the features for the fit by the head's row-space and null block (blocks), one by one (features), or not
            at all (no).
        normalize_targets: translate to unit image embeddings instead of the paper's raw ones (the auditor too).
    """

    ridge: float | None = None
    standardize: Standardization = "blocks"
    normalize_targets: bool = False


@dataclass
class AuditorConfig:
    """The auditor: an independent translator, standardised, fitted on other pictures with its own λ (METHOD section 8.6).

    Args:
        ridge: relative penalty; null chooses it by its own validation.
        standardize: blocks, which neither turning nor shrinking the null block moves; or features, one by one, as others do it.
        images_per_feature: fewer pictures than this times the feature width, and the report makes no claim.
    """

    ridge: float | None = None
    standardize: Literal["blocks", "features"] = "blocks"
    images_per_feature: float = 6.0


@dataclass
class JobConfig:
    """What every recipe has; every field is a key of the YAML and a flag of the command line.

    Args:
        name: of the run's folder.
        runs: where run folders go.
        cache: embeddings and features, reused by all runs.
        seed: every random choice hangs on it.
        dry_run: build everything, embed all pictures (once; they are cached), run one batch, say what would happen, stop.
    """

    name: str = "demo"
    runs: str = "runs"
    cache: str = "~/.cache/singreg"
    seed: int = 0
    dry_run: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    vlm: VisionLanguageConfig = field(default_factory=VisionLanguageConfig)

    @property
    def folder(self) -> Path:
        """The run's folder (a path)."""
        return Path(self.runs).expanduser() / self.name


class Problems(list[str]):
    """Sentences about what is wrong with a configuration, collected so that all are shown at once."""

    def need(self, ok: bool, sentence: str) -> None:
        """Add the sentence unless `ok` (no shapes)."""
        if not ok:
            self.append(sentence)

    def visible(self, key: str, text: str) -> None:
        """A text must have no control characters, which terminals obey and reports cannot show (no shapes)."""
        found = control_character(text)
        self.need(found is None, f"{key}: {text[:80]!r} has the control character {found}")

    def positive(self, **values: float) -> None:
        """Each named value must be above 0 and finite; `__` in a name stands for a dot (no shapes)."""
        for name, value in values.items():
            self.need(0 < value < math.inf, f"{name.replace('__', '.')}: expected a number above 0, got {value}")

    def at_least_0(self, **values: float | None) -> None:
        """Each named value must be at least 0 and finite, or None (no shapes)."""
        for name, value in values.items():
            self.need(value is None or 0 <= value < math.inf, f"{name.replace('__', '.')}: expected a number of at least 0, got {value}")

    def share(self, **values: float) -> None:
        """Each named value must be in [0, 1] (no shapes)."""
        for name, value in values.items():
            self.need(0 <= value <= 1, f"{name.replace('__', '.')}: expected a share between 0 and 1, got {value}")

    def job(self, config: JobConfig) -> None:
        """What is wrong with the fields that all recipes share (no shapes)."""
        self.vision_language("vlm", config.vlm)
        for key, text in (("name", config.name), ("runs", config.runs), ("cache", config.cache), ("data.source", config.data.source)):
            self.visible(key, text)
        plain = bool(config.name) and Path(config.name).name == config.name and config.name not in (".", "..")
        self.need(plain, f"name: expected a folder name, got {config.name!r}")
        self.need(0 <= config.seed < 2**32, f"seed: expected a whole number from 0 to {2**32 - 1}, got {config.seed}")

    def translators(self, translator: TranslatorConfig, auditor: AuditorConfig) -> None:
        """What is wrong with the fields of translator and auditor (no shapes)."""
        self.at_least_0(
            translator__ridge=translator.ridge,
            auditor__ridge=auditor.ridge,
            auditor__images_per_feature=auditor.images_per_feature,
        )

    def vision_language(self, key: str, config: VisionLanguageConfig) -> None:
        """What is wrong with one vision-language model's settings, under its key (no shapes)."""
        self.need(config.batch_size > 0, f"{key}.batch_size: expected a number above 0, got {config.batch_size}")
        self.need(bool(config.templates), f"{key}.templates: expected at least one prompt")
        for template in config.templates:
            self.visible(f"{key}.templates", template)
            self.need("{class}" in template, f'{key}.templates: {template!r} has no "{{class}}" in it')

    def twice(self, key: str, names: Sequence[str], hint: str = "") -> None:
        """No name may be in the list twice (no shapes)."""
        found = sorted({name for name in names if list(names).count(name) > 1})
        self.need(not found, f"{key}: listed twice: {', '.join(found)}{hint}")
