"""One study arm, measured: scores, steering at equal effort, information and side effects (METHOD sections 8 and 9)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, PassSettings, evenly, iterate_features
from singreg.analysis.information import fit_blocks, measure_information
from singreg.analysis.information_results import UniqueInformation
from singreg.analysis.model import STEERING_IMAGES, analyze_model
from singreg.analysis.old_steering.curves import Budgets
from singreg.analysis.old_steering.on_manifold import fit_conditional, natural_radii
from singreg.analysis.results import ModelMeasurement, Rows
from singreg.analysis.statistics import paired_ratio
from singreg.analysis.study.agreement import translator_agreement
from singreg.analysis.study.arm_results import RELATIVE_STEPS, ArmFigures, OodScores, SideEffects
from singreg.analysis.study.auditors import Auditor, fit_auditors
from singreg.analysis.study.harmless import attribute_r2, harmless_rows
from singreg.analysis.study.side_effects import OOD_COLUMNS, calibration, ood_columns, ood_from_columns
from singreg.analysis.study.steering_images import equal_effort, steer_images
from singreg.data.corruption import KINDS, CorruptedSplit, check_corruptions
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.translator import LinearTranslator, Translator
from singreg.utils import gather_rows

__all__ = ["STEPS", "ArmFigures", "Auditor", "KnownAttributes", "OtherVLM", "fit_auditors", "measure_arm"]

STEPS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Relative steps of the success curve whose area is reported."""


@dataclass(frozen=True)
class OtherVLM:
    """A second judge with a space of its own: texts (C, n'), test embeddings (N, n'), its translators by name ("auditor VLM2")."""

    texts: Tensor
    embeddings: np.ndarray
    translators: Mapping[str, Translator]


@dataclass(frozen=True)
class KnownAttributes:
    """What is known of every picture besides its class: k names, values of the fit part (F, k) and of the test part (N, k)."""

    names: tuple[str, ...]
    fit: np.ndarray
    test: np.ndarray


def measure_arm(
    classifier: Classifier,
    test: ImageSplit,
    embeddings: np.ndarray,
    texts: Tensor,
    translators: Mapping[str, Translator],
    *,
    fit: ImageSplit,
    fit_embeddings: np.ndarray,
    mean: Tensor,
    other: OtherVLM | None = None,
    transfers: Sequence[tuple[str, str]] = (),
    ood: ImageSplit | None = None,
    attributes: KnownAttributes | None = None,
    corruptions: Sequence[str] = KINDS,
    severity: int = 3,
    invariance: Invariance = "logits",
    settings: PassSettings | None = None,
    image_score: float = 40.0,
    steps: Sequence[float] = STEPS,
    radius_floor: float = 1e-3,
    seed: int = 0,
) -> ArmFigures:
    """All figures of one arm on the test pictures (see `ArmFigures`). Each translator attacks and judges itself; angles in degrees.

    `transfers`: (attacker, judge) pairs beside that, of any two names, also of two VLMs: what a judge sees of an attack that could
    not use its own estimation errors (METHOD section 9e), reported as "ATTACKER→JUDGE". `fit`: other pictures (the audit part)
    behind the probes, the Gaussian of on-manifold steering and ViM's scale; some labelled, of 2 classes or more. `ood`: pictures
    of no class, for the AUROCs. With `settings.cache` every picture goes through the network once, else once a measurement.

    Shapes: embeddings (N, n), texts (C, n) unit rows, fit_embeddings (F, n), mean (m,) of features for the centred removal.

    Raises:
        ValueError: see `analyze_model`, `fit_blocks` and `Budgets.over`; attributes that do not fit the parts, names that clash.
    """
    judges = [(texts, embeddings, translators)] + ([(other.texts, other.embeddings, other.translators)] if other else [])
    check_corruptions(corruptions, severity)
    _check_names(transfers, [[*found] for _, _, found in judges])
    if attributes is not None:
        _check_attributes(attributes, len(fit), len(test))
    work = _Arm(classifier, test, fit, fit_embeddings, mean, invariance, settings or PassSettings())
    measurement = _scores(work, judges, image_score)
    information, harmless = work.information(embeddings, texts)
    readers = {name: (prompts, reader) for prompts, _, found in judges for name, reader in found.items()}
    attacks = {**{name: (name, name) for name in readers}, **{f"{one}→{two}": (one, two) for one, two in transfers}}
    steering = work.steering(readers, attacks, work.budgets(steps, radius_floor, embeddings), image_score, seed)
    side, side_rows = work.side_effects(ood, corruptions, severity, seed)
    rows = {**measurement.rows, **harmless, **steering, **side_rows}
    return ArmFigures(
        measurement=replace(measurement, rows=rows),
        information=information,
        harmless_r2=_r2(harmless["harmless_residual"], harmless["harmless_spread"], rows["label"]),
        attributes={} if attributes is None else work.attributes(attributes),
        steering={name: equal_effort(rows, name, image_score) for name in attacks},
        agreement={pair: value for prompts, _, found in judges for pair, value in _agreement(found, prompts).items()},
        side_effects=side,
        rows=rows,
    )


def _r2(residual: np.ndarray, spread: np.ndarray, labels: np.ndarray) -> list[float]:
    """[R², low, high] from residual, spread and class of every picture (N,)."""
    value, low, high = paired_ratio(residual, spread, groups=labels)
    return [1 - value, 1 - high, 1 - low]


def _check_attributes(attributes: KnownAttributes, fit: int, test: int) -> None:
    expected = [(fit, len(attributes.names)), (test, len(attributes.names))]
    if [attributes.fit.shape, attributes.test.shape] != expected:
        raise ValueError(
            f"known attributes must be {expected[0]} for the fit part and {expected[1]} for the test part, got "
            f"{attributes.fit.shape} and {attributes.test.shape}"
        )


def _check_names(transfers: Sequence[tuple[str, str]], by_vlm: Sequence[Sequence[str]]) -> None:
    names, problems = [name for found in by_vlm for name in found], []
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"translators of two VLMs share a name: {', '.join(twice)}; rename one, for example 'auditor VLM2'")
    if unknown := sorted({name for pair in transfers for name in pair} - {*names}):
        problems.append(f"transfers name no translator: {', '.join(unknown)}; there are {', '.join(names)}")
    if problems:
        raise ValueError("; ".join(problems))


Judge = tuple[Tensor, np.ndarray, Mapping[str, Translator]]
"""Class prompts (C, n), test embeddings (N, n) and translators of one VLM."""


def _scores(work: _Arm, judges: Sequence[Judge], image_score: float) -> ModelMeasurement:
    """`analyze_model` once a VLM, as one measurement; all but the translators' figures are the first one's."""
    first, *others = (
        analyze_model(
            work.classifier, work.test, embeddings, texts, readers, mean=work.mean, invariance=work.invariance,
            settings=work.settings, steering_image_score=image_score,
        )
        for texts, embeddings, readers in judges
    )  # fmt: skip
    for more in others:
        first = replace(
            first,
            translators={**first.translators, **more.translators},
            steering={**first.steering, **more.steering},
            rows={**more.rows, **first.rows},
        )
    return first


def _agreement(readers: Mapping[str, Translator], texts: Tensor) -> dict[str, float]:
    linear = {name: reader for name, reader in readers.items() if isinstance(reader, LinearTranslator)}
    pairs = combinations(linear.items(), 2)
    return {f"{one}|{two}": translator_agreement(first, second, texts) for (one, first), (two, second) in pairs}


class _Arm:
    """One classifier with its parts, and the passes over them."""

    def __init__(
        self, classifier: Classifier, test: ImageSplit, fit: ImageSplit, fit_embeddings: np.ndarray, mean: Tensor,
        invariance: Invariance, settings: PassSettings,
    ) -> None:  # fmt: skip
        self.classifier, self.test, self.fit, self.fit_embeddings = classifier, test, fit, fit_embeddings
        self.mean, self.invariance, self.settings = mean, invariance, settings
        self.space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(classifier.weight.device)

    def tested(self, embeddings: np.ndarray) -> Iterator[FeatureBatch]:
        return iterate_features(self.classifier, self.test, embeddings, self.settings, "measuring the arm")

    def known(self) -> Iterator[FeatureBatch]:
        return iterate_features(self.classifier, self.fit, self.fit_embeddings, self.settings, "fitting probes")

    def pictures(self, part: ImageSplit, settings: PassSettings) -> Iterator[FeatureBatch]:
        """A part without embeddings."""
        return iterate_features(self.classifier, part, np.zeros((len(part), 0), np.float32), settings, "side effects")

    def information(self, embeddings: np.ndarray, texts: Tensor) -> tuple[UniqueInformation, Rows]:
        """Probes and R² of the blocks, and of what the class prompts (C, n) do not span; fits on one part, read on the other."""
        fits = fit_blocks(
            self.known(), null_space=self.space, classes=self.classifier.num_classes, target_dim=self.fit_embeddings.shape[1]
        )
        harmless = harmless_rows(self.tested(embeddings), fits, texts)
        columns = {f"harmless_{name}": harmless[name] for name in ("residual", "spread")}
        return measure_information(self.tested(embeddings), fits), columns

    def budgets(self, steps: Sequence[float], floor: float, embeddings: np.ndarray) -> Budgets:
        gaussian = fit_conditional(
            self.classifier, self.fit, self.fit_embeddings, self.space, floor=floor, settings=self.settings
        )
        natural = natural_radii(
            self.classifier, self.test, embeddings, gaussian, fit_images=len(self.fit), settings=self.settings
        )
        return Budgets.over([*steps, *RELATIVE_STEPS], (), gaussian, natural)

    def steering(
        self, readers: Mapping[str, tuple[Tensor, Translator]], attacks: Mapping[str, tuple[str, str]], budgets: Budgets,
        degrees: float, seed: int,
    ) -> Rows:  # fmt: skip
        """Columns "FIGURE/NAME" (N,), NaN for pictures that are not steered: at most 1024, evenly over the part."""
        count = len(self.test)
        chosen = np.zeros(count, dtype=bool)
        chosen[evenly(count, STEERING_IMAGES)] = True
        columns: list[Rows] = []
        for batch in self.pictures(self.test, self.settings):
            mine = torch.from_numpy(chosen[batch.indices.numpy()])
            if not bool(mine.any()):
                continue
            on_device = mine.to(batch.features.device)
            picked = FeatureBatch(
                batch.features[on_device], batch.logits[on_device], batch.embeddings[on_device], batch.labels[on_device],
                batch.indices[mine],
            )  # fmt: skip
            figures: Rows = {"index": picked.indices.numpy()}
            for name, (attacker, judge) in attacks.items():
                found = steer_images(
                    picked, texts=readers[attacker][0], null_space=self.space, attacker=readers[attacker][1], budgets=budgets,
                    judge=readers[judge][1], judge_texts=readers[judge][0], image_score=degrees, seed=seed,
                )  # fmt: skip
                figures |= {f"{figure}/{name}": values for figure, values in found.items()}
            columns.append(figures)
        rows = gather_rows(columns, sort_by="index")
        places = rows.pop("index")
        whole = {key: np.full(count, np.nan) for key in rows}
        for key, values in rows.items():
            whole[key][places] = values
        return whole

    def attributes(self, known: KnownAttributes) -> dict[str, dict[str, float]]:
        """R² by attribute and block: the same fits as of embeddings, with the attributes in their place."""

        def instead(batches: Iterator[FeatureBatch], values: np.ndarray) -> Iterator[FeatureBatch]:
            for batch in batches:
                picked = torch.from_numpy(np.asarray(values[batch.indices.numpy()], np.float32)).to(batch.features.device)
                yield replace(batch, embeddings=picked)

        fits = fit_blocks(
            instead(self.known(), known.fit), null_space=self.space, classes=self.classifier.num_classes, target_dim=len(known.names)
        )
        return attribute_r2(instead(self.pictures(self.test, self.settings), known.test), fits, known.names)

    def side_effects(
        self, ood: ImageSplit | None, corruptions: Sequence[str], severity: int, seed: int
    ) -> tuple[SideEffects, Rows]:
        """Calibration, OOD AUROCs and corrupted accuracy, with their columns (N,)."""
        tested = self._outputs(self.test, self.settings)
        logits, labels = torch.from_numpy(tested["logits"]), torch.from_numpy(tested["label"])
        ece, nll = calibration(logits, labels)
        scores: OodScores | None = None
        if ood is not None:
            three = (tested, self._outputs(ood, self.settings), self._outputs(self.fit, self.settings))
            scores = ood_from_columns(*({key: torch.from_numpy(rows[key]) for key in OOD_COLUMNS} for rows in three))
        rows: Rows = {
            "nll": torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy(),
            "null_energy_centred": tested["residual"] ** 2,
            "energy_score": -tested["logsumexp"],
        }
        for kind in corruptions:
            part = CorruptedSplit(self.test, kind, severity, seed=seed)
            rows[f"correct_{kind}"] = self._outputs(part, replace(self.settings, cache=None))["correct"]
        corrupted = {kind: float(rows[f"correct_{kind}"].mean()) for kind in corruptions}
        return SideEffects(ece=ece, nll=nll, corrupted=corrupted, ood=scores), rows

    def _outputs(self, part: ImageSplit, settings: PassSettings) -> Rows:
        """Logits (N, C), labels, whether right, and what OOD scores are made of, each (N,), of all processes' pictures."""
        rows: list[Rows] = []
        for batch in self.pictures(part, settings):
            columns = ood_columns(batch.features, batch.logits, self.space, self.mean)
            columns |= {"logits": batch.logits, "label": batch.labels, "correct": (batch.logits.argmax(1) == batch.labels).double()}
            rows.append({"index": batch.indices.numpy(), **{name: value.cpu().numpy() for name, value in columns.items()}})
        return gather_rows(rows, sort_by="index")
