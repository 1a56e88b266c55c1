"""Study arms over seeds from one file: which null-space loss, edit or baseline does what, by the auditor.

accelerate launch recipes/study.py --config configs/study_scenes.yaml
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from accelerate.logging import get_logger

from singreg.analysis.arms import AUDITOR, Measured, measure_arm, measure_dropped
from singreg.analysis.study import Summary, study_verdict, study_warnings, summarize_study, words
from singreg.checkpoints import fingerprints
from singreg.config import parse
from singreg.data.corruption import KINDS
from singreg.plots.study import save_pareto
from singreg.report import Section, interval, log_figures, number, track, write_report
from singreg.runs import explained, start
from singreg.setup import prepare, try_one_batch
from singreg.study import Study, StudyConfig, StudyRun, Work, plan_study
from singreg.task import describe_training

logger = get_logger(__name__)
MAIN = {"top1": "top-1", f"AS_neg/{AUDITOR}": "AS⁻ °", f"AS_abs/{AUDITOR}": "|AS| °", f"IS/{AUDITOR}": "IS °"}
MAIN |= {"harmless_r2": "harmless R²", "null_probe": "null probe", "audit_gap": "audit gap"}
SIDE = {"ece": "calibration error", **{f"corrupted/{kind}": f"top-1, {kind}" for kind in KINDS}}
SIDE |= {"ood_vim": "AUROC by ViM", "ood_null_energy": "AUROC by null energy"}
PAIRED = {"top1": "top-1", "AS_neg": "AS⁻", "AS_abs": "|AS|", "IS": "IS", "step": "step to IS 40°"}
PAIRED |= {"success25": "success at a 25 % step"}
VALIDATION = "Images that serve nothing else, by the same auditor: what an arm is chosen by."
KNOWN = "R² of a scene's attribute from the null component, of R² from all features. The class is the shape."
RATIOS = "Ratios of means, paired by image and averaged over seeds, with 95 % intervals; top-1 as a difference."
READING = (
    "By the auditor, means over the test images; ± is the standard deviation over seeds, in brackets the 95 % interval "
    "over classes and their images. AS⁻: what removing the null space takes from the true class (leakage, lower is "
    "better). IS: how far it moves the image's meaning (to be kept). Audit gap: the auditor's AS⁻ over that of the "
    "translator the loss saw. Front: no arm is better in both top-1 and AS⁻."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, make and measure every arm that is not finished, report."""
    config = parse(StudyConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = StudyRun(config, accelerator, "study")
        if not config.dry_run:
            run.check()
        setup = prepare(config, config.model, accelerator)
        works = plan_study(config, fingerprints(setup))
        for work in works:  # complaints come before any work
            arm, told = work.arm, "no training"
            if arm.train != "none":
                told = describe_training(work.config, accelerator, setup.classifier, len(setup.splits.train))
            if config.dry_run and accelerator.is_main_process:
                source = f", from {arm.weights_from}" if arm.weights_from else ""
                print(f"{arm.name}, seed {work.seed}: train {arm.train}{source}; {told.splitlines()[0]}; {arm.note}")
        study = Study(config, run, setup)
        if config.dry_run:
            try_one_batch(setup)
            return
        run.open()
    with run.guarded():
        found = [work.read_back() for work in works]
        for place, work in enumerate(works):
            if found[place] is None:
                logger.info("arm %d of %d: %s, seed %d", place + 1, len(works), work.arm.name, work.seed)
                found[place] = make_and_measure(study, work)
        if accelerator.is_main_process:
            shutil.rmtree(run.folder / "features", ignore_errors=True)
            report(study, [(work, each) for work, each in zip(works, found, strict=True) if each is not None])
    accelerator.end_training()


def make_and_measure(study: Study, work: Work) -> Measured:
    """Make one arm, measure it and keep both in its folder."""
    config, accelerator, begun = study.config, study.run.accelerator, time.monotonic()
    if accelerator.is_main_process:
        work.make_room()
    accelerator.wait_for_everyone()
    classifier, translators, notes = study.make(work)
    from_start = work.arm.train != "all" and work.source is None
    setup = replace(study.setup, passes=study.passes("start" if from_start else f"{work.arm.name}-{work.seed}"))
    if work.arm.drop_null:
        found = measure_dropped(classifier, (setup.splits.test, setup.embeddings["test"]), setup.passes)
    else:
        options: dict[str, Any] = {"ridge": config.translator.ridge, "invariance": config.model.invariance}
        options |= {"ood": config.ood, "seed": config.seed}
        found = measure_arm(classifier, setup, translators, study.validation, **options)
    found = replace(found, extra=notes, seconds=time.monotonic() - begun)
    if accelerator.is_main_process:
        work.keep(found)
        if not from_start:
            shutil.rmtree(setup.passes.cache or "", ignore_errors=True)
    accelerator.wait_for_everyone()
    return found


def report(study: Study, found: list[tuple[Work, Measured]]) -> None:
    """Compare the arms with the reference and write the study's report."""
    config, run, setup = study.config, study.run, study.setup
    arms = summarize_study(found, config.reference)
    features, audit = setup.classifier.feature_dim, len(setup.splits.audit)
    facts = {"images": len(setup.splits.test), "auditor_images": audit, "features": features}
    named = {f"{work.arm.name}, seed {work.seed}": each for work, each in found}
    run.seconds.update({name: each.seconds for name, each in named.items()})
    pareto = save_pareto(arms, config.reference, run.folder / "plots" / "pareto.png")
    track(run.accelerator, "report", config)
    log_figures(run.accelerator, [pareto])
    held = pd.DataFrame([{"arm": arm["arm"], **arm["validation"]} for arm in arms if arm["validation"]])
    sections = [
        Section("Results", [arms_table(arms, MAIN), READING, pareto]),
        Section(f"Against {config.reference}", [ratio_table(arms), RATIOS]),
        *([Section("By the validation images", [held, VALIDATION])] if len(held) else []),
        *([Section("Known attributes", [attribute_table(arms), KNOWN])] if config.data.source == "scenes" else []),
        Section("Side effects", [arms_table(arms, SIDE)]),
        Section("The arms", [pd.DataFrame(arms)[["arm", "role", "train", "note", "omitted"]]]),
    ]
    write_report(
        run,
        title=f"{run.folder.name}: {len(arms)} arms",
        verdict=study_verdict(arms, config.reference, config.claim, **facts),
        warnings=study_warnings(arms),
        sections=sections,
        figures={"arms": arms, "reference": config.reference, **facts},
        rows=pd.concat([each.rows.assign(model=name) for name, each in named.items() if each.rows is not None]),
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
    table: pd.DataFrame = pd.DataFrame({"arm": names, "seeds": [str(len(arm["seeds"])) for arm in arms], **columns})
    return table


def ratio_table(arms: list[Summary]) -> pd.DataFrame:
    """Every arm against the reference, paired by image, and how many aims it reaches."""
    arms = [arm for arm in arms if arm["paired"]]
    table: pd.DataFrame = pd.DataFrame(
        [{"arm": arm["arm"], **{k: words(v) for k, v in arm["paired"].items()}} for arm in arms]
    )
    table["aims"] = [f"{sum(aim['reached'] for aim in arm['targets'])} of {len(arm['targets'])}" for arm in arms]
    titles = {"arm": "arm", **PAIRED, "aims": "aims reached"}
    table = table[[key for key in titles if key in table]].rename(columns=titles).fillna("–")
    return table


def attribute_table(arms: list[Summary]) -> pd.DataFrame:
    """R² of the known attributes from the null component, of R² from all features, averaged over their values."""
    means = pd.DataFrame({arm["arm"]: arm["mean"] for arm in arms if not arm["omitted"]})
    null, every = (
        means.filter(like=f"{block}_r2/", axis=0)
        .groupby(lambda key: key.split("/")[1].split(":")[0], sort=False)
        .mean()
        for block in ("null_space", "features")
    )
    table: pd.DataFrame = (null.map(number) + " of " + every.map(number)).T.reset_index(names="arm")
    return table


if __name__ == "__main__":
    main()
