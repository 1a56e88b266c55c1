"""The configuration of a comparison of classifiers (recipes/compare.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from singreg.workbench.config import (
    AuditorConfig,
    JobConfig,
    ModelConfig,
    Problems,
    TranslatorConfig,
    VisionLanguageConfig,
)
from singreg.workbench.parsing import parse_config


@dataclass
class ComparedModelConfig:
    """One of the classifiers.

    Args:
        name: a timm name, `local-dir:FOLDER`, `hf-hub:USER/MODEL`, the folder of a finished fine-tuning run, or "demo".
        label: how it is called in the report; null takes the last part of the name.
        pretrained: load its weights; False gives an untrained network, a control.
        head: keep all rows of the head, slice it to the data's classes, or make a new, untrained one.
        invariance: null space of the logits, or of the softmax (one dimension more).
    """

    name: str = "demo"
    label: str | None = None
    pretrained: bool = True
    head: Literal["keep", "slice", "new"] = "slice"
    invariance: Literal["logits", "softmax"] = "logits"

    @property
    def known_as(self) -> str:
        """The label, or the last part of the name: of a run's folder its own name, not "model" (no shapes)."""
        if self.label is not None:
            return self.label
        parts = [part for part in Path(self.name.partition(":")[2] or self.name).parts if part not in ("/", ".", "..")]
        if len(parts) > 1 and parts[-1] in ("model", "model-control"):
            return parts[-2] if parts[-1] == "model" else f"{parts[-2]} control"
        return parts[-1] if parts else self.name

    def resolved(self) -> ModelConfig:
        """The same for `build_classifier`, a run's folder as the timm folder in it (a path).

        Raises:
            FileNotFoundError: a folder without a model in it.
        """
        folder = Path(self.name).expanduser()
        name = self.name
        if ":" not in name and folder.is_dir():
            if not (folder / "model" / "config.json").is_file():
                raise FileNotFoundError(
                    f"{folder} has no model/config.json, so it is not the folder of a finished fine-tuning run; a timm folder "
                    f"is given as local-dir:{folder}"
                )
            name = f"local-dir:{folder / 'model'}"
        return ModelConfig(name=name, pretrained=self.pretrained, head=self.head, invariance=self.invariance)


@dataclass
class CompareConfig(JobConfig):
    """A whole run of recipes/compare.py; every field is a key of the YAML and a flag of the command line.

    Args:
        name: of the run's folder.
        runs: where run folders go.
        cache: embeddings and features, reused by all runs.
        seed: every random choice hangs on it.
        dry_run: build everything, embed all pictures (once; they are cached), run one batch of every model, stop.
        resume: go on in the folder of an interrupted run of the same configuration; cached features make it quick.
        models: the classifiers, all measured on the same pictures.
        further_vlms: more vision-language models after `vlm`; each is a space in which all models are read.
        mlp: non-linear translators besides the two linear ones, each a view more. Training one takes minutes a model and space.
        chance_draws: random subspaces behind the chance level of every model.
        resamples: bootstrap resamples over classes and their pictures.
        batch_size: pictures a batch of the classifiers.
    """

    resume: bool = False
    models: list[ComparedModelConfig] = field(default_factory=list)
    further_vlms: list[VisionLanguageConfig] = field(default_factory=list)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    mlp: list[Literal["mlp3", "mlp4", "residual"]] = field(default_factory=list)
    chance_draws: int = 4
    resamples: int = 1000
    batch_size: int = 64

    @property
    def vlms(self) -> list[VisionLanguageConfig]:
        """All vision-language models, the first one first (no shapes)."""
        return [self.vlm, *self.further_vlms]


def check_compare(config: CompareConfig) -> list[str]:
    """Everything wrong with the values, each as one sentence (no shapes); an empty list means it can run."""
    problems = Problems()
    problems.job(config)
    problems.translators(config.translator, config.auditor)
    for place, vlm in enumerate(config.further_vlms):
        problems.vision_language(f"further_vlms[{place}]", vlm)
    problems.positive(batch_size=config.batch_size)
    problems.need(config.chance_draws >= 2, f"chance_draws: expected at least 2, got {config.chance_draws}")
    problems.need(config.resamples >= 100, f"resamples: expected at least 100 for a 95 % interval, got {config.resamples}")
    problems.need(len(config.models) >= 2, f"models: expected at least two to compare, got {len(config.models)}")
    for place, model in enumerate(config.models):
        problems.need(bool(model.name.strip()), f"models[{place}].name: expected a name, got {model.name!r}")
        problems.need(model.label is None or bool(model.label.strip()), f"models[{place}].label: expected words or null, got a blank")
    problems.twice("models", [model.known_as for model in config.models], "; give each a label of its own")
    problems.twice("mlp", list(config.mlp))
    return problems


def parse_compare(arguments: Sequence[str] | None = None, *, description: str = "") -> CompareConfig:
    """The configuration from `--config FILE` and overrides such as `--chance_draws 8`; see `parse_config` (no shapes)."""
    return parse_config(CompareConfig, check_compare, arguments, description=description)
