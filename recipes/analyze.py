"""Analyse one classifier: what its null space holds, by model, class, concept and image, beside the level of chance.

python recipes/analyze.py --config configs/analyze_demo.yaml
python recipes/analyze.py --image cat.jpg --model.name resnet50 --translator.file best.pt --vlm.name ViT-B-32
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from singreg.config import DataConfig, MLPKind, ModelConfig, Problems, RunConfig, TranslatorConfig, parse


@dataclass
class ReadTranslatorConfig(TranslatorConfig):
    """The translators: one fitted on the bank, the auditor on images of its own; of single images also one of a file.

    Args:
        file: translator by which images are explained, a .safetensors file or the paper's authors' best.pt; null takes
            that of the run whose model it is, or fits the auditor.
    """

    file: str | None = None


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
        image: explain this image file, or list of files, instead of the test images; with a translator from a file it
            needs no data, and the classes are the head's rows.
        label: class of these images in words; null takes the one that each is named.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    translator: ReadTranslatorConfig = field(default_factory=ReadTranslatorConfig)
    concepts: list[str] = field(default_factory=lambda: ["colours", "textures", "materials", "scenes", "parts"])
    concept_templates: list[str] | None = None
    worst: int = 6
    neighbours: int = 3
    chance_draws: int = 8
    mlp: list[MLPKind] = field(default_factory=list)
    image: list[str] | str = field(default_factory=list)
    label: str | None = None

    def check(self, problems: Problems) -> None:
        super().check(problems)
        problems.within(1, worst=self.worst, neighbours=self.neighbours)
        problems.within(2, chance_draws=self.chance_draws)
        problems.need(bool(self.concepts), "concepts: expected at least one bank, file or concept")
        for template in self.concept_templates or []:
            problems.need("{concept}" in template, f'concept_templates: {template!r} has no "{{concept}}" in it')
        problems.once("mlp", self.mlp)
        alone = self.image or not (self.label or self.translator.file)
        problems.need(bool(alone), "image: label and translator.file are those of single images; name the files")

    @property
    def file(self) -> Path | None:
        """The translator's file, if there is one."""
        stored = self.model.translator
        return Path(self.translator.file) if self.translator.file else stored if stored.is_file() else None

    @property
    def without_data(self) -> bool:
        """Whether images are explained with a translator from a file and no data are given for a gallery."""
        return bool(self.image and self.file) and replace(self.data, image_size=None) == DataConfig()


if __name__ == "__main__":  # --help and mistakes are answered before the seconds that these imports take
    parse(AnalyzeConfig, description=__doc__)

import numpy as np
import pandas as pd
from torch import Tensor

from singreg import tables
from singreg.analysis import chance, levels
from singreg.analysis.chance import measure_chance
from singreg.analysis.features import evenly, translator_agreement
from singreg.analysis.levels import embed_concepts, explain_images, load_concepts, open_images
from singreg.analysis.probes import fit_blocks, measure_information
from singreg.data.splits import ImageSplit
from singreg.nullspace import NullSpace
from singreg.plots.scores import plot_analysis, plot_images
from singreg.report import log, log_figures, track, write_report
from singreg.runs import Run, explained, start
from singreg.setup import Setup, embed_splits, fit_translators, prepare, prepare_alone
from singreg.translator import load_translator

Found = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, fit translators, measure every level, report."""
    config = parse(AnalyzeConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "analyze").check()
        bank = load_concepts(config.concepts)
        setup = (prepare_alone if config.without_data else prepare)(config, accelerator)
        if len(setup.splits.bank) <= config.neighbours and not config.without_data:
            raise ValueError(f"neighbours: the gallery (the bank) has {len(setup.splits.bank)} images; ask for fewer")
        words = embed_concepts(setup.vlm, bank, config.concept_templates).to(setup.texts)
        given = open_images(config.image, setup.splits.class_names, config.label) if config.image else None
        fits = replace(setup.info, classifier="", vlm="")  # folders may move; hashes say what is in them
        widths = setup.classifier.feature_dim, setup.vlm.dim
        read = load_translator(config.file, expected=fits, widths=widths).to(words) if given and config.file else None
        if config.dry_run:
            return
        run.open()
    with run.guarded():
        space = setup.space
        with run.timed("translators"):
            fitted: Any = ({"auditor": read}, None, None)
            if not read:
                fitted = fit_translators(setup, config.translator.ridge, config.mlp, config.seed)
            translators, mean, _ = fitted
        reader: Any = {"null_space": space, "translator": translators["auditor"]}
        about = bank.concepts, words
        if given is None:
            rows, found = measure(run, config, setup, space, translators, mean)
            with run.timed("concepts"):
                found["concepts"] = levels.analyze_concepts(setup.read("test", "concepts"), *about, **reader)
            worst = rows.sort_values(["AS/auditor", "index"])["index"].to_numpy()[: config.worst]
            shown = setup.splits.test, worst, setup.embeddings["test"]
        else:
            shown = given, np.arange(len(given)), embed_splits(setup.vlm, (given,), setup.passes)[given.name]
        with run.timed("images"):
            if setup.embeddings:
                reader["gallery"] = setup.splits.bank, setup.embeddings["bank"], config.neighbours
            reader["settings"] = setup.passes
            images = explain_images(setup.classifier, *shown, setup.texts, *about, **reader)
        if accelerator.is_main_process:
            if given is None:
                report(run, setup, translators, rows, {**found, "images": images})
            else:
                report_images(run, setup, given, images)
    accelerator.end_training()


def measure(
    run: Run, config: AnalyzeConfig, setup: Setup, space: NullSpace, translators: dict[str, Any], mean: Tensor
) -> tuple[pd.DataFrame, Found]:
    """Measure the model level: all scores, their chance levels, unique information and perturbations; and classes."""
    texts, options = setup.texts, dict[str, Any](null_space=space, seed=config.seed)
    with run.timed("model"):
        rows, measurement = setup.measure(translators, mean)
    with run.timed("chance"):
        more: Any = {"texts": texts, "mean": mean, "draws": config.chance_draws, **options}
        level = measure_chance(setup.read("test", "chance levels"), translator=translators["auditor"], **more)
    with run.timed("information"):
        sizes: Any = {"classes": len(setup.splits.class_names), "target_dim": texts.shape[1]}
        fits = fit_blocks(setup.read("bank", "information"), null_space=space, **sizes)
        information = measure_information(setup.read("test", "information"), fits)
    with run.timed("perturbations"):
        more = {"chosen": evenly(len(setup.splits.test), chance.IMAGES), **options}
        more |= {"weight": setup.classifier.weight, "translators": translators}
        moved = chance.measure_perturbations(setup.read("test", "perturbing"), **more)
    return rows, {
        "measurement": measurement,
        "agreement": translator_agreement(translators["fitted"], translators["auditor"], texts),
        "joint": {name: levels.joint_distribution(rows, translator=name) for name in translators},
        "chance": {"auditor": level},
        "information": information,
        "perturbation": moved,
        "classes": levels.analyze_classes(rows, setup.splits.class_names),
    }


def report(run: Run, setup: Setup, translators: dict[str, Any], rows: pd.DataFrame, found: Found) -> None:
    """Save the translators, draw the plots, write the report and log to the trackers."""
    track(run.accelerator, "analyze", run.config)
    for name, by in found["measurement"]["translators"].items():
        log(run.accelerator, {f"scores/{key}/{name}": value for key, value in by["overall"].items()}, 0)
    for name in ("fitted", "auditor"):
        translators[name].save(run.folder / f"translator-{name}.safetensors")
    figures = plot_analysis(rows, found, setup.splits.test, setup.splits.bank, run.folder / "plots")
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


def report_images(run: Run, setup: Setup, split: ImageSplit, images: list[Found]) -> None:
    """Draw single images, write their report and log to the trackers."""
    figure = plot_images(images, split, setup.splits.bank, run.folder / "plots" / "images.png")
    track(run.accelerator, "analyze", run.config)
    log_figures(run.accelerator, [figure])
    write_report(
        run,
        title=f"{run.folder.name}: {len(images)} images as {setup.classifier.tag} and its null space have them",
        verdict=tables.images_verdict(images),
        sections=tables.images_sections(images, figure),
        figures={"images": images},
        rows=pd.DataFrame(images).drop(columns=["rises", "falls", "logits", "near"]),
    )


if __name__ == "__main__":
    main()
