"""The configuration of a fine-tuning run: dataclasses, YAML and command line through jsonargparse, checked as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from singreg.data.config import DataConfig
from singreg.losses import DEFAULT_TERMS, TERMS


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
        invariance: null space of the logits, or of the softmax (one dimension more).
    """

    name: str = "demo"
    pretrained: bool = True
    head: Literal["keep", "slice", "new"] = "slice"
    tuning: Literal["head", "last_stage", "all"] = "all"
    batch_norm: Literal["eval", "train"] = "eval"
    channels_last: bool = True
    invariance: Literal["logits", "softmax"] = "logits"


@dataclass
class VisionLanguageConfig:
    """The vision-language model that says what features mean.

    Args:
        name: an open_clip name or `local-dir:FOLDER`; "demo" is the small one inside the package.
        pretrained: open_clip tag or weights file; none for folders.
        templates: prompts, each with "{class}"; several make an ensemble. The paper's default is one.
        batch_size: pictures a batch when embeddings are computed (once; they are cached).
    """

    name: str = "demo"
    pretrained: str | None = None
    templates: list[str] = field(default_factory=lambda: ["an image of a {class}"])
    batch_size: int = 64


@dataclass
class TranslatorConfig:
    """The loop's translator, fitted on the bank (training pictures and the unlabelled ones not given to the auditor).

    Args:
        ridge: relative penalty; none chooses it by validation.
        standardize: divide features by their standard deviation for the fit.
        normalize_targets: translate to unit image embeddings instead of the paper's raw ones.
        refreshes: how often, evenly spaced over training, the bank is encoded again and the loop's translator refitted.
    """

    ridge: float | None = None
    standardize: bool = True
    normalize_targets: bool = False
    refreshes: int = 3


@dataclass
class AuditorConfig:
    """The auditor: another translator, fitted after training on pictures the training never saw (METHOD section 8.6).

    Args:
        ridge: relative penalty; none chooses it by its own validation.
        images_per_feature: fewer pictures than this times the feature width, and the report makes no claim.
    """

    ridge: float | None = None
    images_per_feature: float = 6.0


@dataclass
class LossConfig:
    """SingLoss (METHOD section 6).

    Args:
        weight: λ after the ramp.
        terms: weight of each term by name.
        warmup: share of the steps with cross-entropy alone. ramp: share of the steps of the cosine ramp that follows.
        confusable: nearest classes that make a class's contrast directions.
        momentum: of the running feature mean and class means.
    """

    weight: float = 0.1
    terms: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_TERMS))
    warmup: float = 0.1
    ramp: float = 0.2
    confusable: int = 16
    momentum: float = 0.99


@dataclass
class TrainingConfig:
    """Optimisation, the same for both arms.

    Args:
        epochs: passes over the training part; 0 measures only.
        batch_size: pictures an optimiser step sees over all processes and accumulation steps.
        accumulation: gradient accumulation steps; batch_size must be divisible by it times the number of processes.
        learning_rate: peak, AdamW, cosine decay. head_factor: times this for the head.
        weight_decay, clip: AdamW decay; gradient norm clipped to this.
        lr_warmup: share of the steps with a linear warm-up of the learning rate.
        label_smoothing: of the cross-entropy.
        mixed_precision: no, bf16 or fp16; the loss stays in float32.
        control: also train the control arm (plain fine-tuning); without it no claim can be made.
        checkpoint_every: optimiser steps between checkpoints, beside one at every epoch's end. keep: how many stay.
        log_every: optimiser steps between TensorBoard points. watch: pictures for the AS/IS curves by epoch (0: none).
        measure_batch_size: pictures a batch where nothing is trained.
    """

    epochs: int = 2
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 2e-4
    head_factor: float = 5.0
    weight_decay: float = 0.01
    clip: float = 1.0
    lr_warmup: float = 0.1
    label_smoothing: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    control: bool = True
    checkpoint_every: int = 200
    keep: int = 2
    log_every: int = 10
    watch: int = 256
    measure_batch_size: int = 64


@dataclass
class FinetuneConfig:
    """A whole run of recipes/finetune.py; every field is a key of the YAML and a flag of the command line.

    Args:
        name: of the run's folder. runs: where run folders go. seed: every random choice hangs on it.
        resume: go on with an interrupted run of the same name and configuration. cache: embeddings, reused by all runs.
        dry_run: build everything, run one batch, say what would happen, stop.
    """

    name: str = "demo"
    runs: str = "runs"
    cache: str = "~/.cache/singreg"
    seed: int = 0
    resume: bool = False
    dry_run: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vlm: VisionLanguageConfig = field(default_factory=VisionLanguageConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


class ConfigurationError(ValueError):
    """All that is wrong with a configuration, in one message."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"the configuration has {len(self.problems)} problem(s):\n{listed}")


def _unknown_keys(value: Any, kind: type, prefix: str = "") -> list[str]:
    """Keys of a YAML mapping that the dataclass does not have, with the nearest name; nested."""
    if not isinstance(value, dict):
        return [f"{prefix.rstrip('.') or 'the file'}: expected a mapping of keys to values, got {type(value).__name__}"]
    hints = typing.get_type_hints(kind)
    problems = []
    for key, inner in value.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            meant = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(sorted(hints))}"
            problems.append(f"{prefix}{key}: no such key{meant}")
        elif dataclasses.is_dataclass(hints[key]):
            problems += _unknown_keys(inner, typing.cast(type, hints[key]), f"{prefix}{key}.")
    return problems


def check_config(config: FinetuneConfig) -> list[str]:
    """Everything wrong with the values, each as one sentence (no shapes); an empty list means it can run."""
    training, loss, problems = config.training, config.loss, []

    def need(ok: bool, sentence: str) -> None:
        if not ok:
            problems.append(sentence)

    positive = {
        "training.batch_size": training.batch_size,
        "training.accumulation": training.accumulation,
        "training.learning_rate": training.learning_rate,
        "training.measure_batch_size": training.measure_batch_size,
        "training.checkpoint_every": training.checkpoint_every,
        "training.keep": training.keep,
        "training.log_every": training.log_every,
        "training.clip": training.clip,
        "vlm.batch_size": config.vlm.batch_size,
        "loss.confusable": loss.confusable,
    }
    for name, value in positive.items():
        need(value > 0, f"{name}: expected a number above 0, got {value}")
    for name, value in {
        "training.epochs": training.epochs,
        "training.weight_decay": training.weight_decay,
        "training.watch": training.watch,
        "translator.refreshes": config.translator.refreshes,
        "loss.weight": loss.weight,
    }.items():
        need(value >= 0, f"{name}: expected a number of at least 0, got {value}")
    for name, value in {"warmup": loss.warmup, "ramp": loss.ramp, "momentum": loss.momentum}.items():
        need(0 <= value <= 1, f"loss.{name}: expected a share between 0 and 1, got {value}")
    need(0 <= training.lr_warmup < 1, f"training.lr_warmup: expected a share in [0, 1), got {training.lr_warmup}")
    need(loss.warmup + loss.ramp <= 1, f"loss.warmup + loss.ramp: {loss.warmup + loss.ramp} is more than the whole run")
    for name in sorted(set(loss.terms) - set(TERMS)):
        problems.append(f"loss.terms.{name}: no such term; known are {', '.join(sorted(TERMS))}")
    need(bool(config.vlm.templates), "vlm.templates: expected at least one prompt")
    for template in config.vlm.templates:
        need("{class}" in template, f'vlm.templates: {template!r} has no "{{class}}" in it')
    need(bool(config.name) and Path(config.name).name == config.name, f"name: expected a folder name, got {config.name!r}")
    for name, ridge in {"translator.ridge": config.translator.ridge, "auditor.ridge": config.auditor.ridge}.items():
        need(ridge is None or ridge >= 0, f"{name}: expected at least 0, got {ridge}")
    return problems


def find_config(path: str) -> Path:
    """A YAML by its path, or by its name among those shipped with the package.

    Raises:
        FileNotFoundError: neither exists; the shipped names are listed.
    """
    if Path(path).is_file():
        return Path(path)
    shipped = Path(__file__).parents[1] / "configs"
    folder = shipped if shipped.is_dir() else Path(__file__).parents[2] / "configs"
    candidate = folder / Path(path).with_suffix(".yaml").name
    if candidate.is_file():
        return candidate
    known = ", ".join(sorted(p.name for p in folder.glob("*.yaml")))
    raise FileNotFoundError(f"no configuration at {path}; shipped with the package are: {known}")


def parse_config(arguments: Sequence[str] | None = None, *, description: str = "") -> FinetuneConfig:
    """The configuration from `--config FILE` and overrides such as `--training.epochs 3`, in the order given.

    All unknown keys and bad values are shown at once, before any work starts; the process then exits with status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="YAML file, or the name of one shipped with the package")
    parser.add_class_arguments(FinetuneConfig, fail_untyped=True)
    problems: list[str] = []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        given = value if equals else arguments[position + 1 : position + 2]
        try:
            path = find_config(given if isinstance(given, str) else given[0])
            problems += _unknown_keys(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, FinetuneConfig)
        except (OSError, IndexError, yaml.YAMLError) as error:
            parser.error(str(error))
        if equals:
            arguments[position] = f"--config={path}"
        else:
            arguments[position + 1] = str(path)
    if problems:
        parser.error(str(ConfigurationError(problems)))
    namespace: Namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    config: FinetuneConfig = build(FinetuneConfig, namespace.as_dict())
    if found := check_config(config):
        parser.error(str(ConfigurationError(found)))
    return config


def build(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from nested plain values (no shapes); the inverse of `dataclasses.asdict`."""
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            key: build(typing.cast(type, hints[key]), inner) if dataclasses.is_dataclass(hints[key]) else inner
            for key, inner in values.items()
        }
    )


def dump_config(config: FinetuneConfig) -> str:
    """The resolved configuration as YAML: running it again gives the same run (no shapes)."""
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    return text
