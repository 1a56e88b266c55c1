"""The configuration of a steering run (recipes/steer.py)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from singreg.workbench.config import AuditorConfig, JobConfig, ModelConfig, Problems, TranslatorConfig
from singreg.workbench.parsing import parse_config

ALL = "all"
STEPS = [0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
RADII = [0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0]


@dataclass
class SteerConfig(JobConfig):
    """A whole run of recipes/steer.py; every field is a key of the YAML and a flag of the command line.

    Args:
        name: of the run's folder.
        runs: where run folders go.
        cache: embeddings and features, reused by all runs.
        seed: every random choice hangs on it.
        dry_run: build everything, embed all pictures (once; they are cached), run one batch, say what would happen, stop.
        resume: go on in the folder of an interrupted run of the same configuration; cached features make it quick.
        sources: classes whose test pictures are steered: names, a named set, or "all" that have test pictures.
        targets: classes whose prompts they are steered towards: names, a named set, or "all" that have test pictures.
        prompts: further target prompts in free words, taken as they are.
        image_score: image score in degrees at which table 1 is read (the paper's 40).
        steps: grid of relative steps, shares of the feature norm.
        radii: grid of Mahalanobis radii, multiples of the natural median; the natural percentiles are added.
        radius_floor: null directions with less than this share of the mean variance count as having that.
        images_per_class: test pictures of each source class; null takes all.
        max_pairs: source-target pairs, drawn evenly over sources; null takes all.
        mlp: non-linear translators that attack and judge too; their steps are found by bisection. Training one takes minutes.
        unclip: an UnCLIP image-variation pipeline (hub name or folder) that draws a few steered pictures; needs the extra
            singreg[unclip] and the CLIP that the pipeline was trained with. null draws nothing.
        unclip_pictures: how many pictures it draws, one a source class.
        batch_size: pictures a batch of the classifier.
    """

    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    sources: list[str] | str = ALL
    targets: list[str] | str = ALL
    prompts: list[str] = field(default_factory=list)
    image_score: float = 40.0
    steps: list[float] = field(default_factory=lambda: list(STEPS))
    radii: list[float] = field(default_factory=lambda: list(RADII))
    radius_floor: float = 1e-3
    images_per_class: int | None = 50
    max_pairs: int | None = None
    mlp: list[Literal["mlp3", "mlp4", "residual"]] = field(default_factory=list)
    unclip: str | None = None
    unclip_pictures: int = 6
    batch_size: int = 64


def check_steer(config: SteerConfig) -> list[str]:
    """Everything wrong with the values, each as one sentence (no shapes); an empty list means it can run."""
    problems = Problems()
    problems.job(config)
    problems.positive(batch_size=config.batch_size, radius_floor=config.radius_floor, unclip_pictures=config.unclip_pictures)
    problems.need(config.radius_floor <= 1, f"radius_floor: expected a share of at most 1, got {config.radius_floor}")
    problems.translators(config.translator, config.auditor)
    problems.need(0 < config.image_score < 180, f"image_score: expected degrees between 0 and 180, got {config.image_score}")
    for name in ("images_per_class", "max_pairs"):
        value = getattr(config, name)
        problems.need(value is None or value >= 1, f"{name}: expected a number of at least 1, or null for all, got {value}")
    for name in ("steps", "radii"):
        grid = getattr(config, name)
        rising = len(grid) >= 2 and grid[0] >= 0 and all(low < high for low, high in itertools.pairwise(grid))
        problems.need(rising, f"{name}: expected at least two numbers from 0 upwards in rising order, got {grid}")
    twice = sorted({kind for kind in config.mlp if config.mlp.count(kind) > 1})
    problems.need(not twice, f"mlp: listed twice: {', '.join(twice)}")
    problems.need(config.unclip is None or bool(config.unclip.strip()), "unclip: expected a pipeline's name or folder, or null")
    _check_pairs(config, problems)
    return problems


def _check_pairs(config: SteerConfig, problems: Problems) -> None:
    """Who is steered towards what, as far as it can be judged without the data."""
    textless = [prompt for prompt in config.prompts if prompt.strip() and not any(letter.isalnum() for letter in prompt)]
    problems.need(not textless, f"prompts: no text in {', '.join(map(repr, textless))}")
    for name in ("sources", "targets", "prompts"):
        entries = names_of(getattr(config, name))
        blank = [place for place, entry in enumerate(entries) if not entry.strip()]
        problems.need(not blank, f"{name}: blank at position {', '.join(str(place) for place in blank)} of {len(entries)}")
        for entry in entries:
            problems.visible(name, entry)
        twice = sorted({entry for entry in entries if entries.count(entry) > 1})
        problems.need(not twice, f"{name}: listed twice: {', '.join(twice)}")
    sources, targets = names_of(config.sources), names_of(config.targets)
    problems.need(bool(sources), 'sources: expected class names or "all"')
    problems.need(bool(targets or config.prompts), "targets: expected class names, \"all\", or at least one of prompts")
    if len(targets) == 1 and targets != [ALL] and targets[0] in sources and not config.prompts:
        problems.append(f"targets: {targets[0]!r} is its own source; name another class or a prompt")


def names_of(value: list[str] | str) -> list[str]:
    """One name or several as a list (no shapes)."""
    return [value] if isinstance(value, str) else list(value)


def parse_steer(arguments: Sequence[str] | None = None, *, description: str = "") -> SteerConfig:
    """The configuration from `--config FILE` and overrides such as `--image_score 20`; see `parse_config` (no shapes)."""
    return parse_config(SteerConfig, check_steer, arguments, description=description)
