"""The feature half of a pixel job: the same pictures steered in feature space, measured once a model and kept in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from singreg.analysis.fitting import FittedTranslator
from singreg.analysis.old_steering.curves import Budgets
from singreg.analysis.old_steering.on_manifold import fit_conditional, natural_radii
from singreg.analysis.old_steering.plan import PairPlan, plan_pairs
from singreg.analysis.old_robustness.attacks import Outsider
from singreg.analysis.old_robustness.measure import RobustnessSettings, measure_robustness
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.data.classes import resolve_classes
from singreg.evaluation.compare_bench import ModelBench
from singreg.evaluation.steer_config import ALL, names_of
from singreg.evaluation.steer_pixels_bench import PixelsBench
from singreg.evaluation.steer_pixels_config import AttackedModelConfig, PixelsConfig
from singreg.evaluation.steer_pixels_kept import MADE_FROM, read_kept
from singreg.nullspace import NullSpace
from singreg.utils import write_json

FEATURES = "features.json"
NEAR = (0.05, 1.0)
"""Shares of σ_1 below which directions count as nearly null; 1 is all of them: held by the logit tolerance alone, as pixels are."""


@dataclass
class FeatureAttack:
    """Measures every model's robustness in feature space; the first model is the outsider that attacks the later ones."""

    config: PixelsConfig
    bench: PixelsBench
    first: tuple[str, Outsider] | None = None
    first_made: Mapping[str, str] | None = None

    def of(
        self, model: AttackedModelConfig, bench: ModelBench, fitted: Mapping[str, FittedTranslator], folder: Path,
        made: Mapping[str, str],
    ) -> RobustnessFigures | None:  # fmt: skip
        """From the model's folder where a killed run left it, else measured and written there; None without a null space.

        made: hashes of what the figures hang on; those left there must have the same, and the same of the first model.

        Of a model whose null space is dropped these are the figures of its features before that: read its "drop_null" curves.
        No shapes.
        """
        classifier = bench.classifier
        space = NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=True)
        if not space.nullity or not self.config.feature_steps:
            return None
        outsiders = {}
        mine = Outsider(fitted["fitted"].translator, space)
        if self.first is None:
            self.first = (model.known_as, mine)
        elif not model.drop_null and self.first[1].null_space.basis.shape[0] == classifier.feature_dim:
            outsiders = dict([self.first])
        path = folder / FEATURES
        self.first_made = self.first_made or made
        made = {**made, **{f"{name} of the first model": value for name, value in self.first_made.items()}}
        if (kept := read_kept(path, made)) is not None:
            return RobustnessFigures.from_json(kept)
        test, embeddings = self.bench.pictures.test, bench.embeddings["test"]
        gaussian = fit_conditional(classifier, bench.parts.bank, bench.embeddings["bank"], space, settings=bench.settings)
        natural = natural_radii(
            classifier, bench.parts.test, embeddings, gaussian, fit_images=len(bench.parts.bank), settings=bench.settings
        )
        steps = (0.0, *self.config.feature_steps)
        found = measure_robustness(
            classifier, test, embeddings, bench.texts, {name: f.translator for name, f in fitted.items()},
            plan=self._plan(bench), radii=Budgets.over(steps, self.config.feature_radii, gaussian, natural), outsiders=outsiders,
            invariance=model.invariance,
            options=RobustnessSettings(steps=steps, near_ratios=NEAR, tolerances=(self.config.tau,), logit_tolerance=self.config.tau),
            settings=bench.settings,
        )  # fmt: skip
        if self.bench.accelerator.is_main_process:
            write_json(path, {**found.to_json(), MADE_FROM: made})
        self.bench.accelerator.wait_for_everyone()
        return found

    def _plan(self, bench: ModelBench) -> PairPlan:
        """The attacked pictures, each towards the targets of its class; `feature_pairs` of them are drawn evenly over sources."""
        part, chosen = self.bench.pictures.test, self.bench.chosen
        names = names_of(self.config.targets)
        keys = part.class_names if names == [ALL] else resolve_classes(names, part.class_names).keys
        texts = bench.texts[[list(part.class_names).index(key) for key in keys]]
        labels = np.full(len(part), -1)
        labels[chosen.indices] = chosen.labels
        sources = sorted({int(label) for label in chosen.labels})
        return plan_pairs(
            labels, part.class_names, bench.texts, sources, list(keys), texts, max_pairs=self.config.feature_pairs, seed=self.config.seed
        )
