"""The comparison job: several classifiers on the same pictures, read in one or more vision-language spaces, in one table."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, replace

from accelerate.logging import get_logger

from singreg.analysis.chance_results import measure_chance
from singreg.analysis.chance_results import ChanceReport
from singreg.analysis.comparing.differences import FIGURES, model_differences, order_check, paired_figures
from singreg.analysis.comparing.findings import compare_findings, compare_warnings
from singreg.analysis.comparing.results import CompareReport
from singreg.analysis.features import iterate_features
from singreg.analysis.fitting_mlp import fit_mlp_on_part
from singreg.analysis.model import analyze_model
from singreg.analysis.results import ModelMeasurement
from singreg.analysis.study.agreement import translator_agreement
from singreg.evaluation.compare_bench import CompareBench, ModelBench, open_model
from singreg.evaluation.compare_config import CompareConfig, ComparedModelConfig
from singreg.evaluation.fitting import fit_translators
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.reporting.compare_report import compare_to_tensorboard, write_compare_report
from singreg.reporting.compare_tables import compare_table
from singreg.reporting.validation_tables import passport_table
from singreg.translator import Translator
from singreg.utils import sha256_of_json
from singreg.workbench.build import labels_for_head
from singreg.workbench.run import Run, describe_machine

logger = get_logger(__name__)


class Comparing:
    """Measure every model in every space, then compare and report; holds what the stages share. Angles in degrees."""

    def __init__(self, run: Run, config: CompareConfig, bench: CompareBench) -> None:
        self.run, self.config, self.bench = run, config, bench
        self.measurements: dict[str, dict[str, ModelMeasurement]] = {space.label: {} for space in bench.spaces}
        self.chance: dict[str, dict[str, ChanceReport]] = {space.label: {} for space in bench.spaces}
        self.agreement: dict[str, dict[str, float]] = {space.label: {} for space in bench.spaces}

    def measure(self) -> None:
        """One model at a time, so that memory does not grow with their number (a stage for each, by label)."""
        for model, head in zip(self.config.models, self.bench.heads, strict=True):
            if head.omitted is not None:
                logger.info("%s is left out: %s", head.label, head.omitted)
                continue
            start = time.monotonic()
            self._measure_model(model, head.label)
            self.run.seconds[head.label] = time.monotonic() - start
            gc.collect()

    def _measure_model(self, model: ComparedModelConfig, label: str) -> None:
        classifier = open_model(self.config, model, self.bench.pictures).eval()
        parts = labels_for_head(self.bench.pictures, classifier, model.resolved())
        classifier = classifier.to(self.bench.accelerator.device)
        for space in self.bench.spaces:
            logger.info("measuring %s in %s", label, space.label)
            info = replace(
                space.info, classifier=classifier.tag, head_hash=classifier.head_hash(),
                classifier_preprocessing=sha256_of_json(classifier.preprocessing),
            )  # fmt: skip
            texts = space.texts[parts.class_names]
            self._measure_in(ModelBench(classifier, parts, texts, space.embeddings, info, self.bench.settings), model, space.label, label)

    def _measure_in(self, bench: ModelBench, model: ComparedModelConfig, space: str, label: str) -> None:
        fitted = fit_translators(bench, self.config.translator, self.config.auditor, invariance=model.invariance)
        linear, auditor = fitted["fitted"].translator, fitted["auditor"]
        translators: dict[str, Translator] = {name: found.translator for name, found in fitted.items()}
        for kind in self.config.mlp:
            translators[kind] = fit_mlp_on_part(
                bench.classifier, bench.parts.bank, bench.embeddings["bank"], mlp=MLPSettings(kind=kind, seed=self.config.seed),
                normalize_targets=self.config.translator.normalize_targets, info=bench.info, settings=bench.settings,
            )  # fmt: skip
        test, embeddings = bench.parts.test, bench.embeddings["test"]
        self.measurements[space][label] = analyze_model(
            bench.classifier, test, embeddings, bench.texts, translators,
            mean=auditor.mean, invariance=model.invariance, settings=bench.settings,
        )  # fmt: skip
        null_space = NullSpace.from_weight(bench.classifier.weight, invariance=model.invariance).to(bench.texts.device)
        self.chance[space][label] = measure_chance(
            iterate_features(bench.classifier, test, embeddings, bench.settings, "chance levels"),
            texts=bench.texts, null_space=null_space, translators={"auditor": auditor.translator}, mean=auditor.mean,
            draws=self.config.chance_draws, seed=self.config.seed,
        )["auditor"]  # fmt: skip
        self.agreement[space][label] = translator_agreement(linear, auditor.translator, bench.texts)

    def report(self) -> CompareReport | None:
        """Compare, write the run's files and say what was found (main process only; no shapes)."""
        if not self.run.accelerator.is_main_process:
            return None
        config, heads = self.config, self.bench.heads
        any_measured = any(head.omitted is None for head in heads)
        figures = paired_figures(self.measurements, resamples=config.resamples, seed=config.seed) if any_measured else None
        several = figures is not None and len(figures.models) > 1
        differences = model_differences(figures) if figures is not None else []
        orders = [order_check(figures, figure) for figure in FIGURES] if figures is not None and several else []
        leakage = order_check(figures, "AS_neg") if figures is not None else None
        report = CompareReport(
            heads=heads,
            measurements=self.measurements,
            chance=self.chance,
            agreement=self.agreement,
            differences=differences,
            orders=orders,
            findings=compare_findings(figures, differences, leakage, heads),
            warnings=compare_warnings(heads, self.measurements, self.agreement, config.auditor.images_per_feature),
            settings={**asdict(config), "command": " ".join(["recipes/compare.py", *sys.argv[1:]])},
            machine=describe_machine(self.run.accelerator),
            seconds=self.run.seconds,
        )
        plot = write_compare_report(report, self.run.folder)
        compare_to_tensorboard(report, self.run.folder / "tensorboard", plot)
        print(compare_table(report, compact=True))
        print("\n".join([*report.findings, *report.warnings]))
        print(f"report: {self.run.folder / 'report.html'} (the same as report.md)")
        return report


def dry_run(config: CompareConfig, bench: CompareBench) -> None:
    """Run one batch through every model and print the passports and what would be measured; nothing is written (no shapes)."""
    lines = []
    for model, head in zip(config.models, bench.heads, strict=True):
        if head.omitted is not None:
            lines.append(f"{head.label}: left out, {head.omitted}")
            continue
        classifier = open_model(config, model, bench.pictures).to(bench.accelerator.device)
        some = bench.pictures.test.subset(range(min(config.batch_size, len(bench.pictures.test))))
        settings = replace(bench.settings, cache=None, progress=False)
        embeddings = bench.spaces[0].embeddings["test"][: len(some)]
        batch = next(iter(iterate_features(classifier, some, embeddings, settings, "dry run")))
        lines.append(f"{head.label}: one batch gives features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}")
    if not bench.accelerator.is_main_process:
        return
    print(passport_table([head.passport for head in bench.heads if head.passport], compact=True))
    print("\n".join(lines))
    print(f"pictures: {', '.join(f'{part.name} {len(part)}' for part in bench.pictures)}")
    print(f"spaces: {', '.join(space.label for space in bench.spaces)}; views: {len(bench.spaces) * (2 + len(config.mlp))}")
    print("dry run: nothing was measured, no run folder was made")
