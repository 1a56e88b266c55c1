"""One arm of a study, measured: scores, steering at equal effort, information, side effects (METHOD 8 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from singreg.analysis.features import FeatureBatch, PassSettings, evenly, iterate_features
from singreg.analysis.fitting import translator_agreement
from singreg.analysis.probes import BlockFits, fit_blocks, measure_information
from singreg.analysis.scores import STEERING_IMAGES, Rows, analyze_model
from singreg.analysis.side_effects import calibration, network_outputs, ood_figures
from singreg.analysis.statistics import paired_ratio
from singreg.analysis.steering import SteeringRows, in_its_own_dtype, judged, own_prompt, steering_targets
from singreg.analysis.steering_curves import FIGURES, Budgets, fit_conditional, mean_height, natural_radii, read_along
from singreg.data.corruption import KINDS, CorruptedSplit
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.steering import AnyTranslator, steer
from singreg.translator import LinearTranslator, Translator
from singreg.utils import gather_rows

STEPS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Relative steps of the success curve whose area is reported."""
READ_AT = {"10": 0.1, "25": 0.25}
"""Relative steps at which AS and success are read, by their names in per cent."""
IMAGE_SCORE = 40.0
SEVERITY = 3  # of corruptions
OVERALL = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "ratio", "kappa")
INTERVALS = ("AS_neg", "AS_abs", "IS", "ratio", "kappa")

Read = Callable[..., Iterator[FeatureBatch]]
"""A pass over a split: read(split, embeddings=None, cached=True)."""


@dataclass(frozen=True)
class Judge:
    """A vision-language model's class prompts (C, n), test embeddings (N, n) and translators by name."""

    texts: Tensor
    embeddings: np.ndarray
    translators: Mapping[str, Translator]


@dataclass(frozen=True)
class Measured:
    """An arm's figures by name ("AS_neg/auditor"), 95 % intervals of some of them, and one row an image.

    The rows are those of `analyze_model`, the columns of `steer_images` as "FIGURE/NAME" (NaN beyond the 1024 images
    that are steered), nll, harmless_residual and harmless_spread, and correct_KIND of every corruption.
    """

    figures: dict[str, float]
    intervals: dict[str, list[float]]
    rows: pd.DataFrame


def measure_arm(
    classifier: Classifier,
    test: ImageSplit,
    audit: ImageSplit,
    audit_embeddings: np.ndarray,
    judges: Sequence[Judge],
    *,
    mean: Tensor,
    transfers: Sequence[tuple[str, str]] = (),
    ood: ImageSplit | None = None,
    attributes: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    invariance: Invariance = "logits",
    settings: PassSettings | None = None,
    seed: int = 0,
) -> Measured:
    """Measure one arm on the test images. Each translator attacks and judges itself; angles in degrees.

    Args:
        audit: other images, behind the probes, the Gaussian of on-manifold steering and ViM's scale.
        judges: vision-language models with translators of this classifier.
        transfers: (attacker, judge) pairs beside that: what a judge sees of an attack that could not use its own
            estimation errors (METHOD section 9e), as "ATTACKER→JUDGE".
        ood: images of no class, for the AUROCs.
        attributes: what is known of the audit (F, k) and test images (N, k) besides their class.

    Shape: audit_embeddings (F, n), mean (m,) of features for the centred removal.

    Raises:
        ValueError: see `analyze_model` and `fit_blocks`; translators of two judges with one name.
    """
    settings, first = settings or PassSettings(), judges[0]
    readers = {name: (judge.texts, reader) for judge in judges for name, reader in judge.translators.items()}
    if len(readers) < sum(len(judge.translators) for judge in judges):
        raise ValueError(f"translators of two vision-language models share a name among {', '.join(readers)}")
    space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(classifier.weight.device)
    blocks: dict[str, Any] = {"null_space": space, "classes": classifier.num_classes}

    def read(split: ImageSplit, embeddings: np.ndarray | None = None, cached: bool = True) -> Iterator[FeatureBatch]:
        table = np.zeros((len(split), 0), np.float32) if embeddings is None else embeddings
        passes = settings if cached else replace(settings, cache=None)
        return iterate_features(classifier, split, table, passes, "measuring the arm")

    options = {"mean": mean, "invariance": invariance, "settings": settings}
    rows, figures, intervals = _scores(classifier, test, judges, options)
    fits = fit_blocks(read(audit, audit_embeddings), target_dim=audit_embeddings.shape[1], **blocks)
    information = measure_information(read(test, first.embeddings), fits)
    harmless = harmless_rows(read(test, first.embeddings), fits, first.texts)
    value, low, high = paired_ratio(*harmless.values(), groups=rows["label"])
    figures |= {"null_probe": information["accuracy"]["null_space"], "probe_chance": information["chance"]}
    figures |= {"unique_r2": information["unique"], "harmless_r2": 1 - value}
    intervals |= {"harmless_r2": [1 - high, 1 - low], "null_probe": information["intervals"]["accuracy null_space"]}
    if attributes is not None:
        known, held = (table.to_numpy(np.float32) for table in attributes)
        fits = fit_blocks(read(audit, known), target_dim=known.shape[1], **blocks)
        figures |= attribute_r2(read(test, held), fits, [str(name) for name in attributes[0].columns])
    gaussian = fit_conditional(classifier, audit, audit_embeddings, space, settings=settings)
    natural = natural_radii(classifier, test, first.embeddings, gaussian, fit_images=len(audit), settings=settings)
    attack = partial(steer_images, null_space=space, budgets=Budgets.over(STEPS, (), gaussian, natural), seed=seed)
    attacks = {name: (name, name) for name in readers} | {f"{a}→{b}": (a, b) for a, b in transfers}
    steered = _steered(read(test), len(test), readers, attacks, attack)
    for name in attacks:
        figures |= steering_figures(steered, name)
    side, side_rows = _side_effects(read, test, audit, ood, partial(network_outputs, space=space, mean=mean), seed)
    columns = {f"harmless_{name}": values for name, values in harmless.items()}
    return Measured({**figures, **side}, intervals, pd.DataFrame({**rows, **columns, **steered, **side_rows}))


def _scores(
    classifier: Classifier, test: ImageSplit, judges: Sequence[Judge], options: Mapping[str, Any]
) -> tuple[Rows, dict[str, float], dict[str, list[float]]]:
    """`analyze_model` once a judge, as one table and one dict; all but the translators' figures are the first one's."""
    found: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    rows: Rows = {}
    for judge in reversed(judges):  # the first one's rows and figures win
        table, figures = analyze_model(classifier, test, judge.embeddings, judge.texts, judge.translators, **options)
        rows |= {str(name): column.to_numpy() for name, column in table.items()}
        found |= {key: figures[key] for key in ("top1", "null_share", "null_energy")}
        found["nullity"], intervals["top1"] = figures["head"]["nullity"], figures["top1_interval"]
        for name, scores in figures["translators"].items():
            found |= {f"{key}/{name}": scores["overall"][key] for key in OVERALL}
            found |= {f"centred_{key}/{name}": scores["centred"][key] for key in ("AS", "AS_neg", "AS_abs", "IS")}
            found |= {f"{key}/{name}": scores[key] for key in ("cosine", "zero_shot")}
            intervals |= {f"{key}/{name}": scores["intervals"][key] for key in INTERVALS}
        linear = {name: T for name, T in judge.translators.items() if isinstance(T, LinearTranslator)}
        for (one, first), (two, second) in combinations(linear.items(), 2):
            found[f"agreement/{one}|{two}"] = translator_agreement(first, second, judge.texts)
    return rows, {key: math.nan if value is None else float(value) for key, value in found.items()}, intervals


def harmless_rows(batches: Iterable[FeatureBatch], fits: BlockFits, texts: Tensor) -> Rows:
    """Return of each image residual |P(z - T f)|² and spread |P(z - z̄)|², P the projection off the class prompts' span.

    T is the fit on f of `fit_blocks`, z̄ these images' mean; 1 - Σ residual / Σ spread is R²(P z | f) (METHOD section
    8.5). Both are 0 where the prompts span the whole space: nothing is left to measure.

    Shape: texts (C, n); returns (N,) each.
    """
    rank = int(torch.linalg.matrix_rank(texts.double()))
    inside = torch.linalg.svd(texts.double().T, full_matrices=False).U[:, :rank]
    rows = []
    for batch in batches:
        z = batch.embeddings.double()
        off, error = (value - (value @ inside) @ inside.T for value in (z, z - _predicted(fits, "features", batch)))
        rows.append({"index": batch.indices, "off": off.cpu(), "residual": error.square().sum(1).cpu()})
    table = gather_rows([{name: value.numpy() for name, value in row.items()} for row in rows], sort_by="index")
    left = float(rank < texts.shape[1])
    spread = np.square(table["off"] - table["off"].mean(0)).sum(1)
    return {"residual": left * table["residual"], "spread": left * spread}


def _predicted(fits: BlockFits, block: str, batch: FeatureBatch) -> Tensor:
    basis, solution = fits.basis[block], fits.solutions[block]
    return (batch.features.to(basis) @ basis) @ solution.matrix.T + solution.offset


def attribute_r2(batches: Iterable[FeatureBatch], fits: BlockFits, names: Sequence[str]) -> dict[str, float]:
    """Return held-out R² as "BLOCK_r2/NAME" of known attributes, from f, Π_p f and Π_n f; NaN for one that is constant.

    `fits` and the batches have the attributes (B, k) in the place of embeddings.
    """
    rows = []
    for batch in batches:
        targets = batch.embeddings.double()
        error = {block: (targets - _predicted(fits, block, batch)).square() for block in fits.basis}
        values = {"target": targets, **error}
        rows.append({"index": batch.indices.numpy(), **{name: value.cpu().numpy() for name, value in values.items()}})
    table = gather_rows(rows, sort_by="index")
    spread = np.square(table["target"] - table["target"].mean(0)).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = {block: np.where(spread > 0, 1 - table[block].sum(0) / spread, np.nan) for block in fits.basis}
    return {f"{block}_r2/{name}": float(r2[block][place]) for place, name in enumerate(names) for block in r2}


def _steered(
    batches: Iterable[FeatureBatch],
    count: int,
    readers: Mapping[str, tuple[Tensor, Translator]],
    attacks: Mapping[str, tuple[str, str]],
    attack: Callable[..., Rows],
) -> Rows:
    """Columns "FIGURE/NAME" (N,), NaN for images that are not steered: at most 1024, evenly over the split."""
    chosen = np.zeros(count, dtype=bool)
    chosen[evenly(count, STEERING_IMAGES)] = True
    columns: list[Rows] = []
    for batch in batches:
        mine = torch.from_numpy(chosen[batch.indices.numpy()])
        here = mine.to(batch.features.device)
        features, labels, indices = batch.features[here], batch.labels[here], batch.indices[mine]
        found: Rows = {"index": indices.numpy()}
        for name, (attacker, judge) in attacks.items():
            figures = attack(features, labels, indices, attacker=readers[attacker], judge=readers[judge])
            found |= {f"{figure}/{name}": values for figure, values in figures.items()}
        columns.append(found)
    rows = gather_rows(columns, sort_by="index")
    places = rows.pop("index")
    whole = {key: np.full(count, np.nan) for key in rows}
    for key, values in rows.items():
        whole[key][places] = values
    return whole


@torch.no_grad()
def steer_images(
    features: Tensor,
    labels: Tensor,
    indices: Tensor,
    *,
    attacker: tuple[Tensor, AnyTranslator],
    judge: tuple[Tensor, AnyTranslator],
    null_space: NullSpace,
    budgets: Budgets,
    seed: int = 0,
) -> Rows:
    """Steer every image towards one other class's prompt, fixed by seed and index; return columns (B,).

    steering_AS, steering_step (NaN out of reach), steering_reachable, steering_success at an image score of 40°; AS10,
    AS_abs10, success10, ... at relative steps; area_AS, ... over `STEPS`; manifold_AS50, ... at natural percentiles of
    the radius, along Σ times the gradient. The attacker chooses direction and step, the judge reads AS and success. One
    gradient step, float64, so all figures are lower bounds; AS in degrees.

    Args:
        attacker: class prompts (C, n) unit rows and a translator; so the judge, in a space of its own.

    Shape: features (B, m), labels and indices (B,).
    """
    prompts, reader = judge[0].double(), judge[1]
    targets = steering_targets(labels, indices, len(prompts), seed=seed)
    rows = SteeringRows(indices, labels, targets, features.double(), attacker[0].double()[targets])
    aimed = replace(rows, text=prompts[targets])
    fixed, same = in_its_own_dtype(attacker[1]), own_prompt(aimed.text, prompts)
    steered = steer(rows.features, rows.text, null_space=null_space, image_score=IMAGE_SCORE, translator=fixed)
    ok = steered.reachable
    before, _ = judged(reader, rows.features, aimed.text, prompts, same)
    after, won = judged(reader, steered.features, aimed.text, prompts, same)
    read_at = {
        "AS": torch.where(ok, before - after, torch.full_like(after, torch.nan)),
        "step": steered.step / torch.linalg.vector_norm(rows.features, dim=-1),  # NaN out of reach
        "reachable": ok.double(),
        "success": (won & ok).double(),
    }
    found = {f"steering_{name}": values.cpu().numpy() for name, values in read_at.items()}
    for budget, direction, steps in budgets.steps_along(rows, attacker[1], null_space):
        grid = budgets.grid(budget)
        if budget == "radius":
            continue
        read = read_along(aimed, direction, torch.nan_to_num(steps), reader, prompts)
        for name, height in zip(FIGURES, (values.cpu().numpy() for values in read), strict=True):
            if budget == "step":
                found[f"area_{name}"] = mean_height(height, grid)
                found |= {f"{name}{label}": height[:, grid.index(step)] for label, step in READ_AT.items()}
            else:
                marks = budgets.marks.items()
                found |= {f"manifold_{name}{label[:2]}": height[:, grid.index(mark)] for label, mark in marks}
    return found


def steering_figures(columns: Mapping[str, np.ndarray], name: str) -> dict[str, float]:
    """Return the means of one attack's columns "FIGURE/NAME" (N,): AS and step over the reachable, others over all."""
    mine = {key: values for key, values in columns.items() if key.rpartition("/")[2] == name}
    reachable = mine[f"steering_reachable/{name}"]
    some = {True: reachable == 1, False: ~np.isnan(reachable)}
    chosen = {key: values[some[key.startswith(("steering_AS/", "steering_step/"))]] for key, values in mine.items()}
    return {key: float(values.mean()) if len(values) else float("nan") for key, values in chosen.items()}


def _side_effects(
    read: Read, test: ImageSplit, audit: ImageSplit, ood: ImageSplit | None, outputs: Callable[..., Rows], seed: int
) -> tuple[dict[str, float], Rows]:
    """Calibration, OOD AUROCs and corrupted accuracy (METHOD section 8.8), with columns (N,)."""
    tested = outputs(read(test))
    logits, labels = torch.from_numpy(tested["logits"]), torch.from_numpy(tested["label"])
    figures = calibration(logits, labels)
    if ood is not None:
        figures |= ood_figures(tested, outputs(read(ood)), outputs(read(audit)))
    rows: Rows = {"nll": cross_entropy(logits.double(), labels, reduction="none").numpy()}
    for kind in KINDS:
        corrupted = CorruptedSplit(test, kind, SEVERITY, seed=seed)
        rows[f"correct_{kind}"] = outputs(read(corrupted, cached=False))["correct"]
        figures[f"corrupted/{kind}"] = float(rows[f"correct_{kind}"].mean())
    return figures, rows
