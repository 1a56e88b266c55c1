"""Fine-tune a classifier with SingLoss and report AS/IS before and after, next to a plain fine-tuning control.

accelerate launch --config_file configs/accelerate/cpu.yaml recipes/finetune.py --config configs/demo.yaml
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from singreg.config import FinetuneConfig, parse

if __name__ == "__main__":  # --help and mistakes are answered before the seconds that these imports take
    parse(FinetuneConfig, description=__doc__)

import pandas as pd
from huggingface_hub import HfApi, get_token
from safetensors.torch import load_file

from singreg.analysis.comparison import Measured, compare_rows, finetune_warnings, no_claim, verdict
from singreg.analysis.features import FittedTranslator
from singreg.data.splits import Splits
from singreg.loop import CHECKPOINT_EVERY, Arm, Validation, hold_out, own_random_numbers, validation_images
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.plots.scores import DROPPED, STAGES, finetune_sections, plot_finetune
from singreg.report import log, log_figures, log_text, track, write_model_card, write_report
from singreg.runs import Run, StopRequest, explained, fingerprints, refuse_other_inputs, stage, start
from singreg.setup import Setup, prepare
from singreg.tables import AUDIT, audit_table
from singreg.task import LoopTranslator, Schedule, describe_training, loop_bank, loss_embeddings, make_sing
from singreg.translator import LinearTranslator
from singreg.utils import progress


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, measure before, train and measure both arms, report."""
    config = parse(FinetuneConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "finetune").check()
        if config.push_to_hub and get_token() is None:
            raise ValueError("push_to_hub: there is no token of the hub; log in with `hf auth login` or set HF_TOKEN")
        setup = hold_out(prepare(config, accelerator, before_embedding=partial(check, config, run)))
        if config.dry_run:
            return
        run.open()
    with run.guarded():
        refuse_other_inputs(run, fingerprints(setup))
        fitted = start_translator(config, setup, run)
        stages = {"before": stage(run, "before", lambda: audit(setup, fitted.translator, config.translator.ridge)[1])}
        before = stages["before"][1]
        for arm in ("control", "sing"):
            stages[arm] = stage(run, arm, partial(train_and_measure, arm, config, setup, fitted, before, run))
            if accelerator.is_main_process:  # the finished model is in its folder
                shutil.rmtree(run.folder / "checkpoints" / arm, ignore_errors=True)
        stages["dropped"] = stage(run, "dropped", partial(measure_dropped, setup, before, run))
        if accelerator.is_main_process:
            report(config, setup, run, stages)
            if config.push_to_hub:
                push(config.push_to_hub, run)
    accelerator.end_training()


def audit(setup: Setup, loop: LinearTranslator | None, ridge: float | None) -> tuple[FittedTranslator, Measured]:
    """Fit the auditor on images that training never uses and measure the test split with it, and with the loop's."""
    auditor = setup.fit(setup.splits.audit, setup.embeddings["audit"], ridge)
    judges = {**({} if loop is None else {"loop": loop}), "auditor": auditor.translator}
    return auditor, setup.measure(judges, auditor.mean, auditor)


def start_translator(config: FinetuneConfig, setup: Setup, run: Run) -> FittedTranslator:
    """Fit the loop's translator on the starting classifier; a resumed run reads it back."""
    kept = run.folder / "checkpoints" / "translator.safetensors"
    if not kept.is_file():
        with run.timed("translator"):
            fitted = setup.fit(*loop_bank(setup.splits, setup.embeddings["bank"]), config.translator.ridge)
        if run.accelerator.is_main_process:
            fitted.translator.save(run.folder / "translator-before.safetensors")
            fitted.save(kept)
        run.accelerator.wait_for_everyone()
    return FittedTranslator.load(kept, run.accelerator.device)


def train_and_measure(
    name: str, config: FinetuneConfig, setup: Setup, fitted: FittedTranslator, before: dict[str, Any], run: Run
) -> Measured:
    """Train one arm from the common start and measure it with the loop's translator and a fresh auditor."""
    given = config if name == "sing" else replace(config, loss=replace(config.loss, weight=0.0))
    track(run.accelerator, name, given, headline(before))
    log(run.accelerator, headline(before), 0)
    classifier, loop = train_arm(name, given, setup, fitted, run)
    ridge = before["translators"]["auditor"]["ridge"]  # one for all stages, or a ratio would be of two scales
    auditor, measured = audit(replace(setup, classifier=classifier), loop, ridge)
    end = Schedule(config, len(setup.splits.train)).total
    for step in (end, end + 1):  # twice: TensorBoard takes a single lowest or highest point for an outlier and hides it
        log(run.accelerator, headline(measured[1]), step)
    if run.accelerator.is_main_process:
        ending = "" if name == "sing" else "-control"
        classifier.save(run.folder / f"model{ending}")
        auditor.translator.save(run.folder / f"translator-after{ending}.safetensors")
    return measured


def measure_dropped(setup: Setup, before: dict[str, Any], run: Run) -> Measured:
    """Measure the baseline to beat: the control's export with its null space dropped, which costs no training."""
    control = copy.deepcopy(setup.classifier)
    control.model.load_state_dict(load_file(run.folder / "model-control" / "model.safetensors"))
    dropped = drop_null(control, spare=1, invariance=setup.model.invariance)
    return audit(replace(setup, classifier=dropped), None, before["translators"]["auditor"]["ridge"])[1]


def train_arm(
    name: str, config: FinetuneConfig, setup: Setup, fitted: FittedTranslator, run: Run
) -> tuple[Classifier, LinearTranslator]:
    """Train a copy of the starting classifier, with SingLoss unless its weight is 0.

    `fitted` is the loop's translator on the start. Returns also the one that the loop ends with.
    """
    own = replace(setup, classifier=copy.deepcopy(setup.classifier).tune(config.model.tuning))
    sing = make_sing(config, own, fitted, run.accelerator.gradient_accumulation_steps) if config.loss.weight else None
    keeper = LoopTranslator(fitted, own, loss_embeddings(config, setup), sing)
    (keeper.refresh if config.loss.placebo == "shuffled" else keeper.refit)()
    train(Arm(name, keeper, config, run))
    # Of the control, whose loop reads nothing, a translator of the same kind: each arm by its own reading.
    own_reading = own.fit(*keeper.bank, fitted.translator.info.ridge).translator if sing is None else keeper.current
    return own.classifier, own_reading


def train(arm: Arm) -> None:
    """Train an arm's classifier in place with cross-entropy, and SingLoss where it has it; it ends in eval mode.

    It ends with the last weights, or with the best by the validation images where that is asked for.
    """
    accelerator, keeper, validation = arm.accelerator, arm.keeper, Validation(arm)
    with own_random_numbers(accelerator, arm.config.seed), StopRequest(accelerator) as stop:
        start, told = arm.checkpoints.load_latest(seed=arm.config.seed), dict[str, str]()
        steps = () if validation.gives_up(start.step) else arm.steps(start)
        if not start.step:
            told |= validation.look(keeper.current, 0)
        bar: dict[str, Any] = {"total": arm.schedule.total, "initial": start.step, "told": told}
        bar["enabled"] = accelerator.is_local_main_process
        for position, figures in progress(steps, f"training {arm.name}", **bar):
            step, ends_epoch = position.step, position.step % arm.schedule.steps_per_epoch == 0
            log(accelerator, figures, step)
            told |= {"loss": f"{figures['train/loss']:.3f}"} if figures else {}
            if stop.came():  # looked for before the translator's refresh, which may encode a million images
                arm.checkpoints.save(replace(position, due=True))
                stop.end()
            if step in arm.schedule.refresh_at:
                keeper.refresh()
            if ends_epoch:
                told |= validation.look(keeper.current, step)
            if ends_epoch or step % CHECKPOINT_EVERY == 0:
                arm.checkpoints.save(position)
            if ends_epoch and validation.gives_up(step):
                break
    accelerator.free_memory()
    keeper.setup.classifier.eval()
    if validation.restore():
        keeper.refresh()


def report(config: FinetuneConfig, setup: Setup, run: Run, measured: dict[str, Measured]) -> None:
    """Compare the arms and write the run's report."""
    paired = compare_rows(*({config.seed: measured[arm][0]} for arm in ("sing", "control")))
    plots = plot_finetune(measured, paired, run.folder / "plots")
    figures = {name: found for name, (_, found) in measured.items()}
    said = verdict(measured, paired, trained=config.training.epochs > 0)
    if not run.accelerator.trackers:  # both arms were finished by an earlier start
        track(run.accelerator, "sing", config)
    table = audit_table({said: figures[name] for name, said in (STAGES | DROPPED).items()})
    log_text(run.accelerator, "report", [*said, table])
    log_figures(run.accelerator, plots)  # four images, with the histograms of both arms
    write_model_card(run, setup, figures["sing"], table=table, verdict=said, reading=AUDIT)
    write_report(
        run,
        title=f"{run.folder.name}: null-space leakage before and after fine-tuning",
        verdict=said,
        warnings=finetune_warnings(figures["before"]),
        sections=finetune_sections(figures, paired, plots),
        figures={"measurements": figures, "paired": paired},
        rows=pd.concat([rows.assign(model=name) for name, (rows, _) in measured.items()]),
    )


def push(repository: str, run: Run) -> None:
    """Upload the model's folder, with its card, to the hub."""
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=run.folder / "model", commit_message="Fine-tuned with SingLoss")
    print(f"uploaded     https://huggingface.co/{repository}", flush=True)


def headline(figures: dict[str, Any]) -> dict[str, float]:
    """The auditor's main figures of a stage, as trackers name them."""
    named = {name: f"auditor/{name}" for name in ("AS_neg", "AS_abs", "IS", "class_variance")}
    named |= {"top1": "test/top1", "cross 4 sd": "auditor/steered_4sd"}
    return {tag: figures["audit"][name] for name, tag in named.items()}


def check(config: FinetuneConfig, run: Run, splits: Splits, classifier: Classifier) -> None:
    """Refuse what cannot be trained before the images are embedded; in a dry run tell what training would take."""
    told = describe_training(config, run.accelerator, classifier, len(splits.train))
    held = validation_images(splits.audit)
    if config.training.best_checkpoint and not held.any():
        raise ValueError("training.best_checkpoint: expected two labelled audit images of every class")
    claim = no_claim(int((~held).sum()), classifier.feature_dim) or "enough images for the auditor"
    if config.dry_run and run.accelerator.is_main_process:
        print(f"{told}\nvalidation {held.sum()} of the audit images\n{claim}", flush=True)


if __name__ == "__main__":
    main()
