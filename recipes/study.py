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

from singreg.analysis.arms import Judge, measure_arm
from singreg.analysis.auditors import fit_auditors
from singreg.analysis.features import PassSettings, iterate_features
from singreg.analysis.fitting import IMAGES_PER_FEATURE
from singreg.analysis.scores import analyze_model
from singreg.analysis.side_effects import measure_dropped
from singreg.analysis.study import (
    AUDITOR,
    SECOND,
    ArmRun,
    study_verdict,
    study_warnings,
    summarize_study,
    words,
)
from singreg.checkpoints import fingerprints
from singreg.config import parse
from singreg.data.corruption import KINDS
from singreg.mlp import MLPSettings
from singreg.models.classifier import Classifier
from singreg.plots.study import save_study_plots
from singreg.report import Section, interval, log_figures, number, track, write_report
from singreg.runs import explained, start
from singreg.setup import prepare
from singreg.spaces import Space, open_spaces
from singreg.study_arms import (
    Begin,
    Shared,
    hold_out,
    known_attributes,
    make,
    measure_agreement,
    prepare_begin,
    strange_images,
)
from singreg.study_plan import (
    StudyConfig,
    StudyRun,
    Work,
    described,
    keep,
    make_room,
    plan_study,
    read_back,
    save_weights,
    time_left,
)
from singreg.task import Schedule, micro_batch, refuse_batch_norm
from singreg.translator import LinearTranslator

logger = get_logger(__name__)
MAIN = {"top1": "top-1", f"AS_neg/{AUDITOR}": "AS⁻ °", f"AS_abs/{AUDITOR}": "|AS| °", f"IS/{AUDITOR}": "IS °"}
MAIN |= {"harmless_r2": "harmless R²", "audit_gap": "audit gap"}
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
        for work in works:
            if work.arm.train != "none":  # complaints come before any work
                micro_batch(work.config, accelerator)
                refuse_batch_norm(work.config, accelerator)
                Schedule(work.config, len(setup.splits.train))
        setup, validation = hold_out(setup, config.validation_per_class)
        if config.dry_run:
            dry_run(Shared(config, run, setup, validation), works)
            return
        run.open()
    with run.guarded():
        shared = Shared(config, run, setup, validation)
        found = [read_back(work) for work in works]
        if None in found:
            begin = prepare_begin(shared)
            names, audited = [setup.splits.class_names], (setup.splits.audit, setup.splits.test)
            second = open_spaces(config.further_vlms, audited, names, accelerator, setup.passes)
            for place, work in enumerate(works):
                if found[place] is None:
                    arm, left = work.arm.name, time_left(works, found)
                    logger.info("arm %d of %d: %s, seed %d%s", place + 1, len(works), arm, work.seed, left)
                    found[place] = make_and_measure(shared, begin, second, work)
        agreement = measure_agreement(shared)
        if accelerator.is_main_process:
            shutil.rmtree(run.folder / "features", ignore_errors=True)
            report(shared, [each for each in found if each is not None], agreement)
    accelerator.end_training()


def make_and_measure(shared: Shared, begin: Begin, second: Sequence[Space], work: Work) -> ArmRun:
    """Make one arm, measure it and keep both in its folder."""
    accelerator, begun = shared.run.accelerator, time.monotonic()
    if accelerator.is_main_process:
        make_room(work)
    accelerator.wait_for_everyone()
    classifier, loop, notes = make(shared, begin, work)
    if accelerator.is_main_process:
        save_weights(work, classifier)
    of_start = work.arm.train != "all" and work.source is None
    passes = shared.passes() if of_start else shared.passes(f"{work.arm.name}-{work.seed}")
    if work.arm.drop_null:
        test = shared.setup.splits.test, shared.setup.embeddings["test"]
        dropped = measure_dropped(classifier, *test, passes)
        found = described(work, figures={"top1": dropped["top1"]}, extra={**notes, **dropped})
    else:
        found = described(work, extra=notes, **measure(shared, begin, second, classifier, loop, passes))
    found = replace(found, seconds=time.monotonic() - begun)
    if accelerator.is_main_process:
        keep(work, found)
        if not of_start:
            shutil.rmtree(passes.cache or "", ignore_errors=True)
    accelerator.wait_for_everyone()
    return found


def measure(
    shared: Shared,
    begin: Begin,
    second: Sequence[Space],
    classifier: Classifier,
    loop: dict[str, LinearTranslator],
    passes: PassSettings,
) -> dict[str, Any]:
    """Fit the auditors to a finished arm and measure it on the test and the validation images."""
    config, setup = shared.config, shared.setup
    audit, mlp = setup.splits.audit, MLPSettings(seed=config.seed) if config.mlp_auditor else None
    options: dict[str, Any] = {"invariance": config.model.invariance, "settings": passes}
    fitting = {**options, "ridge": config.translator.ridge}
    info = replace(setup.info, head_hash=classifier.head_hash())
    auditors, mean = fit_auditors(classifier, audit, setup.embeddings["audit"], mlp=mlp, info=info, **fitting)
    judges = [Judge(setup.texts, setup.embeddings["test"], {"frozen": begin.loop.translator, **loop, **auditors})]
    for space in second:
        info, embeddings = space.info_for(classifier), space.embeddings
        found, _ = fit_auditors(classifier, audit, embeddings["audit"], halves=False, name=SECOND, info=info, **fitting)
        judges.append(Judge(space.texts[setup.splits.class_names], embeddings["test"], found))
    known, held = known_attributes(audit), known_attributes(setup.splits.test)
    measured = measure_arm(
        classifier,
        setup.splits.test,
        audit,
        setup.embeddings["audit"],
        judges,
        mean=mean,
        transfers=[(f"{AUDITOR} A", f"{AUDITOR} B")],
        ood=strange_images(setup.splits.bank, config.ood),
        attributes=None if known is None or held is None else (known, held),
        seed=config.seed,
        **options,
    )
    validation: dict[str, float] = {}
    if shared.validation is not None:
        only = {AUDITOR: auditors[AUDITOR]}
        _, read = analyze_model(classifier, *shared.validation, setup.texts, only, mean=mean, **options)
        scores, step = read["translators"][AUDITOR]["overall"], read["steering"][AUDITOR]["step"]
        validation = {"top1": read["top1"], "images": read["images"], "step": float("nan") if step is None else step}
        validation |= {key: scores[key] for key in ("AS_neg", "AS_abs", "IS")}
    return {"validation": validation, **vars(measured)}


def report(shared: Shared, found: list[ArmRun], agreement: list[dict[str, Any]]) -> None:
    """Compare the arms with the reference and write the study's report."""
    config, run, setup = shared.config, shared.run, shared.setup
    arms = summarize_study(found, config.reference)
    features, audit = setup.classifier.feature_dim, len(setup.splits.audit)
    facts = {"images": len(setup.splits.test), "auditor_images": audit, "features": features}
    needed = {"images_needed": IMAGES_PER_FEATURE * features}
    run.seconds.update({f"{each.arm}, seed {each.seed}": each.seconds for each in found})
    plots = save_study_plots(arms, config.reference, {**facts, **needed}, agreement, run.folder / "plots")
    track(run.accelerator, "report", config)
    log_figures(run.accelerator, plots)
    held = pd.DataFrame([{"arm": arm["arm"], **arm["validation"]} for arm in arms if arm["validation"]])
    chosen = [Section("By the validation images", [held, VALIDATION])] if shared.validation else []
    side = {"ece": "calibration error"} | {f"corrupted/{kind}": f"top-1, {kind}" for kind in KINDS}
    side |= {"ood_vim": "AUROC by ViM", "ood_null_energy": "AUROC by null energy"} if config.ood else {}
    known = [Section("Known attributes", [attribute_table(arms), KNOWN])] if config.data.source == "scenes" else []
    write_report(
        run,
        title=f"{run.folder.name}: {len(arms)} arms",
        verdict=study_verdict(arms, config.reference, config.claim, facts),
        warnings=study_warnings(arms),
        sections=[
            Section("Results", [arms_table(arms, MAIN), READING, *plots]),
            Section(f"Against {config.reference}", [ratio_table(arms), RATIOS]),
            *chosen,
            *known,
            Section("Side effects", [arms_table(arms, side)]),
            Section("The arms", [notes_table(arms)]),
        ],
        figures={"arms": arms, "reference": config.reference, "agreement": agreement, **facts, **needed},
        rows=pd.concat([e.rows.assign(model=f"{e.arm}, seed {e.seed}") for e in found if e.rows is not None]),
    )


def arms_table(arms: list[dict[str, Any]], titles: dict[str, str]) -> pd.DataFrame:
    """Some figures of every arm, with 95 % intervals over images and the standard deviation over seeds."""
    table = []
    for arm in arms:
        row = {"arm": arm["arm"] + (" (front)" if arm["front"] else ""), "seeds": str(len(arm["seeds"]))}
        for key, title in titles.items():
            value, spread, ends = arm["mean"].get(key), arm["spread"].get(key), arm["intervals"].get(key)
            row[title] = number(value, 3) if ends is None else interval(value, ends[0], ends[1], 3)
            row[title] += "" if spread is None or np.isnan(spread) else f" ± {number(spread, 3)}"
        table.append(row)
    shown: pd.DataFrame = pd.DataFrame(table)
    return shown


def ratio_table(arms: list[dict[str, Any]]) -> pd.DataFrame:
    """Every arm against the reference, paired by image, and how many aims it reaches."""
    titles = {"top1": "top-1", "AS_neg": "AS⁻", "AS_abs": "|AS|", "IS": "IS", "step": "step to IS 40°"}
    titles |= {"success25": "success at a 25 % step", f"AS_neg {SECOND}": "AS⁻, second VLM"}
    titles = {key: title for key, title in titles.items() if any(key in arm["paired"] for arm in arms)}
    shown: pd.DataFrame = pd.DataFrame(
        [
            {
                "arm": arm["arm"],
                **{title: words(arm["paired"][key]) if key in arm["paired"] else "–" for key, title in titles.items()},
                "aims reached": f"{sum(each['reached'] for each in arm['targets'])} of {len(arm['targets'])}",
            }
            for arm in arms
            if arm["paired"]
        ]
    )
    return shown


def attribute_table(arms: list[dict[str, Any]]) -> pd.DataFrame:
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


def notes_table(arms: list[dict[str, Any]]) -> pd.DataFrame:
    """What every arm is, and what to note of it."""
    table: pd.DataFrame = pd.DataFrame(arms)[["arm", "role", "train", "note"]]
    notes = [{**({"omitted": arm["omitted"]} if arm["omitted"] else {}), **arm["extra"]} for arm in arms]
    table["noted"] = ["; ".join(f"{name.replace('_', ' ')} {value}" for name, value in each.items()) for each in notes]
    return table


def dry_run(shared: Shared, works: Sequence[Work]) -> None:
    """Run one batch through the starting classifier and list the arms; nothing is written but the embeddings."""
    setup = shared.setup
    some = setup.splits.test.subset(range(min(64, len(setup.splits.test))))
    passes = replace(setup.passes, progress=False)
    batch = next(iterate_features(setup.classifier, some, setup.embeddings["test"][: len(some)], passes, "dry run"))
    print(f"one batch: features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}")
    for work in works:
        arm = work.arm
        total = Schedule(work.config, len(setup.splits.train)).total if arm.train != "none" else 0
        source = f", from {arm.weights_from}" if arm.weights_from else ""
        print(f"{arm.name}, seed {work.seed}: train {arm.train}{source}, {total} steps; {arm.note}")
    print("dry run: nothing was trained, no run folder was made")


if __name__ == "__main__":
    main()
