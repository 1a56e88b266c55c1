"""Steer features through the null space towards other prompts, at a fixed image score and at equal effort.

python recipes/steer.py --config configs/steer_demo.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from singreg.config import MLPKind, ModelConfig, Problems, RunConfig, TranslatorConfig, parse


@dataclass
class SteerConfig(RunConfig):
    """A run of recipes/steer.py; every field is a key of the YAML and a flag of the command line.

    Args:
        sources: classes whose test images are steered: names, a named set, or all.
        targets: classes whose prompts they are steered towards: names, a named set, or all.
        prompts: further target prompts in free words, taken as they are.
        image_score: image score in degrees at which table 1 is read (the paper's 40).
        images_per_class: test images of each source class; null takes all.
        max_pairs: source-target pairs, drawn evenly over sources; null takes all.
        mlp: non-linear translators that attack and judge too; training one takes minutes.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    sources: list[str] | str = "all"
    targets: list[str] | str = "all"
    prompts: list[str] = field(default_factory=list)
    image_score: float = 40.0
    images_per_class: int | None = 50
    max_pairs: int | None = None
    mlp: list[MLPKind] = field(default_factory=list)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        problems.need(0 < self.image_score < 180, f"image_score: expected degrees in (0, 180), got {self.image_score}")
        problems.within(1, images_per_class=self.images_per_class, max_pairs=self.max_pairs)
        problems.need(bool(self.sources), 'sources: expected class names or "all"')
        problems.need(bool(self.targets or self.prompts), 'targets: expected class names, "all", or one of prompts')
        for prompt in self.prompts:
            problems.need(any(map(str.isalnum, prompt)), f"prompts: no text in {prompt!r}")


if __name__ == "__main__":  # --help and mistakes are answered before the seconds that these imports take
    parse(SteerConfig, description=__doc__)

import numpy as np
import torch

from singreg import tables
from singreg.analysis import steering_curves as effort
from singreg.analysis.steering import PairPlan, plan_pairs, steer_pairs
from singreg.classes import resolve_classes
from singreg.data.splits import Splits
from singreg.models.classifier import Classifier
from singreg.plots.steering import plot_steering
from singreg.report import log, log_figures, track, write_report
from singreg.runs import Run, explained, start
from singreg.setup import Setup, fit_translators, prepare
from singreg.steering import ConditionalGaussian


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, fit translators, measure, steer, report."""
    config = parse(SteerConfig, arguments, description=__doc__ or "")
    accelerator = start(config)
    with explained():
        run = Run(config, accelerator, "steer").check()

        def check(splits: Splits, _: Classifier) -> None:
            places(config.sources, splits)
            places(config.targets, splits)

        setup = prepare(config, accelerator, before_embedding=check)
        plan = choose_pairs(config, setup)
        if config.dry_run:
            if accelerator.is_main_process:
                print(f"steering: {int(plan.wanted.sum())} pairs, {int(plan.chosen.sum())} images")
            return
        run.open()
    with run.guarded():
        steer(config, setup, plan, run)
    accelerator.end_training()


def places(wanted: list[str] | str, splits: Splits) -> list[int]:
    """Return where named classes stand in the head."""
    if wanted in ("all", ["all"]):
        return sorted(set(np.asarray(splits.test.labels).tolist()))
    found = resolve_classes(wanted, splits.class_names).keys if wanted else ()
    return [splits.class_names.index(name) for name in found]


def choose_pairs(config: SteerConfig, setup: Setup) -> PairPlan:
    """Match source classes and target prompts to the head's classes."""
    names, labels = setup.splits.class_names, np.asarray(setup.splits.test.labels)
    sources, targets = (places(wanted, setup.splits) for wanted in (config.sources, config.targets))
    texts = [setup.texts[targets], *[setup.vlm.embed_texts([prompt]).to(setup.texts) for prompt in config.prompts]]
    prompts = [*(names[place] for place in targets), *config.prompts]
    limits: dict[str, Any] = {"images_per_source": config.images_per_class, "max_pairs": config.max_pairs}
    return plan_pairs(labels, names, setup.texts, sources, prompts, torch.cat(texts), **limits, seed=config.seed)


def steer(config: SteerConfig, setup: Setup, plan: PairPlan, run: Run) -> None:
    """Fit the translators, measure the classifier, steer its features and report."""
    space, weight = setup.space, setup.classifier.weight
    with run.timed("translators"):
        translators, mean, bank = fit_translators(setup, config.translator.ridge, config.mlp, config.seed)
        linear: Any = {(name, ""): translators[name] for name in ("fitted", "auditor")}
    with run.timed("measure"):
        rows, measurement = setup.measure(translators, mean)
    with run.timed("radii"):
        moments = bank.f / bank.count, bank.centred()[0] / (bank.count - 1)
        gaussian = ConditionalGaussian.from_moments(*moments, space)
        natural = effort.natural_radii(setup.read("test", "natural radii"), gaussian, len(setup.splits.bank))
    with run.timed("pairs"):
        batches, score = setup.read("test", "steering to a fixed image score"), config.image_score
        pairs = steer_pairs(batches, plan, attackers=translators, image_score=score, weight=weight, null_space=space)
    with run.timed("curves"):  # judged by the linear translators alone: a judge is called at every point
        attacks = effort.equal_effort(translators, space, gaussian, natural)
        batches = setup.read("test", "steering at equal effort")
        curves = effort.measure_curves(batches, plan, attacks, linear, weight=weight, null_space=space)
    if not run.accelerator.is_main_process:
        return
    found = {"measurement": measurement, "image_score": config.image_score, "sources": plan.sources}
    found |= {"targets": plan.targets, "pairs": pairs, "curves": curves, "natural": natural}
    plots = plot_steering(found, run.folder / "plots")
    track(run.accelerator, "steer", config)
    for curve in curves:
        name = f"{curve['budget']} (x 1000)/success/{curve['attacker']} attacks, {curve['judge']} judges"
        for place, success in zip(curve["grid"], curve["figures"]["success"], strict=True):
            log(run.accelerator, {name: success}, round(1000 * place))
    log_figures(run.accelerator, list(plots.values()))
    write_report(
        run,
        title=f"{run.folder.name}: steering {setup.classifier.tag} through its null space",
        verdict=tables.steering_verdict(found),
        warnings=tables.steering_warnings(found),
        sections=tables.steering_sections(found, plots),
        figures=found,
        rows=rows,
    )


if __name__ == "__main__":
    main()
