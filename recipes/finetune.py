"""Fine-tune a classifier with SingLoss and report AS/IS before and after, next to a plain fine-tuning control.

accelerate launch recipes/finetune.py --config configs/demo.yaml
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace

import pandas as pd
from accelerate import Accelerator
from singreg.analysis.scores import analyze_model
from singreg.plots.scores import save_score_plots
from torch import Tensor

from singreg.analysis.comparison import Measured, audit_gap, compare_arms, finetune_warnings, no_claim, verdict
from singreg.analysis.features import iterate_features
from singreg.analysis.fitting import FittedTranslator, fit_on_split, reference_image_scores
from singreg.checkpoints import Checkpoints, Stage, fingerprints, refuse_other_inputs, stage
from singreg.config import FinetuneConfig, parse
from singreg.data.datasets import Splits
from singreg.loop import finish, follow, own_random_numbers, prepare_arm, resume, save, steps
from singreg.loop_translator import LoopTranslator
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.report import Section, interval, log, log_figures, percent, track, write_report
from singreg.ridge import DEFAULT_RIDGES
from singreg.runs import Run, StopRequest, explained, start
from singreg.setup import Setup, prepare
from singreg.task import Schedule, make_sing, micro_batch, refuse_batch_norm
from singreg.translator import LinearTranslator, TranslatorInfo
from singreg.watching import log_watched, watch

STAGES = {"before": "before", "control": "control (cross-entropy)", "sing": "SingLoss"}
READING = (
    "Means over the same held-out test images, with 95 % bootstrap intervals over classes and their images. AS⁻: what "
    "removing the null space takes from the true class (leakage, lower is better). IS: how far it moves the image's "
    "meaning (permitted variety, to be kept). frozen: the translator fitted before training; loop: the one the loss saw "
    "last; auditor: fitted afterwards on images that training never used. Believe the auditor."
)
PAIRED = "Ratios are of means; intervals are paired by image. Spread over seeds is not in them."


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, measure before, train and measure both arms, report."""
    config = parse(FinetuneConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "finetune")
        if not config.dry_run:
            run.check()
        micro_batch(config, accelerator.gradient_accumulation_steps, accelerator.num_processes)
        refuse_batch_norm(config, accelerator)

        def tell(splits: Splits, classifier: Classifier) -> None:
            tell_steps(config, accelerator, splits, classifier)

        setup = prepare(config, config.model, accelerator, before_embedding=tell)
        if config.dry_run:
            dry_run(config, setup, accelerator)
            return
        run.open()
    with run.guarded():
        refuse_other_inputs(run, fingerprints(setup))
        before = stage(run, "before", lambda: measure_before(config, setup, run))
        found = {"before": before}
        for arm in ("control", "sing"):
            found[arm] = stage(run, arm, lambda arm=arm: train_and_measure(arm, config, setup, before, run))
            if accelerator.is_main_process:  # the finished model is in its folder
                shutil.rmtree(run.folder / "checkpoints" / arm, ignore_errors=True)
        report(config, setup, run, {name: (each.rows, each.figures) for name, each in found.items()})
    accelerator.end_training()


def measure_before(config: FinetuneConfig, setup: Setup, run: Run) -> Stage:
    """Fit the loop's translator and the auditor on the starting classifier and measure it with both."""
    classifier = setup.classifier.eval()
    loop = fit(config, setup, classifier, "bank")
    reference = reference_image_scores(
        classifier, setup.splits.bank, setup.embeddings["bank"], loop,
        invariance=config.model.invariance, settings=setup.passes,
    )  # fmt: skip
    auditor = fit(config, setup, classifier, "audit")
    translators = {"frozen": loop.translator, "auditor": auditor.translator}
    rows, figures = measure(config, setup, classifier, translators, auditor.mean)
    if run.accelerator.is_main_process:
        loop.translator.save(run.folder / "translator-before.safetensors")
    tensors = {"matrix": loop.translator.matrix, "offset": loop.translator.offset, "mean": loop.mean}
    tensors |= {"class_means": loop.class_means, "image_score_ref": reference}
    return Stage(rows, figures, tensors, asdict(loop.translator.info))


def train_and_measure(arm: str, config: FinetuneConfig, setup: Setup, before: Stage, run: Run) -> Stage:
    """Train one arm from the common start; measure it with the frozen, the loop's and a fresh translator."""
    device = run.accelerator.device
    tensors = {name: tensor.to(device) for name, tensor in before.tensors.items()}
    frozen = LinearTranslator(tensors["matrix"], tensors["offset"], TranslatorInfo(**before.notes))
    classifier = copy.deepcopy(setup.classifier).tune(config.model.tuning, batch_norm=config.model.batch_norm)
    sing = None
    if arm == "sing":
        fitted = FittedTranslator(frozen, tensors["mean"], tensors["class_means"])
        accumulation, images = run.accelerator.gradient_accumulation_steps, len(setup.splits.train)
        sing = make_sing(
            config,
            classifier,
            fitted,
            setup.texts,
            tensors["image_score_ref"],
            images=images,
            accumulation=accumulation,
        )
    classifier, translators = train(arm, classifier, sing, frozen, config, setup, run)
    auditor = fit(config, setup, classifier, "audit")
    rows, figures = measure(config, setup, classifier, {**translators, "auditor": auditor.translator}, auditor.mean)
    if run.accelerator.is_main_process:
        ending = "" if arm == "sing" else "-control"
        classifier.save(run.folder / f"model{ending}")
        auditor.translator.save(run.folder / f"translator-after{ending}.safetensors")
    return Stage(rows, figures)


def train(
    name: str,
    classifier: Classifier,
    sing: SingLoss | None,
    frozen: LinearTranslator,
    config: FinetuneConfig,
    setup: Setup,
    run: Run,
) -> tuple[Classifier, dict[str, LinearTranslator]]:
    """Train a classifier with cross-entropy, and SingLoss where given; return it with the frozen and loop's translator."""
    accelerator, invariance = run.accelerator, config.model.invariance
    keeper = LoopTranslator(
        frozen, setup.splits.bank, setup.embeddings["bank"], config.translator, accelerator,
        invariance=invariance, passes=setup.passes,
    )  # fmt: skip
    arm = prepare_arm(name, classifier, sing, keeper, setup.splits.train, config, accelerator)
    checkpoints = Checkpoints(run.folder / "checkpoints" / name, accelerator)
    track(accelerator, name, config)

    def translators() -> dict[str, LinearTranslator]:
        return {"frozen": frozen} if sing is None else {"frozen": frozen, "loop": keeper.current(sing)}

    with own_random_numbers(accelerator, config.seed), StopRequest(accelerator) as stop:
        for step in steps(arm, resume(arm, checkpoints)):
            log(accelerator, {f"train/{figure}": value for figure, value in step.figures.items()}, step.number)
            if stop.came():  # looked for before the translator's refresh, which may encode a million images
                save(arm, checkpoints, replace(step.position, due=True))
                stop.end()
            follow(arm, step)
            if step.ends_epoch:
                for tag, scores in watch(classifier, setup, translators(), invariance=invariance).items():
                    log_watched(accelerator, f"watch/{tag}", scores, step.number)
            if step.ends_epoch or step.number % config.training.checkpoint_every == 0:
                save(arm, checkpoints, step.position)
    return finish(arm), translators()


def fit(config: FinetuneConfig, setup: Setup, classifier: Classifier, split: str) -> FittedTranslator:
    """Fit a translator on the bank (the loop's) or on the audit split (the auditor), each with a ridge of its own."""
    ridge = config.translator.ridge
    return fit_on_split(
        classifier,
        getattr(setup.splits, split),
        setup.embeddings[split],
        ridges=DEFAULT_RIDGES if ridge is None else (ridge,),
        standardize="blocks",
        invariance=config.model.invariance,
        info=replace(setup.info, head_hash=classifier.head_hash()),
        settings=setup.passes,
        description="fitting the auditor" if split == "audit" else "fitting the loop's translator",
    )


def measure(
    config: FinetuneConfig, setup: Setup, classifier: Classifier, translators: dict[str, LinearTranslator], mean: Tensor
) -> Measured:
    """Measure a classifier on the test split by several translators; the mean centres the removal."""
    return analyze_model(
        classifier, setup.splits.test, setup.embeddings["test"], setup.texts, translators,
        mean=mean, invariance=config.model.invariance, settings=setup.passes,
    )  # fmt: skip


def report(config: FinetuneConfig, setup: Setup, run: Run, measured: dict[str, Measured]) -> None:
    """Compare the arms and write the run's report (main process only)."""
    if not run.accelerator.is_main_process:
        return
    comparisons = compare_arms(measured)
    plots = save_score_plots(measured, setup.splits.class_names, run.folder / "plots")
    log_figures(run.accelerator, plots)
    table = results_table(measured)
    paired = comparisons.assign(
        value=[interval(*row, digits=3) for row in comparisons[["value", "low", "high"]].to_numpy()]
    )
    sections = [
        Section("Results", [table, READING, *plots[:1]]),
        Section("SingLoss against the control", [paired[["name", "translator", "value", "unit"]], PAIRED]),
        Section("Images and classes", plots[1:]),
    ]
    write_report(
        run,
        title=f"{run.folder.name}: null-space leakage before and after fine-tuning",
        verdict=verdict(measured, comparisons, trained=config.training.epochs > 0),
        warnings=finetune_warnings(measured["before"][1]),
        sections=sections,
        figures={
            "measurements": {name: figures for name, (_, figures) in measured.items()},
            "comparisons": comparisons.to_dict("records"),
            "audit_gap": audit_gap(measured["sing"][1]),
            "class_names": setup.splits.class_names,
        },
        rows=pd.concat([rows.assign(model=name) for name, (rows, _) in measured.items()]),
    )


def results_table(measured: dict[str, Measured]) -> pd.DataFrame:
    """Return the report's first table: top-1, AS⁻, |AS| and IS of every model by every translator, with intervals."""
    rows = []
    for stage_name, (_, figures) in measured.items():
        for translator, scores in figures["translators"].items():
            row = {"model": STAGES[stage_name], "translator": translator, "top-1": percent(figures["top1"])}
            for key, title in {"AS_neg": "AS⁻ °", "AS_abs": "|AS| °", "IS": "IS °"}.items():
                row[title] = interval(scores["overall"][key], *scores["intervals"][key])
            rows.append(row)
    return pd.DataFrame(rows)


def tell_steps(config: FinetuneConfig, accelerator: Accelerator, splits: Splits, classifier: Classifier) -> None:
    """Complain of too few images for a batch; in a dry run say how many steps there would be and if a claim is possible."""
    schedule = Schedule.from_config(config, len(splits.train))
    if config.dry_run and accelerator.is_main_process:
        refreshes = f"translator refreshed after {list(schedule.refresh_at)}"
        print(f"steps: {schedule.total} ({schedule.steps_per_epoch} an epoch), {refreshes}")
        print(no_claim(len(splits.audit), classifier.feature_dim) or "enough images for the auditor", flush=True)


def dry_run(config: FinetuneConfig, setup: Setup, accelerator: Accelerator) -> None:
    """Run one batch through the classifier and print shapes and memory; nothing is written but the embeddings."""
    classifier = setup.classifier.tune(config.model.tuning, batch_norm=config.model.batch_norm)
    some = setup.splits.bank.subset(range(min(64, len(setup.splits.bank))))
    passes = replace(setup.passes, progress=False)
    batch = next(iter(iterate_features(classifier, some, setup.embeddings["bank"][: len(some)], passes, "dry run")))
    width, dim = classifier.feature_dim, setup.texts.shape[1]
    parameters = sum(p.numel() for p in classifier.parameters())
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    memory = 4 * (parameters + 3 * trained) / 2**20, 2 * 8 * (width * width + width * dim) / 2**20
    if accelerator.is_main_process:
        print(
            f"{classifier.tag}: {classifier.num_classes} classes, {width} features, {trained:,} of {parameters:,} trained"
        )
        print(
            f"one batch: features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}, embeddings {dim}-d"
        )
        print("memory: weights and optimiser %.0f MiB, translator statistics %.0f MiB, beside activations" % memory)
        print("dry run: nothing was trained, no run folder was made")


if __name__ == "__main__":
    main()
