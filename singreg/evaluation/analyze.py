"""The analysis job: fit two translators, measure one classifier at every level beside chance, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.analysis_findings import analysis_findings, analysis_warnings
from singreg.analysis.analysis_results import PRIMARY, AnalysisReport
from singreg.analysis.chance import measure_chance
from singreg.analysis.chance_results import ChanceReport
from singreg.analysis.features import FeatureBatch, evenly, iterate_features
from singreg.analysis.fitting import FittedTranslator
from singreg.analysis.fitting_mlp import fit_mlp_on_part
from singreg.analysis.information import fit_blocks, measure_information
from singreg.analysis.information_results import UniqueInformation
from singreg.analysis.levels.classes import analyze_classes
from singreg.analysis.levels.concept_results import ConceptMeasurement
from singreg.analysis.levels.concepts import analyze_concepts
from singreg.analysis.levels.gallery import Gallery, nearest_pictures
from singreg.analysis.levels.image_results import ImageMeasurement, PictureShift
from singreg.analysis.levels.images import analyze_images
from singreg.analysis.levels.joint import joint_distribution
from singreg.analysis.levels.pairs import EquivalentPairs
from singreg.analysis.model import analyze_model
from singreg.analysis.passport import head_passport
from singreg.analysis.perturbation import IMAGES as PERTURBED_IMAGES
from singreg.analysis.perturbation import PerturbationReport, measure_perturbations
from singreg.analysis.results import ModelMeasurement
from singreg.analysis.steering import steering_targets
from singreg.analysis.study.agreement import translator_agreement
from singreg.data.concepts import ConceptBank, embed_concepts, load_concepts
from singreg.evaluation.analyze_config import AnalyzeConfig
from singreg.evaluation.fitting import fit_translators
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.reporting.analysis_report import analysis_to_tensorboard, write_analysis_report
from singreg.reporting.tables import measurement_table
from singreg.steering import steer
from singreg.translator import Translator
from singreg.workbench.build import Bench
from singreg.workbench.run import Run, describe_machine

Value = TypeVar("Value")
STEERED_TO = 40.0  # image score in degrees of the steered pictures shown, the paper's


@dataclass
class AnalysisBench:
    """The bench and the concepts with their text embeddings (K, n); every complaint about prompts comes when it is built."""

    bench: Bench
    bank: ConceptBank
    concept_texts: Tensor

    @classmethod
    def build(cls, config: AnalyzeConfig, accelerator: Accelerator) -> AnalysisBench:
        """Load concepts, data and models (shapes as in `Bench`).

        Raises:
            ValueError: concepts without text, a gallery smaller than `neighbours`, and what `Bench.build` refuses.
        """
        bank = load_concepts(config.concepts)
        bench = Bench.build(
            config, config.model, accelerator,
            batch_size=config.batch_size, normalize_targets=config.translator.normalize_targets,
        )  # fmt: skip
        if len(bench.parts.bank) <= config.neighbours:
            raise ValueError(f"the gallery (the bank) has {len(bench.parts.bank)} pictures; neighbours = {config.neighbours} need more")
        bench.settings = replace(bench.settings, cache=config.cache)
        texts = embed_concepts(bench.vlm, bank, config.concept_templates).to(bench.texts)
        return cls(bench, bank, texts)


class Analysis:
    """Fit, measure every level, report; holds what the stages share. Angles in degrees, tensors as in `Bench`."""

    def __init__(self, run: Run, config: AnalyzeConfig, analysis_bench: AnalysisBench) -> None:
        self.run, self.config = run, config
        self.bench, self.bank, self.concept_texts = analysis_bench.bench, analysis_bench.bank, analysis_bench.concept_texts
        weight = self.bench.classifier.weight
        self.null_space = NullSpace.from_weight(weight, invariance=config.model.invariance).to(weight.device)
        self.fitted: dict[str, FittedTranslator]
        self.translators: dict[str, Translator]
        self.measurement: ModelMeasurement
        self.concepts: ConceptMeasurement
        self.images: ImageMeasurement
        self.shifts: list[PictureShift]
        self.chance: dict[str, ChanceReport]
        self.information: UniqueInformation
        self.perturbation: PerturbationReport

    def _timed(self, stage: str, work: Callable[[], Value]) -> Value:
        start = time.monotonic()
        result = work()
        self.run.seconds[stage] = time.monotonic() - start
        return result

    def _batches(self, description: str, part: str = "test") -> Iterator[FeatureBatch]:
        pictures = self.bench.parts.bank if part == "bank" else self.bench.parts.test
        return iterate_features(self.bench.classifier, pictures, self.bench.embeddings[part], self.bench.settings, description)

    @property
    def _mean(self) -> Tensor:
        return self.fitted[PRIMARY].mean

    def fit_translators(self) -> None:
        """The fitted translator, the auditor, and the non-linear ones asked for (stage "translators")."""

        def work() -> dict[str, Translator]:
            self.fitted = fit_translators(
                self.bench, self.config.translator, self.config.auditor, invariance=self.config.model.invariance
            )
            found: dict[str, Translator] = {name: fitted.translator for name, fitted in self.fitted.items()}
            for kind in self.config.mlp:
                found[kind] = fit_mlp_on_part(
                    self.bench.classifier, self.bench.parts.bank, self.bench.embeddings["bank"],
                    mlp=MLPSettings(kind=kind, seed=self.config.seed), normalize_targets=self.config.translator.normalize_targets,
                    info=self.bench.info, settings=self.bench.settings,
                )  # fmt: skip
            return found

        self.translators = self._timed("translators", work)

    def measure(self) -> None:
        """Model level: all scores, then their chance levels, unique information and perturbations (stages of these names)."""
        bench, space = self.bench, self.null_space
        self.measurement = self._timed(
            "model",
            lambda: analyze_model(
                bench.classifier, bench.parts.test, bench.embeddings["test"], bench.texts, self.translators,
                mean=self._mean, invariance=self.config.model.invariance, settings=bench.settings,
            ),
        )  # fmt: skip
        self.chance = self._timed(
            "chance",
            lambda: measure_chance(
                self._batches("chance levels"), texts=bench.texts, null_space=space,
                translators={name: fitted.translator for name, fitted in self.fitted.items()},
                mean=self._mean, draws=self.config.chance_draws, seed=self.config.seed,
            ),
        )  # fmt: skip

        def information() -> UniqueInformation:
            fits = fit_blocks(
                self._batches("information", "bank"), null_space=space, classes=len(bench.parts.class_names),
                target_dim=bench.texts.shape[1], normalize_targets=self.config.translator.normalize_targets,
            )  # fmt: skip
            return measure_information(self._batches("information"), fits)

        self.information = self._timed("information", information)
        self.perturbation = self._timed(
            "perturbations",
            lambda: measure_perturbations(
                self._batches("perturbing"), weight=bench.classifier.weight, null_space=space, translators=self.translators,
                chosen=evenly(len(bench.parts.test), PERTURBED_IMAGES), seed=self.config.seed,
            ),
        )  # fmt: skip

    def describe(self) -> None:
        """Concept and image level by the auditor, with the nearest pictures before, after and steered (stages "concepts", "images")."""
        bench, translator = self.bench, self.translators[PRIMARY]
        names = bench.parts.class_names
        self.concepts = self._timed(
            "concepts",
            lambda: analyze_concepts(
                self._batches("concepts"), self.bank.concepts, self.concept_texts,
                null_space=self.null_space, translator=translator, class_names=names,
            ),
        )  # fmt: skip

        def images() -> tuple[ImageMeasurement, list[PictureShift]]:
            found = analyze_images(
                self._batches("worst pictures"), bench.parts.test, bench.texts, self.bank.concepts, self.concept_texts,
                null_space=self.null_space, translator=translator, class_names=names, count=self.config.worst,
            )  # fmt: skip
            return found, self._nearest(found)

        self.images, self.shifts = self._timed("images", images)

    def _nearest(self, found: ImageMeasurement) -> list[PictureShift]:
        translator = self.fitted[PRIMARY].translator
        features = torch.from_numpy(found.features).to(self.bench.texts.device)
        indices = torch.tensor([image.index for image in found.worst])
        labels = torch.tensor([image.label for image in found.worst], device=features.device)
        targets = steering_targets(labels, indices, len(self.bench.texts), seed=self.config.seed)
        steered = steer(
            features, self.bench.texts[targets], matrix=translator.matrix, offset=translator.offset,
            null_space=self.null_space, image_score=STEERED_TO,
        )  # fmt: skip
        return nearest_pictures(
            features, indices.tolist(), self.bench.parts.test, Gallery(self.bench.parts.bank, self.bench.embeddings["bank"]),
            pairs=EquivalentPairs(translator, self.null_space), k=self.config.neighbours, steered=steered.features,
        )  # fmt: skip

    def report(self) -> AnalysisReport | None:
        """Write the run's files and say what was found (main process only; no shapes)."""
        if not self.run.accelerator.is_main_process:
            return None
        bench, config, measured = self.bench, self.config, self.measurement
        classes = analyze_classes(measured.rows, bench.parts.class_names, translator=PRIMARY)
        agreement = translator_agreement(self.fitted["fitted"].translator, self.fitted[PRIMARY].translator, bench.texts)
        report = AnalysisReport(
            passport=head_passport(bench.classifier),
            measurement=measured,
            agreement=agreement,
            joint={name: joint_distribution(measured.rows, translator=name) for name in self.translators},
            chance=self.chance,
            information=self.information,
            perturbation=self.perturbation,
            classes=classes,
            concepts=self.concepts,
            images=self.images,
            shifts=self.shifts,
            omissions=[*self.bank.omissions(), *classes.omissions()],
            findings=analysis_findings(measured, self.chance[PRIMARY], self.information, classes, self.concepts),
            warnings=analysis_warnings(measured, agreement, config.auditor.images_per_feature),
            settings={**asdict(config), "command": " ".join(["recipes/analyze.py", *sys.argv[1:]])},
            machine=describe_machine(self.run.accelerator),
            seconds=self.run.seconds,
        )
        plots = write_analysis_report(report, self.run.folder, bench.parts, shown=config.concepts_shown)
        for name, fitted in self.fitted.items():
            fitted.translator.save(self.run.folder / f"translator-{name}.safetensors")
        analysis_to_tensorboard(report, self.run.folder / "tensorboard", plots)
        print(measurement_table(measured, compact=True))
        print("\n".join([*report.findings, *report.warnings]))
        print(f"report: {self.run.folder / 'report.html'} (the same as report.md)")
        return report


def dry_run(config: AnalyzeConfig, analysis_bench: AnalysisBench) -> None:
    """Run one batch and say what would be measured, after the head and parts that `Bench.build` told; no run folder (no shapes)."""
    bench = analysis_bench.bench
    classifier, test = bench.classifier, bench.parts.test
    some = test.subset(range(min(config.batch_size, len(test))))
    settings = replace(bench.settings, cache=None, progress=False)
    batch = next(iterate_features(classifier, some, bench.embeddings["test"][: len(some)], settings, "dry run"))
    if not bench.accelerator.is_main_process:
        return
    print(f"classifier {classifier.tag}: {classifier.num_classes} classes, {classifier.feature_dim} features")
    print(f"one batch: features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}, embeddings {bench.texts.shape[1]}-d")
    print(f"concepts: {len(analysis_bench.bank)}")
    print("dry run: nothing was measured, no run folder was made")
