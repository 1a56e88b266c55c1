"""The configuration of a pixel attack (recipes/steer.py with `attack: pixels`)."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from singreg.analysis.pixels.budgets import Budget
from singreg.analysis.old_robustness.measure import RobustnessSettings
from singreg.evaluation.compare_config import ComparedModelConfig
from singreg.evaluation.steer_config import ALL, names_of
from singreg.workbench.config import AuditorConfig, JobConfig, Problems, TranslatorConfig, VisionLanguageConfig
from singreg.workbench.parsing import find_config, parse_config

TRANSLATORS = ("fitted", "auditor")


@dataclass
class AttackedModelConfig(ComparedModelConfig):
    """One of the attacked classifiers.

    Args:
        name: a timm name, `local-dir:FOLDER`, `hf-hub:USER/MODEL`, the folder of a finished fine-tuning run, or "demo". Such a
            run's control is local-dir:FOLDER/model-control.
        label: how it is called in the report; null takes the last part of the name.
        pretrained: load its weights; False gives an untrained network, a control.
        head: keep all rows of the head, slice it to the data's classes, or make a new, untrained one.
        invariance: null space of the logits, or of the softmax (one dimension more).
        drop_null: drop the null space from its features (same logits): the defence everyone can have, which pixels do not notice.
    """

    drop_null: bool = False

    @property
    def known_as(self) -> str:
        """The label, or the last part of the name with what was done to it (no shapes)."""
        name = super().known_as
        return f"{name} without null space" if self.drop_null and self.label is None else name


@dataclass
class PixelsConfig(JobConfig):
    """A whole run of recipes/steer.py on pixels; every field is a key of the YAML and a flag of the command line.

    Args:
        name: of the run's folder.
        runs: where run folders go.
        cache: embeddings and features, reused by all runs.
        seed: every random choice hangs on it.
        dry_run: build everything, embed all pictures (once; they are cached), attack one picture for one step, stop.
        attack: "pixels" is what tells this configuration from one that steers features.
        resume: go on in the folder of an interrupted run of the same configuration, batch by batch.
        models: the classifiers, all attacked on the same pictures.
        further_vlms: more image encoders beside `vlm` that judge the attacked pictures. Meaning is said to change only where all of
            at least two see it.
        pictures: test pictures, evenly over classes.
        targets: classes whose prompts they are steered towards, one each, never its own.
        linf: L-infinity budgets in 255ths.
        l2: L2 budgets in pixel values of [0, 1] over the whole picture.
        tau: how far any logit may move.
        steps: gradient steps a pass; below about 16 the passes may gain less than a single step, which a check says.
        restarts: passes, the first from the picture itself, others from random points.
        hold_pictures: pictures for the opposite direction (the decision moves, class-prompt cosines are held); 0 leaves it out.
        hold: how far a cosine to a class prompt may move there.
        feature_steps: relative steps at which the same pictures are steered in feature space too, by the single gradient step, the
            true maximiser and others; empty leaves that out.
        feature_radii: Mahalanobis radii, in natural medians.
        feature_pairs: pairs of a source class and a target prompt there.
        robust: L-infinity budgets in 255ths of ordinary adversarial pictures (PGD).
        robust_steps: gradient steps that make them.
        robust_restarts: from how many random points.
        severity: of the corruptions, 1 to 5.
        twin_pictures: test pictures among which natural twins are sought.
        attack_batch: pictures attacked together, and between two points at which a killed run can go on.
        batch_size: pictures a batch of everything else.
    """

    attack: Literal["pixels"] = "pixels"
    resume: bool = False
    models: list[AttackedModelConfig] = field(default_factory=list)
    further_vlms: list[VisionLanguageConfig] = field(default_factory=list)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    pictures: int = 128
    targets: list[str] | str = ALL
    linf: list[float] = field(default_factory=lambda: [2.0, 8.0])
    l2: list[float] = field(default_factory=list)
    tau: float = 1.0
    steps: int = 40
    restarts: int = 2
    hold_pictures: int = 16
    hold: float = 0.02
    feature_steps: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
    feature_radii: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    feature_pairs: int = 240
    robust: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    robust_steps: int = 10
    robust_restarts: int = 1
    severity: int = 3
    twin_pictures: int = 1000
    attack_batch: int = 32
    batch_size: int = 64

    @property
    def vlms(self) -> list[VisionLanguageConfig]:
        """All vision-language models, the first one first (no shapes)."""
        return [self.vlm, *self.further_vlms]

    @property
    def budgets(self) -> list[Budget]:
        """All budgets, in rising order by norm (no shapes)."""
        return [*(Budget("linf", size) for size in self.linf), *(Budget("l2", size) for size in self.l2)]


def check_pixels(config: PixelsConfig) -> list[str]:
    """Everything wrong with the values, each as one sentence (no shapes); an empty list means it can run."""
    problems = Problems()
    problems.job(config)
    problems.translators(config.translator, config.auditor)
    for place, vlm in enumerate(config.further_vlms):
        problems.vision_language(f"further_vlms[{place}]", vlm)
    counts = ("pictures", "steps", "restarts", "robust_steps", "robust_restarts", "attack_batch", "feature_pairs", "batch_size")
    problems.positive(**{name: getattr(config, name) for name in (*counts, "tau", "hold")})
    problems.at_least_0(hold_pictures=config.hold_pictures)
    problems.need(config.twin_pictures >= 2, f"twin_pictures: expected at least 2, got {config.twin_pictures}")
    problems.need(config.severity in range(1, 6), f"severity: expected 1 to 5, got {config.severity}")
    for name in ("linf", "l2", "robust"):
        _check_sizes(name, getattr(config, name), problems)
    for name in ("feature_steps", "feature_radii"):
        sizes = getattr(config, name)
        rising = sizes == sorted(set(sizes)) and all(0 < size < float("inf") for size in sizes)
        problems.need(rising, f"{name}: expected different numbers above 0 in rising order, got {sizes}")
    most = RobustnessSettings().limit
    problems.need(
        all(size < most for size in config.feature_steps),
        f"feature_steps: expected shares of the feature norm below {most:g}, which stands for no budget at all, got {config.feature_steps}",
    )
    problems.need(bool(config.linf or config.l2), "linf: expected at least one budget, in linf (255ths) or in l2")
    problems.need(not config.hold_pictures or bool(config.linf), "hold_pictures: the opposite direction needs a budget in linf")
    problems.need(bool(config.models), "models: expected at least one")
    for place, model in enumerate(config.models):
        problems.need(bool(model.name.strip()), f"models[{place}].name: expected a name, got {model.name!r}")
        problems.need(model.label is None or bool(model.label.strip()), f"models[{place}].label: expected words or null, got a blank")
        problems.need(
            model.known_as not in TRANSLATORS,
            f"models[{place}].label: {model.known_as!r} is what a translator is called in the report; give the model another label",
        )
    problems.twice("models", [model.known_as for model in config.models], "; give each a label of its own")
    targets = names_of(config.targets)
    problems.need(bool(targets) and all(name.strip() for name in targets), 'targets: expected class names or "all", none blank')
    problems.twice("targets", targets)
    return problems


def _check_sizes(name: str, sizes: Sequence[float], problems: Problems) -> None:
    if 0 in sizes:
        problems.append(
            f"{name}: a budget of 0 allows no change at all; leave it out (that nothing succeeds without a budget is checked in every run)"
        )
    elif any(not 0 < size < float("inf") for size in sizes):
        problems.append(f"{name}: expected numbers above 0, got {list(sizes)}")
    problems.need(list(sizes) == sorted(set(sizes)), f"{name}: expected different budgets in rising order, got {list(sizes)}")
    small = [size for size in sizes if name != "l2" and 0 < size < 1]
    problems.need(not small, f"{name}: budgets are in 255ths, and below 1 no 8-bit value can move: {small}")


def asks_for_pixels(arguments: Sequence[str] | None = None) -> bool:
    """Whether a flag or a top-level key of a --config file says `attack` (no shapes); what is wrong with them the parser says."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--attack":
            return True
        if name == "--config":
            try:
                text = find_config(value if equals else "".join(words[place + 1 : place + 2])).read_text(encoding="utf-8")
            except (OSError, ValueError):
                continue
            if re.search(r"^attack\s*:", text, flags=re.MULTILINE):
                return True
    return False


def parse_pixels(arguments: Sequence[str] | None = None, *, description: str = "") -> PixelsConfig:
    """The configuration from `--config FILE` and overrides such as `--linf '[4]'`; see `parse_config` (no shapes)."""
    return parse_config(PixelsConfig, check_pixels, arguments, description=description)
