"""Analyse one classifier: what its null space holds, by model, class, concept and image, beside the level of chance.

accelerate launch recipes/analyze.py --config configs/analyze_demo.yaml
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from singreg import tables
from singreg.analysis import perturbation
from singreg.analysis.chance import measure_chance
from singreg.analysis.classes import analyze_classes, joint_distribution
from singreg.analysis.concepts import EquivalentPairs, analyze_concepts
from singreg.analysis.features import FeatureBatch, evenly, iterate_features
from singreg.analysis.fitting import fit_mlp_on_split, fit_translators, translator_agreement
from singreg.analysis.images import analyze_images, nearest_images
from singreg.analysis.passport import head_passport
from singreg.analysis.probes import fit_blocks, measure_information
from singreg.analysis.scores import analyze_model
from singreg.analysis.steering import steering_targets
from singreg.config import ModelConfig, Problems, RunConfig, TranslatorConfig, parse
from singreg.data.concepts import embed_concepts, load_concepts
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.plots.scores import plot_analysis
from singreg.report import log, log_figures, track, write_report
from singreg.runs import Run, explained, start
from singreg.setup import Setup, prepare, try_one_batch
from singreg.steering import steer
from singreg.utils import cache_folder

STEERED_TO = 40.0  # image score in degrees of the steered features shown, the paper's
LINEAR = ("fitted", "auditor")
Found = dict[str, Any]


@dataclass
class AnalyzeConfig(RunConfig):
    """Analyse a classifier.

    Args:
        concepts: banks (colours, textures, materials, scenes, parts, imagenet), text files, or concepts in words.
        concept_templates: prompts with {concept} for all of them; null takes each bank's own.
        worst: images shown at image level.
        neighbours: of each in the gallery (the bank).
        chance_draws: random subspaces of each kind behind the chance level.
        mlp: non-linear translators compared with the linear one; training one takes minutes.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    concepts: list[str] = field(default_factory=lambda: ["colours", "textures", "materials", "scenes", "parts"])
    concept_templates: list[str] | None = None
    worst: int = 6
    neighbours: int = 3
    chance_draws: int = 8
    mlp: list[Literal["mlp3", "mlp4", "residual"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong with the values."""
        super().__post_init__()
        problems = Problems()
        problems.within(1, worst=self.worst, neighbours=self.neighbours)
        problems.within(2, chance_draws=self.chance_draws)
        problems.need(bool(self.concepts), "concepts: expected at least one bank, file or concept")
        for template in self.concept_templates or []:
            problems.need("{concept}" in template, f'concept_templates: {template!r} has no "{{concept}}" in it')
        problems.need(len(set(self.mlp)) == len(self.mlp), f"mlp: a kind is listed twice in {self.mlp}")
        problems.show()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, fit translators, measure every level, report."""
    config = parse(AnalyzeConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "analyze")
        if not config.dry_run:
            run.check()
        bank = load_concepts(config.concepts)
        setup = prepare(config, config.model, accelerator)
        if len(setup.splits.bank) <= config.neighbours:
            raise ValueError(f"neighbours: the gallery (the bank) has {len(setup.splits.bank)} images; ask for fewer")
        words = embed_concepts(setup.vlm, bank, config.concept_templates).to(setup.texts)
        if config.dry_run:
            try_one_batch(setup)
            return
        setup = replace(setup, passes=replace(setup.passes, cache=str(cache_folder())))
        run.open()
    with run.guarded():
        space = NullSpace.from_weight(setup.classifier.weight, invariance=config.model.invariance).to(words.device)
        translators, mean = fit(run, config, setup)
        rows, found = measure(run, config, setup, space, translators, mean)
        found |= describe(run, config, setup, space, translators["auditor"], bank.concepts, words)
        found["omissions"] = bank.omissions
        report(run, setup, translators, rows, found)
    accelerator.end_training()


def batches(setup: Setup, description: str, split: str = "test") -> Iterator[FeatureBatch]:
    """Pass once over a split, from the feature cache."""
    where = getattr(setup.splits, split), setup.embeddings[split]
    return iterate_features(setup.classifier, *where, setup.passes, description)


def fit(run: Run, config: AnalyzeConfig, setup: Setup) -> tuple[dict[str, Any], Tensor]:
    """Fit the fitted translator, the auditor and the non-linear ones; return them and the auditor's mean feature."""
    with run.timed("translators"):
        common: Any = {"info": setup.info, "settings": setup.passes}
        options: Any = {"ridge": config.translator.ridge, "invariance": config.model.invariance}
        fitted = fit_translators(setup.classifier, setup.splits, setup.embeddings, **options, **common)
        translators: dict[str, Any] = {name: each.translator for name, each in fitted.items()}
        for kind in config.mlp:
            mlp, bank = MLPSettings(kind=kind, seed=config.seed), (setup.splits.bank, setup.embeddings["bank"])
            translators[kind] = fit_mlp_on_split(setup.classifier, *bank, mlp=mlp, **common)
    return translators, fitted["auditor"].mean


def measure(
    run: Run, config: AnalyzeConfig, setup: Setup, space: NullSpace, translators: dict[str, Any], mean: Tensor
) -> tuple[pd.DataFrame, Found]:
    """Measure the model level: all scores, their chance levels, unique information and perturbations."""
    classifier, test, texts = setup.classifier, setup.splits.test, setup.texts
    linear = {name: translators[name] for name in LINEAR}
    with run.timed("model"):
        options: Any = {"mean": mean, "invariance": config.model.invariance, "settings": setup.passes}
        rows, measurement = analyze_model(classifier, test, setup.embeddings["test"], texts, translators, **options)
    options = {"null_space": space, "seed": config.seed}
    with run.timed("chance"):
        more: Any = {"texts": texts, "mean": mean, "draws": config.chance_draws, **options}
        chance = measure_chance(batches(setup, "chance levels"), translators=linear, **more)
    with run.timed("information"):
        sizes: Any = {"classes": len(setup.splits.class_names), "target_dim": texts.shape[1]}
        fits = fit_blocks(batches(setup, "information", "bank"), null_space=space, **sizes)
        information = measure_information(batches(setup, "information"), fits)
    with run.timed("perturbations"):
        more = {"weight": classifier.weight, "chosen": evenly(len(test), perturbation.IMAGES), **options}
        moved = perturbation.measure_perturbations(batches(setup, "perturbing"), translators=translators, **more)
    joint = {name: joint_distribution(rows, translator=name) for name in translators}
    agreement = translator_agreement(linear["fitted"], linear["auditor"], texts)
    found = {"passport": head_passport(classifier), "measurement": measurement, "agreement": agreement}
    found |= {"joint": joint, "chance": chance, "information": information, "perturbation": moved}
    return rows, found | {"classes": analyze_classes(rows, setup.splits.class_names)}


def describe(
    run: Run,
    config: AnalyzeConfig,
    setup: Setup,
    space: NullSpace,
    auditor: Any,
    concepts: Sequence[str],
    words: Tensor,
) -> Found:
    """Measure concepts and images by the auditor, with the nearest images before, after and steered."""
    splits, texts = setup.splits, setup.texts
    reader: Any = {"null_space": space, "translator": auditor, "class_names": splits.class_names}
    with run.timed("concepts"):
        of_concepts = analyze_concepts(batches(setup, "concepts"), concepts, words, **reader)
    with run.timed("images"):
        named: Any = (splits.test, texts, concepts, words)
        images, worst = analyze_images(batches(setup, "worst images"), *named, count=config.worst, **reader)
        features = torch.from_numpy(worst).to(texts.device)
        indices, labels = (torch.tensor([image[key] for image in images["worst"]]) for key in ("index", "label"))
        prompts = texts[steering_targets(labels.to(texts.device), indices, len(texts), seed=config.seed)]
        attack: Any = {"translator": auditor, "image_score": STEERED_TO}
        steered = steer(features, prompts, null_space=space, **attack).features
        options: Any = {"pairs": EquivalentPairs(auditor, space), "k": config.neighbours, "steered": steered}
        gallery = (splits.bank, setup.embeddings["bank"])
        shifts = nearest_images(features, indices.tolist(), splits.test, *gallery, **options)
    return {"concepts": of_concepts, "images": images, "shifts": shifts}


def report(run: Run, setup: Setup, translators: dict[str, Any], rows: pd.DataFrame, found: Found) -> None:
    """Save the translators, draw the plots, write the report and log to the trackers."""
    track(run.accelerator, "analyze", run.config)
    for name, by in found["measurement"]["translators"].items():
        log(run.accelerator, {f"scores/{key}/{name}": value for key, value in by["overall"].items()}, 0)
    if not run.accelerator.is_main_process:
        return
    for name in LINEAR:
        translators[name].save(run.folder / f"translator-{name}.safetensors")
    figures = plot_analysis(found, setup.splits.test, setup.splits.bank, run.folder / "plots")
    log_figures(run.accelerator, list(figures.values()))
    write_report(
        run,
        title=f"{run.folder.name}: what the null space of {setup.classifier.tag} holds",
        verdict=tables.analysis_verdict(found),
        warnings=tables.analysis_warnings(found["measurement"], found["agreement"]),
        sections=tables.analysis_sections(found, figures),
        figures=found,
        rows=rows,
    )


if __name__ == "__main__":
    main()
