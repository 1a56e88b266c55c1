"""Making a study's arms from one common start: aligned, trained, mixed with the start (METHOD sections 6 and 7)."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from singreg.analysis.auditors import Images, auditor_need
from singreg.analysis.features import PassSettings, cached_features, evenly, gathered, iterate_features
from singreg.analysis.fitting import FittedTranslator, fit_on_split, reference_image_scores
from singreg.data.scenes import ATTRIBUTES
from singreg.data.splits import ImageSplit, SceneSplit, SubsetSplit
from singreg.loop import Arm, own_random_numbers, train_head
from singreg.loop_translator import LoopTranslator
from singreg.models.classifier import Classifier
from singreg.models.edits import align_head_, constrain_to_rows, interpolate_weights, release_rows
from singreg.report import log, track
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.runs import Run, StopRequest
from singreg.setup import Setup
from singreg.study_plan import StudyConfig, Work
from singreg.task import make_sing
from singreg.terms import placebo_texts
from singreg.translator import LinearTranslator
from singreg.utils import write_json


def hold_out(setup: Setup, per_class: int) -> tuple[Setup, Images | None]:
    """Take the first `per_class` labelled audit images of every class as validation images.

    Raises:
        ValueError: a class has too few labelled audit images to leave the auditor one.
    """
    if not per_class:
        return setup, None
    audit, embeddings = setup.splits.audit, setup.embeddings["audit"]
    by_class = [np.flatnonzero(audit.labels == label) for label in range(len(audit.class_names))]
    few = [name for name, rows in zip(audit.class_names, by_class, strict=True) if len(rows) <= per_class]
    if few:
        raise ValueError(
            f"validation_per_class is {per_class}, but the audit split has no more images of {', '.join(few)}; "
            "lower it, or give the audit split more (data.per_class.audit, data.scenes.audit)"
        )
    taken = np.sort(np.concatenate([rows[:per_class] for rows in by_class]))
    kept = np.setdiff1d(np.arange(len(audit)), taken)
    splits = replace(setup.splits, audit=audit.subset(kept, "audit"))
    left = {**setup.embeddings, "audit": embeddings[kept]}
    return replace(setup, splits=splits, embeddings=left), (audit.subset(taken, "validation"), embeddings[taken])


@dataclass(frozen=True)
class Shared:
    """What all arms share; the starting backbone's features are stored while arms are made."""

    config: StudyConfig
    run: Run
    setup: Setup
    validation: Images | None

    def passes(self, name: str = "start") -> PassSettings:
        """How images are read, with the features of a backbone kept in a folder of the run."""
        return replace(self.setup.passes, cache=str(self.run.folder / "features" / name))


@dataclass(frozen=True)
class Begin:
    """What all arms begin with: the loop's translator, IS_ref (C,) in degrees, the sums of the bank's features."""

    loop: FittedTranslator
    image_score_ref: Tensor
    statistics: RidgeStatistics


def prepare_begin(shared: Shared) -> Begin:
    """Fit what all arms begin with on the starting classifier."""
    setup, passes = shared.setup, shared.passes()
    classifier, bank = setup.classifier.eval(), (setup.splits.bank, setup.embeddings["bank"])
    ridge = shared.config.translator.ridge
    options: dict[str, Any] = {"invariance": shared.config.model.invariance, "settings": passes}
    info = replace(setup.info, head_hash=classifier.head_hash())
    ridges = DEFAULT_RIDGES if ridge is None else (ridge,)
    loop = fit_on_split(classifier, *bank, ridges=ridges, info=info, **options)
    statistics = RidgeStatistics(classifier.feature_dim, bank[1].shape[1], device=classifier.weight.device)
    for batch in gathered(iterate_features(classifier, *bank, passes, "statistics")):
        statistics.update(batch.features, batch.embeddings)
    return Begin(loop, reference_image_scores(classifier, *bank, loop, **options), statistics.reduce())


def measure_agreement(shared: Shared) -> list[dict[str, Any]]:
    """Compare two auditors of N images each on the starting classifier, N by N; read back where it was done before."""
    config, setup, path = shared.config, shared.setup, shared.run.folder / "agreement.json"
    audit, bank, count = setup.splits.audit, setup.splits.bank, len(setup.splits.train)
    pool = [  # of the bank, the images that no training sees
        (audit, setup.embeddings["audit"], np.arange(len(audit))),
        (bank, setup.embeddings["bank"], np.arange(count, len(bank))),
    ]
    held = shared.validation or (setup.splits.test, setup.embeddings["test"])
    prints = [split.fingerprint for split in (audit, bank, held[0])]
    key = [config.agreement_sizes, config.translator.ridge, count, *prints]
    if path.is_file() and (stored := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return list(stored["points"])
    points = auditor_need(
        setup.classifier,
        pool,
        held,
        setup.texts,
        config.agreement_sizes,
        ridge=1.0 if config.translator.ridge is None else config.translator.ridge,
        invariance=config.model.invariance,
        settings=shared.passes(),
    )
    if shared.run.accelerator.is_main_process:
        write_json(path, {"key": key, "points": points})
    return points


def make(shared: Shared, begin: Begin, work: Work) -> tuple[Classifier, dict[str, LinearTranslator], dict[str, Any]]:
    """Edit and train a copy of the starting classifier as the arm says; return also the loop's translator and notes."""
    arm, config, setup = work.arm, work.config, shared.setup
    classifier = copy.deepcopy(setup.classifier).tune(config.model.tuning, batch_norm=config.model.batch_norm)
    loop: dict[str, LinearTranslator] = {}
    notes: dict[str, Any] = {}
    if work.source is not None:
        classifier.model.load_state_dict(load_file(work.source.folder / "weights.safetensors"))
    if arm.aligned:
        prompts = placebo_texts(setup.texts, config.loss.placebo)
        aligned = align_head_(classifier, begin.loop.translator, prompts, begin.statistics)
        names = ("rank_before", "rank", "free_rows", "raised", "logit_change")
        notes = {f"aligned_{name}": getattr(aligned, name) for name in names}
        if arm.constrain:
            constrain_to_rows(classifier, aligned.rows)
    if arm.train != "none":
        classifier, loop = train(shared, begin, work, classifier)
    if arm.constrain:
        release_rows(classifier)
    if arm.interpolation != 1:
        classifier = interpolate_weights(setup.classifier, classifier, arm.interpolation)
    return classifier.eval(), loop, notes


def train(
    shared: Shared, begin: Begin, work: Work, classifier: Classifier
) -> tuple[Classifier, dict[str, LinearTranslator]]:
    """Train an arm's head on stored features, or all of it from its newest checkpoint on."""
    config, setup, accelerator = work.config, shared.setup, shared.run.accelerator
    name, split, bank = f"{work.arm.name}, seed {work.seed}", setup.splits.train, setup.splits.bank
    head = work.arm.train == "head"
    passes = shared.passes() if head else setup.passes
    frozen, options = begin.loop.translator, (config.translator, accelerator, config.model.invariance, passes)
    keeper = LoopTranslator(frozen, bank, setup.embeddings["bank"], *options)
    sing = None
    if config.loss.weight > 0:
        references = begin.loop, setup.texts, begin.image_score_ref
        sing = make_sing(config, classifier, *references, len(split), accelerator.gradient_accumulation_steps)
    if head:
        features = cached_features(setup.classifier, split, passes)
        if sing is not None and keeper.streams:
            keeper.refresh(classifier, sing)
        classifier = train_head(name, classifier, sing, features, split.labels, config)
        return classifier, keeper.current(sing)
    arm = Arm(name, classifier, sing, keeper, split, config, accelerator, work.folder / "checkpoints")
    track(accelerator, f"{work.arm.name}-{work.seed}", config)
    with own_random_numbers(accelerator, config.seed), StopRequest(accelerator) as stop:
        for step in arm.steps(arm.resume()):
            log(accelerator, {f"train/{figure}": value for figure, value in step.figures.items()}, step.number)
            if stop.came():
                arm.save(replace(step.position, due=True))
                stop.end()
            arm.follow(step)
            if step.ends_epoch or step.number % config.training.checkpoint_every == 0:
                arm.save(step.position)
    return arm.finish(), keeper.current(sing)


def strange_images(bank: ImageSplit, count: int) -> ImageSplit | None:
    """Take images of no class evenly from the bank's unlabelled ones, which no auditor and no training saw."""
    unlabelled = np.flatnonzero(np.asarray(bank.labels) < 0)
    chosen = unlabelled[evenly(len(unlabelled), count)] if count and len(unlabelled) else []
    return bank.subset(chosen, "ood") if len(chosen) else None


def known_attributes(split: ImageSplit) -> pd.DataFrame | None:
    """Return every value of every attribute of built-in scenes as 0 or 1, such as "color: red"; None for others."""
    if isinstance(split, SubsetSplit):
        table = known_attributes(split.parent)
        chosen: pd.DataFrame | None = None if table is None else table.iloc[split.indices]
        return chosen
    if not isinstance(split, SceneSplit):
        return None
    every: pd.DataFrame = pd.DataFrame(
        {f"{n}: {v}": split.table.codes[n] == place for n, each in ATTRIBUTES.items() for place, v in enumerate(each)}
    )
    return every
