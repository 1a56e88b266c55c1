"""Steer features through the null space towards other prompts, at a fixed image score and at equal effort.

accelerate launch recipes/steer.py --config configs/steer_demo.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from singreg import unclip
from singreg.analysis import steering_curves as effort
from singreg.analysis.features import PassSettings, iterate_features
from singreg.analysis.fitting import fit_mlp_on_split, fit_translators
from singreg.analysis.scores import analyze_model
from singreg.analysis.steering import PairPlan, plan_pairs, steer_pairs
from singreg.config import ModelConfig, Problems, RunConfig, TranslatorConfig, parse
from singreg.data.classes import resolve_classes
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.plots.steering import draw_curves, draw_pairs
from singreg.report import Figure, Section, interval, log, log_figures, number, percent, track, write_report
from singreg.runs import Run, explained, start
from singreg.setup import Setup, prepare
from singreg.utils import cache_folder

READING = (
    "AS: angle gained towards the target prompt over steerings that reach the score; success: share of all steerings "
    "after which the target prompt outranks every class prompt. 95 % intervals over classes and images; lower is harder."
)
AREAS = (
    "Mean height over the grid. Radius: Mahalanobis distance of the null component from what the row-space component "
    "predicts, over its median on untouched test images. On-manifold: the covariance times the gradient."
)


@dataclass
class SteerConfig(RunConfig):
    """A run of recipes/steer.py; every field is a key of the YAML and a flag of the command line.

    Args:
        out: the run's folder.
        seed: every random choice hangs on it.
        dry_run: build everything, run one batch, say what would happen, stop.
        resume: go on in the folder of an interrupted run of the same configuration; cached features make it quick.
        log_with: tracker that accelerate knows (tensorboard, wandb, mlflow, all, ...).
        sources: classes whose test images are steered: names, a named set, or all.
        targets: classes whose prompts they are steered towards: names, a named set, or all.
        prompts: further target prompts in free words, taken as they are.
        image_score: image score in degrees at which table 1 is read (the paper's 40).
        images_per_class: test images of each source class; null takes all.
        max_pairs: source-target pairs, drawn evenly over sources; null takes all.
        mlp: non-linear translators that attack and judge too; training one takes minutes.
        unclip: UnCLIP image-variation pipeline (hub name or folder) that draws a few steered images; needs the extra
            singreg[unclip] and the CLIP it was trained with as vlm.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    sources: list[str] | str = "all"
    targets: list[str] | str = "all"
    prompts: list[str] = field(default_factory=list)
    image_score: float = 40.0
    images_per_class: int | None = 50
    max_pairs: int | None = None
    mlp: list[Literal["mlp3", "mlp4", "residual"]] = field(default_factory=list)
    unclip: str | None = None

    def __post_init__(self) -> None:
        """Raise one ValueError that names everything wrong with the values."""
        super().__post_init__()
        problems = Problems()
        good = 0 < self.image_score < 180
        problems.need(good, f"image_score: expected degrees between 0 and 180, got {self.image_score}")
        problems.least(1, images_per_class=self.images_per_class, max_pairs=self.max_pairs)
        problems.need(bool(self.sources), 'sources: expected class names or "all"')
        problems.need(bool(self.targets or self.prompts), 'targets: expected class names, "all", or one of prompts')
        for prompt in self.prompts:
            problems.need(any(map(str.isalnum, prompt)), f"prompts: no text in {prompt!r}")
        for name in ("prompts", "mlp"):
            given = getattr(self, name)
            problems.need(len(set(given)) == len(given), f"{name}: something is listed twice in {given}")
        problems.show()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, fit translators, measure, steer, report."""
    config = parse(SteerConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "steer")
        if not config.dry_run:
            run.check()
        pipeline = unclip.open_asked(config.unclip)  # first: what is missing should not be said after minutes of work
        setup = prepare(config, config.model, accelerator)
        setup = replace(setup, passes=replace(setup.passes, cache=str(cache_folder())))  # several passes over features
        if pipeline is not None and unclip.embedding_width(pipeline) != setup.texts.shape[1]:
            raise ValueError(f"unclip: {config.unclip} draws no embeddings of {setup.vlm.tag}; set its CLIP as vlm")
        plan = choose_pairs(config, setup)
        if config.dry_run:
            dry_run(setup, plan)
            return
        run.open()
    with run.guarded():
        steer(config, setup, plan, run, pipeline)
    accelerator.end_training()


def choose_pairs(config: SteerConfig, setup: Setup) -> PairPlan:
    """Match source classes and target prompts to the head's classes."""
    names, labels = setup.splits.class_names, np.asarray(setup.splits.test.labels)

    def places(wanted: list[str] | str) -> list[int]:
        if wanted in ("all", ["all"]):
            return sorted(set(labels.tolist()))
        return [names.index(name) for name in resolve_classes(wanted, names).keys] if wanted else []

    sources, targets = places(config.sources), places(config.targets)
    texts = [setup.texts[targets], *[setup.vlm.embed_texts([prompt]).to(setup.texts) for prompt in config.prompts]]
    prompts = [*(names[place] for place in targets), *config.prompts]
    limits: dict[str, Any] = {"images_per_source": config.images_per_class, "max_pairs": config.max_pairs}
    return plan_pairs(labels, names, setup.texts, sources, prompts, torch.cat(texts), **limits, seed=config.seed)


def steer(config: SteerConfig, setup: Setup, plan: PairPlan, run: Run, pipeline: Any) -> None:
    """Fit the translators, measure the classifier, steer its features and report."""
    classifier, texts, passes = setup.classifier, setup.texts, setup.passes
    test, bank = ((getattr(setup.splits, name), setup.embeddings[name]) for name in ("test", "bank"))
    both: dict[str, Any] = {"invariance": config.model.invariance, "settings": passes}
    space = NullSpace.from_weight(classifier.weight, invariance=config.model.invariance).to(texts.device)
    with run.timed("translators"):
        ridge = config.translator.ridge
        fitted = fit_translators(classifier, setup.splits, setup.embeddings, ridge=ridge, info=setup.info, **both)
        linear = {name: found.translator for name, found in fitted.items()}
        translators: dict[str, Any] = dict(linear)
        for kind in config.mlp:
            mlp = MLPSettings(kind=kind, seed=config.seed)
            translators[kind] = fit_mlp_on_split(classifier, *bank, mlp=mlp, info=setup.info, settings=passes)
    with run.timed("measure"):
        both |= {"mean": fitted["auditor"].mean, "steering_image_score": config.image_score}
        rows, measurement = analyze_model(classifier, *test, texts, translators, **both)
    with run.timed("radii"):
        gaussian = effort.fit_conditional(classifier, *bank, space, settings=passes)
        natural = effort.natural_radii(classifier, *test, gaussian, fit_images=len(bank[0]), settings=passes)
        budgets = effort.Budgets.over(effort.STEPS, effort.RADII, gaussian, natural)
    steering: dict[str, Any] = {"texts": texts, "null_space": space, "attackers": translators}
    with run.timed("pairs"):
        batches = iterate_features(classifier, *test, passes, "steering to a fixed image score")
        pairs = steer_pairs(batches, plan, weight=classifier.weight, image_score=config.image_score, **steering)
    with run.timed("curves"):  # judged by the linear translators alone: a judge is called at every point
        batches = iterate_features(classifier, *test, passes, "steering at equal effort")
        curves = effort.steer_curves(batches, plan, budgets, judges=linear, **steering)
    if not run.accelerator.is_main_process:
        return
    plots, folder, names = [], run.folder / "plots", (plan.sources, plan.targets)
    images = f"{len(plan.sources)} sources, {len(plan.targets)} targets, {pairs[0]['overall']['images']:.0f} images"
    title = f"steering at equal effort: {images}; bands: 95 % over classes and images; one step, so a lower bound"
    plots.append(
        Figure(draw_curves(curves, budgets.marks, title, folder / "curves.png"), "Success and AS at equal effort.")
    )
    plots.append(Figure(draw_pairs(pairs, names, config.image_score, folder / "pairs.png"), "Every source and target."))
    shown: list[dict[str, Any]] = []
    if pipeline is not None:
        sheet = folder / "unclip.png"
        judges: dict[str, Any] = {"attacker": linear["fitted"], "judge": linear["auditor"], "null_space": space}
        shown = unclip.draw_steered(
            pipeline, setup, plan, sheet, image_score=config.image_score, seed=config.seed, **judges
        )
        plots += [Figure(sheet, f"Steered embeddings, drawn by {config.unclip}.")] if sheet.exists() else []
    track(run.accelerator, "steer", config)
    for curve in curves:
        name = f"{curve['budget']} (x 1000)/success/{curve['attacker']} attacks, {curve['judge']} judges"
        for place, success in zip(curve["grid"], curve["figures"]["success"], strict=True):
            log(run.accelerator, {name: success}, round(1000 * place))
    log_figures(run.accelerator, plots)
    figures = {"measurement": measurement, "image_score": config.image_score, "sources": plan.sources}
    figures |= {"targets": plan.targets, "pairs": pairs, "curves": curves, "natural": natural, "shown": shown}
    write_report(
        run,
        title=f"{run.folder.name}: steering {classifier.tag} through its null space",
        verdict=effort.steering_verdict(measurement, pairs, curves, budgets.marks, config.image_score),
        warnings=effort.steering_warnings(measurement, pairs, natural, config.image_score),
        sections=[
            Section(f"Table 1: at an image score of {config.image_score:g}°", [table1(pairs), READING]),
            Section("Steering at equal effort", [plots[0], areas(curves), AREAS]),
            Section("Pairs and images", plots[1:]),
        ],
        figures=figures,
        rows=rows,
    )


def table1(pairs: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the paper's table 1 over all pairs, by attacker and judge."""
    rows = [
        {
            "attacker": found["attacker"],
            "judge": found["judge"],
            "|AS| °": f"{number(found['overall']['AS_abs'])} ± {number(found['overall']['AS_abs_std'])}",
            "AS °": interval(found["overall"]["AS"], *found["intervals"]["AS"]),
            "step / |f|": number(found["overall"]["step"], 3),
            "reachable": percent(found["overall"]["reachable"]),
            "success": percent(found["overall"]["success"]),
        }
        for found in pairs
    ]
    return pd.DataFrame(rows)


def areas(curves: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the mean height of every curve over its grid."""
    names = {"AS": "mean AS °", "success": "mean success"}
    rows = [
        {
            **{key: c[key] for key in ("budget", "attacker", "judge")},
            **{t: interval(*c["area"][n]) for n, t in names.items()},
        }
        for c in curves
    ]
    return pd.DataFrame(rows)


def dry_run(setup: Setup, plan: PairPlan) -> None:
    """Run one batch and say what would be steered; nothing is written but the embeddings."""
    some = setup.splits.test.subset(range(min(64, len(setup.splits.test))))
    passes, chosen = PassSettings(progress=False), np.asarray(setup.splits.test.labels)[plan.chosen]
    batch = next(iterate_features(setup.classifier, some, setup.embeddings["test"][: len(some)], passes, "dry run"))
    counts = [int((chosen == label).sum()) for label in plan.source_labels.tolist()]
    rows = sum(count * wanted for count, wanted in zip(counts, plan.wanted.sum(1).tolist(), strict=True))
    print(f"one batch: features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}")
    print(f"steering: {int(plan.wanted.sum())} pairs, {int(plan.chosen.sum())} images, {rows} steerings")
    print("dry run: nothing was measured, no run folder was made")


if __name__ == "__main__":
    main()
