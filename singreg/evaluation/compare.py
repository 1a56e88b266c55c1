"""The comparison job: several classifiers on the same pictures, read in one or more vision-language spaces, in one table."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from singreg.analysis.agreement import translator_agreement
from singreg.analysis.chance import measure_chance
from singreg.analysis.chance_results import ChanceReport
from singreg.analysis.comparing import FIGURES, model_differences, order_check, paired_figures
from singreg.analysis.comparing_findings import compare_findings, compare_warnings
from singreg.analysis.comparing_results import ComparedHead, CompareReport
from singreg.analysis.features import PassSettings, iterate_features
from singreg.analysis.fitting_mlp import fit_mlp_on_part
from singreg.analysis.model import analyze_model
from singreg.analysis.passport import head_passport
from singreg.analysis.results import ModelMeasurement
from singreg.data.loading import load_parts
from singreg.data.parts import Parts
from singreg.evaluation.compare_config import CompareConfig, ComparedModelConfig
from singreg.evaluation.fitting import fit_translators
from singreg.files import sha256_of_json
from singreg.geometry.nullspace import NullSpace
from singreg.models.classifier import Classifier
from singreg.models.heads import HeadError
from singreg.reporting.compare_report import compare_to_tensorboard, write_compare_report
from singreg.reporting.compare_tables import compare_table
from singreg.reporting.validation_tables import passport_table
from singreg.translation.base import Translator, TranslatorInfo
from singreg.translation.mlp import MLPSettings
from singreg.workbench.build import build_classifier, embed_parts, labels_for_head, open_vlm
from singreg.workbench.config import VisionLanguageConfig
from singreg.workbench.run import Run, describe_machine

logger = get_logger(__name__)


@dataclass
class Space:
    """One vision-language model's reading of the pictures; the model itself is not kept.

    embeddings (N, n) by part name; texts (C, n) by class names, since heads may have other classes; info: its half of what
    translators are fitted on.
    """

    label: str
    embeddings: dict[str, np.ndarray]
    texts: dict[tuple[str, ...], Tensor]
    info: TranslatorInfo


@dataclass
class ModelBench:
    """One classifier in one space: what translators are fitted and scores are measured on. Shapes as in `Bench`."""

    classifier: Classifier
    parts: Parts
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo
    settings: PassSettings


@dataclass
class CompareBench:
    """The pictures, every head's passport, and every space; all complaints come when it is built."""

    accelerator: Accelerator
    pictures: Parts
    heads: list[ComparedHead]
    spaces: list[Space]
    settings: PassSettings

    @classmethod
    def build(cls, config: CompareConfig, accelerator: Accelerator) -> CompareBench:
        """Load data, look at every head, then embed pictures and prompts in every space (embeddings (N, n), texts (C, n)).

        Raises:
            ValueError: models that cannot be built, all of them at once; an empty audit part.
        """
        _refuse_unknown_names(config.models)
        pictures = load_parts(replace(config.data, cache_dir=config.data.cache_dir or config.cache))
        if not len(pictures.audit):
            raise ValueError("the audit part is empty, so no auditor could be fitted; give data.audit_per_class or unlabeled pictures")
        heads, names = _look_at_heads(config, pictures)
        settings = PassSettings(config.batch_size, config.data.workers, accelerator.is_local_main_process, config.cache)
        labels = space_labels(config.vlms)
        spaces = [_open_space(config, vlm, label, pictures, names, accelerator) for vlm, label in zip(config.vlms, labels, strict=True)]
        return cls(accelerator, pictures, heads, spaces, settings)


def space_labels(vlms: Sequence[VisionLanguageConfig]) -> list[str]:
    """A short name for every space: model and tag, or the folder's name; the same one twice gets a number (no shapes)."""
    labels: list[str] = []
    for vlm in vlms:
        name = Path(vlm.name).name if vlm.name.startswith("local-dir:") else vlm.name
        label = name if vlm.pretrained is None else f"{name} {Path(vlm.pretrained).name}"
        before = sum(other == label or other.startswith(f"{label} (") for other in labels)
        labels.append(f"{label} ({before + 1})" if before else label)
    return labels


def _refuse_unknown_names(models: Sequence[ComparedModelConfig]) -> None:
    """What can be said of the names in no time: plain ones must be timm's, folders must hold a model."""
    problems = []
    for place, model in enumerate(models):
        try:
            name = model.resolved().name
        except FileNotFoundError as error:
            problems.append(f"models[{place}].name: {error}")
            continue
        if name == "demo" or ":" in name:
            continue
        if "/" in name or not timm.is_model(name.split(".")[0]):
            problems.append(f"models[{place}].name: {name!r} is neither a folder nor a model that timm knows")
        elif model.pretrained and "." in name and name not in timm.list_pretrained(name.split(".")[0] + ".*"):
            known = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*"))
            problems.append(f"models[{place}].name: timm has no weights {name!r}; it has {known}")
    if problems:
        raise ValueError("\n".join(problems))


def open_model(config: CompareConfig, model: ComparedModelConfig, pictures: Parts) -> Classifier:
    """The classifier with its head as configured (C, m), with or without a null space; what is untrained hangs on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_classifier(model.resolved(), pictures, image_size=config.data.image_size, allow_empty=True)


def _look_at_heads(config: CompareConfig, pictures: Parts) -> tuple[list[ComparedHead], list[tuple[str, ...]]]:
    """Every head's passport, and the class names (C,) that prompts are needed for."""
    heads, names, problems = [], [], []
    for place, model in enumerate(config.models):
        label = model.known_as
        try:
            classifier = open_model(config, model, pictures)
            passport = head_passport(classifier)
            passport = replace(passport, summary=replace(passport.summary, tag=label))
            nullity = passport.summary.nullity if model.invariance == "logits" else passport.softmax_nullity
            if nullity:
                names.append(labels_for_head(pictures, classifier, model.resolved()).class_names)
        except HeadError as error:
            heads.append(ComparedHead(label, model.name, None, f"no linear head: {error}"))
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"models[{place}] ({label}): {error}")
        else:
            classes, width = passport.summary.classes, passport.summary.features
            why = None if nullity else f"no null space: {classes} classes fill all {width} features, every direction moves a logit"
            heads.append(ComparedHead(label, model.name, passport, why))
    if problems:
        raise ValueError("\n".join(problems))
    return heads, list(dict.fromkeys(names))


def _open_space(
    config: CompareConfig, vlm_config: VisionLanguageConfig, label: str, pictures: Parts, names: list[tuple[str, ...]],
    accelerator: Accelerator,
) -> Space:  # fmt: skip
    vlm = open_vlm(vlm_config, accelerator)
    embeddings = embed_parts(
        vlm, (pictures.bank, pictures.audit, pictures.test), config.cache,
        batch_size=vlm_config.batch_size, workers=config.data.workers, progress=accelerator.is_local_main_process,
    )  # fmt: skip
    texts = {classes: vlm.embed_classes(classes, tuple(vlm_config.templates)).to(accelerator.device) for classes in names}
    info = TranslatorInfo(
        vlm=vlm.tag,
        vlm_weights_hash=vlm.weights_hash,
        vlm_preprocessing=sha256_of_json(vlm.preprocessing),
        normalized_targets=config.translator.normalize_targets,
    )
    return Space(label, embeddings, texts, info)


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
        fitted = fit_translators(bench, self.config.translator, self.config.auditor)
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
