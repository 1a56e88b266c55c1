"""Study arms over seeds from one file: which null-space loss, edit or baseline does what, by the auditor.

python recipes/study.py --config configs/study_scenes.yaml
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

from singreg.config import parse
from singreg.study import StudyConfig

if __name__ == "__main__":  # --help and mistakes are answered before the seconds that these imports take
    parse(StudyConfig, description=__doc__)

import numpy as np
import pandas as pd
from accelerate.logging import get_logger
from safetensors.torch import load_file

from finetune import audit, train_arm
from singreg.analysis.comparison import FALLING, FIGURES, STAYING, Measured, words
from singreg.analysis.features import FittedTranslator
from singreg.loop import hold_out
from singreg.models.classifier import Classifier
from singreg.models.edits import align_head_, drop_null, interpolate_weights
from singreg.plots.scores import save_pareto
from singreg.report import Section, interval, log_figures, number, percent, track, write_report
from singreg.runs import Run, explained, fingerprints, stage, start
from singreg.setup import Setup, prepare, read_by, space_labels
from singreg.study.results import (
    Summary,
    Work,
    measure_arm,
    plan_study,
    study_verdict,
    study_warnings,
    summarize_study,
)
from singreg.task import describe_training, loop_bank
from singreg.translator import LinearTranslator
from singreg.utils import write_tensors

logger = get_logger(__name__)
MAIN = {"top1": FIGURES["top1"], **FALLING, **STAYING, "self 4 sd": "4 sd step judged by itself"}
MAIN["null_probe"] = "null probe"
SIDE = {"retrieval": "neighbours within the class", "ood_vim": "AUROC by ViM", "ood_energy": "AUROC by energy"}
SIDE["ood_null_energy"] = "AUROC by null energy"
VALIDATION = "Images that serve nothing else, by the same auditor: what settings are chosen on."
FURTHER = "Ratios as above, by an auditor in the space of a vision-language model that no arm was trained with."
RATIOS = (
    "Ratios of means, paired by image and averaged over seeds, with 95 % intervals over classes and their images; of "
    "top-1 over images. "
    "Class-score variance, AS⁻, |AS| and steering should fall; harmless R², what the features say beside all prompts, "
    "should stay. Confirmed share: what the auditor confirms of the fall in AS⁻ that the loop's translator reads."
)
READING = (
    "By the auditor, means over the test images, AS and IS in degrees; ± is the standard deviation over seeds, in "
    "brackets the 95 % interval. Front: no arm is better in both top-1 and class-score variance."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, make and measure every arm that is not finished, report."""
    config = parse(StudyConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "study").check()
        setup = prepare(config, accelerator)
        works = plan_study(config, fingerprints(setup))
        for work in works:  # complaints come before any work
            arm, told = work.arm, "no training"
            if arm.make == "train":
                told = describe_training(work.config, accelerator, setup.classifier, len(setup.splits.train))
            if config.dry_run and accelerator.is_main_process:
                source = f", from {arm.weights_from}" if arm.weights_from else ""
                print(f"{arm.name}, seed {work.seed}: {arm.make}{source}; {told.splitlines()[0]}; {arm.note}")
        study = Study(config, run, setup)
        if config.dry_run:
            return
        run.open()
    with run.guarded():
        if accelerator.is_main_process:
            for work in works:
                work.make_room()
        accelerator.wait_for_everyone()
        found = []
        for place, work in enumerate(works):
            logger.info("arm %d of %d: %s, seed %d", place + 1, len(works), work.arm.name, work.seed)
            found.append((work, stage(study.inside(work), work.name, partial(make_and_measure, study, work))))
            if accelerator.is_main_process:
                shutil.rmtree(work.folder / "checkpoints" / work.name, ignore_errors=True)
        if accelerator.is_main_process:
            shutil.rmtree(run.folder / "features", ignore_errors=True)
            report(study, found)
    accelerator.end_training()


class Study:
    """What all arms begin with, fitted on the starting classifier when it is first asked for, and how they are made."""

    def __init__(self, config: StudyConfig, run: Run, setup: Setup) -> None:
        self.config, self.run = config, run
        self.setup = hold_out(setup, config.validation_per_class)
        self.whole, self.ridges = setup, dict[str | None, float]()

    @cached_property
    def further(self) -> dict[str, Setup]:
        """The same images, read by the other vision-language models."""
        models, count = self.config.further_vlms, self.config.validation_per_class
        read = [hold_out(read_by(self.whole, vlm, self.run.accelerator), count) for vlm in models]
        return dict(zip(space_labels(models), read, strict=True))

    def reader(self, name: str = "start", label: str | None = None) -> Setup:
        """The same images, with the features of a backbone kept in a folder of the run."""
        own = self.setup if label is None else self.further[label]
        return replace(own, passes=replace(own.passes, cache=str(self.run.folder / "features" / name)))

    @cached_property
    def start(self) -> FittedTranslator:
        """The loop's translator."""
        own = self.reader()
        return own.fit(*loop_bank(own.splits, own.embeddings["bank"]), self.config.translator.ridge)

    def ridge(self, label: str | None = None) -> float:
        """The auditor's of the start, one for all arms, or a ratio would be of two scales."""
        if label not in self.ridges:
            own, given = self.reader("start", label), self.config.translator.ridge
            fitted = given or own.fit(own.splits.audit, own.embeddings["audit"], None).translator.info.ridge
            self.ridges[label] = fitted
        return self.ridges[label]

    def inside(self, work: Work) -> Run:
        """The run, in an arm's own folder."""
        own = copy.copy(self.run)
        own.folder = work.folder
        return own

    def make(self, work: Work) -> tuple[Classifier, LinearTranslator]:
        """Train or edit a copy of the starting classifier; return also the loop's translator of it."""
        config, setup, make, fitted = work.config, self.setup, work.arm.make, self.start
        if make == "train":
            track(self.run.accelerator, work.name, config)
            return train_arm(work.name, config, setup, fitted, self.inside(work))
        classifier = copy.deepcopy(setup.classifier)
        if work.source is not None:
            classifier.model.load_state_dict(load_file(work.source.folder / "weights.safetensors"))
        if make == "align":
            align_head_(classifier, fitted.translator, setup.texts, fitted.statistics)
        elif make == "average":
            classifier = interpolate_weights(setup.classifier, classifier, 0.5)
        elif make == "drop":
            classifier = drop_null(classifier, spare=1, invariance=config.model.invariance)
        made, bank = replace(setup, classifier=classifier), loop_bank(setup.splits, setup.embeddings["bank"])
        return classifier, made.fit(*bank, fitted.translator.info.ridge).translator


def make_and_measure(study: Study, work: Work) -> Measured:
    """Make one arm, keep its weights and measure it; the rows by a further model have its label in the column "by"."""
    main = study.run.accelerator.is_main_process
    classifier, loop = study.make(work)
    if main:
        write_tensors(work.folder / "weights.safetensors", classifier.model.state_dict())
    features = work.name if work.trained else "start"
    setup = replace(study.reader(features), classifier=classifier)
    auditor, scores = audit(setup, loop, study.ridge())
    rows, found = measure_arm(setup, auditor, scores, ood=study.config.ood)
    tables = [rows.assign(by="")]
    for label in study.further:
        read = replace(study.reader(features, label), classifier=classifier)
        tables.append(audit(read, None, study.ridge(label))[1][0].assign(by=label))
    if main and work.trained:
        shutil.rmtree(setup.passes.cache or "", ignore_errors=True)
    return pd.concat(tables, ignore_index=True), found


def report(study: Study, found: list[tuple[Work, Measured]]) -> None:
    """Compare the arms with the reference and write the study's report."""
    config, run, setup = study.config, study.run, study.setup
    arms = summarize_study(found, config.reference, config.claim)
    facts = {"images": len(setup.splits.test), "classes": len(setup.splits.class_names)}
    facts |= {"auditor_images": len(setup.splits.audit), "features": setup.classifier.feature_dim}
    pareto = save_pareto(arms, config.reference, run.folder / "plots" / "pareto.png")
    track(run.accelerator, "report", config)
    log_figures(run.accelerator, [pareto])
    held = pd.DataFrame([{"arm": arm["arm"], **arm["validation"]} for arm in arms if arm["validation"]])
    against, read = f"Against {config.reference}", [(label, ratio_table(arms, label)) for label in study.further]
    sections = [Section(against, [ratio_table(arms), RATIOS, pareto])]
    sections += [Section(f"{against}, by {label}", [table, FURTHER]) for label, table in read]
    sections.append(Section("The figures themselves", [arms_table(arms, MAIN), READING]))
    if len(held):
        sections.append(Section("By the validation images", [held.filter(["arm", "images", *MAIN]), VALIDATION]))
    sections.append(Section("Side effects", [arms_table(arms, SIDE)]))
    sections.append(Section("The arms", [pd.DataFrame(arms)[["arm", "role", "make", "note"]]]))
    write_report(
        run,
        title=f"{run.folder.name}: {len(arms)} arms",
        verdict=study_verdict(arms, config.reference, config.claim, **facts),
        warnings=study_warnings(arms),
        sections=sections,
        figures={"arms": arms, "reference": config.reference, **facts},
        rows=pd.concat([rows.assign(model=f"{work.arm.name}, seed {work.seed}") for work, (rows, _) in found]),
    )


def arms_table(arms: list[Summary], titles: dict[str, str]) -> pd.DataFrame:
    """Some figures of every arm, with 95 % intervals over images and the standard deviation over seeds."""
    titles = {key: title for key, title in titles.items() if any(key in arm["mean"] for arm in arms)}

    def cell(arm: Summary, key: str) -> str:
        value, spread, ends = arm["mean"].get(key), arm["spread"].get(key), arm["intervals"].get(key)
        shown = number(value, 3) if ends is None else interval(value, ends[0], ends[1], 3)
        return shown if spread is None or np.isnan(spread) else f"{shown} ± {number(spread, 3)}"

    names = [arm["arm"] + (" (front)" if arm["front"] else "") for arm in arms]
    columns = {title: [cell(arm, key) for arm in arms] for key, title in titles.items()}
    return pd.DataFrame({"arm": names, "seeds": [str(len(arm["seeds"])) for arm in arms], **columns})


def ratio_table(arms: list[Summary], label: str | None = None) -> pd.DataFrame:
    """Every arm's top-1, and its figures over the reference's, paired by image; by another VLM where labelled."""
    shown, rows = {"top1": "top-1, difference", **FALLING, **STAYING, "confirmed": FIGURES["confirmed"]}, []
    for arm in arms:
        paired = arm["paired"] if label is None else arm["further"].get(label, {})
        named = {"arm": arm["arm"], "seeds": str(len(arm["seeds"])), "top-1": percent(arm["mean"]["top1"])}
        rows.append(named | {title: words(paired.get(name)) for name, title in shown.items()})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
