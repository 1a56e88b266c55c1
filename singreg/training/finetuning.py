"""The stages of a fine-tuning run: before, control, sing, report. Each finished stage is stored and not repeated on resume."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.logging import get_logger
from torch import Tensor

from singreg.analysis.comparison import compare_arms, report_warnings, verdict
from singreg.analysis.features import PassSettings, iterate_features
from singreg.analysis.fitting import FittedTranslator
from singreg.analysis.results import FinetuneReport, ModelMeasurement
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.reporting.plots import save_plots
from singreg.reporting.report_files import write_report
from singreg.reporting.tables import results_table
from singreg.reporting.tensorboard import TensorBoardLog
from singreg.training.experiment import Experiment
from singreg.training.loop import ArmCallbacks, train_arm
from singreg.training.stages import FinetuneRun, Stage
from singreg.training.streaming import LoopTranslator
from singreg.training.watching import log_watched, watch
from singreg.translator import LinearTranslator, TranslatorInfo
from singreg.workbench.run import describe_machine

logger = get_logger(__name__)


class Finetuning:
    """Measure before, train and measure each arm, report. Holds what the stages share."""

    def __init__(self, run: FinetuneRun, experiment: Experiment) -> None:
        self.run, self.experiment = run, experiment
        self.accelerator, self.config = run.accelerator, run.config
        self.measurements: dict[str, ModelMeasurement] = {}
        self.loop: FittedTranslator
        self.image_score_ref: Tensor

    def _log(self, arm: str) -> TensorBoardLog:
        return TensorBoardLog(self.run.folder / "tensorboard" / arm, enabled=self.accelerator.is_main_process)

    def measure_before(self) -> None:
        """Fit the loop's translator and the auditor on the starting classifier and measure it (stage "before").

        Raises:
            OtherRunError: the run is resumed on other pictures or models.
        """
        self.run.begin(self.experiment.inputs())

        def compute() -> Stage:
            classifier = self.experiment.classifier.eval()
            loop = self.experiment.fit_loop_translator(classifier)
            reference = self.experiment.reference_image_scores(classifier, loop)
            auditor = self.experiment.fit_auditor(classifier)
            measurement = self.experiment.measure(
                classifier, {"frozen": loop.translator, "auditor": auditor.translator}, auditor.mean
            )
            tensors = {
                "matrix": loop.translator.matrix,
                "offset": loop.translator.offset,
                "mean": loop.mean,
                "class_means": loop.class_means,
                "image_score_ref": reference,
                "auditor_matrix": auditor.translator.matrix,
                "auditor_offset": auditor.translator.offset,
            }
            return measurement, tensors, {"info": asdict(loop.translator.info)}

        measurement, tensors, extra = self.run.stage("before", compute)
        device = self.accelerator.device
        translator = LinearTranslator(tensors["matrix"], tensors["offset"], TranslatorInfo(**extra["info"])).to(device)
        self.loop = FittedTranslator(translator, tensors["mean"].to(device), tensors["class_means"].to(device))
        self.image_score_ref = tensors["image_score_ref"].to(device)
        self.measurements["before"] = measurement
        if self.accelerator.is_main_process:
            translator.save(self.run.folder / "translator-before.safetensors")

    def train_and_measure(self, arm: str) -> None:
        """Train one arm from the common start and measure it with the frozen, the loop's and a fresh translator."""

        def compute() -> Stage:
            classifier = self.experiment.fresh_classifier()
            sing = self.experiment.sing_loss(classifier, self.loop, self.image_score_ref) if arm == "sing" else None
            keeper = self.experiment.loop_translator(self.loop.translator)
            log = self._log(arm)
            classifier = train_arm(
                arm,
                classifier,
                sing,
                self.experiment.parts.train,
                self.config,
                self.accelerator,
                self.run.folder / "checkpoints" / arm,
                self._callbacks(log, keeper),
                resume=True,
            )
            log.close()
            auditor = self.experiment.fit_auditor(classifier)
            translators = {"frozen": self.loop.translator}
            if sing is not None:
                translators["loop"] = keeper.current(sing)
            translators["auditor"] = auditor.translator
            measurement = self.experiment.measure(classifier, translators, auditor.mean)
            self._export(arm, classifier, auditor.translator)
            matrices = {f"{name}_matrix": t.matrix for name, t in translators.items()}
            offsets = {f"{name}_offset": t.offset for name, t in translators.items()}
            return measurement, {**matrices, **offsets}, {}

        self.measurements[arm] = self.run.stage(arm, compute)[0]
        if self.accelerator.is_main_process:  # the finished model is in its folder; the arm's checkpoints have done their work
            shutil.rmtree(self.run.folder / "checkpoints" / arm, ignore_errors=True)

    def _export(self, arm: str, classifier: Classifier, auditor: LinearTranslator) -> None:
        """The trained model as a timm folder: model/ for the regularised arm, model-control/ for the control."""
        if not self.accelerator.is_main_process:
            return
        classifier.save(self.run.folder / ("model" if arm == "sing" else "model-control"))
        auditor.save(self.run.folder / f"translator-after{'' if arm == 'sing' else '-control'}.safetensors")

    def _callbacks(self, log: TensorBoardLog, keeper: LoopTranslator) -> ArmCallbacks:
        def figures(step: int, values: dict[str, float]) -> None:
            if values:
                log.scalars({f"train/{name}": value for name, value in values.items()}, step)

        def epoch_end(step: int, classifier: Classifier, sing: SingLoss | None) -> None:
            # Both arms by the frozen translator, or their curves laid over one another would measure different things.
            translators = {"watch": self.loop.translator}
            if sing is not None:
                translators["watch_loop"] = keeper.current(sing)
            for tag, watched in watch(self.experiment, classifier, translators).items():
                log_watched(log, tag, watched, step)
            log.histograms({"head/weight": classifier.weight}, step)

        return ArmCallbacks(figures, epoch_end, keeper.refresh, keeper if keeper.stateful else None)

    def report(self) -> FinetuneReport | None:
        """Write the run's files and say what was found (main process only; no shapes)."""
        if not self.accelerator.is_main_process:
            return None
        report = FinetuneReport(
            measurements=self.measurements,
            comparisons=compare_arms(self.measurements),
            audit_gap=_audit_gap(self.measurements["sing"]),
            verdict=verdict(
                self.measurements,
                images_per_feature=self.config.auditor.images_per_feature,
                trained=self.config.training.epochs > 0,
            ),
            warnings=report_warnings(self.measurements, self.config.auditor.images_per_feature),
            settings={**asdict(self.config), "command": " ".join(["recipes/finetune.py", *sys.argv[1:]])},
            machine=describe_machine(self.accelerator),
            seconds=self.run.seconds,
            class_names=list(self.experiment.parts.class_names),
        )
        plots = save_plots(report, self.run.folder / "plots")
        write_report(report, self.run.folder, plots)
        _summary_to_tensorboard(report, self.run.folder, plots)
        print(results_table(report, compact=True))
        print("\n".join([*report.verdict, *report.warnings]))
        print(f"report: {self.run.folder / 'report.md'}\nmodel:  {self.run.folder / 'model'}")
        return report


def _audit_gap(measurement: ModelMeasurement) -> float | None:
    """Auditor AS⁻ over the loop's own AS⁻ (METHOD section 8.6); above 1.5 the loss was gamed. No unit."""
    loop = measurement.translators["loop"].overall["AS_neg"]
    return measurement.translators["auditor"].overall["AS_neg"] / loop if loop > 0 else None


def _summary_to_tensorboard(report: FinetuneReport, folder: Path, plots: dict[str, Path]) -> None:
    """The final table as text, plots as images, score histograms and hparams, in the tab "summary"."""
    log = TensorBoardLog(folder / "tensorboard" / "summary")
    # As preformatted text: TensorBoard squeezes a Markdown table of this width into slivers.
    log.text("results", "\n".join(f"    {line}" for line in results_table(report, compact=True).splitlines()), 0)
    log.text("verdict", "\n\n".join([*report.verdict, *report.warnings]), 0)
    for name, path in plots.items():
        log.image_file(f"plots/{name}", path, 0)
    final: dict[str, float] = {}
    for step, (stage, measurement) in enumerate(report.measurements.items()):
        for name in ("AS", "IS"):
            log.histograms({f"{name}/auditor/{stage}": torch.from_numpy(measurement.rows[f"{name}/auditor"])}, step)
        overall = measurement.translators["auditor"].overall
        final |= {f"final/{stage}/{key}": overall[key] for key in ("AS_neg", "AS_abs", "IS", "kappa")}
        final[f"final/{stage}/top1"] = measurement.top1
    log.hparams(report.settings, final)
    log.close()


def dry_run(experiment: Experiment) -> None:
    """Run one batch through everything and print shapes and memory; nothing is written but the embeddings (no shapes).

    Head, parts and steps were told before the pictures were embedded (see `Experiment.build`).
    """
    classifier = experiment.fresh_classifier()
    some = experiment.parts.bank.subset(range(min(64, len(experiment.parts.bank))))
    settings = PassSettings(len(some), 0, progress=False)
    batch = next(iter(iterate_features(classifier, some, experiment.embeddings["bank"][: len(some)], settings, "dry run")))
    width, dim = classifier.feature_dim, experiment.texts.shape[1]
    parameters = sum(p.numel() for p in classifier.parameters())
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    statistics = 2 * 8 * (width * width + width * dim) / 2**20
    training = 4 * (parameters + 3 * trained) / 2**20
    if experiment.accelerator.is_main_process:
        print(f"classifier {classifier.tag}: {classifier.num_classes} classes, {width} features, {trained:,} of {parameters:,} trained")
        print(f"one batch: features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}, embeddings {dim}-d")
        print(f"memory: weights and optimiser {training:.0f} MiB, translator statistics {statistics:.0f} MiB, beside activations")
        print("dry run: nothing was trained, no run folder was made")
