"""The configuration of a fine-tuning run (recipes/finetune.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from singreg.losses import DEFAULT_TERMS, TERMS
from singreg.workbench.config import AuditorConfig, JobConfig, ModelConfig, Problems, TranslatorConfig
from singreg.workbench.parsing import parse_config


@dataclass
class LoopTranslatorConfig(TranslatorConfig):
    """The loop's translator, fitted on the bank (training pictures and the unlabelled ones not given to the auditor).

    Args:
        ridge: relative penalty; none chooses it by validation.
        standardize: scale the features for the fit by the head's row-space and null block (blocks), one by one (features), or not
            at all (no).
        normalize_targets: translate to unit image embeddings instead of the paper's raw ones (the auditor too).
        refreshes: how often, evenly spaced over training, the bank is encoded again and the loop's translator refitted.
    """

    refreshes: int = 3


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
class FinetuneConfig(JobConfig):
    """A whole run of recipes/finetune.py; every field is a key of the YAML and a flag of the command line.

    Args:
        name: of the run's folder. runs: where run folders go. seed: every random choice hangs on it.
        cache: embeddings and features, reused by all runs.
        dry_run: build everything, run one batch, say what would happen, stop.
        resume: go on with an interrupted run of the same name and configuration.
    """

    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    translator: LoopTranslatorConfig = field(default_factory=LoopTranslatorConfig)
    auditor: AuditorConfig = field(default_factory=AuditorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def check_finetune(config: FinetuneConfig) -> list[str]:
    """Everything wrong with the values, each as one sentence (no shapes); an empty list means it can run."""
    training, loss, problems = config.training, config.loss, Problems()
    problems.job(config)
    problems.translators(config.translator, config.auditor)
    problems.positive(
        training__batch_size=training.batch_size,
        training__accumulation=training.accumulation,
        training__learning_rate=training.learning_rate,
        training__head_factor=training.head_factor,
        training__measure_batch_size=training.measure_batch_size,
        training__checkpoint_every=training.checkpoint_every,
        training__keep=training.keep,
        training__log_every=training.log_every,
        training__clip=training.clip,
        loss__confusable=loss.confusable,
    )
    problems.at_least_0(
        training__epochs=training.epochs,
        training__weight_decay=training.weight_decay,
        training__watch=training.watch,
        translator__refreshes=config.translator.refreshes,
        loss__weight=loss.weight,
    )
    problems.share(
        loss__warmup=loss.warmup,
        loss__ramp=loss.ramp,
        loss__momentum=loss.momentum,
        training__lr_warmup=training.lr_warmup,
        training__label_smoothing=training.label_smoothing,
    )
    problems.need(loss.warmup + loss.ramp <= 1, f"loss.warmup + loss.ramp: {loss.warmup + loss.ramp} is more than the whole run")
    for name in sorted(set(loss.terms) - set(TERMS)):
        problems.append(f"loss.terms.{name}: no such term; known are {', '.join(sorted(TERMS))}")
    for name, weight in loss.terms.items():
        problems.need(math.isfinite(weight), f"loss.terms.{name}: expected a finite weight, got {weight}")
    problems.need(bool(loss.terms), f"loss.terms: expected at least one of {', '.join(sorted(TERMS))}")
    return problems


def parse_finetune(arguments: Sequence[str] | None = None, *, description: str = "") -> FinetuneConfig:
    """The configuration from `--config FILE` and overrides such as `--training.epochs 3`; see `parse_config` (no shapes)."""
    return parse_config(FinetuneConfig, check_finetune, arguments, description=description)
