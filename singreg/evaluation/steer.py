"""The steering job: fit two translators, measure the classifier, steer at a fixed image score and at equal effort, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.features import FeatureBatch, iterate_features
from singreg.analysis.fitting import FittedTranslator
from singreg.analysis.fitting_mlp import fit_mlp_on_part
from singreg.analysis.model import analyze_model
from singreg.analysis.old_steering.curves import Budgets, steer_curves
from singreg.analysis.old_steering.findings import steering_findings, steering_warnings
from singreg.analysis.old_steering.on_manifold import fit_conditional, natural_radii
from singreg.analysis.old_steering.pairs import steer_pairs
from singreg.analysis.old_steering.plan import PairPlan, plan_pairs
from singreg.analysis.old_steering.results import SteeringCurve, SteeringPairs, SteerReport
from singreg.analysis.results import ModelMeasurement
from singreg.data.classes import resolve_classes
from singreg.evaluation.fitting import fit_translators
from singreg.evaluation.steer_config import ALL, SteerConfig
from singreg.evaluation.steer_pictures import SteeredPictures, draw_steered, open_renderer
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.reporting.steering_report import report_to_tensorboard, write_steer_report
from singreg.reporting.steering_tables import table1
from singreg.reporting.unclip import UnclipRenderer
from singreg.translator import LinearTranslator, Translator
from singreg.workbench.build import Bench
from singreg.workbench.run import Run, describe_machine

Value = TypeVar("Value")


@dataclass
class SteeringBench:
    """The bench with the plan of what is steered where; every complaint about names and prompts comes when it is built.

    renderer: what draws steered pictures, on the main process, where asked for.
    """

    bench: Bench
    plan: PairPlan
    renderer: UnclipRenderer | None = None

    @classmethod
    def build(cls, config: SteerConfig, accelerator: Accelerator) -> SteeringBench:
        """Load data and models, find the source classes and embed the targets (K, n).

        Raises:
            ValueError: classes that do not exist, a source that is its only target, a drawing pipeline that cannot be opened or
                draws embeddings of another width, and what `Bench.build` refuses.
        """
        renderer = open_renderer(config.unclip, accelerator)  # first: what is missing should not be said after minutes of work
        bench = Bench.build(
            config, config.model, accelerator,
            batch_size=config.batch_size, normalize_targets=config.translator.normalize_targets,
        )  # fmt: skip
        bench.settings = replace(bench.settings, cache=config.cache)
        if renderer is not None and renderer.width != bench.texts.shape[1]:
            raise ValueError(
                f"unclip: {config.unclip} draws {renderer.width}-dimensional embeddings and {bench.vlm.tag} gives {bench.texts.shape[1]}; "
                "set vlm to the CLIP that the pipeline was trained with"
            )
        return cls(bench, choose_pairs(config, bench), renderer)


def choose_pairs(config: SteerConfig, bench: Bench) -> PairPlan:
    """Source classes and target prompts (K, n) by the configuration, matched to the head's classes.

    Raises:
        ValueError: names that are not among the classes, all of them at once, with the nearest ones; see also `plan_pairs`.
    """
    names, labels = bench.parts.class_names, np.asarray(bench.parts.test.labels)
    problems: list[str] = []

    def found(key: str, wanted: list[str] | str) -> list[int]:
        if wanted == ALL or wanted == [ALL]:
            return sorted({int(label) for label in labels})
        if not wanted:
            return []
        try:
            return [names.index(name) for name in resolve_classes(wanted, names).keys]
        except ValueError as error:
            problems.append(f"{key}: {error}")
            return []

    sources, targets = found("sources", config.sources), found("targets", config.targets)
    if problems:
        raise ValueError("\n".join(problems))
    texts = [bench.texts[targets]]
    if config.prompts:
        texts.append(bench.vlm.embed_texts(config.prompts).to(bench.texts))
    return plan_pairs(
        labels, names, bench.texts, sources, [*(names[label] for label in targets), *config.prompts], torch.cat(texts),
        images_per_source=config.images_per_class, max_pairs=config.max_pairs, seed=config.seed,
    )  # fmt: skip


class Steering:
    """Fit, measure, steer, report; holds what the stages share. Figures in degrees and shares, tensors as in `Bench`."""

    def __init__(self, run: Run, config: SteerConfig, steering_bench: SteeringBench) -> None:
        self.run, self.config = run, config
        self.bench, self.plan, self.renderer = steering_bench.bench, steering_bench.plan, steering_bench.renderer
        weight = self.bench.classifier.weight
        self.null_space = NullSpace.from_weight(weight, invariance=config.model.invariance).to(weight.device)
        self.fitted: dict[str, FittedTranslator] = {}
        self.translators: dict[str, Translator] = {}
        self.pictures: SteeredPictures | None = None
        self.measurement: ModelMeasurement
        self.pairs: list[SteeringPairs]
        self.curves: list[SteeringCurve]
        self.budgets: Budgets

    def _timed(self, stage: str, work: Callable[[], Value]) -> Value:
        start = time.monotonic()
        result = work()
        self.run.seconds[stage] = time.monotonic() - start
        return result

    def fit_translators(self) -> None:
        """The fitted translator from the bank, the auditor from other pictures, non-linear ones asked for (stage "translators")."""
        bench, config = self.bench, self.config

        def work() -> dict[str, Translator]:
            self.fitted = fit_translators(bench, config.translator, config.auditor, invariance=config.model.invariance)
            found: dict[str, Translator] = {name: fitted.translator for name, fitted in self.fitted.items()}
            for kind in config.mlp:
                found[kind] = fit_mlp_on_part(
                    bench.classifier, bench.parts.bank, bench.embeddings["bank"], mlp=MLPSettings(kind=kind, seed=config.seed),
                    normalize_targets=config.translator.normalize_targets, info=bench.info, settings=bench.settings,
                )  # fmt: skip
            return found

        self.translators = self._timed("translators", work)

    def measure(self) -> None:
        """The classifier on all test pictures, and the natural radii of its null component (stages "measure", "radii")."""
        parts, settings, classifier = self.bench.parts, self.bench.settings, self.bench.classifier
        self.measurement = self._timed(
            "measure",
            lambda: analyze_model(
                classifier, parts.test, self.bench.embeddings["test"], self.bench.texts, self.translators,
                mean=self.fitted["auditor"].mean, invariance=self.config.model.invariance, settings=settings,
                steering_image_score=self.config.image_score,
            ),
        )  # fmt: skip

        def work() -> Budgets:
            gaussian = fit_conditional(
                classifier, parts.bank, self.bench.embeddings["bank"], self.null_space,
                floor=self.config.radius_floor, settings=settings,
            )  # fmt: skip
            natural = natural_radii(
                classifier, parts.test, self.bench.embeddings["test"], gaussian, fit_images=len(parts.bank), settings=settings
            )
            return Budgets.over(self.config.steps, self.config.radii, gaussian, natural)

        self.budgets = self._timed("radii", work)

    def _batches(self, description: str) -> Iterator[FeatureBatch]:
        test, embeddings = self.bench.parts.test, self.bench.embeddings["test"]
        return iterate_features(self.bench.classifier, test, embeddings, self.bench.settings, description)

    def steer(self) -> None:
        """Table 1 and the curves by every attacker, and the pictures to draw (stages "pairs", "curves", "pictures").

        All translators judge table 1; the curves, which call a judge at every point, are judged by the two linear ones.
        """
        linear = {name: found.translator for name, found in self.fitted.items()}
        self.pairs = self._timed(
            "pairs",
            lambda: steer_pairs(
                self._batches("steering to a fixed image score"), self.plan,
                texts=self.bench.texts, weight=self.bench.classifier.weight, null_space=self.null_space,
                attackers=self.translators, image_score=self.config.image_score,
            ),
        )  # fmt: skip
        self.curves = self._timed(
            "curves",
            lambda: steer_curves(
                self._batches("steering at equal effort"), self.plan, self.budgets,
                texts=self.bench.texts, null_space=self.null_space, attackers=self.translators, judges=linear,
            ),
        )  # fmt: skip
        if self.config.unclip is not None:
            self.pictures = self._timed("pictures", lambda: self._draw(linear))

    def _draw(self, linear: dict[str, LinearTranslator]) -> SteeredPictures:
        return draw_steered(
            self.renderer, self.bench, self.plan, self.config.unclip_pictures,
            null_space=self.null_space, attacker=linear["fitted"], judge=linear["auditor"], image_score=self.config.image_score,
            seed=self.config.seed,
        )  # fmt: skip

    def report(self) -> SteerReport | None:
        """Write the run's files and say what was found (main process only; no shapes)."""
        if not self.run.accelerator.is_main_process:
            return None
        natural = self.budgets.natural
        report = SteerReport(
            measurement=self.measurement,
            image_score=self.config.image_score,
            sources=list(self.plan.sources),
            targets=list(self.plan.targets),
            pairs=self.pairs,
            curves=self.curves,
            natural=natural,
            findings=steering_findings(self.measurement, self.pairs, self.curves, natural, self.config.image_score),
            warnings=steering_warnings(
                self.measurement, self.pairs, natural, self.config.image_score, self.config.auditor.images_per_feature
            ),
            settings={**asdict(self.config), "command": " ".join(["recipes/steer.py", *sys.argv[1:]])},
            machine=describe_machine(self.run.accelerator),
            seconds=self.run.seconds,
            shown=[] if self.pictures is None else self.pictures.shown,
        )
        plots = write_steer_report(report, self.run.folder, sheet=None if self.pictures is None else self.pictures.sheet)
        report_to_tensorboard(report, self.run.folder / "tensorboard", plots)
        print(table1(report, compact=True))
        print("\n".join([*report.findings, *report.warnings]))
        print(f"report: {self.run.folder / 'report.md'}\nplots:  {', '.join(str(path) for path in plots.values())}")
        return report


def dry_run(config: SteerConfig, steering_bench: SteeringBench) -> None:
    """Run one batch and say what would be steered, after the head and parts that `Bench.build` told; no run folder (no shapes)."""
    bench, plan = steering_bench.bench, steering_bench.plan
    classifier, test = bench.classifier, bench.parts.test
    some = test.subset(range(min(config.batch_size, len(test))))
    settings = replace(bench.settings, cache=None, progress=False)
    batch = next(iterate_features(classifier, some, bench.embeddings["test"][: len(some)], settings, "dry run"))
    if not bench.accelerator.is_main_process:
        return
    rows = _rows_planned(plan, torch.from_numpy(np.asarray(test.labels)))
    print(f"classifier {classifier.tag}: {classifier.num_classes} classes, {classifier.feature_dim} features")
    print(f"one batch: features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}, embeddings {bench.texts.shape[1]}-d")
    print(
        f"steering: {int(plan.wanted.sum())} pairs of {len(plan.sources)} sources and {len(plan.targets)} targets, "
        f"{int(plan.chosen.sum())} pictures, {rows} steerings"
    )
    print(f"memory: second moments and translator statistics {3 * 8 * classifier.feature_dim**2 / 2**20:.0f} MiB, beside activations")
    print("dry run: nothing was measured, no run folder was made")


def _rows_planned(plan: PairPlan, labels: Tensor) -> int:
    """(picture, target) rows over the whole part; labels (N,)."""
    chosen = labels[torch.from_numpy(plan.chosen)]
    counts = torch.stack([(chosen == label).sum() for label in plan.source_labels])
    return int((counts * plan.wanted.cpu().sum(1)).sum())
