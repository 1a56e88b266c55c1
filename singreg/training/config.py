"""The configuration of a fine-tuning run (recipes/finetune.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from singreg.terms import PRESETS, TERMS, Placebo
from singreg.workbench.config import AuditorConfig, JobConfig, ModelConfig, Problems, TranslatorConfig
from singreg.workbench.parsing import parse_config

HEAD_TERMS = {"capacity", "steer", "head", "orthogonal"}
"""Terms of the head's weight alone: no gradient reaches features or backbone."""


@dataclass
class LoopTranslatorConfig(TranslatorConfig):
    """The loop's translator, fitted on the bank (training pictures and the unlabelled ones not given to the auditor).

    Args:
        ridge: relative penalty; null chooses it by validation.
        standardize: scale the features for the fit by the head's row-space and null block (blocks), one by one (features), or not
            at all (no).
        normalize_targets: translate to unit image embeddings instead of the paper's raw ones (the auditor too).
        refreshes: how often, evenly spaced over training, the bank is encoded again and the loop's translator refitted.
        folds: above 1, the loss reads an ensemble of translators fitted on so many disjoint shares of the bank, one a step in turn.
        stream_every: above 0, the training batches' own features update the translator's sums, which are solved again every so
            many steps. Needs no pass over the bank, but a ridge that was chosen on it stays.
        forgetting: by this the sums are multiplied at every step of streaming, so that features of an older backbone fade; 1 keeps them.
    """

    refreshes: int = 3
    folds: int = 1
    stream_every: int = 0
    forgetting: float = 0.99


@dataclass
class LossConfig:
    """SingLoss (METHOD section 6).

    Args:
        weight: λ after the ramp.
        preset: named sum of terms to begin with: sing, leakage, two_sided, steering, label_only, null_energy, null_share, sigma_min or
            orthogonal.
        terms: weights by term that replace or add to the preset's; a weight of 0 removes a term. Terms: leak, hinge, attribute, band,
            class_share, capacity, steer, head, orthogonal, null_energy, null_share.
        placebo: control of the control: the loss sees every class's prompt at another class (shuffled), or random directions.
        balance: above 0, λ is scaled once, when the warm-up ends, so that the terms' gradient on the backbone (on the head where it
            alone trains) has this share of cross-entropy's norm at full λ; both norms are logged. 0.1 to 0.3 is a good start.
        warmup: share of the steps with cross-entropy alone.
        ramp: share of the steps of the cosine ramp that follows.
        confusable: nearest classes that make a class's contrast directions.
        momentum: of the running feature mean.
        class_momentum: of the class means, each of which moves only with its own pictures.
    """

    weight: float = 0.1
    preset: str = "sing"
    terms: dict[str, float] = field(default_factory=dict)
    placebo: Placebo = "none"
    balance: float = 0.0
    warmup: float = 0.1
    ramp: float = 0.2
    confusable: int = 16
    momentum: float = 0.99
    class_momentum: float = 0.9


@dataclass
class TrainingConfig:
    """Optimisation, the same for both arms.

    Args:
        epochs: passes over the training part; 0 measures only.
        batch_size: pictures an optimiser step sees over all processes and accumulation steps.
        accumulation: gradient accumulation steps; batch_size must be divisible by it times the number of processes.
        learning_rate: peak, AdamW, cosine decay.
        head_factor: the head's learning rate is this times learning_rate.
        weight_decay: AdamW's.
        clip: the gradient's norm is clipped to this.
        l2_sp: adds half of this times the squared distance of the trained backbone from where it began (L2-SP).
        head_first: share of the steps in which the head alone trains, the backbone as if frozen (LP-FT).
        lr_warmup: share of the steps with a linear warm-up of the learning rate.
        label_smoothing: of the cross-entropy.
        mixed_precision: no, bf16 or fp16; the loss stays in float32.
        control: also train the control arm (plain fine-tuning); without it no claim can be made.
        checkpoint_every: optimiser steps between checkpoints, beside one at every epoch's end.
        keep: how many checkpoints stay.
        log_every: optimiser steps between TensorBoard points.
        watch: pictures for the AS/IS curves by epoch (0: none).
        measure_batch_size: pictures a batch where nothing is trained.
    """

    epochs: int = 2
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 2e-4
    head_factor: float = 5.0
    weight_decay: float = 0.01
    clip: float = 1.0
    l2_sp: float = 0.0
    head_first: float = 0.0
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
        name: of the run's folder.
        runs: where run folders go.
        cache: embeddings and features, reused by all runs.
        seed: every random choice hangs on it.
        dry_run: build everything, embed all pictures (once; they are cached), run one batch, say what would happen, stop.
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
        translator__folds=config.translator.folds,
    )
    problems.at_least_0(
        training__epochs=training.epochs,
        training__weight_decay=training.weight_decay,
        training__watch=training.watch,
        translator__refreshes=config.translator.refreshes,
        translator__stream_every=config.translator.stream_every,
        training__l2_sp=training.l2_sp,
        loss__weight=loss.weight,
        loss__balance=loss.balance,
    )
    problems.share(
        loss__warmup=loss.warmup,
        loss__ramp=loss.ramp,
        loss__momentum=loss.momentum,
        loss__class_momentum=loss.class_momentum,
        training__lr_warmup=training.lr_warmup,
        training__label_smoothing=training.label_smoothing,
        training__head_first=training.head_first,
        translator__forgetting=config.translator.forgetting,
    )
    problems.need(loss.warmup + loss.ramp <= 1, f"loss.warmup + loss.ramp: {loss.warmup + loss.ramp} is more than the whole run")
    _terms(problems, config)
    _streaming(problems, config)
    return problems


def _terms(problems: Problems, config: FinetuneConfig) -> None:
    loss = config.loss
    problems.need(loss.preset in PRESETS, f"loss.preset: no preset {loss.preset!r}; known are {', '.join(sorted(PRESETS))}")
    for name in sorted(set(loss.terms) - set(TERMS)):
        problems.append(f"loss.terms.{name}: no such term; known are {', '.join(sorted(TERMS))}")
    bad = {name: weight for name, weight in loss.terms.items() if not 0 <= weight < math.inf}
    for name, weight in bad.items():
        problems.append(f"loss.terms.{name}: expected a finite weight of at least 0 (0 removes the term), got {weight}")
    if loss.preset not in PRESETS or bad or set(loss.terms) - set(TERMS):
        return
    wanted = {name for name, weight in {**PRESETS[loss.preset], **loss.terms}.items() if weight}
    problems.need(bool(wanted), f"loss.terms: no term of the preset {loss.preset!r} is left; give one a weight above 0")
    # Balance is measured on the backbone, where terms of the head's weight alone have no gradient.
    measurable = loss.balance <= 0 or config.model.tuning == "head" or not wanted or bool(wanted - HEAD_TERMS)
    problems.need(measurable, f"loss.balance: {', '.join(sorted(wanted))} move the head alone; set it to 0 or add another term")


def _streaming(problems: Problems, config: FinetuneConfig) -> None:
    translator = config.translator
    if not translator.stream_every:
        return
    problems.need(translator.forgetting > 0, "translator.forgetting: 0 would forget the bank at once; expected a share above 0")
    problems.need(translator.folds == 1, "translator.stream_every: streaming keeps one translator; set translator.folds to 1")


def parse_finetune(arguments: Sequence[str] | None = None, *, description: str = "") -> FinetuneConfig:
    """The configuration from `--config FILE` and overrides such as `--training.epochs 3`; see `parse_config` (no shapes)."""
    return parse_config(FinetuneConfig, check_finetune, arguments, description=description)
