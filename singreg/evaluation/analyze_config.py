"""The configuration of an analysis (recipes/analyze.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from singreg.workbench.config import AuditorConfig, JobConfig, ModelConfig, Problems, TranslatorConfig
from singreg.workbench.parsing import parse_config


@dataclass
class AnalyzeConfig(JobConfig):
    """A whole run of recipes/analyze.py; every field is a key of the YAML and a flag of the command line.

    Args:
        name: of the run's folder.
        runs: where run folders go.
        cache: embeddings and features, reused by all runs.
        seed: every random choice hangs on it.
        dry_run: build everything, embed all pictures (once; they are cached), run one batch, say what would happen, stop.
        resume: go on in the folder of an interrupted run of the same configuration; cached features make it quick.
        concepts: banks (colours, textures, materials, scenes, parts, imagenet), text files, or concepts in words.
        concept_templates: prompts with "{concept}" for all of them; null takes each bank's own.
        concepts_shown: strongest concepts in each direction that are drawn and listed.
        worst: pictures shown at image level.
        neighbours: of each in the gallery (the bank).
        chance_draws: random subspaces of each kind behind the chance level.
        mlp: non-linear translators compared with the linear one. Training one takes minutes.
        batch_size: pictures a batch of the classifier.
    """

    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    concepts: list[str] = field(default_factory=lambda: ["colours", "textures", "materials", "scenes", "parts"])
    concept_templates: list[str] | None = None
    concepts_shown: int = 12
    worst: int = 6
    neighbours: int = 3
    chance_draws: int = 8
    mlp: list[Literal["mlp3", "mlp4", "residual"]] = field(default_factory=list)
    batch_size: int = 64


def check_analyze(config: AnalyzeConfig) -> list[str]:
    """Everything wrong with the values, each as one sentence (no shapes); an empty list means it can run."""
    problems = Problems()
    problems.job(config)
    problems.translators(config.translator, config.auditor)
    problems.positive(
        batch_size=config.batch_size, concepts_shown=config.concepts_shown, worst=config.worst, neighbours=config.neighbours
    )
    problems.need(config.chance_draws >= 2, f"chance_draws: expected at least 2, got {config.chance_draws}")
    problems.need(bool(config.concepts), "concepts: expected at least one bank, file or concept")
    for template in config.concept_templates or []:
        problems.need("{concept}" in template, f'concept_templates: {template!r} has no "{{concept}}" in it')
    twice = sorted({kind for kind in config.mlp if config.mlp.count(kind) > 1})
    problems.need(not twice, f"mlp: listed twice: {', '.join(twice)}")
    return problems


def parse_analyze(arguments: Sequence[str] | None = None, *, description: str = "") -> AnalyzeConfig:
    """The configuration from `--config FILE` and overrides such as `--worst 12`; see `parse_config` (no shapes)."""
    return parse_config(AnalyzeConfig, check_analyze, arguments, description=description)
